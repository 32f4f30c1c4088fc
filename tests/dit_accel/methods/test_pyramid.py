"""PSA against its formula in float64, one query block at a time, and the limits in which it must be dense attention."""

import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.kernels.pooling import Runs
from dit_accel.layout import Layout, Segment
from dit_accel.methods import Method, Pyramid
from dit_accel.methods.curves import gilbert
from dit_accel.methods.pyramid_levels import generator, sample_places
from dit_accel.methods.pyramid_presets import PRESETS
from dit_accel.processors import PyramidProcessor
from dit_accel.schedule import Schedule
from dit_accel.state import State
from dit_accel.step import Step

B, H, HK, D, DV = 2, 4, 2, 8, 8
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LAYOUTS = {
    "ragged video": Layout((3, 5, 9)),
    "whole blocks": Layout((2, 8, 8)),
    "text last": Layout((3, 5, 9), text=19),
    "text first": Layout((5, 7, 4), text=11, text_first=True),
    "image": Layout((1, 11, 13), text=5, text_first=True),
    "segments around": Layout(segments=(Segment("text", 9), Segment("main", (2, 7, 9)), Segment("reference", 20))),
}
METHODS = {
    "quotas": Pyramid(bounds=(0.2, 0.4, 0.6, 0.8), block_q=32, block_k=16, tile=8),
    "whole tiles": Pyramid(bounds=(0.1, 0.15, 0.15, 0.35), block_q=16, block_k=8, tile=8),
    "thresholds": Pyramid(mode="threshold", bounds=(0.3, 0.5, 0.7, 0.95), block_q=32, block_k=16, tile=8),
    "two levels": Pyramid(levels=(2, 8), bounds=(0.4, 0.9), block_q=16, block_k=16, tile=1, curve=None),
    "similarity": Pyramid(
        mode="threshold", bounds=(0.2, 0.4, 0.7, 1.0), block_q=16, block_k=16, tile=1, similarity=(0.3, 0.1, 0.05)
    ),
}


def tensors(layout, seed=0, scale=1.5):
    """Keys that drift along the sequence, so that some blocks are alike inside."""
    g = torch.Generator().manual_seed(seed)
    n = layout.tokens
    q, k = (scale * torch.randn(B, heads, n, D, generator=g) for heads in (H, HK))
    return q, k + 0.15 * torch.randn(B, HK, n, D, generator=g).cumsum(2), torch.randn(B, HK, n, DV, generator=g)


def main_tokens(layout, curve):
    start, tokens = layout.main.start, layout.main.stop - layout.main.start
    return [start + i for i in (range(tokens) if curve is None else gilbert(layout.grid, True).tolist())]


def brute_levels(method, score, caps):
    """The level of each key block for one row of importance, from the paper."""
    n = len(score)
    order = sorted(range(n), key=lambda j: -score[j])
    table, start, total = [0] * n, 0, sum(max(x, 0) for x in score)
    for number, (level, bound) in enumerate(zip(method.levels, method.bounds, strict=True)):
        step = max(math.ceil(level * method.tile / method.block_k), 1)
        if method.mode == "topk":
            end = int(n * bound)
        else:
            energies = list(itertools.accumulate(max(score[j], 0) / total for j in order))
            within = sum(e <= bound + 1e-6 for e in energies)
            end = within + 1 if within else start
            if number == 0 and level == 1 and step == 1:
                end = max(end, int(method.min_level1 * n) + 1)
        while end > start and (end - start) % step:
            end += 1
        end = max(min(end, n), start)
        end -= (end - start) % step
        for rank in range(start, end):
            table[order[rank]] = level
        start = end
    table[order[0]] = table[order[0]] or method.levels[0]
    return [min(level, cap) for level, cap in zip(table, caps, strict=True)]


def cap(method, block, k, alive):
    """The coarsest level at which a block may be seen."""
    allowed = 1
    for level, least in zip(method.levels[1:], method.similarity, strict=True):
        pairs = [(block[i], block[i + level - 1]) for i in range(0, len(block) - level + 1, level)]
        pairs = [(a, c) for a, c in pairs if {a, c} <= alive]
        cosines = [float(k[a] @ k[c] / k[a].norm() / k[c].norm()) for a, c in pairs]
        if pairs and sum(cosines) / len(pairs) > least:
            allowed = level
    return allowed


