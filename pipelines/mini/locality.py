"""A start in which attention already looks at neighbours, and a helper task that teaches tokens where they are.

The transformer knows positions only through relative rotary phases. From a random start it spends most of a short
training on finding out that a shape is made of neighbouring tokens; written into the biases of queries and keys, that
is known at step 0.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

#: Per layer and head: (dx, dy, same_frame), the neighbour a head first looks at.
_CROSS = ((-1, 0, True), (1, 0, True), (0, -1, True), (0, 1, True))
_TIME = ((0, 0, False), (0, 0, False), (0, 0, True), (0, 0, False))
PLAN = (_CROSS, _CROSS, _TIME, _CROSS, _TIME, _CROSS)
#: Length of the bias per rotary pair, and the gain of the query and key norms.
STRENGTH, GAIN = 2.4, 2.0


@torch.no_grad()
def start_local(model: WanTransformer3DModel) -> None:
    """Sets query and key biases of every self-attention so that its heads begin with the neighbours of :data:`PLAN`."""
    size = model.config.attention_head_dim
    rope = model.rope
    starts = {"t": 0, "h": rope.t_dim, "w": rope.t_dim + rope.h_dim}
    dims = {"t": rope.t_dim, "h": rope.h_dim, "w": rope.w_dim}
    for layer, block in enumerate(model.blocks):
        attn = block.attn1
        attn.to_q.bias.zero_()
        attn.to_k.bias.zero_()
        attn.norm_q.weight.fill_(GAIN)
        attn.norm_k.weight.fill_(GAIN)
        plan = PLAN[layer % len(PLAN)]
        for head in range(model.config.num_attention_heads):
            dx, dy, same_frame = plan[head % len(plan)]
            for axis, offset, weight in (("t", 0, 0.6 * same_frame), ("h", dy, 1.0), ("w", dx, 1.0)):
                for pair in range(min(2, dims[axis] // 2)):
                    angle = torch.tensor(10000.0 ** (-2 * pair / dims[axis]) * offset)
                    at = head * size + starts[axis] + 2 * pair
                    attn.to_q.bias[at] = STRENGTH * weight * angle.cos()
                    attn.to_q.bias[at + 1] = STRENGTH * weight * angle.sin()
                    attn.to_k.bias[at] = STRENGTH * weight


class PositionProbe(torch.nn.Module):
    """Reads (t, y, x) in -1..1 from the hidden states after block ``layer``; it is dropped when the model is
    exported."""

    def __init__(self, model: WanTransformer3DModel, layer: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(model.config.num_attention_heads * model.config.attention_head_dim, 3)
        self._hidden: torch.Tensor | None = None
        model.blocks[layer].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        # Only training asks for it; a rendered clip's states must not be held in memory.
        self._hidden = output if torch.is_grad_enabled() else None

    def loss(self, frames: torch.Tensor, total: int, height: int, width: int) -> torch.Tensor:
        """Mean squared error for the last forward, whose tokens were frames (B, F) x height x width of ``total``
        frames."""
        hidden, self._hidden = self._hidden, None
        t = (2 * frames.float() / (total - 1) - 1)[:, :, None, None].expand(-1, -1, height, width)
        y = torch.linspace(-1, 1, height, device=frames.device)[:, None].expand_as(t)
        x = torch.linspace(-1, 1, width, device=frames.device).expand_as(t)
        target = torch.stack([t, y, x], -1).flatten(1, 3)
        return (self.head(hidden).float() - target).square().mean()
