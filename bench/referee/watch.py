"""The referee's watch: what it sees of an attack in passing, whatever the attack says of itself.

It sees the points that an attack asks about, the answers, and the gradients that come back; afterwards it
asks the view itself about the clean and the returned images. The columns are explained in `docs/results.md`.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from bench.losses import objective, succeeded
from bench.protocols import Images, Labels, Threat, View, identity
from bench.referee.validation import ROUNDING, leeway

EVERY = 10
"""Of so many questions, and of so many gradients, one is looked at: more would slow small networks down."""

SHORT = 20
"""Up to so many, it is one of five: what few questions there are tell how a margin grew."""

SNAPSHOTS = 32
"""How many times the best margins are remembered; of longer attacks every second, fourth... is kept."""

EARLIEST, LATEST = 0.3, 0.85
"""Between these shares of the questions lies the time from which on the end of an attack is counted."""

FEWEST = 5
"""Of fewer questions an attack has no pace."""

WHOLE = 0.01
"""How far the sum of an answer may be from 1 to be that of probabilities: bfloat16 tells no more."""


class Watch:
    """What is seen of an attack on a shard. Nothing here waits for a GPU.

    The first two questions are looked at, then the last of every five up to `SHORT`, then of every `EVERY`;
    of several copies of the shard that are asked about at once, the first alone.

    Args:
        x: Clean images (N, C, H, W).
        y: Their labels (N,).
        threat: The norm and the radius.
        target: Labels to reach (N,); None for an untargeted attack.
        refusal: Whether the last column of logits is a refusal.
    """

    def __init__(self, x: Images, y: Labels, threat: Threat, *, target: Labels | None, refusal: bool) -> None:
        self._x, self._y, self._threat, self._target = x, y, threat, target
        self._refusal = refusal
        self._most = threat.radius + leeway(threat.norm, x.shape[1:].numel())
        none = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self._backwards, self._flat, self._reach = none, none.clone(), none.clone()
        self._asked = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._won, self._heard = self._asked.clone(), self._asked.clone()
        self._shares = torch.ones_like(self._asked)
        self._questions = self._gradients = 0
        self._counts, self._looked = none.clone(), none.clone()
        self._best = torch.full_like(none, -torch.inf)
        self._snapshots: list[tuple[Tensor, Tensor]] = []

    def through(self, rows: Tensor, z: Tensor) -> Tensor:
        """Return points by another name, through which their gradient passes and is looked at.

        Args:
            rows: Positions in the shard of the examples, int64 (n,).
            z: Points (copies * n, ...).

        Returns:
            The same points.
        """
        if not (z.requires_grad and torch.is_grad_enabled()):
            return z
        self._gradients += 1
        if not _looks(self._gradients):
            return z
        seen = z.view_as(z)
        seen.register_hook(partial(self._gradient, rows))
        return seen

    def _gradient(self, rows: Tensor, gradient: Tensor) -> None:
        copies, rest = divmod(len(gradient), max(len(rows), 1))
        if rest or not copies:
            return
        peak = gradient.detach().flatten(1).abs().amax(1).view(copies, len(rows))
        says_nothing = ~((peak > 0) & peak.isfinite())
        self._backwards[rows] += 1
        self._flat[rows] += says_nothing.double().mean(0)

    @torch.no_grad()
    def asked(self, rows: Tensor, z: Tensor, logits: Tensor, plain: Tensor) -> None:
        """Look at what an attack asked about; of points that are no images, at the answers alone.

        Args:
            rows: Positions in the shard of the examples, int64 (n,).
            z: Points (copies * n, ...).
            logits: The answers as the attack gets them, (copies * n, K) or (T, copies * n, K).
            plain: The answers as the network gave them, of the same shape.
        """
        n = len(rows)
        self._questions += 1
        self._counts[rows] += 1
        if not _looks(self._questions) or not n or len(z) % n:
            return
        self._heard[rows] = True
        self._shares[rows] &= _sum_to_one(plain[..., :n, :], refusal=self._refusal)
        if z.shape[1:] != self._x.shape[1:]:
            return
        z, logits = z[:n].detach(), logits[..., :n, :]
        far = self._threat.distance(self._x[rows], z)
        least, most = z.flatten(1).aminmax(dim=1)
        inside = (least >= -ROUNDING) & (most <= 1 + ROUNDING)
        lawful = inside & (far <= self._most)
        self._asked[rows] = True
        self._reach[rows] = torch.where(lawful, far.double(), 0.0).maximum(self._reach[rows])
        question, labels = self._question(rows), self._y[rows]
        # Whoever makes right what was wrong unmoved has lost nothing that it found: that is another flag's.
        self._won[rows] |= lawful & (far > 0) & succeeded(question, logits, labels)
        margin = objective(question, _as_judged(logits), labels, "margin").double()
        self._best[rows] = torch.where(lawful & ~margin.isnan(), margin, -torch.inf).maximum(self._best[rows])
        self._looked[rows] = self._counts[rows]
        self._snapshots.append((self._looked.clone(), self._best.clone()))
        if len(self._snapshots) > SNAPSHOTS:
            del self._snapshots[::2]

    def _question(self, rows: Tensor) -> View:
        target = None if self._target is None else self._target[rows]
        return View(identity, target=target, refusal=self._refusal)

    @torch.no_grad()
    def columns(self, view: View, z: Images) -> Mapping[str, Tensor]:
        """Return what was seen, as columns of the shard.

        Args:
            view: The view that was attacked, with its target; what it is asked here counts as no pass.
            z: The images that the defense is shown, (N, C, H, W).

        Returns:
            The columns of `bench.results.outcomes.WATCHED`, float64 (N,), NaN for what was not seen.
        """
        nan = torch.full_like(self._reach, torch.nan)
        margins = {"view_margin_clean": nan, "view_margin": nan}
        lost = nan
        if view.encode is identity:
            margins = {
                name: objective(view, _as_judged(view.logits(images)), self._y, "margin").double()
                for name, images in (("view_margin_clean", self._x), ("view_margin", z))
            }
            lost = torch.where(self._asked, (self._won & ~(margins["view_margin"] > 0)).double(), nan)
        radius = self._threat.radius
        # One step is returned without another question.
        reach = self._reach.maximum(self._threat.distance(self._x, z).double())
        found = {
            "zero_gradients": torch.where(self._backwards > 0, self._flat / self._backwards, nan),
            "probed": torch.where(self._asked, reach / radius, nan) if 0 < radius < torch.inf else nan,
            "lost_success": lost,
            **margins,
            "probabilities": torch.where(self._heard, self._shares.double(), nan),
            "end_pace": self._end_pace(**margins),
        }
        # A file of tensors refuses two columns that are one.
        return {name: values.clone() for name, values in found.items()}

    def _end_pace(self, view_margin_clean: Tensor, view_margin: Tensor) -> Tensor:
        """Return how fast the best margins (N,) rose at the end of the attack, with their mean pace as 1.

        The end begins with the last look between `EARLIEST` and `LATEST`; NaN where there was none or too few
        questions, or where the margin did not rise.
        """
        if not self._snapshots:
            return torch.full_like(self._best, torch.nan)
        looked, best = (torch.stack(each) for each in zip(*self._snapshots, strict=True))
        share = looked / self._counts.clamp(min=1)
        numbers = torch.arange(len(share), device=share.device)[:, None]
        at = torch.where((share >= EARLIEST) & (share <= LATEST), numbers, -1).amax(0)
        row = at.clamp(min=0)[None]
        then, past = best.gather(0, row)[0].maximum(view_margin_clean), share.gather(0, row)[0]
        end = self._best.maximum(view_margin)
        rise = end - view_margin_clean
        pace = (end - then) / rise / (1 - past)
        known = (at >= 0) & (self._counts >= FEWEST)
        return torch.where(known & (rise > 0) & rise.isfinite(), pace, torch.nan)


def _looks(count: int) -> bool:
    """Return whether the question of this number, from 1, is looked at."""
    return count <= 2 or count % (5 if count <= SHORT else EVERY) == 0


def _as_judged(logits: Tensor) -> Tensor:
    """Return the logits (n, K) that decide about a success: of several answers (T, n, K), their mean."""
    return logits.mean(0) if logits.dim() == 3 else logits


def _sum_to_one(answers: Tensor, *, refusal: bool) -> Tensor:
    """Return which examples of (n, K) or (T, n, K) answers are answered by probabilities, bool (n,).

    The last column may be a refusal, that is no probability of a class.
    """
    found = torch.zeros(answers.shape[:-1], dtype=torch.bool, device=answers.device)
    for shares in (answers, answers[..., :-1]) if refusal else (answers,):
        found |= (shares >= 0).all(-1) & ((shares.float().sum(-1) - 1).abs() < WHOLE)
    return found.flatten(0, -2).all(0) if found.dim() > 1 else found
