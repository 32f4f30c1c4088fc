"""The search on made-up measurements, whose truth is known."""

import math
import random
from collections import Counter

import pytest

from dit_accel.errors import DitAccelError, UnsupportedError
from dit_accel.eval.tune.bench import Trial
from dit_accel.eval.tune.budget import Budget
from dit_accel.eval.tune.estimate import Estimate, front, interval, quantile
from dit_accel.eval.tune.search import Rules, search
from dit_accel.eval.tune.space import Setting, settings

SPACE = settings(("radial", "paro", "pisa", "vmoba"))
PROMPTS = tuple(range(4))
GAIN = {"radial": 0.0, "paro": 6.0, "pisa": 3.0, "vmoba": -2.0}
COST = {"radial": 1.0, "paro": 1.15, "pisa": 1.6, "vmoba": 1.1}


def truth(setting):
    """Mean PSNR and speed of a setting, in the world of these tests."""
    dense = setting.dense_steps
    psnr = 22 + GAIN[setting.method] + 12 * setting.density + 8 * dense
    loop = 0.4 + 0.6 * (dense + (1 - dense) * setting.density * COST[setting.method])
    return psnr, 1 / loop


class World:
    """Prompts differ by ``spread`` dB, the same for all settings, and by a little noise of their own."""

    def __init__(self, seed, spread=2.0, jitter=0.01):
        self.seed, self.spread, self.jitter = seed, spread, jitter
        self.calls = Counter()

    def __call__(self, setting, prompt):
        self.calls[setting, prompt] += 1
        prompted, own = random.Random(f"{self.seed} {prompt}"), random.Random(f"{self.seed} {prompt} {setting.name}")
        psnr, speed = truth(setting)
        noise = self.spread * prompted.gauss(0, 1) + 0.5 * own.gauss(0, 1)
        return Trial(psnr + noise, speed * math.exp(self.jitter * own.gauss(0, 1)))


def best(budget):
    fit = [s for s in SPACE if dict(zip(("psnr", "speed"), truth(s), strict=True))[budget.metric] >= budget.least]
    index = ("psnr", "speed").index(budget.objective)
    return max(truth(s)[index] for s in fit), index


@pytest.mark.parametrize("budget", [Budget("psnr", 28), Budget("speed", 1.4)])
def test_without_noise_the_best_setting_is_found_and_much_is_not_measured(budget):
    world = World(0, spread=0.0, jitter=0.0)
    found = search(SPACE, PROMPTS, world, budget, Rules(ahead=None))
    value, index = best(budget)
    # Few prompts leave a margin, which may cost the last rung of a ladder.
    assert truth(found.chosen.setting)[index] >= value * 0.85
    assert found.complete
    assert found.measurements == world.calls.total() < 0.7 * len(SPACE) * len(PROMPTS)
    assert max(world.calls.values()) == 1


def test_the_budget_holds_on_prompts_not_seen():
    budget, held = Budget("psnr", 28), 0
    for seed in range(60):
        world = World(seed)
        found = search(SPACE, PROMPTS, world, budget)
        further = [world(found.chosen.setting, prompt).psnr for prompt in (10, 11)]
        held += sum(further) / 2 >= budget.least
    assert held >= 52


def test_a_setting_that_is_slower_than_dense_meets_no_quality():
    slow = [Setting("rectified", d) for d in (0.2, 0.4)]
    found = search(slow, PROMPTS, lambda s, p: Trial(60.0, 0.8), Budget("psnr", 30))
    assert found.chosen is None
    assert found.nearest.setting in slow


def test_the_nearest_is_told_where_nothing_meets_the_budget():
    found = search(SPACE, PROMPTS, World(1, spread=0.5), Budget("psnr", 60))
    assert found.chosen is None
    assert not found.sure
    assert found.nearest.mean("psnr") == max(e.mean("psnr") for e in found.measured)
    # What is 20 dB away is not looked at more closely.
    assert found.measurements < 0.6 * len(SPACE)


def test_where_none_is_sure_the_safest_is_chosen():
    values = {0.2: (26.0, 31.0, 27.0, 29.0), 0.3: (28.5, 29.0, 28.2, 28.7)}
    space = [Setting("pisa", 0.2), Setting("pisa", 0.3)]
    found = search(space, PROMPTS, lambda s, p: Trial(values[s.density][p], 2 - s.density), Budget("psnr", 28))
    assert not found.sure
    assert found.chosen.setting == space[1]


def test_a_limit_ends_the_search():
    found = search(SPACE, PROMPTS, World(2), Budget("psnr", 28), Rules(limit=5))
    assert found.measurements == 5
    assert not found.complete


def test_what_only_an_emulation_ran_is_not_chosen():
    def measure(setting, prompt):
        return Trial(40.0, None if setting.quant else 1.3)

    space = [Setting("pisa", 0.2, quant="sage2"), Setting("pisa", 0.2)]
    found = search(space, PROMPTS, measure, Budget("psnr", 30))
    assert found.chosen.setting == space[1]
    with pytest.raises(DitAccelError, match="emulated"):
        search(space[:1], PROMPTS, measure, Budget("psnr", 30))


def test_a_setting_that_cannot_run_is_left_out_with_its_reason():
    def measure(setting, prompt):
        if setting.method == "radial":
            raise UnsupportedError("needs more than one frame")
        return Trial(40.0, 1.3)

    space = [Setting("radial", 0.2), Setting("pisa", 0.2)]
    found = search(space, PROMPTS, measure, Budget("psnr", 30))
    assert found.chosen.setting == space[1]
    assert found.failed == {space[0]: "needs more than one frame"}


def test_what_is_known_is_not_measured_again():
    first = search(SPACE, PROMPTS, World(3), Budget("psnr", 28))
    again = search(SPACE, PROMPTS, World(3), Budget("psnr", 28), known=first.measured)
    assert again.measurements == 0
    assert again.chosen == first.chosen


@pytest.mark.parametrize(("freedom", "value"), [(2, 1.886), (3, 1.638), (5, 1.476), (20, 1.325)])
def test_students_quantile(freedom, value):
    assert quantile(0.9, freedom) == pytest.approx(value, rel=0.01)


def test_an_interval_narrows_with_prompts_and_widens_for_few_ahead():
    few, many = interval([30.0, 31.0], "psnr", 0.9), interval([30.0, 31.0] * 4, "psnr", 0.9)
    assert few.low < many.low < 30.5 < many.high < few.high
    assert interval([30.0, 31.0], "psnr", 0.9, ahead=2).low < few.low
    speed = interval([1.2, 1.5], "speed", 0.9)
    assert speed.mean == pytest.approx(math.sqrt(1.8))


def test_the_front():
    def one(density, psnr, speed):
        return Estimate(Setting("pisa", density), {0: Trial(psnr, speed)})

    a, b, c = one(0.1, 20, 2.0), one(0.2, 25, 1.5), one(0.3, 24, 1.4)
    assert front([c, b, a]) == [a, b]
