"""Attention processors: a method plus how to run it, in the form diffusers users know."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, ClassVar

from .checks import instance
from .errors import UsageError
from .guard import Guard
from .kernels.block_sparse import BACKENDS
from .kernels.quant.api import TIERS
from .methods import GNA, AdaSpa, AllBlocks, Clear, Method, Paro, Pisa, Pyramid, Radial, RandomBlocks, Rectified, VMoBA
from .quant import Quant, parse_quant, quant_name
from .schedule import Schedule

ON_UNSUPPORTED = ("dense", "error")


class Processor:
    """A method, its schedule, guard and backend. Give it to ``set_attn_processor`` of a pipeline or a transformer.

    ``method``: None is dense. ``quant``: quantised compute, a :class:`Quant`, a preset's name or ``"auto"``.
    ``schedule``: which steps and layers stay dense, None for the method's own default. ``guard``: run-time checks.
    ``backend``: ``"auto"`` or one tier by name. ``on_unsupported``: what an attention call that the engine does not
    understand does, ``"dense"`` (run stock, counted and warned once) or ``"error"``. A processor holds settings only:
    it can serve many models, be pickled and be compared.
    """

    def __init__(
        self,
        method: Method | None,
        *,
        quant: Quant | str | None = None,
        schedule: Schedule | None = None,
        guard: Guard | None = None,
        backend: str = "auto",
        on_unsupported: str = "dense",
    ):
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if on_unsupported not in ON_UNSUPPORTED:
            raise UsageError(f"on_unsupported {on_unsupported!r} is unknown; choose 'dense' or 'error'")
        if quant is not None and backend not in TIERS:
            raise UsageError(
                f"backend {backend!r} cannot quantise; choose auto, triton or reference, or leave quant out"
            )
        for name, value, kind, what in (
            ("method", method, Method, "a method such as Radial(), or None for dense attention"),
            ("schedule", schedule, Schedule, "a Schedule such as Schedule(first=0.25), or None for the method's own"),
            ("guard", guard, Guard, "a Guard such as Guard(drift=True) or Guard.off(), or None for the default one"),
        ):
            if value is not None:
                instance(f"{type(self).__name__}: {name}", value, kind, what)
        self.method = method
        self.quant = parse_quant(quant)
        own = Schedule() if method is None else method.default_schedule()
        self.schedule = schedule if schedule is not None else own
        self.guard = guard if guard is not None else Guard()
        self.backend = backend
        self.on_unsupported = on_unsupported

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} holds settings and cannot be called as a bare processor (it was set directly on "
            f"{type(attn).__name__}). Use pipe.set_attn_processor(...) or pipe.transformer.set_attn_processor(...) "
            "after `import dit_accel`; both attach it to every self-attention layer."
        )

    @property
    def name(self) -> str:
        """``"radial"``, ``"dense"``, ``"radial-sage2"``."""
        parts = [self.method.name if self.method else "dense", quant_name(self.quant)]
        return "-".join(part for part in parts if part)

    def dense_steps(self, total: int) -> list[int]:
        """Steps of a run of ``total`` on which every layer is dense, by the schedule or by the method."""
        if self.method is None and self.quant is None:
            return list(range(total))
        own = self.method.dense_steps(total) if self.method else ()
        return sorted({*self.schedule.dense_steps(total), *own})

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.to_dict() if self.method else None,
            "quant": self.quant.to_dict() if isinstance(self.quant, Quant) else self.quant,
            "schedule": self.schedule.to_dict(),
            "guard": self.guard.to_dict(),
            "backend": self.backend,
            "on_unsupported": self.on_unsupported,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Processor:
        """The inverse of :meth:`to_dict`, also after JSON."""
        values = {**data, "schedule": Schedule.from_dict(data["schedule"]), "guard": Guard.from_dict(data["guard"])}
        method, quant = values.pop("method"), values["quant"]
        values["quant"] = Quant.from_dict(quant) if isinstance(quant, dict) else quant
        return Processor(None if method is None else Method.from_dict(method), **values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Processor) and type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.method, self.quant, self.schedule, self.guard, self.backend, self.on_unsupported))

    def __repr__(self) -> str:
        quant = f"{self.quant}, " if self.quant else ""
        return f"{type(self).__name__}({self.method}, {quant}{self.schedule}, backend={self.backend!r})"


class _MethodProcessor(Processor):
    """A processor whose keyword arguments are its method's parameters plus the common ones."""

    method_class: ClassVar[type[Method]]

    def __init__(self, **settings: Any):
        common = _COMMON & settings.keys()
        parameters = {name: settings[name] for name in settings.keys() - common}
        allowed = inspect.signature(self.method_class).parameters
        unknown = parameters.keys() - allowed.keys()
        if unknown:
            raise UsageError(
                f"{type(self).__name__} has no parameter {', '.join(sorted(unknown))}; "
                f"allowed: {', '.join([*allowed, *sorted(_COMMON)])}"
            )
        super().__init__(self.method_class(**parameters), **{name: settings[name] for name in common})

    @classmethod
    def preset(cls, name: str, **settings: Any) -> _MethodProcessor:
        """A published configuration of the method by name, with single settings replaced by ``settings``.

        Where it was published with a schedule of its own, that is the schedule.
        """
        make = getattr(cls.method_class, "preset", None)
        if make is None:
            raise UsageError(f"{cls.method_class.__name__} has no presets; got {name!r}. Give its parameters instead")
        common = {key: settings.pop(key) for key in _COMMON & settings.keys()}
        method = make(name, **settings)
        common.setdefault("schedule", cls.method_class.preset_schedule(name))
        return cls(**{f.name: getattr(method, f.name) for f in fields(method)}, **common)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.method_class).parameters.values()
        common = [p for p in inspect.signature(Processor.__init__).parameters.values() if p.name in _COMMON]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        cls.__signature__ = inspect.Signature(parameters)
        method = cls.method_class.__name__
        cls.__doc__ = f"{cls.__doc__}\n\nParameters as in :class:`{method}`, plus those of :class:`Processor`."


