"""The calibration job on a tiny Wan pipeline: from prompts to a plan that renders, and what it refuses."""

import numpy as np
import pytest
import torch

from dit_accel import ParoProcessor, Schedule
from dit_accel.diffusers import engines
from dit_accel.errors import DitAccelError, UnsupportedError, UsageError
from dit_accel.methods import Paro
from dit_accel.methods.paro_file import PlanFile
from dit_accel.methods.paro_statistics import Statistics
from dit_accel.pipelines import calibrate as module
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.calibrate import CalibrationJob, calibrate_paro, default_prompts
from dit_accel.pipelines.job import Job
from dit_accel.pipelines.load import load
from dit_accel.pipelines.model import inspect_model
from dit_accel.pipelines.prompts import Prompt
from dit_accel.pipelines.render import plan_job, render

SMALL = {"size": (48, 32), "frames": 9, "steps": 4, "backend": "gather", "block_size": 4, "bins": 2, "density": 0.6}


@pytest.fixture
def make(tiny_wan, tmp_path):
    def job(**settings):
        prompts = (Prompt("a red ball"), Prompt("a blue cat", 2))
        base = {"out": tmp_path / "plan.safetensors", "model": str(tiny_wan), "prompts": prompts, **SMALL}
        return CalibrationJob(**(base | settings))

    return job


