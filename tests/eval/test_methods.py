"""The table of methods on a tiny pipeline: every measurement, continued where it stopped."""

import json
import time
from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.eval import memory
from dit_accel.eval.methods import Settings, markdown, run, split


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
    import dit_accel.eval.methods as module

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


def test_the_table_as_markdown(document):
    lines = markdown(json.loads(document.read_text())).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1


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
