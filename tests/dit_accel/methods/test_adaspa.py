"""AdaSpa: its plans against the paper's definitions, when it searches, and what it keeps between calls."""

import json
import pickle

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dit_accel
from dit_accel import AdaSpa, AdaSpaProcessor, Layout, Pisa, Radial, Schedule, State, Step, UsageError, attend
from dit_accel.diffusers import engines
from dit_accel.eval import method_spec
from dit_accel.methods import Method, adaspa
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer

VIDEO = Layout((5, 6, 7))
TEXT = Layout((5, 6, 7), text=9)
TEXT_FIRST = Layout((5, 6, 7), text=21, text_first=True)
LAYOUTS = pytest.mark.parametrize("layout", [VIDEO, TEXT, TEXT_FIRST], ids=["video", "text", "text first"])


def tensors(layout=TEXT, seed=0, batch=2, heads=6, kv_heads=6, dim=16, dtype=torch.float64):
    """q, k, v; the queries of the first head attend to themselves, those of the others to all alike."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn((batch, h, layout.tokens, dim), generator=generator, dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    q[:, :1] = 4 * k[:, :1]
    return q, k, v


def brute_mask(q, k, layout, size, density, valid=None, lse=None, adaptive=True):
    """The block mask by the paper's sections 3.2 and 3.3, from the materialised softmax."""
    n = layout.tokens
    scores = q @ k.mT * q.shape[-1] ** -0.5
    for b, live in enumerate(valid or []):
        scores[b, :, :, live:] = -torch.inf
    weights = scores.softmax(-1) if lse is None else (scores - lse[..., None]).exp()
    bounds = [*range(0, n, size), n]
    blocks = range(len(bounds) - 1)
    video = [j for j in blocks if layout.main.start <= bounds[j] and bounds[j + 1] <= layout.main.stop]
    mask = torch.ones((*q.shape[:2], len(blocks), len(blocks)), dtype=torch.bool)
    few, usual, many = (max(round(d * len(video)), 1) for d in (density / 2, density, density * 1.5))
    for b in range(q.shape[0]):
        mass = torch.stack([weights[b, :, :, bounds[j] : bounds[j + 1]].sum(-1) for j in blocks], -1)
        mass = torch.stack([mass[:, bounds[p] : bounds[p + 1]].sum(1) for p in video], 1)
        ordered = [[sorted(video, key=lambda j, r=row: -float(r[j])) for row in head] for head in mass]
        recall = [
            sum(float(row.sum() - row[rank[usual:]].sum()) for row, rank in zip(head, ranks, strict=True))
            / float(head.sum())
            for head, ranks in zip(mass, ordered, strict=True)
        ]
        n_high = min(sum(r > 0.8 for r in recall), len(recall) // 2)
        best = sorted(range(len(recall)), key=lambda h: -recall[h])
        for place, h in enumerate(best):
            count = few if place < n_high else many if place >= len(best) - n_high else usual
            for p, rank in zip(video, ordered[h], strict=True):
                mask[b, h, p, rank[count if adaptive else usual :]] = False
    return mask


@LAYOUTS
@pytest.mark.parametrize("size", [16, 21])
def test_the_plan_is_the_papers_selection_and_the_output_its_masked_softmax(layout, size):
    q, k, v = tensors(layout)
    method = AdaSpa(density=0.3, block_size=size)
    plan = dit_accel.plan(q, k, v, method, layout=layout)
    expected = brute_mask(q, k, layout, size, 0.3)
    assert torch.equal(plan.block_mask, expected)
    assert len(expected.sum(-1)[:, :, 5].unique()) == 3, "heads of all three budgets"
    tokens = expected.repeat_interleave(size, -1).repeat_interleave(size, -2)[..., : layout.tokens, : layout.tokens]
    exact = sdpa(q, k, v, attn_mask=tokens)
    torch.testing.assert_close(attend(q, k, v, method, layout=layout, backend="reference"), exact)
    single = [x.float() for x in (q, k, v)]
    for backend in ("gather", "auto"):
        out, lse = attend(*single, method, layout=layout, backend=backend, return_lse=True)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~tokens, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_dead_keys(layout):
    q, k, v = tensors(layout)
    lengths = [layout.tokens - 5, layout.tokens]
    valid = torch.tensor(lengths, dtype=torch.int32)
    k[0, :, -5:] = 50
    method = AdaSpa(density=0.3, block_size=16)
    plan = dit_accel.plan(q, k, v, method, layout=layout, kv_valid=valid)
    assert torch.equal(plan.block_mask, brute_mask(q, k, layout, 16, 0.3, lengths))
    live = torch.arange(layout.tokens) < valid[:, None, None, None]
    exact = sdpa(q, k, v, attn_mask=plan.token_mask() & live)
    torch.testing.assert_close(attend(q, k, v, method, layout=layout, kv_valid=valid, backend="gather"), exact)


def test_heads_may_share_keys():
    q, k, v = tensors(kv_heads=2)
    full = k.repeat_interleave(3, 1)
    plan = dit_accel.plan(q, k, v, AdaSpa(density=0.3, block_size=16), layout=TEXT)
    assert torch.equal(plan.block_mask, brute_mask(q, full, TEXT, 16, 0.3))


def test_one_budget_for_all_heads():
    q, k, v = tensors()
    plan = dit_accel.plan(q, k, v, AdaSpa(density=0.3, block_size=16, head_adaptive=False), layout=TEXT)
    assert torch.equal(plan.block_mask, brute_mask(q, k, TEXT, 16, 0.3, adaptive=False))
    assert plan.block_mask[:, :, :13].sum(-1).eq(round(0.3 * 13) + 1).all()


def test_every_row_of_a_head_keeps_the_same_number_beside_the_text():
    q, k, v = tensors(VIDEO)
    rows = dit_accel.plan(q, k, v, AdaSpa(density=0.4, block_size=10), layout=VIDEO).block_mask.sum(-1)
    assert (rows == rows[..., :1]).all()
    assert set(rows.unique().tolist()) == {round(d * 21) for d in (0.2, 0.4, 0.6)}
    rows = dit_accel.plan(*tensors(), AdaSpa(density=0.4, block_size=16), layout=TEXT).block_mask.sum(-1)
    assert set(rows[..., :13].unique().tolist()) == {round(d * 13) + 1 for d in (0.2, 0.4, 0.6)}
    assert (rows[..., 13:] == 14).all()


@LAYOUTS
def test_density_1_is_dense(layout):
    q, k, v = tensors(layout)
    out = attend(q, k, v, AdaSpa(density=1, block_size=16), layout=layout, backend="gather")
    torch.testing.assert_close(out, sdpa(q, k, v))


def test_a_layout_without_a_whole_block_of_video_is_dense():
    layout = Layout((1, 2, 3), text=9)
    q, k, v = tensors(layout)
    out = attend(q, k, v, AdaSpa(block_size=16), layout=layout, backend="gather")
    torch.testing.assert_close(out, sdpa(q, k, v))


def test_a_constant_on_one_querys_logits_changes_neither_dense_output_nor_single_token_selection():
    q, k, v = tensors(VIDEO)
    shift = torch.zeros(VIDEO.tokens, 1, dtype=q.dtype).index_fill(0, torch.tensor([17]), 3.0)
    moved = torch.cat([q, shift.expand(2, 6, -1, -1)], -1)
    ones = torch.cat([k, torch.ones_like(k[..., :1])], -1)
    scale = q.shape[-1] ** -0.5
    torch.testing.assert_close(sdpa(moved, ones, v, scale=scale), sdpa(q, k, v))
    method = AdaSpa(density=0.1, block_size=1)
    plain, shifted = (
        dit_accel.plan(a, b, v, method, layout=VIDEO, scale=scale).block_mask for a, b in ((q, k), (moved, ones))
    )
    assert torch.equal(plain, shifted)
    mass, lse = adaspa.block_mass(q, k, 1, scale=scale)
    off, _ = adaspa.block_mass(q, k, 1, scale=scale, lse=lse + shift[:, 0])
    assert torch.equal(mass.topk(5).indices, off.topk(5).indices)


class Run:
    """Calls over the steps of a run, with what was searched: ``(step, layer, "fused" or "cached")``."""

    def __init__(self, monkeypatch, method, total=50, layout=TEXT):
        self.method, self.total, self.layout, self.state = method, total, layout, State()
        self.searched, self.at = [], None
        stock = adaspa.block_mass

        def counted(*args, lse, **kwargs):
            self.searched.append((*self.at, "fused" if lse is None else "cached"))
            return stock(*args, lse=lse, **kwargs)

        monkeypatch.setattr(adaspa, "block_mass", counted)

    def plan(self, index, layer=0, seed=None, **changes):
        """The block mask of a call, or None where it is dense."""
        self.at = index, layer
        layout = changes.pop("layout", self.layout)
        q, k, v = tensors(layout, seed=index if seed is None else seed, batch=changes.pop("batch", 2))
        step = Step(index, changes.pop("total", self.total), **changes)
        made = dit_accel.plan(q, k, v, self.method, layout=layout, step=step, layer=layer, state=self.state)
        return None if made is None else made.block_mask


METHOD = AdaSpa(density=0.3, block_size=16)


def test_fifty_steps(monkeypatch):
    run = Run(monkeypatch, METHOD)
    masks = [[run.plan(i, layer) for layer in range(2)] for i in range(50)]
    assert run.searched == [(9, 0, "fused"), (9, 1, "fused"), (29, 0, "cached"), (29, 1, "cached")]
    for layer in range(2):
        own = [row[layer] for row in masks]
        assert own[:10] == [None] * 10
        q, k, _ = tensors(seed=9)
        expected = brute_mask(q, k, TEXT, 16, 0.3)
        assert all(torch.equal(mask, expected) for mask in own[10:29])
        lse = (q @ k.mT / 4).logsumexp(-1)
        q, k, _ = tensors(seed=29)
        expected = brute_mask(q, k, TEXT, 16, 0.3, lse=lse)
        assert all(torch.equal(mask, expected) for mask in own[29:])


def test_dense_steps_give_dense_attention():
    q, k, v = tensors()
    valid = torch.tensor([TEXT.tokens - 5, TEXT.tokens], dtype=torch.int32)
    told = {"layout": TEXT, "step": Step(3, 50), "kv_valid": valid}
    assert dit_accel.plan(q, k, v, METHOD, **told) is None
    out, lse = attend(q, k, v, METHOD, return_lse=True, **told)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=torch.arange(TEXT.tokens) < valid[:, None, None, None]))
    torch.testing.assert_close(attend(q, k, v, METHOD, **told), out)
    assert lse.shape == (2, 6, TEXT.tokens)


