"""``dit-accel eval``: speed, fidelity, attention error, graded videos, VBench; one sub-command each."""

from __future__ import annotations

import argparse

from . import eval_attention, eval_fidelity, eval_metrics, eval_proxies, eval_shapes, eval_speed, eval_vbench

HELP = "measure speed, fidelity, attention error and quality"
DESCRIPTION = (
    "Measure what sparse attention gains and what it costs. Speed, fidelity to the dense output and absolute quality "
    "are told apart and never mixed into one figure."
)
EXAMPLES = """examples:
  dit-accel eval shapes --method radial --density 0.25 --compare -o radial.json
  dit-accel eval fidelity dense/ radial/
  dit-accel eval attention --method radial:decay=0.5 gna --steps 10
  dit-accel eval speed --method radial --repeats 3
  dit-accel eval vbench totals results/
  dit-accel eval proxies dense/ radial/
  dit-accel eval metrics

each also runs as python -m dit_accel.eval.NAME
"""
KINDS = {
    "shapes": eval_shapes,
    "fidelity": eval_fidelity,
    "attention": eval_attention,
    "speed": eval_speed,
    "vbench": eval_vbench,
    "proxies": eval_proxies,
    "metrics": eval_metrics,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", title="what to measure", required=True)
    for name, module in KINDS.items():
        sub = kinds.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(measure=module.run)


def run(args: argparse.Namespace) -> int:
    from ..pipelines.outputs import check_file

    for flag, name in (("-o", "out"), ("--sheet", "sheet")):
        if getattr(args, name, None):
            check_file(getattr(args, name), flag)
    return args.measure(args)
