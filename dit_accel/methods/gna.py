"""Generalized Neighborhood Attention (GNA, arXiv 2504.16922): sliding, strided, dilated and blocked windows.

Each query of a T x H x W grid sees the keys of a window around it. ``stride`` makes neighbouring queries share one
window, which is what turns a sliding window (stride 1) into whole blocks (stride = window). The semantics are those
of NATTEN 0.21.7, element for element. Windows per axis: ``windows.py``; how they become blocks: ``tiles.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..checks import number
from ..errors import UnsupportedError, UsageError
from ..layout import Grid, Layout
from ..plans import Plan
from ..schedule import Schedule
from .base import Call, Method, check_density
from .gna_density import density_of, solve
from .gna_presets import DEFAULT, PRESETS, Preset
from .peraxis import PerAxis, at, flags, numbers, rank
from .tile_shapes import choose, counter
from .tiles import box_plan
from .windows import Window

AXES = ("T", "H", "W")


@dataclass(frozen=True)
class GNA(Method):
    """Generalized Neighborhood Attention: each query sees a window of keys around it, shared by groups of queries.

    ``window``, ``stride``, ``dilation``, ``causal``: one value for every axis, or one per axis as (T, H, W), as
    (H, W) for single frames, as (W,) for plain sequences. A window of -1 is the whole axis. Axes of length 1 need
    no window and ignore theirs. Text and other segments see all and are seen by all.

    ``base_size``: the grid that the values are meant for; on another one window, stride and dilation are rescaled
    per axis as Cosmos-Predict2 does. That rule dilates windows on an axis 1.5 times as long or more. -1 stands for
    the present length, so ``base_size=-1`` only cuts windows that are larger than their axis. ``scale``: softmax
    scale, None for ``scale_factor`` times D**-0.5.

    ``window=None`` is the published HunyuanVideo setting: window (18, 24, 24), stride (16, 8, 8), ``base_size=-1``.
    With a window of your own the stride defaults to 1, as in NATTEN.
    """

    name: ClassVar[str] = "gna"

    window: PerAxis | None = None
    stride: PerAxis | None = None
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False
    base_size: PerAxis | None = None
    scale: float | None = None
    scale_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.window is None:
            object.__setattr__(self, "window", DEFAULT.window)
            object.__setattr__(self, "stride", DEFAULT.stride if self.stride is None else self.stride)
            object.__setattr__(self, "base_size", -1 if self.base_size is None else self.base_size)
        base = self.base_size
        for name, value in (
            ("window", numbers("GNA.window", self.window, whole=True)),
            ("stride", numbers("GNA.stride", 1 if self.stride is None else self.stride)),
            ("dilation", numbers("GNA.dilation", self.dilation)),
            ("causal", flags("GNA.causal", self.causal)),
            ("base_size", None if base is None else numbers("GNA.base_size", base, whole=True)),
        ):
            object.__setattr__(self, name, value)
        for axis in range(-(rank(self._per_axis) or 1), 0):
            window, stride = at(self.window, axis), at(self.stride, axis)
            # A window of 1 may stand on an axis of length 1, where a stride meant for the others is moot.
            if stride > window > 1:
                raise UsageError(
                    f"GNA.stride {self.stride} is larger than window {self.window} on axis {AXES[axis]}; queries that "
                    f"share a window must lie in it: allowed 1..{window}"
                )
        if self.scale is not None:
            what = "a positive softmax scale, or None for D**-0.5"
            object.__setattr__(self, "scale", number("GNA.scale", self.scale, what, 0, above=True))
        factor = number("GNA.scale_factor", self.scale_factor, "a positive factor of D**-0.5", 0, above=True)
        object.__setattr__(self, "scale_factor", factor)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GNA:
        """A published configuration by name, with single parameters replaced by ``changes``.

        Sources: GNA paper 4.2, 4.3 and tables 2 to 6 (``cosmos``, ``cosmos-fast``, ``hunyuan``, ``hunyuan-58``,
        ``flux-4k``), and the public per-layer configuration of Cosmos-Predict2 (``cosmos-predict2-a`` .. ``-e``, for
        fine-tuned checkpoints). Each carries its grid as ``base_size``, so it adapts to other resolutions;
        :meth:`preset_schedule` has the dense steps that go with it.
        """
        p = _preset(name)
        values = {"window": p.window, "stride": p.stride, "dilation": p.dilation, "base_size": p.grid}
        return cls(**{**values, **changes})

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule:
        """The dense steps that a configuration was published with, as a share of its run."""
        p = _preset(name)
        return Schedule(first=p.dense_steps / p.steps if p.dense_steps else 0)

    @classmethod
    def sliding_tile(cls, window: PerAxis = 3, tile: tuple[int, ...] = (6, 8, 8)) -> GNA:
        """Sliding Tile Attention (arXiv 2502.04507): ``window`` in tiles around the tile of the query.

        Defaults: tile (6, 8, 8) as released, window (3, 3, 3), the 91 % sparse setting for 30 x 48 x 80 tokens. As
        released, an even window counts as the next odd one, and a window that covers its axis is the whole axis.
        Grids that are no multiple of the tile, which the original refuses, take GNA's rule for the ragged end.
        """
        tile = numbers("tile", tile)
        tile = tile if isinstance(tile, tuple) else (tile,) * 3
        window = numbers("window", window, whole=True)
        tiles = window if isinstance(window, tuple) else (window,) * len(tile)
        if len(tiles) != len(tile):
            raise UsageError(f"sliding_tile takes one window per axis of the tile {tile}; got {window}")
        size = tuple(-1 if k == -1 else (k // 2 * 2 + 1) * t for k, t in zip(tiles, tile, strict=True))
        return cls(size, stride=tile, base_size=-1)

    @classmethod
    def inward(cls, native_size: tuple[int, int], *, patch: int = 16) -> GNA:
        """FreeSwim's inward sliding window (arXiv 2511.14712, 3.1): the model's native field of view, in every frame.

        ``native_size``: (height, width) in pixels that the model was trained for; ``patch``: pixels per token.
        The softmax scale is the released one, sqrt(ln 3120 / ln 1560 / D), whatever the sizes. Where the window
        exceeds the axis, the axis is seen whole.
        """
        native = numbers("native_size", native_size)
        if not isinstance(native, tuple) or len(native) != 2 or min(native) < 2 * patch:
            raise UsageError(
                f"native_size is (height, width) in pixels, each at least {2 * patch}; got {native_size}. "
                "Wan 2.1: (480, 832) for the 1.3B model, (720, 1280) for 14B"
            )
        side = tuple(2 * (pixels // patch // 2) + 1 for pixels in native)
        return cls((-1, *side), base_size=-1, scale_factor=math.sqrt(math.log(3120, 1560)))

    def check(self, layout: Layout) -> None:
        """Raise ``UsageError`` when the windows do not fit the grid."""
        self.windows(layout.grid)

    def windows(self, grid: Grid) -> tuple[Window, Window, Window]:
        """The window on each axis of ``grid``, rescaled. Raises ``UsageError`` when it does not fit."""
        given = rank(self._per_axis) or 3
        if max(grid[: 3 - given], default=1) > 1:
            example = (-1,) * (3 - given) + tuple(at(self.window, axis) for axis in range(-given, 0))
            raise UsageError(
                f"GNA was given {given} values per parameter, but grid {grid} (T, H, W) has more axes; "
                f"give three, with -1 for a whole axis, e.g. window={example}"
            )
        return tuple(self._window(axis, grid) for axis in range(3))

    def plan(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, call: Call) -> Plan:
        if call.kv_layout is not None and call.kv_layout != call.layout:
            raise UnsupportedError(f"GNA needs keys in the queries' layout; got {call.layout} and {call.kv_layout}")
        axes = [window.axis() for window in self.windows(call.layout.grid)]
        _, shapes = choose([counter(axis) for axis in axes], call.layout.grid)
        return replace(box_plan(call.layout, axes, shapes), scale=self.scale, scale_factor=self.scale_factor)

    def density(self, layout: Layout) -> float:
        """Density of the plan on ``layout``, without making it."""
        return density_of(self.windows(layout.grid), layout)

    def with_density(self, density: float, layout: Layout) -> tuple[GNA, float]:
        """Solve ``window``, in proportion on all axes; axes seen whole stay so unless that misses by more than 20 %.

        Windows that keep tiles whole are preferred while they come within 10 %. Dilation and causality stay, resolved
        for ``layout``, and so does the stride while the window is no smaller; else it becomes half the window.
        """
        windows, reached = solve(self.windows(layout.grid), check_density(density), layout)
        names = {"window": "size", "stride": "stride", "dilation": "dilation", "causal": "causal"}
        values = {name: tuple(getattr(w, field) for w in windows) for name, field in names.items()}
        return replace(self, **values, base_size=None), reached

    @property
    def _per_axis(self) -> tuple[Any, ...]:
        return self.window, self.stride, self.dilation, self.causal, self.base_size

    def _window(self, axis: int, grid: Grid) -> Window:
        """Axis 0, 1 or 2. Resolution adaptation as in Cosmos-Predict2's public configuration."""
        length = grid[axis]
        if length == 1:
            return Window(1, 1)
        size, stride, dilation, causal, base = (at(value, axis - 3) for value in self._per_axis)
        if size == -1:
            size, stride = length, 1
        elif base is not None:
            ratio = 1 if base == -1 else length / base
            size = min(max(min(size, 2), round(size * ratio)), length)
            stride = min(max(1, round(stride * ratio)), size)
            dilation = min(max(1, round(dilation * ratio)), length // size)
        seen = f"on axis {AXES[axis]} of length {length} (grid {grid})"
        if size > length:
            raise UsageError(
                f"GNA.window is {size} {seen}; allowed 1..{length}, or -1 for the whole axis. base_size=-1 cuts "
                "windows to the axis, base_size=(T, H, W) rescales them from that grid"
            )
        if stride > size:
            raise UsageError(f"GNA.stride is {stride} with window {size} {seen}; allowed 1..{size}")
        if size * dilation > length:
            raise UsageError(
                f"GNA.dilation is {dilation} with window {size} {seen}; window x dilation must fit: dilation "
                f"1..{length // size}, or window 1..{length // dilation}"
            )
        return Window(length, size, stride, dilation, causal)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"unknown GNA preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