def test_without_a_step_every_call_searches_its_own_tensors(monkeypatch):
    run = Run(monkeypatch, METHOD, total=1)
    for seed in (1, 2):
        q, k, _ = tensors(seed=seed)
        assert torch.equal(run.plan(0, seed=seed), brute_mask(q, k, TEXT, 16, 0.3))
    assert [kind for *_, kind in run.searched] == ["fused", "fused"]


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [
        ((0.2, 0.6), 50, (9, 29)), ((0.2, 0.6), 30, (5, 17)), ((0.2, 0.6), 8, (1, 4)), ((0.2, 0.6), 4, (0, 1)),
        ((0.2, 0.6), 2, (0,)), ((0.2, 0.6), None, (0,)), ((0, 0.6), 50, (0, 29)), ((9, 29), None, (9, 29)),
        ((29, 9, 0.2), 50, (9, 29)), ((0.0,), 50, (0,)),
    ],
)  # fmt: skip
def test_search_steps(steps, total, expected):
    assert AdaSpa(search_steps=steps).searches(total) == expected


def test_it_plans_on_its_search_steps_others_always_or_never():
    assert AdaSpa().planning_steps(50) == [9, 29]
    assert AdaSpa(search_steps=(0, 40)).planning_steps(30) == [0]
    assert Pisa().planning_steps(50) is None
    assert Radial().planning_steps(50) == []


