"""The command: files, records, comparison, interruption, and refusals before anything is loaded."""

import json
import shutil
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest

from dit_accel.cli import main
from dit_accel.pipelines.model import CAUSAL, STREAM, inspect_model
from dit_accel.pipelines.streaming import pipeline


@pytest.fixture
def stream(tiny_wan, tmp_path):
    """Runs ``dit-accel stream`` on a tiny Wan; returns the exit code. The last of two equal flags counts."""
    path = tmp_path / "prompt.txt"
    path.write_text("a red ball runs\n")

    def run(*extra, model=tiny_wan):
        small = ["--size", "48x32", "--seconds", "2", "--window", "6", "--sinks", "2", "-o", tmp_path / "out"]
        return main([str(word) for word in ("stream", path, "--model", model, *small, *extra)])

    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_prompt_becomes_a_video_with_its_record(stream, tmp_path, capsys):
    assert stream() == 0
    stem = "0001-a-red-ball-runs-s42-deep-sink"
    assert names(tmp_path / "out") == [f"{stem}.json", f"{stem}.mp4"]
    assert iio.imread(tmp_path / "out" / f"{stem}.mp4").shape == (32, 32, 48, 3)
    record = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert (record["frames"], record["chunks"], record["forwards"]) == (32, 3, 15)
    assert (record["seed"], record["cache"]["sink_frames"]) == (42, 2)
    assert record["interrupted"] is False
    assert record["first_frame_seconds"] > 0
    captured = capsys.readouterr()
    assert "deep_sink: 32 frames, 9 latent, made at" in captured.out
    assert "first frames after" in captured.out
    assert captured.err == ""


def test_policies_are_compared(stream, tmp_path, capsys):
    assert stream("--compare-policies", "deep_sink,sink", "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["command"] == "stream"
    assert [clip["policy"] for clip in document["clips"]] == ["deep_sink", "sink"]
    assert all({"drift", "dynamic", "persistence"} <= set(clip["judged"]) for clip in document["clips"])
    lines = captured.err.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("policy"))
    assert [line.split()[:3] for line in lines[header + 1 :]] == [["deep_sink", "6", "2"], ["sink", "6", "2"]]
    assert len(names(tmp_path / "out")) == 4


def test_an_interruption_leaves_a_file_that_plays(stream, tmp_path, monkeypatch, capsys):
    made = pipeline.Stream.__next__

    def stop(self):
        if self.stats.chunks == 2:
            raise KeyboardInterrupt
        return made(self)

    monkeypatch.setattr(pipeline.Stream, "__next__", stop)
    assert stream() == 130
    video = next((tmp_path / "out").glob("*.mp4"))
    assert len(iio.imread(video)) == 21
    assert json.loads(video.with_suffix(".json").read_text())["interrupted"] is True
    assert "what was made can be played" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_stream_leaves_a_file_that_plays(tiny_wan, tmp_path):
    """SIGKILL: nothing of ours runs any more; the encoder ends the file by itself."""
    (tmp_path / "prompt.txt").write_text("a red ball runs\n")
    words = ["stream", tmp_path / "prompt.txt", "--model", tiny_wan, "--size", "48x32", "--seconds", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "dit_accel", *map(str, words), "-o", str(tmp_path / "out")])
    deadline, seen = time.monotonic() + 120, []
    while not seen and time.monotonic() < deadline:
        time.sleep(0.5)
        seen = [path for path in (tmp_path / "out").glob("*.mp4") if path.stat().st_size > 20_000]
    process.kill()
    process.wait()
    assert seen, "nothing was written within two minutes"
    time.sleep(2)
    assert len(iio.imread(seen[0])) > 16


