"""What is measured: real shapes, and per section the cases, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...layout import Layout


@dataclass(frozen=True)
class Shape:
    """Tokens of one attention call: ``grid`` (T, H, W) and ``text`` in the same sequence; ``heads`` of ``dim``."""

    grid: tuple[int, int, int]
    heads: int
    dim: int = 128
    text: int = 0
    text_first: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, text=self.text, text_first=self.text_first)


# Latent grids of the diffusers pipelines' own sizes; text that has a cross-attention of its own is no part of them.
SHAPES = {
    "wan-480p": Shape((21, 30, 52), 40),
    "wan-720p": Shape((21, 45, 80), 40),
    "wan-1.3b-480p": Shape((21, 30, 52), 12),
    "hunyuan-720p": Shape((33, 45, 80), 24, text=256),
    "cogvideox": Shape((13, 30, 45), 48, 64, 226, True),
    "flux-1k": Shape((1, 64, 64), 24, text=512, text_first=True),
    "flux-4k": Shape((1, 256, 256), 24, text=512, text_first=True),
    **{f"{n}k": Shape((n, 32, 32), 24) for n in (8, 16, 32, 64, 128)},
    **{f"{n}k-d64": Shape((n, 32, 32), 24, 64) for n in (8, 16, 32, 64, 128)},
    # As many heads as small models have; with one or two, what a call costs beside its products would weigh too much.
    **{f"cpu-{n}k": Shape((n, 32, 32), 8, 64) for n in (4, 8, 16)},
}

STATIC = ("radial", "gna")
DYNAMIC = ("rectified", "pisa", "pyramid", "vmoba", "adaspa")
QUANTS = ("sage2", "sage1")
SECTIONS = ("sparse", "dense-quant", "sparse-quant", "planning", "scaling", "partial", "cpu")


@dataclass(frozen=True)
class Case:
    """One row. ``method`` None is dense; ``density`` what is asked of it; ``backend`` as in ``attend``."""

    section: str
    shape: str
    method: str | None
    density: float = 1.0
    quant: str | None = None
    backend: str = "auto"

    @property
    def key(self) -> str:
        what = "dense" if self.method is None else f"{self.method}@{self.density:g}"
        return f"{self.shape} {what}{f'+{self.quant}' if self.quant else ''} {self.backend}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(section: str) -> list[Case]:
    """The cases of a section in order of importance: a run that ends early holds what tells most."""
    found = [replace(case, section=section) for case in _SECTIONS[section]()]
    return list({case.key: case for case in found}.values())


def _sparse() -> Iterator[Case]:
    for density in (0.2, 0.5, 0.1):
        yield Case("", "32k", "random-blocks", density)
    for method in ("radial", "rectified", "pisa", "gna"):
        yield Case("", "wan-480p", method, 0.2)
    yield from (Case("", shape, "random-blocks", 0.2) for shape in ("wan-480p", "32k-d64", "hunyuan-720p"))
    for method in ("pyramid", "vmoba", "adaspa"):
        yield Case("", "wan-480p", method, 0.2)
    for shape in ("hunyuan-720p", "wan-720p", "cogvideox"):
        yield from (Case("", shape, method, 0.2) for method in ("radial", "rectified"))
    for shape in ("flux-4k", "flux-1k"):
        yield from (Case("", shape, method, 0.2) for method in ("gna", "rectified"))
    for density in (0.05, 0.35, 0.1, 0.5):
        yield from (Case("", "32k", method, density) for method in ("random-blocks", *STATIC, *DYNAMIC))
    yield from (Case("", f"{n}k{d}", "random-blocks", 0.2) for n in (8, 64, 128) for d in ("", "-d64"))


def _dense_quant() -> Iterator[Case]:
    for shape in ("32k", "wan-480p", "32k-d64", "hunyuan-720p", "cogvideox", "8k", "128k"):
        yield from (Case("", shape, None, quant=quant) for quant in QUANTS)


def _sparse_quant() -> Iterator[Case]:
    for density in (0.2, 0.5, 0.1):
        yield Case("", "32k", "random-blocks", density, "sage2")
    for shape in ("wan-480p", "hunyuan-720p"):
        yield from (Case("", shape, method, 0.2, "sage2") for method in ("radial", "rectified", "pisa"))
    yield Case("", "32k-d64", "random-blocks", 0.2, "sage2")


def _planning() -> Iterator[Case]:
    for shape in ("32k", "128k", "8k", "64k", "16k"):
        yield from (Case("", shape, method, 0.2) for method in (*DYNAMIC, *STATIC))


def _scaling() -> Iterator[Case]:
    # The rule of Radial at its own decay: what it keeps falls with length, which a fixed density would hide.
    for n in (8, 32, 128, 16, 64):
        yield Case("", f"{n}k", "radial-rule")


def _partial() -> Iterator[Case]:
    yield from (Case("", shape, "gna-ragged", 0.2) for shape in ("wan-480p", "32k", "flux-4k"))
    yield from (Case("", shape, "clear", 0.05) for shape in ("flux-4k", "flux-1k"))


def _cpu() -> Iterator[Case]:
    for density in (0.2, 0.5, 0.1, 0.35):
        for n in (4, 8, 16):
            for method in ("random-blocks", "rectified"):
                yield from (Case("", f"cpu-{n}k", method, density, backend=tier) for tier in ("flex", "auto"))


_SECTIONS = {
    "sparse": _sparse, "dense-quant": _dense_quant, "sparse-quant": _sparse_quant, "planning": _planning,
    "scaling": _scaling, "partial": _partial, "cpu": _cpu,
}  # fmt: skip
