import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.pipelines import render as module
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job
from dit_accel.pipelines.prompts import Prompt
from dit_accel.pipelines.render import describe, plan_job, render

SPARSE = Acceleration(method="radial", parameters={"block_size": 4}, backend="gather", dense_steps=1)


@pytest.fixture
def make(tiny_wan, tmp_path):
    def job(*prompts, **settings):
        texts = prompts or ("a red circle",)
        base = {"model": str(tiny_wan), "size": (32, 48), "frames": 9, "steps": 2, "accel": SPARSE}
        return Job(
            tuple(Prompt(t, i) if isinstance(t, str) else t for i, t in enumerate(texts, 1)),
            **({"out": tmp_path / "out"} | base | settings),
        )  # fmt: skip

    return job


def run(job, **options):
    plan = plan_job(job)
    render(plan, progress=False, **options)
    return plan.outcomes


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_every_prompt_gets_a_file_and_a_sidecar(make):
    job = make("a red circle", Prompt("a blue square", 2, seed=7))
    outcomes = run(job)
    assert [o.status for o in outcomes] == ["done", "done"]
    assert names(job.out) == [
        "0001-a-red-circle-s42.json", "0001-a-red-circle-s42.mp4",
        "0002-a-blue-square-s7.json", "0002-a-blue-square-s7.mp4",
    ]  # fmt: skip
    record = json.loads((job.out / "0001-a-red-circle-s42.json").read_text())
    assert record["schema"] == 1
    assert record["settings"]["attention"]["method"]["method"] == "radial"
    attention = record["attention"]
    assert (attention["tier"], attention["fallbacks"], attention["guard_events"]) == ("gather", {}, [])
    # Three layers and two guidance branches: one of the two steps is dense.
    assert (attention["sparse_calls"], attention["dense_calls"]) == (6, {"schedule": 6})
    assert attention["density"] == pytest.approx(outcomes[0].shot.choice.density)
    assert attention["effective_density"] == pytest.approx((1 + attention["density"]) / 2)
    for layer in attention["layers"]:
        assert layer["density_steps"] == pytest.approx([1.0, attention["density"]], abs=1e-4)
        assert layer["drift_steps"] is None
    assert {"text", "loop", "attention", "vae", "export", "total"} <= set(record["seconds"])
    assert record["seconds"]["attention"] <= record["seconds"]["loop"] <= record["seconds"]["total"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["files"] == ["0001-a-red-circle-s42.mp4"]


def test_extra_outputs(make, tmp_path):
    job = make(gif=True, frames_dir=tmp_path / "frames")
    run(job)
    assert "0001-a-red-circle-s42.gif" in names(job.out)
    assert len(names(tmp_path / "frames" / "0001-a-red-circle-s42")) == 9


def test_one_frame_is_a_png(make):
    job = make(frames=1, accel=Acceleration(), gif=True)
    (outcome,) = run(job)
    assert names(job.out) == ["0001-a-red-circle-s42.json", "0001-a-red-circle-s42.png"]
    assert "dense attention" in outcome.record["notes"][0]


def test_an_image_model(tiny_image, make):
    job = make(model=str(tiny_image), size=(24, 32), frames=None, accel=Acceleration())
    (outcome,) = run(job)
    assert outcome.status == "done", outcome.detail
    from PIL import Image

    with Image.open(outcome.file) as image:
        assert image.size == (24, 32)


def test_image_to_video(tiny_wan_i2v, make, tmp_path):
    from PIL import Image

    first = tmp_path / "first.png"
    Image.fromarray(np.full((48, 32, 3), 200, np.uint8)).save(first)
    (outcome,) = run(make(model=str(tiny_wan_i2v), image=str(first)))
    assert outcome.status == "done", outcome.detail
    assert outcome.record["settings"]["pipeline"] == "WanImageToVideoPipeline"
    assert outcome.record["attention"]["sparse_calls"] > 0


def test_the_same_seed_gives_the_same_frames(make, tmp_path):
    from PIL import Image

    pictures = []
    for name in "ab":
        job = make(frames_dir=tmp_path / name, overwrite=True)
        run(job)
        pictures.append(np.asarray(Image.open(tmp_path / name / "0001-a-red-circle-s42" / "00008.png")))
    assert (pictures[0] == pictures[1]).all()


def test_a_failure_does_not_cost_the_others(make, monkeypatch):
    real = module.generate

    def fails_for_two(pipe, shot, processor):
        if shot.number == 2:
            raise RuntimeError("boom")
        return real(pipe, shot, processor)

    monkeypatch.setattr(module, "generate", fails_for_two)
    job = make("a", "b", "c")
    outcomes = run(job)
    assert [o.status for o in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].detail == "RuntimeError: boom"
    assert len(names(job.out)) == 4


def test_a_full_disk_leaves_no_file(make, monkeypatch, tmp_path):
    def full(path, frames, fps):
        path.write_bytes(b"half a video")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_mp4", full)
    job = make(frames_dir=tmp_path / "frames")
    (outcome,) = run(job)
    assert outcome.status == "failed"
    assert "disk is full while writing 0001-a-red-circle-s42.mp4" in outcome.detail
    assert names(job.out) == names(tmp_path / "frames") == []


def test_a_disk_that_fills_up_at_the_sidecar_leaves_no_file_either(make, monkeypatch):
    def full(path, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.sidecar, "write", full)
    job = make()
    (outcome,) = run(job)
    assert outcome.status == "failed"
    assert names(job.out) == []


def test_an_interruption_keeps_what_is_finished(make, monkeypatch):
    real = module.generate

    def stops_at_two(pipe, shot, processor):
        if shot.number == 2:
            raise KeyboardInterrupt
        return real(pipe, shot, processor)

    monkeypatch.setattr(module, "generate", stops_at_two)
    job = make("a", "b", "c")
    plan = plan_job(job)
    with pytest.raises(KeyboardInterrupt):
        render(plan, progress=False)
    assert [o.status for o in plan.outcomes] == ["done", "pending", "pending"]
    assert len(names(job.out)) == 2
    monkeypatch.setattr(module, "generate", real)
    assert [o.status for o in run(make("a", "b", "c", resume=True))] == ["skipped", "done", "done"]


def test_frames_with_nan_are_a_failure(make, monkeypatch):
    import dit_accel.pipelines.generate as generate

    real = generate._frames

    def spoiled(output):
        frames = real(output).copy()
        frames[3, 0, 0, 0] = np.nan
        return frames

    monkeypatch.setattr(generate, "_frames", spoiled)
    job = make()
    (outcome,) = run(job)
    assert "1 of 9 frames hold NaN or Inf" in outcome.detail
    assert names(job.out) == []


def test_out_of_memory_comes_with_remedies():
    text = describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert text.startswith("out of memory: CUDA out of memory. Tried to allocate 2 GiB ")
    assert "--offload" in text
    assert "--resume" in text


def test_what_exists_is_neither_rewritten_nor_passed_over_in_silence(make):
    job = make()
    (first,) = run(job)
    stamp = first.file.stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"0001-a-red-circle-s42.mp4 already in .*--resume .*--overwrite"):
        plan_job(job)
    assert first.file.stat().st_mtime_ns == stamp
    assert [o.status for o in run(make(resume=True))] == ["skipped"]
    assert first.file.stat().st_mtime_ns == stamp
    assert [o.status for o in run(make(overwrite=True))] == ["done"]
    assert first.file.stat().st_mtime_ns > stamp


