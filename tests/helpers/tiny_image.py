"""Tiny image transformers, none of them square but one."""

from __future__ import annotations

import diffusers
import torch
from tiny_case import Case, at, case

from dit_accel.layout import Layout, Segment
from tiny_models import randn, tiny_transformer


def ids(height, width, image=0, axes=3):
    """Position of every token of an image as Flux counts them: which image, row, column."""
    found = torch.zeros(height, width, axes)
    found[..., 0] = image
    found[..., 1] += torch.arange(height)[:, None]
    found[..., 2] += torch.arange(width)
    return found.reshape(-1, axes)


@case
def flux(batch):
    model, call, layout = tiny_transformer("flux", batch)
    return Case(model, call, layout, axes="bnc")


@case
def flux_kontext(batch):
    model, call, _ = tiny_transformer("flux", batch)
    call["img_ids"] = torch.cat([ids(9, 11), ids(4, 5, image=1)])
    call["hidden_states"] = randn(batch, 99 + 20, 4)
    segments = [Segment("text", 6), Segment("main", (1, 9, 11)), Segment("reference", (1, 4, 5))]
    return Case(model, call, Layout(segments=segments), axes="bnc")


@case
def flux2(batch):
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 99 + 20, 4), "encoder_hidden_states": randn(batch, 6, 16),
        "timestep": at(batch, 0.5), "img_ids": torch.cat([ids(9, 11, axes=4), ids(4, 5, image=10, axes=4)]),
        "txt_ids": torch.zeros(6, 4), "guidance": at(batch, 4.0),
    }  # fmt: skip
    segments = [Segment("text", 6), Segment("main", (1, 9, 11)), Segment("reference", (1, 4, 5))]
    return Case(model, call, Layout(segments=segments), axes="bnc")


@case
def chroma(batch):
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    mask = torch.ones(batch, 6 + 99, dtype=torch.bool)
    mask[0, 4:6] = False
    call = {
        "hidden_states": randn(batch, 99, 4), "encoder_hidden_states": randn(batch, 6, 16), "timestep": at(batch, 0.5),
        "img_ids": ids(9, 11), "txt_ids": torch.zeros(6, 3), "attention_mask": mask,
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=6, text_first=True), axes="bnc", turn=6)


@case
def sd3(batch):
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "encoder_hidden_states": randn(batch, 6, 16),
        "pooled_projections": randn(batch, 16), "timestep": at(batch),
    }  # fmt: skip
    image = {"transformer_blocks.0.attn2": Layout(grid=(1, 9, 11))}
    return Case(model, call, Layout(grid=(1, 9, 11), text=6), axes="bchw", layouts=image)


def _qwen(batch, shapes, segments):
    model, call, _ = tiny_transformer("qwen-image", batch)
    tokens = sum(s.tokens for s in segments if s.kind != "text")
    call |= {"img_shapes": [shapes] * batch, "hidden_states": randn(batch, tokens, 16)}
    return Case(model, call, Layout(segments=segments), axes="bnc")


@case
def qwen_image(batch):
    return _qwen(batch, [(1, 8, 11)], [Segment("text", 6), Segment("main", (1, 8, 11))])


@case
def qwen_image_padded(batch):
    found = qwen_image(batch)
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    found.call["encoder_hidden_states_mask"] = mask
    found.turn = 6
    return found


@case
def qwen_image_edit(batch):
    segments = [Segment("text", 6), Segment("main", (1, 8, 11)), Segment("reference", (1, 4, 6)),
                Segment("reference", (1, 3, 5))]  # fmt: skip
    return _qwen(batch, [(1, 8, 11), (1, 4, 6), (1, 3, 5)], segments)


@case
def pixart(batch):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "encoder_hidden_states": randn(batch, 6, 16), "timestep": at(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "attention_mask": torch.ones(batch, 99),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11)), axes="bchw")


