import pytest

from dit_accel.errors import UsageError
from dit_accel.layout import Layout
from dit_accel.pipelines.geometry import Geometry, geometry
from dit_accel.pipelines.model import inspect_model

CONFIGS = {
    "wan": (
        "WanPipeline",
        {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "temperal_downsample": [False, True, True]},
        {"patch_size": [1, 2, 2], "in_channels": 16},
        (832, 480, 81),
        (21, 30, 52),
    ),
    "hunyuan": (
        "HunyuanVideoPipeline",
        {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4, "block_out_channels": [1, 1, 1, 1]},
        {"patch_size": 2, "patch_size_t": 1},
        (1280, 720, 129),
        (33, 45, 80),
    ),
    "cogvideox": (
        "CogVideoXPipeline",
        {"temporal_compression_ratio": 4, "block_out_channels": [1, 1, 1, 1]},
        {"patch_size": 2, "patch_size_t": None},
        (720, 480, 49),
        (13, 30, 45),
    ),
    "ltx": (
        "LTXPipeline",
        {"spatio_temporal_scaling": [True, True, True, False], "patch_size": 4, "patch_size_t": 1},
        {"patch_size": 1, "patch_size_t": 1},
        (704, 512, 161),
        (21, 16, 22),
    ),
    "flux": (
        "FluxPipeline",
        {"block_out_channels": [1, 1, 1, 1]},
        {"patch_size": 1, "in_channels": 64},
        (1024, 512, 1),
        (1, 32, 64),
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        {"block_out_channels": [1, 1, 1, 1]},
        {"patch_size": 2},
        (1024, 512, 1),
        (1, 32, 64),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_token_grids_follow_from_the_configuration(configs_only, name):
    pipeline, vae, transformer, (width, height, frames), grid = CONFIGS[name]
    geo = geometry(inspect_model(str(configs_only(name, pipeline, vae, transformer))))
    geo.check_size(width, height)
    geo.check_frames(frames)
    assert geo.layout(width, height, frames) == Layout(grid=grid)


def test_the_nearest_size_is_named():
    geo = Geometry(8, 4, (1, 2, 2), 16)
    with pytest.raises(UsageError, match=r"--size 830x481 .*multiples of 16; the nearest allowed size is 832x480"):
        geo.check_size(830, 481)
    with pytest.raises(UsageError, match="nearest allowed size is 16x32"):
        geo.check_size(1, 30)
    with pytest.raises(UsageError, match="line 4: size"):
        geo.check_size(1, 30, "line 4: size")


def test_odd_sides_are_refused_where_the_model_would_take_them():
    with pytest.raises(UsageError, match=r"H.264 video needs even sides; .*32x32"):
        Geometry(1, 1, (1, 1, 1), 1).check_size(33, 32)


@pytest.mark.parametrize(("frames", "near"), [(80, "77 and 81"), (2, "1 and 5"), (84, "81 and 85")])
def test_the_nearest_frame_counts_are_named(frames, near):
    with pytest.raises(UsageError, match=f"--frames {frames} .*1 plus a multiple of 4; .* {near}"):
        Geometry(8, 4, (1, 2, 2), 16).check_frames(frames)


@pytest.mark.parametrize("frames", [0, -3])
def test_no_frames_at_all(frames):
    with pytest.raises(UsageError, match="at least 1"):
        Geometry(8, 4, (1, 2, 2), 16).check_frames(frames)


def test_a_configuration_that_does_not_say_gives_no_layout():
    assert Geometry(None, None, None).layout(64, 64, 1) is None


def test_the_divisor_a_pipeline_checks_for_is_found(configs_only):
    """Wan's pipeline demands 16 also where its VAE and patch would take 8."""
    vae = {"scale_factor_spatial": 8, "scale_factor_temporal": 2}
    info = inspect_model(str(configs_only("m", "WanPipeline", vae, {"patch_size": [1, 1, 1]})))
    geo = geometry(info)
    assert geo.multiple == 16
    assert geo.layout(80, 64, 65) == Layout(grid=(33, 8, 10))


@pytest.mark.parametrize(("width", "height", "frames"), [(1_600_000, 1_280_000, 9), (832, 480, 10**9 + 1)])
def test_more_tokens_than_can_be_counted_are_refused(width, height, frames):
    with pytest.raises(UsageError, match=r"tokens, and attention counts to 2,147,483,647 at most"):
        Geometry(8, 4, (1, 2, 2)).layout(width, height, frames)
    assert Geometry(8, 4, (1, 2, 2)).layout(832, 480, 81) == Layout(grid=(21, 30, 52))
