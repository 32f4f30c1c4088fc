"""Quant: quantised compute of any plan, with the published recipes as presets; and the quantiser by itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError, UsageError
from .kernels.quant import groups
from .kernels.quant import quantize as _quantize
from .kernels.quant.capability import of as capability_of
from .kernels.quant.capability import preset_for
from .kernels.quant.recipe import Recipe

_CHOICES = {
    "qk": (None, "int8", "int4"),
    "pv": (None, "fp16", "fp8", "int8"),
    "granularity": ("block", "warp", "thread", "token"),
    "smooth_q": (None, True, False),
    "smooth_k": (True, False),
    "smooth_v": (True, False),
    "p_scale": (None, "static", "tile", "row"),
    "accumulate": ("fp32", "fp16"),
}


@dataclass(frozen=True)
class Quant(Recipe):
    """How attention's products are quantised. Frozen, hashable, picklable.

    ``qk``: queries and keys in ``"int8"`` or ``"int4"``, None as they are. ``pv``: attention weights and values in
    ``"fp16"``, ``"fp8"`` (e4m3) or ``"int8"``, None as they are. ``granularity``, ``block_q``, ``warp_q``, ``block_k``:
    which tokens share a scale, see :func:`quantize`. ``smooth_q``: take the mean out of each block of queries and add
    its products back; None means with 4 bits. ``smooth_k``, ``smooth_v``: take the mean of all keys, of all values out.
    ``p_scale``: unit of 8-bit weights, ``"static"``, or the largest of each ``"tile"`` or each ``"row"`` of a tile;
    None means ``"row"`` for int8, whose steps are even, and ``"static"`` for fp8. ``accumulate``: ``"fp16"`` sums up to
    64 products of weights and values in FP16 before FP32 takes over; for consumer GPUs, where that is faster.
    ``plan_file``: a precision file (:mod:`dit_accel.precision`) that gives heads 8 bits and layers 16, with
    ``qk="int4"``. ``head_bits`` is what it comes to for one call.

    Raises ``UsageError`` for a value that cannot be.
    """

    plan_file: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
                raise UsageError(f"Quant: {name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
        if self.qk is None and self.pv is None:
            raise UsageError("Quant: qk=None and pv=None quantise nothing; leave quant out for plain attention")
        if self.smooth_q and self.qk is None:
            raise UsageError("Quant: smooth_q=True with qk=None smooths queries that are not quantised; set qk='int4'")
        eight = self.pv in ("fp8", "int8")
        if (self.smooth_v or self.p_scale) and not eight:
            name = "smooth_v" if self.smooth_v else "p_scale"
            raise UsageError(f"Quant: {name} is for 8-bit weights and values, got pv={self.pv!r}; set pv='fp8'")
        if self.accumulate == "fp16" and self.pv not in ("fp16", "fp8"):
            raise UsageError(f"Quant: accumulate='fp16' is for pv='fp16' and pv='fp8'; got pv={self.pv!r}")
        for role, block, warp in (("q", self.block_q, self.warp_q), ("k", self.block_k, None)):
            if not all(isinstance(size, int) for size in (block, warp or 1)):
                raise UsageError(f"Quant: block sizes are whole numbers of tokens; got {block!r} and {warp!r}")
            try:
                groups(0, self.granularity, role, block=block, warp=warp)
            except ValueError as error:
                raise UsageError(f"Quant: {error}") from None
        if self.head_bits is not None:
            if self.qk is None or not set(self.head_bits) <= {4, 8}:
                raise UsageError(
                    f"Quant: head_bits is 4 or 8 for each head of quantised q and k; got {self.head_bits!r}"
                )
            object.__setattr__(self, "head_bits", tuple(self.head_bits))
        if self.plan_file is not None and self.qk != "int4":
            raise UsageError(f"Quant: plan_file assigns bits to heads of qk='int4'; got qk={self.qk!r}")
        if self.smooth_q is None:
            object.__setattr__(self, "smooth_q", self.qk == "int4")
        if self.p_scale is None and eight:
            object.__setattr__(self, "p_scale", "row" if self.pv == "int8" else "static")

    @classmethod
    def sage1(cls) -> Quant:
        """SageAttention (2410.02367, kernel -B): INT8 per block, smoothed keys, FP16 weights, values and sums."""
        return cls(qk="int8", pv="fp16", granularity="block", accumulate="fp16")

    @classmethod
    def sage2(cls, bits: int = 8) -> Quant:
        """SageAttention2 (2411.10958): per-thread scales, FP8 weights and values summed in two levels.

        ``bits`` 8 is the kernel the authors release; 4 the paper's SageAttention2-4b, which smooths queries too.
        """
        if bits not in (4, 8):
            raise UsageError(f"SageAttention2 has 8 and 4 bits; got bits={bits!r}")
        return cls(qk=f"int{bits}", pv="fp8", granularity="thread")

    @classmethod
    def sage2pp(cls) -> Quant:
        """SageAttention2++ (2505.21136): SageAttention2 with FP16 sums of FP8 products."""
        return cls(qk="int8", pv="fp8", granularity="thread", accumulate="fp16")

    def with_bits(self, bits: tuple[int, ...]) -> Quant:
        """This recipe with 4 or 8 bits for each query head."""
        return replace(self, plan_file=None, head_bits=tuple(bits))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quant:
        """The inverse of :meth:`to_dict`. Raises ``UsageError`` for a name that is no field."""
        unknown = data.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(f"Quant has no field {', '.join(sorted(unknown))}")
        return cls(**data)


PRESETS: dict[str, Callable[[], Quant]] = {
    "sage1": Quant.sage1,
    "sage2": Quant.sage2,
    "sage2-int4": lambda: Quant.sage2(bits=4),
    "sage2pp": Quant.sage2pp,
}
AUTO = "auto"
PRECISION_SUFFIX = ".json"


def parse_quant(value: Quant | str | None) -> Quant | str | None:
    """A Quant, a preset's name, a precision file or None as a Quant, ``"auto"`` or None. Raises ``UsageError`` else."""
    if value is None or value == AUTO or isinstance(value, Quant):
        return value
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]()
    if isinstance(value, str) and value.endswith(PRECISION_SUFFIX):
        return replace(Quant.sage2(bits=4), plan_file=value)
    names = [AUTO, *PRESETS]
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise UsageError(
        f"quant {value!r} is unknown{hint} Give a dit_accel.Quant, a precision file (*.json) or "
        f"one of {', '.join(names)}"
    )


