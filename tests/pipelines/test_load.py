import shutil

import pytest
import torch

from dit_accel.errors import DitAccelError, UsageError
from dit_accel.pipelines.load import load, pick_device, pick_dtype


def test_the_cpu_is_float32_and_a_gpu_bfloat16():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "nonsense:1"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(UsageError, match=device):
        pick_device(device)


def test_an_unknown_dtype():
    with pytest.raises(UsageError, match="dtype 'int8' is unknown; use auto, float32"):
        pick_dtype("int8", torch.device("cpu"))


def test_a_folder_is_loaded_in_the_dtype_asked_for_and_wans_vae_stays_float32(tiny_wan):
    pipe = load(str(tiny_wan), dtype="bfloat16", device="cpu")
    assert type(pipe).__name__ == "WanPipeline"
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32,
    )  # fmt: skip


def test_an_image_to_video_folder(tiny_wan_i2v):
    assert type(load(str(tiny_wan_i2v), device="cpu", image=True)).__name__ == "WanImageToVideoPipeline"


@pytest.fixture
def broken(tiny_wan, tmp_path):
    """A copy of the tiny Wan, its folder name ``m``."""
    return shutil.copytree(tiny_wan, tmp_path / "m")


def weights(folder, part="transformer"):
    return next((folder / part).glob("*.safetensors"))


def test_missing_weights_are_told_with_the_model(broken):
    weights(broken).unlink()
    with pytest.raises(DitAccelError, match=r"m could not be loaded as a WanPipeline: transformer has no weights"):
        load(str(broken), device="cpu")


def test_weights_cut_short_are_named(broken):
    file = weights(broken, "vae")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DitAccelError, match=rf"vae/{file.name} is damaged .*download it again"):
        load(str(broken), device="cpu")


def test_pickled_weights_are_not_read(broken):
    file = weights(broken)
    torch.save({}, file.with_name("diffusion_pytorch_model.bin"))
    file.unlink()
    with pytest.raises(DitAccelError, match=r"only pickled weights .* convert to safetensors"):
        load(str(broken), device="cpu")


def test_gated_weights_say_where_to_ask(broken, monkeypatch):
    from diffusers import WanPipeline
    from huggingface_hub.errors import GatedRepoError

    def from_pretrained(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError, "403")

    monkeypatch.setattr(WanPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(DitAccelError, match=r"gated.*hf auth login"):
        load(str(broken), device="cpu")


def test_the_command_ends_with_1_for_broken_and_2_for_absent_models(broken, tmp_path, capsys):
    from dit_accel.cli import main

    (tmp_path / "p.txt").write_text("a ball\n")
    small = ["--size", "32x48", "--frames", "5", "--steps", "1", "--method", "dense", "-o", str(tmp_path / "out")]
    weights(broken).unlink()
    assert main(["render", str(tmp_path / "p.txt"), "--model", str(broken), *small]) == 1
    assert "has no weights" in capsys.readouterr().err
    assert main(["render", str(tmp_path / "p.txt"), "--model", str(tmp_path / "absent"), *small]) == 2
    assert "no model folder" in capsys.readouterr().err