def test_a_layer_that_missed_its_search_searches_when_it_is_next_called(monkeypatch):
    run = Run(monkeypatch, METHOD)
    assert run.plan(12) is not None
    assert run.plan(13) is not None
    assert run.plan(34) is not None  # the second search was missed too
    assert run.plan(35) is not None
    assert run.plan(40, branch="uncond") is not None
    assert [(i, kind) for i, _, kind in run.searched] == [(12, "fused"), (34, "cached"), (40, "fused")]


def test_nothing_stale(monkeypatch):
    """Whatever differs from the search, the mask is that of a search of its own."""
    run = Run(monkeypatch, METHOD)
    run.plan(9)
    kept = run.plan(10)
    wider = Layout((5, 7, 6), text=9)
    for changes in (
        {"run": 1},
        {"branch": "uncond"},
        {"layer": 1},
        {"batch": 1},
        {"layout": wider},
        {"total": 40},
    ):
        run.searched.clear()
        found = run.plan(10, seed=77, **changes)
        q, k, _ = tensors(changes.get("layout", TEXT), seed=77, batch=changes.get("batch", 2))
        assert torch.equal(found, brute_mask(q, k, changes.get("layout", TEXT), 16, 0.3)), changes
        assert [kind for *_, kind in run.searched] == ["fused"], changes
    other = Run(monkeypatch, AdaSpa(density=0.5, block_size=16))
    other.state = run.state
    assert not torch.equal(other.plan(10, seed=9), kept)
    assert len(other.searched) == 1


