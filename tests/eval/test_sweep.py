"""The stored sweep on a tiny pipeline: measured, continued, and of one grid."""

from pathlib import Path

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval import sweep
from dit_accel.eval.tune.bench import read
from dit_accel.eval.tune.budget import Budget
from dit_accel.eval.tune.replay import Stored, replay
from dit_accel.eval.tune.space import Setting

STORED = Path(sweep.__file__).parent / "results" / "sweep-mini.json"
GRID = (Setting("radial", 0.5), Setting("vmoba", 0.5, 0.25, (0,)))


def test_the_grid_has_48_settings():
    names = [setting.name for setting in sweep.grid(6)]
    assert len(names) == len(set(names)) == 48
    assert "paro@0.2 layers=0,1" in names


def small(tiny_wan, tmp_path, **changes):
    given = {"prompts": 2, "frames": 9, "steps": 2, "size": (32, 48), "grid": GRID, **changes}
    return sweep.Sweep(model=str(tiny_wan), plans=tmp_path, **given)


def test_an_interrupted_sweep_is_continued(tiny_wan, tmp_path):
    out, heard = tmp_path / "sweep.json", []

    def interrupt(line):
        heard.append(line)
        if "loop" in line and len([one for one in heard if "loop" in one]) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(small(tiny_wan, tmp_path), out, interrupt)
    document = sweep.run(small(tiny_wan, tmp_path), out)
    pairs = [(row["setting"], row["prompt"]) for row in document["rows"] if row["setting"] != "dense"]
    # What other work kept waiting may be there twice.
    assert set(pairs) == {(setting.name, i) for setting in GRID for i in range(2)}
    assert {row["session"] for row in document["rows"]} == {0, 1}
    assert document["rows"][-1]["setting"] == "dense"
    assert {name for name, _, _ in sweep.table(document)} == {setting.name for setting in GRID}
    with pytest.raises(UsageError, match="another job"):
        sweep.run(small(tiny_wan, tmp_path, steps=3), out)


def test_the_budget_holds_on_prompts_that_the_search_did_not_see(capsys):
    budget = "psnr>=28"
    found = replay(Stored.of(read(STORED)), Budget.parse(budget))
    assert found["held"] >= 9
    assert found["near"] >= 9
    assert sum(row["measurements"] for row in found["trials"]) / 10 < 0.7 * found["measurements_of_a_full_sweep"]
    assert sweep.main(["--replay", str(STORED), "--budget", budget]) == 0
    assert f"{budget}: held in {found['held']} of 10" in capsys.readouterr().out
