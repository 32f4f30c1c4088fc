"""Tiny video transformers. Sizes differ on every axis, so that no transposed grid can pass."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_case import Case, at, case

from dit_accel.layout import Layout, Segment
from tiny_models import WAN, randn, tiny_transformer

GRID = Layout(grid=(3, 5, 6))


def _wan_like(batch: int, cls: Any, extra: dict | None = None, **config: Any) -> Case:
    call = {"hidden_states": randn(batch, 4, 3, 10, 12), "encoder_hidden_states": randn(batch, 7, 16)}
    return Case(cls(**{**WAN, "num_layers": 2, **config}), {**call, "timestep": at(batch), **(extra or {})}, GRID)


@case
def wan(batch):
    return _wan_like(batch, diffusers.WanTransformer3DModel)


@case
def wan_token_timesteps(batch):
    return _wan_like(batch, diffusers.WanTransformer3DModel, {"timestep": torch.full((batch, 90), 500.0)})


@case
def chronoedit(batch):
    return _wan_like(batch, diffusers.ChronoEditTransformer3DModel)


@case
def wan_vace(batch):
    control = {"control_hidden_states": randn(batch, 6, 3, 10, 12)}
    return _wan_like(
        batch, diffusers.WanVACETransformer3DModel, control, vace_layers=[0, 1], vace_in_channels=6, num_layers=2
    )


@case
def wan_animate(batch):
    model = diffusers.WanAnimateTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, qk_norm="rms_norm_across_heads",
        image_dim=8, rope_max_seq_len=32, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 12, 3, 10, 12), "timestep": at(batch),
        "encoder_hidden_states": randn(batch, 7, 16), "encoder_hidden_states_image": randn(batch, 5, 8),
        "pose_hidden_states": randn(batch, 4, 2, 10, 12), "face_pixel_values": randn(batch, 3, 5, 16, 16),
    }  # fmt: skip
    return Case(model, call, GRID)


@case
def skyreels_v2(batch):
    return _wan_like(batch, diffusers.SkyReelsV2Transformer3DModel)


@case
def hunyuan_video(batch):
    model, call, layout = tiny_transformer("hunyuan-video", batch)
    return Case(model, call, layout)


@case
def hunyuan_video_15(batch):
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 4, 8), target_size=16, task_type="t2v",
    )  # fmt: skip
    mask, glyphs = torch.ones(batch, 6), torch.ones(batch, 3)
    mask[0, 4:] = 0
    glyphs[0, 1:] = 0
    call = {
        "hidden_states": randn(batch, 4, 2, 5, 7), "timestep": at(batch), "encoder_hidden_states": randn(batch, 6, 16),
        "encoder_attention_mask": mask, "encoder_hidden_states_2": randn(batch, 3, 8),
        "encoder_attention_mask_2": glyphs, "image_embeds": torch.zeros(batch, 2, 8),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(2, 5, 7), text=11))


def _framepack(batch):
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    mask = torch.ones(batch, 9)
    mask[0, 5:] = 0
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "timestep": at(batch), "guidance": at(batch, 6000.0),
        "encoder_hidden_states": randn(batch, 9, 16), "encoder_attention_mask": mask,
        "pooled_projections": randn(batch, 8), "image_embeds": randn(batch, 3, 8),
        "indices_latents": torch.arange(3),
        "latents_clean": randn(batch, 4, 2, 10, 12), "indices_latents_clean": torch.arange(2),
        "latents_history_2x": randn(batch, 4, 2, 10, 12), "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": randn(batch, 4, 5, 10, 12), "indices_latents_history_4x": torch.arange(5),
    }  # fmt: skip
    # 4x: 2 x 2 x 2 of (5, 10, 12) in steps of (4, 8, 8); 2x: 1 x 3 x 3 in (2, 4, 4); clean: 2 x 5 x 6 in (1, 2, 2)
    return model, call, 8 + 9 + 60


@case
def framepack(batch):
    model, call, prefix = _framepack(batch)
    return Case(model, call, Layout(grid=(3, 5, 6), prefix=prefix, text=12))


@case
def framepack_one(batch):
    model, call, prefix = _framepack(1)
    return Case(model, call, Layout(grid=(3, 5, 6), prefix=prefix, text=8))


@case
def mochi(batch):
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=12, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    mask = torch.ones(batch, 8, dtype=torch.bool)
    mask[:, 5:] = False
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": at(batch), "encoder_attention_mask": mask,
    }  # fmt: skip
    return Case(model, call, Layout(grid=(3, 5, 6), text=5), words="", calls=batch)


@case
def cogvideox(batch):
    model, call, layout = tiny_transformer("cogvideox", batch)
    return Case(model, call, layout, axes="btchw")


@case
def cogvideox_1_5(batch):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=14, sample_height=10, sample_frames=9, patch_size=2, patch_size_t=2,
        temporal_compression_ratio=4, max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.rand(2 * 5 * 7, 8)
    call = {
        "hidden_states": randn(batch, 4, 4, 10, 14), "encoder_hidden_states": randn(batch, 8, 8),
        "timestep": at(batch), "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(2, 5, 7), text=8, text_first=True), axes="btchw")


@case
def consisid(batch):
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=14, sample_height=10, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3, 4, 10, 14), "encoder_hidden_states": randn(batch, 8, 8),
        "timestep": at(batch),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(3, 5, 7), text=8, text_first=True), axes="btchw")


@case
def ltx(batch):
    model, call, layout = tiny_transformer("ltx", batch)
    return Case(model, call, layout, axes="bnc")


@case
def ltx2(batch):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3 * 5 * 7, 8), "audio_hidden_states": randn(batch, 9, 4),
        "encoder_hidden_states": randn(batch, 6, 16), "audio_encoder_hidden_states": randn(batch, 6, 16),
        "timestep": at(batch), "num_frames": 3, "height": 5, "width": 7, "audio_num_frames": 9,
    }  # fmt: skip
    return Case(model, call, Layout(grid=(3, 5, 7)), axes="bnc")


def _cosmos(batch, extra=None, **config):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, **config,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "timestep": at(batch, 0.5), "fps": 30,
        "encoder_hidden_states": randn(batch, 7, 16), **(extra or {}),
    }  # fmt: skip
    return Case(model, call, GRID)


@case
def cosmos(batch):
    return _cosmos(batch, extra_pos_embed_type="learnable")


@case
def cosmos_2(batch):
    return _cosmos(batch, {"timestep": torch.full((batch, 1, 3, 1, 1), 0.5)}, extra_pos_embed_type=None)


@case
def cosmos_2_5(batch):
    context = randn(batch, 7, 16), randn(batch, 4, 8)
    return _cosmos(
        batch, {"encoder_hidden_states": context}, extra_pos_embed_type=None, img_context_dim_in=8,
        img_context_num_tokens=4, img_context_dim_out=32,
    )  # fmt: skip


def _allegro(batch):
    model = diffusers.AllegroTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=10, sample_width=12, sample_frames=3, caption_channels=16,
    )  # fmt: skip
    angles = [torch.rand(6, 4) for _ in range(3)]
    rope = tuple((a.cos(), a.sin()) for a in angles)
    grid = [torch.arange(n) for n in (3, 5, 6)]
    positions = torch.meshgrid(*grid, indexing="ij")
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "encoder_hidden_states": randn(batch, 7, 16),
        "timestep": at(batch), "image_rotary_emb": (rope, [p.reshape(1, -1) for p in positions]),
    }  # fmt: skip
    return model, call


@case
def allegro(batch):
    model, call = _allegro(batch)
    mask = torch.ones(batch, 3, 10, 12)
    return Case(model, {**call, "attention_mask": mask, "encoder_attention_mask": torch.ones(batch, 7)}, GRID)


@case
def easyanimate(batch):
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=2, time_embed_dim=8, text_embed_dim=16, text_embed_dim_t5=8,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "timestep": at(batch),
        "encoder_hidden_states": randn(batch, 5, 16),
        "encoder_hidden_states_t5": randn(batch, 4, 8),
    }  # fmt: skip
    return Case(model, call, Layout(grid=(3, 5, 6), text=9, text_first=True))


@case
def kandinsky5(batch):
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    call = {
        "hidden_states": randn(1, 3, 10, 12, 4), "encoder_hidden_states": randn(1, 7, 16), "timestep": at(1),
        "pooled_projections": randn(1, 8), "visual_rope_pos": [torch.arange(n) for n in (3, 5, 6)],
        "text_rope_pos": torch.arange(7),
    }  # fmt: skip
    return Case(model, call, GRID, axes="bthwc")


def _motif(batch, decoders):
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1 + decoders, num_decoder_layers=decoders, patch_size=2, patch_size_t=1, text_embed_dim=16,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True,
    ), {
        "hidden_states": randn(batch, 4, 3, 10, 12), "timestep": at(batch),
        "encoder_hidden_states": randn(batch, 9, 16),
    }  # fmt: skip


@case
def motif_video(batch):
    model, call = _motif(batch, 0)
    mask = torch.ones(batch, 9)
    mask[0, 5:] = 0
    call |= {"encoder_attention_mask": mask, "image_embeds": randn(batch, 3, 8)}
    return Case(model, call, Layout(grid=(3, 5, 6), text=12))


@case
def motif_video_decoder(batch):
    model, call = _motif(batch, 1)
    both = Layout(segments=[Segment("main", (3, 5, 6)), Segment("encoder", (3, 5, 6))])
    layouts = {"single_transformer_blocks.1.attn": both}
    return Case(model, call, Layout(grid=(3, 5, 6), text=9), layouts=layouts)


def _helios(batch):
    model = diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_dim=(4, 6, 6),
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 4, 3, 10, 12), "timestep": at(batch),
        "encoder_hidden_states": randn(batch, 7, 16), "indices_hidden_states": torch.arange(3).expand(batch, -1),
    }  # fmt: skip
    return model, call


@case
def helios(batch):
    model, call = _helios(batch)
    for term, frames in (("short", 2), ("mid", 3), ("long", 5)):
        call[f"latents_history_{term}"] = randn(batch, 4, frames, 10, 12)
        call[f"indices_latents_history_{term}"] = torch.arange(frames).expand(batch, -1)
    # long: 2 x 2 x 2 of (5, 10, 12) in steps of (4, 8, 8); mid: 2 x 3 x 3 in (2, 4, 4); short: 2 x 5 x 6 in (1, 2, 2)
    return Case(model, call, Layout(grid=(3, 5, 6), prefix=8 + 18 + 60))


@case
def kandinsky6(batch):
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False,
        in_audio_dim=4, out_audio_dim=4, model_dim_a=16, time_dim_a=16, ff_dim_a=16, axes_dims_a=(4, 6, 6),
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3, 10, 12, 4), "encoder_hidden_states": randn(batch, 7, 16),
        "pooled_projections": randn(batch, 8), "timestep": at(batch), "audio_hidden_states": randn(batch, 9, 4),
    }  # fmt: skip
    return Case(model, call, GRID, axes="bthwc")


@case
def anyflow(batch):
    model = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    call = {
        "hidden_states": randn(batch, 3, 4, 10, 12), "encoder_hidden_states": randn(batch, 7, 16),
        "timestep": torch.full((batch, 3), 500.0), "r_timestep": torch.full((batch, 3), 300.0),
    }  # fmt: skip
    return Case(model, call, GRID, axes="btchw")
