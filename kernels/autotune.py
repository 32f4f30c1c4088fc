"""Block sizes measured on the GPU at hand, kept on disk by GPU and kind of call.

Never inside a call: :func:`warm` measures, and calls look up what it found. By hand, for the usual kinds:
``python -m dit_accel.kernels.autotune``. Without it the table of ``kernels.tuning`` serves.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from . import timing
from .faults import DeviceLost, check_device
from .tileplan import TilePlan
from .tuning import Tuning, tuning

VERSION = 2
VARIABLE = "DIT_ACCEL_TUNING"
# Tokens up to which a call is of a class: what fills a short grid best is not what serves a long loop best.
SIZES = (1024, 4096, 16384)
# What a variant must gain to be taken: two runs of one entry differ by about as much.
GAIN = 0.02
# ||out - that of the entry tuned from|| / ||that||: the sizes of blocks change the order of sums, nothing else.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}

Timer = Callable[[Callable[[], object]], float]


def warm(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_valid: Tensor | None = None,
    timer: Timer | None = None, again: bool = False,
) -> Tuning | None:  # fmt: skip
    """Find the fastest block sizes for calls like this one and keep them, unless they are known.

    q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv) on an NVIDIA GPU, which is busy for a second or two and waited
    for. ``timer``: the time of a launch, the median of several. ``again``: measure what is known too. Returns the
    entry, or None where the kernel does not serve these tensors or no size could be measured, which is warned of and
    not kept. A size that does not compile or run is left out; so is one whose output is not the table's, with a
    warning. Raises ``DeviceLost`` where one breaks the GPU's context.
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
    name = kind(plan, q, dim)
    failed: list[str] = []

    def launch(entry: Tuning) -> Tensor:
        return tier.attention(q, k, v, plan, scale=scale, kv_valid=kv_valid, entry=entry)[0]

    def cost(entry: Tuning) -> float:
        try:
            return timer(lambda: launch(entry))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            check_device(error)
            failed.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            return math.inf

    # Of the first entry that runs, which is the table's nearly always.
    expected: list[Tensor] = []

    def right(entry: Tuning) -> bool:
        out = launch(entry)
        if not expected:
            expected.append(out)
            return True
        error = distance(out, expected[0])
        if error <= TOLERANCE[q.dtype]:
            return True
        warnings.warn(f"autotune: {entry} is off by {error:.1e} for {name}; it is not used, report this", stacklevel=2)
        return False

    best = search(base, cost, right)
    if best is None:
        warnings.warn(f"autotune: nothing ran for {name}, so nothing is kept ({failed[0]})", stacklevel=2)
        return None
    store(gpu(q.device), name, best)
    return best


def search(
    base: Tuning, cost: Callable[[Tuning], float], right: Callable[[Tuning], bool] = lambda entry: True
) -> Tuning | None:
    """The cheapest of a few variations of ``base``, one choice after the other; None where none can be measured.

    ``cost``: inf for one that does not run. ``right``: asked once of each entry that would be taken, ``base`` first. A
    later one must be cheaper by :data:`GAIN`.
    """
    best, least = base, math.inf
    for choices in (lambda entry: [entry], _shapes, _pipelines, _grids):
        for entry in choices(best):
            this = cost(entry)
            if this < least * (1 - GAIN) and right(entry):
                best, least = entry, this
    return best if math.isfinite(least) else None


def distance(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| over all elements, inf where ``out`` is not finite and ``expected`` is."""
    square = total = 0.0
    for one, other in zip(out.flatten(0, 1), expected.flatten(0, 1), strict=True):  # a head at a time: float32 copies
        known = other.isfinite()
        other = other.double().where(known, 0.0)
        square += float((one.double().where(known, 0.0) - other).square().sum())
        total += float(other.square().sum())
    if not math.isfinite(square):
        return math.inf
    return math.sqrt(square / total) if total else math.sqrt(square)


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
    """The class of a call: element size, head dim class, tiles, which of the kernel's loops are busy, and tokens."""
    limit = next((limit for limit in (64, 128, 256) if dim <= limit), dim)
    loop = "full" if plan.partial is None else "gathered" if plan.gathers else "tested"
    placed = "" if plan.kv_order is None else "-ordered"
    beside = "-beside" if plan.reps else ""
    tokens = max(plan.n_q, plan.n_k)
    size = next((f"to{size // 1024}k" for size in SIZES if tokens <= size), f"over{SIZES[-1] // 1024}k")
    return f"{q.element_size() * 8}bit-d{limit}-q{plan.tile_q}-k{plan.tile_k}-{loop}{placed}{beside}-{size}"


@functools.cache
def gpu(device: torch.device) -> str:
    """The GPU's name and compute capability, and the compiler that makes its code."""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor} triton{triton.__version__}"


def path() -> Path:
    """The file: ``DIT_ACCEL_TUNING``, or ``dit_accel/tuning.json`` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    return _path(named, None if named else os.environ.get(_FOLDER))


# The variable that names the user's cache folder where there is one.
_FOLDER = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"


@functools.cache
def _path(named: str | None, folder: str | None) -> Path:
    """Kept, since every call of the kernel asks for it."""
    if named:
        return Path(named)
    fallback = {"win32": ("AppData", "Local"), "darwin": ("Library", "Caches")}.get(sys.platform, (".cache",))
    where = Path(folder) if folder and sys.platform != "darwin" else Path.home().joinpath(*fallback)
    return where / "dit_accel" / "tuning.json"


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
    """Seconds of the GPU's work in a launch: the median of ten after three unmeasured ones."""
    for _ in range(3):
        launch()
    host = timing.host_seconds(launch)
    return statistics.median(timing.device_seconds(launch, host)[0] for _ in range(10))


def main(argv: list[str] | None = None) -> int:
    """Measure the usual kinds: whole blocks of 128 and 64, head dims 64 and 128, three lengths, in bfloat16.

    1 where a kind could not be measured or the GPU's context broke, 2 without a GPU.
    """
    from .blocklist import BlockList

    parser = argparse.ArgumentParser(prog="python -m dit_accel.kernels.autotune", description="Measure block sizes")
    parser.add_argument("--missing", action="store_true", help="only kinds that have no entry yet, to go on")
    again = not parser.parse_args(argv).missing
    if not torch.cuda.is_available():
        print("autotune: no CUDA device; there is nothing to measure", file=sys.stderr)
        return 2
    device, heads, missed = torch.device("cuda"), 24, 0
    for tokens, dim in itertools.product((16384, 32768, 4096), (64, 128)):
        q, k, v = (torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
        for tile in (128, 64):
            n = tokens // tile
            mask = torch.rand(1, heads, n, n, device=device) < 0.25
            plan = TilePlan(tile, tile, tokens, tokens, BlockList.from_mask(mask), kept=True)
            try:
                entry = warm(plan, q, k, v, again=again)
            except DeviceLost as error:
                print(f"{error}\nWhat was found before is kept in {path()}", file=sys.stderr)
                return 1
            missed += entry is None
            table = tuning(torch.cuda.get_device_capability(device), dim, 2, tile, tile)
            print(f"{kind(plan, q, dim)}: {entry}{' (the table)' if entry == table else ''}", flush=True)
    print(f"kept in {path()}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