def test_a_caller_that_starts_over_without_a_new_run_number(monkeypatch):
    run = Run(monkeypatch, METHOD)
    for index in (9, 10, 29, 30):
        run.plan(index)
    assert run.plan(0) is None
    run.searched.clear()
    q, k, _ = tensors(seed=77)
    assert torch.equal(run.plan(11, seed=77), brute_mask(q, k, TEXT, 16, 0.3))
    assert run.searched == [(11, 0, "fused")]


def test_a_forward_that_is_repeated_does_not_use_what_the_failed_one_found(monkeypatch):
    run = Run(monkeypatch, AdaSpa(density=0.3, block_size=16, search_steps=(9, 19, 29)))
    q, k, v = tensors(seed=5)
    for index in (9, 19):
        step = Step(index, 50)
        run.at = index, 0
        dit_accel.plan(q * torch.nan, k, v, run.method, layout=TEXT, step=step, state=run.state)
        dit_accel.plan(q, k, v, run.method, layout=TEXT, step=step, state=run.state)
    mask = run.plan(20)
    assert torch.equal(mask, brute_mask(q, k, TEXT, 16, 0.3))
    assert [kind for *_, kind in run.searched] == ["fused", "fused", "cached", "cached"]


@LAYOUTS
@pytest.mark.parametrize("steps", [(9, 29), (9,)])
def test_state_is_as_large_as_was_said(layout, steps):
    method, state = AdaSpa(density=0.3, block_size=16, search_steps=steps), State()
    q, k, v = tensors(layout, dtype=torch.float32)
    for branch in ("cond", "uncond"):
        for layer in range(3):
            attend(q, k, v, method, layout=layout, state=state, layer=layer, step=Step(9, 50, branch=branch))
    said = method.state_bytes(layout, layers=3, heads=6, batch=4)
    held = state.bytes()
    assert sum(held.values()) == said
    assert set(held.values()) == {said / 3}
    for branch in ("cond", "uncond"):
        attend(q, k, v, method, layout=layout, state=state, step=Step(29, 50, branch=branch))
    assert state.bytes()[1] == said / 3
    if len(steps) == 2:
        rows = method.state_bytes(layout, layers=1, heads=1) - AdaSpa(0.3, (9,), 16).state_bytes(
            layout, layers=1, heads=1
        )
        assert state.bytes()[0] == said / 3 - 24 * rows, "the LSE goes with the last search"


def test_state_of_a_720p_video():
    """HunyuanVideo, 129 frames at 720p, 60 layers, 24 heads: int16 lists of 30 % of 1857 blocks, and the LSE."""
    layout = Layout((33, 45, 80), text=256)
    rows = 118800 // 64
    expected = 60 * 24 * (rows * round(0.3 * rows) * 2 + rows * 64 * 4 + 4)
    assert AdaSpa().state_bytes(layout, layers=60, heads=24) == expected


@LAYOUTS
@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
def test_with_density(layout, density):
    method, reached = AdaSpa(block_size=8, head_adaptive=False).with_density(density, layout)
    plan = dit_accel.plan(*tensors(layout), method, layout=layout)
    assert reached == pytest.approx(density, abs=0.03)
    assert plan.density == pytest.approx(reached, abs=0.01)


