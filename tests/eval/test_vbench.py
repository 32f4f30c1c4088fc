"""VBench's formula against published rows, what is refused, results made elsewhere, names."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.vbench import (
    CUSTOM,
    DIMENSIONS,
    FLICKER,
    SUITES,
    judge_results,
    mean_of,
    missing_videos,
    prompt_of,
    read_results,
    suite,
    temporal_flickering,
    totals,
    video_name,
)

ROWS = json.loads((Path(__file__).parents[1] / "data" / "vbench_leaderboard.json").read_text())["rows"]


@pytest.mark.parametrize("row", ROWS, ids=[row["model"] for row in ROWS])
def test_published_rows_are_reproduced(row):
    found = totals({name: value / 100 for name, value in row["dimensions"].items()})
    for name, value in row["published"].items():
        assert 100 * found[name] == pytest.approx(value, abs=0.02)


def test_there_are_23_rows_and_16_dimensions():
    assert len(ROWS) == 23
    assert len(DIMENSIONS) == 16
    groups = [d.group for d in DIMENSIONS.values()]
    assert (groups.count("quality"), groups.count("semantic")) == (7, 9)
    assert sum(d.weight for d in DIMENSIONS.values() if d.group == "quality") == 6.5


def test_the_ends_of_the_scale():
    zeros = totals(dict.fromkeys(DIMENSIONS, 0.0))
    assert zeros["quality"] == pytest.approx(-0.714598, abs=1e-6)
    assert zeros["semantic"] == pytest.approx(-0.000351, abs=1e-6)
    assert zeros["total"] == pytest.approx(-0.571748, abs=1e-6)
    assert totals({name: d.high for name, d in DIMENSIONS.items()})["total"] == pytest.approx(1.0, abs=1e-12)


def test_one_dimension_by_hand():
    """Raising dynamic_degree by 0.1 raises quality by 0.1 x 0.5 / 6.5, and the total by four fifths of that."""
    low = dict.fromkeys(DIMENSIONS, 0.5)
    high = low | {"dynamic_degree": 0.6}
    assert totals(high)["total"] - totals(low)["total"] == pytest.approx(0.1 * 0.5 / 6.5 * 0.8)


def test_names_with_spaces_are_the_same():
    scores = dict.fromkeys(DIMENSIONS, 0.4)
    assert totals({name.replace("_", " "): value for name, value in scores.items()}) == totals(scores)


@pytest.mark.parametrize(("change", "message"), [
    ({"scene": None}, r"needs all 16 dimensions; missing: scene\. .*mean_of"),
    ({"proxy.sharpness.v1": 0.5}, r"'proxy.sharpness.v1' is no VBench score"),
    ({FLICKER: 0.5}, r"is no VBench score and never part of a total"),
    ({"sene": 0.5}, "unknown VBench dimension 'sene'"),
    ({"object class": 0.5}, "'object_class' is given twice"),
    ({"scene": 61.24}, "Divide percents by 100"),
    ({"scene": float("nan")}, "got nan"),
])  # fmt: skip
def test_totals_refuse(change, message):
    scores = {**dict.fromkeys(DIMENSIONS, 0.5), **change}
    with pytest.raises(UsageError, match=message):
        totals({name: value for name, value in scores.items() if value is not None})


def test_a_mean_of_some_says_of_which():
    assert mean_of({"scene": 0.2, "color": 0.4}) == {"label": "mean of scene, color", "value": pytest.approx(0.3)}
    with pytest.raises(UsageError, match="no VBench score"):
        mean_of({FLICKER: 0.9})


def test_the_standard_suite_counts():
    """946 prompts in 11 disjoint suites, 5 videos each, 25 for temporal flickering."""
    per_suite = []
    for names in SUITES:
        (count,) = {DIMENSIONS[name].prompts for name in names}
        per_suite.append((count, max(DIMENSIONS[name].videos for name in names)))
    assert sorted(name for names in SUITES for name in names) == sorted(DIMENSIONS)
    assert sum(count for count, _ in per_suite) == 946
    assert sum(5 * count for count, _ in per_suite) == 4730
    assert sum(count * videos for count, videos in per_suite) == 6230


def write(folder, name, score, videos):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"video_path": f"v-{i}.mp4", "video_results": score} for i in range(videos)]
    (folder / f"{name}_eval_results.json").write_text(json.dumps({name: [score, rows]}))


def complete(folder):
    for name, d in DIMENSIONS.items():
        write(folder, name, 0.5, 300 if name == "temporal_flickering" else d.expected)
    return folder


def test_results_of_a_folder_and_of_a_zip_are_the_same(tmp_path):
    folder = complete(tmp_path / "results")
    (folder / "scene_full_info.json").write_text("[]")
    found = read_results(folder)
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"inner/{file.name}")
    assert read_results(tmp_path / "r.zip") == found
    assert found["scene"] == {"score": 0.5, "videos": 430}
    verdict = judge_results(found)
    assert verdict["complete"]
    assert verdict["totals"] == totals(dict.fromkeys(DIMENSIONS, 0.5))
    assert json.loads(json.dumps(verdict)) == verdict


def test_no_totals_from_parts(tmp_path):
    found = read_results(complete(tmp_path))
    less = {name: row for name, row in found.items() if name != "scene"}
    assert "totals" not in judge_results(less)
    assert judge_results(less)["lacking"] == ["scene: not scored"]
    few = found | {"color": {"score": 0.5, "videos": 400}}
    assert judge_results(few)["lacking"] == ["color: 400 of 425 videos"]
    custom = judge_results({name: found[name] for name in CUSTOM}, "custom_input")
    assert "totals" not in custom
    assert custom["mean"]["label"] == f"mean of {', '.join(CUSTOM)}"


def test_results_that_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match="there is nothing at"):
        read_results(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"no \*_eval_results.json in"):
        read_results(tmp_path)
    (tmp_path / "x.zip").write_text("no zip")
    with pytest.raises(UsageError, match="cannot read"):
        read_results(tmp_path / "x.zip")
    write(tmp_path / "a", "scene", 0.5, 3)
    write(tmp_path / "b", "scene", 0.6, 3)
    with pytest.raises(UsageError, match="disagree on scene"):
        read_results(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "color_eval_results.json").write_text('{"color": 0.5}')
    with pytest.raises(UsageError, match="not a VBench result"):
        read_results(tmp_path / "c")


def test_names_of_videos():
    assert video_name("a cat, 4k", 3) == "a cat, 4k-3.mp4"
    assert [prompt_of(n) for n in ("a-b-3.mp4", "x.mp4", "x-12.gif", "a.b-0.mp4")] == ["a-b", "x", "x", "a.b"]
    assert prompt_of(video_name("in-line-skates", 0)) == "in-line-skates"
    with pytest.raises(UsageError, match="file name"):
        video_name("a/b", 0)


def test_a_suite_names_what_is_missing(tmp_path):
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps([
        {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a cat", "dimension": ["scene", "background_consistency"]},
        {"prompt_en": "a cat", "dimension": ["scene"]},
    ]))  # fmt: skip
    assert suite(info) == {"a still lake": 25, "a cat": 5}
    assert suite(info, ["scene"]) == {"a cat": 5}
    for index in (0, 1, 4):
        (tmp_path / video_name("a cat", index)).touch()
    assert missing_videos(tmp_path, suite(info, ["scene"])) == ["a cat-2.mp4", "a cat-3.mp4"]
    with pytest.raises(UsageError, match="unknown VBench dimension"):
        suite(info, ["sharpness"])
    with pytest.raises(UsageError, match=r"is no VBench_full_info.json"):
        suite(tmp_path / "absent.json")


def test_the_weight_free_dimension_has_a_name_of_its_own():
    frames = np.stack([np.full((4, 6, 3), v, np.uint8) for v in (0, 10, 0, 10, 0)])
    found = temporal_flickering(frames)
    assert found["name"] == "vbench_formula.temporal_flickering"
    assert found["score"] == pytest.approx(245 / 255, abs=1e-9)
    assert (found["is_vbench"], found["static_filter"]) == (False, False)
    assert temporal_flickering(frames[:1].repeat(3, 0))["score"] == 1.0


def test_flickering_does_not_wrap_around():
    frames = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (250, 5)])
    assert temporal_flickering(frames)["score"] == pytest.approx(1 - 245 / 255)
    with pytest.raises(UsageError, match="T >= 2"):
        temporal_flickering(frames[:1])
