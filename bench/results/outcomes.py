"""Outcomes: the columns of `outcomes.parquet`, which has a row for each example, and how they are read.

The columns are explained in `docs/results.md`. The notes of an attack follow them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

OUTCOME_COLUMNS: Mapping[str, tuple[str, bool]] = {
    "index": ("int64", False),
    "target": ("int64", True),
    "truth": ("int64", False),
    "label": ("int64", False),
    "rejected": ("bool", False),
    "score": ("float32", False),
    "logits": ("list<float32>", True),
    "thresholds": ("list<float32>", True),
    "l0": ("int64", False),
    "l2": ("float64", False),
    "linf": ("float64", False),
    "distance": ("float64", False),
    "invalid": ("bool", False),
    "forwards": ("float64", False),
    "backwards": ("float64", False),
    "differs": ("bool", True),
    "parameters": ("int64", False),
    "broken_share": ("float64", False),
}
"""The columns of an `outcomes.parquet`: name, type, and whether it may be null.

Files that are older than `thresholds` and `parameters` lack these two. `broken_share` is there where a random
defense was asked several times about each image.
"""

BROKEN_SHARE = "broken_share"
"""The share of the draws in which an example was broken."""

Rows: TypeAlias = Mapping[str, NDArray[Any]]
"""Outcomes of one evaluation as arrays of shape (N,), in ascending order of `index`.

`index`, `truth` and `label` are int64, `rejected` and `invalid` bool, the others float64 with NaN for null.
`broken_share` is there where a random defense was asked several times about each image, and `raised.NAME`
where several attacks were run as one: whether NAME raised when it was run on the example.
Where they are asked for, `logits` and `thresholds` have shape (N, K), and `parameters` (N,).
"""

_INTEGERS = ("index", "truth", "label")
_FLAGS = ("rejected", "invalid")
_NUMBERS = ("target", "score", "distance", "differs")

WATCHED = (
    "zero_gradients",
    "probed",
    "lost_success",
    "view_margin_clean",
    "view_margin",
    "probabilities",
    "end_pace",
)
"""The columns of what the referee saw of an attack that looks at a network: float64, null for what it did not
see.
"""

TIED, OWN_SOURCE = "tied", "own_source"
JUDGED = (TIED, OWN_SOURCE)
"""The columns of what is seen where a defense is asked about the images: bool, null for what was not seen.

