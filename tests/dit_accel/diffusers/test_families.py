"""Every family: exact through the sparse kernel, exactly the mask that the method asks for, stock again afterwards."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import AllBlocksProcessor, Layout, RadialProcessor, RandomBlocksProcessor, Schedule, UnsupportedError
from dit_accel.diffusers import Family, engines, family_of, known_families, register_family
from tiny_models import FAMILIES, tiny_transformer

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    model, call, layout = tiny_transformer(request.param)
    with torch.no_grad():
        stock = model(**call).sample
        assert torch.equal(stock, model(**call).sample), "the noise floor of stock against stock is zero"
    yield model, call, layout, stock
    model.reset_attn_processor()


@torch.no_grad()
def test_all_blocks_equal_stock_and_stock_comes_back(tiny):
    model, call, layout, stock = tiny
    before = dict(model.attn_processors)
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    (engine,) = engines(model)
    out = model(**call).sample
    assert (out - stock).abs().max() < 1e-5
    assert [entry.sparse for entry in engine.stats.layers] == [1] * len(engine.stats.layers)
    assert not engine.stats.dense
    assert engine.forward.layout == layout
    changed = {name for name, processor in model.attn_processors.items() if processor is not before[name]}
    assert changed == {f"{entry.name}.processor" for entry in engine.stats.layers}
    model.reset_attn_processor()
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(model(**call).sample, stock)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@torch.no_grad()
def test_random_blocks_equal_an_independent_masked_computation(tiny, monkeypatch):
    model, call, layout, stock = tiny
    model.set_attn_processor(RandomBlocksProcessor(seed=5, density=0.4, **SPARSE))
    out = model(**call).sample
    (engine,) = engines(model)
    model.reset_attn_processor()
    mask = random_mask(layout, seed=5, density=0.4, size=16)
    calls = mask_primitive(monkeypatch, model, mask)
    expected = model(**call).sample
    assert len(calls) == len(engine.stats.layers) == engine.stats.sparse
    assert (out - expected).abs().max() < 1e-5
    assert (out - stock).abs().max() > 1e-3, "the mask must matter"
    assert engine.stats.effective_density == pytest.approx(mask.float().mean().item(), abs=1e-6)


def random_mask(layout, *, seed, density, size):
    """bool (N, N), from the published rule of RandomBlocks: seeded noise per block pair, text always seen and dense."""
    n = layout.tokens
    count = -(-n // size)
    noise = torch.rand((count, count), generator=torch.Generator().manual_seed(seed))
    blocks = noise < density
    for row in range(count):
        blocks[row, int(noise[row].argmin())] = True
    main = layout.main
    for i in range(count):
        if i * size < main.start or min((i + 1) * size, n) > main.stop:
            blocks[i, :] = blocks[:, i] = True
    return torch.stack([torch.stack([blocks[q // size, k // size] for k in range(n)]) for q in range(n)])


def mask_primitive(monkeypatch, model, mask):
    """Stock processors, with ``mask`` in every attention over the whole sequence. Returns the list of such calls."""
    calls = []

    def masked(query, key, value, attn_mask, heads):
        tokens = 1 if heads == 2 else 2
        if not query.shape[tokens] == key.shape[tokens] == mask.shape[0]:
            visible = attn_mask
        else:
            calls.append(1)
            visible = mask if attn_mask is None else mask & attn_mask
        q, k, v = (x.transpose(1, 2) if heads == 2 else x for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return out.transpose(1, 2) if heads == 2 else out

    def dispatched(query, key, value, attn_mask=None, **_):
        return masked(query, key, value, attn_mask, heads=2)

    def raw(query, key, value, attn_mask=None, **_):
        return masked(query, key, value, attn_mask, heads=1)

    module = sys.modules[type(model).__module__]
    if hasattr(module, "dispatch_attention_fn"):
        monkeypatch.setattr(module, "dispatch_attention_fn", dispatched)
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", raw)
    return calls


@torch.no_grad()
def test_a_second_resolution_gets_its_own_layout():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    model(**call)
    model(**{**call, "hidden_states": torch.randn(2, 4, 2, 6, 10)})
    assert engines(model)[0].forward.layout == Layout(grid=(2, 3, 5))
    assert not engines(model)[0].stats.fallback


def test_flux_reads_references_from_the_ids():
    family = family_of(tiny_transformer("flux")[0])
    main, reference = ids(4, 6, image=0), ids(3, 5, image=1)
    layout = family.layout(None, torch.cat([main, reference]), torch.zeros(7, 3))
    assert str(layout) == "text 7 + main 1x4x6 + reference 1x3x5"


def test_qwen_reads_references_from_the_shapes():
    family = family_of(tiny_transformer("qwen-image")[0])
    layout = family.layout(None, [[(1, 4, 6), (1, 3, 5)]], torch.zeros(1, 7, 8))
    assert str(layout) == "text 7 + main 1x4x6 + reference 1x3x5"


def ids(height, width, *, image):
    grid = torch.zeros(height, width, 3)
    grid[..., 0] = image
    grid[..., 1] += torch.arange(height)[:, None]
    grid[..., 2] += torch.arange(width)
    return grid.reshape(-1, 3)


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_radial_on_an_image_model_is_refused_when_it_is_set(family):
    model, _, _ = tiny_transformer(family)
    before = dict(model.attn_processors)
    with pytest.raises(UnsupportedError, match="GNA"):
        model.set_attn_processor(RadialProcessor())
    assert all(model.attn_processors[name] is processor for name, processor in before.items())


@torch.no_grad()
def test_radial_on_a_single_frame_is_refused_before_any_attention():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(RadialProcessor())
    with pytest.raises(UnsupportedError, match="GNA"):
        model(**{**call, "hidden_states": torch.randn(2, 4, 1, 8, 8)})
    assert not engines(model)[0].stats.dense


def test_a_registered_row_is_found_and_classes_are_not_taken_over():
    names = [family.name for family in known_families()]
    assert set(FAMILIES) <= set(names)
    row = Family("mine", ("WanTransformer3DModel",), r"x", (), lambda config: None)
    with pytest.raises(ValueError, match="belongs to family 'wan'"):
        register_family(row)


def test_a_subclass_is_its_parent_s_family():
    model, _, _ = tiny_transformer("wan")
    model.__class__ = type("MyWan", (type(model),), {})
    assert family_of(model).name == "wan"
