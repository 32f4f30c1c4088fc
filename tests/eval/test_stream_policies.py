"""The comparison of policies: pairs by prompt and seed, intervals, memory, on a tiny model."""

import json

import pytest

from dit_accel.eval import stream_policies
from dit_accel.pipelines.mini.captions import parse


def row(policy, prompt, seed, value):
    return {"policy": policy, "prompt": prompt, "seed": seed, **dict.fromkeys(stream_policies.MEASURES, value)}


def test_differences_are_paired():
    keys = [(prompt, seed) for prompt in "abc" for seed in (1, 2)]
    rows = [row("window", *key, 10.0 * i) for i, key in enumerate(keys)]
    rows += [row("sink", *key, 10.0 * i + 1) for i, key in enumerate(keys)][::-1]
    found = stream_policies.compare(rows)
    assert found["sink"]["drift"]["change"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["sink"]["drift"]["mean"] == 26.0
    assert "change" not in found["window"]["drift"]
    assert "change" not in stream_policies.compare(rows[:4] + rows[6:])["sink"]["drift"]  # four pairs


def test_unknown_values_are_left_out():
    rows = [row(policy, "a", seed, None) for policy in ("window", "sink") for seed in range(6)]
    assert stream_policies.compare(rows)["sink"]["drift"] == {"mean": None, "clips": 0}


def test_twenty_prompts_of_the_grammar():
    prompts = stream_policies.fixed_prompts()
    assert len({prompt.text for prompt in prompts}) == 20
    for prompt in prompts:
        parse(prompt.text)


def test_one_command(tiny_wan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream_policies, "WARM", 0.5)
    job = stream_policies.StreamJob
    monkeypatch.setattr(stream_policies, "StreamJob", lambda *a, **k: job(*a, **k, size=(48, 32)))
    words = ["--seconds", "1", "--prompts", "1", "--seeds", "2", "--policies", "window,deep_sink"]
    assert stream_policies.main([*words, "--model", str(tiny_wan), "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "window: drift" in out
    assert "resident memory from" in out
    found = json.loads((tmp_path / "policies.json").read_text())
    assert len(found["rows"]) == 4
    assert {r["seed"] for r in found["rows"]} == {1, 2}
    assert all(r["resident_growth"] == pytest.approx(0, abs=0.5) for r in found["rows"])
    assert len(list(tmp_path.glob("*.mp4"))) == 4
