"""Tiny random-weight diffusers models and pipelines: every architecture, no download, milliseconds to build."""

from __future__ import annotations

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel import Layout

VIDEO = {"wan", "hunyuan-video", "cogvideox", "ltx"}
FAMILIES = ("wan", "hunyuan-video", "cogvideox", "ltx", "flux", "qwen-image")
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def tiny_transformer(family, batch=2, seed=0):
    """(model in eval mode, forward's keyword arguments, the layout its attention must be told)."""
    torch.manual_seed(seed)
    model, call, layout = _BUILDERS[family](batch)
    return model.eval(), call, layout


def randn(*shape):
    return torch.randn(*shape)


def _wan(batch):
    call = {"hidden_states": randn(batch, 4, 3, 10, 12), "encoder_hidden_states": randn(batch, 7, 16)}
    call["timestep"] = torch.full((batch,), 500)
    return diffusers.WanTransformer3DModel(**WAN), call, Layout(grid=(3, 5, 6))


def _hunyuan_video(batch):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    mask = torch.ones(batch, 9)
    mask[0, 5:] = 0  # one sample is padded, the others are not
    call = {
        "hidden_states": randn(batch, 4, 2, 5, 7), "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 9, 16), "encoder_attention_mask": mask,
        "pooled_projections": randn(batch, 8), "guidance": torch.full((batch,), 6000.0),
    }  # fmt: skip
    return model, call, Layout(grid=(2, 5, 7), text=9)


def _cogvideox(batch):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=3, sample_width=14, sample_height=10, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3, 4, 10, 14), "encoder_hidden_states": randn(batch, 8, 8),
        "timestep": torch.full((batch,), 500),
    }  # fmt: skip
    return model, call, Layout(grid=(3, 5, 7), text=8, text_first=True)


def _ltx(batch):
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, qk_norm="rms_norm_across_heads", caption_channels=16,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3 * 5 * 7, 8), "encoder_hidden_states": randn(batch, 9, 16),
        "timestep": torch.full((batch,), 500), "encoder_attention_mask": torch.ones(batch, 9),
        "num_frames": 3, "height": 5, "width": 7,
    }  # fmt: skip
    return model, call, Layout(grid=(3, 5, 7))


def _flux(batch):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    ids = torch.zeros(9, 11, 3)
    ids[..., 1] += torch.arange(9)[:, None]
    ids[..., 2] += torch.arange(11)[None]
    call = {
        "hidden_states": randn(batch, 9 * 11, 4), "encoder_hidden_states": randn(batch, 6, 16),
        "pooled_projections": randn(batch, 16), "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return model, call, Layout(grid=(1, 9, 11), text=6, text_first=True)


def _qwen_image(batch):
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 8 * 11, 16), "encoder_hidden_states": randn(batch, 6, 16),
        "encoder_hidden_states_mask": None, "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 8, 11)]] * batch,
    }  # fmt: skip
    return model, call, Layout(grid=(1, 8, 11), text=6, text_first=True)


_BUILDERS = {
    "wan": _wan,
    "hunyuan-video": _hunyuan_video,
    "cogvideox": _cogvideox,
    "ltx": _ltx,
    "flux": _flux,
    "qwen-image": _qwen_image,
}


def tiny_pipeline(family="wan", two_transformers=False, seed=0):
    """A whole pipeline on random weights; only Wan. ``two_transformers``: as Wan 2.2, the second below noise 0.75."""
    if family != "wan":
        raise ValueError(f"no tiny pipeline for {family!r}; there is one for 'wan'")
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
                           num_res_blocks=1, temperal_downsample=[False, True, True])  # fmt: skip
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=UMT5EncoderModel(config).eval(),
        transformer=diffusers.WanTransformer3DModel(**WAN),
        transformer_2=diffusers.WanTransformer3DModel(**WAN) if two_transformers else None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.75 if two_transformers else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_tokenizer():
    """Words with fixed ids. A trained tokenizer would give other ids from build to build."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = "<pad> </s> <unk> a red blue green ball cat dog runs falls on the grass sky fast slow".split()  # noqa: SIM905
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def tiny_run(pipe, steps=4, **settings):
    """Latents of a short run: (1, C, T, H, W) float32, the same for the same arguments."""
    usual = {"prompt": "a red ball runs", "height": 32, "width": 48, "num_frames": 9, "guidance_scale": 4.0}
    return pipe(
        negative_prompt="slow", num_inference_steps=steps, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(0), **{**usual, **settings},
    ).frames  # fmt: skip
