"""Statistics of paired outcomes: a test and an interval for the loss between two measurements of one set of
examples, and what a number of examples can show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """The net loss between two measurements of the same examples."""

    n: int
    """The number of examples."""
    before: float
    """The share of them that was held before, in [0, 1]; of several seeds their mean."""
    after: float
    """The share that is held now."""
    lost: float
    """The examples that were held and are broken now; of several seeds their mean, maybe a fraction."""
    gained: float
    """The examples that were broken and are held now."""
    p: float
    """The two-sided mid-p value of no change."""
    low: float
    """The lower end of the paired interval of the loss, a share; a negative loss is a gain."""
    high: float
    """The upper end."""

    @property
    def value(self) -> float:
        """The net loss as a share of the examples."""
        return (self.lost - self.gained) / self.n

    @property
    def churn(self) -> float:
        """The share of the examples that changed, either way."""
        return (self.lost + self.gained) / self.n
