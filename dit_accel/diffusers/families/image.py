"""Image transformers: one row each, and how the token grid follows from the arguments of their forward."""

from __future__ import annotations

from typing import Any

import torch

from ...layout import Layout, Segment
from .row import Family, patches

# Z-Image pads its image and its text to multiples of this many tokens each, and attends to the padding.
_Z_IMAGE_MULTIPLE = 32


def _flux(config: Any, image_ids: Any, text_ids: Any) -> Layout:
    """The text, then a grid per image from the ids (image, y, x) of its tokens; later images are references."""
    ids = (image_ids[0] if image_ids.ndim == 3 else image_ids).cpu().long()
    sizes = torch.unique_consecutive(ids[:, 0], return_counts=True)[1]
    segments = [Segment("text", text_ids.shape[-2])] if text_ids.shape[-2] else []
    for number, rows in enumerate(ids.split(sizes.tolist())):
        columns = int(rows[:, 2].max() - rows[:, 2].min()) + 1
        grid = (1, max(len(rows) // columns, 1), columns)
        segments.append(Segment("reference" if number else "main", grid))
    return Layout(segments=segments)


def _qwen_image(config: Any, shapes: Any, text: Any) -> Layout:
    """The text, then the grids in img_shapes of the first sample; the first is generated, the others are references."""
    grids = shapes[0]
    grids = [grids] if isinstance(grids[0], int) else grids
    segments = [Segment("reference" if number else "main", tuple(grid)) for number, grid in enumerate(grids)]
    return Layout(segments=[Segment("text", text.shape[1]), *segments])


def _pixart(config: Any, hidden: Any) -> Layout:
    """Latents (B, C, H, W) over patch_size; text has a cross-attention of its own."""
    return Layout(grid=_image(config, hidden))


def _text_first(config: Any, hidden: Any, text: Any) -> Layout:
    """The text (B, N, D), then latents (B, C, H, W) over patch_size."""
    return Layout(grid=_image(config, hidden), text=text.shape[1], text_first=True)


def _sd3(config: Any, hidden: Any, text: Any) -> tuple[Layout, Layout]:
    """Latents (B, C, H, W) over patch_size, then the text; the second attention of dual blocks sees the image alone."""
    grid = _image(config, hidden)
    return Layout(grid=grid, text=text.shape[1]), Layout(grid=grid)


def _hunyuan_image(config: Any, hidden: Any, text: Any, glyphs: Any) -> Layout:
    """Latents (B, C, H, W), or with frames, over patch_size, then glyph and text tokens, live first."""
    sizes = patches(hidden.shape[2:], config.patch_size)
    words = text.shape[1] + (0 if glyphs is None or not config.text_embed_2_dim else glyphs.shape[1])
    return Layout(grid=(1, *sizes)[-3:], text=words)


def _auraflow(config: Any, hidden: Any, text: Any) -> Layout:
    """Eight register tokens and the text, then latents (B, C, H, W) over patch_size."""
    return Layout(grid=_image(config, hidden), text=8 + text.shape[1], text_first=True)


def _hidream(config: Any, hidden: Any, sizes: Any, t5: Any, llama: Any) -> Layout | None:
    """Latents over patch_size or img_sizes, padding where the image is not square, then three runs of text."""
    if hidden.ndim == 4:
        height, width = (size // config.patch_size for size in hidden.shape[2:])
        room = config.max_resolution[0] * config.max_resolution[1] // config.patch_size**2
        padding = 0 if height == width else room - height * width
    elif sizes is not None:
        (height, width), *others = torch.as_tensor(sizes).tolist()
        if any(other != [height, width] for other in others):
            return None
        padding = hidden.shape[1] - height * width
    else:
        return None
    words = t5.shape[1] + 2 * llama[0].shape[1]
    rest = [Segment("padding", padding)] if padding else []
    return Layout(segments=[Segment("main", (1, height, width)), *rest, Segment("text", words)])


def _z_image(config: Any, images: Any, texts: Any, patch: int | None, frame_patch: int | None) -> Layout | None:
    """Latents (C, T, H, W) over the patch, padding to 32, then the text padded to 32; None for several images."""
    if isinstance(images[0], (list, tuple)) or len({image.shape for image in images}) > 1:
        return None
    steps = (frame_patch or 1, patch or 2, patch or 2)
    main = Segment("main", patches(images[0].shape[1:], steps))
    padding = -main.tokens % _Z_IMAGE_MULTIPLE
    words = max(len(text) + -len(text) % _Z_IMAGE_MULTIPLE for text in texts)
    rest = [Segment("padding", padding)] if padding else []
    return Layout(segments=[main, *rest, Segment("text", words)])


def _image(config: Any, hidden: Any) -> tuple[int, int, int]:
    return (1, *patches(hidden.shape[2:], (config.patch_size, config.patch_size)))


FAMILIES = (
    Family(
        name="flux",
        models=("FluxTransformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        text="first",
        timestep_scale=1000.0,
        image=True,
    ),
    Family(
        name="flux-like",
        models=("LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        text="first",
        timestep_scale=1000.0,
        image=True,
    ),
    Family(
        name="bria",
        models=("BriaTransformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        text="first",
        same_mask=True,
        image=True,
    ),
    Family(
        name="hunyuan-image",
        models=("HunyuanImageTransformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_2"),
        layout=_hunyuan_image,
        text="last",
        masks_text=True,
        same_mask=True,
        image=True,
        stock="token refiner",
    ),
    Family(
        name="flux2",
        models=("Flux2Transformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        text="first",
        timestep_scale=1000.0,
        image=True,
        notes="the modes of the key-value cache of references run stock, uncounted",
    ),
    Family(
        name="chroma",
        models=("ChromaTransformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        text="first",
        masks_text=True,
        same_mask=True,
        timestep_scale=1000.0,
        image=True,
        notes="its pipelines pass padding as numbers that torch adds to the logits: dense; pass attention_mask as bool",
    ),
    Family(
        name="sd3",
        models=("SD3Transformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn2?",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_sd3,
        text="last",
        image=True,
    ),
    Family(
        name="qwen-image",
        models=("QwenImageTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        reads=("img_shapes", "encoder_hidden_states"),
        layout=_qwen_image,
        text="first",
        masks_text=True,
        same_mask=True,
        timestep_scale=1000.0,
        image=True,
    ),
    Family(
        name="pixart",
        models=("PixArtTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_pixart,
        same_mask=True,
        image=True,
    ),
    Family(
        name="hidream",
        models=("HiDreamImageTransformer2DModel",),
        sites=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        reads=("hidden_states", "img_sizes", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        layout=_hidream,
        text="last",
        timestep="timesteps",
        image=True,
    ),
    Family(
        name="auraflow",
        models=("AuraFlowTransformer2DModel",),
        sites=r"(joint|single)_transformer_blocks\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_auraflow,
        text="first",
        timestep_scale=1000.0,
        image=True,
    ),
    Family(
        name="lumina2",
        models=("Lumina2Transformer2DModel",),
        sites=r"layers\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_text_first,
        text="first",
        cuts_text=True,
        timestep_scale=-1000.0,
        timestep_offset=1000.0,
        image=True,
        stock="refiners",
    ),
    Family(
        name="cogview3plus",
        models=("CogView3PlusTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_text_first,
        text="first",
        image=True,
    ),
    Family(
        name="cogview4",
        models=("CogView4Transformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_text_first,
        text="first",
        masks_text=True,
        image=True,
        notes="with attention_mask the model adds ones and zeros to the logits: dense",
    ),
    Family(
        name="z-image",
        models=("ZImageTransformer2DModel",),
        sites=r"layers\.\d+\.attention",
        reads=("x", "cap_feats", "patch_size", "f_patch_size"),
        layout=_z_image,
        text="last",
        masks_text=True,
        cuts_text=True,
        same_mask=True,
        timestep="t",
        timestep_scale=-1000.0,
        timestep_offset=1000.0,
        image=True,
        stock="refiners",
        notes="editing with several images (omni) runs dense",
    ),
)
