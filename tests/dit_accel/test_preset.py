"""Presets: everything a processor holds survives the file, and a damaged one says so."""

import json
import pickle

import pytest
from paro_plans import plan_file

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.layout import Layout
from dit_accel.methods import GNA, AdaSpa, Paro, Pisa, Pyramid, Radial, Rectified, VMoBA
from dit_accel.preset import Preset, read_preset, write_preset
from dit_accel.processors import Processor, QuantProcessor
from dit_accel.schedule import Schedule

SCHEDULE = Schedule(first=0.25, layers=frozenset({0, 2}), steps={3}, table={(1, 2)})


@pytest.mark.parametrize(
    "processor",
    [
        Processor(Pisa(density=0.2), schedule=SCHEDULE, backend="gather", on_unsupported="error"),
        Processor(AdaSpa(search_steps=(0, 5)), quant="sage2"),
        Processor(Radial(), quant="auto"),
        Processor(GNA(window=(3, 5, 5), causal=(True, False, False))),
        Processor(VMoBA(k=(1, 2, 0.5), chunks=(2, (2, 2), (2, 2, 2)))),
        Processor(Rectified()),
        Processor(Pyramid()),
        QuantProcessor("sage1"),
    ],
    ids=lambda processor: processor.name,
)
def test_a_processor_comes_back(processor, tmp_path):
    path = tmp_path / "preset.json"
    assert write_preset(path, Preset(processor, {"steps": 30}, {"budget": "psnr>=28"})) == [path]
    preset = read_preset(path)
    assert vars(preset.processor) == vars(processor)
    assert preset.processor.name == processor.name
    hash(preset.processor)
    pickle.dumps(preset.processor)
    assert preset.made_for == {"steps": 30}
    assert preset.provenance == {"budget": "psnr>=28"}


def test_a_calibrated_plan_travels_with_it(tmp_path):
    plan, _ = plan_file(tmp_path / "plan.safetensors", Layout(grid=(3, 4, 5)))
    out = tmp_path / "a" / "preset.json"
    files = write_preset(out, Preset(Processor(Paro(str(plan)))))
    assert [file.name for file in files] == ["preset.method.safetensors", "preset.json"]
    assert str(tmp_path) not in out.read_text()
    moved = out.parent.rename(tmp_path / "b")
    found = dit_accel.load_preset(moved / "preset.json").method
    assert found.plan_file == str(moved / "preset.method.safetensors")
    assert found.digest == Paro(str(plan)).digest
    plan_file(moved / "preset.method.safetensors", Layout(grid=(3, 4, 6)))
    with pytest.raises(UsageError, match="is not the plan"):
        dit_accel.load_preset(moved / "preset.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no preset at"),
        ("{", "no readable preset"),
        ("[]", "no preset of"),
        ('{"kind": "sweep"}', "no preset of"),
        ('{"kind": "preset", "schema": 9}', "version 9"),
        ('{"kind": "preset", "schema": 1}', "damaged"),
        ('{"kind": "preset", "schema": 1, "processor": {"method": {"method": "pisa", "colour": 1}}}', "damaged"),
    ],
)
def test_what_is_no_preset(text, words, tmp_path):
    path = tmp_path / "preset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_preset(path)


def test_a_run_it_was_not_tuned_for_is_told():
    preset = Preset(Processor(Pisa()), {"steps": 30, "grid": [5, 4, 4], "weights": "a"})
    assert preset.differences({"steps": 30, "grid": None, "weights": "a"}) == []
    assert preset.differences({"steps": 20, "grid": [5, 4, 4]}) == ["steps 30 there and 20 here"]


def test_it_is_json_of_its_own(tmp_path):
    path = tmp_path / "preset.json"
    write_preset(path, Preset(Processor(Pisa())))
    document = json.loads(path.read_text())
    assert set(document) == {"schema", "kind", "processor", "made_for", "provenance"}
    assert (document["schema"], document["kind"]) == (1, "preset")
