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


def test_missing_weights_are_told_with_the_model(tiny_wan, tmp_path):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(tiny_wan, folder)
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DitAccelError, match=r"m could not be loaded as a WanPipeline"):
        load(str(folder), device="cpu")