def quant_name(value: Quant | str | None) -> str:
    """The preset's name of a Quant, ``"quant"`` for one of its own, ``""`` for None."""
    if value is None or value == AUTO:
        return value or ""
    return next((name for name, make in PRESETS.items() if make() == value), "quant")


def resolve_quant(value: Quant | str | None, device: torch.device) -> Quant | None:
    """What runs on ``device``: ``"auto"`` becomes the preset that suits it.

    Raises ``UnsupportedError`` where no format pays on that GPU.
    """
    value = parse_quant(value)
    if value != AUTO:
        return value
    capability = capability_of(device)
    name = preset_for(capability)
    if name is None:
        raise UnsupportedError(
            f"quant='auto': {torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) "
            "has no 8-bit matrix instructions that pay; leave quant out"
        )
    return PRESETS[name]()


def quantize(
    x: Tensor,
    *,
    bits: int,
    granularity: str,
    role: str,
    block: int,
    warp: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes int8 (B, H, N, D) and scales float32 (B, H, groups) of queries or keys x (B, H, N, D).

    ``bits``: 8 or 4; codes are one int8 per element for both (``pack_int4`` halves them). ``granularity``:
    ``"block"``, ``"warp"``, ``"thread"`` or ``"token"``, groups of SageAttention2 (2411.10958, section 3.2) in the
    order of the given tokens; ``role``: ``"q"`` or ``"k"``, whose groups differ; ``block``, ``warp``: their sizes.
    Scales are amax/qmax + 1e-7 with qmax 127 or 7, 1e-7 for empty groups; quotients are rounded half away from zero.
    With ``scale``, x is first multiplied by scale x log2(e) and the scales contain it. Raises ``UsageError``.
    """
    if x.ndim != 4:
        raise UsageError(f"x must be (B, H, N, D); got shape {tuple(x.shape)}")
    try:
        return _quantize(x, bits=bits, granularity=granularity, role=role, block=block, warp=warp, scale=scale)
    except ValueError as error:
        raise UsageError(str(error)) from None
