"""Frames from a pipeline: counts, sizes, prompts that change, beginnings, and what it refuses."""

import itertools

import numpy as np
import pytest
import torch

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.pipelines.streaming import CacheConfig, StreamingPipeline
from tiny_models import tiny_pipeline

CONFIG = CacheConfig("deep_sink", window_frames=6, sink_frames=2)
CALL = {"height": 32, "width": 48, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def frames_of(pipe, config=CONFIG, prompt="a red ball runs", **settings):
    return np.concatenate(list(StreamingPipeline(pipe, config).stream(prompt, **CALL, **settings)))


def test_nine_frames_then_twelve(pipe):
    stream = StreamingPipeline(pipe, CONFIG).stream("a red ball", **CALL)
    chunks = list(itertools.islice(stream, 4))
    assert [c.shape for c in chunks] == [(9, 32, 48, 3)] + [(12, 32, 48, 3)] * 3
    assert all(c.dtype == np.float32 and c.min() >= 0 and c.max() <= 1 for c in chunks)
    stats = stream.stats
    assert (stats.frames, stats.latent_frames, stats.chunks, stats.forwards) == (45, 12, 4, 20)
    assert stats.first_frame_seconds > 0
    assert stats.fps == stats.frames / stats.seconds


def test_bytes_are_flat(pipe):
    stream = StreamingPipeline(pipe, CONFIG).stream("a red ball", **CALL)
    sizes = {stream.stats.cache_bytes for _ in itertools.islice(stream, 8)}
    tokens, stored = 8 * (CONFIG.window_frames + 3) * 6 // 8, 3 * 2 * 24 * 4
    assert len(sizes) == 1
    assert sizes.pop() == tokens * stored + 2 * tokens * 8


def test_the_length_is_kept_to_the_frame(pipe):
    assert len(frames_of(pipe, frames=25)) == 25
    assert len(frames_of(pipe, seconds=1)) == 16


def test_the_seed_makes_the_clip(pipe):
    a = frames_of(pipe, frames=21, generator=5)
    assert np.array_equal(a, frames_of(pipe, frames=21, generator=torch.Generator().manual_seed(5)))
    assert np.array_equal(a[:9], frames_of(pipe, frames=9, generator=5))  # no matter where it stops
    assert not np.array_equal(a, frames_of(pipe, frames=21, generator=6))


def test_a_prompt_that_takes_over(pipe):
    plain = frames_of(pipe, frames=45)
    switched = frames_of(pipe, frames=45, changes={21 / 16: "a green cat falls"})
    assert np.array_equal(plain[:21], switched[:21])
    assert not np.allclose(plain[21:], switched[21:], atol=1e-4)
    stream = StreamingPipeline(pipe, CONFIG).stream("a red ball runs", frames=45, **CALL)
    by_hand = [next(stream), next(stream)]
    stream.switch("a green cat falls")
    assert np.array_equal(np.concatenate([*by_hand, *stream]), switched)


def test_an_image_or_a_video_comes_first(pipe):
    rng = np.random.default_rng(0)
    image = rng.random((32, 48, 3), dtype=np.float32)
    stream = StreamingPipeline(pipe, CONFIG).stream("a red ball", image=torch.from_numpy(image).movedim(-1, 0), **CALL)
    chunks = list(itertools.islice(stream, 3))
    assert [len(c) for c in chunks] == [1, 12, 12]
    assert stream.stats.latent_frames == 7
    video = torch.from_numpy(rng.random((9, 3, 32, 48), dtype=np.float32))
    chunks = list(itertools.islice(StreamingPipeline(pipe, CONFIG).stream("a red ball", video=video, **CALL), 2))
    assert [len(c) for c in chunks] == [9, 12]
    with pytest.raises(UsageError, match="1 \\+ 4 n frames; got 8"):
        StreamingPipeline(pipe, CONFIG).stream("a red ball", video=video[:8], **CALL)


def test_guidance(pipe):
    stream = StreamingPipeline(pipe, CONFIG, guidance_scale=3.0).stream("a red ball", frames=9, **CALL)
    list(stream)
    assert stream.stats.forwards == 10


def test_refused(pipe):
    streaming = StreamingPipeline(pipe, CONFIG)
    for settings, message in (
        ({"seconds": 1, "frames": 2}, "seconds or frames"),
        ({"frames": 0}, "at least one frame"),
        ({"height": 40}, "multiples of 16 and 16; got 40x48"),
    ):
        with pytest.raises(UsageError, match=message):
            streaming.stream("a red ball", **{**CALL, **settings})
    with pytest.raises(UnsupportedError, match="this pipeline has two"):
        StreamingPipeline(tiny_pipeline(two_transformers=True))
