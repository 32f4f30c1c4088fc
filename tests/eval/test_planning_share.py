"""Planning as a share of attention over a run: what is counted, and when."""

import json

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval import planning_share
from dit_accel.eval.planning_share import Shape, main, measure

TINY = Shape((3, 4, 6), 2, 8, 5)


def test_planning_is_part_of_attention_and_dense_steps_plan_nothing(monkeypatch):
    planned = []
    real = planning_share.plan
    monkeypatch.setattr(planning_share, "plan", lambda *a, **kw: planned.append(kw["step"].index) or real(*a, **kw))
    row = measure("pisa@0.5", TINY, repeats=1)
    assert row["dense_steps"] == 2
    assert planned == [2, 3, 4] * 2, "a warm-up and one run"
    assert 0 < row["planning"] < row["attention"]
    assert row["share"] == row["planning"] / row["attention"]
    assert row["of_dense"] == row["planning"] / row["dense"]


def test_json_names_shape_and_machine(capsys):
    assert main(["vmoba@0.5", "--grid", "3x4x6", "--heads", "2", "--dim", "8", "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["grid"], found["steps"]) == ([3, 4, 6], 2)
    assert found["environment"]["cpu"]
    with pytest.raises(UsageError, match="not understood"):
        measure("pisa@2", TINY)
