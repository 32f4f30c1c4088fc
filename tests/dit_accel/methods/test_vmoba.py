"""VMoBA: the plan is the paper's, on any grid, and the released code's errors are not ours."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.methods import Method, VMoBA
from dit_accel.methods.vmoba import PRESETS
from dit_accel.processors import VMoBAProcessor
from dit_accel.state import State

CHUNKS = (0.75, (2, 3), (2, 2, 4))
VIDEO = Layout((3, 4, 5))
WITH_TEXT = Layout((3, 4, 5), text=7, text_first=True)
TEXT_LAST = Layout((3, 4, 5), text=7)
TAUS = (0, 0.1, 0.25, 0.5, 0.9, 1)


def tensors(layout, heads=2, kv_heads=None, batch=2, dim=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, layout.tokens, dim) for h in (heads, kv_heads or heads, kv_heads or heads)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def owners(layout, chunk):
    """Chunk of each video token, row-major, from its coordinates alone."""
    frames, height, width = layout.grid
    found = []
    for token in range(frames * height * width):
        where = token // (height * width), token // width % height, token % width
        if isinstance(chunk, tuple):
            tile = chunk if len(chunk) == 3 else (frames, *chunk)
            found.append(tuple(x // size for x, size in zip(where, tile, strict=True)))
        else:
            found.append(token // int(chunk * height * width))
    names = sorted(set(found))
    return torch.tensor([names.index(x) for x in found])


def choose(gate, own, select, scope, k, tau, live=None):
    """The definition, by full sorts over lists. gate (H, S, C) of one sample, own (S,), live bool (S, C)."""
    own = own.tolist()
    group = {
        "query_head": lambda h, s, c: (h, s), "block": lambda h, s, c: c,
        "overall": lambda h, s, c: 0, "head_global": lambda h, s, c: h,
    }[scope]  # fmt: skip
    groups = {}
    for h, rows in enumerate(gate.tolist()):
        for s, row in enumerate(rows):
            for c, value in enumerate(row):
                if live is None or live[s, c]:
                    groups.setdefault(group(h, s, c), []).append((value, own[s] == c, (h, s, c)))
    mask = torch.zeros(gate.shape, dtype=torch.bool)
    for members in groups.values():
        mine = [m for m in members if m[1]]
        others = sorted((m for m in members if not m[1]), reverse=True)
        if select == "topk":
            others = others[: (k - 1) * len(mine)]
        elif tau < 1:
            low, high = min(members)[0], max(members)[0]
            span = high - low if high - low > 1e-6 else 1
            total = sum((m[0] - low) / span for m in members) + 1e-6
            held, count = sum((m[0] - low) / span for m in mine), 0
            while count < len(others) and held < tau * total:
                held += (others[count][0] - low) / span
                count += 1
            others = others[:count]
        for _, _, place in mine + others:
            mask[place] = True
    return mask


def expected_mask(method, q, k, layout, layer, kv_valid=None):
    """bool (B, H, N, N) of the method at granularity "token", in float64 from the paper's formula."""
    own = owners(layout, method.chunks[layer % 3])
    video = torch.arange(layout.main.start, layout.main.stop)
    groups = q.shape[1] // k.shape[1]
    mask = torch.ones((q.shape[0], q.shape[1], layout.tokens, layout.tokens), dtype=torch.bool)
    for b in range(q.shape[0]):
        alive = torch.ones(len(video), dtype=torch.bool) if kv_valid is None else video < kv_valid[b]
        chunks = [(own == c) & alive for c in range(own.max() + 1)]
        full = torch.stack([c.any() for c in chunks])
        means = torch.stack([k[b][:, video[c]].double().mean(1).nan_to_num() for c in chunks], 1)
        gate = q[b][:, video].double() @ means.repeat_interleave(groups, 0).mT
        k_of = method.k if not isinstance(method.k, tuple) else method.k[layer % 3]
        k_of = min(max(round(k_of * len(chunks)), 1) if isinstance(k_of, float) else k_of, len(chunks))
        live = alive[:, None] & full
        chosen = choose(gate, own, method.select, method.scope, k_of, method.tau, live)
        chosen |= (own[:, None] == torch.arange(len(chunks))) & full
        mask[b, :, layout.main, layout.main] = chosen[:, :, own]
    return mask


