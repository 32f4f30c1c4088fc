"""What the guard's benchmark compares: the same forwards, looked at as often as each guard says."""

from dit_accel.eval.guard import measure
from dit_accel.pipelines import mini


def test_guards_look_as_often_as_they_say(monkeypatch):
    whole = mini.defaults()
    monkeypatch.setattr(mini, "defaults", lambda: {**whole, "num_frames": 9})
    found = measure(repeats=1, forwards=3)
    counted = found["counted"]
    layers, calls = 6, 18
    assert {name: entry["calls"] for name, entry in counted.items()} == dict.fromkeys(counted, calls)
    assert [counted[name]["checks"] for name in ("off", "nonfinite", "default", "every call")] == [0, 0, layers, calls]
    assert counted["off"]["flag_reads"] == 0
    assert counted["default"]["flag_reads"] == 3  # once a forward
    assert found["overhead"]["off"] == 0
    assert set(found["overhead"]) == set(found["overhead_range"]) == set(counted)
    assert sum(found["tiers"].values()) == calls
