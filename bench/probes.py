"""What a fitted network answers to a few fixed images: what tells it from another one.

A state dict is not a network: code elsewhere, files that a constructor reads, draws that no seed reaches and
attributes that are no buffers decide answers too. So a training's receipt keeps answers, and whoever restores
the network asks again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from bench.noise import Noise
from bench.protocols import Images, Shape
from bench.referee import seeded
from bench.registry import DefenseEntry

IMAGES = 4
"""How many images are asked about: half of them noise, half smooth."""

KEPT = 16
"""How many of an image's logits are kept."""

SAME = 1e-5
"""What may differ on one kind of machine, as a share of what the answers spread over: rounding."""

ALIKE = 0.05
"""What may differ on another one, for at least half of the images: a long search may end elsewhere."""

Answers = Mapping[str, list[list[float | None]]]
"""For each read-out and view, a row of numbers for each image; None where one was not finite."""


def images(shape: Shape, device: torch.device | str) -> Images:
    """Return the images, the same for every network of this shape."""
    noise = Noise("probes", torch.arange(IMAGES))
    fine = noise.uniform(tuple(shape[:3]))
    coarse = noise.uniform((shape.channels, 4, 4))
    smooth = interpolate(coarse, size=(shape.height, shape.width), mode="bilinear", align_corners=False)
    first = torch.arange(IMAGES)[:, None, None, None] < IMAGES // 2
    return torch.where(first, fine, smooth.clamp(0, 1)).to(device)


def answers(model: Any, entry: DefenseEntry, shape: Shape, device: torch.device | str) -> Answers:
    """Return what every read-out, and every view in pixel space, answers to the images."""
    x = images(shape, device)
    found: dict[str, list[list[float | None]]] = {}
    with torch.no_grad():
        for readout in entry.readouts:
            with seeded(0, x.device):
                decision = model.decide(x.clone(), readout)
            columns = [decision.label[:, None], decision.rejected[:, None], decision.score[:, None]]
            if decision.logits is not None:
                columns.append(decision.logits[:, :KEPT])
            found[f"read-out {readout}"] = _rows(torch.cat([each.double() for each in columns], 1))
        for view in entry.views.values():
            if view.space == "pixel":
                with seeded(0, x.device):
                    logits = getattr(model, view.method)().logits(x.clone())
                found[f"view {view.name}"] = _rows(logits.reshape(-1, *logits.shape[-2:])[0, :, :KEPT])
    return found


def _rows(values: Tensor) -> list[list[float | None]]:
    """Return numbers that JSON can hold, with as many digits as a float32 has."""
    return [
        [float(f"{each:.8g}") if np.isfinite(each) else None for each in row]
        for row in values.detach().double().cpu().tolist()
    ]


def difference(kept: Answers, now: Answers, *, alike: bool) -> str | None:
    """Return what answers otherwise than it did, None where nothing does.

    With `alike`, on another kind of machine or by other versions, more may differ.
    """
    if kept.keys() != now.keys():
        return f"it has {', '.join(sorted(now))}; it had {', '.join(sorted(kept))}"
    for name, rows in kept.items():
        before, after = (np.array(each, dtype=np.float64) for each in (rows, now[name]))
        if before.shape != after.shape:
            return f"{name} answers with {after.shape[1]} numbers, and answered with {before.shape[1]}"
        room = (ALIKE if alike else SAME) * _sizes(before, name)
        equal = (np.abs(before - after) <= room) | (np.isnan(before) & np.isnan(after))
        moved = ~equal.all(1)
        if moved.sum() > (IMAGES // 2 if alike else 0):
            far = float(np.nan_to_num(np.abs(before - after)).max())
            return f"{name} answers otherwise to {int(moved.sum())} of {IMAGES} images, by up to {far:.3g}"
    return None


def _sizes(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Return how large the numbers of each column are; those of logits count together."""
    sizes: NDArray[np.float64] = np.nan_to_num(np.abs(values)).max(0)
    # A label and a refusal are the same or not, whatever their number; a score is on a scale of its own.
    exact, own = (2, 3) if name.startswith("read-out") else (0, 0)
    sizes[:exact] = 0.0
    sizes[own:] = sizes[own:].max(initial=0.0)
    return sizes
