"""The rows that judging leaves, one for each example: their columns, and how they are read back.

The columns are explained in `docs/results.md`; whatever else an attack noted comes after them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

OUTCOME_COLUMNS: Mapping[str, tuple[str, bool]] = {
    "index": ("int64", False),
    "target": ("int64", True),
    "truth": ("int64", False),
    "label": ("int64", False),
    "rejected": ("bool", False),
    "score": ("float32", False),
    "logits": ("list<float32>", True),
    "l0": ("int64", False),
    "l2": ("float64", False),
    "linf": ("float64", False),
    "distance": ("float64", False),
    "void": ("bool", False),
    "forwards": ("float64", False),
    "backwards": ("float64", False),
    "differs": ("bool", True),
}
"""Name, type and whether it may be null, of the columns that every `outcomes.parquet` has."""

Rows: TypeAlias = Mapping[str, NDArray[Any]]
"""Outcomes of one job as arrays (N,), in ascending order of `index`.

`index`, `truth` and `label` are int64, `rejected` and `void` bool, the others float64; NaN stands for
null.
"""

_INTEGERS = ("index", "truth", "label")
_FLAGS = ("rejected", "void")
_NUMBERS = ("target", "score", "distance", "differs")
_NOTES = ("flat", "nonfinite")


class Frame(Protocol):
    """Outcomes as they come: a pandas `DataFrame`, a pyarrow `Table`, or a mapping of columns."""

    def __getitem__(self, name: str, /) -> Any:
        """Return a column."""
        ...


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


def load(path: Path) -> Rows:
    """Read what a table needs from an `outcomes.parquet`; logits and norms stay on the disk."""
    from pyarrow import parquet

    wanted = {*_INTEGERS, *_FLAGS, *_NUMBERS, *_NOTES}
    with parquet.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in wanted]
        return arrays(file.read(columns=names))


def arrays(frame: Frame) -> Rows:
    """Return outcomes as arrays in ascending order of `index`; raise ValueError if one stands twice."""
    rows: dict[str, NDArray[Any]] = {name: np.asarray(frame[name], np.int64) for name in _INTEGERS}
    rows |= {name: np.asarray(frame[name], np.bool_) for name in _FLAGS}
    rows |= {name: _numbers(frame[name]) for name in _NUMBERS}
    rows |= {name: _numbers(column) for name in _NOTES if (column := _optional(frame, name)) is not None}
    order = np.argsort(rows["index"], kind="stable")
    rows = {name: values[order] for name, values in rows.items()}
    twice = rows["index"][1:][np.diff(rows["index"]) == 0]
    if len(twice):
        raise ValueError(f"outcomes hold example {twice[0]} twice")
    return rows


def take(rows: Rows, chosen: NDArray[Any]) -> Rows:
    """Return some of the rows: `chosen` is a mask or positions."""
    return {name: values[chosen] for name, values in rows.items()}


def _optional(frame: Frame, name: str) -> Any:
    try:
        return frame[name]
    except KeyError:
        return None


def _numbers(column: Any) -> NDArray[np.float64]:
    """Return float64, with NaN for null, of whatever may hold nulls."""
    values = column if isinstance(column, np.ndarray) else None
    if values is None or values.dtype == object:
        import pyarrow as pa

        arrow = column if isinstance(column, pa.ChunkedArray) else pa.array(column, from_pandas=True)
        chunked = arrow if isinstance(arrow, pa.ChunkedArray) else pa.chunked_array([arrow])
        values = chunked.cast(pa.float64()).to_numpy()
    return np.asarray(values, np.float64)
