"""PSA's levels: quotas and thresholds by hand and against loops, and importance against its definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.methods import pyramid_levels
from dit_accel.methods.pyramid_levels import (
    generator,
    importance,
    quota_ends,
    ranked_levels,
    sample_places,
    sample_tokens,
    threshold_ends,
)

LEVELS = (1, 2, 4, 8)


def fill(blocks, ends):
    """The level of each rank by counting, for one row."""
    table, at = [], 0
    for level, end in zip(LEVELS, ends, strict=True):
        table += [level] * (end - at)
        at = max(at, end)
    table += [0] * (blocks - len(table))
    return table if table[0] else [LEVELS[0], *table[1:]]


def grow(start, end, step, blocks):
    """``end``, moved up until the length is a multiple of ``step``, or down where that passes the last block."""
    end = max(start, end)
    while (end - start) % step:
        end += 1
    while end > blocks:
        end -= step
    return end


def brute_threshold(row, bounds, steps, least):
    total, ends, start = sum(row), [], 0
    for number, (bound, step) in enumerate(zip(bounds, steps, strict=True)):
        inside, cumulated = 0, 0.0
        for value in row:
            cumulated += value
            inside += cumulated / total <= bound + 1e-6
        end = inside + 1 if inside else start
        if number == 0:
            end = max(end, least)
        start = grow(start, min(end, len(row)), step, len(row))
        ends.append(start)
    return ends


def test_quotas_of_the_release_on_a_short_sequence():
    """40 blocks of 32 keys, tiles of 32: asked are 0.10 of the pairs, rounding to whole tiles makes it 0.125."""
    ends = quota_ends(40, (0.05, 0.1, 0.15, 0.25), (1, 2, 4, 8))
    assert ends == [2, 4, 8, 16]
    table = ranked_levels(40, LEVELS, ends, torch.device("cpu")).tolist()
    assert sum(1 / level for level in table if level) / 40 == 0.125
    plain = quota_ends(40, (0.05, 0.1, 0.15, 0.25), (1, 1, 1, 1))
    assert plain == [2, 4, 6, 10]


def test_the_right_end_rounds_down():
    assert quota_ends(10, (0.1, 0.2, 0.3, 1.0), (1, 1, 1, 4)) == [1, 2, 3, 7]
    assert quota_ends(3, (0.0, 0.0, 0.0, 1.0), (1, 2, 4, 8)) == [0, 0, 0, 0]


def test_thresholds_by_hand():
    row = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])

    def ends(bounds, steps=(1, 1, 1, 1), least=0):
        return [int(end) for end in threshold_ends(row, bounds, steps, least)]

    # The crossing block is included; the first block alone exceeds 0.3, so nothing is within.
    assert ends((0.5, 0.75, 0.9, 1.0)) == [2, 3, 4, 5]
    assert ends((0.3, 0.5, 0.75, 0.9)) == [0, 2, 3, 4]
    assert ends((0.3, 0.5, 0.75, 0.9), least=3) == [3, 3, 3, 4]
    assert ends((0.3, 0.5, 0.75, 0.9), steps=(1, 1, 2, 2)) == [0, 2, 4, 4]
    assert ends((0.1, 0.1, 0.2, 0.3)) == [0, 0, 0, 0]
    assert ranked_levels(5, LEVELS, ends((0.1, 0.1, 0.2, 0.3)), row.device).tolist() == [1, 0, 0, 0, 0]


BOUNDS = st.lists(st.sampled_from([0, 0.05, 0.13, 0.31, 0.5, 0.77, 0.9, 1.0]), min_size=4, max_size=4).map(sorted)
STEPS = st.sampled_from([(1, 1, 1, 1), (1, 1, 1, 2), (1, 2, 4, 8), (2, 4, 8, 16)])


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 40), bounds=BOUNDS, steps=STEPS, least=st.integers(0, 5), seed=st.integers(0, 99))
def test_levels_against_loops(blocks, bounds, steps, least, seed):
    rows = torch.rand(2, 3, blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    rows = rows.sort(dim=-1, descending=True).values
    found = ranked_levels(blocks, LEVELS, threshold_ends(rows, bounds, steps, least), rows.device)
    ends, start = [], 0
    for bound, step in zip(bounds, steps, strict=True):
        start = grow(start, int(blocks * bound), step, blocks)
        ends.append(start)
    assert quota_ends(blocks, bounds, steps) == ends
    quotas = ranked_levels(blocks, LEVELS, ends, rows.device).tolist()
    assert quotas == fill(blocks, ends)
    tables = [quotas]
    for i, j in itertools.product(range(2), range(3)):
        assert found[i, j].tolist() == fill(blocks, brute_threshold(rows[i, j].tolist(), bounds, steps, least))
        tables.append(found[i, j].tolist())
    for table in tables:
        assert table[0] > 0
        kept = [level or math.inf for level in table]
        assert kept == sorted(kept)


@pytest.mark.parametrize("limit", [1, 300, 1 << 20])
def test_importance_is_the_largest_sampled_weight(limit, monkeypatch):
    monkeypatch.setitem(pyramid_levels.CHUNK, "cpu", limit)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 20, 6, generator=g), torch.randn(2, 2, 24, 6, generator=g)
    rows, columns = torch.randint(20, (1, 3, 2), generator=g), torch.randint(24, (2, 5, 3), generator=g)
    dead = torch.zeros(2, 5, dtype=torch.bool)
    dead[1, 2] = True
    found = importance(q, k, rows, columns, 0.7, dead)
    for b, h in itertools.product(range(2), range(4)):
        for i in range(3):
            expected = torch.zeros(5, dtype=torch.float64)
            for token in rows[0, i].tolist():
                logits = 0.7 * (k[b, h // 2, columns[b]].double() @ q[b, h, token].double())
                logits[dead[b]] = -math.inf
                expected = torch.maximum(expected, (logits - logits.max()).exp().amax(-1))
            torch.testing.assert_close(found[b, h, i].double(), expected / expected.sum(), atol=1e-6, rtol=1e-5)


def test_samples_are_a_quarter_and_follow_from_seed_layer_and_step_alone():
    places = sample_places(64, generator(0, 3, 7))
    assert len(set(places.tolist())) == 16
    assert torch.equal(places, sample_places(64, generator(0, 3, 7)))
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8), (3, 0, 7)):
        assert not torch.equal(places, sample_places(64, generator(*other)))
    assert sample_places(3, generator(0, 0, 0)).shape == (1,)


def test_dead_tokens_are_not_sampled():
    tokens = torch.arange(16).view(2, 8)
    live = torch.ones(1, 2, 8, dtype=torch.bool)
    live[0, 0, [0, 3]] = False
    live[0, 1, 2:] = False
    assert sample_tokens(tokens, torch.tensor([0, 2, 7]), live).tolist() == [[[1, 4, 7], [8, 9, 9]]]
    assert sample_tokens(tokens, torch.tensor([0, 2, 7]), None).tolist() == [[[0, 2, 7], [8, 10, 15]]]
