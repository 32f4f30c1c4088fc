"""Video transformers: one row each, and how the token grid follows from the arguments of their forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...layout import Layout, Segment
from .row import Family, patches


def _bcthw(config: Any, hidden: Any) -> Layout:
    """Latents (B, C, T, H, W) over patch_size; text has a cross-attention of its own."""
    return Layout(grid=patches(hidden.shape[2:], config.patch_size))


def _allegro(config: Any, hidden: Any) -> Layout:
    """Latents (B, C, T, H, W) over patch_size_t and patch_size; a patch is one frame whatever patch_size_t says."""
    return Layout(grid=patches(hidden.shape[2:], (1, config.patch_size, config.patch_size)))


def _btchw(config: Any, hidden: Any) -> Layout:
    """Latents (B, T, C, H, W) over patch_size; text has a cross-attention of its own."""
    frames, _, height, width = hidden.shape[1:]
    return Layout(grid=patches((frames, height, width), config.patch_size))


def _kandinsky(config: Any, hidden: Any) -> Layout:
    """Latents (B, T, H, W, C) over patch_size."""
    return Layout(grid=patches(hidden.shape[1:4], config.patch_size))


def _hunyuan_video(config: Any, hidden: Any, text: Any) -> Layout:
    """Latents (B, C, T, H, W) over patch_size_t and patch_size, then the text (B, N, D)."""
    return Layout(grid=patches(hidden.shape[2:], _patch(config)), text=text.shape[1])


def _hunyuan_video15(config: Any, hidden: Any, text: Any, glyphs: Any, image: Any) -> Layout:
    """Latents (B, C, T, H, W) over patch_size_t and patch_size, then image, glyph and text tokens, live first."""
    return Layout(grid=patches(hidden.shape[2:], _patch(config)), text=text.shape[1] + glyphs.shape[1] + image.shape[1])


def _framepack(config: Any, hidden: Any, text: Any, image: Any, clean: Any, twice: Any, fourfold: Any) -> Layout:
    """History 4x, 2x and clean as a prefix, latents (B, C, T, H, W) over the patch, then image and text tokens."""
    # The three projections of the history are built for latents in patches of (1, 2, 2), whatever the configuration.
    shrunk = ((fourfold, (4, 8, 8)), (twice, (2, 4, 4)), (clean, (1, 2, 2)))
    prefix = sum(_padded(x, step) for x, step in shrunk if x is not None)
    grid = patches(hidden.shape[2:], _patch(config))
    return Layout(grid=grid, prefix=prefix, text=text.shape[1] + image.shape[1])


def _mochi(config: Any, hidden: Any, text: Any) -> Layout:
    """Latents (B, C, T, H, W), H and W over patch_size, then the sample's live text; one call per sample."""
    return Layout(grid=patches(hidden.shape[2:], (1, config.patch_size, config.patch_size)), text=text.shape[1])