def test_resume_tells_when_settings_differ_and_overwrites_only_when_asked(make):
    (first,) = run(make())
    (kept,) = plan_job(make(steps=3, resume=True)).outcomes
    assert kept.status == "differs"
    assert "steps: 2 -> 3" in kept.detail
    (again,) = plan_job(make(steps=3, resume=True, overwrite=True)).outcomes
    assert again.status == "pending"
    (skipped,) = plan_job(make(resume=True, overwrite=True)).outcomes
    assert skipped.status == "skipped"
    first.file.with_suffix(".json").unlink()
    (unknown,) = plan_job(make(resume=True)).outcomes
    assert (unknown.status, unknown.detail) == ("differs", "it has no readable sidecar")


def test_a_video_that_went_missing_is_rendered_again(make):
    (first,) = run(make())
    first.file.unlink()
    assert [o.status for o in run(make(resume=True))] == ["done"]


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_video_is_no_finished_one(make, how):
    (first,) = run(make())
    whole = first.file.read_bytes()
    assert first.record["contents"][first.file.name]["bytes"] == len(whole)
    bad = whole[:100] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1])
    first.file.write_bytes(bad)
    before = names(make().out)
    (planned,) = plan_job(make(resume=True), dry=True).outcomes
    assert (planned.status, planned.damaged) == ("pending", (first.file.name,))
    assert f"{first.file.name} is damaged: it" in planned.detail
    assert names(make().out) == before
    (again,) = run(make(resume=True))
    assert (again.status, again.detail) == ("done", "")
    assert first.file.read_bytes() == whole
    aside = first.file.with_name(first.file.name + ".damaged")
    assert aside.read_bytes() == bad
    assert f"kept as {aside.name}" in again.record["notes"][-1]
    assert [o.status for o in run(make(resume=True))] == ["skipped"]
    first.file.write_bytes(bad)
    run(make(resume=True))
    assert aside.with_name(aside.name + "-2").read_bytes() == bad


