import json

import pytest
import torch

from dit_accel.pipelines.mini.loop import Schedule, Stage, step_generator


def stage(out, steps=30):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def loss(step, generator):
        x = torch.randn(16, 6, generator=generator)
        return (module(x) - x[:, :2]).square().mean(), {}

    return Stage("toy", module, loss, Schedule(steps, 1e-2, warmup=3), out)


def curve(out):
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


def test_same_seed_gives_the_same_curve(tmp_path):
    stage(tmp_path / "a").run()
    stage(tmp_path / "b").run()
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_stopped_run_continues_exactly(tmp_path):
    stage(tmp_path / "a").run()
    while not stage(tmp_path / "b").run(deadline=0.0):
        pass
    whole, parts = stage(tmp_path / "a"), stage(tmp_path / "b")
    assert whole.finished
    for one, two in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    for key, value in whole.average.items():
        torch.testing.assert_close(value, parts.average[key], rtol=0, atol=0)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_log_lines_after_the_checkpoint_are_rewritten(tmp_path):
    stage(tmp_path, steps=12).run()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"stage": "toy", "step": 99, "loss": 1.0}) + "\n")
    stage(tmp_path, steps=12)
    assert max(step for step, _ in curve(tmp_path)) == 11


def test_infinite_loss_names_the_checkpoint(tmp_path):
    module = torch.nn.Linear(2, 2)
    bad = Stage(
        "toy", module, lambda s, g: (module(torch.ones(1, 2)).sum() * float("nan"), {}), Schedule(3, 1e-3), tmp_path
    )
    with pytest.raises(RuntimeError, match=r"toy\.pt"):
        bad.run()


def test_step_generators_differ_by_stage_and_step():
    draws = {torch.rand(1, generator=step_generator(0, s, i)).item() for s in ("a", "b") for i in range(3)}
    assert len(draws) == 6


def test_learning_rate_warms_up_and_falls():
    schedule = Schedule(100, 1.0, warmup=10, floor=0.1)
    assert schedule.lr_at(0) == pytest.approx(0.1)
    assert schedule.lr_at(10) == pytest.approx(1.0)
    assert schedule.lr_at(100) == pytest.approx(0.1)


def test_a_curve_replaces_warm_up_and_cosine():
    schedule = Schedule(100, 2.0, warmup=10, curve=((0, 0.0), (50, 1.0), (100, 0.5)))
    assert [schedule.lr_at(step) for step in (0, 25, 50, 75, 100)] == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0])
