"""Operations of a transformer forward, from its configuration alone: attention, cross-attention, everything linear.

Two matmuls of 2 operations per multiply-add make 4 N_q N_k D per head; softmax is not counted, quantisation lowers
nothing. On Wan 2.1 14B (75,600 tokens, 50 steps, two branches) this gives the 468.2 PFLOPs of attention that Sparse
VideoGen 2 prints (arXiv 2505.18875, table 1), and with its total every other row of that table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..diffusers.families import Family
from ..errors import UnsupportedError
from ..layout import Layout
from ..pipelines.model import ModelInfo


def attention_flops(queries: int, keys: int, width: int, density: float = 1.0) -> float:
    """Operations of one attention call: ``width`` is heads x head size, ``density`` the kept share of the pairs."""
    return 4.0 * queries * keys * width * density


def sparse_total(dense_total: float, attention: float, density: float, sparse_share: float) -> float:
    """Operations of a run whose attention keeps ``density`` of its pairs on ``sparse_share`` of its steps."""
    return dense_total - attention * (1 - density) * sparse_share


@dataclass(frozen=True)
class Operations:
    """Operations of one forward on one sample.

    ``attention``: at the accelerated sites, all together. ``cross``: of the cross-attention to text. ``linear``: of
    every linear and convolution layer. ``layers``: accelerated sites. ``width``: heads x head size there.
    """

    attention: float
    cross: float
    linear: float
    layers: int
    heads: int
    width: int

    @property
    def total(self) -> float:
        return self.attention + self.cross + self.linear

    @property
    def share(self) -> float:
        """Attention's share of all operations."""
        return self.attention / self.total


def skeleton(info: ModelInfo) -> nn.Module:
    """The transformer of ``info`` without memory for its weights (on the meta device).

    Raises ``UnsupportedError`` where no family row knows the class or this diffusers cannot build it.
    """
    import diffusers

    name = info.transformer_class
    if info.family is None:
        raise UnsupportedError(
            f"no family row knows {name}, so its attention cannot be found; register one "
            "(dit_accel.diffusers.register_family)"
        )
    try:
        with torch.device("meta"):
            return getattr(diffusers, name).from_config(info.transformer)
    except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{name} cannot be built from the configuration of {info.name}: {type(error).__name__}: {error}"
        ) from error


def count(model: nn.Module, family: Family, layout: Layout, text: int) -> Operations:
    """Operations of one forward on tokens of ``layout``; ``text`` tokens are attended to, in the sequence or beside it.

    A linear layer's operations are twice its weights per row. Which rows pass follows from its place: layers fed by
    the timestep see one, those of a text branch the text, those of a block without such a branch the whole sequence.
    """
    sites = family.find_sites(model)
    cross = family.find_cross_sites(model)
    words, main = text or layout.text, layout.tokens - layout.text
    keys = re.compile("|".join(rf"{re.escape(name)}\.to_[kv]" for name, _ in cross) or r"(?!)")
    names = [name for name, _ in model.named_modules()]
    branched = {_block(name) for name in names if _TEXT.search(name) and not _ONCE.search(name)}
    active = _active_experts(getattr(model, "config", {}))
    linear = 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or weight is None:
            continue
        if _ONCE.search(name):
            rows = 1
        elif _TEXT.search(name) or keys.fullmatch(name):
            rows = words
        elif family.joint and _block(name) and _block(name) not in branched:
            rows = layout.tokens
        else:
            rows = main
        linear += 2.0 * weight.numel() * rows * (active if ".experts." in name else 1)
    widths = [_width(module) for _, module in sites]
    return Operations(
        attention=sum(attention_flops(layout.tokens, layout.tokens, width) for width in widths),
        cross=sum(attention_flops(layout.tokens, words, _width(module)) for _, module in cross),
        linear=linear,
        layers=len(sites),
        heads=_heads(sites[0][1]),
        width=widths[0],
    )


# Layers that see one row per sample, and layers of a text or sound branch, by how diffusers names them. The counts of a
# branch beside the video are rough: they are a few hundred tokens against many thousands.
_ONCE = re.compile(r"time|guidance|norm|odulation|ada[lL][nN]|\bt_embedder|pooled|scale_shift|_gate\.|_mod\.")
_TEXT = re.compile(
    r"add_|context|txt_|text_|caption|cap_embedder|audio|image_embedder|[kv]_img|_t\b|cross_attention\.to_(key|value)"
)


def _block(name: str) -> str:
    """``single_transformer_blocks.3`` of a module inside that block, else nothing."""
    found = re.match(r"(\w*blocks|layers)\.\d+(?=\.)", name)
    return found[0] if found else ""


def _active_experts(config: Any) -> float:
    """The share of its experts that a token passes."""
    return config.get("num_activated_experts", 1) / config.get("num_routed_experts", 1)


def _width(module: Any) -> int:
    projection = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    return module.inner_dim if projection is None else projection.out_features


def _heads(module: Any) -> int:
    return int(getattr(module, "heads", None) or module.num_heads)
