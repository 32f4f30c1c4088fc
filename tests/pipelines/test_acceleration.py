from types import SimpleNamespace

import pytest
import torch
from paro_plans import plan_file

from dit_accel.diffusers import known_families
from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.layout import Layout
from dit_accel.methods import Paro, Radial, RandomBlocks
from dit_accel.pipelines.acceleration import Acceleration, check_backend, choose
from dit_accel.quant import Quant
from dit_accel.schedule import Schedule

VIDEO = Layout(grid=(21, 30, 52))


def decide(
    layout=VIDEO, frames=81, steps=50, model="WanTransformer3DModel", is_video=True, defaults=None, layers=30, **accel
):
    family = next((f for f in known_families() if model in f.models), None)
    info = SimpleNamespace(is_video=is_video, defaults=defaults or {}, family=family, transformer_class=model,
                           transformer={"num_layers": layers, "num_attention_heads": 12}, name="here")  # fmt: skip
    return choose(Acceleration(**accel), info, layout=layout, frames=frames, steps=steps)


def test_video_gets_radial_with_its_published_defaults():
    choice = decide()
    assert choice.processor.method == Radial()
    assert choice.notes == ()
    assert len(choice.processor.schedule.dense_steps(50)) == 13


def test_a_method_brings_its_own_schedule():
    choice = decide(method="adaspa", dense_layers=2)
    assert choice.processor.schedule == Schedule(first=0, layers=2)
    assert choice.processor.dense_steps(50) == list(range(10))
    assert decide(method="adaspa", dense_steps=0.5).processor.dense_steps(50) == list(range(25))
    assert "all 2 steps run dense" in decide(method="adaspa", parameters={"search_steps": (1,)}, steps=2).notes[0]


def test_the_density_is_that_of_the_plan():
    choice = decide(layout=Layout(grid=(9, 6, 10)), parameters={"block_size": 32})
    mask = choice.processor.method.plan(None, None, None, _call(Layout(grid=(9, 6, 10)))).token_mask()
    assert choice.density == pytest.approx(mask.double().mean().item())


def _call(layout):
    from dit_accel.methods import Call

    return Call(layout)


@pytest.mark.parametrize(("is_video", "words"), [(True, "a single frame"), (False, "an image model")])
def test_images_are_dense_until_a_method_serves_them_and_it_is_said(is_video, words):
    choice = decide(layout=Layout(grid=(1, 30, 52)), frames=1, is_video=is_video)
    assert choice.processor is None
    assert words in choice.notes[0]
    assert choice.name == "dense"


def test_radial_on_an_image_is_refused_and_names_others():
    with pytest.raises(UnsupportedError, match=r"needs more than one.*GNA"):
        decide(layout=Layout(grid=(1, 30, 52)), frames=1, is_video=False, method="radial")
    with pytest.raises(UnsupportedError, match="needs more than one"):
        decide(layout=None, frames=1, is_video=False, method="radial")


def test_dense_by_name():
    assert decide(method="dense").processor is None
    assert decide(method="Dense").notes == ()


@pytest.mark.parametrize("accel", [{"density": 0.5}, {"dense_steps": 2}, {"dense_layers": 1}, {"parameters": {"a": 1}}])
def test_settings_of_a_method_without_a_method(accel):
    with pytest.raises(UsageError, match="--method dense has none"):
        decide(method="dense", **accel)
    with pytest.raises(UsageError, match="there is none by default: a single frame has no default method"):
        decide(frames=1, layout=Layout(grid=(1, 4, 4)), **accel)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_density_outside_its_range(density):
    with pytest.raises(UsageError, match=r"--density .* lies in \(0, 1\]"):
        decide(density=density)


def test_a_density_within_reach_is_solved_for():
    choice = decide(density=0.5)
    assert choice.density == pytest.approx(0.5, rel=0.2)
    assert choice.notes == ()
    assert choice.processor.method != Radial()


def test_a_density_out_of_reach_is_told():
    choice = decide(layout=Layout(grid=(3, 30, 52)), density=0.05)
    assert "density 0.05 is out of reach of radial" in choice.notes[0]
    assert f"{choice.density:.3f}" in choice.notes[0]


def test_density_without_a_known_grid():
    with pytest.raises(UnsupportedError, match="--density needs the token grid"):
        decide(layout=None, density=0.3)


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(UsageError, match="unknown method 'radail'; did you mean 'radial'"):
        decide(method="radail")


def test_parameters_reach_the_method_and_unknown_ones_are_refused():
    assert decide(method="random-blocks", parameters={"seed": 3}).processor.method == RandomBlocks(seed=3)
    with pytest.raises(UsageError, match="no parameter blok; allowed: decay, block_size"):
        decide(parameters={"blok": 3})
    with pytest.raises(UsageError, match="must be positive"):
        decide(parameters={"decay": -1})