def masked_softmax(q, k, v, mask, kv_valid=None):
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    if kv_valid is not None:
        mask = mask & (torch.arange(k.shape[2]) < kv_valid[:, None])[:, None, None]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.nan_to_num() @ v


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("scope", ["query_head", "block", "overall", "head_global"])
@pytest.mark.parametrize("layout", [VIDEO, WITH_TEXT], ids=str)
def test_threshold_masks_are_those_of_a_full_sort(layout, scope, layer):
    q, k, v = tensors(layout, kv_heads=1)
    for tau in TAUS:
        method = VMoBA(CHUNKS, select="threshold", scope=scope, tau=tau)
        mask = make(q, k, v, method, layout=layout, layer=layer).token_mask()
        assert torch.equal(mask, expected_mask(method, q, k, layout, layer)), tau


@pytest.mark.parametrize("layer", [0, 4, 8])
@pytest.mark.parametrize("scope", ["query_head", "overall", "head_global"])
@pytest.mark.parametrize("layout", [VIDEO, WITH_TEXT], ids=str)
def test_topk_masks_are_those_of_a_full_sort(layout, scope, layer):
    q, k, v = tensors(layout, kv_heads=1)
    for count in (1, 2, 0.4, (2, 3, 4)):
        method = VMoBA(CHUNKS, scope=scope, k=count)
        mask = make(q, k, v, method, layout=layout, layer=layer).token_mask()
        assert torch.equal(mask, expected_mask(method, q, k, layout, layer)), count


