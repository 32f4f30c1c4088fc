"""The PARO study on a tiny pipeline: every number it promises, on prompts it did not calibrate on."""

import json

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.paro import Study, _prompts, report, study
from dit_accel.pipelines.prompts import Prompt


@pytest.fixture(scope="module")
def found(tiny_wan, tmp_path_factory):
    settings = Study(
        (Prompt("a red ball"),), (Prompt("a blue cat"), Prompt("a green ball", 2)), (0.6,), str(tiny_wan), bins=2,
        block_size=4, steps=3, size=(48, 32), frames=9, error_steps=2, error_prompts=1, backend="gather",
    )  # fmt: skip
    return study(settings, tmp_path_factory.mktemp("plans"))


def test_both_sides_have_the_same_budget(found):
    plans = found["plans"]
    assert set(plans) == {"0.6 reordered", "0.6 unordered"}
    assert plans["0.6 reordered"]["density"] == pytest.approx(plans["0.6 unordered"]["density"], abs=0.05)
    assert plans["0.6 reordered"]["recall"] >= plans["0.6 unordered"]["recall"] - 0.05


def test_attention_error_is_per_layer(found):
    error = found["attention_error"]["0.6"]
    assert [row["layer"] for row in error["layers"]] == [0, 1, 2]
    assert all(row["calls"] == 2 * 2 for row in error["layers"])  # two steps, two guidance branches
    for row in error["layers"]:
        assert 0 < row["reordered"] < 2
        assert 0 < row["reordered_recall"] <= 1
    assert error["of"] == 3


def test_psnr_has_an_interval_and_a_paired_difference(found):
    one = found["psnr"]["0.6"]
    for side in ("reordered", "unordered", "difference"):
        assert len(one[side]["values"]) == 2
        assert one[side]["low"] <= one[side]["mean"] <= one[side]["high"]
    assert one["difference"]["mean"] == pytest.approx(one["reordered"]["mean"] - one["unordered"]["mean"])
    assert one["reordered"]["effective_density"] < 1


def test_the_result_is_json_and_text(found):
    assert json.loads(json.dumps(found)) == found
    text = "\n".join(report(found))
    assert "lower on" in text
    assert "PSNR difference" in text


def test_prompts_do_not_overlap():
    calibration, test = _prompts(None, 2, 8)
    assert len(calibration) == 2
    assert len({p.text for p in (*calibration, *test)}) == 10
    with pytest.raises(UsageError, match="120 prompts; 100 to calibrate and 40 to test do not fit"):
        _prompts(None, 100, 40)
