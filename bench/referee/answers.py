"""How a defense is asked for its answers, and when two answers to one image are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.errors import out_of_memory
from bench.protocols import Decision, Images, answered

CHUNK = {"cpu": 256, "cuda": 4096}
"""Number of images that are computed at once, by the type of device: few enough for the cache of a processor,
and enough to fill a GPU.
"""

ROUNDING = 1e-4
"""Largest difference of logits between both answers at which another label or refusal counts as a tie, as a
share of the range of an example's logits. In another batch sums are computed in another order.
"""


DRIFT = 0.01
"""Largest difference of logits at which the answers count as the same, as a share of the same range."""


def ask(model: Any, images: Images, readout: str, device: torch.device) -> dict[str, Tensor]:
    """Return the answers of a read-out, as a table keeps them.

    Args:
        model: The fitted defense.
        images: Images (N, C, H, W) on the CPU.
        readout: The name of the read-out.
        device: The device of the defense.

    Returns:
        Columns on the CPU: ``label`` int64 (N,), -1 where there is no answer, ``rejected`` bool (N,),
        ``score`` float32 (N,), and where the read-out gives them ``logits`` and ``thresholds``, float32
        (N, K), and ``tied``, bool (N,): whether the two highest logits are equal.
    """
    decision = decided(model, images, readout, device)
    # A defense that answers NaN to a valid image counts as broken, and no class has the label -1.
    lost = decision.score.isnan()
    if decision.logits is not None:
        lost = lost | ~answered(decision.logits)
    found = {
        "label": decision.label.long().masked_fill(lost, -1),
        "rejected": decision.rejected.bool(),
        "score": decision.score.float(),
    }
    if decision.logits is not None:
        found["logits"] = decision.logits.float()
        # By the values that the label is the arg-max of: as they are stored, more of them may be equal.
        best = decision.logits.topk(min(2, decision.logits.shape[1])).values
        found["tied"] = (best[:, 0] == best[:, -1]) & (best.shape[1] > 1)
    if decision.thresholds is not None:
        found["thresholds"] = decision.thresholds.float()
    return {name: values.detach().cpu() for name, values in found.items()}


def decided(model: Any, images: Images, readout: str, device: torch.device) -> Decision:
    """Return the answers of a read-out, in chunks of a fixed size, or of half the size where memory is short.

    Args:
        model: The fitted defense.
        images: Images (N, C, H, W) on any device.
        readout: The name of the read-out.
        device: The device of the defense.

    Returns:
        The decision for N images, its thresholds repeated for each image: (N, K).

    Raises:
        ValueError: The read-out gave a wrong number of labels.
    """
    size, parts, start = CHUNK[device.type], [], 0
    while start < len(images):
        chunk = images[start : start + size].to(device)
        try:
            decision = model.decide(chunk, readout)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or len(chunk) == 1:
                raise
            size = max(len(chunk) // 2, 1)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if decision.label.shape != (len(chunk),):
            raise ValueError(
                f"read-out {readout!r} gave {tuple(decision.label.shape)} labels for {len(chunk)} images"
            )
        parts.append(decision)
        start += len(chunk)
    return Decision(
        label=torch.cat([each.label for each in parts]),
        rejected=torch.cat([each.rejected for each in parts]),
        score=torch.cat([each.score for each in parts]),
        logits=_joined([each.logits for each in parts]),
        # A row of thresholds for each image, so that a row of outcomes needs no other.
        thresholds=_joined(
            [
                None if each.thresholds is None else each.thresholds.expand(len(each.label), -1)
                for each in parts
            ]
        ),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """Return which answers differ in label or refusal, or by more than `DRIFT` in their logits.

    Ties that rounding decides are no difference.

    Args:
        before: The columns of `ask` for N images.
        now: Those of another question about the same images.

    Returns:
        bool (N,).
    """
    relabelled, refused = (before[name] != now[name] for name in ("label", "rejected"))
    if "logits" not in before:
        # The score tells how near a refusal was; for a label there is no such measure.
        one, other = before["score"], now["score"]
        return relabelled | (refused & ((one - other).abs() > ROUNDING * one.abs()))
    apart = moved(before["logits"], now["logits"])
    return ((relabelled | refused) & (apart > ROUNDING)) | (apart > DRIFT)


def moved(before: Tensor, now: Tensor) -> Tensor:
    """Return how far logits moved, as a share of the range of those before.

    Args:
        before: Logits (N, K); values that are not finite count as 0.
        now: Logits of the same shape.

    Returns:
        float64 (N,), 0 or more; infinite where logits without a range moved.
    """
    one, other = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (before, now))
    apart, spread = (one - other).abs().amax(1), one.amax(1) - one.amin(1)
    return torch.where(apart > 0, apart / spread, 0.0)
