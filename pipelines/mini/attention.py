"""Attention for training: the stock arithmetic; on CPUs the attention itself stays in float32 under bfloat16 autocast.

Torch's CPU attention is about twice as slow in bfloat16 as in float32, backward above all, while matrix products are
twice as fast; mixing them is the quickest. Weights and results are those of the stock processor up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention


class TrainingAttention:
    """A processor for ``WanTransformer3DModel`` without image conditioning."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Self-attention over ``hidden_states`` (B, N, C), or cross-attention to (B, L, C)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        out_dtype = None if value.device.type == "cpu" else value.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
            query, key, value = (x.float().unflatten(2, (attn.heads, -1)) for x in (query, key, value))
            if rotary_emb is not None:
                cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
                query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            dtype = torch.float32 if out_dtype is None else out_dtype
            attend = self.to_itself if encoder_hidden_states is None else attention
            out = attend(*(x.to(dtype) for x in (query, key, value)), attention_mask).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))

    def to_itself(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Self-attention of (B, N, H, D) after rotation, in that shape."""
        return attention(query, key, value, mask)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled dot-product attention in the layout (B, N, H, D)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)
