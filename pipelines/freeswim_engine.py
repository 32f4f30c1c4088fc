"""FreeSwim's two paths through one transformer: windowed rows that take their cross-attention from full rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusers.derive import adopt, derive, stock_of
from ..diffusers.engine import Engine
from ..diffusers.families import Family
from ..diffusers.ops import Primitive
from ..errors import UnsupportedError
from ..processors import Processor
from ..step import Step

# Arguments of the transformers' forward whose first dimension is the batch.
BATCHED = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "encoder_attention_mask",
    "video_coords",
)  # fmt: skip


@dataclass
class Counts:
    """What ran. ``guide_forwards``: transformer forwards that carried full rows; rows are samples of a forward.

    ``full_rows``: rows of the full path. ``cross_rows``: cross-attention results computed, over all blocks;
    ``cross_reused``: those taken from an earlier guide step instead.
    """

    forwards: int = 0
    guide_forwards: int = 0
    window_rows: int = 0
    full_rows: int = 0
    cross_rows: int = 0
    cross_reused: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Clock:
    """Counts the steps of one pipeline call, over all its denoisers, from 0; strength may start a schedule late."""

    ordinal: int = -1
    forwards: int = 0
    _index: int | None = None

    def tick(self, step: Step) -> None:
        """A forward of ``step`` begins."""
        if step.index != self._index:
            self._index, self.ordinal, self.forwards = step.index, self.ordinal + 1, 0
        self.forwards += 1


@dataclass(frozen=True)
class Rows:
    """The batch of one forward. ``own``: window rows with a cross-attention of their own; ``led``: window rows that
    take it from a full row. ``full``: the full rows are part of this forward, after the ``window`` rows, in led order.
    """

    own: tuple[int, ...]
    led: tuple[int, ...]
    full: bool

    @property
    def window(self) -> int:
        return len(self.own) + len(self.led)

    @property
    def total(self) -> int:
        return self.window + (len(self.led) if self.full else 0)


class DualEngine(Engine):
    """An engine whose forwards carry, on guide steps, a full-attention copy of some rows of the batch.

    Window rows run ``processor``'s method. A full row runs stock attention with the method's softmax scale, and its
    cross-attention output, before the output projection, also becomes that of the window row it copies. The model's
    output holds the window rows only. ``cache_steps=n`` adds full rows on every n-th step, to conditional rows, and
    reuses their cross-attention until the next; None adds them to every row on every step. ``batched``: guidance comes
    as one batch [unconditional, conditional], otherwise as two forwards, the conditional one first or named by
    ``cache_context``. ``device``: where the outputs wait, None for where they are.

    Raises ``UnsupportedError`` for a family without cross-attention modules.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        processor: Processor,
        scheduler: Callable[[], Any],
        *,
        clock: Clock,
        cache_steps: int | None,
        guided: Callable[[], bool],
        batched: bool,
        device: str | torch.device | None = None,
    ):
        super().__init__(model, family, processor, scheduler)
        if not family.cross_sites:
            raise UnsupportedError(
                f"FreeSwim needs cross-attention modules of their own, and {type(model).__name__} (family "
                f"{family.name!r}) attends to text jointly. Families that serve: wan, ltx"
            )
        self._cross = [module for _, module in family.find_cross_sites(model)]
        for cls in {type(stock_of(module.processor)) for module in self._cross}:
            derive(cls)
        self.counts = Counts()
        self._clock, self._cache_steps, self._guided, self._batched = clock, cache_steps, guided, batched
        self._device = device
        self._rows: Rows | None = None
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._calls: defaultdict[int, int] = defaultdict(int)
        self._own_hooks: list[Any] = []

    def attach(self) -> None:
        super().attach()
        for number, module in enumerate(self._cross, len(self._sites)):
            ours = adopt(module.processor, torch.tensor([self.id, number]))
            module.processor = ours
            self._adopted.append((module, ours))
        # Before the engine's own hook, so that a repeat by the guard has the rows; after it, so that it is cut too.
        self._own_hooks = [
            self.model.register_forward_pre_hook(self._widen, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._narrow),
        ]

    def detach(self) -> None:
        for hook in self._own_hooks:
            hook.remove()
        self._own_hooks = []
        self._kept.clear()
        super().detach()

    def finish(self, again: Callable[[], Any]) -> Any:
        def afresh() -> Any:
            self._calls.clear()
            return again()

        return super().finish(afresh)

    def attend(self, layer: int, call: Primitive) -> Tensor:
        """The result of one call: self-attention by path, or the cross-attention that led rows share with theirs."""
        rows = self._rows
        if layer >= len(self._sites):
            return self._attend_text(layer, call)
        if rows is None or not rows.full:
            return super().attend(layer, call)
        window = super().attend(layer, _part(call, range(rows.window)))
        full = _part(replace(call, scale=self.processor.method.scale), range(rows.window, rows.total))
        with self.stats.timed("attention", call.query.device):
            return torch.cat([window, self._dense(layer, full, "guide")])

    def _attend_text(self, layer: int, call: Primitive) -> Tensor:
        rows = self._rows
        number = self._calls[layer]  # image-to-video models attend to the image and to the text
        self._calls[layer] += 1
        if rows is None or not rows.led:
            self.counts.cross_rows += call.query.shape[0]
            return call.dense()
        asked = [*rows.own, *(range(rows.window, rows.total) if rows.full else ())]
        found = _part(call, asked).dense() if asked else None
        self.counts.cross_rows += len(asked)
        if rows.full:
            led = found[len(rows.own) :]
            if self._cache_steps is not None:
                self._kept[layer, number] = led.to(self._device, copy=True) if self._device else led.clone()
        else:
            led = self._kept[layer, number].to(call.query.device)
            self.counts.cross_reused += len(rows.led)
        out = torch.empty((rows.total, *led.shape[1:]), dtype=led.dtype, device=led.device)
        out[list(rows.led)] = led
        if rows.own:
            out[list(rows.own)] = found[: len(rows.own)]
        if rows.full:
            out[rows.window :] = led
        return out

    def _widen(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: decide the rows of this forward and append the full ones."""
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "FreeSwim changes the batch from step to step, which one graph around the model cannot; compile the "
                "blocks instead: pipe.transformer.compile_repeated_blocks()"
            )
        seat = self._seat
        step = self.tracker.poll(seat.argument(seat.timestep, args, kwargs))
        self._clock.tick(step)
        self._calls.clear()
        batch = seat.argument("hidden_states", args, kwargs).shape[0]
        self._rows = rows = self._rows_of(step, batch)
        self.counts += Counts(1, int(rows.full), rows.window, rows.total - rows.window)
        if not rows.full:
            return args, kwargs
        index = [*range(rows.window), *rows.led]

        def widened(name: str, value: Any) -> Any:
            fits = name in BATCHED and isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
            return value[index] if fits else value

        names = {position: name for name, position in seat.positions.items()}
        args = tuple(widened(names[i], value) for i, value in enumerate(args))
        return args, {name: widened(name, value) for name, value in kwargs.items()}

    def _narrow(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the window rows of the output."""
        rows = self._rows
        if rows is None or not rows.full:
            return None
        if isinstance(output, tuple):
            return tuple(value[: rows.window] if isinstance(value, Tensor) else value for value in output)
        return type(output)(sample=output.sample[: rows.window])

    def _rows_of(self, step: Step, batch: int) -> Rows:
        every = tuple(range(batch))
        if self._cache_steps is None:
            return Rows((), every, full=True)
        if self._batched and self._guided():
            own, led = every[: batch // 2], every[batch // 2 :]
        elif self._is_unconditional(step):
            own, led = every, ()
        else:
            own, led = (), every
        due = self._clock.ordinal % self._cache_steps == 0 or not self._fits(len(led))
        return Rows(own, led, full=bool(led) and due)

    def _is_unconditional(self, step: Step) -> bool:
        if step.branch:
            return step.branch.startswith("uncond")
        return self._guided() and self._clock.forwards > 1

    def _fits(self, led: int) -> bool:
        """Whether there is a cross-attention to reuse: another denoiser, or another batch, starts without."""
        return bool(self._kept) and next(iter(self._kept.values())).shape[0] == led


def _part(call: Primitive, rows: range | Sequence[int]) -> Primitive:
    """The call for some rows of its batch; consecutive ones are views."""
    if not isinstance(rows, range) and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        rows = range(rows[0], rows[0] + len(rows))
    take = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
    mask = call.attn_mask
    if mask is not None and mask.ndim and mask.shape[0] == call.query.shape[0] > 1:
        mask = mask[take]
    return replace(call, query=call.query[take], key=call.key[take], value=call.value[take], attn_mask=mask)
