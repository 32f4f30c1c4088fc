"""The comparison of policies: pairs by prompt and seed, intervals, memory, on a tiny model."""

import json

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval import stream_memory, stream_policies
from dit_accel.pipelines.mini.captions import parse
from dit_accel.pipelines.streaming.job import StreamJob


def row(policy, prompt, seed, value):
    return {"policy": policy, "prompt": prompt, "seed": seed, **dict.fromkeys(stream_policies.MEASURES, value)}


def test_differences_are_paired():
    keys = [(prompt, seed) for prompt in "abcde" for seed in (1, 2)]
    rows = [row("window", *key, 10.0 * i) for i, key in enumerate(keys)]
    rows += [row("sink", *key, 10.0 * i + 1) for i, key in enumerate(keys)][::-1]
    found = stream_policies.compare(rows)
    assert found["sink"]["drift"]["change"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["sink"]["drift"]["mean"] == 46.0
    assert "change" not in found["window"]["drift"]
    four = [one for one in rows if one["prompt"] != "e"]
    assert "change" not in stream_policies.compare(four)["sink"]["drift"]  # eight pairs, but of four prompts


def test_unknown_values_are_left_out():
    rows = [row(policy, "a", seed, None) for policy in ("window", "sink") for seed in range(6)]
    assert stream_policies.compare(rows)["sink"]["drift"] == {"mean": None, "clips": 0}


def test_twenty_prompts_of_the_grammar():
    prompts = stream_policies.fixed_prompts()
    assert len({prompt.text for prompt in prompts}) == 20
    for prompt in prompts:
        parse(prompt.text)


@pytest.fixture
def command(tiny_wan, tmp_path, monkeypatch):
    """Runs the comparison on a tiny Wan; returns the file's content."""
    job = stream_policies.StreamJob
    monkeypatch.setattr(stream_policies, "StreamJob", lambda *a, **k: job(*a, **k, size=(48, 32)))
    out = tmp_path / "found.json"
    words = ["--seconds", "0.5", "--prompts", "1", "--policies", "window,sink", "--model", str(tiny_wan)]

    def run(*extra):
        assert stream_policies.main([*words, "--clips", str(tmp_path / "clips"), "-o", str(out), *extra]) == 0
        return json.loads(out.read_text())

    return run


def test_one_command_that_continues(command, tmp_path, monkeypatch, capsys):
    made = stream_policies.run_stream

    def interrupted(plan, **settings):
        plan.clips = plan.clips[:1]
        made(plan, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(stream_policies, "run_stream", interrupted)
        first = command("--seeds", "1")
    assert (len(first["rows"]), first["covered"], first["policies"]) == (1, {"pairs": 0, "wanted": 1}, {})
    found = command("--seeds", "1")
    assert found["rows"][0] == first["rows"][0]
    assert [row["policy"] for row in found["rows"]] == ["window", "sink"]
    assert found["covered"] == {"pairs": 1, "wanted": 1}
    assert set(found["policies"]) == {"window", "sink"}
    assert "1 of 1 prompts x seeds" in capsys.readouterr().out
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(stream_policies, "run_stream", None)  # nothing is left to do
        assert command("--seeds", "1") == found
    with pytest.raises(UsageError, match="rows made with other settings"):
        command("--seeds", "1", "--seconds", "1")


def test_memory_of_every_policy(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_memory, "WARM", 0.6)
    job = StreamJob(
        (stream_policies.fixed_prompts()[0],), tmp_path, seconds=3, model=str(tiny_wan), steps=1, size=(48, 32),
        policies=("deep_sink",), changes={"window_frames": 6, "sink_frames": 3},
    )  # fmt: skip
    row = stream_memory.measure(job)
    assert (row["warm"]["seconds"], row["end"]["seconds"]) == (9 / 16, 3.0)
    assert row["growth"]["cache"] == 0
    assert row["warm"]["peak"] > 50 * 2**20
    assert stream_memory.line(row).startswith("deep_sink: 0.6 s to 3.0 s, cache")
