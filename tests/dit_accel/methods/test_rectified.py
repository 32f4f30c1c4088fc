"""Rectified SpaAttn against the paper's formulas in float64, one head and block at a time, and its exact limits."""

import math
import pickle
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.eval.atlas import synthetic_tensors
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.methods import Method, Rectified, rectified
from dit_accel.methods.curves import curve_order
from dit_accel.methods.rectified_presets import PRESETS
from dit_accel.processors import RectifiedProcessor
from dit_accel.schedule import Schedule
from dit_accel.state import State

B, H, D, DV = 2, 4, 16, 12
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

VIDEO = Layout((3, 5, 7))
LAYOUTS = {
    "ragged video": VIDEO,
    "whole blocks": Layout((2, 4, 8)),
    "text last": Layout((3, 5, 7), text=11),
    "text first": Layout((3, 5, 7), text=11, text_first=True),
    "text and prefix": Layout((2, 5, 6), text=5, prefix=21),
    "image": Layout((1, 9, 11), text=4, text_first=True),
}
METHOD = Rectified(block_size=8)


def tensors(layout, *, kv_heads=H, seed=0, noise=0.4, size=8):
    """q, k, v whose blocks differ by their means more than within, so that some pooled values may stand in."""
    g = torch.Generator().manual_seed(seed)
    order = curve_order(layout, "gilbert")
    order = torch.arange(layout.tokens) if order is None else order
    owner = torch.empty_like(order)
    owner[order] = torch.arange(layout.tokens) // size
    blocks = int(owner.max()) + 1
    made = []
    for heads, dim, spread in ((H, D, noise), (kv_heads, D, noise), (kv_heads, DV, 1)):
        base = torch.randn(B, heads, blocks, dim, generator=g)[:, :, owner]
        made.append(base + spread * torch.randn(B, heads, layout.tokens, dim, generator=g))
    return made


@dataclass
class Brute:
    """Output, blocks kept and compensated, and pooled attention of every head, from the formulas."""

    out: torch.Tensor
    kept: dict
    pooled: dict
    factor: dict
    added: dict
    compensated: int = 0
    left_out: int = 0


def blocks_of(layout, method):
    """Tokens of every main block, and the tokens beside."""
    order = curve_order(layout, method.curve)
    main = layout.main.stop - layout.main.start
    inside = (order[:main] if order is not None else torch.arange(layout.main.start, layout.main.stop)).tolist()
    blocks = [inside[i : i + method.block_size] for i in range(0, main, method.block_size)]
    return blocks, [t for t in range(layout.tokens) if not layout.main.start <= t < layout.main.stop]


def place(layout, token):
    _, height, width = layout.grid
    i = token - layout.main.start
    return i // (height * width), i // width % height, i % width


def forced(layout, method, blocks):
    """Pairs of blocks that are kept whatever they hold, found token by token."""
    pairs = set()
    for n, one in enumerate(blocks):
        for m, other in enumerate(blocks):
            here, there = (torch.tensor([place(layout, t) for t in block]) for block in (one, other))
            if method.neighbors and ((here[:, None] - there).abs() <= 1).all(-1).any():
                pairs.add((n, m))
            first = all(any(place(layout, t)[0] == 0 for t in block) for block in (one, other))
            if method.first_frame_blocks and layout.grid[0] > 1 and first:
                pairs.add((n, m))
    return pairs


