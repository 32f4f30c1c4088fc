"""Intervals over prompts: what two seeds of a prompt are worth, and what too few prompts say instead."""

import numpy as np
import pytest

from dit_accel.eval.intervals import DRAWS, ENOUGH, bootstrap, interval, spread


def test_interval_holds_the_mean_and_is_repeatable():
    values = [0.0, 1.0] * 20
    low, high = bootstrap(values)
    assert low < 0.5 < high
    assert (low, high) == bootstrap(values)
    assert DRAWS == 10_000


def test_it_is_the_percentile_interval():
    values = np.random.default_rng(3).normal(size=30)
    draw = np.random.default_rng(4)
    means = [draw.choice(values, 30).mean() for _ in range(20_000)]
    assert bootstrap(values) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_seeds_of_a_prompt_are_no_prompts():
    prompts = [f"prompt {i}" for i in range(20)]
    values = np.random.default_rng(5).normal(size=20)
    twice, texts = [*values, *values], prompts * 2
    # The second seed repeats the first to the digit: it tells nothing, so nothing may get narrower.
    assert bootstrap(twice, texts) == pytest.approx(bootstrap(values, prompts))
    low, high = bootstrap(twice)
    assert high - low < 0.8 * np.subtract(*bootstrap(values)[::-1])


def test_groups_of_unequal_size_keep_the_mean_of_all_values():
    groups, values = ["a"] * 6 + list("bcdef"), [1.0] * 6 + [0.0] * 5
    found = interval(values, groups)
    assert found["mean"] == pytest.approx(6 / 11)
    assert found["low"] <= found["mean"] <= found["high"]


def test_too_few_prompts_have_their_values_and_no_interval():
    assert interval([1, 2, 4]) == {"mean": pytest.approx(7 / 3), "values": [1.0, 2.0, 4.0]}
    few = [str(i % (ENOUGH - 1)) for i in range(20)]
    assert "low" not in interval([0.5] * 20, few)
    assert interval([0.5] * ENOUGH) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_what_stands_in_a_column():
    assert spread({"mean": 1, "low": 0.5, "high": 1.5}) == "0.500 to 1.500"
    assert spread(interval([0.25, -1]), "+.1f") == "no interval: +0.2, -1.0"
