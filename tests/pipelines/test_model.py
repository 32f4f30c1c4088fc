import json

import pytest

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.pipelines import mini
from dit_accel.pipelines.model import inspect_model

WAN_VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "z_dim": 16}
WAN = {"patch_size": [1, 2, 2], "in_channels": 16}


def test_a_folder_is_read_without_its_weights(configs_only):
    info = inspect_model(str(configs_only("m", "WanPipeline", WAN_VAE, WAN)))
    assert info.is_video
    assert info.pipeline_class.__name__ == "WanPipeline"
    assert (info.fps, info.revision, info.vae["z_dim"]) == (16, None, 16)


def test_the_bundled_model_is_the_default_and_brings_its_settings():
    info = inspect_model(None)
    assert info.name == "bundled"
    assert info.defaults["num_frames"] == mini.defaults()["num_frames"]
    assert info.fps == mini.defaults()["fps"]


def test_a_missing_bundled_model_says_what_to_do(monkeypatch):
    def absent():
        raise FileNotFoundError("gone")

    monkeypatch.setattr(mini, "path", absent)
    with pytest.raises(UsageError, match=r"bundled model is not installed .*--model"):
        inspect_model(None)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "has space/x"])
def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(name):
    with pytest.raises(UsageError, match="no model folder at"):
        inspect_model(name)


def test_a_hub_id_offline_says_so():
    with pytest.raises(UsageError, match=r"'no-such/model-anywhere' is neither a folder here .*HF_HUB_OFFLINE is set"):
        inspect_model("no-such/model-anywhere")


def test_a_hub_id_in_the_cache_works_offline(configs_only, monkeypatch, tmp_path):
    """Only configuration files are asked for; the commit is kept."""
    import huggingface_hub

    source = configs_only("m", "WanPipeline", WAN_VAE, WAN)
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    asked = {}

    def download(model, allow_patterns):
        asked[model] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    info = inspect_model("o/n")
    assert (info.source, info.revision) == ("o/n", "abc123")
    assert not any("safetensors" in pattern for pattern in asked["o/n"])


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(UsageError, match=r"has no model_index.json"):
        inspect_model(str(tmp_path))


def test_a_broken_configuration_is_named(configs_only):
    folder = configs_only("m", "WanPipeline", WAN_VAE, WAN)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*vae/config.json"):
        inspect_model(str(folder))


def test_an_unknown_pipeline_class(configs_only):
    with pytest.raises(UnsupportedError, match=r"'NoSuchPipeline', which diffusers [\d.]+ does not have"):
        inspect_model(str(configs_only("m", "NoSuchPipeline", {}, {})))


def test_a_unet_pipeline_is_refused(configs_only):
    folder = configs_only("m", "StableDiffusionXLPipeline", {}, {}, parts=("unet", "vae"))
    with pytest.raises(UnsupportedError, match=r"StableDiffusionXLPipeline with unet; .* diffusion transformers only"):
        inspect_model(str(folder))


def test_an_image_selects_the_image_to_video_class(configs_only):
    folder = configs_only("m", "WanPipeline", WAN_VAE, {**WAN, "in_channels": 36})
    assert inspect_model(str(folder), image=True).pipeline_class.__name__ == "WanImageToVideoPipeline"
    folder = configs_only("n", "LTXPipeline", {}, {})
    assert inspect_model(str(folder), image=True).pipeline_class.__name__ == "LTXImageToVideoPipeline"
    folder = configs_only("o", "CogVideoXPipeline", {}, {})
    assert inspect_model(str(folder), image=True).pipeline_class.__name__ == "CogVideoXImageToVideoPipeline"


def test_a_wan_that_takes_frame_timesteps_takes_images(configs_only):
    folder = configs_only("m", "WanPipeline", WAN_VAE, WAN)
    index = json.loads((folder / "model_index.json").read_text()) | {"expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert inspect_model(str(folder), image=True).pipeline_class.__name__ == "WanImageToVideoPipeline"


def test_an_image_where_none_is_taken(configs_only):
    with pytest.raises(UnsupportedError, match="text-to-video only: its transformer takes 16 latent channels"):
        inspect_model(str(configs_only("m", "WanPipeline", WAN_VAE, WAN)), image=True)
    with pytest.raises(UsageError, match="is an image model"):
        inspect_model(str(configs_only("n", "FluxPipeline", {}, {})), image=True)
    with pytest.raises(UnsupportedError, match="no image-to-video pipeline for it"):
        inspect_model(str(configs_only("o", "MochiPipeline", {}, {})), image=True)


def test_an_image_to_video_model_asks_for_its_image(configs_only):
    folder = configs_only("m", "WanImageToVideoPipeline", WAN_VAE, {**WAN, "in_channels": 36})
    with pytest.raises(UsageError, match=r"is image-to-video .*--image FILE"):
        inspect_model(str(folder))


def test_the_fingerprint_follows_weights_and_configuration(configs_only):
    folder = configs_only("m", "WanPipeline", WAN_VAE, WAN)
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(b"0" * 200_000)
    first = inspect_model(str(folder)).fingerprint()
    assert inspect_model(str(folder)).fingerprint() == first
    weights.write_bytes(b"0" * 199_999 + b"1")
    second = inspect_model(str(folder)).fingerprint()
    (folder / "vae" / "config.json").write_text("{}")
    assert len({first, second, inspect_model(str(folder)).fingerprint()}) == 3
