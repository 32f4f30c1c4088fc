"""Adaptive precision: which heads of which layers and steps run in 4, 8 or 16 bits, from errors that were measured.

The rule is ours; SageAttention2 (2411.10958) announces one without printing it. First and last steps never run below 8
bits, as SageAttention3 (2505.11594) advises. A head takes 8 bits where 4 are off by more than the bounds below, the
worst of the others follow until the budget is spent, and a layer takes 16 where 8 bits are off too.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .kernels import BlockList, TilePlan
from .kernels.quant.api import quantized_attention
from .methods.base import Call
from .quant import Quant
from .step import Step

COSINE = 0.998
REL_L1 = 0.05
FORMAT = "dit-accel precision 1"


@dataclass(frozen=True)
class Precision:
    """``bits[bin][layer][head]``: 4, 8 or 16; 16 holds for all heads of a layer. Bins cut a run into equal parts."""

    bits: tuple[tuple[tuple[int, ...], ...], ...]

    def of(self, layer: int, step: Step, heads: slice) -> tuple[int, ...]:
        """Bits of the heads of one call. A run of unknown length counts as its first bin.

        Raises ``UsageError`` for a layer or heads that the table does not have.
        """
        row = self.bits[bin_of(step, len(self.bits))]
        if layer >= len(row) or heads.stop > len(row[layer]):
            raise UsageError(
                f"the precision table is for {len(row)} layers of {len(row[0])} heads; this call is layer {layer}, "
                f"heads {heads.start}..{heads.stop - 1}. Calibrate on this model"
            )
        least = 8 if step.index == 0 or (step.total is not None and step.index == step.total - 1) else 4
        return tuple(max(least, bits) for bits in row[layer][heads])

    @property
    def share(self) -> dict[int, float]:
        """The share of (bin, layer, head) at each number of bits."""
        flat = [bits for row in self.bits for layer in row for bits in layer]
        return {bits: flat.count(bits) / len(flat) for bits in (4, 8, 16)}

    def write(self, path: str | Path, record: dict[str, Any] | None = None) -> None:
        """Whole or not at all. ``record``: what the table was made from, kept beside it. Raises ``UsageError``."""
        part = Path(path).with_name(Path(path).name + ".partial")
        try:
            part.write_text(json.dumps({"format": FORMAT, "bits": self.bits, "record": record or {}}) + "\n")
            part.replace(path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}; give another -o") from None


def read_precision(path: str | Path) -> Precision:
    """The table of a file. Raises ``UsageError`` for one that is missing or none."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no precision file {str(path)!r}; `dit-accel calibrate precision -o {path}` makes one")
    return _read(str(file), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read(path: str, changed: int) -> Precision:
    try:
        data = json.loads(Path(path).read_text())
        table = Precision(tuple(tuple(tuple(layer) for layer in row) for row in data["bits"]))
        known = data["format"] == FORMAT and {b for row in table.bits for layer in row for b in layer} <= {4, 8, 16}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path!r} is no precision file ({error})") from None
    if not known:
        raise UsageError(f"{path!r} is no precision file of this version ({FORMAT!r})")
    return table


def adapted(quant: Quant, layer: int, step: Step, heads: slice) -> Quant | None:
    """``quant`` with its file's bits for one call, or None where that is 16."""
    if quant.plan_file is None:
        return quant
    bits = read_precision(quant.plan_file).of(layer, step, heads)
    return None if max(bits) == 16 else quant.with_bits(bits)