def _hidream(batch, height, width):
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[16, 8], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(22, 22), llama_layers=(0, 1),
        force_inference_output=True,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, height, width), "timesteps": at(batch),
        "encoder_hidden_states_t5": randn(batch, 6, 16), "encoder_hidden_states_llama3": randn(2, batch, 4, 8),
        "pooled_embeds": randn(batch, 16),
    }  # fmt: skip
    return model, call


@case
def hidream(batch):
    model, call = _hidream(batch, 18, 22)
    segments = [Segment("main", (1, 9, 11)), Segment("padding", 22), Segment("text", 14)]
    return Case(model, call, Layout(segments=segments), axes="bchw", words="encoder_hidden_states_t5")


@case
def hidream_square(batch):
    model, call = _hidream(batch, 18, 18)
    return Case(model, call, Layout(grid=(1, 9, 9), text=14), axes="bchw", words="encoder_hidden_states_t5")


@case
def auraflow(batch):
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "encoder_hidden_states": randn(batch, 6, 16),
        "timestep": at(batch, 0.5),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=14, text_first=True), axes="bchw")


@case
def lumina2(batch):
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=0,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    mask = torch.ones(batch, 9, dtype=torch.bool)
    mask[:, 6:] = False
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "timestep": at(batch, 0.5),
        "encoder_hidden_states": randn(batch, 9, 16), "encoder_attention_mask": mask,
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=6, text_first=True), axes="bchw")


def _cogview(batch, cls, **config):
    model = cls(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=16, **config,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "encoder_hidden_states": randn(batch, 6, 16), "timestep": at(batch),
        **{name: torch.full((batch, 2), 20.0) for name in ("original_size", "target_size", "crop_coords")},
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=6, text_first=True), axes="bchw")


@case
def cogview3plus(batch):
    return _cogview(batch, diffusers.CogView3PlusTransformer2DModel)


@case
def cogview4(batch):
    return _cogview(batch, diffusers.CogView4Transformer2DModel, rope_axes_dim=(8, 8))


@case
def z_image(batch):
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=0, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    texts = [randn(5 if i == 0 else 40, 16) for i in range(batch)]  # padded to 32 and to 64
    call = {"x": [randn(4, 1, 18, 22) for _ in range(batch)], "t": at(batch, 0.5), "cap_feats": texts}
    segments = [Segment("main", (1, 9, 11)), Segment("padding", 29), Segment("text", 64)]
    return Case(
        model, call, Layout(segments=segments), axes="[cthw", latents="x", words="cap_feats",
        out=lambda output: torch.stack(list(output.sample)),
    )  # fmt: skip


def _flux_like(batch, cls, **config):
    model = cls(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=[4, 4, 8], **config,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 99, 4), "encoder_hidden_states": randn(batch, 6, 16), "timestep": at(batch, 0.5),
        "img_ids": ids(9, 11), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=6, text_first=True), axes="bnc")


@case
def longcat_image(batch):
    return _flux_like(batch, diffusers.LongCatImageTransformer2DModel, pooled_projection_dim=16)


@case
def ovis_image(batch):
    return _flux_like(batch, diffusers.OvisImageTransformer2DModel, out_channels=4)


@case
def bria(batch):
    return _flux_like(batch, diffusers.BriaTransformer2DModel)


@case
def hunyuan_image(batch):
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=16, text_embed_2_dim=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    mask, glyphs = torch.ones(batch, 6), torch.ones(batch, 3)
    mask[0, 4:] = 0
    glyphs[0, 1:] = 0
    call = {
        "hidden_states": randn(batch, 4, 18, 22), "timestep": at(batch), "encoder_hidden_states": randn(batch, 6, 16),
        "encoder_attention_mask": mask, "encoder_hidden_states_2": randn(batch, 3, 8),
        "encoder_attention_mask_2": glyphs,
    }  # fmt: skip
    return Case(model, call, Layout(grid=(1, 9, 11), text=9), axes="bchw")
