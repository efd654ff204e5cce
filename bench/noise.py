"""Counter-based random numbers: the job, the example and a counter decide every draw.

Results therefore do not depend on which examples share a batch, on the cut into shards, on the order of
examples or on the device. The bits come from SplitMix64 (Steele, Lea and Flood 2014,
doi:10.1145/2660193.2660195), computed with torch's 64-bit integers, which wrap around.
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
    """Return the output of SplitMix64 for each state (its finaliser, Stafford's "variant 13").

    Args:
        state: States, int64 of any shape.

    Returns:
        Words of 64 random bits, int64 of the same shape.
    """
    word = (state ^ _shifted(state, 30)).mul_(_signed(_MIX1))
    word = word.bitwise_xor_(_shifted(word, 27)).mul_(_signed(_MIX2))
    return word.bitwise_xor_(_shifted(word, 31))


def seed_of(*words: object) -> int:
    """Return a seed that depends on every word and on their order: the first 8 bytes of a SHA-256.

    Args:
        *words: Values that are distinguished by their `str`.

    Returns:
        A signed 64-bit integer.
    """
    text = "\x1f".join(str(word) for word in words).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


class Noise:
    """Streams of random numbers, one for each example of a batch; implements `bench.protocols.Randomness`.

    The draws of an example depend on `key`, on the index of the example and on the number of its earlier
    draws, and on nothing else.

    Args:
        key: What the streams are seeded by, distinguished by its `str`: usually the key of a job.
        index: Index of each example in its data set: int64 (N,).
        device: Device of the draws. Their bits are the same on every device.
        dtype: Floating dtype of the draws; float32 and float64 give the same uniform numbers.
        shard: What the stream of `shared` is seeded by; None where the attack is not declared
            ``rng="shard"``.
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

    def select(self, rows: Tensor) -> Self:
        """Return the streams of some of the examples; they continue where they are.

        A subset shares its counters with the streams it comes from: what one draws, the other has drawn.

        Args:
            rows: Positions of the examples: int64 (n,), each in [0, N).

        Returns:
            Streams of n examples.
        """
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        rows = rows.to("cpu")
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def spawn(self, name: str) -> Self:
        """Return independent streams of the same examples, at their beginning.

        Args:
            name: Name of the streams. Equal names give equal streams.

        Returns:
            Streams of N examples.
        """
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._stream = mix(self._stream ^ torch.tensor(seed_of("apart", name)))
        part._drawn = torch.zeros_like(part._stream)
        if self._shard is not None:
            part._shard = (self._shard, name)
        return part

    def shared(self) -> "Noise":
        """Return a new stream for the whole shard, always from its beginning.

        Returns:
            A stream of one example: its methods return (1, *shape).

        Raises:
            RuntimeError: The attack is not declared ``rng="shard"``.
        """
        if self._shard is None:
            raise RuntimeError('shared draws need an attack that is declared rng="shard"')
        return Noise(self._shard, torch.zeros(1, dtype=torch.int64), device=self._device, dtype=self._dtype)

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """Draw words of 64 random bits and advance the counter of each example by one.

        Args:
            shape: Shape of the draws of one example.

        Returns:
            int64 (N, *shape), on the device of the streams.
        """
        rows = slice(None) if self._rows is None else self._rows
        start = mix(self._stream[rows] + self._drawn[rows] * _signed(_GAMMA))
        self._drawn[rows] += 1
        count = math.prod(shape)
        step = torch.arange(1, count + 1, device=self._device) * _signed(_GAMMA)
        return mix(start.to(self._device)[:, None] + step).view(-1, *shape)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw from the uniform distribution on [low, high), in steps of (high - low) * 2**-24.

        Args:
            shape: Shape of the draws of one example.
            low: Lower end of the interval, included.
            high: Upper end of the interval, excluded.

        Returns:
            Numbers (N, *shape).
        """
        # 24 bits in every dtype, so that float32 and float64 runs start from the same points.
        unit = _shifted(self.bits(shape), 40).to(self._dtype).mul_(2.0**-24)
        return unit.mul_(high - low).add_(low)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw from the standard normal distribution, by the method of Box and Muller.

        Args:
            shape: Shape of the draws of one example.

        Returns:
            Numbers (N, *shape), computed in float64 and rounded to the dtype of the streams.
        """
        words = self.bits(shape)
        # Two 32-bit halves: a radius from (0, 1] and an angle from [0, 1).
        radius = _shifted(words, 32).to(torch.float64).add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words.bitwise_and_((1 << 32) - 1).to(torch.float64).mul_(2.0**-32 * 2 * math.pi)
        return radius.mul_(angle.cos_()).to(self._dtype)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Draw -1 or 1 with equal probability.

        Args:
            shape: Shape of the draws of one example.

        Returns:
            Numbers (N, *shape).
        """
        return _shifted(self.bits(shape), 63).to(self._dtype).mul_(2).sub_(1)

    def integers(self, shape: tuple[int, ...], bound: int) -> Tensor:
        """Draw whole numbers from [0, bound), each with a probability of 1 / bound up to 2**-32.

        Args:
            shape: Shape of the draws of one example.
            bound: Upper end of the interval, excluded: 1 or more, below 2**31.

        Returns:
            int64 (N, *shape).
        """
        return _shifted(self.bits(shape), 32).mul_(bound).bitwise_right_shift_(32)