def brute(q, k, v, layout, method, valid=None):
    """The output, and the level of every (batch, head, query block, key block) of the main segment."""
    q, k, v = (x.double() for x in (q, k, v))
    s, main = D**-0.5, main_tokens(layout, method.curve)
    source = generator(method.seed, 0, 0)
    places_q, places_k = (sample_places(size, source).tolist() for size in (method.block_q, method.block_k))
    rows, keys = ([main[i : i + size] for i in range(0, len(main), size)] for size in (method.block_q, method.block_k))
    out, levels = torch.zeros(*q.shape[:3], DV).double(), {}
    for b, h in itertools.product(range(B), range(H)):
        kh, vh = k[b, h * HK // H], v[b, h * HK // H]
        alive = set(range(layout.tokens if valid is None else valid[b]))
        beside = [i for i in range(layout.tokens) if i not in set(main)]
        text = [i for i in beside if i in alive]
        lived = [[i for i in block if i in alive] for block in keys]
        sampled = [[block[min(p, len(block) - 1)] for p in places_k] if block else [] for block in lived]
        caps = [8 if method.similarity is None else cap(method, block, kh, alive) for block in keys]
        for number, row in enumerate(rows):
            score = [0.0 if block else -1.0 for block in sampled]
            for query in (q[b, h, row[min(p, len(row) - 1)]] for p in places_q):
                best = [max((s * kh[block] @ query).tolist()) if block else -math.inf for block in sampled]
                score = [
                    max(x, math.exp(y - max(best))) if y > -math.inf else x for x, y in zip(score, best, strict=True)
                ]
            table = brute_levels(method, score, caps)
            levels[b, h, number] = [level if block else 0 for level, block in zip(table, lived, strict=True)]
            means, values, counts = [*kh[text]], [*vh[text]], [1] * len(text)
            for level, block in zip(table, keys, strict=True):
                for i in range(0, len(block), level) if level else ():
                    run = [token for token in block[i : i + level] if token in alive]
                    if run:
                        means.append(kh[run].mean(0))
                        values.append(vh[run].mean(0))
                        counts.append(len(run))
            weights = torch.tensor(counts) * (s * q[b, h, row] @ torch.stack(means).T).exp()
            out[b, h, row] = weights @ torch.stack(values) / weights.sum(-1, keepdim=True)
        seen = sorted(alive)
        out[b, h, beside] = (s * q[b, h, beside] @ kh[seen].T).softmax(-1) @ vh[seen]
    return out, levels


def levels_of(made, n_rows, n_keys):
    """uint8 (B, H, query blocks, key blocks) of the main segment, as the plan has it."""
    table = made.full.mask(made.k_blocks.count)[..., :n_rows, :n_keys].to(torch.uint8)
    for group in made.reps:
        level = int(group.bounds[1] - group.bounds[0])
        seen = group.seen.mask(group.blocks)[:, :, :n_rows]
        assert not (seen & (table > 0)).any()
        table = torch.where(seen, level, table)
    return table


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_formula(name, settings):
    layout, method = LAYOUTS[name], METHODS[settings]
    q, k, v = tensors(layout)
    expected, levels = brute(q, k, v, layout, method)
    made = make(q, k, v, method, layout=layout)
    rows, keys = max(row for _, _, row in levels) + 1, len(levels[0, 0, 0])
    table = levels_of(made, rows, keys)
    assert len(set(table.unique().tolist()) - {0}) > 1
    for (b, h, row), wanted in levels.items():
        assert table[b, h, row].tolist() == wanted
    for backend in ("reference", "auto"):
        torch.testing.assert_close(attend(q, k, v, method, layout=layout, backend=backend).double(), expected, **CLOSE)


@pytest.mark.parametrize("settings", ["quotas", "thresholds", "similarity"])
@pytest.mark.parametrize("valid", [(140, 150), (154, 60)], ids=["padded text", "dead blocks"])
def test_dead_keys_are_in_no_mean_and_no_count(settings, valid):
    layout, method = Layout((3, 5, 9), text=19), METHODS[settings]
    q, k, v = tensors(layout, seed=1)
    for b, n in enumerate(valid):
        k[b, :, n:] = 30
        v[b, :, n:] = 1e3
    kv_valid = torch.tensor(valid, dtype=torch.int32)
    expected, levels = brute(q, k, v, layout, method, valid)
    table = levels_of(make(q, k, v, method, layout=layout, kv_valid=kv_valid), 135 // method.block_q + 1, 9)
    for (b, h, row), wanted in levels.items():
        assert table[b, h, row].tolist() == wanted
    for backend in ("reference", "auto"):
        out = attend(q, k, v, method, layout=layout, kv_valid=kv_valid, backend=backend)
        torch.testing.assert_close(out.double(), expected, **CLOSE)


def test_dead_blocks_come_behind_live_ones_without_importance():
    """Half of the cubes along the curve are dead, and the importance of all but the best underflows."""
    layout = Layout((4, 4, 4))
    q, k, v = tensors(layout, scale=300)
    method = Pyramid(levels=(1,), bounds=(0.5,), block_q=8, block_k=8, tile=8)
    made = make(q, k, v, method, layout=layout, kv_valid=torch.tensor([32, 32], dtype=torch.int32))
    alive = torch.tensor(main_tokens(layout, "gilbert")).view(8, 8)[:, 0] < 32
    assert not alive[:4].all()
    assert torch.equal(made.block_mask, alive.expand(B, H, 8, 8))


def dense(q, k, v):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_level_one_everywhere_is_dense(name):
    layout = LAYOUTS[name]
    q, k, v = tensors(layout)
    whole = Pyramid(bounds=(1, 1, 1, 1), block_q=32, block_k=16)
    assert make(q, k, v, whole, layout=layout).density == 1
    # The same through importance and levels.
    least = Pyramid(mode="threshold", min_level1=1.0, block_q=32, block_k=16, tile=16)
    for method in (whole, least):
        out = attend(q, k, v, method, layout=layout, backend="reference")
        torch.testing.assert_close(out.double(), dense(q, k, v), atol=2e-6, rtol=1e-5)


def alike(layout, k, v, curve, run=8):
    """k and v constant over runs of the main tokens, in the order of the curve."""
    main = main_tokens(layout, curve)
    for i in range(0, len(main), run):
        k[:, :, main[i : i + run]] = k[:, :, main[i : i + 1]]
        v[:, :, main[i : i + run]] = v[:, :, main[i : i + 1]]


@pytest.mark.parametrize("name", ["whole blocks", "text first", "ragged video"])
@pytest.mark.parametrize("settings", [{"levels": (8,), "bounds": (1.0,)}, {"bounds": (0.2, 0.4, 0.7, 1.0)}], ids=str)
def test_keys_constant_in_eights_are_dense_at_any_level(name, settings):
    layout = LAYOUTS[name]
    q, k, v = tensors(layout)
    method = Pyramid(block_q=32, block_k=16, tile=1, **settings)
    alike(layout, k, v, method.curve)
    out = attend(q, k, v, method, layout=layout, backend="reference")
    torch.testing.assert_close(out.double(), dense(q, k, v), atol=3e-6, rtol=1e-5)


def test_levels_mix_by_the_log_of_their_count_alone():
    layout = LAYOUTS["whole blocks"]
    q, k, v = tensors(layout)
    method = Pyramid(bounds=(0.2, 0.4, 0.7, 1.0), block_q=32, block_k=16, tile=1)
    alike(layout, k, v, method.curve)
    made = make(q, k, v, method, layout=layout)
    bare = replace(made, reps=tuple(replace(group, count=group.count.clamp_max(1)) for group in made.reps), _memo={})
    out = attend(q, k, v, plan=bare, layout=layout, backend="reference")
    assert (out.double() - dense(q, k, v)).abs().max() > 0.05


@pytest.mark.parametrize(("block_k", "level"), [(32, 4), (32, 8), (64, 8), (128, 8)])
def test_small_pooled_blocks_see_their_own_means_alone(block_k, level):
    """A tile of 32 keys holds the means of several blocks. One level for all is attention over the means."""
    layout = Layout((1, 1, 512))
    q, k, v = tensors(layout)
    method = Pyramid(levels=(level,), bounds=(1.0,), block_k=block_k)
    expected = dense(q, *(x.unflatten(2, (-1, level)).mean(3) for x in (k, v)))
    for backend in ("reference", "auto"):
        out = attend(q, k, v, method, layout=layout, backend=backend)
        torch.testing.assert_close(out.double(), expected, **CLOSE)


def test_sampling_is_reproducible_and_leaves_torch_alone():
    layout, method = LAYOUTS["text last"], METHODS["thresholds"]
    q, k, v = tensors(layout)
    before = torch.get_rng_state()
    masks = [
        make(q, k, v, replace(method, seed=seed), layout=layout, layer=layer, step=Step(index=index)).block_mask
        for seed, layer, index in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not any(torch.equal(masks[0], other) for other in masks[2:])


def parts_of(made):
    lists = [made.full, *(group.seen for group in made.reps)]
    means = [x for group in made.reps for x in (group.key, group.value, group.count)]
    return [*(x for one in lists for x in (one.count, one.index)), *means]


def test_what_is_kept_between_calls_changes_no_bit_of_a_plan():
    """One state for several layouts and settings, with and without padding, against a new one for each call."""
    state = State()
    for step, name, padded in itertools.product(range(2), ("quotas", "whole tiles", "thresholds"), (False, True)):
        for bounds in (METHODS[name].bounds, (0.1, 0.4, 0.4, 0.9)):
            for layout in (LAYOUTS["ragged video"], LAYOUTS["text first"], LAYOUTS["text last"]):
                method, q, k, v = replace(METHODS[name], bounds=bounds), *tensors(layout, seed=step)
                valid = torch.tensor([layout.tokens, layout.tokens - 9], dtype=torch.int32) if padded else None
                told = {"layout": layout, "step": Step(index=step), "kv_valid": valid}
                kept, fresh = (make(q, k, v, method, **told, state=each) for each in (state, State()))
                assert len(kept.reps) == len(fresh.reps) > 1
                assert all(map(torch.equal, parts_of(kept), parts_of(fresh)))


def test_what_follows_from_the_layout_is_made_once(monkeypatch):
    layout, method, state, made, of = LAYOUTS["text last"], METHODS["quotas"], State(), [], Runs.of
    monkeypatch.setattr(Runs, "of", lambda *args: made.append(args) or of(*args))
    for step in range(3):
        make(*tensors(layout, seed=step), method, layout=layout, step=Step(index=step), state=state)
    assert len(made) == 1
    valid = torch.tensor([layout.tokens, 140], dtype=torch.int32)
    for _ in range(2):
        make(*tensors(layout), method, layout=layout, kv_valid=valid, state=state)
    assert len(made) == 3


def test_a_sample_does_not_depend_on_its_batch_mates():
    layout, method = LAYOUTS["text last"], METHODS["thresholds"]
    q, k, v = tensors(layout)
    both = attend(q, k, v, method, layout=layout)
    for b in range(B):
        alone = attend(*(x[b : b + 1] for x in (q, k, v)), method, layout=layout)
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-6, rtol=1e-5)


def test_no_row_is_empty():
    """Quotas of less than one block, and a coarse level alone that does not fill a tile."""
    layout = Layout((3, 5, 9))
    q, k, v = tensors(layout)
    for settings in ({"bounds": (0, 0, 0, 0.01)}, {"levels": (8,), "bounds": (0.2,)}):
        method = Pyramid(block_q=16, block_k=16, tile=32, **settings)
        made = make(q, k, v, method, layout=layout)
        assert torch.equal((levels_of(made, 9, 9) > 0).sum(-1), torch.ones(B, H, 9, dtype=torch.int64))
        expected, _ = brute(q, k, v, layout, method)
        torch.testing.assert_close(attend(q, k, v, method, layout=layout).double(), expected, **CLOSE)


def test_density_is_the_sum_of_inverse_levels():
    layout = LAYOUTS["whole blocks"]
    q, k, v = tensors(layout)
    for name in ("quotas", "thresholds", "similarity"):
        method = replace(METHODS[name], block_q=16, curve=None)
        made = make(q, k, v, method, layout=layout)
        table = levels_of(made, 8, 8).double()
        kept = torch.where(table > 0, 1 / table, 0).sum(-1) / 8
        assert made.density == pytest.approx(float(kept.mean()))
        exact, pooled = made.token_mask(), made.rep_mask()
        assert not (exact & pooled).any()
        assert float((exact | pooled).double().mean()) == pytest.approx(float((table > 0).double().mean()))


@pytest.mark.parametrize("name", ["ragged video", "text first"])
def test_density_counts_exact_pairs_and_one_per_mean(name):
    layout, method = LAYOUTS[name], METHODS["quotas"]
    made = make(*tensors(layout), method, layout=layout)
    pairs = made.token_mask().double().sum((-2, -1)).mean()
    for group in made.reps:
        pairs += (group.mask().sum(-1) * made.q_blocks.sizes).double().sum(-1).mean()
    assert made.density == pytest.approx(float(pairs) / layout.tokens**2)


def test_representatives_hold_at_most_seven_eighths_of_the_tokens():
    layout = LAYOUTS["whole blocks"]
    q, k, v = (x.bfloat16() for x in tensors(layout))
    made = make(q, k, v, METHODS["thresholds"], layout=layout)
    for name in ("key", "value"):
        held = [getattr(group, name) for group in made.reps]
        assert {x.dtype for x in held} == {torch.bfloat16}
        assert sum(x.numel() for x in held) == k.numel() * 7 // 8
    # A level that no block can get is not made.
    made = make(q, k, v, Pyramid(bounds=(0.1, 0.5, 0.5, 0.9), block_q=32, block_k=16), layout=layout)
    assert [int(group.bounds[1]) for group in made.reps] == [2, 8]


def test_keys_of_another_layout():
    layout, kv_layout = Layout((3, 5, 9)), Layout((3, 5, 9), text=21, text_first=True)
    q, k, v = tensors(kv_layout)
    method = METHODS["thresholds"]
    whole = attend(q, k, v, method, layout=kv_layout, backend="reference")
    for backend in ("reference", "auto"):
        out = attend(q[:, :, 21:], k, v, method, layout=layout, kv_layout=kv_layout, backend=backend)
        torch.testing.assert_close(out, whole[:, :, 21:], **CLOSE)


@pytest.mark.parametrize("layout", [Layout((1, 32, 40), text=64), Layout((9, 8, 12)), Layout((33, 8, 10))], ids=str)
@pytest.mark.parametrize("wanted", [0.15, 0.25, 0.5, 1.0])
def test_with_density(layout, wanted):
    method, reached = Pyramid(mode="threshold", block_q=32, block_k=32).with_density(wanted, layout)
    assert reached == pytest.approx(wanted, rel=0.2)
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, layout.tokens, 4, generator=g) for _ in range(3))
    assert make(q, k, v, method, layout=layout).density == pytest.approx(reached, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"levels": (1, 3), "bounds": (0.1, 0.2)}, "levels"), ({"levels": (2, 1), "bounds": (0.1, 0.2)}, "ascending"),
     ({"bounds": (0.1, 0.2)}, "one share per level"), ({"bounds": (0.5, 0.4, 0.6, 0.7)}, "falling"),
     ({"bounds": (0, 0, 0, 0)}, "above 0"), ({"mode": "top"}, "threshold, topk"), ({"block_q": 0}, "block_q"),
     ({"block_k": 20}, "multiple of the coarsest"), ({"tile": 0}, "tile"), ({"similarity": (0.5,)}, "similarity"),
     ({"levels": (2, 4), "bounds": (0.1, 0.2), "similarity": (0.5,)}, "level 1"), ({"min_level1": 2}, "min_level1"),
     ({"curve": "hilbert"}, "gilbert")],
)  # fmt: skip
def test_bad_values(settings, message):
    with pytest.raises(UsageError, match=message):
        Pyramid(**settings)


def test_presets_and_round_trip():
    processor = PyramidProcessor.preset("wan2.1-1.3b", seed=3)
    assert processor.method == Pyramid(
        mode="threshold", block_k=128, bounds=(0.5, 0.6, 0.7, 0.8), similarity=(0.7, 0.65, 0.6), seed=3
    )
    for name in PRESETS:
        method = Pyramid.preset(name)
        assert (method.levels, method.block_q, method.tile) == ((1, 2, 4, 8), 128, 32)
        assert Method.from_dict(method.to_dict()) == method == pickle.loads(pickle.dumps(method))
    assert Pyramid.preset_schedule("wan2.1-14b").dense_steps(50) == list(range(15))
    assert Pyramid.preset_schedule("wan2.2-a14b").dense_steps(40) == list(range(12))
    assert PyramidProcessor.preset("plug-and-play").schedule == Schedule.none()
    assert replace(Pyramid.preset("plug-and-play"), curve="gilbert") == Pyramid()
    with pytest.raises(UsageError, match=r"wan2\.1-14b"):
        PyramidProcessor.preset("wan")
    assert hash(Pyramid(bounds=[0.1, 0.2, 0.3, 0.4])) == hash(Pyramid(bounds=(0.1, 0.2, 0.3, 0.4)))
