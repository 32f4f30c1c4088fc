"""Engine: one per accelerated transformer. Decides for every attention call and counts what it decided."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import no_autocast
from ..errors import UnsupportedError
from ..functional import BACKWARD, WHOLE, attend, make_plan, served, wants_gradient, with_backward
from ..layout import Layout
from ..methods import Call
from ..precision import adapted
from ..processors import Processor
from ..quant import resolve_quant
from ..state import State
from ..step import Step
from . import ops
from .derive import adopt, derive, stock_of
from .facts import facts_of
from .families import Family
from .hooks import Seat
from .masks import Live, Unreadable, live_keys
from .parallel import Refused, Share, Ulysses
from .seen import Seen
from .stats import Stats
from .tracker import StepTracker
from .watch import Ran, Watch

logger = logging.getLogger("dit_accel")
_UNSEEN = object()


@dataclass
class Forward:
    """What is known of the forward under way. ``trial``: the guard repeats it and checks call by call.

    ``layouts``: one, or one per kind of site; empty where the arguments do not tell. ``ulysses``: the ranks that it is
    shared with, once a call has told.
    """

    layouts: tuple[Layout, ...]
    step: Step
    trial: bool = False
    checked: bool = False
    masks: list[tuple[Any, Layout, Live | str | None]] = field(default_factory=list)
    ulysses: Ulysses | None = None

    @property
    def layout(self) -> Layout | None:
        """The layout of most sites, or None."""
        return self.layouts[0] if self.layouts else None


class _Unsupported(Exception):
    """A call the engine does not understand: ``reason`` is its counter, the message tells the user."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Engine:
    """Accelerates one transformer under a :class:`~dit_accel.Processor`'s settings.

    ``family``: how the model is built. ``scheduler``: returns the pipeline's scheduler or None. Making one raises
    ``UnsupportedError`` when the method has no meaning on this family or an attention class cannot be derived, and
    leaves the model untouched; :meth:`attach` changes it. The engine lives on the forward hooks of its model.

    No attention call makes the host wait for a GPU. A forward does for the guard's flags, where it checked a call; for
    a mask, once per tensor; and for its timestep, where nothing else tells the step (``StepTracker``).
    """

    def __init__(
        self, model: nn.Module, family: Family, processor: Processor, scheduler: Callable[[], Any] = lambda: None
    ):
        sites = family.find_sites(model)
        if not sites:
            raise UnsupportedError(
                f"family {family.name!r} finds no attention in this {type(model).__name__}: no module name matches "
                f"{family.sites!r}. Correct the row's sites and register it again with register_family"
            )
        if processor.method is not None:
            processor.method.check_model(facts_of(model, family))
        for cls in {type(stock_of(module.processor)) for _, module in sites}:
            derive(cls)
        self.id = ops.new_id()
        self.family = family
        self.processor = processor
        self.state = State()
        self.tracker = StepTracker(scheduler, family.timestep_scale, family.timestep_offset)
        self.stats = Stats([(name, "joint" if family.joint else "self") for name, _ in sites])
        self.forward: Forward | None = None
        self._model = weakref.ref(model)
        self.watch = Watch(processor.guard, self.stats, self.warn)
        self._layouts: set[Layout] = set()
        self._read = Seen()
        self._masks = Seen()
        self._sites = [module for _, module in sites]
        self._adopted: list[tuple[nn.Module, Any]] = []
        self._seat: Seat | None = None

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    def attach(self) -> None:
        """Put derived processors on the sites and hooks on the model."""
        ops.ENGINES[self.id] = self
        for layer, module in enumerate(self._sites):
            ours = adopt(stock_of(module.processor), torch.tensor([self.id, layer]))
            module.processor = ours
            self._adopted.append((module, ours))
        self._seat = Seat(self, self.model)

    def detach(self) -> None:
        """Put every stock processor back and remove the hooks. A processor set meanwhile stays."""
        for module, ours in self._adopted:
            if module.processor is ours:
                module.processor = stock_of(ours)
        self._adopted.clear()
        self._seat.remove()
        ops.ENGINES.pop(self.id, None)

    def is_in(self, processors: Any) -> bool:
        """Whether ``processors``, a dict by name, is one of ``attn_processors`` with all of this engine's."""
        held = {id(one) for one in processors.values()} if isinstance(processors, dict) else ()
        return all(id(ours) in held for _, ours in self._adopted)

    def reset_stats(self) -> None:
        """Start every counter afresh."""
        self.stats.reset()

    def begin(self, timestep: Any, read: tuple[Any, ...]) -> None:
        """A forward begins. ``read``: the arguments that the family's layout wants.

        Raises ``UnsupportedError`` when the method refuses the layout; nothing was computed yet.
        """
        model = self.model
        if model is None:
            return
        before = self.forward
        if before is not None and before.checked:
            self._too_late(before)
        step = self.tracker.poll(timestep)
        layouts = self._layouts_of(model, read)
        if before is None or before.step.run != step.run:
            self.state.close_run(step.run - 1)
            self.watch.begin_run()
        self._note_unknown_total(step)
        self.forward = Forward(layouts, step)
        self.stats.forwards += 1

    def abandon(self) -> None:
        """The forward under way ended in an error: nothing of it is used, so its flags tell nothing."""
        if self.forward is None:
            return
        self.forward.masks.clear()
        if self.forward.checked:
            self.forward.checked = False
            self.watch.forget()

    def finish(self, again: Callable[[], Any]) -> Any:
        """The forward ended. Returns the output of its repeat, by ``again``, where the guard raised a flag, else None.

        Reads the flags, once, when any call was checked. The repeat checks every call on the spot and runs a layer
        dense that fails although its inputs are finite.
        """
        forward = self.forward
        if forward is None or not forward.checked:
            return None
        forward.checked = False
        raised = self.watch.read(forward.ulysses and forward.ulysses.group)
        if not raised:
            return None
        forward.trial = True
        self.stats.repeats += 1
        known = len(self.stats.guard_events)
        output = again()
        forward.trial = False
        if len(self.stats.guard_events) == known:
            layer, kind = next(iter(raised.items()))
            self.warn(
                f"guard: layer {layer} ({self.stats.layers[layer].name}) raised the flag {kind!r} at step "
                f"{forward.step.index}; the repeated forward found no attention call at fault, so either its inputs "
                "were not finite or the fault was transient"
            )
        return output

    def _too_late(self, forward: Forward) -> None:
        """The last forward could not be repeated, it was part of a larger graph: its flags are counted and told now."""
        raised = self.watch.read(forward.ulysses and forward.ulysses.group)
        if raised:
            layer, kind = next(iter(raised.items()))
            self.watch.blame(layer, forward.step, kind)
            self.warn(
                "guard: that forward was compiled into a larger function and could not be repeated; compile the "
                "transformer itself, or its blocks, for faults to be repaired"
            )

    def attend(self, layer: int, call: ops.Primitive) -> Tensor:
        """The result of one attention call at ``layer``, sparse or stock."""
        with self.stats.timed("attention", call.query.device):
            layout = live = share = None
            try:
                reason = self._dense_reason(call)
                if reason is None:
                    layout, share = self._understand(call)
                    self.stats.layers[layer].layout = layout
                    reason = self._dense_step(layer)
                if reason is None:
                    call = share.whole(call) if share else call
                    live = self._live_keys(call, layout)
            except _Unsupported as error:
                if self.processor.on_unsupported == "error":
                    raise UnsupportedError(f"{self.stats.layers[layer].name}: {error}") from None
                self.warn(f"{error}; such calls run dense")
                reason = error.reason
            if reason is not None:
                out = self._dense(layer, call, reason)
            else:
                with no_autocast(call.query.device.type):
                    out = self._sparse(layer, call, layout, live)
            # Only a call made whole is without the configuration: a stock dense one shares by itself.
            return share.part(out) if share and "parallel_config" not in call.extra else out

    def parallel_config(self, layer: int) -> Any:
        """What ``enable_parallelism`` left on the layer, for compiled code that cannot carry it."""
        return self._sites[layer].processor._parallel_config

    def _layouts_of(self, model: nn.Module, read: tuple[Any, ...]) -> tuple[Layout, ...]:
        """The family's layouts, each checked once against the method."""
        if not self.family.by_value:
            return self._derived(model, read)
        return self._read.read(read, lambda: self._derived(model, read))

    def _derived(self, model: nn.Module, read: tuple[Any, ...]) -> tuple[Layout, ...]:
        layouts, method = self.family.layouts(model.config, read), self.processor.method
        for layout in layouts:
            if method is not None and layout not in self._layouts:
                method.check(layout)
                self._layouts.add(layout)
        return layouts

    def warn(self, message: str) -> None:
        """Log ``message`` and keep it in the stats, once."""
        if message not in self.stats.warnings:
            self.stats.warnings.append(message)
            logger.warning(message)

    def _dense(self, layer: int, call: ops.Primitive, reason: str) -> Tensor:
        self.stats.count_dense(layer, reason, _pairs(call), self.forward.step.index if self.forward else 0)
        return call.dense()

    def _sparse(self, layer: int, call: ops.Primitive, layout: Layout, live: Live | None) -> Tensor:
        forward, method = self.forward, self.processor.method or WHOLE
        q, k, v = call.heads_first()
        valid, turn = (live.count, live.turn) if live else (None, 0)
        if turn:
            layout = live.layout
            q, k, v = (x.roll(-turn, 2) for x in (q, k, v))
        told = Call(layout, None, valid, layer, forward.step, self.state, call.head_offset, call.scale, q.device)
        with self.stats.timed("planning", q.device):
            plan = make_plan(q, k, v, method, told)
        if plan is None:
            return self._dense(layer, call, "method")
        quant = resolve_quant(self.processor.quant, q.device)
        if quant is not None:
            quant = adapted(quant, layer, forward.step, slice(0, q.shape[1]))
            if quant is None and self.processor.method is None:
                return self._dense(layer, call, "schedule")
        backend = with_backward(self.processor.backend, plan, quant, q, k, v)
        _, tier, why = served(plan, q, backend=backend, quant=quant)
        out = attend(
            q, k, v, plan=plan, layout=layout, kv_valid=valid, scale=call.scale, backend=backend, quant=quant
        )  # fmt: skip
        if self.processor.guard.active and not self._passes(layer, Ran(q, k, v, out, plan, call.scale, valid, quant)):
            return self._dense(layer, call, "guard")
        self.stats.count_sparse(layer, plan, method.static, tier, why, _pairs(call), forward.step.index)
        return call.back(out.roll(turn, 2) if turn else out)

    def _passes(self, layer: int, ran: Ran) -> bool:
        """Flags on the device what fails a check. In a repeat, says on the spot whether the output can be used."""
        forward = self.forward
        if forward.trial:
            return self.watch.passes(layer, forward.step, ran, forward.ulysses)
        forward.checked |= self.watch.look(layer, forward.step, ran)
        return True

    def _dense_reason(self, call: ops.Primitive) -> str | None:
        """Why this call is dense whatever its layer and step, or None."""
        if self.processor.method is None and self.processor.quant is None:
            return "baseline"
        if self.forward is None:
            raise _Unsupported("outside", "attention was called outside a forward of the transformer")
        queries, keys = _tokens(call)
        return None if queries == keys else "cross"

    def _dense_step(self, layer: int) -> str | None:
        """Why this layer is dense at this step, or None."""
        if self.processor.schedule.is_dense(self.forward.step, layer):
            return "schedule"
        return "guard" if layer in self.watch.faulty else None

    def _understand(self, call: ops.Primitive) -> tuple[Layout, Share | None]:
        """The layout of the call's tokens, and this rank's share of them under context parallelism.

        Raises :class:`_Unsupported` for what is not understood.
        """
        try:
            ulysses = self.forward.ulysses = Ulysses.of(call)
            if ulysses is None:
                return self._layout_of(call, _tokens(call)[0]), None
            sizes = ulysses.sizes(call)
            layout = self._layout_of(call, sum(sizes))
            return layout, ulysses.share(sizes, layout, self.state, call.query.device)
        except Refused as error:
            raise _Unsupported("context-parallel", str(error)) from None

    def _layout_of(self, call: ops.Primitive, tokens: int) -> Layout:
        forward, name = self.forward, self.family.name
        if call.is_causal or call.dropout_p:
            what = "causal attention" if call.is_causal else f"attention dropout {call.dropout_p}"
            raise _Unsupported("causal" if call.is_causal else "dropout", f"{what} is not served")
        if not forward.layouts:
            raise _Unsupported("layout", f"family {name!r} cannot tell the token grid from these arguments of forward")
        layout = next((layout for layout in forward.layouts if layout.tokens == tokens), None)
        left = tokens - forward.layout.tokens + forward.layout.text
        if layout is None and self.family.cuts_text and 0 <= left <= forward.layout.text:
            layout = forward.layout.with_text(left)
        if layout is None:
            expected = " or ".join(f"{layout.tokens} tokens ({layout})" for layout in forward.layouts)
            raise _Unsupported("layout", f"family {name!r} expected {expected}; the call has {tokens}")
        trains = wants_gradient(call.query, call.key, call.value)
        if self.processor.quant is not None and trains:
            raise _Unsupported("training", "quantised attention has no backward; train without quant")
        if trains and self.processor.backend not in ("auto", *BACKWARD):
            raise _Unsupported("training", f"backend {self.processor.backend!r} has no backward; 'gather' has one")
        return layout

    def _live_keys(self, call: ops.Primitive, layout: Layout) -> Live | None:
        """The call's mask as live keys; looked into once per forward, or once where the same tensor comes again."""
        mask = call.attn_mask
        if mask is None:
            return None
        known = next((result for *seen, result in self.forward.masks if self._same_mask(mask, layout, *seen)), _UNSEEN)
        if known is _UNSEEN:
            batch = call.query.shape[0]
            known = self._masks.read(mask, lambda: self._read_mask(mask, batch, layout), batch, layout)
            self.forward.masks.append((mask, layout, known))
        if isinstance(known, str):
            raise _Unsupported("mask", known)
        return known

    def _read_mask(self, mask: Any, batch: int, layout: Layout) -> Live | str | None:
        try:
            live = live_keys(mask, batch, layout)
        except Unreadable as error:
            return str(error)
        if live is not None and self.family.cuts_text and layout.segments[0].kind == "text":
            return "texts of different lengths in one batch: the grid begins at another token in each sample"
        return live

    def _same_mask(self, mask: Any, layout: Layout, seen: Any, seen_layout: Layout) -> bool:
        if layout != seen_layout:
            return False
        return mask is seen or (self.family.same_mask and mask.shape == seen.shape)

    def _note_unknown_total(self, step: Step) -> None:
        schedule, method = self.processor.schedule, self.processor.method
        if method is None or step.total is not None:
            return
        if (isinstance(schedule.first, float) and schedule.first) or schedule.last or method.needs_total:
            self.warn(
                "the number of steps of this run is not known, so the fractions of the schedule and of the method "
                "count as zero; set the processor on the pipeline that runs instead of on its transformer, or give "
                "numbers of steps, like Schedule(first=<number of steps>)"
            )


def _pairs(call: ops.Primitive) -> int:
    """Query-key pairs of the call, over batch and heads; under context parallelism those of this rank's heads."""
    config = getattr(call.extra.get("parallel_config"), "context_parallel_config", None)
    ranks = config.ring_degree * config.ulysses_degree if config else 1
    return call.query.shape[:-1].numel() * _tokens(call)[1] * ranks


def _tokens(call: ops.Primitive) -> tuple[int, int]:
    """Query and key tokens of the call."""
    axis = 1 if call.form == "BSHD" else 2
    return call.query.shape[axis], call.key.shape[axis]
