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


def test_another_machine_or_section_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write(opened(path, "cpu", MACHINE, []), path)
    with pytest.raises(UsageError, match="another versions; name another file"):
        opened(path, "cpu", {**MACHINE, "versions": {"torch": "2"}}, [])
    with pytest.raises(UsageError, match="another section"):
        opened(path, "sparse", MACHINE, [])


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
