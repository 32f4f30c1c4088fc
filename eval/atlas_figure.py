"""Pictures of the mask atlas: block maps and what one query sees, several methods side by side."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedError, UsageError
from .atlas import FULL, PARTIAL, SKIPPED, Panel
from .method_spec import describe

INK, FAINT, FRAME = "#1d2733", "#66717d", "#b9c0c7"
COLOURS = {SKIPPED: "#f1f2f4", PARTIAL: "#f2a33c", FULL: "#1f5f8b"}
QUERY = "#d7263d"
NAMES = {FULL: "seen whole", PARTIAL: "seen in part", SKIPPED: "skipped"}
# Pixels per side beyond which a block map is averaged down, so that a thin band pales instead of vanishing.
MAP_PIXELS = 900
SHARP = 300
# Width over height that a mosaic of frames aims at.
SCREEN = 1.75
# Left, bottom, width and height in inches of the block map and of the mosaic; a column's from its own left edge.
SINGLE = (0.45, 0.4, 3.75, 3.75), (4.75, 0.4, 5.65, 3.75)
COLUMN = (0.3, 3.0, 3.6, 3.6), (0.12, 0.5, 3.96, 2.15)


def draw(panels: Sequence[Panel], *, title: str | None = None) -> Any:
    """A matplotlib ``Figure``: one panel wide, several side by side.

    Raises ``UnsupportedError`` without matplotlib, ``UsageError`` without panels.
    """
    figure_class = _matplotlib()
    if not panels:
        raise UsageError("nothing to draw: name at least one method")
    one = len(panels) == 1
    width, height = (10.6, 5.5) if one else (0.3 + 4.3 * len(panels), 8.0)
    # Room for the third line of a heading.
    height += 0.2 * any(panel.synthetic for panel in panels)
    figure = figure_class(figsize=(width, height), facecolor="white")
    title = textwrap.shorten(title or _title(panels[0]), round(9 * (width - 4)), placeholder=" ...")
    figure.text(0.14 / width, 1 - 0.14 / height, title, size=12, weight="bold", color=INK, va="top")
    for number, panel in enumerate(panels):
        left = 0.14 + 4.3 * number
        boxes = SINGLE if one else tuple((left + x, *rest) for x, *rest in COLUMN)
        block_map, mosaic = (figure.add_axes(_relative(box, width, height)) for box in boxes)
        _heading(figure, panel, left / width, 1 - 0.6 / height, 110 if one else 56)
        _block_map(block_map, panel)
        _mosaic(mosaic, panel)
    _legend(figure, panels, width, height)
    return figure


def save(panels: Sequence[Panel], path: str | Path, *, title: str | None = None, dpi: int = 120) -> Path:
    """Draw ``panels`` into an image file; the suffix chooses the format (png, svg, pdf). Returns the path."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"cannot write a picture to {path.name!r}; the name must end in .png, .svg or .pdf")
    figure = draw(panels, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        _save_png(figure, path, dpi)
    else:
        figure.savefig(path, dpi=dpi)
    return path


def _save_png(figure: Any, path: Path, dpi: int) -> None:
    """A palette of 64 serves four hues and their mixtures, in a third of the bytes."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=dpi)
    Image.open(pixels).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _matplotlib() -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            'drawing needs matplotlib, which is not installed; install it with: pip install "dit-accel[report]" '
            "(or take the numbers alone, with --json and no -o)"
        ) from error
    return Figure


def _relative(box: tuple[float, ...], width: float, height: float) -> tuple[float, ...]:
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _title(panel: Panel) -> str:
    t, h, w = panel.layout.grid
    text = f" + {panel.outside} text" if panel.outside else ""
    return f"{t} x {h} x {w}{text} = {panel.layout.tokens:,} tokens"


def _heading(figure: Any, panel: Panel, x: float, y: float, columns: int) -> None:
    counts, inch = panel.counts, 1 / figure.get_figheight()
    about, asked = ("≈ " if panel.estimated else ""), ""
    if panel.target is not None:
        asked = f"  (asked {panel.target:g})"
    kind = "image" if panel.layout.grid[0] == 1 else "video"
    video = f"  ({kind} alone {panel.density_video:.3f})" if panel.outside else ""
    figure.text(x, y, panel.method.name, size=11, weight="bold", color=INK, va="top")
    figure.text(
        x, y - 0.2 * inch, f"density {about}{panel.density:.3f}{video}{asked}", size=9.5, color=COLOURS[FULL], va="top"
    )  # fmt: skip
    lines = [
        textwrap.shorten(describe(panel.method), columns, placeholder=" ..."),
        f"{counts['full']:,} blocks whole, {counts['partial']:,} in part, {counts['skipped']:,} skipped",
    ]
    if panel.synthetic:
        lines.append("planned from made-up q and k: its shape, not a model's")
    figure.text(x, y - 0.4 * inch, "\n".join(lines), size=8, color=FAINT, va="top", linespacing=1.35)


def _block_map(axes: Any, panel: Panel) -> None:
    rows, columns = panel.blocks.shape
    # Sharp edges while a block is wider than a pixel; beyond that, nearest would drop whole columns.
    how = "nearest" if max(rows, columns) <= SHARP else "hanning"
    axes.imshow(_pixels(panel.blocks), interpolation=how, extent=(0, columns, rows, 0), aspect="auto")
    _plain(axes)
    order = ", tile order" if panel.reordered else ""
    q, k = panel.block_size
    axes.set_xlabel(f"{columns:,} key blocks of {k}{order}", size=8, color=FAINT, labelpad=3)
    axes.set_ylabel(f"{rows:,} query blocks of {q}", size=8, color=FAINT, labelpad=3)
    axes.plot(columns, panel.query_block + 0.5, marker="<", markersize=5, color=QUERY, clip_on=False, zorder=3)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)


def _pixels(blocks: np.ndarray) -> np.ndarray:
    """float32 (rows, columns, 3): the classes as colours, averaged over groups of blocks beyond MAP_PIXELS."""
    palette = np.array([_rgb(COLOURS[kind]) for kind in (SKIPPED, PARTIAL, FULL)], dtype=np.float32)
    if max(blocks.shape) <= MAP_PIXELS:
        return palette[blocks]
    shares = [(blocks == kind).astype(np.float32) for kind in range(3)]
    for axis in (0, 1):
        shares = [_shrunk(share, axis) for share in shares]
    return np.stack(shares, -1) @ palette


def _shrunk(share: np.ndarray, axis: int) -> np.ndarray:
    length = share.shape[axis]
    if length <= MAP_PIXELS:
        return share
    cuts = np.linspace(0, length, MAP_PIXELS + 1).astype(int)
    sizes = np.diff(cuts).astype(np.float32)
    return np.add.reduceat(share, cuts[:-1], axis=axis) / (sizes[:, None] if axis == 0 else sizes)


def _mosaic(axes: Any, panel: Panel) -> None:
    """The frames side by side, row by row, with what the query sees."""
    frames, height, width = panel.seen.shape
    gap = max(1, round(0.06 * min(height, width))) if frames > 1 else 0
    across = _across(frames, height + gap, width + gap)
    down = -(-frames // across)
    picture = np.ones((down * (height + gap) - gap, across * (width + gap) - gap, 3), dtype=np.float32)
    shades = np.array([_rgb(COLOURS[SKIPPED]), _rgb(COLOURS[FULL])], dtype=np.float32)
    corners = []
    for t in range(frames):
        y, x = t // across * (height + gap), t % across * (width + gap)
        picture[y : y + height, x : x + width] = shades[panel.seen[t].astype(int)]
        corners.append((x, y))
    axes.imshow(picture, interpolation="nearest")
    axes.set_anchor("N")
    _plain(axes, spines=False)
    _mark(axes, panel, corners, height, width)
    t, h, w = panel.query
    at = (f"frame {t}, " if frames > 1 else "") + f"row {h}, column {w}"
    text = f"\nand {panel.seen_outside} of {panel.outside} text tokens" if panel.outside else ""
    sees = f"{panel.seen.sum():,} of {panel.seen.size:,} ({100 * panel.seen.mean():.1f} %)"
    axes.set_xlabel(f"the query at {at} sees {sees}{text}", size=8, color=FAINT, labelpad=4, linespacing=1.3)


def _mark(axes: Any, panel: Panel, corners: list[tuple[int, int]], height: int, width: int) -> None:
    """Frame outlines and numbers, and the query."""
    from matplotlib.patches import Rectangle

    t, h, w = panel.query
    for number, (x, y) in enumerate(corners):
        own = number == t and len(corners) > 1
        edge, line = (QUERY, 1.2) if own else (FRAME, 0.5)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=edge, linewidth=line))
        if x == 0 and len(corners) > 1:
            style = {"size": 6.5, "color": FAINT, "ha": "right", "va": "center"}
            axes.annotate(str(number), (x, y + height / 2), (-4, 0), textcoords="offset points", **style)
    x, y = corners[t]
    style = {"markersize": 4.5, "color": QUERY, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot(x + w, y + h, marker="o", clip_on=False, **style)
    bottom, right = corners[-1][1] + height, max(corner[0] for corner in corners) + width
    axes.set_xlim(-1, right)
    axes.set_ylim(bottom, -1)


def _across(frames: int, height: int, width: int) -> int:
    """Frames per row that bring the mosaic nearest to the shape of a screen."""

    def distance(across: int) -> float:
        return abs(math.log(across * width / (-(-frames // across) * height) / SCREEN))

    return min(range(1, frames + 1), key=distance)


def _legend(figure: Any, panels: Sequence[Panel], width: float, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [FULL, *([PARTIAL] if any(p.counts["partial"] for p in panels) else []), SKIPPED]
    handles = [Patch(facecolor=COLOURS[kind], edgecolor=FRAME, linewidth=0.5, label=NAMES[kind]) for kind in kinds]
    handles.append(Line2D([], [], marker="o", color=QUERY, markersize=5, linestyle="none", label="the query"))
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(1 - 0.1 / width, 1 - 0.08 / height), ncols=len(handles),
        frameon=False, fontsize=8, handlelength=1, handleheight=1, columnspacing=1.2, handletextpad=0.5, labelcolor=INK,
    )  # fmt: skip


def _plain(axes: Any, spines: bool = True) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(spines)
        spine.set_color(FRAME)
        spine.set_linewidth(0.8)


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
