"""The causal student: what training shows it is what a stream would, and one command trains and exports it."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoModel, WanTransformer3DModel

from dit_accel.pipelines.mini import causal, rows
from dit_accel.pipelines.mini.causal import CausalRun, load_config, main
from dit_accel.pipelines.mini.export import STREAM
from dit_accel.pipelines.mini.rows import CHUNK, MEMORIES, START, WINDOW, Row, rows_of
from dit_accel.pipelines.mini.student import Student, _with_own, chunks_of, forcing_loss
from dit_accel.pipelines.mini.world import FRAMES, MOTIONS, Scene, bounce, draw
from dit_accel.pipelines.streaming import CacheConfig, Host, Rollout, Steps
from dit_accel.pipelines.streaming.attention import Pass
from dit_accel.pipelines.streaming.config import preset
from tiny_models import WAN

GRID = (2, 3)
POLICY = {
    "first": CacheConfig("window", window_frames=12),
    "start": CacheConfig("window", window_frames=12),
    "window": CacheConfig("window", window_frames=12),
    "sink": CacheConfig("sink", window_frames=12, sink_frames=3),
    "deep_sink": CacheConfig("deep_sink", window_frames=12, sink_frames=6),
}
TOY = {
    "seed": 0, "autocast": False, "data": {"shards": 1, "first": 1, "grow": 1, "shard": 2, "batch": 1},
    "student": {
        "steps": 2, "lr": 1e-3, "warmup": 1, "shift": 5.0, "least": 0.1, "blur": 0.2, "every": 99, "samples": 0,
        "memories": {"first": 1.0}, "phases": [{"until": 2, "rows": 1, "own": 0.0}],
    },
}  # fmt: skip


def tiny(seed=0):
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**WAN, "patch_size": (1, 1, 1)}).eval()


def test_rows_of_a_stream_with_sinks():
    assert rows_of((0, 1, 4, 5, 6), sinks=2, first=4) == (
        Row(0, (), False), Row(1, (0,), False), Row(4, (0, 1), False), Row(5, (0, 1, 2), False),
        Row(6, (0, 1, 3), True),
    )  # fmt: skip
    assert rows_of((4, 5, 6, 7, 8), first=4)[-1] == Row(8, (1, 2, 3), True)
    assert rows_of((0,)) == (Row(0, (), True),)


@pytest.mark.parametrize("name", MEMORIES)
def test_training_sees_what_a_stream_sees(name):
    """Every noisy row is predicted as the streaming host predicts it after the same clean chunks."""
    memory, model = MEMORIES[name], tiny()
    torch.manual_seed(1)
    clip, text = torch.randn(1, 4, 24, *GRID), torch.randn(1, 7, 16)
    chunks = chunks_of(clip, memory)
    sigma = torch.tensor([[0.6 if row.noisy else 0.0 for row in memory]])
    host = Host(model)
    expected = {}
    with host.attached(), torch.no_grad():
        stream = Rollout(host, POLICY[name], Steps(), {"cond": text}, size=(4, *GRID))
        cache = stream.caches["cond"]
        for chunk in dict.fromkeys(row.chunk for row in memory):
            latents = clip[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]
            cache.begin()
            expected[chunk] = host.forward(latents, 600.0, text, Pass(cache, "cond", 0, 0, 4, 0.6))
            cache.abort()
            stream.absorb(latents)
    with torch.no_grad():
        found = Student(model, GRID)(chunks, sigma, text, memory)
    for at, row in enumerate(memory):
        if row.noisy:
            torch.testing.assert_close(found[:, at], expected[row.chunk], atol=2e-5, rtol=2e-5)


def test_the_bundled_settings_are_what_was_trained():
    for name in ("window", "sink", "deep_sink", "deep_sink+pc", "ema_sink"):
        config = preset(name, **STREAM["policies"][name])
        assert (config.window_frames, config.chunk_frames) == (WINDOW * CHUNK, CHUNK)
    assert preset("deep_sink", **STREAM["policies"]["deep_sink"]) == POLICY["deep_sink"]
    assert preset("sink", **STREAM["policies"]["sink"]) == POLICY["sink"]


def test_own_predictions_take_the_place_of_clean_chunks():
    memory = rows_of((0, 1, 4), first=1)
    inputs, predicted = torch.zeros(1, 4, 4, CHUNK, *GRID), torch.arange(1.0, 5.0).view(1, 4, 1, 1, 1, 1)
    found = _with_own(inputs, predicted.expand_as(inputs), memory)[0, :, 0, 0, 0, 0]
    # Chunk 0 was not made, chunk 1 was (by row 2), and noisy rows stay.
    assert found.tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_loss_can_be_repeated_and_reaches_all_weights(own):
    student = Student(tiny(), GRID)
    clip, text = torch.randn(2, 4, 24, *GRID), torch.randn(2, 7, 16)

    def loss(blur):
        generator = torch.Generator().manual_seed(0)
        settings = {"shift": 5.0, "least": 0.1, "blur": blur, "own": own}
        return forcing_loss(student, clip, text, MEMORIES["deep_sink"], generator, **settings)

    value, numbers = loss(0.2)
    assert set(numbers) == {"error", "next"}
    assert torch.equal(value, loss(0.2)[0])
    assert not torch.equal(value, loss(0.0)[0])
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert {k.removeprefix("transformer.") for k in student.state_dict()} == set(tiny().state_dict())


def test_time_goes_back_and_forth():
    times = np.linspace(0, 1, 9)
    assert np.array_equal(bounce(times), times)
    assert np.allclose(bounce(np.array([1.25, 2.0, 2.25, 3.5])), [0.75, 0.0, 0.25, 0.5])


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_world_goes_on_without_a_jump(motion):
    scene = Scene("red", "square", motion=motion, speed="fast", pattern="striped", panning=True, seed=5)
    step = 1 / (FRAMES - 1)
    video = draw(scene, times=np.arange(0.75, 2.25, step)).astype(int)
    change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    assert change.max() < 2 * np.median(change) + 1
    if motion in ("left", "grow"):
        still = Scene("red", "square", motion=motion, speed="fast", seed=5)
        assert np.array_equal(draw(still, times=np.array([2.0])), draw(still, times=np.array([0.0])))


def test_the_later_moment_is_drawn_at_its_place():
    scene = Scene("red", "circle", motion="circling", seed=3)
    first = rows.later_moment(scene)
    assert first % 2 == 0
    assert 2 * START * CHUNK <= first < 480
    frames = rows._show(scene, rows.WARM + 1, later=True)
    # Latent WARM of this clip spans its last two frames, as latent first / 2 does of the whole.
    assert np.array_equal(frames[-1], draw(scene, times=np.array([first / (FRAMES - 1)]))[0])


def test_one_command_trains_and_exports(tmp_path, capsys):
    config = tmp_path / "toy.json"
    config.write_text(json.dumps(TOY))
    words = ["--config", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*words, "--max-minutes", "0.00001"]) == 1
    assert "the same command continues" in capsys.readouterr().out
    assert main(words) == 0
    folder = tmp_path / "run" / "transformer"
    assert json.loads((folder / "stream.json").read_text()) == STREAM
    model, bundled = AutoModel.from_pretrained(str(folder)), CausalRun(TOY, tmp_path / "other").pipe.transformer
    assert model.config.num_layers == bundled.config.num_layers
    change = (model.proj_out.weight.float() - bundled.proj_out.weight).abs().max()
    assert 0 < change < 0.01  # it started from the bundled one


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_shipped_configs_are_complete(name):
    shipped = load_config(name, "causal_")
    assert shipped["student"]["phases"][-1]["until"] == shipped["student"]["steps"]
    assert set(shipped["student"]["memories"]) == set(MEMORIES)
    assert causal.schedule_of(shipped["student"]).steps == shipped["student"]["steps"]
