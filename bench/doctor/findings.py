"""What an examination finds: sentences with counts, their levels, and codes where there is doubt."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["quiet", "untested", "note", "doubt", "alarm"]
"""How much a finding says against a number under attack, the least first. ``quiet``: the test looked, and its
sentence is evidence for the number. ``untested``: it could not look. ``note``: worth knowing. ``doubt``: the
number may be too high. ``alarm``: it is, or says nothing about the defense.
"""

LEVELS: tuple[Level, ...] = ("quiet", "untested", "note", "doubt", "alarm")
"""All levels, in the order of their weight."""

ADVICE: Mapping[str, str] = {
    "at-chance": "check labels, weights and normalisation",
    "refuses-clean": "report coverage beside every accuracy",
    "test-images-in-training": "split the data anew, and train again",
    "knows-test-images": "fit it without a test image",
    "no-exact-view": "give it a view of what is scored",
    "view-differs": "attack a view whose arg-max is the answer",
    "unseen-refusal": "give the view the refusal as its last logit",
    "autograd-differs": "answer alike with and without gradients",
    "depends-on-company": "let the image alone decide its answer",
    "depends-on-process": "keep no memory of what was asked before",
    "refuses-rounding": "refuse by content, not by a pixel's last bits",
    "refuses-noise": "count these refusals as failures, too",
    "depends-on-precision": "compare its logits in float64",
    "not-uphill": "attack a view whose gradient leads uphill",
    "rough-slope": "average over gradients of near points",
    "gradient-not-of-margin": "attack without gradients (square), or by bpda",
    "margin-jumps": "attack the logits before they are rounded",
    "loss-matters": "attack with loss: margin, or dlr",
    "more-steps-matter": "double steps and restarts until nothing falls",
    "more-draws-matter": "let the attack average over more draws",
    "unlimited-fails": "find what stops an attack without a limit",
    "noise-breaks": "do not quote the gradient attack alone",
    "blind-breaks": "add square to the task, and quote the worst",
    "weak-on-features": "attack by bpda; add square and a transfer",
    "stronger-attack": "add pgd with loss: margin, dlr to the task",
    "attack-raises": "run it on a bench.testing.Halfspace",
    "unlawful-images": "project on the ball and the box, last of all",
    "changes-others": "draw from noise alone, change copies alone",
    "does-not-cross": "compare the sign, the steps and the radius",
    "moves-too-far": "search on after the first success",
    "misses-targets": "take loss and success from bench",
    "moves-otherwise": "draw from noise alone",
    "examples-interact": "keep examples apart, or declare rng: shard",
    "finds-few-plants": "more steps, smaller ones, restarts",
    "drops-successes": "return the first success, not the last point",
}
"""What to do about each code, in a few words; `docs/flags.md` has a section for each."""


@dataclass(frozen=True)
class Finding:
    """What one test found."""

    test: str
    """The name of the test."""
    level: Level
    """How much it says against the number."""
    message: str
    """A sentence with counts."""
    code: str | None = None
    """One of `ADVICE`; None where the test was quiet or could not look."""
    chance: float | None = None
    """The probability that a sound defense gives such a finding, at most; None where there is none to state.
    """
    late: bool = False
    """Whether the test could not look for want of time."""

    @property
    def advice(self) -> str:
        """What to do about it; empty where nothing is to be done."""
        return ADVICE[self.code] if self.code else ""


@dataclass(frozen=True)
class Findings:
    """What an examination found, test by test."""

    found: tuple[Finding, ...]
    """The findings, in the order of the tests."""
    seconds: float = 0.0
    """How long the examination took."""

    @classmethod
    def of(cls, found: Iterable[Finding], seconds: float = 0.0) -> "Findings":
        """Return findings in a tuple.

        Args:
            found: The findings, in the order of the tests.
            seconds: How long the examination took, 0 or more.

        Returns:
            The same findings.
        """
        return cls(tuple(found), seconds)

    @property
    def worst(self) -> Level:
        """The heaviest level among the findings; ``quiet`` where there are none."""
        return max((each.level for each in self.found), key=LEVELS.index, default="quiet")

    @property
    def codes(self) -> dict[str, Level]:
        """The codes above a note, with their heaviest levels."""
        heavy = sorted(self.found, key=lambda each: LEVELS.index(each.level))
        return {each.code: each.level for each in heavy if each.code and each.level in ("doubt", "alarm")}

    @property
    def untested(self) -> tuple[str, ...]:
        """The names of the tests that could not look."""
        return tuple(dict.fromkeys(each.test for each in self.found if each.level == "untested"))

    @property
    def late(self) -> tuple[str, ...]:
        """The names of the tests for which there was no time."""
        return tuple(dict.fromkeys(each.test for each in self.found if each.late))

    @property
    def failed(self) -> bool:
        """Whether the examination as a whole ended otherwise than by its tests."""
        return any(each.test == "examination" and each.level == "untested" for each in self.found)

    def described(self) -> dict[str, Any]:
        """Return everything for JSON."""
        found = [{**asdict(each), "advice": each.advice} for each in self.found]
        return {"worst": self.worst, "seconds": round(self.seconds, 2), "findings": found}
