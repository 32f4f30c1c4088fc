"""The plan file of PARO: orders and block maps of one model and layout, in safetensors, read layer by layer.

Tensors: ``orders`` int8 (layers, heads); per layer ``maps.{layer}`` uint8 (bins, heads, bytes), the bits of a
(blocks, blocks) map in plan order, row-major, first block in the highest bit. Metadata: one JSON text under
``dit_accel`` that says what the plan was made for and how, with a SHA-256 of every slice that is read at once and one
of itself, so that opening a plan reads no map and a damaged one is never executed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..layout import Layout, Segment
from .paro_calibration import LayerPlan

FORMAT, VERSION, KEY = "dit-accel PARO plan", 1, "dit_accel"
REMAKE = "make one with `dit-accel calibrate paro --model ... -o {path}`"


@dataclass(frozen=True)
class Header:
    """What a plan was made for and how.

    ``model``: class name and configuration. ``weights``: where they came from, for the record. ``segments``: the
    layout. ``steps``: length of the calibration run. ``layers``: attention sites with a map. ``density``: asked for,
    ``reached``: mean over layers and bins. ``library``: version that wrote the file.
    """

    model: str
    config: dict[str, Any]
    segments: tuple[tuple[str, Any], ...]
    steps: int
    bins: int
    block_size: int
    layers: tuple[int, ...]
    heads: int
    density: float
    reached: float
    recall: float
    metric: str
    alpha: float
    budget: str
    library: str
    weights: str = ""
    scheduler: str = ""
    prompts: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout(segments=[Segment(k, s if isinstance(s, int) else tuple(s)) for k, s in self.segments])

    @property
    def blocks(self) -> int:
        return -(-self.layout.tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        """A digest of the model's class and configuration."""
        return _digest(json.dumps([self.model, self.config], sort_keys=True).encode())[:16]


def describe_layout(layout: Layout) -> tuple[tuple[str, Any], ...]:
    """A layout as :class:`Header` holds it."""
    return tuple((s.kind, s.size if isinstance(s.size, int) else list(s.size)) for s in layout.segments)


def pack(mask: Tensor) -> Tensor:
    """uint8 (..., bytes): the last two axes of a bool (..., nb, nb) as bits, first in the highest bit."""
    bits = mask.flatten(-2).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << _shifts(bits.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, blocks: int) -> Tensor:
    """bool (..., blocks, blocks): the inverse of :func:`pack`."""
    bits = (packed[..., None] >> _shifts(packed.device)) & 1
    return bits.flatten(-2)[..., : blocks * blocks].bool().unflatten(-1, (blocks, blocks))


def write(path: str | Path, header: Header, plans: Iterable[tuple[int, LayerPlan]]) -> Header:
    """Write a plan file, whole or not at all; the bool maps of one layer exist at a time. Returns its full header.

    ``header`` is completed with ``layers``, ``heads``, ``reached``, ``recall`` and ``digests``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    orders, reached, recall, digests = [], [], [], {}
    layers = []
    for layer, plan in plans:
        maps = pack(plan.maps).contiguous()
        tensors[f"maps.{layer}"] = maps
        digests |= {_slice(layer, b): _digest(_bytes(part)) for b, part in enumerate(maps)}
        layers.append(layer)
        orders.append(plan.orders)
        reached += plan.density
        recall.append(plan.recall.mean())
    tensors["orders"] = torch.stack(orders)
    digests["orders"] = _digest(_bytes(tensors["orders"]))
    values = asdict(header) | {
        "layers": layers,
        "heads": tensors["orders"].shape[1],
        "reached": sum(reached) / len(reached),
        "recall": float(torch.stack(recall).mean()),
        "digests": digests,
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={KEY: _encode(values)})
        # safetensors leaves a file that only its owner can read, whatever the umask.
        partial.chmod(mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write the plan to {path}: {error}; give another -o") from None
    finally:
        partial.unlink(missing_ok=True)
    return _decode(_encode(values), path)[0]


@dataclass(frozen=True)
class PlanFile:
    """A plan file whose metadata was checked; orders and maps are read on demand. ``digest``: of the metadata, which
    holds the digests of everything else."""

    path: str
    header: Header
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> PlanFile:
        """Read and check the metadata. Raises ``UsageError`` where there is no readable plan."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no PARO plan at {path}; {REMAKE.format(path=path)}")
        with _opened(path) as file:
            text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise UsageError(f"{path} is a safetensors file but no PARO plan; {REMAKE.format(path='plan.safetensors')}")
        header, digest = _decode(text, path)
        return cls(str(path), header, digest)

    @functools.cached_property
    def orders(self) -> Tensor:
        """int8 (layers, heads): axis order ids."""
        with _opened(self.path) as file:
            found = self._tensor(file, "orders")
        self._verify("orders", found, (len(self.header.layers), self.header.heads))
        return found

    def map(self, layer: int, where: int, heads: slice = slice(None), device: torch.device | None = None) -> Tensor:
        """bool (H, nb, nb) on ``device``: the map of one layer and bin for ``heads``; nothing else is read."""
        header = self.header
        with _opened(self.path) as file:
            packed = self._tensor(file, f"maps.{layer}", where)
        self._verify(_slice(layer, where), packed, (header.heads, -(-(header.blocks**2) // 8)))
        return unpack(packed[heads].to(device or packed.device), header.blocks)

    def _tensor(self, file: Any, name: str, where: int | None = None) -> Tensor:
        from safetensors import SafetensorError

        try:
            found = file.get_slice(name)
            return found[:] if where is None else found[where]
        except (SafetensorError, IndexError) as error:
            raise UsageError(f"{self.path} lacks {name} ({error}); {REMAKE.format(path=self.path)}") from None

    def _verify(self, name: str, found: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(found.shape) != shape or _digest(_bytes(found)) != self.header.digests.get(name):
            raise UsageError(
                f"{self.path} is damaged: {name} does not match its recorded digest; copy the file again, or "
                f"{REMAKE.format(path=self.path)}"
            )


def _opened(path: str | Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a readable PARO plan ({error}); copy the file again, or {REMAKE.format(path=path)}"
        ) from None


def _encode(values: dict[str, Any]) -> str:
    body = json.dumps({"format": FORMAT, "version": VERSION, **values}, sort_keys=True)
    return json.dumps({"digest": _digest(body.encode()), "body": body})


def _decode(text: str, path: Path) -> tuple[Header, str]:
    remake = REMAKE.format(path=path)
    try:
        outer = json.loads(text)
        body = outer["body"]
        intact = _digest(body.encode()) == outer["digest"]
        values = json.loads(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, values = False, {}
    if not intact:
        raise UsageError(f"{path} is damaged: its metadata does not match its own digest; {remake}")
    if values.pop("format", None) != FORMAT or values.get("version") != VERSION:
        raise UsageError(
            f"{path} is version {values.get('version')} of the PARO plan format, written by dit-accel "
            f"{values.get('library')}; this library reads version {VERSION}; {remake}"
        )
    del values["version"]
    values |= {key: tuple(values[key]) for key in ("layers", "prompts")}
    values["segments"] = tuple((kind, size) for kind, size in values["segments"])
    return Header(**values), outer["digest"]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def _slice(layer: int, where: int) -> str:
    return f"maps.{layer}.{where}"


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().numpy()).cast("B")


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