def test_records_that_do_not_tell_what_was_written_keep_working(make):
    (first,) = run(make())
    record = first.file.with_suffix(".json")
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "contents"}))
    first.file.write_bytes(b"anything")
    assert [o.status for o in run(make(resume=True))] == ["skipped"]


def test_a_side_file_that_went_missing_is_no_damage(make):
    (first,) = run(make(gif=True))
    first.file.with_suffix(".gif").unlink()
    assert [o.status for o in run(make(gif=True, resume=True))] == ["skipped"]


def test_a_failure_leaves_the_damaged_video_in_place(make, monkeypatch):
    (first,) = run(make())
    first.file.write_bytes(b"cut")

    def fails(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(module, "generate", fails)
    assert [o.status for o in run(make(resume=True))] == ["failed"]
    assert first.file.read_bytes() == b"cut"


def test_a_dry_plan_creates_nothing(make):
    job = make()
    plan_job(job, dry=True)
    assert not job.out.exists()


def test_dense_attention_is_measured_too_and_equals_stock(make, tiny_wan, tmp_path):
    from diffusers import WanPipeline
    from PIL import Image

    (outcome,) = run(make(accel=Acceleration(method="dense"), frames_dir=tmp_path / "f"))
    assert outcome.record["seconds"]["attention"] > 0
    assert outcome.record["settings"]["attention"] is None
    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "a red circle", width=32, height=48, num_frames=9, num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(42),
    ).frames[0]  # fmt: skip
    ours = np.asarray(Image.open(tmp_path / "f" / "0001-a-red-circle-s42" / "00008.png")) / 255
    assert np.abs(ours - stock[8]).max() <= 1 / 255


def test_the_first_output_that_compiled_kernels_says_so(make):
    from dit_accel.pipelines.generate import Result

    plan = plan_job(make(), dry=True)

    def told(tier):
        return module._compiling(plan, Result(None, {}, {"tier": tier}))

    assert told("dense") == told("gather") == []
    assert "include compiling" in told("flex")[0]
    assert told("flex") == []


def test_a_model_that_does_not_fit_comes_with_remedies(make, monkeypatch):
    from dit_accel.errors import DitAccelError

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "load", full)
    with pytest.raises(DitAccelError, match=r"out of memory.*--offload"):
        render(plan_job(make()), progress=False)


def test_frames_of_another_run_are_not_written_over(make, tmp_path):
    frames = tmp_path / "frames"
    run(make(frames_dir=frames))
    before = (frames / "0001-a-red-circle-s42" / "00000.png").read_bytes()
    other = make(frames_dir=frames, out=tmp_path / "other", steps=3)
    with pytest.raises(UsageError, match=r"frames.*of another run would be lost"):
        plan_job(other)
    assert (frames / "0001-a-red-circle-s42" / "00000.png").read_bytes() == before
    assert [o.status for o in run(make(frames_dir=frames, out=tmp_path / "other", overwrite=True))] == ["done"]
    # What a run has made itself is made again where its video is gone.
    (tmp_path / "out" / "0001-a-red-circle-s42.mp4").unlink()
    assert [o.status for o in run(make(frames_dir=frames, resume=True))] == ["done"]


@pytest.mark.parametrize("resume", [False, True])
def test_an_image_does_not_take_the_record_of_a_video(make, resume):
    job = make()
    run(job)
    record = (job.out / "0001-a-red-circle-s42.json").read_text()
    with pytest.raises(UsageError, match=r"s42\.mp4 of another run would be lost"):
        plan_job(make(frames=1, accel=Acceleration(), resume=resume))
    assert (job.out / "0001-a-red-circle-s42.json").read_text() == record


def test_two_runs_do_not_make_one_output_at_a_time(make, monkeypatch):
    first, second = plan_job(make()), plan_job(make())
    real, inner = module.generate, []

    def meanwhile(pipe, shot, processor):
        if not inner:
            inner.append(True)
            render(second, progress=False)
        return real(pipe, shot, processor)

    monkeypatch.setattr(module, "generate", meanwhile)
    render(first, progress=False)
    assert [o.status for o in (*first.outcomes, *second.outcomes)] == ["done", "failed"]
    assert "another run is making 0001-a-red-circle-s42.mp4" in second.outcomes[0].detail
    assert names(first.job.out) == ["0001-a-red-circle-s42.json", "0001-a-red-circle-s42.mp4"]


@pytest.mark.parametrize(
    ("settings", "status"), [({"resume": True}, "skipped"), ({}, "failed"), ({"steps": 3}, "failed")]
)
def test_what_another_run_has_finished_since_is_kept(make, settings, status):
    late = plan_job(make(**settings))
    run(make())
    written = late.outcomes[0].file.read_bytes()
    render(late, progress=False)
    (outcome,) = late.outcomes
    assert outcome.status == status
    assert outcome.file.read_bytes() == written
    if status == "failed":
        assert "has appeared since this run began" in outcome.detail
