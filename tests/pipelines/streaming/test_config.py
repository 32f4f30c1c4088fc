"""Settings that cannot work are refused with their numbers."""

import pytest

from dit_accel.errors import UsageError
from dit_accel.pipelines.streaming import PRESETS, CacheConfig, preset

REFUSED = [
    ({"policy": "sinks"}, "policy is 'sinks'; choose one of window, sink"),
    ({"policy": "sink", "sink_frames": 22}, "window_frames=21 is less than sink_frames=22 \\+ chunk_frames=3"),
    ({"policy": "sink", "sink_frames": 19}, "give window_frames=22 or more"),
    ({"policy": "window", "sink_frames": 3}, "'window' has no sinks; got sink_frames=3"),
    ({"policy": "deep_sink"}, "'deep_sink' needs sinks; got sink_frames=0"),
    ({"policy": "deep_sink+pc", "sink_frames": 10, "pc_budget": 19}, "19 \\+ chunk_frames=3 = 22 is more than.*21"),
    ({"policy": "deep_sink+pc", "sink_frames": 10, "pc_budget": 13}, "10 \\+ 4 = 14 <= pc_budget <= 21"),
    ({"policy": "deep_sink+pc", "sink_frames": 10, "pc_recent": 2}, "pc_recent=2 must hold the chunk.*3 or more"),
    ({"policy": "ema_sink", "sink_frames": 4}, "sink_frames=4 must equal chunk_frames=3"),
    ({"policy": "ema_sink", "sink_frames": 3, "ema_alpha": 1.5}, "0 to 1; got 1.5"),
    ({"policy": "ema_sink", "sink_frames": 3, "key_storage": "roped"}, "cannot be averaged"),
    ({"policy": "ema_sink", "sink_frames": 3, "positions": "absolute"}, "contradicts"),
    ({"policy": "sink", "sink_frames": 3, "key_storage": "roped"}, "positions='absolute'"),
    ({"policy": "sink", "sink_frames": 3, "sink_gap": 4}, "sink_gap=4 is a setting of deep_sink"),
    ({"chunk_frames": 0}, "chunk_frames is a whole number of latent frames, at least 1; got 0"),
    ({"window_frames": 2.5}, "got 2.5"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_with_the_numbers(settings, message):
    with pytest.raises(UsageError, match=message):
        CacheConfig(**settings)


def test_presets_by_published_name_and_by_policy():
    assert {name: (c.policy, c.window_frames, c.sink_frames) for name, c in PRESETS.items()} == {
        "self_forcing": ("window", 21, 0), "longlive": ("sink", 12, 3), "deep_sink": ("deep_sink", 21, 10),
        "deep_forcing": ("deep_sink+pc", 21, 10), "reward_forcing": ("ema_sink", 9, 3), "anti_drift": ("sink", 12, 5),
    }  # fmt: skip
    assert preset("deep_sink+pc") == PRESETS["deep_forcing"]
    assert preset("window", window_frames=12).window_frames == 12
    with pytest.raises(UsageError, match="unknown cache policy 'deep_sinc'; did you mean 'deep_sink'"):
        preset("deep_sinc")
