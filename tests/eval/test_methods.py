"""The table of methods on a tiny pipeline: every measurement, continued where it stopped."""

import json
import time
from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.eval import memory
from dit_accel.eval import methods as module
from dit_accel.eval.command import run as ended
from dit_accel.eval.environment import environment
from dit_accel.eval.methods import Settings, main, markdown, run, split
from dit_accel.eval.tables import section


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pisa@0.25", ("pisa", 0.25, None)),
        ("pisa@0.25+sage2", ("pisa", 0.25, "sage2")),
        ("adaspa", ("adaspa", None, None)),
        ("dense+sage1", ("dense", None, "sage1")),
    ],
)
def test_names(name, parts):
    assert split(name) == parts


@pytest.mark.parametrize("name", ["", "dense", "pisa@2", "pisa@much", "dense@0.5", "@0.3"])
def test_names_that_are_none(name):
    with pytest.raises(UsageError, match="METHOD@DENSITY"):
        split(name)


@pytest.fixture(scope="module")
def settings(tiny_wan, tmp_path_factory):
    return Settings(
        ("all-blocks", "random-blocks", "dense+sage1"), prompts=1, error_steps=2, steps=3, size=(96, 64), frames=17,
        model=str(tiny_wan), plans=tmp_path_factory.mktemp("plans"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def document(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods") / "methods.json"
    run(settings, out)
    return out


def test_every_candidate_is_measured(document):
    found = json.loads(document.read_text())
    table = {entry["candidate"]: entry for entry in found["table"]}
    assert list(table) == ["all-blocks", "random-blocks", "dense+sage1"]
    for entry in table.values():
        assert {"rel_l1", "psnr", "mean", "difference", "seconds"} <= entry.keys()
    # Through the sparse kernel and yet the same video; half of all blocks is another one.
    assert table["all-blocks"]["psnr"]["mean"] > 80 > table["random-blocks"]["psnr"]["mean"]
    assert table["all-blocks"]["rel_l1"] < 1e-4 < table["random-blocks"]["rel_l1"]
    assert table["all-blocks"]["density"] == 1
    assert "speedup" in table["random-blocks"]
    # Quantisation is emulated on CPU: its seconds say nothing.
    assert "speedup" not in table["dense+sage1"]
    assert all(row["tiers"] is not None for row in found["speed"])


def test_what_is_measured_is_not_measured_again(document, settings, monkeypatch):
    before = json.loads(document.read_text())
    calls = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: calls.append(a) or generate(*a, **k))
    monkeypatch.setattr(module, "measure", lambda *a, **k: pytest.fail("the error was measured before"))
    again = run(replace(settings, measurements=("error", "quality")), document)
    assert not calls
    assert again["rows"] == before["rows"]


def test_a_file_of_another_run_is_refused(document, settings):
    with pytest.raises(UsageError, match="other settings"):
        run(replace(settings, steps=4), document)


@pytest.fixture
def timed_elsewhere(document, settings, tmp_path):
    """The run's command line, and a copy of its file that was timed on a machine with other threads."""
    found = json.loads(document.read_text())
    found["environment"]["cpu"] |= {"name": "Some CPU", "threads": 96}
    for row in found["speed"]:
        row["seconds"] = dict.fromkeys(row["seconds"], 1e6)
    out = tmp_path / "methods.json"
    out.write_text(json.dumps(found))
    argv = ["random-blocks", "--model", settings.model, "--steps", "3", "--size", "96x64", "--frames", "17",
            "--prompts", "1", "--plans", str(tmp_path / "plans"), "-o", str(out)]  # fmt: skip
    return argv, out


def test_speed_rows_of_two_machines_are_refused(timed_elsewhere, capsys, monkeypatch):
    argv, out = timed_elsewhere
    before = out.read_bytes()
    # Refused before anything is loaded or rendered.
    monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert ended(lambda: main([*argv, "--measure", "speed"])) == 2
    done = capsys.readouterr()
    here = environment()["cpu"]
    assert "holds 4 speed rows of another machine: Some CPU, 96 threads, torch" in done.err
    assert f"this one is {here['name']}, {here['threads']} threads, torch" in done.err
    assert f"cpu.threads (96 there, {here['threads']} here)" in done.err
    assert "add --fresh-speed" in done.err
    assert done.out == ""
    assert out.read_bytes() == before


def test_speed_rows_of_a_machine_without_a_name_are_refused(timed_elsewhere, capsys):
    argv, out = timed_elsewhere
    found = json.loads(out.read_text())
    del found["environment"]
    out.write_text(json.dumps(found))
    assert ended(lambda: main([*argv, "--measure", "speed"])) == 2
    assert "a machine that it does not name" in capsys.readouterr().err


def test_quality_goes_on_beside_speed_rows_of_another_machine(timed_elsewhere):
    argv, out = timed_elsewhere
    before = json.loads(out.read_text())
    assert ended(lambda: main(["vmoba", *argv[1:], "--measure", "quality"])) == 0
    after = json.loads(out.read_text())
    assert len(after["rows"]) == len(before["rows"]) + 1
    assert (after["speed"], after["environment"]) == (before["speed"], before["environment"])


def test_fresh_speed_measures_speed_again_and_keeps_quality(timed_elsewhere):
    argv, out = timed_elsewhere
    before = json.loads(out.read_text())
    assert ended(lambda: main([*argv, "--measure", "speed", "--fresh-speed"])) == 0
    after = json.loads(out.read_text())
    assert after["rows"] == before["rows"]
    assert [row["candidate"] for row in after["speed"]] == ["dense", "random-blocks"]
    assert all(row["seconds"]["loop"] < 1e6 for row in after["speed"])
    assert after["environment"]["cpu"] == json.loads(json.dumps(environment()["cpu"]))
    # The same machine goes on without being asked.
    assert ended(lambda: main([*argv, "--measure", "speed"])) == 0
    assert len(json.loads(out.read_text())["speed"]) == 4


def test_fresh_speed_without_speed_is_refused(timed_elsewhere, capsys):
    argv, out = timed_elsewhere
    before = out.read_bytes()
    assert ended(lambda: main([*argv, "--measure", "quality", "--fresh-speed"])) == 2
    assert "add speed to --measure" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_an_environment_comes_with_speed_rows_only(document, settings, tmp_path):
    assert "environment" in json.loads(document.read_text())
    found = run(replace(settings, candidates=("random-blocks",), measurements=("quality",)), tmp_path / "quality.json")
    assert found["rows"]
    assert "environment" not in found
    assert section(tmp_path / "quality.json").startswith("(quality.json):")


@pytest.mark.parametrize(
    ("argv", "message"), [(["pisa@2"], "METHOD@DENSITY"), (["pisa@0.5", "--size", "big"], "WIDTHxHEIGHT")]
)
def test_a_usage_error_is_told_and_exits_with_2(argv, message, capsys):
    assert ended(lambda: main(argv)) == 2
    assert message in capsys.readouterr().err


def test_the_table_as_markdown(document):
    lines = markdown(json.loads(document.read_text())).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1


def test_three_prompts_have_a_range_and_six_an_interval():
    def made(prompts):
        rows = [
            {"prompt": str(i), "seed": 0, "side": side, "scores": {"color": i / 10}, "psnr": 20.0 + i, "density": 0.5,
             "effective_density": 0.5}
            for i in range(prompts) for side in ("dense", "one")
        ]  # fmt: skip
        document = {"rows": rows, "speed": [], "error": {}, "candidates": {"one": None}}
        return markdown({"table": module.table(document)})

    assert "| 21.0 (20.0 to 22.0) |" in made(3)
    assert "In brackets: the least and the largest of too few prompts for an interval." in made(3)
    assert "(20.0 to 25.0)" not in made(6)
    assert "In brackets: 95 % intervals over prompts." in made(6)


def test_memory_of_a_call():
    size = memory.Size(grid=(4, 12, 20), heads=2, dim=64)
    found = memory.measure("pisa, no reorder", size)
    assert found["inputs"] == 4 * 2 * 960 * 64 * 2
    assert found["tier"] == "flash"
    assert not found["reordered"]
    assert 0 < found["representatives"] <= 1 / 32


def test_the_peak_is_what_was_held_in_between():
    with memory._Peak() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.05)
        del held
    assert 60 << 20 < peak.extra < 80 << 20
