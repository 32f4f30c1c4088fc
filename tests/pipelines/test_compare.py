import json
from dataclasses import replace

import pytest
import torch

from dit_accel.cli.render_report import compare_report
from dit_accel.errors import UsageError
from dit_accel.eval.compare import judge, summarise
from dit_accel.eval.fidelity import psnr
from dit_accel.eval.speed import conditions
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.compare import Pair, compare
from dit_accel.pipelines.generate import Result
from dit_accel.pipelines.job import Job, resolve
from dit_accel.pipelines.load import load
from dit_accel.pipelines.model import inspect_model
from dit_accel.pipelines.prompts import Prompt
from dit_accel.pipelines.render import plan_job, render

ACCEL = Acceleration(
    method="random-blocks", parameters={"block_size": 4, "density": 0.3}, backend="gather", dense_steps=1
)


def job(model, out, **settings):
    base = {"model": str(model), "size": (32, 48), "frames": 9, "steps": 3, "accel": ACCEL, "compare": True}
    return Job((Prompt("a red circle"),), out, **(base | settings))


@pytest.fixture(scope="module")
def pair(tiny_wan, tmp_path_factory):
    info = inspect_model(str(tiny_wan))
    (shot,) = resolve(job(tiny_wan, tmp_path_factory.mktemp("out")), info)
    pipe = load(info, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    heard = []
    result = compare(pipe, shot, repeats=3, tell=lambda event, data: heard.append((event, data["side"])))
    return result, heard


def test_both_sides_run_in_turn_after_a_warm_up_of_each(pair):
    result, heard = pair
    assert heard[:2] == [("warm-up", "dense"), ("warm-up", "accelerated")]
    assert result.order == ["dense", "accelerated", "accelerated", "dense", "dense", "accelerated"]
    assert (len(result.dense), len(result.fast)) == (3, 3)
    assert set(result.warmup) == {"dense", "accelerated"}


def test_only_one_side_is_sparse(pair):
    result, _ = pair
    assert {r.attention["sparse_calls"] for r in result.dense} == {0}
    assert {r.attention["dense_calls"]["baseline"] for r in result.dense} == {18}
    assert {r.attention["sparse_calls"] for r in result.fast} == {12}


STATE = ("memory", "clocks", "compiled", "doubts")


def on_a_gpu(pair, fast_clock, fast_compiled=False):
    """The same pair as if a GPU had run it."""
    made = Pair(pair.shot, order=pair.order, warmup=pair.warmup)
    for runs, kept, mhz, compiled in (
        (pair.dense, made.dense, 1700, False), (pair.fast, made.fast, fast_clock, fast_compiled),
    ):  # fmt: skip
        for number, run in enumerate(runs):
            peak = {"allocated": (number + 1) * 2**30, "reserved": 4 * 2**30}
            clocks = {"sm_mhz": mhz, "power_state": 0, "temperature_c": None, "power_mw": None}
            kept.append(replace(run, peak_memory=peak, clocks=clocks, compiled=compiled, cores=None))
    return made


def test_the_state_of_the_gpu_is_told_for_both_sides(pair):
    verdict = judge(on_a_gpu(pair[0], 1690))
    peak = {"allocated": 3 * 2**30, "reserved": 4 * 2**30}
    assert verdict["memory"] == {"dense": peak, "accelerated": peak}
    assert [c["sm_mhz"] for c in verdict["clocks"]["accelerated"]] == [1690] * 3
    assert verdict["compiled"] == {"dense": False, "accelerated": False}
    assert not any("clock" in doubt or "compile" in doubt for doubt in verdict["doubts"])
    told = compare_report(verdict)
    assert "peak memory dense: 3.00 GiB allocated, 4.00 GiB reserved" in told
    assert "GPU as each accelerated run ended: SM clock 1690, 1690, 1690 MHz; power state P 0, 0, 0" in told
    assert "torch.compile: off" in told
    assert {key: json.loads(json.dumps(verdict[key])) for key in STATE} == {key: verdict[key] for key in STATE}


def test_sides_that_ran_under_other_conditions_are_doubted(pair):
    doubts = "; ".join(judge(on_a_gpu(pair[0], 1200, fast_compiled=True))["doubts"])
    assert "the GPU's clock changed: 1700 MHz dense, 1200 MHz accelerated" in doubts
    assert "one side ran under torch.compile and the other did not" in doubts


def test_a_cpu_has_no_state_of_a_gpu_and_unknown_clocks_are_said_to_be(pair):
    verdict = judge(pair[0])
    assert verdict["memory"] is verdict["clocks"] is None
    assert conditions(verdict) == ["torch.compile: off"]
    unknown = {side: [dict.fromkeys(("sm_mhz", "power_state"))] for side in ("dense", "accelerated")}
    assert "pip install nvidia-ml-py" in conditions({"clocks": unknown})[0]
    assert conditions({}) == []


def test_frames_start_from_the_same_noise(tiny_wan, tmp_path):
    """With every step dense both sides must agree bit for bit; with none they must not."""
    info = inspect_model(str(tiny_wan))
    pipe = load(info, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    values = []
    for dense_steps in (2, 0):
        accel = Acceleration(**{**vars(ACCEL), "dense_steps": dense_steps})
        (shot,) = resolve(job(tiny_wan, tmp_path, accel=accel, steps=2), info)
        result = compare(pipe, shot)
        values.append(psnr(result.dense[0].frames, result.fast[0].frames))
    assert values[0] == 100.0
    assert values[1] < 100.0


def test_the_verdict(pair):
    result, _ = pair
    verdict = judge(result)
    dense, fast = verdict["seconds"]["dense"], verdict["seconds"]["accelerated"]
    assert verdict["speedup"]["loop"] == pytest.approx(dense["loop"] / fast["loop"])
    assert verdict["speedup"]["attention"] == pytest.approx(dense["attention"] / fast["attention"])
    assert dense["loop"] == sorted(verdict["loop_runs"]["dense"])[1]
    assert verdict["loop_spread"]["dense"]["min"] == min(verdict["loop_runs"]["dense"])
    assert verdict["loop_spread"]["accelerated"]["runs"] == 3
    density = result.fast[-1].attention["density"]
    assert verdict["effective_density"] == pytest.approx((1 + 2 * density) / 3)
    share = verdict["attention_share"]
    assert verdict["bound"] == pytest.approx(1 / (1 - share + share * verdict["effective_density"]))
    assert 0 < verdict["fidelity"]["psnr"] <= 100
    assert len(verdict["fidelity"]["psnr_frames"]) == 9


@pytest.mark.parametrize("tier", ["reference", "quant-reference"])
def test_an_emulated_tier_states_no_speed_up(pair, tier):
    result, _ = pair
    attention = result.fast[-1].attention
    result.fast[-1].attention = {**attention, "tiers": {tier: 8}}
    try:
        verdict = judge(result)
    finally:
        result.fast[-1].attention = attention
    assert verdict["speedup"] is None
    assert f"{tier} ran, which emulates" in verdict["refused"]
    assert verdict["fidelity"]["psnr"] > 0


def test_a_run_without_a_sparse_call_states_no_speed_up(pair):
    result, _ = pair
    attention = result.fast[-1].attention
    result.fast[-1].attention = {**attention, "tiers": {}}
    try:
        assert judge(result)["refused"] == "no call was accelerated"
    finally:
        result.fast[-1].attention = attention


def test_the_job_writes_both_videos_and_the_verdict(tiny_wan, tmp_path):
    import imageio.v3 as iio

    plan = plan_job(job(tiny_wan, tmp_path / "out"))
    render(plan, judge=judge, progress=False)
    (outcome,) = plan.outcomes
    assert outcome.status == "done", outcome.detail
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "0001-a-red-circle-s42-dense-vs-random-blocks.mp4", "0001-a-red-circle-s42.json", "0001-a-red-circle-s42.mp4",
    ]  # fmt: skip
    assert outcome.record["compare"]["bound"] >= 1
    both = iio.imread(tmp_path / "out" / "0001-a-red-circle-s42-dense-vs-random-blocks.mp4")
    assert both.shape == (9, 48, 64, 3)


def test_comparing_dense_with_itself_is_refused(tiny_wan, tmp_path):
    with pytest.raises(UsageError, match="line 1 runs dense"):
        plan_job(job(tiny_wan, tmp_path, accel=Acceleration(method="dense")))


def test_doubts_are_told():
    from dit_accel.eval import compare as module

    fair = {"speedup": {"loop": 1.5}, "bound": 1.6}
    assert module._doubts(fair, [Result(None, {}, cores=float(torch.get_num_threads()))]) == []
    assert "more than the bound of 1.60x" in module._doubts({"speedup": {"loop": 1.8}, "bound": 1.6}, [])[0]
    assert "kept the CPU busy" in module._doubts(fair, [Result(None, {}, cores=0.1)])[0]
    assert module._doubts({"speedup": None, "bound": None}, []) == []


def test_several_comparisons_as_one():
    verdicts = [
        {"speedup": {"loop": gain, "attention": 2 * gain}, "fidelity": {"psnr": psnr, "ssim": 0.9}}
        for gain, psnr in ((1.0, 20.0), (1.5, 30.0), (1.2, 25.0))
    ]
    result = summarise(verdicts)
    assert result["speedup"] == {"attention": 2.4, "loop": 1.2}
    assert result["psnr"] == {"mean": 25.0, "min": 20.0}
    assert result["ssim"]["mean"] == pytest.approx(0.9)
    verdicts[1] |= {"speedup": None}
    assert summarise(verdicts)["speedup"] == {}
