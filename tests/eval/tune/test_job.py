"""Tuning a tiny pipeline from search to preset, and going on where it was interrupted."""

import json
from dataclasses import replace

import pytest

from dit_accel import load_preset
from dit_accel.errors import UsageError
from dit_accel.eval.tune import bench
from dit_accel.eval.tune.budget import Budget
from dit_accel.eval.tune.job import TuneJob, Tuning
from dit_accel.eval.tune.replay import Stored, replay
from dit_accel.eval.tune.space import Setting
from dit_accel.pipelines.prompts import Prompt
from dit_accel.preset import read_preset

PROMPTS = tuple(Prompt(f"shape {i}", i + 1) for i in range(3))


@pytest.fixture
def job(tiny_wan, tmp_path):
    return TuneJob(
        Budget("psnr", 5), tmp_path / "preset.json", PROMPTS, model=str(tiny_wan), methods=("vmoba", "paro"),
        calibration=2, held_back=1, short_steps=1, limit=6, rounds=1, steps=2, size=(32, 48), frames=9,
    )  # fmt: skip


@pytest.fixture
def fast(monkeypatch):
    """Accelerated loops count as half of dense ones: on a tiny model a clock says nothing."""

    def trial(rows, index):
        return bench.Trial(rows[index]["psnr"], 2.0)

    monkeypatch.setattr(bench, "trial", trial)


def tuned(job, tell=lambda row: None):
    tuning = Tuning(job)
    tuning.load()
    return tuning, tuning.run(tell)


def test_from_search_to_preset(job, fast, tiny_wan):
    tuning = Tuning(job)
    assert any("emulated" in note for note in tuning.notes)
    tuning.load()
    seconds = tuning.seconds()
    assert set(seconds) == {"calibration", "search", "confirmation"}
    assert all(value > 0 for value in seconds.values())
    outcome = tuning.run()
    assert outcome.found.measurements <= 6
    rows = tuning.store.rows
    # The choice was run in full, on the prompt held back, beside dense.
    assert {(r["setting"], r["prompt"]) for r in rows if r["steps"] == 2} == {
        ("dense", 2), (outcome.verdict.chosen.setting.name, 2)
    }  # fmt: skip
    preset = read_preset(job.out)
    assert preset.provenance["budget"] == "psnr>=5"
    assert preset.provenance["measured"]["prompts"] == 1
    assert preset.made_for["steps"] == 2
    assert preset.made_for["grid"] == [3, 3, 2]
    # A second job of another budget measures nothing again that it needs.
    before = len(rows)
    again, _ = tuned(replace(job, budget=Budget("speed", 1.5), overwrite=True))
    names = [(r["setting"], r["prompt"]) for r in again.store.rows if r["setting"] != "dense"]
    assert len(names) == len(set(names))
    assert len(again.store.rows) >= before


def test_interrupted_it_goes_on(job, fast):
    job, heard = replace(job, methods=("vmoba",)), []

    def stop(row):
        heard.append(row)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(job, stop)
    tuning = Tuning(job)
    kept = [r["setting"] for r in tuning.store.rows]
    assert len(kept) == 3
    tuning.load()
    tuning.run()
    names = [(r["setting"], r["prompt"]) for r in tuning.store.rows if r["setting"] != "dense"]
    assert len(names) == len(set(names))
    assert load_preset(job.out).method is not None
    with pytest.raises(UsageError, match="another job"):
        Tuning(replace(job, steps=3, overwrite=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": PROMPTS[:2]}, "needs 3 prompts"),
        ({"methods": ("radiall",)}, "unknown method"),
        ({"calibration": 1}, "--calibration must be at least 2"),
        ({"prompts": (*PROMPTS[:2], replace(PROMPTS[2], frames=5))}, "one size and length"),
    ],
)
def test_what_cannot_be_tuned(job, changes, words):
    with pytest.raises(UsageError, match=words):
        Tuning(replace(job, **changes))


def test_speed_is_against_dense_runs_of_the_same_length_and_session():
    def row(setting, loop, steps=4, session=0):
        about = {"setting": setting, "steps": steps, "session": session, "psnr": 30.0}
        return about | {"seconds": {"loop": loop}, "tiers": {"flash": 1}}

    rows = [
        row("dense", 9.0, session=1), row("dense", 2.0), row("a", 1.0), row("dense", 4.0), row("dense", 50.0, steps=30),
        row("a", 5.0, steps=30), row("b", 1.0, session=2),
    ]  # fmt: skip
    assert bench.trial(rows, 2).speed == pytest.approx(3.0)
    assert bench.trial(rows, 5).speed == pytest.approx(10.0)
    assert bench.trial(rows, 6).speed is None
    for r in rows:
        r["cores"] = 1.9
    rows[1]["cores"] = 1.0
    assert bench.trial(rows, 2).speed == pytest.approx(4.0)
    assert [bench.starved(r, bench.most_cores(rows)) for r in rows[:3]] == [False, True, False]
    rows[3]["cores"] = 1.0  # none is left that had its cores, and a doubtful speed is better than none
    assert bench.trial(rows, 2).speed == pytest.approx(3.0)
    rows[2]["tiers"] = {"reference": 4}
    assert bench.trial(rows, 2).speed is None


def test_an_unfinished_sweep_is_not_replayed(tmp_path):
    setting = {"method": "pisa", "density": 0.2, "dense_steps": 0.0, "dense_layers": [], "quant": None}
    document = {"schema": 1, "about": {"settings": [setting], "prompts": ["a", "b", "c"]}, "rows": []}
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="lacks 3 of 3"):
        Stored.of(bench.read(path))
    trials = {("pisa@0.2", i): bench.Trial(30.0 + i, 1.5) for i in range(3)}
    stored = Stored(tuple(map(Setting.from_dict, [setting])), ("a", "b", "c"), trials)
    with pytest.raises(UsageError, match="a split needs"):
        replay(stored, Budget("psnr", 20), calibration=3)
    assert replay(stored, Budget("psnr", 20), calibration=2)["held"] == 10
