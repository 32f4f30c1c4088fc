"""A stream of a Wan model against one masked pass of the stock model over everything, and what it must not change."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.pipelines.streaming import CacheConfig, Host, Rollout, Steps, noise_of
from dit_accel.pipelines.streaming.attention import Pass
from tiny_models import WAN, tiny_transformer

SIZE = (4, 4, 6)
N = 6


def model_of(seed=0):
    torch.manual_seed(seed)
    return WanTransformer3DModel(**WAN).eval()


def texts(seed=1, batch=2):
    return {"cond": torch.randn(batch, 7, 16, generator=torch.Generator().manual_seed(seed))}


def rollout_of(model, config, *, batch=2, steps=None, **settings):
    return Rollout(Host(model), config, steps or Steps(), texts(batch=batch), size=SIZE, seed=3, **settings)


@contextmanager
def masked(monkeypatch, mask):
    """The stock model with ``mask`` (N, N) on its self-attention."""

    def attend(q, k, v, attn_mask=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if q.shape[2] == k.shape[2] else None).transpose(
            1, 2
        )

    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", attend)
        yield


def mask_of(frames, window, sinks, chunk=3):
    """bool (frames N, frames N): a query sees its chunk, ``window - sinks`` frames back from the chunk's end, sinks."""
    query, key = torch.arange(frames)[:, None], torch.arange(frames)[None]
    end = (query // chunk + 1) * chunk
    seen = (key < end) & ((key < sinks) | (key >= end - (window - sinks)))
    return seen.repeat_interleave(N, 0).repeat_interleave(N, 1)


def by_hand(monkeypatch, model, chunks, window, sinks, batch=2):
    """Self-Forcing's rollout without a cache: every forward runs all clean chunks and the noisy one."""
    clean = torch.zeros(batch, 4, 0, *SIZE[1:])
    sigmas = [5 * t / (1000 + 4 * t) for t in (1000, 750, 500, 250)]
    text = texts(batch=batch)["cond"]
    for chunk in range(chunks):
        x = noise_of(3, chunk, 0, (batch, 4, 3, *SIZE[1:]))
        for step, sigma in enumerate(sigmas):
            frames = clean.shape[2] + 3
            times = torch.zeros(batch, frames * N)
            times[:, -3 * N :] = 1000 * sigma
            with masked(monkeypatch, mask_of(frames, window, sinks)), torch.no_grad():
                flow = model(torch.cat([clean, x], 2), times, text, return_dict=False)[0][:, :, -3:]
            x0 = x - sigma * flow
            if step < 3:
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise_of(3, chunk, step + 1, tuple(x.shape))
        clean = torch.cat([clean, x0], 2)
    return clean


@pytest.mark.parametrize(
    ("config", "window", "sinks", "chunks"),
    [
        (CacheConfig("window", window_frames=12), 12, 0, 3),
        (CacheConfig("window", window_frames=6), 6, 0, 4),
        (CacheConfig("sink", window_frames=6, sink_frames=2, positions="absolute"), 6, 2, 5),
        (CacheConfig("sink", window_frames=6, sink_frames=2, positions="absolute", key_storage="roped"), 6, 2, 5),
    ],
    ids=["all", "window", "sinks", "roped"],
)  # fmt: skip
def test_a_stream_is_the_masked_forward(monkeypatch, config, window, sinks, chunks):
    model = model_of()
    stream = rollout_of(model, config)
    found = []
    with stream.host.attached():
        found = torch.cat([stream.next() for _ in range(chunks)], 2)
    exact = by_hand(monkeypatch, model, chunks, window, sinks)
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    if window < 12:
        everything = by_hand(monkeypatch, model, chunks, 99, 0)
        assert (found - everything).abs().max() > 1e-3 * exact.abs().max()  # the window does show


@pytest.mark.parametrize(
    ("config", "window", "sinks"),
    [
        (CacheConfig("window", window_frames=18), 18, 0),
        (CacheConfig("window", window_frames=6), 6, 0),
        (CacheConfig("sink", window_frames=9, sink_frames=3, positions="absolute"), 9, 3),
    ],
    ids=["all", "window", "sinks"],
)
def test_clean_chunks_are_one_masked_forward_in_float64(monkeypatch, config, window, sinks):
    """Six chunks at one time, each with the keys it left in the cache, against all 18 frames at once."""
    model = model_of().double()
    places = torch.arange(32)
    # The stock model stores its rotation in float32.
    cos, sin = Host(model).shape.rotary.tables(places, places, places)
    model.rope.freqs_cos, model.rope.freqs_sin = (table.repeat_interleave(2, -1) for table in (cos, sin))
    text, time = texts(batch=1)["cond"].double(), 321.0
    latents = torch.randn(1, 4, 18, *SIZE[1:], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    host = Host(model)
    cache = Rollout(host, config, Steps(), {"cond": text}, size=SIZE).caches["cond"]
    found = []
    with host.attached(), torch.no_grad():
        for chunk in latents.split(3, 2):
            cache.begin()
            found.append(host.forward(chunk, time, text, Pass(cache, "cond", 0, 0, 1, 0.3)))
            cache.commit()
    with masked(monkeypatch, mask_of(18, window, sinks)), torch.no_grad():
        exact = model(latents, torch.tensor([time]), text, return_dict=False)[0]
    assert (torch.cat(found, 2) - exact).abs().max() < 1e-12
    if window < 18:
        with masked(monkeypatch, mask_of(18, 18, 0)), torch.no_grad():
            everything = model(latents, torch.tensor([time]), text, return_dict=False)[0]
        assert (exact - everything).abs().max() > 1e-3  # the window does show


def test_five_forwards_per_chunk():
    stream = rollout_of(model_of(), CacheConfig("window", window_frames=6))
    with stream.host.attached():
        for chunks in (1, 2, 3):
            stream.next()
            assert stream.host.forwards == 5 * chunks == Steps().forwards * chunks


def test_guidance_has_a_cache_per_branch():
    model, config = model_of(), CacheConfig("window", window_frames=6)
    embeds = {"cond": texts(1)["cond"], "uncond": texts(2)["cond"]}

    def run(scale, embeds):
        stream = Rollout(Host(model), config, Steps(), embeds, size=SIZE, guidance_scale=scale)
        with stream.host.attached():
            return torch.cat([stream.next() for _ in range(3)], 2), stream

    plain, one = run(1.0, {"cond": embeds["cond"]})
    same, two = run(1.0, embeds)
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=1e-6)
    assert two.bytes() == 2 * one.bytes()
    assert two.host.forwards == 2 * one.host.forwards
    assert not torch.allclose(run(3.0, embeds)[0], plain, atol=1e-3)


def test_an_interrupted_chunk_can_be_made_again(monkeypatch):
    config = CacheConfig("deep_sink+pc", window_frames=12, sink_frames=3, pc_budget=9)
    whole, broken = (rollout_of(model_of(), config) for _ in range(2))
    with whole.host.attached():
        exact = torch.cat([whole.next() for _ in range(6)], 2)
    found, forward = [], broken.host.forward
    with broken.host.attached():
        for chunk in range(6):
            before = [t.clone() for t in broken.caches["cond"]._tensors()]
            for fail in range(5):
                calls = iter([0] * fail)

                def stop(*args, calls=calls):
                    if next(calls, None) is None:
                        raise KeyboardInterrupt
                    return forward(*args)

                monkeypatch.setattr(broken.host, "forward", stop)
                with pytest.raises(KeyboardInterrupt):
                    broken.next()
                after = broken.caches["cond"]._tensors()
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (chunk, fail)
            monkeypatch.setattr(broken.host, "forward", forward)
            found.append(broken.next())
    assert torch.equal(torch.cat(found, 2), exact)


def test_a_given_beginning_is_as_good_as_a_made_one():
    config = CacheConfig("sink", window_frames=6, sink_frames=2)
    first, second = (rollout_of(model_of(), config) for _ in range(2))
    with first.host.attached():
        made = torch.cat([first.next() for _ in range(3)], 2)
        exact = first.next()
    with second.host.attached():
        second.absorb(made)
        second.chunks = 3
        assert torch.equal(second.next(), exact)
    third = rollout_of(model_of(), config)
    with third.host.attached():
        third.absorb(made[:, :, :4])  # one frame by itself, then a chunk
        assert third.frames == 4
        assert third.next().shape[2] == 3


def test_another_text_with_the_window_run_again():
    model = model_of()
    config = CacheConfig("window", window_frames=6)
    stream, fresh = rollout_of(model, config), rollout_of(model, config)
    with stream.host.attached():
        made = [stream.next() for _ in range(4)]
        stream.switch(texts(9))
        assert stream.frames == 12
    # What the window then holds is what a stream with the new text from the start would hold after these frames.
    fresh.embeds = texts(9)
    with fresh.host.attached():
        fresh.absorb(torch.cat(made[2:], 2))
    ours, theirs = stream.caches["cond"], fresh.caches["cond"]
    torch.testing.assert_close(ours._layers[2].key, theirs._layers[2].key, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="shapes of the old one"):
        stream.switch({"cond": torch.zeros(2, 8, 16)})


def test_sinks_keep_the_old_text_unless_asked():
    model = model_of()
    for keep in (True, False):
        stream = rollout_of(model, CacheConfig("deep_sink", window_frames=9, sink_frames=4))
        with stream.host.attached():
            for _ in range(6):
                stream.next()
            before = stream.caches["cond"]._layers[1].key[:, : 4 * N].clone()
            stream.switch(texts(9), keep_sinks=keep)
            after = stream.caches["cond"]._layers[1].key[:, : 4 * N]
            assert torch.equal(before, after) is keep
            assert stream.frames == 18
            stream.next()


def test_the_model_is_stock_before_between_and_after():
    model = model_of()
    call = tiny_transformer("wan")[1]
    with torch.no_grad():
        exact = model(**call, return_dict=False)[0]
    stream = rollout_of(model, CacheConfig("window", window_frames=6))
    processors, names = model.attn_processors, [name for name, _ in model.named_modules()]
    with stream.host.attached():
        stream.next()
        with pytest.raises(UnsupportedError, match="while a stream is making a chunk"):
            model(**call)
    with torch.no_grad():
        assert torch.equal(model(**call, return_dict=False)[0], exact)
    assert model.attn_processors == processors
    assert [name for name, _ in model.named_modules()] == names


def test_two_streams_take_turns():
    model, config = model_of(), CacheConfig("window", window_frames=6)
    alone = rollout_of(model, config)
    with alone.host.attached():
        exact = [alone.next() for _ in range(3)]
    a, b = rollout_of(model, config), Rollout(Host(model), config, Steps(), texts(5), size=SIZE, seed=8)
    found = []
    for _ in range(3):
        with a.host.attached():
            found.append(a.next())
        with b.host.attached():
            b.next()
    assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))


@pytest.mark.slow
def test_no_last_position():
    """1,100 latent frames, past the 1,024 positions of Wan's table, at constant bytes."""
    stream = rollout_of(model_of(), CacheConfig("deep_sink", window_frames=6, sink_frames=2), batch=1)
    before = stream.bytes()
    with stream.host.attached():
        while stream.frames < 1100:
            latents = stream.next()
            assert stream.bytes() == before
    assert bool(latents.isfinite().all())


def test_positions_beyond_the_models_own_table():
    """The table of this model ends at 32."""
    stream = rollout_of(model_of(), CacheConfig("sink", window_frames=6, sink_frames=2), batch=1)
    before = stream.bytes()
    with stream.host.attached():
        while stream.frames < 60:
            assert bool(stream.next().isfinite().all())
    assert stream.bytes() == before


def test_other_models_are_refused():
    with pytest.raises(UnsupportedError, match=r"needs a WanTransformer3DModel.*CogVideoX"):
        Host(tiny_transformer("cogvideox")[0])
    with pytest.raises(UnsupportedError, match="must not span latent frames"):
        Host(WanTransformer3DModel(**{**WAN, "patch_size": (2, 2, 2)}))
