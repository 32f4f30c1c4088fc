import errno
import json

import numpy as np
import pytest

from dit_accel.cli import main
from dit_accel.pipelines import render as job


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na red ball\n\na blue cat runs\n")
    return path


@pytest.fixture
def plain(tiny_wan, tmp_path, prompts):
    """Runs ``dit-accel render`` on a tiny Wan; returns the exit code. The last of two equal flags counts."""

    def run(*extra, model=tiny_wan):
        small = ["--size", "32x48", "--frames", "9", "--steps", "2", "-o", tmp_path / "out"]
        return main([str(word) for word in ("render", prompts, "--model", model, *small, *extra)])

    return run


@pytest.fixture
def render(plain):
    """As ``plain``, with a tier that compiles nothing and blocks that leave something to skip."""

    def run(*extra, **options):
        return plain("--backend", "gather", "--param", "block_size=4", *extra, **options)

    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_prompts_become_videos_with_sidecars(render, tmp_path, capsys):
    assert render() == 0
    assert names(tmp_path / "out") == [
        "0001-a-red-ball-s42.json", "0001-a-red-ball-s42.mp4",
        "0002-a-blue-cat-runs-s42.json", "0002-a-blue-cat-runs-s42.mp4",
    ]  # fmt: skip
    captured = capsys.readouterr()
    assert "radial (decay 0.2, block_size 4" in captured.out
    assert "tier gather, density" in captured.out
    assert "fallbacks none" in captured.out
    assert f"2 rendered in {tmp_path / 'out'}" in captured.out
    assert captured.err == ""


