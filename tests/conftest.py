"""Tiny pipelines on disk, random weights, made once per session; no network."""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker: several workers with a thread per core each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files of ten CPU seconds and more, the longest first: begun last, one of them would leave a worker idle.
LONGEST = [
    "kernels/block_sparse/test_triton.py",
    "kernels/quant/test_triton.py",
    "dit_accel/test_simulated.py",
    "kernels/block_sparse/test_tiers.py",
    "kernels/block_sparse/test_triton_compile.py",
    "dit_accel/diffusers/test_compile.py",
    "dit_accel/diffusers/test_family_models.py",
    "cli/test_tune.py",
    "cli/test_plan.py",
    "eval/shapes/test_job.py",
    "eval/test_methods.py",
]

TRANSFORMERS = {
    "WanPipeline": "WanTransformer3DModel",
    "WanImageToVideoPipeline": "WanTransformer3DModel",
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
    "CogVideoXPipeline": "CogVideoXTransformer3DModel",
    "FluxPipeline": "FluxTransformer2DModel",
}


def pytest_configure(config):
    # By itself --dist loadfile begins with the files of most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """Folder of a text-to-video WanPipeline: sizes in multiples of 16, frames 1 + 4 n, three layers."""
    from tiny_models import tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny-wan")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_i2v(tmp_path_factory):
    """Folder of a Wan 2.2 style image-to-video pipeline: no image encoder, latents, mask and first frame as input."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    from tiny_models import WAN, tiny_pipeline

    parts = tiny_pipeline().components
    parts.pop("transformer_2")
    parts["transformer"] = WanTransformer3DModel(**{**WAN, "in_channels": 12})
    folder = tmp_path_factory.mktemp("tiny-wan-i2v")
    WanImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory):
    """Folder of a text-to-image AuraFlowPipeline: 16x16 by default, sizes in multiples of 4."""
    import torch
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    from tiny_models import tiny_tokenizer

    torch.manual_seed(0)
    text = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-image")
    AuraFlowPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=UMT5EncoderModel(text).eval(), vae=vae.eval(),
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def configs_only(tmp_path):
    """A function that writes a model folder of configuration files without weights."""

    def write(name, pipeline, vae, transformer, parts=("transformer", "vae")):
        folder = tmp_path / name
        index = {"_class_name": pipeline, **{part: ["diffusers", "Any"] for part in parts}}
        transformer = {"_class_name": TRANSFORMERS.get(pipeline), **transformer}
        for file, data in (("model_index", index), ("vae/config", vae), ("transformer/config", transformer)):
            path = folder / f"{file}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
        return folder

    return write
