"""Every transformer class with a row, run for real: exact, masked as asked, restored, and its tokens where we say."""

import sys

import pytest
import torch
from tiny_families import CASES, tiny
from torch.nn import functional

from dit_accel import AllBlocksProcessor, RandomBlocksProcessor, Schedule
from dit_accel.diffusers import engines, family_of, known_families, reset_attn_processor, set_attn_processor
from dit_accel.layout import Layout

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


@pytest.fixture(scope="module", params=CASES)
def ran(request):
    """(case, stock output); stock against stock differs by nothing."""
    case = tiny(request.param)
    with torch.no_grad():
        stock = case.out(case.model(**case.call))
        assert torch.equal(stock, case.out(case.model(**case.call)))
    yield case, stock
    reset_attn_processor(case.model)


def processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@torch.no_grad()
def test_all_blocks_equal_stock_and_stock_comes_back(ran):
    case, stock = ran
    before = processors(case.model)
    set_attn_processor(case.model, AllBlocksProcessor(**SPARSE))
    (engine,) = engines(case.model)
    changed = [name for name, processor in processors(case.model).items() if processor is not before[name]]
    assert (case.out(case.model(**case.call)) - stock).abs().max() < 1e-5
    layers = engine.stats.layers
    assert [layer.sparse for layer in layers] == [case.calls] * len(layers)
    assert (engine.stats.dense, engine.stats.warnings) == ({}, [])
    hiding = [live for *_, live in engine.forward.masks if live is not None]
    assert not hiding or engine.family.masks_text
    assert {live.turn for live in hiding} <= {case.turn}
    assert {layer.name: layer.layout for layer in layers} == {
        layer.name: case.layouts.get(layer.name, case.layout) for layer in layers
    }
    assert engine.forward.step.index == 0
    argument = engine.family.timestep
    case.model(**{**case.call, argument: case.call[argument] * 0.5})
    assert engine.forward.step.index == 1
    assert sorted(changed) == sorted(layer.name for layer in layers)
    reset_attn_processor(case.model)
    assert all(processor is before[name] for name, processor in processors(case.model).items())
    assert torch.equal(case.out(case.model(**case.call)), stock)
    assert not case.model._forward_pre_hooks
    assert not case.model._forward_hooks


@torch.no_grad()
def test_random_blocks_equal_an_independent_masked_computation(ran, monkeypatch):
    case, stock = ran
    set_attn_processor(case.model, RandomBlocksProcessor(seed=5, density=0.4, **SPARSE))
    out = case.out(case.model(**case.call))
    sparse, layers = engines(case.model)[0].stats.sparse, engines(case.model)[0].stats.layers
    reset_attn_processor(case.model)
    masks = {layout.tokens: random_mask(layout, case.turn) for layout in (case.layout, *case.layouts.values())}
    calls = watch(monkeypatch, case.model, lambda tokens: masks.get(tokens))
    expected = case.out(case.model(**case.call))
    assert len([1 for call in calls if call.shape[1] in masks]) == sparse == case.calls * len(layers)
    assert (out - expected).abs().max() < 1e-5
    assert (out - stock).abs().max() > 1e-4, "the mask must matter"


@torch.no_grad()
def test_layers_are_numbered_as_they_run(ran):
    case, _ = ran
    sites, order = family_of(case.model).find_sites(case.model), []
    hooks = [site.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, site in sites]
    case.model(**case.call)
    for hook in hooks:
        hook.remove()
    assert order == [name for name, _ in sites]


def random_mask(layout, turn):
    """bool (N, N), from the published rule of RandomBlocks: seeded noise per block pair, text always seen and dense.

    ``turn``: the blocks are counted from that token on, and the tokens before it come last.
    """
    main = slice(layout.main.start - turn, layout.main.stop - turn)
    n, size = layout.tokens, SPARSE["block_size"]
    count = -(-n // size)
    noise = torch.rand((count, count), generator=torch.Generator().manual_seed(5))
    blocks = noise < 0.4
    blocks[torch.arange(count), noise.argmin(-1)] = True
    for i in range(count):
        if i * size < main.start or min((i + 1) * size, n) > main.stop:
            blocks[i, :] = blocks[:, i] = True
    block = torch.arange(n) // size
    return blocks[block][:, block].roll((turn, turn), (0, 1))


def watch(monkeypatch, model, mask_of=lambda tokens: None):
    """Stock processors, with ``mask_of(tokens)`` in every self-attention. Returns the queries (B, N, H, D) of all."""
    queries, sdpa = [], functional.scaled_dot_product_attention

    def run(query, key, value, attn_mask=None, scale=None, **_):
        tokens, own = query.shape[2], None
        if tokens == key.shape[2]:
            queries.append(query.transpose(1, 2))
            own = mask_of(tokens)
        if own is not None and attn_mask is not None:
            own = own & (attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0)
        return sdpa(query, key, value, attn_mask=attn_mask if own is None else own, scale=scale)

    def dispatched(query, key, value, **rest):
        return run(*(x.transpose(1, 2) for x in (query, key, value)), **rest).transpose(1, 2)

    for processor in processors(model).values():
        module = sys.modules[type(processor).__module__]
        if hasattr(module, "dispatch_attention_fn"):
            monkeypatch.setattr(module, "dispatch_attention_fn", dispatched)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", run)
    return queries


@torch.no_grad()
def test_the_layout_is_where_the_tokens_are(ran, monkeypatch):
    """A latent changed at (t, h, w) moves that token of the first site and no other; a changed word moves text only."""
    case, _ = ran
    calls = watch(monkeypatch, case.model)
    case.model(**case.call)
    stock = first(calls, case)
    grid = case.layout.grid
    place = (grid[0] - 1, 1, 3)
    case.model(**{**case.call, case.latents: poked(case.call[case.latents], case.axes, grid, place)})
    token = case.layout.main.start + (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    assert moved(stock, first(calls, case)) == {token}
    if not family_of(case.model).joint or not case.words:
        return
    words = case.call[case.words]
    louder = [words[0].clone(), *words[1:]] if isinstance(words, list) else words.clone()
    louder[0][1] += 1
    case.model(**{**case.call, case.words: louder})
    text = moved(stock, first(calls, case))
    assert text
    assert text <= text_tokens(case.layout)


def first(calls, case):
    """The first query over the whole sequence; empties the list."""
    found = next(call for call in calls if call.shape[1] == case.layout.tokens)
    calls.clear()
    return found


def poked(latents, axes, grid, place):
    if axes.startswith("["):
        return [poked(latents[0], axes[1:], grid, place), *latents[1:]]
    latents, index = latents.clone(), [0] * len(axes)
    if "n" in axes:
        index[axes.index("n")] = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    for axis, size, at in zip("thw", grid, place, strict=True):
        if axis in axes:
            index[axes.index(axis)] = at * (latents.shape[axes.index(axis)] // size)
    latents[tuple(index)] += 1
    return latents


def moved(before, after):
    return set((before - after).abs().amax((2, 3))[0].gt(1e-6).nonzero().flatten().tolist())


def text_tokens(layout: Layout):
    tokens, start = set(), 0
    for segment in layout.segments:
        if segment.kind == "text":
            tokens |= set(range(start, start + segment.tokens))
        start += segment.tokens
    return tokens


def test_every_class_with_a_row_is_run_here():
    rows = {model for family in known_families() for model in family.models}
    assert rows == {type(tiny(name).model).__name__ for name in CASES}
