"""What numbers are computed in: float32 in every verdict, bfloat16 in a search that a task file allows it.

A search in bfloat16 asks the network under autocast, which rounds the factors of matrix products and
convolutions to eight bits of mantissa. It may take an example for broken that is not, and drop it. So it is
watched: whatever it took for broken and float32 does not confirm at the image that it returned is searched
again in float32. What float32 finds broken counts, whatever the search thought of it.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.errors import DisturbedError, InputError
from bench.losses import succeeded
from bench.protocols import Images, Labels, Threat, View, distance, identity
from bench.referee.settings import PRODUCTS

_MENDED_BY = "write `precision: float32` beside the attack"


def reduced() -> list[str]:
    """Return the settings of torch by which products of float32 numbers are computed in less: TF32, bfloat16.

    Returns:
        A phrase for each such setting; none where all products are those of float32.
    """
    newer = ((each.name, each.read, ("none", "ieee")) for each in PRODUCTS)
    older: tuple[tuple[str, Callable[[], Any], tuple[object, ...]], ...] = (
        ("the precision of float32 matrix products", torch.get_float32_matmul_precision, ("highest",)),
        ("torch.backends.cuda.matmul.allow_tf32", lambda: torch.backends.cuda.matmul.allow_tf32, (False,)),
        ("torch.backends.cudnn.allow_tf32", lambda: torch.backends.cudnn.allow_tf32, (False,)),
    )
    found = []
    for name, read, full in (*newer, *older):
        # An older one cannot be read where it and a newer one, which is read too, say different things.
        with contextlib.suppress(RuntimeError):
            if (now := read()) not in full:
                found.append(f"{name} is {now!r}")
    return found


@contextmanager
def full_products() -> Iterator[None]:
    """Refuse that products of float32 numbers become less than that in the block.

    Yields:
        Nothing.

    Raises:
        DisturbedError: A setting of torch reduces them when the block ends, and did not when it began.
    """
    before = reduced()
    yield
    if more := [each for each in reduced() if each not in before]:
        raise DisturbedError(
            f"changed what the whole process shares: {'; '.join(more)}; a verdict needs all of float32"
        )


def in_bfloat16(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a callable of a view that computes under autocast in bfloat16.

    Gradients of float32 points stay float32: the backward pass of a rounding is one to float32.

    Args:
        call: The callable: points (n, ...) -> answers.
    """

    def asked(*points: Tensor) -> Tensor:
        with torch.autocast(points[0].device.type, dtype=torch.bfloat16):
            return call(*points)

    return asked


class Claims:
    """The examples that a search has taken for broken, at an image within the threat.

    Args:
        view: The view, which says what a refusal is and whether its points are images.
        x: Clean images (N, C, H, W).
        y: Their labels (N,).
        threat: The norm and the radius.
        room: What rounding may add to a distance, in the threat's norm, 0 or more.
        target: Labels to reach, int64 (N,); None for an untargeted attack.
    """

    def __init__(
        self, view: View, x: Images, y: Labels, threat: Threat, room: float, target: Labels | None
    ) -> None:
        self._refusal, self._target = view.refusal, target
        self._x, self._y, self._threat, self._room = x, y, threat, room
        self._bounded = math.isfinite(threat.radius) and view.decode is identity
        self._times = torch.zeros(len(y), dtype=torch.int64, device=y.device)

    @property
    def claimed(self) -> Tensor:
        """True where the search has taken an example for broken: bool (N,)."""
        return self._times > 0

    @torch.no_grad()
    def note(self, rows: Tensor, points: Tensor, logits: Tensor) -> None:
        """Take note of answers, as the attack sees them.

        The host waits for nothing here.

        Args:
            rows: Positions of the examples: int64 (n,).
            points: What was asked about, (copies * n, ...), copy after copy.
            logits: The answers, (copies * n, K) or (T, copies * n, K).
        """
        copies, rest = divmod(len(points), max(len(rows), 1))
        if rest:
            # Which row is whose, nobody can tell.
            self._times[rows] += 1
            return
        target = None if self._target is None else self._target[rows]
        won = succeeded(View(identity, refusal=self._refusal, target=target), logits, self._y[rows])
        if self._bounded:
            centres = self._x[rows].repeat(copies, *[1] * (points.dim() - 1))
            won &= distance(centres, points, self._threat.norm) <= self._threat.radius + self._room
        self._times.index_add_(0, rows, won.view(copies, len(rows)).sum(0))


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network for a search in bfloat16, since it may keep what it computed.

    Args:
        model: The network.

    Raises:
        InputError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"precision: bf16-search asks a copy of the network, and it cannot be copied ({error}); "
            f"{_MENDED_BY}"
        ) from error


_PRODUCTS = frozenset(
    {"mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution"}
    | {"convolution_overrideable", "mkldnn_rnn_layer", "_thnn_fused_lstm_cell"}
)
"""Operations, by their names in torch, that autocast rounds the arguments of."""


class _Products(TorchDispatchMode):
    """Notes in what matrix products and convolutions are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(returned, Tensor) and (name in _PRODUCTS or "attention" in name):
            self.dtypes.add(returned.dtype)
        return returned


def check_bfloat16(asked: Callable[[], Tensor]) -> None:
    """Refuse a network that does not compute in bfloat16 under autocast.

    Args:
        asked: Asks the network something small under autocast, with gradients where the attack needs them.

    Raises:
        InputError: It fails, needs float64, or chooses what it computes in by itself.
    """
    seen = _Products()
    try:
        with seen:
            asked()
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"precision: bf16-search: the network cannot be asked in bfloat16 ({type(error).__name__}: "
            f"{error}); {_MENDED_BY}"
        ) from error
    if torch.float64 in seen.dtypes:
        raise InputError(
            f"precision: bf16-search: the network computes products in float64, which it needs; {_MENDED_BY}"
        )
    if torch.bfloat16 not in seen.dtypes:
        own = ", ".join(sorted(str(each).removeprefix("torch.") for each in seen.dtypes))
        why = (
            f"it computes its products in {own}, as it chooses itself" if own else "it has no matrix products"
        )
        raise InputError(
            f"precision: bf16-search: nothing of the network is computed in bfloat16: {why}; {_MENDED_BY}"
        )