def bin_of(step: Step, bins: int) -> int:
    return min(step.index * bins // step.total, bins - 1) if step.total else 0


class Measured:
    """Errors of 4 and 8 bits per layer, bin and head; its :meth:`observe` is a listener of a dense run.

    ``quant``: the recipe, whose ``qk`` is set to 4 and 8 bits in turn. ``blocks``: blocks of queries sampled per call.
    Feed it at least two prompts.
    """

    def __init__(self, quant: Quant | None = None, *, bins: int = 4, blocks: int = 1, seed: int = 0):
        if bins < 1 or blocks < 1:
            raise UsageError(f"bins and blocks must be at least 1; got bins={bins}, blocks={blocks}")
        self.quant = quant if quant is not None else Quant.sage2(bits=4)
        self.bins, self.blocks = bins, blocks
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        """One attention call: q (B, H, N, D), k and v (B, Hk, N, D). Adds to the sums of its layer and bin."""
        rows = self._rows(q.shape[2]).to(q.device)
        q, scale = q[:, :, rows], q.shape[-1] ** -0.5 if call.scale is None else call.scale
        plan = _whole(len(rows), k.shape[2], q.device)
        groups = q.shape[1] // k.shape[1]
        scores = (q.float() * scale) @ k.float().repeat_interleave(groups, 1).mT
        if call.kv_valid is not None:
            dead = torch.arange(k.shape[2], device=q.device) >= call.kv_valid.to(q.device)[:, None, None, None]
            scores = scores.masked_fill(dead, -torch.inf)
        exact = scores.softmax(-1) @ v.float().repeat_interleave(groups, 1)
        found = []
        for quant in (self.quant.with_bits((bits,) * q.shape[1]) for bits in (4, 8)):
            out, _ = quantized_attention(
                q, k, v, plan, quant, scale=scale, kv_valid=call.kv_valid, backend="reference"
            )  # fmt: skip
            out = out.float()
            parts = ((out - exact).abs(), exact.abs(), out * exact, out.square(), exact.square())
            found.append(torch.stack([part.sum((0, 2, 3)) for part in parts]))
        key = bin_of(call.step, self.bins), call.layer
        self._sums[key] = self._sums.get(key, 0) + torch.stack(found).double().cpu()

    def errors(self) -> tuple[Tensor, Tensor]:
        """Cosine and relative L1, float64 (2, bins, layers, heads): 4 bits, then 8. Raises ``UsageError`` for gaps."""
        layers = 1 + max((layer for _, layer in self._sums), default=-1)
        wanted = [(b, layer) for b in range(self.bins) for layer in range(layers)]
        missing = [key for key in wanted if key not in self._sums]
        if not wanted or missing:
            what = f"bin {missing[0][0]} of layer {missing[0][1]}" if missing else "any call"
            raise UsageError(f"the calibration never saw {what}; run it over whole renders")
        sums = torch.stack([self._sums[key] for key in wanted]).unflatten(0, (self.bins, layers)).permute(3, 2, 0, 1, 4)
        lost, size, product, one, other = sums
        return product / (one * other).sqrt().clamp_min(1e-30), lost / size.clamp_min(1e-30)

    def assign(self, frac_8bit: float = 0.5) -> Precision:
        """The table: at least ``frac_8bit`` of all (bin, layer, head) at 8 bits or more, more where the bounds ask."""
        check_share(frac_8bit)
        cosine, lost = self.errors()
        bad = (cosine < COSINE) | (lost > REL_L1)
        eight = bad[0].clone()
        worst = (1 - cosine[0] * (1 - lost[0])).masked_fill(eight, torch.inf).flatten().argsort(descending=True)
        eight.view(-1)[worst[: round(frac_8bit * worst.numel())]] = True
        bits = torch.where(eight, 8, 4)
        bits[bad[1].any(-1)] = 16
        return Precision(tuple(tuple(tuple(layer) for layer in row) for row in bits.tolist()))

    def record(self) -> dict[str, Any]:
        """:meth:`errors` as plain JSON values: by bits, then by bin, layer and head."""
        cosine, lost = (error.tolist() for error in self.errors())
        return {
            bits: {"cosine": _rounded(cosine[at]), "rel_l1": _rounded(lost[at])} for at, bits in enumerate(("4", "8"))
        }

    def _rows(self, n: int) -> Tensor:
        size = min(self.quant.block_q, n)
        picked = torch.randperm(-(-n // size), generator=self._generator)[: self.blocks]
        rows = (picked[:, None] * size + torch.arange(size)).flatten()
        return rows[rows < n]


def check_share(frac_8bit: float) -> None:
    """Raise ``UsageError`` for a budget that is no share."""
    if not 0 <= frac_8bit <= 1:
        raise UsageError(f"frac_8bit lies in [0, 1]; got {frac_8bit}")


def _rounded(table: Any) -> Any:
    return [_rounded(one) for one in table] if isinstance(table, list) else float(f"{table:.6g}")


def _whole(n_q: int, n_k: int, device: torch.device) -> TilePlan:
    mask = torch.ones((1, 1, -(-n_q // 128), -(-n_k // 128)), dtype=torch.bool, device=device)
    return TilePlan(128, 128, n_q, n_k, BlockList.from_mask(mask))