def test_json_is_one_document_on_stdout_and_text_on_stderr(render, capsys):
    assert render("--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["schema"], document["command"], document["ok"]) == (1, "render", True)
    assert [v["status"] for v in document["videos"]] == ["done", "done"]
    assert document["videos"][0]["attention"]["tier"] == "gather"
    assert document["videos"][0]["settings"]["prompt"] == "a red ball"
    assert "2 rendered" in captured.err


@pytest.mark.parametrize("method", ["radial", "rectified", "pisa"])
def test_a_run_that_missed_the_density_asked_for_says_so(method, plain, monkeypatch, capsys, tmp_path):
    from dit_accel.pipelines import attention, generate

    asked = ["--method", method, "--density", "0.5", "--dense-steps", "0", "--backend", "reference"]
    measured = attention.counted
    monkeypatch.setattr(generate, "counted", lambda pipe: {**measured(pipe), "density": 0.59})
    assert plain(*asked, "-o", tmp_path / "near") == 0
    assert "was asked for" not in capsys.readouterr().err
    monkeypatch.setattr(generate, "counted", lambda pipe: {**measured(pipe), "density": 0.75})
    assert plain(*asked, "-o", tmp_path / "far") == 0
    assert f"density 0.5 was asked for and {method} had 0.750 in 2 of 2 outputs" in capsys.readouterr().err
    record = json.loads((tmp_path / "far" / "0001-a-red-ball-s42.json").read_text())
    assert (record["density_asked"], record["attention"]["density"]) == (0.5, 0.75)
    assert plain(*asked, "-o", tmp_path / "far", "--resume") == 0
    assert "had 0.750 in 2 of 2 outputs" in capsys.readouterr().err


def test_quiet_prints_nothing(render, capsys):
    assert render("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_still_tells_what_was_decided(plain, capsys):
    assert plain("--quiet", "--frames", "1", "--dry-run") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "note: dense attention: a single frame has no default method" in captured.err


def test_one_frame_writes_png_and_says_that_it_is_dense(plain, tmp_path, capsys):
    assert plain("--frames", "1") == 0
    assert [n for n in names(tmp_path / "out") if not n.endswith("json")] == [
        "0001-a-red-ball-s42.png", "0002-a-blue-cat-runs-s42.png",
    ]  # fmt: skip
    assert "note: dense attention: a single frame has no default method" in capsys.readouterr().err


def test_dense(plain, tmp_path, capsys):
    assert plain("--method", "dense") == 0
    record = json.loads((tmp_path / "out" / "0001-a-red-ball-s42.json").read_text())
    assert record["settings"]["attention"] is None
    assert record["attention"]["sparse_calls"] == 0


def test_a_comparison_prints_the_numbers_and_the_bound(render, tmp_path, capsys):
    assert render("--compare", "--method", "random-blocks", "--param", "density=0.4", "--dense-steps", 0) == 0
    out = capsys.readouterr().out
    expected = ["denoising loop", "attention", "end to end", "speed-up", "of the dense loop; at effective density"]
    expected += ["can gain at most", "PSNR", "SSIM", "frames before the codec", "warm-up, compilation included"]
    assert [words for words in expected if words not in out] == []
    record = json.loads((tmp_path / "out" / "0001-a-red-ball-s42.json").read_text())
    assert record["compare"]["fidelity"]["psnr"] < 100
    assert "0001-a-red-ball-s42-dense-vs-random-blocks.mp4" in names(tmp_path / "out")
    assert "over 2 outputs, median speed-up: " in out


def test_a_dry_run_shows_and_writes_nothing(render, tmp_path, capsys):
    assert render("--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert "would write" in capsys.readouterr().out
    assert render("--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"]
    assert len(document["videos"]) == 2


def test_resume_and_overwrite(render, tmp_path, capsys):
    assert render() == 0
    file = tmp_path / "out" / "0001-a-red-ball-s42.mp4"
    stamp = file.stat().st_mtime_ns
    assert render() == 2
    assert "--resume" in capsys.readouterr().err
    assert render("--resume") == 0
    assert "2 skipped (finished)" in capsys.readouterr().out
    assert render("--resume", "--steps", "3") == 1
    assert "was made with other settings (steps: 2 -> 3); --overwrite renders it" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == stamp
    assert render("--overwrite", "--steps", "3") == 0
    assert file.stat().st_mtime_ns > stamp


def test_a_damaged_video_is_told_and_rendered_again(render, tmp_path, capsys):
    assert render() == 0
    file = tmp_path / "out" / "0001-a-red-ball-s42.mp4"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    assert render("--resume", "--dry-run") == 0
    told = capsys.readouterr()
    assert f"{file.name} is damaged: it has 100 bytes and was written with {size:,}; it is rendered again" in told.err
    assert told.out.count("would write") == 1
    assert render("--resume") == 0
    told = capsys.readouterr().out
    assert f"takes the place of a damaged output, kept as {file.name}.damaged" in told
    assert "1 rendered, 1 skipped (finished)" in told
    assert file.stat().st_size == size


def test_overwrite_beside_resume_renders_what_has_other_settings(render, tmp_path, capsys):
    assert render() == 0
    stamps = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("*.mp4"))]
    assert render("--resume", "--overwrite") == 0
    assert "2 skipped (finished)" in capsys.readouterr().out
    assert stamps == [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("*.mp4"))]
    assert render("--resume", "--overwrite", "--steps", "3") == 0
    assert "2 rendered" in capsys.readouterr().out


def test_a_failed_prompt_is_told_and_the_others_go_on(render, tmp_path, monkeypatch, capsys):
    real = job.generate

    def fails_first(pipe, shot, processor):
        if shot.number == 1:
            raise RuntimeError("boom")
        return real(pipe, shot, processor)

    monkeypatch.setattr(job, "generate", fails_first)
    assert render("--json") == 1
    captured = capsys.readouterr()
    assert "failed: 0001-a-red-ball-s42.mp4: RuntimeError: boom" in captured.err
    assert "1 rendered, 1 failed" in captured.err
    document = json.loads(captured.out)
    assert not document["ok"]
    assert [v["status"] for v in document["videos"]] == ["failed", "done"]
    assert names(tmp_path / "out") == ["0002-a-blue-cat-runs-s42.json", "0002-a-blue-cat-runs-s42.mp4"]


def test_control_c_keeps_what_is_finished(render, tmp_path, monkeypatch, capsys):
    real = job.generate

    def stops_at_two(pipe, shot, processor):
        if shot.number == 2:
            raise KeyboardInterrupt
        return real(pipe, shot, processor)

    monkeypatch.setattr(job, "generate", stops_at_two)
    assert render("--json") == 130
    captured = capsys.readouterr()
    assert "interrupted: 1 rendered, 1 left; the same command with --resume continues" in captured.err
    assert json.loads(captured.out)["interrupted"]
    assert names(tmp_path / "out") == ["0001-a-red-ball-s42.json", "0001-a-red-ball-s42.mp4"]


