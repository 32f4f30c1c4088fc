"""The arguments that say how attention runs, shared by the commands that render."""

from __future__ import annotations

import argparse
import math
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("attention").add_argument
    add(
        "--method", metavar="NAME",
        help="a method of `dit-accel methods`, or dense (default: the model's own plan, else radial for video)",
    )  # fmt: skip
    add("--density", type=float, metavar="D", help="kept fraction of attention in (0, 1]; solves the method's knobs")
    add("--dense-steps", metavar="N|F", help="leading steps left dense, a count or a fraction (default: 0.25)")
    add("--dense-layers", metavar="N|I,J", help="leading layers left dense, or a list of layer indices (default: 0)")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; repeatable")
    add(
        "--quant", metavar="NAME|FILE",
        help="quantised products: auto, sage1, sage2, sage2-int4, sage2pp, or a precision file (default: none)",
    )  # fmt: skip
    add("--preset", metavar="FILE", help="all of this as `dit-accel tune` found it, but --backend and --guard")
    add("--backend", default="auto", help="tier: auto, triton, flash, flex, gather, reference (default: auto)")
    add(
        "--guard", metavar="CHECKS",
        help="checks of accelerated calls, comma-separated: nonfinite, fault, drift; or off (default: nonfinite,fault)",
    )  # fmt: skip
    add(
        "--drift-budget", type=float, metavar="E",
        help="relative error against exact attention beyond which a layer runs dense; implies the check drift",
    )  # fmt: skip
    add("--guard-rate", type=float, metavar="R", help="share of the calls whose rows are sampled (default: 1/32)")


def chosen(args: argparse.Namespace) -> Any:
    """The :class:`~dit_accel.pipelines.acceleration.Acceleration` that the arguments ask for."""
    from ..pipelines.acceleration import Acceleration

    return Acceleration(
        method=args.method,
        density=args.density,
        dense_steps=_steps(args.dense_steps),
        dense_layers=_layers(args.dense_layers),
        parameters=dict(_parameter(p) for p in args.param),
        backend=args.backend,
        quant=args.quant,
        preset=args.preset,
        guard=_guard(args),
    )


def _guard(args: argparse.Namespace) -> Any:
    """The guard that the arguments ask for; None for the default."""
    from ..errors import UsageError
    from ..guard import KINDS, Guard

    if args.guard is None and args.drift_budget is None and args.guard_rate is None:
        return None
    default = [kind for kind in KINDS if getattr(Guard(), kind)]
    named = default if args.guard is None else [] if args.guard == "off" else args.guard.split(",")
    unknown = [name for name in named if name not in KINDS]
    if unknown:
        raise UsageError(f"--guard knows {', '.join(KINDS)} and off; got {', '.join(map(repr, unknown))}")
    checks = {kind: kind in named for kind in KINDS}
    checks["drift"] |= args.drift_budget is not None
    if args.drift_budget is not None and not 0 < args.drift_budget < math.inf:
        raise UsageError(f"--drift-budget is a relative error above 0, for example 0.1; got {args.drift_budget:g}")
    if args.guard_rate is not None and not 0 < args.guard_rate <= 1:
        raise UsageError(f"--guard-rate is a share of the calls in (0, 1], for example 0.1; got {args.guard_rate:g}")
    rate = {} if args.guard_rate is None else {"rate": args.guard_rate}
    return Guard(**checks, **rate, budget=args.drift_budget)


def _steps(text: str | None) -> int | float | None:
    from ..errors import UsageError

    if text is None:
        return None
    try:
        value = int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise UsageError(f"--dense-steps is a count (3) or a fraction of the run (0.25); got {text!r}")
    return value


def _layers(text: str | None) -> int | frozenset[int] | None:
    from ..errors import UsageError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError(f"--dense-layers is a count of leading layers (2) or a list of indices (0,1,5); got {text!r}")
    return int(parts[0]) if "," not in text else frozenset(int(part) for part in parts)


def _parameter(text: str) -> tuple[str, Any]:
    import json

    from ..errors import UsageError

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--param is NAME=VALUE, like --param block_size=64; got {text!r}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if isinstance(parsed, list):
        parsed = tuple(parsed)
    return name.strip().replace("-", "_"), parsed
