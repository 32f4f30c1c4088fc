"""The probe: run a transformer a few times, see which tokens a changed latent moves, write its row.

For a model class without a row. What the message of :func:`family_of` can only guess from names, this finds: which
modules attend to the whole sequence, which argument holds the latents, in which order its positions become tokens, how
large a patch is, and on which side the text is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layout import Layout, Segment
from . import ops
from .derive import adopt, stock_of
from .families.row import Family

_NAMES = "THW"


@dataclass(frozen=True)
class Probed:
    """What a probe found. ``family``: the row, ready for ``register_family``; ``layout``: of the call that was probed.

    ``source``: the row as Python, to keep; ``str()`` gives it.
    """

    family: Family
    layout: Layout
    source: str

    def __str__(self) -> str:
        return self.source


@torch.no_grad()
def probe_family(model: nn.Module, call: dict[str, Any], name: str | None = None) -> Probed:
    """The row of a transformer, from forwards with the keyword arguments ``call`` and one value changed in each.

    Use a tiny configuration, without refiners before its blocks, and sizes that differ on every axis (text included);
    about twenty forwards are run. ``model`` is left as it was.

    Raises ``UnsupportedError`` where tokens cannot be followed: it says what was found and what the row must do itself.
    """
    baseline = _forward(model, call)
    sequence = max((c for c in baseline if c.square), key=lambda c: c.queries, default=None)
    if sequence is None:
        raise UnsupportedError(f"{type(model).__name__} made no self-attention call that can run sparse; nothing to do")
    own = [c for c in baseline if c.square and c.queries == sequence.queries]
    experiment = _Experiment(model, call, own[0].name, own[0].query)
    found = [view for key in call if (view := _view(experiment, key)) is not None]
    video = max(found, key=lambda view: view.tokens, default=None)
    if video is None or len(video.axes) == 1:
        flat = f"; the tokens of {video.key!r} are {video.tokens} in one run" if video else ""
        raise UnsupportedError(
            f"no argument of {type(model).__name__} maps its positions to single tokens of a (T, H, W) grid{flat}. "
            "Write the row with a layout function that reads the grid from other arguments (family_of(model) prints a "
            "row to start from), or leave out refiners (their number set to 0) and probe again"
        )
    before, after = video.first, sequence.queries - video.first - video.tokens
    text = next((view for view in _texts(experiment, call, video) if view), None)
    side = "none" if text is None else ("first" if text.first < video.first else "last")
    words = {"none": 0, "first": before, "last": after}[side]
    rest = before + after - words
    if rest or (text is not None and text.length != words):
        raise UnsupportedError(
            f"the {sequence.queries} tokens of {type(model).__name__} are {before} + a grid of {video.grid} from "
            f"{video.key!r} + {after}; only text of one argument can be followed beside the grid. Write the row with a "
            "layout function that names the others as segments"
        )
    sites = _patterns(c.name for c in own)
    family = Family(
        name=name or type(model).__name__.lower(),
        models=(type(model).__name__,),
        sites=sites[0] if len(sites) == 1 else sites,
        cross_sites="|".join(_patterns(c.name for c in baseline if not c.square and c.queries == own[0].queries)),
        reads=(video.key, *((text.key,) if text else ())),
        layout=_reader(video, side),
        text=side,
        timestep=next((argument for argument in ("timestep", "timesteps", "t") if argument in call), "timestep"),
        image="T" not in video.axes,
    )
    return Probed(family, family.layout(None, *(call[key] for key in family.reads)), _source(family, video))


def _source(family: Family, video: _View) -> str:
    """The row as Python."""
    fields = ("name", "models", "sites", "cross_sites", "reads", "text", "timestep", "image")
    lines = [f"    {field}={getattr(family, field)!r}," for field in fields if getattr(family, field)]
    arguments, words = "config, latents", ""
    if family.joint:
        arguments += ", text"
        words = ", text=text.shape[1]" + (", text_first=True" if family.text == "first" else "")
    return "\n".join(
        [
            "from dit_accel import Layout",
            "from dit_accel.diffusers import Family, register_family",
            "",
            "register_family(Family(",
            *lines,
            f"    layout=lambda {arguments}: Layout(grid=({video.code()}){words}),",
            "))",
        ]
    )


@dataclass(frozen=True)
class _Call:
    """One attention call: of which module, query (B, N, H, D), key tokens."""

    name: str
    query: Tensor
    keys: int

    @property
    def queries(self) -> int:
        return self.query.shape[1]

    @property
    def square(self) -> bool:
        return self.queries == self.keys


class _Recorder:
    """Stands where an engine stands: keeps every call and answers with the stock result."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.calls: list[_Call] = []

    def attend(self, layer: int, call: ops.Primitive) -> Tensor:
        q, k, _ = call.heads_first()
        self.calls.append(_Call(self.names[layer], q.transpose(1, 2), k.shape[2]))
        return call.dense()


