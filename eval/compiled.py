"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory and matrix instructions.

``python -m dit_accel.eval.compiled --dim 128 -o eval/results/compiled.json`` compiles each variant for sm80, sm89, sm90
and sm100 with the sizes of ``kernels.tuning``, disassembles it and looks into the loops that hold matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..kernels import Band, BlockList, Box, Disc, Gate, Group, Predicate, TilePlan, tuning
from ..pipelines.outputs import write_json
from .command import output_file

ARCHITECTURES = (80, 89, 90, 100)
# CUDA C++ programming guide: KiB of shared memory per block.
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227}
# Matrix instructions in machine code: what to call each.
MATRIX = {
    "UTC": "tcgen05", "HGMMA": "wgmma", "QGMMA": "wgmma fp8", "IGMMA": "wgmma int8", "HMMA": "mma", "IMMA": "mma int8",
    "QMMA": "mma fp8",
}  # fmt: skip
# Ragged lengths: a kernel for multiples of its blocks alone needs no masks and is no measure.
TOKENS, HEADS, TILE = 300, 4, 128

# Per variant: features, and how keys come: "tma" where the architecture has it, "rows" one by one.
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "full": ((), "tma"),
    "full, rows": ((), "rows"),
    "full, dead keys": (("alive",), "tma"),
    "full, dead keys, rows": (("alive",), "rows"),
    "full, permuted": (("order",), "rows"),
    "full, permuted and copied": (("order", "copied", "alive"), "tma"),
    "box": (("box", "always"), "tma"),
    "disc": (("disc",), "tma"),
    "band": (("band",), "tma"),
    "gate": (("gate",), "tma"),
    "representatives": (("reps",), "tma"),
    "representatives, first order": (("reps", "first-order"), "tma"),
    "row factors": (("row-factors",), "tma"),
}
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.bool: "i1",
}  # fmt: skip


