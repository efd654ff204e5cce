"""Keyed randomness: the published generator, sound distributions, and draws that nobody else changes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from bench.noise import Noise, mix, seed_of

GAMMA = 0x9E3779B97F4A7C15
REFERENCE = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""What the authors' C program prints first for the seed 1234567."""


def signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


def noise(n: int = 5, key: object = "key", **kinds: object) -> Noise:
    return Noise(key, torch.arange(n), **kinds)  # type: ignore[arg-type]


def everything(source: Noise) -> list[Tensor]:
    """Draw once of each kind."""
    return [
        source.uniform((3, 2)),
        source.normal((4,)),
        source.signs((2, 2)),
        source.integers((5,), 10),
        source.uniform(()),
    ]


def test_the_bits_are_splitmix64_s() -> None:
    states = torch.tensor([signed(1234567 + GAMMA * (i + 1)) for i in range(5)])
    assert [word % 2**64 for word in mix(states).tolist()] == REFERENCE


def test_a_draw_is_a_splitmix64_sequence_of_its_own() -> None:
    def reference(state: int, count: int) -> list[int]:
        """Steele, Lea and Flood (2014), figure 13, in Python's integers."""
        words = []
        for _ in range(count):
            state = (state + GAMMA) % 2**64
            word = state
            word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
            words.append(word ^ (word >> 31))
        return words

    assert reference(1234567, 5) == REFERENCE
    source = noise()
    for drawn in range(3):
        states = [mix(stream + signed(drawn * GAMMA)) for stream in source._stream]
        expected = [reference(int(state) % 2**64, 7) for state in states]
        assert [[word % 2**64 for word in row] for row in source.bits((7,)).tolist()] == expected


def test_seeds_depend_on_every_word_and_their_order() -> None:
    seeds = {
        seed_of(*words) for words in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", 1), ("a", 2))
    }
    assert len(seeds) == 6
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    # Frozen: a stored result must be found again by the next version.
    assert seed_of("job", 3) == -989487753802731329


def test_a_draw_of_each_kind_is_what_it_always_was() -> None:
    uniforms = [0.7320645451545715, 0.8263810276985168, 0.9505458474159241]
    uniforms += [0.4288941025733948, 0.39192503690719604, 0.8936169743537903]
    normals = [0.6628402471542358, -1.3011704683303833, -1.136659860610962, -0.8107571601867676]
    uniform, normal, signs, integers, scalar = everything(noise(2))
    assert uniform[1].flatten().tolist() == pytest.approx(uniforms, abs=1e-7)
    assert normal[1].tolist() == pytest.approx(normals, abs=1e-6)
    assert signs[1].flatten().tolist() == [1, 1, -1, 1]
    assert integers[1].tolist() == [8, 5, 0, 6, 7]
    assert scalar.shape == (2,)


@pytest.mark.parametrize("n", [1, 400])
def test_moments_are_those_of_the_distributions(n: int) -> None:
    """Within four standard errors, across one example's numbers and across examples."""
    source, shape = noise(n), (400 * 400 // n,)
    count = 400 * 400
    uniform = source.uniform(shape, -1, 3).double()
    assert (uniform >= -1).all()
    assert (uniform < 3).all()
    assert abs(float(uniform.mean()) - 1) < 4 * math.sqrt(16 / 12 / count)
    assert abs(float(uniform.var()) - 16 / 12) < 4 * 16 * math.sqrt(1 / 180 / count)
    normal = source.normal(shape).double()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normal**power).mean()) - moment) < 4 * math.sqrt(spread / count)
    signs = source.signs(shape)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(count)
    integers = source.integers(shape, 7)
    assert integers.dtype == torch.int64
    shares = integers.flatten().bincount(minlength=7) / count
    assert shares.shape == (7,)
    assert (shares - 1 / 7).abs().max() < 4 * math.sqrt(1 / 7 * 6 / 7 / count)


