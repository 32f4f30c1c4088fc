"""README tables from result files: each file by its own benchmark, under its machine and command."""

import json
from pathlib import Path

from dit_accel.eval.tables import machine, main

ENVIRONMENT = {
    "versions": {"torch": "2.11"}, "cpu": {"name": "Some CPU", "threads": 2}, "gpus": {"cuda": "none"},
    "optional_packages": {"triton": "3.6"},
}  # fmt: skip


def test_the_machine_in_a_line():
    assert machine(ENVIRONMENT) == "Some CPU, 2 threads, torch 2.11"
    assert machine({**ENVIRONMENT, "gpus": {"cuda:0": "H200"}}) == "H200, torch 2.11, Triton 3.6"


def test_files_of_three_benchmarks(tmp_path, capsys):
    kernels = {"section": "cpu", "rows": {}, "command": "python -m x", "environment": ENVIRONMENT}
    blocks = {"rows": [], "command": "python -m y", "environment": ENVIRONMENT}
    for name, document in (("a.json", kernels), ("b.json", blocks)):
        (tmp_path / name).write_text(json.dumps(document))
    stored = Path(__file__).resolve().parents[2] / "eval/results/methods-mini.json"
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(stored)]) == 0
    out = capsys.readouterr().out
    assert "`python -m x` on Some CPU, 2 threads, torch 2.11 (a.json):" in out
    assert "of 1/d, own dense" in out
    assert "Amdahl bound" in out
    assert "suite mean" in out


def test_a_file_of_no_benchmark(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"hello": 1}')
    assert main([str(path)]) == 2
    assert "a document with hello is no result" in capsys.readouterr().err