@pytest.mark.parametrize("method", [
    VMoBA(CHUNKS, k=2), VMoBA(CHUNKS, select="threshold"), VMoBA(CHUNKS, select="threshold", scope="block", tau=0.5),
    VMoBA(CHUNKS, scope="overall", k=3), VMoBA(CHUNKS, select="threshold", scope="query_head", tau=1),
], ids=lambda m: f"{m.select}-{m.scope}")  # fmt: skip
def test_dead_keys_leave_means_budgets_and_totals(method):
    q, k, v = tensors(WITH_TEXT)
    valid = torch.tensor([67, 38], dtype=torch.int32)
    for layer in range(3):
        mask = make(q, k, v, method, layout=WITH_TEXT, layer=layer, kv_valid=valid).token_mask()
        assert torch.equal(mask, expected_mask(method, q, k, WITH_TEXT, layer, valid))


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("scope", ["query_head", "block", "overall", "head_global"])
def test_padding_changes_nothing(scope, granularity):
    q, k, v = tensors(WITH_TEXT)
    valid = torch.tensor([67, 38], dtype=torch.int32)
    method = VMoBA(CHUNKS, select="threshold", scope=scope, granularity=granularity)
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[1, :, 38:] = torch.randn(x[1, :, 38:].shape, generator=torch.Generator().manual_seed(5)) * 9
    for layer in range(3):
        outs = [
            attend(*x, method, layout=WITH_TEXT, layer=layer, kv_valid=valid, backend="gather")
            for x in ((q, k, v), other)
        ]
        torch.testing.assert_close(outs[0][0], outs[1][0])
        torch.testing.assert_close(outs[0][1, :, :38], outs[1][1, :, :38])


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("method", [
    VMoBA(CHUNKS, k=2), VMoBA(CHUNKS, select="threshold"), VMoBA(CHUNKS, scope="overall", k=0.3),
], ids=lambda m: f"{m.select}-{m.scope}")  # fmt: skip
@pytest.mark.parametrize("layout", [VIDEO, TEXT_LAST], ids=str)
def test_output_is_the_masked_softmax(layout, method, backend):
    q, k, v = tensors(layout, kv_heads=1, dim=16)
    valid = None if layout is VIDEO else torch.tensor([67, 62], dtype=torch.int32)
    for layer in range(3):
        out = attend(q, k, v, method, layout=layout, layer=layer, kv_valid=valid, backend=backend)
        mask = expected_mask(method, q, k, layout, layer, valid)
        torch.testing.assert_close(out.double(), masked_softmax(q, k, v, mask, valid), atol=1e-5, rtol=0)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_the_compiled_tier_sees_the_same_plan(granularity):
    q, k, v = tensors(WITH_TEXT, kv_heads=1, dim=16)
    plan = make(q, k, v, VMoBA(CHUNKS, k=2, granularity=granularity), layout=WITH_TEXT, layer=1)
    outs = [attend(q, k, v, plan=plan, layout=WITH_TEXT, backend=tier) for tier in ("flex", "reference")]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    torch.testing.assert_close(outs[0].double(), masked_softmax(q, k, v, plan.token_mask()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [
    VMoBA(CHUNKS, k=1.0), VMoBA(CHUNKS, k=1000, scope="head_global"), VMoBA(CHUNKS, k=1.0, granularity="block"),
    VMoBA(CHUNKS, select="threshold", tau=1), VMoBA(CHUNKS, select="threshold", tau=1.5, granularity="block"),
    VMoBA((9, (4, 6), (7, 7, 7)), k=1), VMoBA((9, (4, 6), (7, 7, 7)), select="threshold", tau=0),
], ids=str)  # fmt: skip
def test_everything_chosen_or_a_single_chunk_is_dense(method):
    q, k, v = tensors(WITH_TEXT, kv_heads=1)
    for layer in range(3):
        plan = make(q, k, v, method, layout=WITH_TEXT, layer=layer)
        assert plan.density == pytest.approx(1)
        out = attend(q, k, v, plan=plan, layout=WITH_TEXT, backend="gather")
        torch.testing.assert_close(out, attend(q, k, v, layout=WITH_TEXT), atol=1e-5, rtol=0)


# What the released code gets wrong.


@pytest.mark.parametrize("scope", ["query_head", "overall", "head_global"])
def test_k_of_one_is_the_own_chunk_and_not_dense(scope):
    q, k, v = tensors(VIDEO)
    mask = make(q, k, v, VMoBA(CHUNKS, k=1, scope=scope), layout=VIDEO, layer=2).token_mask()
    own = owners(VIDEO, CHUNKS[2])
    assert torch.equal(mask, (own[:, None] == own).expand_as(mask))


@pytest.mark.parametrize("method", [
    VMoBA(CHUNKS, k=3, scope="head_global"), VMoBA(CHUNKS, k=2, scope="overall"),
    *(VMoBA(CHUNKS, select="threshold", scope=s, tau=0.5) for s in ("query_head", "block", "overall", "head_global")),
], ids=lambda m: f"{m.select}-{m.scope}")  # fmt: skip
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_a_sample_does_not_depend_on_its_batch_mates(method, granularity):
    method = replace(method, granularity=granularity)
    q, k, v = tensors(VIDEO)
    q[1], k[1] = q[1] * 30, k[1] * 30
    together = make(q, k, v, method, layout=VIDEO).block_mask
    alone = [make(q[i : i + 1], k[i : i + 1], v[i : i + 1], method, layout=VIDEO).block_mask for i in range(2)]
    assert torch.equal(together, torch.cat(alone))
    assert not together.all()


@pytest.mark.parametrize("scope", ["query_head", "block", "overall", "head_global"])
def test_tau_of_one_takes_the_least_similar_chunk_too(scope):
    q, k, v = tensors(VIDEO)
    assert make(q, k, v, VMoBA(CHUNKS, select="threshold", scope=scope, tau=1), layout=VIDEO).block_mask.all()


@pytest.mark.parametrize("scope", ["query_head", "block", "overall", "head_global"])
def test_a_share_that_own_chunks_hold_adds_nothing(scope):
    q, k, v = tensors(VIDEO)
    own = owners(VIDEO, CHUNKS[1])
    # Keys of a chunk agree with its queries and with no others', so own chunks hold more than 0.2 of any total.
    q = k = torch.nn.functional.one_hot(own, 8)[None, None].float().expand(2, 2, -1, -1).contiguous()
    mask = make(q, k, v, VMoBA(CHUNKS, select="threshold", scope=scope, tau=0.2), layout=VIDEO, layer=1).token_mask()
    assert torch.equal(mask, (own[:, None] == own).expand_as(mask))


@pytest.mark.parametrize("chunks", [(2, (3, 4), (2, 3, 4)), (0.3, (4, 2), (2, 3, 4))])
def test_sizes_that_do_not_divide_the_grid_leave_smaller_chunks(chunks):
    q, k, v = tensors(VIDEO)
    for layer in range(3):
        method = VMoBA(chunks, k=2)
        assert torch.equal(
            make(q, k, v, method, layout=VIDEO, layer=layer).token_mask(), expected_mask(method, q, k, VIDEO, layer)
        )


def test_equal_similarities_do_not_break_the_budget():
    q, k, v = (torch.ones(1, 2, VIDEO.tokens, 8) for _ in range(3))
    for scope, per_head in (("query_head", True), ("head_global", True), ("overall", False)):
        mask = make(q, k, v, VMoBA(CHUNKS, k=2, scope=scope), layout=VIDEO).block_mask
        counts = mask.sum((-2, -1)) if per_head else mask.sum((-2, -1)).sum(1) / 2
        assert (counts == 2 * VIDEO.tokens).all()


def test_own_chunk_is_always_seen_and_density_grows_with_tau():
    q, k, v = tensors(VIDEO)
    own = owners(VIDEO, CHUNKS[2])
    same = own[:, None] == own
    for scope in ("query_head", "block", "overall", "head_global"):
        plans = [
            make(q, k, v, VMoBA(CHUNKS, select="threshold", scope=scope, tau=t), layout=VIDEO, layer=2) for t in TAUS
        ]
        assert all(plan.token_mask()[..., same].all() for plan in plans)
        densities = [plan.density for plan in plans]
        assert densities == sorted(densities)
        assert densities[0] == pytest.approx(same.double().mean().item())
        assert densities[-1] == 1


# Granularity "block".


@pytest.mark.parametrize("layout", [Layout((4, 10, 9)), Layout((4, 10, 9), text=70)], ids=str)
@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_blocks_choose_by_their_mean_query(layout, select):
    chunks = (2, (5, 9), (4, 10, 3))
    q, k, v = tensors(layout, kv_heads=1)
    method = VMoBA(chunks, select=select, scope="head_global", k=2, tau=0.4, granularity="block")
    for layer in range(3):
        plan = make(q, k, v, method, layout=layout, layer=layer)
        order = torch.arange(layout.tokens) if plan.order is None else plan.order
        own = owners(layout, chunks[layer])
        runs = [order[a:b] for a, b in zip(plan.q_blocks.bounds[:-1], plan.q_blocks.bounds[1:], strict=True)]
        assert max(map(len, runs)) <= 64
        video = [run for run in runs if run[0] < 360]
        of_run = [own[run].unique().tolist() for run in video]
        assert all(len(found) == 1 for found in of_run)
        of_run = torch.tensor(of_run).flatten()
        means = torch.stack([k[:, :, :360][:, :, own == c].double().mean(2) for c in range(own.max() + 1)], 2)
        pooled = torch.stack([q[:, :, run].double().mean(2) for run in video], 2)
        gate = pooled @ means.repeat_interleave(2, 1).mT
        for b in range(2):
            expected = choose(gate[b], of_run, select, "head_global", 2, 0.4)
            assert torch.equal(plan.block_mask[b, :, : len(video), : means.shape[2]], expected)
        outs = [attend(q, k, v, plan=plan, layout=layout, backend=x) for x in ("reference", "gather")]
        expected = masked_softmax(q, k, v, plan.token_mask())
        for out in outs:
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
        mask = plan.token_mask()
        assert mask[..., 360:].all()
        assert mask[..., 360:, :].all()


# Parameters.


@pytest.mark.parametrize(("layout", "density"), [
    (Layout((33, 8, 10)), 0.25), (Layout((33, 8, 10)), 0.5), (Layout((12, 8, 9), text=30), 0.4),
])  # fmt: skip
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_with_density_reaches_what_it_says(layout, density, granularity):
    method, reached = VMoBA(granularity=granularity).with_density(density, layout)
    assert reached == pytest.approx(density, rel=0.2)
    q, k, v = tensors(layout, heads=1, batch=1)
    plans = [make(q, k, v, method, layout=layout, layer=layer) for layer in range(3)]
    assert sum(plan.density for plan in plans) / 3 == pytest.approx(reached, rel=0.05)


def test_with_density_turns_thresholds_into_counts():
    method, _ = VMoBA(select="threshold", scope="block").with_density(0.3, VIDEO)
    assert (method.select, method.scope) == ("topk", "query_head")
    assert VMoBA(select="threshold").with_density(0.3, VIDEO)[0].scope == "head_global"


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80)])
def test_the_default_k_is_the_published_one(grid):
    name = {30: "wan-480p", 45: "wan-720p"}[grid[1]]
    preset = VMoBA.preset(name)
    blocks = (7, 24, 72) if grid[1] == 30 else (7, 40, 36)
    for layer in range(3):
        assert VMoBA().chunk(Layout(grid), layer) == preset.chunks[layer]
        assert VMoBA().budget(layer, blocks[layer]) == preset.budget(layer, blocks[layer]) == preset.k[layer]


