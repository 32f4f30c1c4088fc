"""The plan of a run from configuration files alone."""

import pytest
from paro_plans import plan_file

from dit_accel import Layout, Radial, plan
from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.eval.devices import CLASSES
from dit_accel.eval.planner import Question, answer
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.model import inspect_model

WAN = ("WanPipeline", {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "z_dim": 16}, {"patch_size": [1, 2, 2]})


@pytest.fixture
def wan(configs_only):
    """Wan 2.1 14B: the class's own defaults."""
    return str(configs_only("wan", *WAN))


def radial(**own):
    return Acceleration("radial", **own)


def test_published_operations_and_the_bound(wan):
    found = answer(Question(wan, (1280, 720), 81, 50, accel=radial(dense_steps=0.3)))
    work, density = found["operations"], found["density"]
    assert found["tokens"]["sequence"] == 75600
    assert found["run"]["forwards_per_step"] == 2
    assert work["run_attention"] == pytest.approx(468.20e15, rel=1e-4)
    kept = plan(None, None, None, Radial(), layout=Layout(grid=(21, 45, 80))).density
    assert density["plan"] == kept
    assert density["effective"] == pytest.approx(0.3 + 0.7 * kept)
    share = work["attention_share"]
    assert found["bound"]["operations"] == pytest.approx(1 / (1 - share + share * density["effective"]))
    assert found["verdict"]["helps"]


def test_predictions_lie_below_a_perfect_kernel_and_name_their_source(wan):
    found = answer(Question(wan, (1280, 720), 81, 50, accel=radial(dense_steps=0)))
    assert [p["name"] for p in found["predictions"]] == [c.name for c in CLASSES]
    for p in found["predictions"]:
        assert 1 < p["loop"] < p["ceiling"]
        assert p["source"]
    equal = next(p for p in found["predictions"] if p["attention"] == p["matmul"])
    share = (found["operations"]["attention"]) / sum(
        found["operations"][key] for key in ("attention", "cross_attention", "linear")
    )
    assert equal["time_share"] == pytest.approx(share)


def test_where_attention_is_a_small_part_it_says_so(wan):
    found = answer(Question(wan, (320, 192), 17, accel=radial()))
    share = found["operations"]["attention_share"]
    assert share < 0.1
    assert found["verdict"]["helps"] is False
    assert f"attention is {share:.0%} of a step" in found["verdict"]["text"]


def test_a_schedule_that_leaves_everything_dense(wan):
    found = answer(Question(wan, (1280, 720), 81, 50, accel=radial(dense_steps=50)))
    assert found["density"]["effective"] == 1
    assert "every step is dense" in found["verdict"]["text"]


def test_a_density_that_keeps_nearly_everything(wan):
    found = answer(Question(wan, (1280, 720), 81, 50, accel=Acceleration("random-blocks", density=None, dense_steps=0,
                            parameters={"density": 0.97})))  # fmt: skip
    assert found["verdict"]["helps"] is False
    assert "give a lower --density" in found["verdict"]["text"]


def test_dense_layers_show_in_the_density_by_layer():
    found = answer(Question(accel=radial(dense_layers=2, dense_steps=0)))
    rows = found["density"]["layers"]
    assert [row["density"] for row in rows[:2]] == [1, 1]
    assert {row["density"] for row in rows[2:]} == {found["density"]["plan"]}
    assert found["density"]["sparse_share"] == pytest.approx(4 / 6)


def test_text_in_the_sequence_counts(configs_only):
    vae = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
    folder = configs_only("h", "HunyuanVideoPipeline", vae,
                          {"patch_size": 2, "patch_size_t": 1, "guidance_embeds": True})  # fmt: skip
    found = answer(Question(str(folder), (320, 192), 17, accel=radial()))
    assert found["tokens"] == {
        "sequence": 5 * 12 * 20 + 256, "grid": [5, 12, 20], "text_in_sequence": 256, "text_attended": 256,
        "layout": "main 5x12x20 + text 256",
    }  # fmt: skip
    assert found["run"]["forwards_per_step"] == 1
    assert found["operations"]["layers"] == 60