_COMMON = {p.name for p in inspect.signature(Processor.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}


class RadialProcessor(_MethodProcessor):
    """Radial Attention: a static mask whose band narrows with the distance between frames."""

    method_class = Radial


class GNAProcessor(_MethodProcessor):
    """Generalized Neighborhood Attention: windows that groups of queries share. Images and video.

    For a preset or another constructor pass the method itself: ``Processor(GNA.preset("flux-4k"))``.
    """

    method_class = GNA


class ClearProcessor(_MethodProcessor):
    """CLEAR: a disc of image tokens and the text. Experimental without distilled weights."""

    method_class = Clear


class ParoProcessor(_MethodProcessor):
    """PAROAttention: tokens reordered per head and static block maps, both from a calibrated plan file."""

    method_class = Paro


class AdaSpaProcessor(_MethodProcessor):
    """AdaSpa: block masks searched for at few steps. Its first steps are dense by themselves, so no others are."""

    method_class = AdaSpa


class VMoBAProcessor(_MethodProcessor):
    """VMoBA: each query takes the chunks of the video whose mean key is most like it. A method for training."""

    method_class = VMoBA


class PisaProcessor(_MethodProcessor):
    """PISA: important blocks exactly, all others by their means. Images and video."""

    method_class = Pisa


class RectifiedProcessor(_MethodProcessor):
    """Rectified SpaAttn: block-sparse attention corrected by pooled attention. Images and video."""

    method_class = Rectified


class PyramidProcessor(_MethodProcessor):
    """PSA: the less a block matters, the coarser its keys. Images and video."""

    method_class = Pyramid


class QuantProcessor(Processor):
    """Dense attention with quantised products: every pair, no method, and every step unless ``schedule`` says so."""

    def __init__(self, quant: Quant | str = "auto", **settings: Any):
        if quant is None:
            raise UsageError("QuantProcessor needs a quant; give a dit_accel.Quant, a preset's name or 'auto'")
        super().__init__(None, quant=quant, **{"schedule": Schedule.none(), **settings})


class AllBlocksProcessor(_MethodProcessor):
    """Everything through the sparse kernel; for tests."""

    method_class = AllBlocks


class RandomBlocksProcessor(_MethodProcessor):
    """A seeded random block mask; for tests."""

    method_class = RandomBlocks


PROCESSORS: dict[str, type[_MethodProcessor]] = {
    cls.method_class.name: cls
    for cls in (
        RadialProcessor,
        GNAProcessor,
        ClearProcessor,
        ParoProcessor,
        AdaSpaProcessor,
        VMoBAProcessor,
        PisaProcessor,
        RectifiedProcessor,
        PyramidProcessor,
        AllBlocksProcessor,
        RandomBlocksProcessor,
    )
}
