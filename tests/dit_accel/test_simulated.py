"""The suite on a simulated CUDA device, in a process of its own: Triton decides on import whether it interprets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("simulated_suite.py")

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)


def test_simulated_suite():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "-Werror::RuntimeWarning"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=SUITE.parents[2], timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 60
    assert "skipped" not in done.stdout
