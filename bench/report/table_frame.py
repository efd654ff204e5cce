"""A table of a results folder as a pandas data frame that can be printed and drawn."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.report.frames import details_of, frame_of
from bench.report.render import to_markdown
from bench.report.render.figure import bars, drawn
from bench.report.tables import RenderedTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TableFrame(pd.DataFrame):
    """The numbers of a table, in the unit of their column: proportions in percent, NaN where there is none.

    What is derived from it (a selection, a sum) is a plain `pandas.DataFrame`.

    Args:
        rendered: The table, cut from outcomes.
    """

    # A list: pandas adds it to another when it restores a pickled frame.
    _metadata = ["rendered"]  # noqa: RUF012 - pandas reads it of the class

    def __init__(self, rendered: RenderedTable) -> None:
        frame = frame_of(rendered)
        super().__init__(frame)  # type: ignore[call-arg] # The stubs know `__new__` alone.
        self.attrs = frame.attrs
        self.rendered = rendered

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def details(self) -> pd.DataFrame:
        """Return a row for each number: its interval, its number of examples, its flags."""
        return details_of(self.rendered)

    def to_markdown(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        """Return the table as `bench report --format markdown` prints it, with its flags.

        Arguments of pandas are ignored: the table says what it shows.
        """
        return to_markdown(self.rendered)

    def figure(self) -> "Figure":
        """Return a figure: the curves that the task file asks for, else a bar for each number.

        Returns:
            A `matplotlib.figure.Figure`; ``figure.savefig("table.png")`` writes it.
        """
        return drawn(self.rendered) if self.rendered.table.figure is not None else bars(self.rendered)