def test_a_full_disk(render, tmp_path, monkeypatch, capsys):
    def full(path, frames, fps):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "write_mp4", full)
    assert render() == 1
    assert "the disk is full while writing 0001-a-red-ball-s42.mp4" in capsys.readouterr().err
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "radail"], "unknown method 'radail'; did you mean 'radial'?"),
        (["--density", "0"], "--density is the kept fraction and lies in (0, 1]; got 0"),
        (["--density", "1.5"], "lies in (0, 1]; got 1.5"),
        (["--size", "33x48"], "--size 33x48 (WxH) does not fit"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--frames", "10"], "the nearest allowed counts are 9 and 13"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--dense-steps", "x"], "--dense-steps is a count (3) or a fraction of the run (0.25); got 'x'"),
        (["--dense-steps", "1.5"], "got '1.5'"),
        (["--dense-steps", "nan"], "got 'nan'"),
        (["--dense-steps", "-1"], "got '-1'"),
        (["--dense-steps", "9"], "--dense-steps 9 is more than the 2 steps"),
        (["--dense-layers", "a"], "--dense-layers is a count"),
        (["--param", "decay"], "--param is NAME=VALUE"),
        (["--param", "blok=1"], "no parameter blok; allowed: decay"),
        (["--backend", "cuda"], "backend 'cuda' is unknown; choose one of auto"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--image", "absent.png"], "text-to-video only"),
        (["-o", "/dev/null/x"], "-o /dev/null/x cannot be written to"),
        (["--frames-dir", "/dev/null/x"], "--frames-dir /dev/null/x cannot be written to"),
        (["--model", "./absent"], "no model folder at ./absent"),
        (["--model", "no-such/model"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_wrong_values_end_with_2_before_weights_are_loaded(render, monkeypatch, capsys, extra, message):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(job, "load", never)
    assert render(*extra) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dit-accel: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_an_error_with_json_is_a_document_too(render, capsys):
    assert render("--density", "2", "--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["error"]["kind"]) == (False, "usage")


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_no_prompts(render, prompts, capsys, content):
    prompts.write_text(content)
    assert render() == 2
    assert "no prompts in" in capsys.readouterr().err


def test_radial_on_an_image_model(tiny_image, plain, capsys):
    assert plain("--method", "radial", "--frames", "1", model=tiny_image) == 2
    told = capsys.readouterr().err
    assert "an image has one frame. For images use GNA or Pisa" in told
    assert "(for 32x48 pixels, 1 frame of " in told
    assert "grid" not in told


def test_an_unsupported_model_class(configs_only, plain, capsys):
    folder = configs_only("sd", "StableDiffusionXLPipeline", {}, {}, parts=("unet",))
    assert plain(model=folder) == 2
    assert "diffusion transformers only" in capsys.readouterr().err


def test_a_density_that_is_missed_is_told(plain, capsys):
    assert plain("--density", "0.05", "--dry-run") == 0
    assert "note: density 0.05 is out of reach of radial on main" in capsys.readouterr().err


def test_json_lines_set_their_own(render, prompts, tmp_path):
    prompts.write_text('{"prompt": "a red ball", "seed": 7, "size": "48x32", "frames": 5}\n')
    assert render() == 0
    record = json.loads((tmp_path / "out" / "0001-a-red-ball-s7.json").read_text())
    settings = record["settings"]
    assert (settings["width"], settings["height"], settings["frames"], settings["seed"]) == (48, 32, 5, 7)
    import imageio.v3 as iio

    assert iio.imread(tmp_path / "out" / "0001-a-red-ball-s7.mp4").shape == (5, 32, 48, 3)


def test_image_to_video(tiny_wan_i2v, render, tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((48, 32, 3), np.uint8)).save(tmp_path / "first.png")
    assert render("--image", tmp_path / "first.png", model=tiny_wan_i2v) == 0


def test_an_image_to_video_model_asks_for_its_image(tiny_wan_i2v, render, capsys):
    assert render(model=tiny_wan_i2v) == 2
    assert "give the first frame with --image FILE" in capsys.readouterr().err