def _cogvideox(config: Any, hidden: Any, text: Any) -> Layout:
    """The text (B, N, D), then latents (B, T, C, H, W) over patch_size_t and patch_size."""
    frames, _, height, width = hidden.shape[1:]
    patch = (config.get("patch_size_t") or 1, config.patch_size, config.patch_size)
    # An incomplete last temporal patch is padded by the model, so frames round up.
    frames = -(-frames // patch[0]) * patch[0]
    return Layout(grid=patches((frames, height, width), patch), text=text.shape[1], text_first=True)


def _easyanimate(config: Any, hidden: Any, text: Any, more: Any) -> Layout:
    """The text tokens of both encoders, then latents (B, C, T, H, W), H and W over patch_size."""
    words = text.shape[1] + (0 if more is None else more.shape[1])
    grid = patches(hidden.shape[2:], (1, config.patch_size, config.patch_size))
    return Layout(grid=grid, text=words, text_first=True)


def _ltx(config: Any, frames: int | None, height: int | None, width: int | None) -> Layout | None:
    """The arguments num_frames, height and width; None where coordinates replace them."""
    if frames is None or height is None or width is None:
        return None
    return Layout(grid=(frames, height, width))


def _motif(config: Any, hidden: Any, text: Any, image: Any) -> tuple[Layout, Layout]:
    """Latents (B, C, T, H, W) over the patch, then image and text; decoder blocks see the encoder's grid instead."""
    grid = patches(hidden.shape[2:], _patch(config))
    words = text.shape[1] + (0 if image is None else image.shape[1])
    return Layout(grid=grid, text=words), Layout(segments=[Segment("main", grid), Segment("encoder", grid)])


def _helios(config: Any, hidden: Any, *history: Any) -> Layout:
    """Long, mid and short history as a prefix, then latents (B, C, T, H, W) over patch_size."""
    prefix = 0
    for shrink, x, indices in zip((4, 2, 1), history[::2], history[1::2], strict=True):
        if x is not None and indices is not None:
            prefix += _padded(x, [shrink * size for size in config.patch_size])
    return Layout(grid=patches(hidden.shape[2:], config.patch_size), prefix=prefix)


def _padded(x: Any, step: Sequence[int]) -> int:
    """Tokens of latents (B, C, T, H, W) that the model pads to whole steps."""
    t, h, w = (-(-size // by) for size, by in zip(x.shape[2:], step, strict=True))
    return t * h * w


def _patch(config: Any) -> tuple[int, int, int]:
    return config.patch_size_t, config.patch_size, config.patch_size


_HISTORY = tuple(
    name for term in ("long", "mid", "short") for name in (f"latents_history_{term}", f"indices_latents_history_{term}")
)

FAMILIES = (
    Family(
        name="wan",
        models=("WanTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
    ),
    Family(
        name="chronoedit",
        models=("ChronoEditTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
    ),
    Family(
        name="wan-vace",
        models=("WanVACETransformer3DModel",),
        sites=(r"vace_blocks\.\d+\.attn1", r"blocks\.\d+\.attn1"),
        cross_sites=r"(vace_)?blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
    ),
    Family(
        name="wan-animate",
        models=("WanAnimateTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
        stock="face adapter (per frame)",
    ),
    Family(
        name="skyreels-v2",
        models=("SkyReelsV2Transformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
        same_mask=True,
        notes="a block-causal mask (num_frame_per_block > 1) runs dense",
    ),
    Family(
        name="hunyuan-video",
        models=("HunyuanVideoTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_hunyuan_video,
        text="last",
        masks_text=True,
        stock="token refiner",
    ),
    Family(
        name="hunyuan-video-1.5",
        models=("HunyuanVideo15Transformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
        layout=_hunyuan_video15,
        text="last",
        masks_text=True,
        same_mask=True,
        stock="token refiner",
    ),
    Family(
        name="hunyuan-framepack",
        models=("HunyuanVideoFramepackTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=(
            "hidden_states", "encoder_hidden_states", "image_embeds", "latents_clean", "latents_history_2x",
            "latents_history_4x",
        ),
        layout=_framepack,
        text="last",
        masks_text=True,
        cuts_text=True,
        stock="token refiner",
    ),
    Family(
        name="mochi",
        models=("MochiTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_mochi,
        text="last",
        cuts_text=True,
        notes="one call per sample",
    ),
    Family(
        name="cogvideox",
        models=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_cogvideox,
        text="first",
        stock="ConsisID's face attention",
    ),
    Family(
        name="ltx",
        models=("LTXVideoTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("num_frames", "height", "width"),
        layout=_ltx,
    ),
    Family(
        name="ltx2",
        models=("LTX2VideoTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("num_frames", "height", "width"),
        layout=_ltx,
        same_mask=True,
        stock="audio, audio to video, video to audio",
        notes="video_self_attention_mask runs dense",
    ),
    Family(
        name="cosmos",
        models=("CosmosTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_bcthw,
        notes="Cosmos 1, 2 and 2.5",
    ),
    Family(
        name="allegro",
        models=("AllegroTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_allegro,
        same_mask=True,
    ),
    Family(
        name="easyanimate",
        models=("EasyAnimateTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_t5"),
        layout=_easyanimate,
        text="first",
    ),
    Family(
        name="kandinsky5",
        models=("Kandinsky5Transformer3DModel",),
        sites=r"visual_transformer_blocks\.\d+\.self_attention",
        cross_sites=r"visual_transformer_blocks\.\d+\.cross_attention",
        reads=("hidden_states",),
        layout=_kandinsky,
        stock="text blocks",
        notes="the model's own sparse attention (NABLA) runs as it is; switch it off for ours",
    ),
    Family(
        name="kandinsky6",
        models=("Kandinsky6Transformer3DModel",),
        sites=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        cross_sites=r"visual_transformer_blocks\.\d+\.video_dec_block\.cross_attention",
        reads=("hidden_states",),
        layout=_kandinsky,
        stock="text blocks, audio, audio to video, video to audio",
    ),
    Family(
        name="anyflow",
        models=("AnyFlowTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_btchw,
    ),
    Family(
        name="motif-video",
        models=("MotifVideoTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        cross_sites=r"(single_)?transformer_blocks\.\d+\.cross_attn",
        reads=("hidden_states", "encoder_hidden_states", "image_embeds"),
        layout=_motif,
        text="last",
        masks_text=True,
    ),
    Family(
        name="helios",
        models=("HeliosTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states", *_HISTORY),
        layout=_helios,
    ),
)  # fmt: skip