def plan(features: set[str], dim: int, tile: int = TILE, dtype: torch.dtype = torch.bfloat16) -> TilePlan:
    """A plan with every table that ``features`` name."""
    slots = torch.arange(TOKENS, dtype=torch.int32)
    tiles = -(-TOKENS // tile)
    listed = BlockList.from_mask(torch.ones(1, 1, tiles, tiles, dtype=torch.bool))
    parts: dict[str, Any] = {}
    if "box" in features:
        parts["box"] = Box((slots,) * 3, (slots,) * 3, (slots,) * 3)
    if "disc" in features:
        parts["disc"] = Disc((slots,) * 2, (slots,) * 2, slots)
    if "band" in features:
        parts["band"] = Band(slots, slots, slots, slots, torch.zeros(4, 4, dtype=torch.int32))
    if "always" in features:
        parts["always"] = slots > 3
    gate = Gate(torch.zeros(1, HEADS, 16, 16, dtype=torch.uint8), slots, slots) if "gate" in features else None
    order = torch.arange(TOKENS).expand(HEADS, TOKENS).contiguous() if "order" in features else None
    more: dict[str, Any] = {}
    if "reps" in features:
        pooled = torch.zeros(1, HEADS, tiles, dim, dtype=dtype)
        count = torch.full((1, 1, tiles), tile, dtype=torch.int32)
        more["reps"] = (Group(pooled, pooled, count, listed, torch.arange(0, TOKENS + tile, tile)),)
    if "first-order" in features:
        more["first_order"] = torch.zeros(1, HEADS, dim, dim)
    if "row-factors" in features:
        more["row_scale"], more["row_add"] = torch.zeros(1, HEADS, tiles), torch.zeros(1, HEADS, tiles, dim)
    partial = BlockList.from_mask(torch.ones(1, 1, tiles, tiles, dtype=torch.bool)) if parts or gate else None
    predicate = Predicate(**parts) if parts else None
    return TilePlan(tile, tile, TOKENS, TOKENS, listed, partial, predicate, gate, order, order, kept=True, **more)


def attention_kernel(arch: int, dim: int, name: str, tile: int = TILE):
    """The kernel of one variant: kernel, run-time arguments, compile-time ones and tuning entry."""
    from ..kernels.block_sparse import triton as tier

    features, way = set(VARIANTS[name][0]), VARIANTS[name][1]
    tiles = plan(features, dim, tile)
    q = torch.zeros(1, TOKENS, HEADS, dim, dtype=torch.bfloat16).transpose(1, 2)
    entry = tuning.tuning(divmod(arch, 10), dim, q.element_size(), tile, tile)
    kv_valid = torch.zeros(1, dtype=torch.int32) if "alive" in features else None
    if way == "rows":
        entry = replace(entry, described=0)
    keys = tier.lying(q, q, tiles, entry, in_order="copied" in features, dead=kv_valid is not None)
    values = tier.arguments(q, keys, q, None, tiles, entry, scale=1.0, kv_valid=kv_valid)
    return tier.forward, values, tier.constants(q, keys, q, tiles, entry, bounded=kv_valid is not None), entry


def compiled(kernel, values: tuple, fixed: dict[str, Any], entry: tuning.Tuning, arch: int):
    """``kernel`` for sm``arch``. ``values``: its run-time arguments in order; ``fixed``: compile-time ones by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = signed(values)
    names = kernel.arg_names
    if names[len(values) :] != list(fixed):
        raise ValueError(f"the kernel's compile-time arguments are {names[len(values) :]}; given were {list(fixed)}")
    source = ASTSource(
        kernel,
        dict(zip(names, signature, strict=False)) | dict.fromkeys(fixed, "constexpr"),
        constants | {(names.index(name),): value for name, value in fixed.items()},
        attributes,
    )
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def signed(values: tuple, path: tuple[int, ...] = ()) -> tuple[list, dict, dict]:
    """Signature, constants and divisibility of run-time arguments, as a launch would specialise them."""
    signature, constants, attributes = [], {}, {}
    for index, value in enumerate(values):
        at = (*path, index)
        if isinstance(value, tuple):
            inner, more_constants, more_attributes = signed(value, at)
            signature.append(tuple(inner))
            constants |= more_constants
            attributes |= more_attributes
        elif value is None or (isinstance(value, int) and value == 1):
            signature.append("constexpr")
            constants[at] = value
        elif isinstance(value, float):
            signature.append("fp32")
        elif hasattr(value, "block_shape"):
            shape = ",".join(map(str, value.block_shape))
            signature.append(f"tensordesc<{TYPES[value.base.dtype]}[{shape}]>")
        else:
            tensor = isinstance(value, torch.Tensor)
            signature.append(f"*{TYPES[value.dtype]}" if tensor else "i32")
            if tensor or value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def inspected(binary: bytes, shared: int) -> dict[str, Any]:
    """Registers, spills and instructions of a cubin, as NVIDIA's tools beside Triton read them.

    ``stack``: bytes per thread, which holds spilled registers; ``loop_spills``: instructions that touch it in innermost
    loops with matrix instructions, several where the compiler made several of a loop.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        usage, code = (
            subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loops = list(_matrix_loops(code))
    body = [line for loop in loops for line in loop]
    units = sorted({name for line in body for start, name in MATRIX.items() if re.search(rf"\b{start}", line)})
    return {
        "registers": registers, "stack": stack, "shared_kib": round(shared / 1024, 1), "loops": len(loops),
        "loop_spills": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body), "matrix": ", ".join(units),
        "copies": "tma" if "UTMALDG" in code else "cp.async" if "LDGSTS" in code else "none",
    }  # fmt: skip


def _matrix_loops(code: str) -> Iterator[list[str]]:
    """The instructions of every innermost loop that holds a matrix instruction."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    spans = []
    for at, text in lines:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            spans.append((int(jump[1], 16), at))
    pattern = re.compile(rf"\b({'|'.join(MATRIX)})")
    inside = {(a, b): [text for at, text in lines if a <= at <= b] for a, b in spans}
    held = {span: body for span, body in inside.items() if any(pattern.search(text) for text in body)}
    for a, b in held:
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in held):
            yield held[a, b]


def measured(arch: int, dim: int, name: str) -> dict[str, Any]:
    """One row: the variant compiled for one architecture."""
    kernel, values, fixed, entry = attention_kernel(arch, dim, name)
    made = compiled(kernel, values, fixed, entry, arch)
    row = {"arch": f"sm{arch}", "head_dim": dim, "variant": name, "blocks": [entry.block_q, fixed["FULL"]]}
    if values[kernel.arg_names.index("partial")] is not None:
        row["blocks"].append(fixed["PARTIAL"])
    return row | {"warps": entry.warps, "stages": entry.stages} | inspected(made.asm["cubin"], made.metadata.shared)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=output_file, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--dim", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--variant", nargs="+", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    chosen = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("compiled: Triton is not installed; pip install triton", file=sys.stderr)
        return 1
    rows = []
    for arch in chosen.arch:
        for dim in chosen.dim:
            for name in chosen.variant:
                row = measured(arch, dim, name)
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if chosen.output:
        command = "python -m dit_accel.eval.compiled --dim " + " ".join(map(str, chosen.dim))
        write_json(chosen.output, {"schema": 1, "command": command, "triton": triton.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
