"""Result files: continued case by case, refused where they hold another run; the exponent over lengths."""

import json

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.kernels import __main__ as command
from dit_accel.eval.kernels.cases import cases
from dit_accel.eval.kernels.document import fill, opened, write
from dit_accel.eval.kernels.table import exponent, lengths, markdown

MACHINE = {"versions": {"torch": "1"}, "cpu": {}, "gpus": {}, "variables": {"OMP_NUM_THREADS": "2"}}


def test_a_run_out_of_time_goes_on_where_it_ended(tmp_path):
    todo, seen, now, path = cases("scaling"), [], [0.0], tmp_path / "new" / "a.json"

    def one(case):
        seen.append(case.key)
        now[0] += 50
        return {"row": case.key}

    first = opened(path, "scaling", MACHINE, ["--section", "scaling"])
    assert not fill(first, todo, 1, one, lambda: write(first, path), lambda: now[0])
    assert len(seen) == 2
    # Threads are recorded, not part of what a file is.
    again = opened(path, "scaling", {**MACHINE, "variables": {}}, [])
    assert again["command"] == "python -m dit_accel.eval.kernels --section scaling"
    assert fill(again, todo, 10, one, lambda: write(again, path), lambda: now[0])
    assert seen == [case.key for case in todo]
    assert list(json.loads(path.read_text())["rows"]) == seen


def test_a_failure_is_kept_and_tried_again():
    todo, document = cases("scaling")[:2], {"section": "scaling", "rows": {}}

    def broken(case):
        raise ValueError("too large")

    assert fill(document, todo, 1, broken)
    assert document["rows"][todo[0].key]["failure"] == "ValueError: too large"
    assert f"{todo[0].key}: ValueError: too large" in markdown(document)
    fill(document, todo, 1, lambda case: {"good": True})
    assert all(row == {"good": True} for row in document["rows"].values())


def test_cases_that_failed_come_last():
    """One that ends the process would else keep all others from being measured."""
    todo, document, seen = cases("scaling")[:3], {"rows": {}}, []
    document["rows"][todo[0].key] = {"failure": "broken"}
    fill(document, todo, 1, lambda case: seen.append(case.key) or {"good": True})
    assert seen == [case.key for case in (*todo[1:], todo[0])]


def test_a_broken_device_ends_the_run_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    todo, path = cases("scaling"), tmp_path / "a.json"

    def one(case, *_, **__):
        if case == todo[1]:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access")
        return {"good": True}

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(command, "measure", one)
    monkeypatch.setattr(command, "environment", lambda: MACHINE)
    monkeypatch.setattr(command, "markdown", lambda document: "the table")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(command.torch.cuda, "synchronize", synchronize)
    assert command.main(["--section", "scaling", "-o", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out == "the table\n"
    assert "context is broken" in said.err
    assert f"The finished rows are in {path}" in said.err
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == [case.key for case in todo[:2]]
    assert rows[todo[0].key] == {"good": True}
    assert "illegal memory access" in rows[todo[1].key]["failure"]


def test_another_machine_or_section_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write(opened(path, "cpu", MACHINE, []), path)
    with pytest.raises(UsageError, match="another versions; name another file"):
        opened(path, "cpu", {**MACHINE, "versions": {"torch": "2"}}, [])
    with pytest.raises(UsageError, match="another section"):
        opened(path, "sparse", MACHINE, [])
    with pytest.raises(UsageError, match="another choice of --cold"):
        opened(path, "cpu", MACHINE, [], cold=True)


@pytest.mark.parametrize("cold", [False, True])
def test_the_table_says_what_became_of_the_caches_and_who_waited(cold):
    def taken(device, host):
        return {"median": device, "min": device, "iqr": 0, "host": {"median": host}}

    row = {
        **dict.fromkeys(("speedup", "of_own", "of_best", "rate", "of_rate"), 0.5), "shape": "8k", "tokens": 8192,
        "dim": 64, "method": "gna", "quant": None, "tiers": ["triton"], "backend": "auto", "kept": 0.2,
        "best_dense": "torch", "times": {"sparse": taken(1e-4, 4e-4), "torch": taken(3e-4, 1e-4)},
        "work": {"partial": 0, "longest": 1}, "error": {"kernel": 0},
    }  # fmt: skip
    told = markdown({"section": "sparse", "cold": cold, "rows": {"a": row}})
    assert ("L2 cache was overwritten" in told) == cold
    assert ("L2 cache was left as it was" in told) != cold
    assert "| 0.10 (min 0.10, IQR 0.00) | 0.40 |" in told
    assert "8k gna: sparse takes the host 0.40 ms" in told
    assert "torch takes" not in told


def test_the_exponent_of_a_power():
    assert exponent([(n, 3e-9 * n**1.4) for n in (8192, 32768, 131072)]) == pytest.approx(1.4)


def test_lengths_are_ordered_and_dense_beside():
    rows = [
        {"method": "radial", "tokens": n, "best_dense": "torch",
         "times": {"sparse": {"median": n / 2}, "torch": {"median": n}}}
        for n in (20, 10)
    ]  # fmt: skip
    assert lengths(rows) == {"radial": [(10, 5.0), (20, 10.0)], "dense": [(10, 10), (20, 20)]}


def test_a_section_for_gpus_needs_one(capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main(["--section", "sparse"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
