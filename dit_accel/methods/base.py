"""Method: the base of every sparse attention method, and what one call tells it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import known_fields, number
from ..errors import UnsupportedError, UsageError
from ..layout import Layout
from ..plans import Plan
from ..schedule import Schedule
from ..state import State
from ..step import Step

REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Call:
    """What a method is told about one attention call.

    ``kv_valid``: int32 (B,) live key counts or None. ``layer``: index of the attention site in forward order.
    ``head_offset``: global index of the first head present (tensor or context parallel). ``scale``: the
    caller's softmax scale, or None.
    """

    layout: Layout
    kv_layout: Layout | None = None
    kv_valid: Tensor | None = None
    layer: int = 0
    step: Step = field(default_factory=Step)
    state: State = field(default_factory=State)
    head_offset: int = 0
    scale: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class ModelFacts:
    """What a method is told about a model: ``name`` of its class, its ``config`` as plain JSON values, the number of
    attention ``layers``, and whether it makes nothing but single images."""

    name: str
    config: dict[str, Any]
    layers: int
    image: bool = False


# Large enough that a method refuses it for being a single image, never for its size.
_LARGE_IMAGE = Layout(grid=(1, 256, 256))


@dataclass(frozen=True)
class Method:
    """A frozen, hashable, picklable record of published parameters that makes plans.

    Subclasses set ``name`` and implement :meth:`plan`. ``static`` says that the plan follows from the layout
    alone: such a plan is made once per layout and ``q, k, v`` may be None. ``reads_values``: one that is not static
    holds means of v too.
    """

    name: ClassVar[str] = ""
    static: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):  # a subclass without a name of its own does not take its parent's place
            REGISTRY[cls.name] = cls

    def check(self, layout: Layout) -> None:
        """Raise ``UnsupportedError`` when this method has no meaning on ``layout``."""

    def check_model(self, model: ModelFacts) -> None:
        """Raise ``UnsupportedError`` when this method cannot serve ``model``. Asked when it is set on one.

        The default asks :meth:`check` about a single image where the model makes nothing else. What an image of one
        size cannot have is for the call to say.
        """
        if model.image:
            try:
                self.check(_LARGE_IMAGE)
            except UsageError:
                pass
            except UnsupportedError as error:
                raise UnsupportedError(f"{model.name} makes single images. {error}") from None

    def plan(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, call: Call) -> Plan | None:
        """The plan of one call. q (B, H, Nq, D), k and v (B, Hk, Nk, D). None: this call is dense."""
        raise NotImplementedError

    def default_schedule(self) -> Schedule:
        """Which steps and layers stay dense where the user names none."""
        return Schedule()

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule | None:
        """The dense steps and layers that the preset ``name`` was published with, or None where it states none."""
        return None

    def known_density(self, layout: Layout) -> float | None:
        """The density of this method's plans on ``layout`` as far as it is known before a call, else None."""
        return float(self.plan(None, None, None, Call(layout)).density) if self.static else None

    def dense_steps(self, total: int) -> list[int]:
        """Steps of a run of ``total`` on which the method itself is dense (:meth:`plan` gives None)."""
        return []

    def planning_steps(self, total: int) -> list[int] | None:
        """Steps of a run of ``total`` on which :meth:`plan` looks at the tensors, keeping what it finds until the next
        one; None where it looks at them in every call."""
        return [] if self.static else None

    @property
    def needs_total(self) -> bool:
        """Whether the method must know the number of steps of a run."""
        return False

    def state_bytes(self, layout: Layout, *, layers: int, heads: int, batch: int = 1) -> int:
        """Bytes that the method keeps between calls, at most. ``batch``: samples per step, all guidance branches."""
        return 0

    def with_density(self, density: float, layout: Layout) -> tuple[Method, float]:
        """This method with its own knobs solved for ``density`` on ``layout``, and the density reached."""
        raise UnsupportedError(f"{type(self).__name__} has no density knob; set its parameters instead")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Method:
        """The inverse of :meth:`to_dict`. Raises ``UsageError`` for a name that is no field."""
        values = dict(data)
        cls = find(values.pop("method", ""))
        known_fields(cls.__name__, values, [f.name for f in fields(cls)])
        return cls(**values)


def find(name: str) -> type[Method]:
    """The method class called ``name``. Raises ``UsageError`` with the nearest name."""
    import difflib

    key = str(name).lower()
    if key in REGISTRY:
        return REGISTRY[key]
    close = difflib.get_close_matches(key, REGISTRY, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"unknown method {name!r}{hint}; known methods: {', '.join(sorted(REGISTRY))}")


def check_density(density: float) -> float:
    """``density`` as a float in (0, 1]; raises ``UsageError`` otherwise."""
    return float(number("density", density, "the kept fraction and lies in (0, 1]", 0, 1, above=True))
