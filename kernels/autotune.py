"""Block sizes measured on the GPU at hand, kept on disk by GPU and kind of call.

Never inside a call: :func:`warm` measures, and calls look up what it found. By hand, for the usual kinds:
``python -m dit_accel.kernels.autotune``. Without it the table of ``kernels.tuning`` serves.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .tileplan import TilePlan
from .tuning import Tuning, tuning

VERSION = 1
VARIABLE = "DIT_ACCEL_TUNING"

Timer = Callable[[Callable[[], object]], float]


def warm(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_valid: Tensor | None = None,
    timer: Timer | None = None, again: bool = False,
) -> Tuning | None:  # fmt: skip
    """Find the fastest block sizes for calls like this one and keep them, unless they are known.

    q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv) on an NVIDIA GPU, which is busy for a second or two and waited
    for. ``timer``: milliseconds of a launch, the median of several. ``again``: measure what is known too. Returns the
    entry, or None where the kernel does not serve these tensors. A size that does not compile or run is left out.
    """
    from .block_sparse import triton as tier

    if q.device.type != "cuda" or tier.refuses(q, plan) is not None:
        return None
    dim = max(q.shape[-1], v.shape[-1])
    known = found(plan, q, dim)
    if known is not None and not again:
        return known
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    timer = timer or _time
    base = tier.tuning_for(plan, q, dim, plan.tile_q, plan.tile_k)

    def cost(entry: Tuning) -> float:
        try:
            return timer(lambda: tier.attention(q, k, v, plan, scale=scale, kv_valid=kv_valid, entry=entry))
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return float("inf")

    best = search(base, cost)
    store(gpu(q.device), kind(plan, q, dim), best)
    return best


def search(base: Tuning, cost: Callable[[Tuning], float]) -> Tuning:
    """The cheapest of a few variations of ``base``, one choice after the other; ``base`` where none can be measured."""
    best, least = base, cost(base)
    for choices in (_shapes, _pipelines, _grids):
        for entry in choices(best):
            this = cost(entry)
            if this < least:
                best, least = entry, this
    return best


def _shapes(entry: Tuning) -> list[Tuning]:
    """Other numbers of keys per step, with fewer warps too."""
    steps = [step for step in (64, 128) if step != (entry.described or entry.full)]
    name = "described" if entry.described else "full"
    longer = [replace(entry, **{name: step}) for step in steps]
    fewer = [replace(one, warps=4) for one in [entry, *longer] if one.warps == 8]
    return [*longer, *fewer, *([replace(entry, described=0)] if entry.described else [])]


def _pipelines(entry: Tuning) -> list[Tuning]:
    return [replace(entry, stages=stages) for stages in (2, 3, 4) if stages != entry.stages]


def _grids(entry: Tuning) -> list[Tuning]:
    return [replace(entry, persistent=per) for per in (1, 2) if per != entry.persistent]


def found(plan: TilePlan, q: Tensor, dim: int) -> Tuning | None:
    """What :func:`warm` found for such calls on q's GPU, or None."""
    return _entries(path()).get((gpu(q.device), kind(plan, q, dim)))


def kind(plan: TilePlan, q: Tensor, dim: int) -> str:
    """The class of a call: element size, head dim class, tiles, and which of the kernel's loops are busy."""
    limit = next((limit for limit in (64, 128, 256) if dim <= limit), dim)
    loop = "full" if plan.partial is None else "gathered" if plan.gathers else "tested"
    placed = "" if plan.kv_order is None else "-ordered"
    beside = "-beside" if plan.reps else ""
    return f"{q.element_size() * 8}bit-d{limit}-q{plan.tile_q}-k{plan.tile_k}-{loop}{placed}{beside}"


@functools.cache
def gpu(device: torch.device) -> str:
    """The GPU's name and compute capability, and the compiler that makes its code."""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor} triton{triton.__version__}"


def path() -> Path:
    """The file: ``DIT_ACCEL_TUNING``, or ``dit_accel/tuning.json`` in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "dit_accel" / "tuning.json"


def store(name: str, call: str, entry: Tuning) -> None:
    """Add one entry to the file, whole or not at all: other processes may read and write it."""
    where = path()
    table = {f"{name}|{call}": asdict(entry)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was first read
        kept = {f"{gpu_name}|{kind_name}": asdict(one) for (gpu_name, kind_name), one in _read(where).items()}
    where.parent.mkdir(parents=True, exist_ok=True)
    draft = where.with_name(f"{where.name}.{os.getpid()}")
    draft.write_text(json.dumps({"version": VERSION, "entries": kept | table}, indent=1, sort_keys=True) + "\n")
    draft.replace(where)
    _entries.cache_clear()


@functools.cache
def _entries(where: Path) -> dict[tuple[str, str], Tuning]:
    """The file's entries, read once."""
    return _read(where)


def _read(where: Path) -> dict[tuple[str, str], Tuning]:
    try:
        text = where.read_text()
    except OSError:
        return {}
    try:
        table = json.loads(text)
        if table["version"] != VERSION:
            return {}
        names = {f.name for f in fields(Tuning)}
        return {
            tuple(key.rsplit("|", 1)): Tuning(**{name: int(one[name]) for name in names})
            for key, one in table["entries"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{where} is no tuning file ({type(error).__name__}: {error}); the built-in table serves. Delete it, or "
            "write it anew with python -m dit_accel.kernels.autotune",
            stacklevel=2,
        )
        return {}


def _time(launch: Callable[[], object]) -> float:
    """Milliseconds: the median of ten launches, timed by events after three unmeasured ones."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(10):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def main() -> int:
    """Measure the usual kinds: whole blocks of 128 and 64, head dims 64 and 128, in bfloat16. 2 without a GPU."""
    from .blocklist import BlockList

    if not torch.cuda.is_available():
        print("autotune: no CUDA device; there is nothing to measure", file=sys.stderr)
        return 2
    device, tokens, heads = torch.device("cuda"), 16384, 24
    for dim in (64, 128):
        q, k, v = (torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
        for tile in (128, 64):
            n = tokens // tile
            mask = torch.rand(1, heads, n, n, device=device) < 0.25
            plan = TilePlan(tile, tile, tokens, tokens, BlockList.from_mask(mask), kept=True)
            entry = warm(plan, q, k, v, again=True)
            table = tuning(torch.cuda.get_device_capability(device), dim, 2, tile, tile)
            print(f"{kind(plan, q, dim)}: {entry}{' (the table)' if entry == table else ''}")
    print(f"kept in {path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
