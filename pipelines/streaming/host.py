"""A transformer with Wan's blocks whose self-attention sees a stream's memory beside the frames it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...diffusers import ops
from ...diffusers.derive import adopt, derive, stock_of
from ...diffusers.hooks import engine_of
from ...errors import UnsupportedError
from .attention import Dense, Pass, WindowAttention
from .native import HOSTS, refusal
from .rotation import Rotary


class Unrotated(nn.Module):
    """In the place of the model's rotary embedding: attention gets keys before rotation, which the cache stores."""

    def forward(self, hidden_states: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer with Wan's blocks that a cache needs."""

    layers: int
    heads: int
    head_dim: int
    patch: tuple[int, int]
    rotary: Rotary

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Raises ``UnsupportedError`` for a model that cannot stream."""
        if not {cls.__name__ for cls in type(model).__mro__} & set(HOSTS):
            raise UnsupportedError(f"a stream needs a {' or '.join(HOSTS)}. {refusal(type(model).__name__)}")
        config = model.config
        if config.get("num_frame_per_block", 1) > 1:
            raise UnsupportedError(
                f"this model masks its frames in blocks of {config.num_frame_per_block}, and a stream's cache does "
                "that; call transformer._set_ar_attention(1)"
            )
        if config.patch_size[0] != 1:
            raise UnsupportedError(f"a token must not span latent frames; this model's patch is {config.patch_size}")
        return cls(
            len(model.blocks), config.num_attention_heads, config.attention_head_dim, tuple(config.patch_size[1:]),
            Rotary.of(model.rope),
        )  # fmt: skip


class Host:
    """Runs forwards of ``model`` against caches; ``attention`` says how a window is attended to. ``fps``: of the clip,
    for models that are told.

    Only inside :meth:`attached` is the model changed: its self-attention processors are the stock ones with the
    attention call redirected, and its rotary embedding is left out. Before and after it is stock.
    """

    def __init__(self, model: nn.Module, attention: WindowAttention | None = None, fps: float = 16):
        self.shape = Shape.of(model)
        # SkyReels-V2 knows two rates by number.
        self._rate = (0 if fps == 16 else 1) if model.config.get("inject_sample_info") else None
        self.model = model
        self.attention = attention or Dense()
        self.id = ops.new_id()
        self.forwards = 0
        self._pass: Pass | None = None
        for cls in {type(stock_of(block.attn1.processor)) for block in model.blocks}:
            derive(cls)

    @contextmanager
    def attached(self) -> Iterator[Host]:
        """The model belongs to this host while the context lasts; an accelerated engine on it waits."""
        model, engine = self.model, engine_of(self.model)
        if engine is not None:
            engine.detach()
        rope, modules = model.rope, [block.attn1 for block in model.blocks]
        stock = [module.processor for module in modules]
        ops.ENGINES[self.id] = self
        try:
            model.rope = Unrotated()
            for layer, module in enumerate(modules):
                module.processor = adopt(module.processor, torch.tensor([self.id, layer]))
            yield self
        finally:
            for module, processor in zip(modules, stock, strict=True):
                module.processor = processor
            model.rope = rope
            ops.ENGINES.pop(self.id, None)
            if engine is not None:
                engine.attach()

    def forward(self, latents: Tensor, time: float, embeds: Tensor, now: Pass) -> Tensor:
        """The model's output for a chunk (B, C, F, h, w) at ``time`` of 1000, its keys and values written to the cache.

        ``embeds``: text (B, L, D).
        """
        self._pass = now
        self.forwards += 1
        times = torch.full((latents.shape[0],), time, dtype=torch.float32, device=latents.device)
        kind = self.model.dtype
        extra = {} if self._rate is None else {"fps": [self._rate] * latents.shape[0]}
        try:
            return self.model(latents.to(kind), times, embeds.to(kind), return_dict=False, **extra)[0]
        finally:
            self._pass = None

    def attend(self, layer: int, call: ops.Primitive) -> Tensor:
        """One self-attention call of the stock processor: remember its keys, and attend to the window."""
        now = self._pass
        if now is None:
            raise UnsupportedError("the transformer was called while a stream is making a chunk; let it finish first")
        now.cache.write(layer, call.query, call.key, call.value)
        return self.attention(layer, call, now)
