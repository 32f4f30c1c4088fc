"""``python -m dit_accel.eval.shapes``: the same as ``dit-accel eval shapes``."""

import sys

from dit_accel.cli import main

sys.exit(main(["eval", "shapes", *sys.argv[1:]]))
