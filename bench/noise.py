"""Random numbers that belong to an example: each draw is keyed by job, example and counter.

Dropping, sharding and reordering examples therefore change nothing, and neither does the device: the
bits come from SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), computed with
torch's wrapping 64-bit integers.
"""

import hashlib
import math
from typing import Self

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(state: Tensor) -> Tensor:
    """Return SplitMix64's output for each int64 state (its finaliser, "variant 13" of Stafford)."""
    word = (state ^ _shifted(state, 30)).mul_(_signed(_MIX1))
    word = word.bitwise_xor_(_shifted(word, 27)).mul_(_signed(_MIX2))
    return word.bitwise_xor_(_shifted(word, 31))


def seed_of(*words: object) -> int:
    """Return a 64-bit seed, signed, that depends on every word."""
    text = "\x1f".join(str(word) for word in words).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


class Noise:
    """Streams of random numbers, one for each example of a batch.

    An example's draws depend on `key`, on its index in the data set and on how often it has drawn
    before, and on nothing else. Draws have the shape (N, *shape), N being the number of examples.
    """

    def __init__(
        self,
        key: object,
        index: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: object = None,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._shard = shard
        seed = torch.tensor(seed_of(key))
        self._stream = mix(mix(index.to("cpu", torch.int64) + 1) ^ seed)
        self._drawn = torch.zeros_like(self._stream)
        self._rows: Tensor | None = None

    def take(self, rows: Tensor) -> Self:
        """Return the streams of the examples `rows`; they go on where they are."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        rows = rows.to("cpu")
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def apart(self, name: str) -> Self:
        """Return other streams of the same examples, at their beginning; `name` tells them from these."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._stream = mix(self._stream ^ torch.tensor(seed_of("apart", name)))
        part._drawn = torch.zeros_like(part._stream)
        if self._shard is not None:
            part._shard = (self._shard, name)
        return part

    def shared(self) -> "Noise":
        """Return one fresh stream for the whole shard, as attacks ``keyed="shard"`` need it."""
        if self._shard is None:
            raise RuntimeError('shared draws need an attack that is declared keyed="shard"')
        return Noise(self._shard, torch.zeros(1, dtype=torch.int64), device=self._device, dtype=self._dtype)

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """Return (N, *shape) int64 words, all bits random."""
        rows = slice(None) if self._rows is None else self._rows
        start = mix(self._stream[rows] + self._drawn[rows] * _signed(_GAMMA))
        self._drawn[rows] += 1
        count = math.prod(shape)
        step = torch.arange(1, count + 1, device=self._device) * _signed(_GAMMA)
        return mix(start.to(self._device)[:, None] + step).view(-1, *shape)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (N, *shape) numbers, uniform in [low, high)."""
        # 24 bits in every dtype, so that float32 and float64 runs start from the same points.
        unit = _shifted(self.bits(shape), 40).to(self._dtype).mul_(2.0**-24)
        return unit.mul_(high - low).add_(low)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Return (N, *shape) standard normal numbers, by the method of Box and Muller."""
        words = self.bits(shape)
        # Two 32-bit halves: a radius from (0, 1] and an angle from [0, 1).
        radius = _shifted(words, 32).to(torch.float64).add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words.bitwise_and_((1 << 32) - 1).to(torch.float64).mul_(2.0**-32 * 2 * math.pi)
        return radius.mul_(angle.cos_()).to(self._dtype)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Return (N, *shape) numbers that are -1 or 1 with equal chance."""
        return _shifted(self.bits(shape), 63).to(self._dtype).mul_(2).sub_(1)

    def integers(self, shape: tuple[int, ...], bound: int) -> Tensor:
        """Return (N, *shape) int64 numbers in [0, bound), for bounds below 2**31."""
        return _shifted(self.bits(shape), 32).mul_(bound).bitwise_right_shift_(32)