def _forward(model: nn.Module, call: dict[str, Any]) -> list[_Call]:
    """Every attention call of one forward that a derived processor would see."""
    with _recording(model) as recorder:
        model(**call)
    return recorder.calls


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Recorder]:
    recorder, number, before = _Recorder(), ops.new_id(), []
    ops.ENGINES[number] = recorder
    try:
        for name, module in model.named_modules():
            processor = getattr(module, "processor", None)
            if processor is None:
                continue
            try:
                module.processor = adopt(stock_of(processor), torch.tensor([number, len(recorder.names)]))
            except UnsupportedError:
                continue
            before.append((module, processor))
            recorder.names.append(name)
        yield recorder
    finally:
        for module, processor in before:
            module.processor = processor


@dataclass
class _Experiment:
    """A model, a call, and the queries (B, N, H, D) at its first site, to which changed calls are compared."""

    model: nn.Module
    call: dict[str, Any]
    site: str
    stock: Tensor

    def moved(self, key: str, index: tuple[int, ...]) -> list[int]:
        """Tokens of the first sample whose query changes with one value of the argument ``key``."""
        value = self.call[key]
        first = value[0] if isinstance(value, list) else value
        first = first.clone()
        first[index] += 1
        changed = {**self.call, key: [first, *value[1:]] if isinstance(value, list) else first}
        query = next(c.query for c in _forward(self.model, changed) if c.name == self.site)
        if query.shape != self.stock.shape:
            return []
        return (query != self.stock)[0].flatten(1).any(1).nonzero().flatten().tolist()


@dataclass(frozen=True)
class _View:
    """An argument whose positions are single tokens. ``axes``: by name, (axis, patch), slowest first."""

    key: str
    first: int
    grid: tuple[int, int, int]
    axes: dict[str, tuple[int, int]]
    listed: bool

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def code(self) -> str:
        source = "latents[0]" if self.listed else "latents"
        parts = [f"{source}.shape[{self.axes[n][0]}] // {self.axes[n][1]}" if n in self.axes else "1" for n in _NAMES]
        return ", ".join(parts)


def _view(experiment: _Experiment, key: str) -> _View | None:
    """How positions of the argument ``key`` become tokens; None where one value moves none, or several tokens."""
    value = experiment.call[key]
    listed = isinstance(value, list)
    x = value[0] if listed and value else value
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < (2 if listed else 3):
        return None
    origin = [0] * x.ndim
    start = experiment.moved(key, tuple(origin))
    if len(start) != 1:
        return None
    strides = {}
    for axis in range(0 if listed else 1, x.ndim):
        found = _stride(experiment, key, x, axis, start[0])
        if found is not None:
            strides[axis] = found
    # Row-major: the slowest axis is that of the longest stride.
    order = sorted(strides, key=lambda axis: -strides[axis][1])
    sizes = [x.shape[axis] // strides[axis][0] for axis in order]
    expected = 1
    for axis, size in zip(reversed(order), reversed(sizes), strict=True):
        if strides[axis][1] != expected:
            return None
        expected *= size
    if not order or len(order) > 3:
        return None
    axes = {n: (axis, strides[axis][0]) for n, axis in zip(_NAMES[-len(order) :], order, strict=True)}
    return _View(key, start[0], (1, 1, *sizes)[-3:], axes, listed)


def _stride(experiment: _Experiment, key: str, x: Tensor, axis: int, start: int) -> tuple[int, int] | None:
    """(patch, tokens to the next patch) along an axis; None for one inside the token, such as channels."""

    def token(at: int) -> int | None:
        index = [0] * x.ndim
        index[axis] = at
        moved = experiment.moved(key, tuple(index))
        return moved[0] if len(moved) == 1 else None

    if token(x.shape[axis] - 1) == start:
        return None
    for at in range(1, x.shape[axis]):
        here = token(at)
        if here is None:
            return None
        if here != start:
            return at, here - start
    return None


@dataclass(frozen=True)
class _Text:
    key: str
    first: int
    length: int


def _texts(experiment: _Experiment, call: dict[str, Any], video: _View) -> Iterator[_Text]:
    """Arguments (B, N, D) that move tokens beside the grid and none inside it; refiners may mix them."""
    for key, value in call.items():
        if key == video.key or not isinstance(value, Tensor) or value.ndim != 3 or not value.is_floating_point():
            continue
        moved = experiment.moved(key, (0, 0, 0))
        if moved and not any(video.first <= token < video.first + video.tokens for token in moved):
            yield _Text(key, moved[0], value.shape[1])


def _reader(video: _View, side: str) -> Callable[..., Layout]:
    def layout(config: Any, latents: Any, text: Any = None) -> Layout:
        """Found by the probe."""
        x = latents[0] if video.listed else latents
        sizes = [x.shape[video.axes[n][0]] // video.axes[n][1] if n in video.axes else 1 for n in _NAMES]
        segments = [Segment("main", tuple(sizes))]
        if side != "none":
            segments.insert(0 if side == "first" else 1, Segment("text", text.shape[1]))
        return Layout(segments=segments)

    return layout


def _patterns(names: Any) -> tuple[str, ...]:
    """Regular expressions for module names, block numbers left open, in the order of the calls."""
    escaped = (re.sub(r"\b\d+\b", r"\\d+", name.replace(".", r"\.")) for name in names)
    return tuple(dict.fromkeys(escaped))