def test_a_models_own_tuning_gives_way_to_the_users():
    own = {"methods": {"radial": {"block_size": 64}}}
    assert decide(defaults=own).processor.method == Radial(block_size=64)
    assert decide(defaults=own, parameters={"block_size": 32}).processor.method == Radial(block_size=32)


def test_a_models_own_plan_is_its_default_where_it_fits(tmp_path):
    grid = (3, 4, 5)
    path, _ = plan_file(tmp_path / "paro.safetensors", Layout(grid=grid))
    own = {"method": "paro", "methods": {"paro": {"plan_file": str(path)}}}
    choice = decide(layout=Layout(grid=grid), defaults=own)
    assert choice.processor.method == Paro(str(path))
    assert choice.processor.dense_steps(50) == []
    assert decide(layout=Layout(grid=(4, 4, 5)), defaults=own).name == "radial"
    assert decide(layout=Layout(grid=grid), defaults=own, density=0.3).name == "radial"
    assert decide(layout=Layout(grid=grid), defaults=own, method="gna").name == "gna"


def test_dense_steps_and_layers():
    schedule = decide(dense_steps=3, dense_layers=frozenset({0, 5})).processor.schedule
    assert schedule.dense_steps(50) == [0, 1, 2]
    assert schedule.layers == {0, 5}
    with pytest.raises(UsageError, match="--dense-steps 51 is more than the 50 steps"):
        decide(dense_steps=51)


@pytest.mark.parametrize("given", [31, frozenset({2, 30})])
def test_layers_that_the_model_does_not_have(given):
    with pytest.raises(UsageError, match=r"beyond the 30 layers of here; .* indices of 0 to 29"):
        decide(dense_layers=given)
    assert decide(dense_layers=30).processor.schedule.layers == 30
    assert decide(dense_layers=given, layers=None).processor.schedule.layers == given


def test_a_parameter_of_another_kind():
    with pytest.raises(UsageError, match="decay is a factor of the band and must be positive; got 'abc'"):
        decide(method="radial", parameters={"decay": "abc"})


def test_a_schedule_that_leaves_nothing_sparse_is_told():
    assert "all 4 steps run dense" in decide(steps=4, dense_steps=4).notes[0]


def test_a_transformer_that_no_family_knows_is_dense_by_default_and_it_is_said():
    choice = decide(model="NoSuchTransformer")
    assert choice.processor is None
    assert "no family row knows NoSuchTransformer" in choice.notes[0]
    assert decide(model="NoSuchTransformer", method="dense").notes == ()
    with pytest.raises(UnsupportedError, match=r"radial cannot run on NoSuchTransformer.*--method dense.*Known: .*Wan"):
        decide(model="NoSuchTransformer", method="radial")


def test_a_tier_that_cannot_run_is_refused_early(monkeypatch):
    from dit_accel.kernels.block_sparse import flex

    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="--backend triton"):
        check_backend("triton", cpu, torch.float32)
    monkeypatch.setattr(flex, "unavailable", lambda device: "no C++ compiler")
    with pytest.raises(UnsupportedError, match=r"--backend flex cannot run here: no C\+\+ compiler; use --backend"):
        check_backend("flex", cpu, torch.float32)
    for backend in ("auto", "gather", "reference"):
        check_backend(backend, cpu, torch.float32)


def test_quantised_products_with_a_method_and_without():
    choice = decide(method="radial", quant="sage2")
    assert choice.processor.method == Radial()
    assert choice.processor.quant == Quant.sage2()
    assert choice.name == "radial-sage2"
    choice = decide(method="dense", quant="sage1", dense_steps=2)
    assert (choice.name, choice.density, choice.processor.method) == ("dense-sage1", 1.0, None)
    assert choice.processor.dense_steps(50) == [0, 1]
    assert decide(method="dense", quant="auto").processor.dense_steps(50) == []
    choice = decide(layout=Layout(grid=(1, 30, 52)), frames=1, quant="sage2pp")
    assert choice.name == "dense-sage2pp"
    assert "a single frame" in choice.notes[0]


def test_a_quant_that_is_none():
    with pytest.raises(UsageError, match="unknown; did you mean 'sage2'"):
        decide(quant="sage22")
    with pytest.raises(UsageError, match="--density sets a sparse method"):
        decide(method="dense", quant="sage2", density=0.5)


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
@pytest.mark.parametrize("method", ["radial", "dense"])
def test_a_precision_file_that_cannot_be_read_is_refused_before_any_work(content, method, tmp_path):
    path = tmp_path / "precision.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"no precision file"):
        decide(method=method, quant=str(path))
