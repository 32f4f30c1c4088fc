import json

import pytest
from dit_accel.eval.shapes.suite import bootstrap, prompts, run, summarize, table
from dit_accel.pipelines.mini.captions import parse
from dit_accel.pipelines.mini.world import draw


def test_bundled_lists_follow_the_grammar():
    assert len(prompts("mini-12")) == 12
    assert len(set(prompts("shapes-120"))) == 120
    for name in ("prompt", "mini-12", "shapes-120"):
        for text in prompts(name):
            parse(text)


def test_unknown_list_names_the_bundled_ones():
    with pytest.raises(FileNotFoundError, match="mini-12"):
        prompts("nothing")


def test_run_grades_writes_and_continues(tmp_path):
    pytest.importorskip("cv2")
    calls = []

    def render(prompt, seed):
        calls.append(prompt)
        return draw(parse(prompt), 17)

    out = tmp_path / "rows.json"
    texts = prompts("mini-12")[:3]
    first = run(render, texts[:2], dimensions=("color", "motion"), out=out)
    result = run(render, texts, dimensions=("color", "motion"), out=out)
    assert calls == texts
    assert result["summary"]["color_and_motion"] == 3
    assert len(first["rows"]) == 2
    assert json.loads(out.read_text())["summary"] == result["summary"]
    assert "| color | 1.000 | 1.000 to 1.000 | 100% | 3 |" in table(result["summary"])


def test_interval_holds_the_mean_and_is_repeatable():
    values = [0.0, 1.0] * 20
    low, high = bootstrap(values)
    assert low < 0.5 < high
    assert (low, high) == bootstrap(values)


def test_unstated_dimensions_are_left_out():
    rows = [{"scores": {"color": 1.0, "relation": None}}, {"scores": {"color": 0.0, "relation": 0.5}}]
    summary = summarize(rows, ("color", "relation"))
    assert summary["dimensions"]["relation"]["videos"] == 1
    assert summary["dimensions"]["color"]["mean"] == 0.5