def test_published_scopes_are_the_defaults():
    assert (VMoBA().select, VMoBA().scope, VMoBA().granularity) == ("topk", "query_head", "token")
    assert (VMoBA(select="threshold").scope, VMoBA(select="threshold").tau) == ("head_global", 0.25)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_pickle(name):
    method = VMoBA.preset(name, granularity="block")
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert hash(method) == hash(VMoBA.preset(name, granularity="block"))


@pytest.mark.parametrize(("settings", "told"), [
    ({"select": "best"}, "topk, threshold"),
    ({"scope": "row"}, "query_head"),
    ({"granularity": "frame"}, "token, block"),
    ({"scope": "block"}, "threshold"),
    ({"chunks": 3}, "Example: chunks"),
    ({"chunks": (0, (1, 1), (1, 1, 1))}, "Example: chunks"),
    ({"chunks": (1, (1, 1.5), (1, 1, 1))}, "Example: chunks"),
    ({"chunks": (1, (1, 1, 1), (1, 1))}, "Example: chunks"),
    ({"k": 0}, "got 0"),
    ({"k": 1.5}, "got 1.5"),
    ({"k": (1, 2)}, "three"),
    ({"tau": -0.1}, "got -0.1"),
])  # fmt: skip
def test_bad_parameters_say_what_is_allowed(settings, told):
    with pytest.raises(UsageError, match=told):
        VMoBA(**settings)