@pytest.fixture(scope="module")
def plan(tiny_wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    prompts = (Prompt("a red ball"), Prompt("a blue cat", 2))
    return calibrate_paro(CalibrationJob(out=out, model=str(tiny_wan), prompts=prompts, **SMALL), progress=False)


def test_the_plan_says_what_it_was_made_for(plan, tiny_wan):
    header = PlanFile.open(plan.path).header
    assert (header.model, header.config["num_layers"], header.layers, header.heads) == (
        "WanTransformer3DModel", 3, (0, 1, 2), 2,
    )  # fmt: skip
    assert header.layout.grid == (3, 2, 3)
    assert (header.steps, header.bins, header.block_size, header.metric, header.alpha) == (4, 2, 4, "mass", 1.0)
    assert header.prompts == ("a red ball", "a blue cat")
    assert header.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert str(tiny_wan) in header.weights
    assert header.reached <= 0.6
    document = plan.to_dict()
    assert [entry["layer"] for entry in document["layers"]] == [0, 1, 2]
    assert all(sum(entry["orders"].values()) == 2 for entry in document["layers"])


def test_every_layer_step_branch_and_prompt_is_seen(make, monkeypatch):
    seen = []
    own = Statistics.observe
    monkeypatch.setattr(
        Statistics,
        "observe",
        lambda self, q, k, v, call: seen.append((call.step, call.layer)) or own(self, q, k, v, call),
    )
    calibrate_paro(make(), progress=False)
    assert len(seen) == 2 * 4 * 2 * 3
    assert {(step.index, step.total, step.branch) for step, _ in seen} == {
        (i, 4, branch) for i in range(4) for branch in ("cond", "uncond")
    }


def test_the_plan_renders(plan, tiny_wan, tmp_path):
    accel = Acceleration(method="paro", parameters={"plan_file": str(plan.path)}, backend="gather", dense_steps=0)
    job = Job(
        (Prompt("a green ball"),), tmp_path / "out", model=str(tiny_wan), size=(48, 32), frames=9, steps=3, accel=accel
    )
    outcome = plan_job(job)
    render(outcome, progress=False)
    record = outcome.outcomes[0].record["attention"]
    assert (record["sparse_calls"], record["dense_calls"], record["fallbacks"]) == (3 * 2 * 3, {}, {})
    # The engine counts blocks, the plan pairs: blocks of 4 on 18 tokens leave a last one of 2.
    assert record["density"] == pytest.approx(plan.header.reached, abs=0.1)


def test_a_plan_of_another_model_or_size_is_refused(plan, tiny_wan):
    from tiny_models import WAN, tiny_pipeline

    pipe = tiny_pipeline()
    import diffusers

    pipe.transformer = diffusers.WanTransformer3DModel(**{**WAN, "num_layers": 2})
    with pytest.raises(UnsupportedError, match="num_layers 3 in the plan and 2 here"):
        pipe.set_attn_processor(ParoProcessor(plan_file=plan.path))
    assert not engines(pipe)
    accel = Acceleration(method="paro", parameters={"plan_file": str(plan.path)})
    job = Job((Prompt("a"),), plan.path.parent, model=str(tiny_wan), size=(64, 32), frames=9, accel=accel)
    with pytest.raises(UnsupportedError, match=r"grid \(3, 2, 3\); this call has \(3, 2, 4\)"):
        plan_job(job)


def test_a_call_of_another_size_is_refused_before_it_computes(plan, tiny_wan):
    pipe = load(str(tiny_wan))
    pipe.set_attn_processor(ParoProcessor(plan_file=plan.path, schedule=Schedule.none(), backend="gather"))
    hidden = torch.zeros(1, 4, 4, 4, 6)
    with pytest.raises(UnsupportedError, match="dit-accel calibrate paro"):
        pipe.transformer(hidden, torch.tensor([500]), torch.zeros(1, 7, 16))


def test_calibration_is_repeatable(make, plan, tmp_path):
    again = calibrate_paro(make(out=tmp_path / "again"), progress=False)
    assert again.path.read_bytes() == plan.path.read_bytes()


def test_printed_metric_and_rows(make):
    found = calibrate_paro(make(metric="paper", alpha=0.5, maximize_sparse=True, rows=0.5), progress=False)
    assert (found.header.metric, found.header.alpha) == ("paper", 0.5)
    assert Paro(found.path).digest


def test_default_prompts(tiny_wan):
    assert len(default_prompts(inspect_model(str(tiny_wan)))) == 2
    bundled = default_prompts(inspect_model(None))
    assert len(bundled) == 2
    assert "circle" in bundled[0].text


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"density": 1.5}, "kept fraction"),
        ({"metric": "best"}, "choose one of mass, paper"),
        ({"alpha": -1}, "alpha"),
        ({"bins": 0}, "bins >= 1"),
        ({"rows": 2.0}, "fraction of query rows"),
        ({"prompts": (Prompt("a", frames=9), Prompt("b", 2, frames=13))}, "frames 13, 9"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(make, monkeypatch, settings, match):
    monkeypatch.setattr(module, "load", None)
    with pytest.raises(UsageError, match=match):
        calibrate_paro(make(**settings), progress=False)


def test_the_output_is_looked_at_first(make, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load", None)
    with pytest.raises(UsageError, match="there is no folder"):
        calibrate_paro(make(out=tmp_path / "gone" / "plan"), progress=False)
    (tmp_path / "plan.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="--overwrite"):
        calibrate_paro(make(), progress=False)
    assert (tmp_path / "plan.safetensors").read_bytes() == b"mine"


def test_statistics_that_do_not_fit_are_told_before_the_run(make, monkeypatch):
    monkeypatch.setattr(Statistics, "bytes", lambda self, *shape: 10**15)
    monkeypatch.setattr(module, "generate", None)
    with pytest.raises(DitAccelError, match=r"take 1000000\.0 GB .* fewer --bins \(now 2\)"):
        calibrate_paro(make(), progress=False)
    with pytest.raises(DitAccelError, match="leave orders_first to the tool"):
        calibrate_paro(make(orders_first=False), progress=False)


def test_short_memory_chooses_orders_in_a_pass_of_their_own(make, monkeypatch, tmp_path):
    runs = []
    own = module.generate
    monkeypatch.setattr(module, "generate", lambda *args: runs.append(args) or own(*args))
    asked = calibrate_paro(make(orders_first=True, steps=2, out=tmp_path / "asked"), progress=False)
    assert len(runs) == 4
    bytes_all = Statistics(bins=2, block_size=4).bytes(asked.header.layout, 2, 3)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": bytes_all - 1}))
    heard = []
    found = calibrate_paro(make(steps=2), listen=lambda *event: heard.append(event), progress=False)
    assert ("orders first", {"asked": False}) in heard
    assert found.path.read_bytes() == asked.path.read_bytes()


def test_memory_needed_is_what_is_held(plan):
    statistics = Statistics(bins=2, block_size=4)
    header = PlanFile.open(plan.path).header
    assert statistics.bytes(header.layout, 2, 3) == 4 * 3 * 2 * 2 * 6 * 5 * 5
    assert np.prod((3, 2, 2, 6, 5, 5)) * 4 == statistics.bytes(header.layout, 2, 3)