def test_options_reach_the_stream(stream, tmp_path):
    assert stream("--steps", "2", "--guidance", "3", "--reuse", "--then", "1:a green cat falls", "--chunk", "2") == 0
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["steps"]["times"] == [1000, 500]
    assert record["guidance"] == 3
    assert record["latent_frames"] == 10
    assert record["forwards"] == 2 * (5 * 3 + 2)  # two branches; two chunks once more for the new prompt


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policy", "deep_sinc"], "unknown cache policy 'deep_sinc'; did you mean 'deep_sink'"),
        (["--sinks", "30", "--window", "21"], "window_frames=21 is less than sink_frames=30"),
        (["--seconds", "0"], "more than 0 seconds; got 0"),
        (["--weights", "none.pt"], "no checkpoint at none.pt"),
        (["--lora", "x.pt"], "give that with --weights"),
        (["--seconds", "inf"], "finite number above 0"),
        (["--seconds", "0.001"], "less than a frame"),
        (["--then", "2:too late"], "at 2 s has no part in a stream of 2 s"),
        (["--fps", "0"], "--fps must lie in 1 ... 240; got 0"),
        (["--fps", "-3"], "--fps must lie in 1 ... 240; got -3"),
        (["--steps", "0"], "1 step or more; got 0"),
        (["--shift", "0"], "positive factor; got 0"),
        (["--guidance", "nan"], "finite number; got nan"),
        (["--seed", "-1"], "got -1"),
        (["--size", "49x32"], "nearest allowed size"),
        (["--image", "nowhere.png"], "no file at nowhere.png"),
        (["--then", "soon"], "--then is SECOND:TEXT"),
        (["--steps", "many"], "--steps is a number"),
    ],
)
def test_refused_before_loading(stream, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.setattr("dit_accel.pipelines.streaming.job.load", None)
    assert stream(*extra) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path).glob("out/*.mp4"))


def test_a_transformer_for_streams_beside_the_model(stream, tiny_wan, tmp_path, capsys):
    """``causal/`` in a model's folder: its weights and its settings are the default, and render keeps the other."""
    import diffusers

    folder = tmp_path / "model"
    shutil.copytree(tiny_wan, folder)
    before = inspect_model(str(folder)).fingerprint()
    other = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    other.proj_out.bias.data.add_(1.0)
    other.save_pretrained(folder / CAUSAL)
    own = {"steps": [1000, 500], "policy": "sink", "policies": {"sink": {"window_frames": 9, "positions": "window"}}}
    (folder / CAUSAL / STREAM).write_text(json.dumps(own))
    assert inspect_model(str(folder)).fingerprint() == before
    (tmp_path / "p.txt").write_text("a red ball runs\n")
    words = ["stream", tmp_path / "p.txt", "--size", "48x32", "--seconds", "0.5", "--overwrite"]

    def run(model, *extra):
        assert main([str(word) for word in (*words, "--model", model, "-o", tmp_path / "o", *extra)]) == 0
        assert capsys.readouterr().err == ""
        record = json.loads((tmp_path / "o" / "0001-a-red-ball-runs-s42-sink.json").read_text())
        return record, iio.imread(tmp_path / "o" / "0001-a-red-ball-runs-s42-sink.mp4").astype(int)

    record, frames = run(folder)
    cache = record["cache"]
    found = [cache[key] for key in ("policy", "window_frames", "sink_frames", "positions")]
    assert found == ["sink", 9, 3, "window"]
    assert record["steps"]["times"] == [1000, 500]
    # The same settings on the model's own transformer: another clip.
    given = ["--policy", "sink", "--window", "9", "--steps", "1000,500"]
    assert np.abs(run(tiny_wan, *given)[1] - frames).max() > 20
    assert run(folder, "--window", "6")[0]["cache"]["window_frames"] == 6


def test_the_bundled_model_has_one(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle moves left on a white background\n")
    assert main(["stream", str(tmp_path / "p.txt"), "--seconds", "0.5", "-o", str(tmp_path / "o")]) == 0
    assert "not trained" not in capsys.readouterr().err
    record = json.loads(next((tmp_path / "o").glob("*.json")).read_text())
    assert (record["causal"], record["guidance"], record["cache"]["window_frames"]) == (True, 1.0, 12)
    assert len(iio.imread(next((tmp_path / "o").glob("*.mp4")))) == 8


def test_other_pipelines_are_refused_by_name(stream, configs_only, capsys):
    folder = configs_only("cog", "CogVideoXPipeline", {}, {})
    assert stream(model=folder) == 2
    assert "streams run on WanPipeline" in capsys.readouterr().err


def test_what_exists_is_not_overwritten(stream, capsys):
    assert stream("--seconds", "0.5") == 0
    assert stream("--seconds", "0.5") == 2
    assert "already in" in capsys.readouterr().err
    assert stream("--seconds", "0.5", "--overwrite") == 0
