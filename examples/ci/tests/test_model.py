"""The model's own tests; `pytest --robustness-baseline robustness` puts the baseline's beside them."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model import build  # noqa: E402


def test_the_weights_fit_and_logits_are_finite():
    """Load the weights as the gate does, and ask for four answers."""
    model = build()
    model.load_state_dict(load_file(ROOT / "weights.safetensors"))
    logits = model(torch.rand(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    assert logits.isfinite().all()