def test_unknown_presets_and_other_keys_are_refused():
    with pytest.raises(UsageError, match="wan-480p"):
        VMoBA.preset("wan")
    q, k, v = tensors(VIDEO)
    with pytest.raises(UnsupportedError, match="queries' layout"):
        make(q, k[:, :, :30], v[:, :, :30], VMoBA(), layout=VIDEO, kv_layout=Layout((3, 2, 5)))


def test_tables_of_a_partition_are_made_once(monkeypatch):
    from dit_accel.methods import vmoba

    calls = []
    made = vmoba.Chunking.make
    monkeypatch.setattr(vmoba.Chunking, "make", lambda *a: calls.append(a) or made(*a))
    q, k, v = tensors(VIDEO)
    state = State()
    for layer in range(6):
        make(q, k, v, VMoBA(CHUNKS), layout=VIDEO, layer=layer, state=state)
    assert len(calls) == 3


def test_heads_in_slices_give_the_same_plan(monkeypatch):
    from dit_accel.methods import vmoba

    q, k, v = tensors(WITH_TEXT, kv_heads=1)
    methods = [VMoBA(CHUNKS, select="threshold", scope=s) for s in ("head_global", "block")]
    whole = [make(q, k, v, method, layout=WITH_TEXT).block_mask for method in methods]
    monkeypatch.setattr(vmoba, "AT_ONCE", 1)
    for method, mask in zip(methods, whole, strict=True):
        assert torch.equal(make(q, k, v, method, layout=WITH_TEXT).block_mask, mask)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 7)),
    text=st.integers(0, 9),
    layer=st.integers(0, 2),
    granularity=st.sampled_from(["token", "block"]),
    k=st.sampled_from([1, 2, 0.5]),
)
def test_any_grid_is_served(grid, text, layer, granularity, k):
    layout = Layout(grid, text=text)
    q, key, v = tensors(layout, heads=2, batch=1)
    plan = make(q, key, v, VMoBA(k=k, granularity=granularity), layout=layout, layer=layer)
    mask = plan.token_mask()
    assert mask.any(-1).all()
    out = attend(q, key, v, plan=plan, layout=layout, backend="gather")
    torch.testing.assert_close(out.double(), masked_softmax(q, key, v, mask), atol=1e-5, rtol=0)


def test_the_processor_takes_the_methods_parameters():
    processor = VMoBAProcessor(k=(2, 6, 18), granularity="block")
    assert processor.method == VMoBA(k=(2, 6, 18), granularity="block")


@pytest.mark.parametrize("chunks", [(True, (3, 4), (2, 3, 4)), (2, (True, 4), (2, 3, 4)), (2, (3, 4), (2, 3, True))])
def test_true_is_no_size(chunks):
    with pytest.raises(UsageError, match=r"got .*True"):
        VMoBA(chunks=chunks)