def brute(q, k, v, layout, method, kv_valid=None):
    q, k, v = (x.double() for x in (q, k, v))
    blocks, beside = blocks_of(layout, method)
    count, scale = len(blocks), D**-0.5
    always, groups = forced(layout, method, blocks), H // k.shape[1]
    found = Brute(torch.empty(B, H, layout.tokens, DV).double(), {}, {}, {}, {})
    for b in range(B):
        valid = layout.tokens if kv_valid is None else int(kv_valid[b])
        live = [[t for t in block if t < valid] for block in blocks]
        text = [t for t in beside if t < valid]
        everything = [t for t in range(layout.tokens) if t < valid]
        for h in range(H):
            query, key, value = q[b, h], k[b, h // groups], v[b, h // groups]
            zero = torch.zeros_like(key[0])
            qbar = [query[block].mean(0) for block in blocks]
            kbar = [key[block].mean(0) if block else zero for block in live]
            vbar = [value[block].mean(0) if block else torch.zeros_like(value[0]) for block in live]
            dq = [(query[block] - mean).abs().mean(0) for block, mean in zip(blocks, qbar, strict=True)]
            dk = [(key[block] - mean).abs().mean(0) if block else zero for block, mean in zip(live, kbar, strict=True)]
            for n in range(count):
                scores = [float(qbar[n] @ mean) for mean in kbar]
                logits = [scale * s if live[m] else -math.inf for m, s in enumerate(scores)]
                logits = torch.tensor(logits + [scale * float(qbar[n] @ key[t]) for t in text]).double()
                p = logits.softmax(-1)
                weight = [len(live[m]) * float(p[m]) for m in range(count)]
                words = float(p[count:].sum())
                total = sum(weight) + words
                a = [x / total for x in weight]
                entries = [*a, words / total]
                ranked = sorted(range(len(entries)), key=lambda i: -entries[i])
                cumulative, below = 0.0, 0
                for i in ranked:
                    cumulative += entries[i]
                    below += cumulative <= method.top_p
                least = int(method.density * count)
                keep = {i for i in ranked[: max(below + 1, least)] if i < count}
                keep |= {m for m in range(count) if (n, m) in always}
                if least == count:
                    keep = set(range(count))
                error = [abs(float(dq[n] @ kbar[m])) + abs(float(qbar[n] @ dk[m])) for m in range(count)]
                safe = {m for m in range(count) if method.compensate and abs(scores[m]) > error[m]}
                added = [m for m in range(count) if m not in keep and m in safe]
                factor = sum(a[m] for m in range(count) if m not in added) + words / total
                tokens = [t for m in sorted(keep) for t in live[m]] + text
                for t in blocks[n]:
                    sparse = (scale * (key[tokens] @ query[t])).softmax(-1) @ value[tokens]
                    found.out[b, h, t] = factor * sparse + sum(a[m] * vbar[m] for m in added)
                found.kept[b, h, n], found.pooled[b, h, n] = {m for m in keep if live[m]}, entries
                found.factor[b, h, n] = factor, sum(a[m] for m in added)
                found.compensated += len(added)
                found.added[b, h, n] = set(added)
                found.left_out += count - len(keep)
            for t in beside:
                found.out[b, h, t] = (scale * (key[everything] @ query[t])).softmax(-1) @ value[everything]
    return found


@cache
def solved(layout, method=METHOD, seed=0):
    """The tensors of one case and what the formulas make of them. Not to be written to."""
    q, k, v = tensors(layout, seed=seed)
    return q, k, v, brute(q, k, v, layout, method)


CASES = {
    "defaults": {},
    "no curve": {"curve": None},
    "no neighbours": {"neighbors": False, "top_p": 0.1, "density": 0.1},
    "top_p decides": {"top_p": 0.7, "density": 0.05, "neighbors": False},
    "first frame": {"first_frame_blocks": True},
    "no compensation": {"compensate": False},
    "large blocks": {"block_size": 40},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_brute_force_on_layouts(layout, backend):
    layout = LAYOUTS[layout]
    q, k, v, expected = solved(layout)
    out = attend(q, k, v, METHOD, layout=layout, backend=backend)
    torch.testing.assert_close(out.double(), expected.out, **CLOSE)
    assert 0.05 < expected.compensated / expected.left_out < 0.95


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force_on_parameters(name, backend):
    layout, method = LAYOUTS["text first"], replace(METHOD, **CASES[name])
    q, k, v, expected = solved(layout, method, seed=2)
    out = attend(q, k, v, method, layout=layout, backend=backend)
    torch.testing.assert_close(out.double(), expected.out, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layout", ["text last", "ragged video", "text first"])
def test_equals_brute_force_with_grouped_keys_and_dead_ones(layout, backend):
    layout = LAYOUTS[layout]
    q, k, v = tensors(layout, kv_heads=2, seed=3)
    valid = torch.tensor([layout.tokens - 7, layout.tokens - 40], dtype=torch.int32)
    expected = brute(q, k, v, layout, METHOD, valid)
    for x in (k, v):
        for b in range(B):
            x[b, :, valid[b] :] = 1e4
    out = attend(q, k, v, METHOD, layout=layout, kv_valid=valid, backend=backend)
    torch.testing.assert_close(out.double(), expected.out, **CLOSE)


def test_blocks_kept_and_factors_are_those_of_the_formulas():
    layout = LAYOUTS["text last"]
    q, k, v, expected = solved(layout)
    plan = make(q, k, v, METHOD, layout=layout)
    count = -(-105 // 8)
    assert plan.block_mask[..., count:].all()
    assert plan.block_mask[:, :, count:].all()
    for (b, h, n), kept in expected.kept.items():
        assert set(plan.block_mask[b, h, n, :count].nonzero().flatten().tolist()) == kept
        assert float(plan.row_scale[b, h, n]) == pytest.approx(expected.factor[b, h, n][0], abs=1e-6)
    assert (plan.row_scale[..., count:] == 1).all()
    assert (plan.row_add[:, :, count:] == 0).all()


@pytest.mark.parametrize("layout", ["whole blocks", "text last"])
def test_the_log_of_the_count_is_the_reallocation_of_the_paper(layout):
    """Conformance: b P_v / (b sum P_v + P_t), equal to a softmax with + log b on the video logits."""
    layout = LAYOUTS[layout]
    q, k, _, expected = solved(layout)
    found = make(q, k, torch.eye(layout.tokens)[None, None].expand(B, H, -1, -1), METHOD, layout=layout)
    blocks, _ = blocks_of(layout, METHOD)
    for (b, h, n), entries in expected.pooled.items():
        # One value channel per token: what is added is A of every compensated block, shared by its tokens.
        for m, block in enumerate(blocks):
            added = found.row_add[b, h, n, block]
            assert bool(added.any()) == (m in expected.added[b, h, n])
            if added.any():
                torch.testing.assert_close(added, torch.full_like(added, entries[m] / len(block)), **CLOSE)


def test_row_weights_sum_to_one():
    layout = LAYOUTS["text first"]
    q, k, v, expected = solved(layout)
    assert all(sum(pair) == pytest.approx(1) for pair in expected.factor.values())
    plan = make(q, k, torch.ones_like(v), METHOD, layout=layout)
    sums = plan.row_scale[..., None] + plan.row_add
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    assert (plan.row_add > 0).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_values_give_constant_output(layout):
    layout = LAYOUTS[layout]
    q, k, v = tensors(layout)
    out = attend(q, k, torch.full_like(v, 2.5), METHOD, layout=layout)
    torch.testing.assert_close(out, torch.full_like(out, 2.5), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_block_kept_is_dense(layout, backend):
    layout = LAYOUTS[layout]
    q, k, v = tensors(layout)
    dense = attend(q, k, v, layout=layout)
    for method in (replace(METHOD, density=1.0), replace(METHOD, top_p=1.0)):
        torch.testing.assert_close(attend(q, k, v, method, layout=layout, backend=backend), dense, **CLOSE)
    assert make(q, k, v, replace(METHOD, density=1), layout=layout).density == 1
    plan = make(q, k, v, replace(METHOD, top_p=1.0), layout=layout)
    torch.testing.assert_close(plan.row_scale, torch.ones_like(plan.row_scale), atol=1e-6, rtol=0)
    assert not plan.row_add.any()


@pytest.mark.parametrize("layout", ["ragged video", "text last", "text first"])
def test_blocks_of_equal_queries_and_keys_are_dense_for_any_selection(layout):
    layout = LAYOUTS[layout]
    q, k, v = tensors(layout)
    blocks, _ = blocks_of(layout, METHOD)
    for x in (q, k):
        for block in blocks:
            x[:, :, block] = x[:, :, block[:1]]
    dense = attend(q, k, v, layout=layout)
    for method in (METHOD, replace(METHOD, density=0.01, top_p=0.0, neighbors=False)):
        plan = make(q, k, v, method, layout=layout)
        assert plan.density < 0.9
        torch.testing.assert_close(attend(q, k, v, plan=plan, layout=layout), dense, **CLOSE)


@pytest.mark.parametrize("layout", ["text last", "text first", "text and prefix"])
def test_rows_beside_the_main_segment_are_dense(layout):
    layout = LAYOUTS[layout]
    q, k, v = tensors(layout)
    out, dense = attend(q, k, v, METHOD, layout=layout, backend="reference"), attend(q, k, v, layout=layout)
    rows = [t for t in range(layout.tokens) if not layout.main.start <= t < layout.main.stop]
    torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    text=st.integers(0, 9),
    first=st.booleans(),
    size=st.sampled_from([2, 5, 16, 64]),
    curve=st.sampled_from([None, "gilbert"]),
)
@example(grid=(1, 1, 17), text=1, first=False, size=16, curve=None)
def test_any_geometry(grid, text, first, size, curve):
    layout = Layout(grid, text=text, text_first=first)
    assume(layout.tokens > 2)
    q, k, v = tensors(layout)
    method = Rectified(block_size=size, curve=curve)
    out = attend(q, k, v, method, layout=layout, backend="gather")
    torch.testing.assert_close(out, attend(q, k, v, method, layout=layout, backend="reference"), **CLOSE)


# What the released code gets wrong (github.com/BienLuky/Rectified-SpaAttn).


def test_samples_do_not_depend_on_their_batch():
    layout, valid = LAYOUTS["text last"], torch.tensor([116, 108], dtype=torch.int32)
    q, k, v = tensors(layout)
    both = attend(q, k, v, METHOD, layout=layout, kv_valid=valid)
    for b in range(B):
        one = [x[b : b + 1] for x in (q, k, v)]
        alone = attend(*one, METHOD, layout=layout, kv_valid=valid[b : b + 1])
        torch.testing.assert_close(both[b : b + 1], alone, **CLOSE)


def test_first_frame_blocks_hold_the_first_frame():
    """Also under the curve, where the leading blocks hold little of it."""
    layout, method = Layout((4, 6, 8)), replace(METHOD, density=0.01, top_p=0, neighbors=False, first_frame_blocks=True)
    q, k, v = tensors(layout)
    mask = make(q, k, v, method, layout=layout).token_mask()
    assert mask[:, :, :48, :48].all()
    blocks, _ = blocks_of(layout, method)
    assert any(t >= 48 for block in blocks[:6] for t in block)
    later = [t for block in blocks if min(block) >= 48 for t in block]
    assert mask[:, :, later].double().mean() < 0.2


def test_a_short_last_block_counts_as_what_it_holds():
    """17 tokens in blocks of 8: with equal logits everywhere the last one holds 1/17, not a third or 1/24."""
    layout = Layout((1, 1, 17))
    q, k, v = torch.zeros(1, 1, 17, D), torch.zeros(1, 1, 17, D), torch.eye(17)[None, None]
    q[..., 0], k[..., 0] = 1.0, 1e-3
    plan = make(q, k, v, replace(METHOD, density=0.01, top_p=0, neighbors=False), layout=layout)
    kept = plan.block_mask[0, 0, 0]
    assert kept.sum() == 1
    assert not kept[2]
    torch.testing.assert_close(plan.row_scale, torch.full((1, 1, 3), 8 / 17), **CLOSE)
    torch.testing.assert_close(plan.row_add[..., 16], torch.full((1, 1, 3), 1 / 17), **CLOSE)


def test_no_text_is_served_and_tensors_stay_as_they_are():
    layout = LAYOUTS["text last"]
    q, k, v = tensors(layout)
    before = [x.clone() for x in (q, k, v)]
    attend(q, k, v, METHOD, layout=layout, kv_valid=torch.tensor([105, 110], dtype=torch.int32))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_calls_are_not_counted():
    """A plan follows from its call alone; what ran before, and how often, is no part of it."""
    layout, state = LAYOUTS["text last"], State()
    q, k, v = tensors(layout)
    first = make(q, k, v, METHOD, layout=layout, state=state)
    for seed in range(3):
        make(*tensors(layout, seed=seed), METHOD, layout=layout, layer=seed, state=state)
    again = make(q, k, v, METHOD, layout=layout, state=state)
    assert torch.equal(first.block_mask, again.block_mask)
    assert torch.equal(first.row_add, again.row_add)
    assert len(state) == 0


# The method as one of the library's.


def test_geometry_is_made_once_per_layout(monkeypatch):
    made, touch = [], rectified.touching
    monkeypatch.setattr(rectified, "touching", lambda *given: made.append(given[0]) or touch(*given))
    state, q_k_v = State(), tensors(VIDEO)
    for layer in range(3):
        make(*q_k_v, METHOD, layout=VIDEO, layer=layer, state=state)
        make(*q_k_v, replace(METHOD, density=0.5), layout=VIDEO, layer=layer, state=state)
    assert made == [VIDEO.grid]


def test_nothing_of_the_size_of_n_by_n_is_made(monkeypatch):
    """Logits of tokens beside the main segment come in parts; no other table is larger than blocks x blocks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return out

    monkeypatch.setattr(rectified, "CHUNK", 1 << 14)
    layout = Layout((4, 16, 16), text=600)
    q, k, v = (x.half() for x in tensors(layout, kv_heads=2))
    with Largest() as seen:
        make(q, k, v, replace(METHOD, block_size=32), layout=layout)
    # The largest are the tokens themselves; a column per key beside the main segment would take 150 times as many.
    assert seen.size <= 2 * q.numel()


def test_16_bit_tensors_are_pooled_in_float32():
    layout = LAYOUTS["text last"]
    q, k, v = (x.bfloat16() for x in tensors(layout))
    plan = make(q, k, v, METHOD, layout=layout)
    assert plan.row_scale.dtype == plan.row_add.dtype == torch.float32
    out = attend(q, k, v, plan=plan, layout=layout)
    assert out.dtype == torch.bfloat16
    exact = attend(q.float(), k.float(), v.float(), METHOD, layout=layout)
    torch.testing.assert_close(out.float(), exact, atol=3e-2, rtol=3e-2)


def test_the_callers_scale_reaches_the_pooled_attention():
    q, k, v = tensors(VIDEO)
    scaled = attend(q, k, v, METHOD, layout=VIDEO, scale=0.5)
    torch.testing.assert_close(scaled, attend(q * 0.5 * D**0.5, k, v, METHOD, layout=VIDEO), **CLOSE)


@pytest.mark.parametrize("layout", [Layout((5, 12, 20)), Layout((5, 12, 20), text=100, text_first=True)])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8, 1.0])
def test_with_density(layout, density):
    method, reached = replace(METHOD, block_size=16, top_p=0.0).with_density(density, layout)
    assert reached == pytest.approx(density, rel=0.2)
    # Blocks nearby on the curve are alike, as they are in a video.
    g = torch.Generator().manual_seed(0)
    cell = torch.cartesian_prod(*(torch.linspace(0, 1, n) for n in layout.grid))
    cell = torch.nn.functional.pad(cell, (0, 0, layout.main.start, layout.tokens - layout.main.stop))
    phase = cell @ (6 * torch.randn(3, 32, generator=g))
    q = k = torch.cat([phase.sin(), phase.cos()], -1)[None, None] * 4
    plan = make(q, k, torch.randn_like(q), method, layout=layout)
    assert plan.density == pytest.approx(density, rel=0.2)
    assert plan.density_video <= plan.density


def test_with_density_takes_smaller_blocks_where_too_many_touch():
    layout = Layout((33, 8, 10))
    for density, size in ((0.5, 128), (0.25, 64), (0.15, 32)):
        method, reached = Rectified().with_density(density, layout)
        assert method.block_size == size
        assert reached == pytest.approx(density, rel=0.1)
    assert Rectified(neighbors=False).with_density(0.15, layout)[0].block_size == 128
    assert Rectified(block_size=16).with_density(0.01, layout)[0].block_size == 16


@pytest.mark.parametrize("layout", [Layout((33, 8, 10)), Layout((13, 20, 26)), Layout((1, 48, 40), text=70)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.5])
def test_the_density_told_is_near_that_of_noise_and_of_smooth_tensors(layout, density):
    method, told = Rectified().with_density(density, layout)
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 2, layout.tokens, 32, generator=g) for _ in range(3)]
    found = [make(*qkv, method, layout=layout).density for qkv in (noise, synthetic_tensors(layout))]
    assert found == [pytest.approx(told, rel=0.28)] * 2
    assert method.top_p <= method.density


def test_presets():
    for name, preset in PRESETS.items():
        processor = RectifiedProcessor.preset(name)
        assert processor.method == Rectified(**preset.parameters)
        assert processor.schedule == preset.schedule
        assert processor == pickle.loads(pickle.dumps(processor))
    t2v = RectifiedProcessor.preset("wan2.1-t2v", density=0.4, backend="gather")
    assert (t2v.method.density, t2v.method.top_p, t2v.backend) == (0.4, 0.3, "gather")
    assert t2v.dense_steps(50) == [0, 1, 2, 3, 4]
    assert t2v.schedule.layers == 2
    own = RectifiedProcessor.preset("flux-4k", schedule=Schedule(first=1))
    assert own.schedule == Schedule(first=1)
    with pytest.raises(UsageError, match="hunyuan-video"):
        Rectified.preset("hunyuan")


def test_round_trip_and_names():
    method = Rectified(density=0.3, curve=None)
    assert Method.from_dict(method.to_dict()) == method == pickle.loads(pickle.dumps(method))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"density": 0}, "density"), ({"top_p": 1.5}, "0 to 1"), ({"block_size": 1}, "at least 2"),
     ({"curve": "hilbert"}, "'gilbert'")],
)  # fmt: skip
def test_bad_values(values, message):
    with pytest.raises(UsageError, match=message):
        Rectified(**values)


def test_keys_of_another_layout_are_refused():
    q, k, v = tensors(VIDEO)
    with pytest.raises(UnsupportedError, match="queries' layout"):
        attend(q, k, v, METHOD, layout=VIDEO, kv_layout=Layout((1, 3, 35)))