def test_neighbours_kinds_and_draws_are_uncorrelated() -> None:
    """Of examples next to each other, of keys next to each other, and from one draw to the next."""
    count = 20000
    source, other = noise(3), noise(3, key="kez")
    first, second, third = source.normal((count,)), source.normal((count,)), other.normal((count,))
    rows = torch.cat([first, second, third]).double()
    correlations = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert correlations.abs().max() < 5 / math.sqrt(count)
    # Along a draw, too.
    assert abs(float((rows[:, 1:] * rows[:, :-1]).mean())) < 5 / math.sqrt(rows.numel())


@given(
    index=some.lists(some.integers(0, 2**40), min_size=1, max_size=8, unique=True),
    data=some.data(),
)
@settings(max_examples=50, deadline=None, database=None)
def test_an_example_s_draws_depend_on_nobody_else(index: list[int], data: some.DataObject) -> None:
    """In any subset and order, taken at once or step by step, after others have drawn more often."""
    whole = everything(Noise("key", torch.tensor(index)))
    rows = torch.tensor(data.draw(some.permutations(range(len(index)))))
    for one, other in zip(whole, everything(Noise("key", torch.tensor(index)[rows])), strict=True):
        assert torch.equal(one[rows], other)
    source = Noise("key", torch.tensor(index))
    kept = torch.tensor(data.draw(some.lists(some.sampled_from(range(len(index))), min_size=1, unique=True)))
    begun = source.uniform((3, 2))
    part = source.select(kept)
    others = torch.tensor([row for row in range(len(index)) if row not in kept.tolist()], dtype=torch.int64)
    source.select(others).normal((9,))
    rest = [part.normal((4,)), part.signs((2, 2)), part.select(torch.arange(len(kept))).integers((5,), 10)]
    assert torch.equal(begun, whole[0])
    for one, other in zip(whole[1:], rest, strict=False):
        assert torch.equal(one[kept], other)
    # What was taken is a window on the same streams: they go on where it left them.
    assert torch.equal(source.select(kept).uniform(()), whole[4][kept])


def test_other_keys_and_other_examples_draw_otherwise() -> None:
    draws = torch.cat([noise(4, key=key).uniform((8,)) for key in ("a", "b", ("a", 1))])
    assert len({tuple(row) for row in draws.tolist()}) == 12


def test_both_dtypes_start_from_the_same_points() -> None:
    for single, double in zip(everything(noise()), everything(noise(dtype=torch.float64)), strict=True):
        assert torch.allclose(single.double(), double.double(), rtol=0, atol=1e-6)
    assert torch.equal(noise().uniform((9,)).double(), noise(dtype=torch.float64).uniform((9,)))


def test_drawing_leaves_torch_s_own_state_alone() -> None:
    before = torch.get_rng_state()
    everything(noise())
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_draws_are_the_shard_s_and_need_to_be_asked_for() -> None:
    one, other = (noise(n, shard=("job", 64)).shared() for n in (4, 9))
    assert torch.equal(one.signs((3, 2)), other.signs((3, 2)))
    assert one.normal((5,)).shape == (1, 5)
    assert not torch.equal(noise(shard="a").shared().uniform((8,)), noise(shard="b").shared().uniform((8,)))
    with pytest.raises(RuntimeError, match='declared rng="shard"'):
        noise().shared()


def test_parts_of_an_attack_have_streams_of_their_own() -> None:
    whole = noise()
    one = whole.spawn("square")
    plain = one.uniform((4,))
    # Neither what the others draw nor who else is there is anything to it.
    whole.uniform((7,))
    rows = torch.tensor([2, 0])
    assert torch.equal(whole.select(rows).spawn("square").uniform((4,)), plain[rows])
    assert not torch.equal(one.uniform((4,)), plain)
    assert not torch.equal(noise().spawn("fab").uniform((4,)), plain)
    assert not torch.equal(noise().uniform((4,)), plain)
    shared = [noise(shard="s").spawn(name).shared().uniform((4,)) for name in ("a", "a", "b")]
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[0], shared[2])


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    for here, there in zip(everything(noise()), everything(noise(device="cuda")), strict=True):
        assert there.device.type == "cuda"
        assert torch.allclose(here.double(), there.cpu().double(), rtol=0, atol=1e-6)