def test_settings():
    method = AdaSpa(density=0.3, search_steps=[4, 0.5])
    assert method.search_steps == (4, 0.5)
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert method_spec.build(["adaspa:search_steps=9,29:density=0.1"]) == [AdaSpa(0.1, (9, 29))]
    assert AdaSpa.preset("hunyuan-video") == AdaSpa() == AdaSpaProcessor.preset("cogvideox").method
    assert AdaSpa.preset("scaling", block_size=128) == AdaSpa(0.1, (0, 0.6), 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density is the kept fraction"),
        ({"search_steps": ()}, "at least one"),
        ({"search_steps": (-1,)}, "int >= 0"),
        ({"search_steps": (1.5,)}, r"float in \[0, 1\)"),
        ({"search_steps": (True,)}, "int >= 0"),
        ({"block_size": 0}, "at least 1; got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        AdaSpa(**settings)
    with pytest.raises(UsageError, match="unknown AdaSpa preset 'wan'; choose one of hunyuan-video"):
        AdaSpa.preset("wan")


def test_a_run_that_ends_before_the_first_search_is_refused():
    with pytest.raises(UsageError, match="first search is at step 9 and the run has 8 steps"):
        attend(*tensors(), AdaSpa(search_steps=(9, 29)), layout=TEXT, step=Step(0, 8))


SMALL = {"density": 0.4, "block_size": 12, "backend": "gather"}


def searches_of(monkeypatch):
    seen, stock = [], adaspa.block_mass
    monkeypatch.setattr(adaspa, "block_mass", lambda *a, lse, **k: seen.append(lse is None) or stock(*a, lse=lse, **k))
    return seen


def test_a_pipeline(monkeypatch):
    """Steps 0 and 1 of 10 are dense, and both guidance branches search at steps 1 and 5."""
    pipe, searched = tiny_pipeline(), searches_of(monkeypatch)
    pipe.set_attn_processor(AdaSpaProcessor(**SMALL))
    (engine,) = engines(pipe)
    tiny_run(pipe, steps=10)
    layers, branches = len(engine.stats.layers), 2
    assert engine.stats.dense == {"method": 2 * layers * branches}
    assert (engine.stats.sparse, engine.stats.fallback) == (8 * layers * branches, 0)
    assert searched == [True] * (layers * branches) + [False] * (layers * branches)
    assert len(engine.state) == layers * branches
    assert engine.stats.density < 0.6


def test_a_cache_that_skips_search_steps(monkeypatch):
    """Attention is broadcast from every even step to the odd one: searches at 1 and 5 are made at 2 and 6."""
    pipe, searched = tiny_pipeline(), searches_of(monkeypatch)
    pipe.set_attn_processor(AdaSpaProcessor(search_steps=(1, 5), **SMALL))
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    (engine,) = engines(pipe)
    called, attend_ = [], engine.attend
    engine.attend = lambda layer, call: called.append(engine.forward.step.index) or attend_(layer, call)
    first = tiny_run(pipe, steps=8, guidance_scale=1.0)
    layers = len(engine.stats.layers)
    assert called == [i for i in (0, 2, 4, 6) for _ in range(layers)]
    assert (engine.stats.dense, engine.stats.sparse) == ({"method": layers}, 3 * layers)
    assert searched == [True] * layers + [False] * layers
    assert torch.equal(tiny_run(pipe, steps=8, guidance_scale=1.0), first)


def test_two_denoisers(monkeypatch):
    """The second one starts after the dense steps: it searches at its first step and runs sparse."""
    pipe, searched = tiny_pipeline(two_transformers=True), searches_of(monkeypatch)
    pipe.set_attn_processor(AdaSpaProcessor(search_steps=(1, 4), **SMALL))
    tiny_run(pipe, steps=6, guidance_scale=1.0)
    high, low = (engine.stats for engine in engines(pipe))
    layers = len(high.layers)
    assert high.dense == {"method": 2 * layers}
    assert (low.dense, low.sparse) == ({}, low.forwards * layers)
    assert 0 < low.forwards < 5
    assert searched == [True] * (2 * layers) + [False] * layers
    again = tiny_run(pipe, steps=6, guidance_scale=1.0)
    assert torch.equal(again, tiny_run(pipe, steps=6, guidance_scale=1.0))


def test_a_schedule_over_the_first_search_and_masks_and_batches(monkeypatch):
    """Samples of other text lengths in a batch; the schedule's dense steps hide the search, the next call makes it."""
    model, call, _ = tiny_transformer("hunyuan-video")
    searched = searches_of(monkeypatch)
    model.set_attn_processor(AdaSpaProcessor(search_steps=(1,), schedule=Schedule(first=3, layers={3}), **SMALL))
    (engine,) = engines(model)
    with torch.no_grad():
        for timestep in (900, 700, 500, 300, 100):
            model(**{**call, "timestep": torch.full((2,), timestep)})
    assert engine.stats.dense == {"schedule": 3 * 4 + 2}
    assert (engine.stats.sparse, searched) == (2 * 3, [True] * 3)
    assert engine.state.bytes().keys() == {0, 1, 2}


def test_an_unknown_number_of_steps_is_told():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(AdaSpaProcessor(**SMALL))
    with torch.no_grad():
        model(**call)
    (engine,) = engines(model)
    assert "fractions of the schedule and of the method count as zero" in engine.stats.warnings[0]
    assert engine.stats.dense == {"method": 3}