Whether the two highest logits are equal; and of a transfer, whether the images were crafted on the weights
that are asked now.
"""

RESERVED = frozenset({*OUTCOME_COLUMNS, *WATCHED, *JUDGED})
"""Names of columns that no note of an attack may have."""

NOTES = ("flat", "nonfinite", "raised", "saturated")
"""The notes of attacks that tables know."""

RAISED = "raised."
"""How the notes begin that name an attack that raised: one of several that were run as one."""

WHERE_THERE = (*NOTES, *WATCHED, *JUDGED, "backwards", BROKEN_SHARE)
"""The columns that tables read where outcomes have them."""

LISTS = ("logits", "thresholds")
"""The columns that hold a list for each example."""


class Frame(Protocol):
    """Outcomes in any form that gives a column by its name: a pandas `DataFrame`, a pyarrow `Table`, a
    mapping."""

    def __getitem__(self, name: str, /) -> Any:
        """Return a column; raise `KeyError` where there is none of this name."""
        ...


FrameOf: TypeAlias = Callable[[str], Frame | None]
"""Gives the outcomes of an evaluation by its key, None where there are none."""


def schema() -> "pa.Schema":
    """Return the parquet schema of the columns that every outcome has."""
    import pyarrow as pa

    kinds = {
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "list<float32>": pa.list_(pa.float32()),
    }
    return pa.schema([pa.field(name, kinds[kind], null) for name, (kind, null) in OUTCOME_COLUMNS.items()])


class Stored:
    """The stored outcomes of an evaluation.

    Columns that every table needs are read at once, others when they are asked for.

    Args:
        names: The columns that there are.
        read: Returns some of them as a table.
    """

    def __init__(self, names: Sequence[str], read: "Callable[[Sequence[str]], pa.Table]") -> None:
        self._names, self._read = names, read
        wanted = {*_INTEGERS, *_FLAGS, *_NUMBERS, *WHERE_THERE}
        self._columns = read([name for name in names if name in wanted or name.startswith(RAISED)])

    @property
    def column_names(self) -> Sequence[str]:
        """The names of all columns."""
        return self._names

    @classmethod
    def of(cls, path: Path) -> "Stored":
        """Return the outcomes in an `outcomes.parquet`.

        Args:
            path: The file.

        Returns:
            Its columns.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no parquet file.
        """
        from pyarrow import parquet

        def read(names: Sequence[str]) -> "pa.Table":
            with parquet.ParquetFile(path) as file:
                return file.read(columns=list(names))

        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
        return cls(names, read)

    def __getitem__(self, name: str) -> Any:
        """Return a column; raise `KeyError` where there is none of this name."""
        if name not in self._names:
            raise KeyError(name)
        if name not in self._columns.column_names:
            self._columns = self._columns.append_column(name, self._read([name]).column(0))
        return self._columns[name]

    def frame(self, without: Collection[str] = ()) -> "pd.DataFrame":
        """Return all columns as a data frame.

        Args:
            without: Names of columns to leave out.

        Returns:
            The rows as they are stored; what may be null has a type that knows missing values.
        """
        import pandas as pd
        import pyarrow as pa

        names = [name for name in self._names if name not in without]
        table = self._read(names)
        nullable = {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype()}
        never = {name for name, (_, null) in OUTCOME_COLUMNS.items() if not null}
        return pd.DataFrame(
            {
                name: table.column(name).to_pandas(types_mapper=None if name in never else nullable.get)
                for name in names
            }
        )


def load(path: Path, also: Iterable[str] = ()) -> Rows:
    """Read what a table needs from an `outcomes.parquet`.

    Args:
        path: The file.
        also: Columns to read too, where the file has them.

    Returns:
        The outcomes.

    Raises:
        ValueError: The file has an example twice.
    """
    return arrays(Stored.of(path), also)


def arrays(frame: Frame, also: Iterable[str] = ()) -> Rows:
    """Return outcomes as arrays in ascending order of `index`.

    Args:
        frame: The outcomes.
        also: Columns to return too (`logits`, `thresholds`, `parameters`). One that the frame lacks, or that
        is
            null (a read-out may have no thresholds), is left out.

    Returns:
        The outcomes.

    Raises:
        ValueError: An example is there twice.
    """
    rows: dict[str, NDArray[Any]] = {name: np.asarray(frame[name], np.int64) for name in _INTEGERS}
    rows |= {name: np.asarray(frame[name], np.bool_) for name in _FLAGS}
    rows |= {name: _numbers(frame[name]) for name in _NUMBERS}
    rows |= beginning(frame, RAISED)
    for name in (*WHERE_THERE, *also):
        if (column := _optional(frame, name)) is not None:
            values = _lists(column) if name in LISTS else _numbers(column)
            if values is not None:
                rows[name] = values
    order = np.argsort(rows["index"], kind="stable")
    rows = {name: values[order] for name, values in rows.items()}
    twice = rows["index"][1:][np.diff(rows["index"]) == 0]
    if len(twice):
        raise ValueError(f"outcomes hold example {twice[0]} twice")
    return rows


def beginning(frame: Frame, start: str) -> dict[str, NDArray[np.float64]]:
    """Return the columns of outcomes whose names begin with a text.

    Args:
        frame: The outcomes, in a form that tells its columns.
        start: The text.

    Returns:
        By name: float64 (N,), NaN for null.
    """
    # An arrow table tells its columns, a mapping and a data frame their keys.
    names: Iterable[Any] = getattr(frame, "column_names", None) or getattr(frame, "keys", list)()
    return {name: _numbers(frame[name]) for name in names if str(name).startswith(start)}


def select(rows: Rows, chosen: NDArray[Any]) -> Rows:
    """Return some of the rows.

    Args:
        rows: Outcomes of N examples.
        chosen: A mask of shape (N,), or positions.

    Returns:
        The outcomes of the chosen examples.
    """
    return {name: values[chosen] for name, values in rows.items()}


def _optional(frame: Frame, name: str) -> Any:
    try:
        return frame[name]
    except KeyError:
        return None


def _lists(column: Any) -> NDArray[np.float64] | None:
    """Return (N, K) float64 of a column of lists of one length; None where any of them is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, np.ndarray) and column.dtype != object:
        return np.asarray(column, np.float64)
    arrow = column if isinstance(column, pa.ChunkedArray) else pa.array(column, from_pandas=True)
    chunked = arrow if isinstance(arrow, pa.ChunkedArray) else pa.chunked_array([arrow])
    if chunked.null_count or not len(chunked):
        return None
    flat = pc.list_flatten(chunked).to_numpy()
    return np.asarray(flat, np.float64).reshape(len(chunked), -1)


def _numbers(column: Any) -> NDArray[np.float64]:
    """Return float64, with NaN for null, of whatever may hold nulls."""
    values = column if isinstance(column, np.ndarray) else None
    if values is None or values.dtype == object:
        import pyarrow as pa

        arrow = column if isinstance(column, pa.ChunkedArray) else pa.array(column, from_pandas=True)
        chunked = arrow if isinstance(arrow, pa.ChunkedArray) else pa.chunked_array([arrow])
        values = chunked.cast(pa.float64()).to_numpy()
    return np.asarray(values, np.float64)
