"""Planted defenses are noticed, by the right test; sound ones give nothing above a note."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from plants import PLANTS, Plain, Planted, digits, patient, sound, trained
from scipy import stats
from torch import Tensor, nn

from bench.doctor.chance import MOST, SHARE, at_least, at_most, level_of
from bench.doctor.examination import TESTS, examine
from bench.doctor.findings import ADVICE, LEVELS, Finding, Findings
from bench.protocols import Images, Threat

FLAGS = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()


@pytest.mark.parametrize("each", PLANTS, ids=lambda each: each.make.__name__)
def test_a_planted_defense_is_noticed(each: Planted) -> None:
    found = examine(patient(each.make(), **each.more()), limit=math.inf)
    assert each.codes & set(found.codes), found
    assert found.worst in ("doubt", "alarm")


def test_sound_defenses_give_nothing_above_a_note() -> None:
    for name, model, random in sound():
        given = patient(model, random=random)
        found = examine(patient(model, random=random, elsewhere=given.answers), limit=math.inf)
        assert not found.codes, (name, found)
        # Quiet is evidence: all tests but these could look.
        noisy = {"autograd", "process", "precision"} if random else set()
        assert set(found.untested) == {"stronger"} | noisy, (name, found)


def test_what_is_found_does_not_depend_on_what_was_examined_before() -> None:
    first = examine(patient(Plain()), limit=math.inf).found
    torch.manual_seed(9)
    examine(patient(Plain(trained(seed=1))), limit=math.inf)
    assert examine(patient(Plain()), limit=math.inf).found == first


def test_an_l2_threat_is_examined_as_well() -> None:
    found = examine(patient(Plain(), threat=Threat("l2", 1.0)), limit=math.inf)
    assert not found.codes, found
    assert set(found.untested) == {"process", "stronger"}


def test_attacks_of_the_task_that_did_nothing_are_beaten() -> None:
    model = Plain()
    right = ~patient(model).broken(digits()[1].images[:48])
    weak = examine(patient(model, held=right), limit=math.inf)
    assert weak.codes == {"stronger-attack": "alarm"}
    # What our own attacks left, all others may have left, too.
    given = patient(model)
    from bench.doctor.attacking import survivors

    left = torch.zeros(48, dtype=torch.bool)
    left[survivors(given)] = True
    assert not examine(patient(model, held=left), limit=math.inf).codes


def test_without_time_nothing_is_claimed() -> None:
    found = examine(patient(Plain()), limit=1e-9)
    assert {each.level for each in found.found} == {"untested"}
    assert not found.codes
    assert set(found.untested) == {test.name for test in TESTS} - {"draws"}


def test_a_slow_defense_is_examined_on_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.doctor import examination

    monkeypatch.setattr(examination, "_pass", lambda *_: 0.01)
    found = examine(patient(Plain()), limit=60.0)
    (clean,) = [each for each in found.found if each.test == "clean"]
    assert "of 12 clean images" in clean.message


def test_a_defense_that_raises_leaves_tests_untested() -> None:
    class Gradientless(Plain):
        def seen(self, x: Images) -> Tensor:
            raise OSError("no such file\nat all")

    found = examine(patient(Gradientless()))
    said = {each.test: each.message for each in found.found if each.level == "untested"}
    assert said["uphill"] == "it raised OSError: no such file"
    assert found.found[0].level == "quiet"


def test_asking_leaves_the_defense_as_it_was() -> None:
    model = Plain(nn.Sequential(nn.Dropout(0.5), trained()))
    given = patient(model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    examine(given)
    assert model.training
    assert model.net.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 48, 144])
def test_a_share_that_is_allowed_is_a_doubt_once_in_a_hundred(n: int) -> None:
    for share, levels in ((SHARE, ("doubt", "alarm")), (MOST, ("alarm",))):
        chance = sum(stats.binom.pmf(k, n, share) for k in range(n + 1) if level_of(k, n) in levels)
        assert chance <= 0.01
        # Twice as many are noticed, where there are enough images to tell.
        power = sum(stats.binom.pmf(k, n, 3 * share) for k in range(n + 1) if level_of(k, n) in levels)
        assert n < 144 or power > 0.9


def test_levels_rise_with_the_count() -> None:
    for n in (1, 12, 48):
        found = [LEVELS.index(level_of(k, n)) for k in range(n + 1)]
        assert found == sorted(found)
        assert level_of(0, n) == "quiet"
        assert found[-1] > LEVELS.index("untested")


def test_tails_are_those_of_coins() -> None:
    for n, share in ((5, 0.5), (48, 0.95)):
        whole = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        for k in range(n + 1):
            assert at_most(k, n, share) == pytest.approx(sum(whole[: k + 1]))
            assert at_least(k, n, share) == pytest.approx(sum(whole[k:]))


def test_uphill_is_rarely_found_of_a_view_that_is_sound_in_95_of_100_steps() -> None:
    from bench.doctor.gradients import RARE, SCALES, SOUND

    draw = np.random.default_rng(0)
    worst = draw.binomial(48, SOUND, (200_000, len(SCALES))).min(1)
    found = np.mean([at_most(int(each), 48, SOUND) < RARE / len(SCALES) for each in worst])
    assert 0 < found <= RARE


# --- what is said ------------------------------------------------------------------------------------


def test_every_code_has_advice_that_fits_and_a_section() -> None:
    for code, advice in ADVICE.items():
        assert len(code) <= 23
        assert len(advice) <= 46
        assert f"\n### `{code}`\n" in FLAGS


def test_findings_are_weighed() -> None:
    quiet, note = Finding("a", "quiet", "s"), Finding("b", "note", "s", "loss-matters")
    doubt, alarm = (Finding("c", level, "s", "not-uphill") for level in ("doubt", "alarm"))
    assert Findings.of([]).worst == "quiet"
    assert Findings.of([note, quiet]).worst == "note"
    assert not Findings.of([note, quiet]).codes
    assert Findings.of([alarm, doubt, quiet]).codes == {"not-uphill": "alarm"}
    described = Findings.of([doubt]).described()
    assert described["findings"][0]["advice"] == ADVICE["not-uphill"]
    assert described["worst"] == "doubt"
