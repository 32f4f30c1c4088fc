import json
from pathlib import Path

import pytest

from dit_accel.errors import UsageError
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job, digest, resolve
from dit_accel.pipelines.model import inspect_model
from dit_accel.pipelines.prompts import Prompt

VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "z_dim": 16}


@pytest.fixture
def wan(configs_only):
    return inspect_model(str(configs_only("m", "WanPipeline", VAE, {"patch_size": [1, 2, 2], "in_channels": 16})))


@pytest.fixture
def flux(configs_only):
    vae = {"block_out_channels": [1, 1, 1, 1]}
    return inspect_model(str(configs_only("f", "FluxPipeline", vae, {"patch_size": 1, "in_channels": 64})))


def job(*prompts, **settings):
    return Job(tuple(Prompt(p) if isinstance(p, str) else p for p in prompts or ("x",)), Path("out"), **settings)


def test_the_pipelines_own_defaults_are_resolved(wan):
    (shot,) = resolve(job(), wan)
    assert (shot.width, shot.height, shot.frames, shot.steps, shot.fps) == (832, 480, 81, 50, 16)
    assert shot.call["guidance_scale"] == 5.0
    assert shot.stem == "0001-x-s42"
    assert shot.suffix == ".mp4"


def test_the_bundled_models_defaults_are_resolved():
    (shot,) = resolve(job(), inspect_model(None))
    assert shot.call["max_sequence_length"] == 32
    assert shot.choice.density <= 0.25


def test_job_beats_model_and_prompt_beats_job(wan):
    own = Prompt("y", 2, negative="n", seed=7, size=(64, 32), frames=9, steps=3, guidance=2.0)
    first, second = resolve(job("x", own, size=(32, 48), frames=5, steps=2, seed=1, negative="m", guidance=1.5), wan)
    assert (first.width, first.height, first.frames, first.steps, first.seed) == (32, 48, 5, 2, 1)
    assert (first.call["negative_prompt"], first.call["guidance_scale"]) == ("m", 1.5)
    assert (second.width, second.height, second.frames, second.steps, second.seed) == (64, 32, 9, 3, 7)
    assert (second.call["negative_prompt"], second.call["guidance_scale"]) == ("n", 2.0)
    assert [s.stem for s in (first, second)] == ["0001-x-s1", "0002-y-s7"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (33, 48)}, "--size 33x48"),
        ({"frames": 8}, "nearest allowed counts are 5 and 9"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"seed": -1}, "--seed must lie in"),
        ({"seed": 2**63}, "--seed must lie in"),
        ({"fps": 0}, "--fps must lie in"),
        ({"guidance": float("inf")}, "--guidance must be a finite"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"image": "/nowhere.png"}, "--image: no file at /nowhere.png"),
        ({"compare": True, "accel": Acceleration(method="dense")}, "line 1 runs dense"),
    ],
)
def test_values_that_cannot_work(wan, settings, message):
    with pytest.raises(UsageError, match=message):
        resolve(job(**settings), wan)


def test_the_line_that_set_a_wrong_value_is_named(wan):
    with pytest.raises(UsageError, match="line 7: frames 10 does not fit"):
        resolve(job(Prompt("x", 7, frames=10)), wan)


def test_image_models_make_one_frame(flux):
    (shot,) = resolve(job(size=(512, 256)), flux)
    assert (shot.frames, shot.suffix) == (1, ".png")
    assert "num_frames" not in shot.call
    with pytest.raises(UsageError, match="is an image model and makes 1 frame"):
        resolve(job(frames=5), flux)


def test_an_argument_the_pipeline_lacks_is_not_dropped(wan):
    wan.call_arguments.pop("guidance_scale")
    resolve(job(), wan)
    with pytest.raises(UsageError, match=r"WanPipeline takes no guidance_scale; leave it out .*3.0"):
        resolve(job(guidance=3.0), wan)


def test_the_digest_follows_every_setting_and_nothing_else(wan, tmp_path):
    def of(weights="w", **settings):
        own = job(**settings)
        (shot,) = resolve(own, wan)
        return digest(shot.settings(own, wan, weights=weights, device="cpu", dtype="float32"))

    base = of()
    assert of() == base
    assert of(resume=True, overwrite=True) == base
    other = [
        of(weights="v"), of(seed=1), of(steps=3), of(frames=9), of(size=(32, 32)), of(guidance=1.0), of(negative="n"),
        of(fps=8), of(gif=True), of(compare=True), of(frames_dir=tmp_path), of(accel=Acceleration(density=0.5)),
        of(accel=Acceleration(method="dense")), of(accel=Acceleration(dense_layers=1)),
        of(accel=Acceleration(backend="gather")),
    ]  # fmt: skip
    assert len({base, *other}) == len(other) + 1


def test_the_digest_follows_the_image_file(configs_only, tmp_path):
    folder = configs_only("i", "WanPipeline", VAE, {"patch_size": [1, 2, 2], "in_channels": 36})
    info = inspect_model(str(folder), image=True)
    image = tmp_path / "a.png"
    digests = set()
    for content in (b"1", b"2"):
        image.write_bytes(content)
        own = job(image=str(image))
        settings = resolve(own, info)[0].settings(own, info, weights="w", device="cpu", dtype="float32")
        json.dumps(settings)
        digests.add(digest(settings))
    assert len(digests) == 2


def test_a_comparison_of_an_image_without_a_method_is_refused(wan):
    with pytest.raises(UsageError, match=r"line 1 runs dense .*a single frame has no default method"):
        resolve(job(compare=True, frames=1), wan)


def test_joint_text_counts_in_the_planned_density(configs_only):
    vae = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
    folder = configs_only("h", "HunyuanVideoPipeline", vae, {"patch_size": 2, "patch_size_t": 1})
    (shot,) = resolve(job(size=(512, 320), frames=33), inspect_model(str(folder)))
    assert shot.choice.density > resolve(job(size=(512, 320), frames=33), _without_text(folder))[0].choice.density


def _without_text(folder):
    info = inspect_model(str(folder))
    info.call_arguments["max_sequence_length"] = 0
    return info
