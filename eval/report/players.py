"""Players: the clips of one prompt and seed side by side on one clock, dense first, differences last."""

from __future__ import annotations

from dataclasses import dataclass

from .html import Markup, tag
from .sources import Media, Shelf, Source


@dataclass(frozen=True)
class Panel:
    """``label`` over a part of a medium: ``begin`` and ``width`` are shares of its width."""

    label: str
    medium: int
    begin: float
    width: float

    @property
    def place(self) -> str:
        return f"{self.medium},{self.begin:g},{self.width:g}"


def player(sources: list[Source], shelf: Shelf) -> Markup | None:
    """One player for all clips of ``sources``, which are renders of the same prompt and seed; None without clips."""
    media: list[Media] = []
    panels: list[Panel] = []
    for source in sources:
        _add(source, shelf, media, panels)
    if not media:
        return None
    # Dense may have been rendered more than once; one picture of it is enough.
    dense = next((panel for panel in panels if panel.label == "dense"), None)
    panels = ([dense] if dense else []) + [panel for panel in panels if panel.label != "dense"]
    views = [_view(panel.label, panel.place) for panel in panels]
    if dense:
        views += [_view(f"|{p.label} - dense| x 4", p.place, dense.place) for p in panels[1:]]
    moving = any(not medium.image for medium in media)
    return tag(
        "div",
        tag("div", views, class_="row"),
        _controls() if moving else None,
        tag("div", [_element(medium) for medium in media], class_="media"),
        class_="player",
    )


def _add(source: Source, shelf: Shelf, media: list[Media], panels: list[Panel]) -> None:
    data = source.data
    name = method_of(data)
    files = [source.path.with_name(file) for file in data.get("files", [])]
    both = next((file for file in files if "-dense-vs-" in file.name), None)
    taken = shelf.take(both or files[0]) if files else None
    if taken is None:
        return
    media.append(taken)
    at = len(media) - 1
    panels += [Panel("dense", at, 0, 0.5), Panel(name, at, 0.5, 0.5)] if both else [Panel(name, at, 0, 1)]


def method_of(data: dict) -> str:
    """The name of the method of a render's record."""
    attention = data["settings"].get("attention") or {}
    method = attention.get("method") or {}
    return method.get("method") or ("dense" if not attention.get("quant") else "quantised")


def _view(label: str, place: str, minus: str | None = None) -> Markup:
    canvas = tag("canvas", data_of=place, data_minus=minus, role="img", aria_label=label)
    return tag("div", canvas, tag("span", label), class_="panel")


def _element(medium: Media) -> Markup:
    """Plays by itself where scripts are off; the script hides it and draws from it."""
    if medium.image:
        return tag("img", src=medium.address, alt="")
    return tag("video", src=medium.address, loop=True, muted=True, playsinline=True, preload="auto", controls=True)


def _controls() -> Markup:
    return tag(
        "div",
        tag("button", "Play", type="button"),
        tag("input", type="range", min=0, max=1, step="any", value=0, aria_label="time"),
        tag("output", ""),
        class_="controls",
    )
