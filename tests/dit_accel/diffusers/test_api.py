"""Set, reset, replace, describe; what copies of an accelerated model are."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from diffusers import ModularPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_accel
from dit_accel import AllBlocks, AllBlocksProcessor, RandomBlocksProcessor, Schedule, UnsupportedError, UsageError
from dit_accel.diffusers import describe, engines, install
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


@pytest.fixture(scope="module")
def stock():
    return tiny_run(tiny_pipeline())


def test_a_pipeline_set_and_reset(stock):
    pipe = tiny_pipeline()
    assert torch.equal(tiny_run(pipe), stock), "the noise floor of a rebuilt pipeline is zero"
    before = dict(pipe.transformer.attn_processors)
    pipe.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    sparse = tiny_run(pipe)
    assert (sparse - stock).abs().max() > 1e-4
    assert engines(pipe)[0].stats.sparse == 24
    pipe.reset_attn_processor()
    assert engines(pipe) == []
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(tiny_run(pipe), stock)


def test_both_transformers_of_a_pipeline():
    pipe = tiny_pipeline(two_transformers=True)
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert [engine.model for engine in engines(pipe)] == [pipe.transformer, pipe.transformer_2]
    pipe.reset_attn_processor()
    assert engines(pipe) == []


def test_one_transformer_under_two_names_is_one():
    pipe = tiny_pipeline(two_transformers=True)
    pipe.transformer_2 = pipe.transformer
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert len(describe(pipe).to_dict()["models"]) == 1


def test_the_second_call_replaces_the_first(stock):
    pipe = tiny_pipeline()
    before = dict(pipe.transformer.attn_processors)
    pipe.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    pipe.transformer.set_attn_processor(AllBlocksProcessor(**SPARSE))
    (engine,) = engines(pipe)
    assert engine.processor.method.name == "all-blocks"
    assert (tiny_run(pipe) - stock).abs().max() < 1e-4
    assert len(pipe.transformer._forward_pre_hooks) == 1
    pipe.reset_attn_processor()
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())


def test_two_pipelines_keep_their_own_settings():
    first, second = tiny_pipeline(), tiny_pipeline()
    alone = []
    for pipe, seed in ((first, 1), (second, 2)):
        pipe.set_attn_processor(RandomBlocksProcessor(seed=seed, density=0.2, **SPARSE))
        alone.append(tiny_run(pipe, num_frames=9 if seed == 1 else 13))
    assert torch.equal(tiny_run(first, num_frames=9), alone[0])
    assert torch.equal(tiny_run(second, num_frames=13), alone[1])
    first.reset_attn_processor()
    assert torch.equal(tiny_run(second, num_frames=13), alone[1])


@pytest.mark.parametrize("how", ["default", "stock", "dict"])
def test_a_stock_processor_removes_every_trace(how, stock):
    pipe = tiny_pipeline()
    model = pipe.transformer
    before = dict(model.attn_processors)
    pipe.set_attn_processor(RandomBlocksProcessor(**SPARSE))
    model.set_attn_processor({"default": "default", "stock": WanAttnProcessor(), "dict": dict(before)}[how])
    assert engines(pipe) == []
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert {type(processor) for processor in model.attn_processors.values()} == {WanAttnProcessor}
    assert torch.equal(tiny_run(pipe), stock)


def test_processors_read_while_accelerated_and_set_again_stay(stock):
    """As upstream's perturbed-attention guidance does around every call of its pipelines."""
    pipe = tiny_pipeline()
    model = pipe.transformer
    before = dict(model.attn_processors)
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    (engine,) = engines(pipe)
    read = model.attn_processors
    model.blocks[1].attn1.processor = before["blocks.1.attn1.processor"]
    model.set_attn_processor(read)
    assert engines(pipe) == [engine]
    assert (tiny_run(pipe) - stock).abs().max() < 1e-5
    assert all(layer.sparse for layer in engine.stats.layers)
    pipe.reset_attn_processor()
    assert all(model.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("when", ["some", "reset", "replaced"])
def test_processors_of_an_engine_that_is_gone_or_some_of_them_are_stock(stock, when):
    pipe = tiny_pipeline()
    model = pipe.transformer
    before = dict(model.attn_processors)
    pipe.set_attn_processor(RandomBlocksProcessor(**SPARSE))
    read = dict(model.attn_processors)
    if when == "some":
        read["blocks.1.attn1.processor"] = before["blocks.1.attn1.processor"]
    elif when == "reset":
        pipe.reset_attn_processor()
    else:
        pipe.set_attn_processor(RandomBlocksProcessor(**SPARSE))
    model.set_attn_processor(read)
    assert engines(pipe) == []
    assert torch.equal(tiny_run(pipe), stock)
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    pipe.reset_attn_processor()
    assert all(model.attn_processors[name] is processor for name, processor in before.items())


def test_a_pipeline_passes_stock_processors_on():
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    mine = WanAttnProcessor()
    pipe.set_attn_processor(mine)
    assert set(pipe.transformer.attn_processors.values()) == {mine}


def test_a_bare_call_names_the_right_one():
    model, call, _ = tiny_transformer("wan")
    model.blocks[0].attn1.set_processor(AllBlocksProcessor())
    with pytest.raises(TypeError, match=r"pipe\.set_attn_processor"):
        model(**call)


NO_PROCESSOR = {
    "a method's name": (
        "radial",
        r"given 'radial', which is no processor. Use set_attn_processor\(RadialProcessor\(\)\)",
    ),
    "another word": ("fast", "given 'fast', .*Processors: RadialProcessor, .*'default' puts the stock ones back"),
    "a method": (AllBlocks(), r"Use set_attn_processor\(Processor\(AllBlocks\(...\)\)\)"),
    "a method's class": (AllBlocks, r"the class AllBlocks, .*set_attn_processor\(AllBlocksProcessor\(\)\)"),
    "one of our classes": (AllBlocksProcessor, r"forget the brackets\? AllBlocksProcessor\(\)"),
    "a stock class": (WanAttnProcessor, r"forget the brackets\? WanAttnProcessor\(\)"),
    "None": (None, "given None"),
    "a number": (3, "given 3"),
    "a schedule": (Schedule(), "given Schedule"),
    "a dict of too few": (
        {},
        r"has 0 names and WanTransformer3DModel has 6 attention layers; they differ in blocks\.0",
    ),
}


@pytest.mark.parametrize("how", ["pipeline", "transformer", "dict"])
@pytest.mark.parametrize(("given", "message"), NO_PROCESSOR.values(), ids=NO_PROCESSOR)
def test_what_is_no_processor_changes_nothing(given, message, how):
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    before, (engine,) = dict(pipe.transformer.attn_processors), engines(pipe)
    if how == "dict" and given != {}:
        names = list(before)
        given = dict.fromkeys(names, WanAttnProcessor()) | {names[3]: given}
        message = rf"{names[3]} is given "
    with pytest.raises(UsageError, match=message):
        (pipe.transformer if how == "transformer" else pipe).set_attn_processor(given)
    assert pipe.transformer.attn_processors == before
    assert engines(pipe) == [engine]


def test_ours_in_a_dict_is_told_apart():
    pipe = tiny_pipeline()
    ours = dict.fromkeys(pipe.transformer.attn_processors, AllBlocksProcessor())
    with pytest.raises(UsageError, match=r"holds the settings of a whole model. Set it alone"):
        pipe.transformer.set_attn_processor(ours)


def test_a_dict_of_processors_is_left_as_it_was():
    pipe = tiny_pipeline()
    given = dict(pipe.transformer.attn_processors)
    pipe.set_attn_processor(given)
    assert list(given) == list(pipe.transformer.attn_processors)


@pytest.mark.parametrize("put_back", ["default", "reset"])
@pytest.mark.parametrize("foreign", ["radial", None, 3, WanAttnProcessor, AllBlocksProcessor()])
def test_default_repairs_what_was_put_there_past_us(foreign, put_back, stock):
    pipe = tiny_pipeline()
    model = pipe.transformer
    kept = model.blocks[1].attn2.processor
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    for module in (model.blocks[0].attn1, model.blocks[2].attn2):
        module.set_processor(foreign)
    if put_back == "default":
        pipe.set_attn_processor("default")
    else:
        pipe.reset_attn_processor()
    assert {type(processor) for processor in model.attn_processors.values()} == {WanAttnProcessor}
    assert model.blocks[1].attn2.processor is kept
    assert torch.equal(tiny_run(pipe), stock)
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert engines(pipe)


def test_what_cannot_be_repaired_is_said(monkeypatch):
    pipe = tiny_pipeline()
    pipe.transformer.blocks[0].attn1.set_processor("radial")
    monkeypatch.setattr(WanTransformer3DModel, "from_config", lambda config: 1 / 0)
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn1 of WanTransformer3DModel holds 'radial', .*load the"):
        pipe.set_attn_processor("default")


def test_targets_that_cannot_be_accelerated():
    with pytest.raises(UsageError, match="expected a diffusers pipeline or a transformer; got int"):
        dit_accel.set_attn_processor(3, AllBlocksProcessor())
    pipe = tiny_pipeline()
    with pytest.raises(UnsupportedError, match="AutoencoderKLWan is not a known transformer"):
        pipe.vae.set_attn_processor(AllBlocksProcessor())
    with pytest.raises(UnsupportedError, match="no set_attn_processor"):
        pipe.vae.set_attn_processor(WanAttnProcessor())


def test_a_failed_call_changes_nothing():
    pipe = tiny_pipeline(two_transformers=True)
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    running = engines(pipe)
    pipe.transformer_2.__class__ = type("Unknown", (torch.nn.Module,), {})
    with pytest.raises(UnsupportedError, match="Unknown is not a known transformer"):
        pipe.set_attn_processor(RandomBlocksProcessor(**SPARSE))
    assert engines(pipe)[0] is running[0]


def test_modular_pipelines_have_the_methods_too():
    assert ModularPipeline.set_attn_processor is dit_accel.set_attn_processor
    assert ModularPipeline.reset_attn_processor is dit_accel.reset_attn_processor


def test_install_is_idempotent():
    method = WanTransformer3DModel.set_attn_processor
    context = WanTransformer3DModel.cache_context
    install()
    assert WanTransformer3DModel.set_attn_processor is method
    assert WanTransformer3DModel.cache_context is context


def test_describe_tells_layer_by_layer():
    pipe = tiny_pipeline()
    assert str(describe(pipe)) == "stock attention: no processor of dit_accel is set"
    pipe.set_attn_processor(RandomBlocksProcessor(backend="gather", block_size=16, schedule=Schedule(layers=1)))
    assert describe(pipe).to_dict()["models"][0]["layers"][0]["last"] is None
    tiny_run(pipe)
    text, (model,) = str(describe(pipe)), describe(pipe).to_dict()["models"]
    assert json.loads(json.dumps(model)) == model
    first, second = model["layers"][:2]
    assert (first["name"], first["kind"], first["sparse"], first["dense"], first["last"]) == (
        "blocks.0.attn1", "self", 0, {"schedule": 8}, "schedule",
    )  # fmt: skip
    assert (second["method"], second["tier"], second["tier_reason"], second["last"]) == (
        "random-blocks", "gather", "asked for", "sparse",
    )  # fmt: skip
    assert (second["sparse"], second["dense"], second["fallback"]) == (6, {"schedule": 2}, 0)
    assert 0 < second["density"] < 1
    head = "WanTransformer3DModel (family wan): random-blocks"
    for part in (head, "layout main 3x2x3", "blocks.1.attn1", "tier gather: asked for"):
        assert part in text


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_come_back_stock(duplicate):
    model, call, _ = tiny_transformer("wan")
    expected = model(**call).sample
    model.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    sparse = model(**call).sample
    twin = duplicate(model)
    assert engines(twin) == []
    assert {type(processor) for processor in twin.attn_processors.values()} == {WanAttnProcessor}
    assert torch.equal(twin(**call).sample, expected)
    assert torch.equal(model(**call).sample, sparse), "the original keeps running"
    twin.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    assert torch.equal(twin(**call).sample, sparse)


@torch.no_grad()
def test_a_saved_model_loads_stock(tmp_path):
    model, call, _ = tiny_transformer("wan")
    expected = model(**call).sample
    model.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert engines(loaded) == []
    assert torch.allclose(loaded(**call).sample, expected, atol=1e-5)


def test_an_engine_dies_with_its_model():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    with torch.no_grad():
        model(**call)
    engine = weakref.ref(engines(model)[0])
    del model
    gc.collect()
    assert engine() is None
