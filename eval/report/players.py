"""Players: the clips of one prompt and seed side by side on one clock, dense first, differences below."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .html import Markup, tag
from .sources import Media, Shelf, Source

DENSE = "dense"
WIDEST = 340  # pixels of a picture, so that few of them do not fill the window


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


def player(sources: list[Source], shelf: Shelf, labels: Mapping[Path, str]) -> Markup | None:
    """One player for all clips of ``sources``, which are renders of the same prompt and seed; None without clips.

    ``labels``: what each record's side is called.
    """
    media: list[Media] = []
    panels: list[Panel] = []
    for source in sources:
        _add(source, shelf, media, panels, labels[source.path])
    if not media:
        return None
    # Dense may have been rendered more than once; one picture of it is enough.
    dense = next((panel for panel in panels if panel.label == DENSE), None)
    panels = ([dense] if dense else []) + [panel for panel in panels if panel.label != DENSE]
    moving = any(not medium.image for medium in media)
    return tag(
        "div",
        tag(
            "div",
            [_column(panel, dense) for panel in panels],
            class_="panels",
            style=f"max-width:{WIDEST * len(panels)}px",
        ),
        _controls() if moving else None,
        tag("div", [_element(medium) for medium in media], class_="media"),
        class_="player",
    )


def _add(source: Source, shelf: Shelf, media: list[Media], panels: list[Panel], name: str) -> None:
    # Folders of frames are named by their path, clips by their name beside the record.
    files = [source.path.parent / file for file in source.data.get("files", []) if Path(file).name == file]
    both = next((file for file in files if "-dense-vs-" in file.name), None)
    taken = shelf.take(both or files[0]) if files else None
    if taken is None:
        return
    media.append(taken)
    at = len(media) - 1
    panels += [Panel(DENSE, at, 0, 0.5), Panel(name, at, 0.5, 0.5)] if both else [Panel(name, at, 0, 1)]


def label_all(sources: list[Source]) -> dict[Path, str]:
    """A name for each render: its method, with the density, and a number if need be, where one method differs."""
    settings: dict[str, list[str]] = {}
    own = {source.path: json.dumps(source.data["settings"].get("attention"), sort_keys=True) for source in sources}
    for source in sources:
        known = settings.setdefault(method_of(source.data), [])
        if own[source.path] not in known:
            known.append(own[source.path])
    found = {}
    for source in sources:
        name = method_of(source.data)
        if len(settings[name]) > 1:
            density = source.data["attention"].get("density")
            told = "" if density is None else f" {density:.2f}"
            name = f"{name}{told} #{settings[name].index(own[source.path]) + 1}"
        found[source.path] = name
    return found


def method_of(data: dict) -> str:
    """The name of the method of a render's record."""
    attention = data["settings"].get("attention") or {}
    method = attention.get("method") or {}
    return method.get("method") or ("dense" if not attention.get("quant") else "quantised")


def _column(panel: Panel, dense: Panel | None) -> Markup:
    """A picture, and below it what it has over dense."""
    views = _view(panel.label, panel.place)
    if dense and panel is not dense:
        views += _view(f"|{panel.label} - dense| x 4", panel.place, dense.place)
    return tag("div", views, class_="panel")


def _view(label: str, place: str, minus: str | None = None) -> list[Markup]:
    return [tag("canvas", data_of=place, data_minus=minus, role="img", aria_label=label), tag("span", label)]


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