def test_memory_padding_and_the_tier_with_reasons():
    found = answer(Question(accel=radial(), device="cpu"))
    made = plan(None, None, None, Radial(block_size=64), layout=Layout(grid=(33, 8, 10)))
    assert found["memory"]["plan_tables"] >= made.bytes()
    assert found["memory"]["state"] == 0
    assert found["padding"] == {"tile": [64, 64], "slots": 42 * 64, "share": 42 * 64 / 2640 - 1}
    assert found["tier"]["name"] == "flash"
    assert "triton: q is on cpu" in found["tier"]["why"]


def test_a_tier_by_name_that_cannot_serve_is_refused():
    with pytest.raises(UnsupportedError, match="partial tiles"):
        answer(Question(accel=Acceleration("gna", backend="flash"), device="cpu"))


def test_a_method_that_decides_per_call_is_planned_by_its_parameter():
    found = answer(Question(accel=Acceleration("adaspa", parameters={"density": 0.25}), device="cpu"))
    assert found["density"]["plan"] == 0.25
    assert "it decides per call" in found["density"]["source"]
    assert found["memory"]["plan_tables"] is None
    assert found["memory"]["state"] > 0
    assert found["tier"]["name"]
    # Its own dense steps, up to the first search, count.
    assert found["density"]["sparse_share"] < 1


def test_a_method_whose_layers_differ_tells_each_density():
    """VMoBA cuts time, space and both in turn, layer by layer."""
    found = answer(Question(accel=Acceleration("vmoba", backend="gather"), device="cpu"))
    rows = [row["plan"] for row in found["density"]["layers"]]
    assert len({round(value, 6) for value in rows}) > 1
    assert found["density"]["plan"] == pytest.approx(sum(rows) / len(rows))
    assert "made-up tensors" in found["density"]["source"]


def test_dense():
    found = answer(Question(accel=Acceleration("dense")))
    assert found["method"] is None
    assert found["verdict"]["helps"] is False


def test_what_cannot_be_planned(wan, configs_only):
    with pytest.raises(UsageError, match="multiples of 16"):
        answer(Question(wan, (321, 192), 17))
    folder = configs_only("bare", "WanPipeline", {}, {"in_channels": 16})
    with pytest.raises(UnsupportedError, match="does not tell its token grid"):
        answer(Question(str(folder), (320, 192), 17, accel=radial()))


def test_a_calibrated_plan_tells_its_density_by_layer(tmp_path):
    config = inspect_model(None).transformer
    layout = Layout(grid=(5, 2, 4))
    kept = {"layers": 6, "heads": 4, "model": config["_class_name"], "config": {"num_layers": 6}}
    path, plans = plan_file(tmp_path / "plan.safetensors", layout, density=0.4, **kept)
    accel = Acceleration("paro", parameters={"plan_file": str(path)}, dense_steps=0)
    found = answer(Question(size=(32, 16), frames=9, accel=accel, device="cpu"))
    assert found["tokens"]["grid"] == [5, 2, 4]
    rows = [row["plan"] for row in found["density"]["layers"]]
    assert rows == pytest.approx([float(plans[layer].maps.double().mean()) for layer in range(6)])
    assert len(set(rows)) > 1
    assert found["density"]["source"] == "the plan file"
    assert found["tier"]["name"]


def test_a_plan_of_another_model_is_refused(tmp_path):
    path, _ = plan_file(tmp_path / "plan.safetensors", Layout(grid=(5, 2, 4)), layers=6, heads=4, model="Other")
    accel = Acceleration("paro", parameters={"plan_file": str(path)})
    with pytest.raises(UnsupportedError, match="calibrated on another model"):
        answer(Question(size=(32, 16), frames=9, accel=accel, device="cpu"))
