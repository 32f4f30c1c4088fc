"""Cache policies against windows, averages and choices written out by hand."""

import math

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.pipelines.streaming import CacheConfig, Rotary, StreamCache, preset

GRID = (2, 3)
N = 6  # tokens per frame
ROTARY = Rotary((4, 2, 2))


def cache_of(config, *, layers=2, batch=2, dtype=torch.float64):
    return StreamCache(config, layers=layers, heads=2, head_dim=8, grid=GRID, rotary=ROTARY, batch=batch, dtype=dtype)


def random_chunk(seed, frames, *, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, frames * N, 2, 8, generator=generator, dtype=torch.float64).to(dtype)


def run(cache, chunks, *, first=0, forwards=1):
    """Push whole chunks through; returns the raw (q, k, v) of every one."""
    made = []
    for number in range(first, first + chunks):
        cache.begin()
        qkv = random_chunk(number, cache.config.chunk_frames, dtype=cache._layers[0].key.dtype)
        for _ in range(forwards):
            for layer in range(len(cache._layers)):
                cache.write(layer, *(qkv + layer))
        cache.commit()
        made.append(qkv)
    return made


def turned(x, frame, cell):
    """Rotation by hand: complex numbers, one token at a time."""
    out = torch.empty_like(x)
    places = (frame, cell // GRID[1], cell % GRID[1])
    start = 0
    for place, dim in zip(places, ROTARY.dims, strict=True):
        for j in range(dim // 2):
            angle = place * 10000 ** (-2 * j / dim)
            c = start + 2 * j
            z = torch.complex(x[..., c], x[..., c + 1]) * complex(math.cos(angle), math.sin(angle))
            out[..., c], out[..., c + 1] = z.real, z.imag
        start += dim
    return out


def frames_by_hand(frames, position):
    """(B, len(frames) N, H, D): frames of raw keys, each at its position."""
    parts = [turned(x[:, c], p, c) for x, p in zip(frames, position, strict=True) for c in range(N)]
    return torch.stack(parts, 1)


def split(made, layer=0):
    """Raw keys and values of every frame of ``made``."""
    keys = [f for qkv in made for f in (qkv[1] + layer).split(N, 1)]
    values = [f for qkv in made for f in (qkv[2] + layer).split(N, 1)]
    return keys, values


def logits(cache, layer, query):
    key = cache.window(layer)[0]
    return torch.einsum("bqhd,bkhd->bhqk", cache.rotated(layer, query), key)


CASES = {
    # window: the latest 6 frames, at their own distance
    "window": (CacheConfig("window", window_frames=6), lambda s: (range(s - 3, s + 3), range(s - 3, s + 3))),
    "absolute": (
        CacheConfig("sink", window_frames=9, sink_frames=3, positions="absolute"),
        lambda s: ([0, 1, 2, *range(s - 3, s + 3)],) * 2,
    ),
    "contiguous": (
        CacheConfig("sink", window_frames=9, sink_frames=3),
        lambda s: ([0, 1, 2, *range(s - 3, s + 3)], range(s - 6, s + 3)),
    ),
    "gap": (
        CacheConfig("deep_sink", window_frames=9, sink_frames=4, sink_gap=4),
        lambda s: ([0, 1, 2, 3, *range(s - 2, s + 3)], [*range(s - 9, s - 5), *range(s - 2, s + 3)]),
    ),
    "overlap": (
        CacheConfig("deep_sink", window_frames=9, sink_frames=4, sink_gap=0),
        lambda s: ([0, 1, 2, 3, *range(s - 2, s + 3)], [*range(s - 5, s - 1), *range(s - 2, s + 3)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_seen_and_where(name, layer):
    config, expected = CASES[name]
    cache = cache_of(config)
    made = run(cache, 5)
    start = cache.begin().start
    qkv = random_chunk(9, 3)
    for other in range(2):
        cache.write(other, *(qkv + other))
    made.append(qkv)
    keys, values = split(made, layer)
    seen, places = expected(start)
    assert torch.equal(cache.window(layer)[1], torch.cat([values[f] for f in seen], 1))
    by_hand = frames_by_hand([keys[f] for f in seen], places)
    query = frames_by_hand((qkv[0] + layer).split(N, 1), range(start, start + 3))
    exact = torch.einsum("bqhd,bkhd->bhqk", query, by_hand)
    torch.testing.assert_close(logits(cache, layer, qkv[0] + layer), exact, atol=1e-11, rtol=0)
    assert cache.visible == len(seen) * N


def test_before_the_first_eviction_every_policy_is_plain_history():
    configs = [preset("self_forcing"), preset("deep_sink", sink_gap=4), preset("deep_forcing"), preset("longlive"),
               preset("reward_forcing")]  # fmt: skip
    found = []
    for config in configs:
        cache = cache_of(config)
        run(cache, 2)
        cache.begin()
        q, k, v = random_chunk(7, 3)
        cache.write(0, q, k, v)
        found.append((logits(cache, 0, q), cache.window(0)[1]))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])


def test_buffer_sizes_with_sinks_inside_the_window():
    cache = cache_of(CacheConfig("sink", window_frames=9, sink_frames=3))
    sizes = []
    for _ in range(6):
        run(cache, 1)
        sizes.append(cache.valid_frames)
    assert sizes == [3, 6, 9, 9, 9, 9]


# The average.


def test_ema_follows_its_closed_form():
    alpha, updates = 0.7, 4
    cache = cache_of(CacheConfig("ema_sink", window_frames=9, sink_frames=3, ema_alpha=alpha))
    made = run(cache, 3)
    before = cache._layers[0].key[:, : 3 * N].clone()
    assert torch.equal(before, made[0][1])  # no update before chunk W / f_c
    made += run(cache, updates, first=3)
    exact = [alpha**updates * made[0][i] for i in (1, 2)]
    for i in range(1, updates + 1):
        exact = [e + (1 - alpha) * alpha ** (updates - i) * made[i][j] for j, e in zip((1, 2), exact, strict=True)]
    for buffer, e in zip((cache._layers[0].key, cache._layers[0].value), exact, strict=True):
        torch.testing.assert_close(buffer[:, : 3 * N], e, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("alpha", "source"), [(1.0, 0), (0.0, 4)])
def test_ema_extremes(alpha, source):
    cache = cache_of(CacheConfig("ema_sink", window_frames=9, sink_frames=3, ema_alpha=alpha))
    made = run(cache, 7)
    torch.testing.assert_close(cache._layers[0].key[:, : 3 * N], made[source][1], atol=0, rtol=0)


def test_ema_is_already_seen_by_the_chunk_that_evicts():
    cache = cache_of(CacheConfig("ema_sink", window_frames=9, sink_frames=3, ema_alpha=0.5))
    made = run(cache, 3)
    cache.begin()
    cache.write(0, *random_chunk(9, 3))
    exact = 0.5 * made[0][2] + 0.5 * made[1][2]
    torch.testing.assert_close(cache.window(0)[1][:, : 3 * N], exact, atol=1e-15, rtol=0)


def test_ema_moves_in_half_precision_too():
    cache = cache_of(CacheConfig("ema_sink", window_frames=9, sink_frames=3, ema_alpha=0.999), dtype=torch.bfloat16)
    made = run(cache, 3)
    for _ in range(2000):
        cache.begin()
        for layer in range(2):
            cache.write(layer, *(made[1] + layer))
        cache.commit()
    error = (cache._layers[0].key[:, : 3 * N] - made[1][1]).float()
    started = (made[0][1] - made[1][1]).float()
    assert error.norm() < 0.2 * started.norm()  # 0.999 ** 1999 is 0.135


# Compression.

PC = CacheConfig("deep_sink+pc", window_frames=12, sink_frames=3, pc_budget=9, pc_recent=4, chunk_frames=3)


@pytest.mark.parametrize("rope", ["keep", "compact"])
def test_compression_keeps_the_most_watched(rope):
    cache = cache_of(CacheConfig(**{**PC.to_dict(), "pc_rope": rope}))
    made = run(cache, 4)
    start = cache.begin().start
    made.append(random_chunk(4, 3))
    cache.write(0, *made[-1])
    keys, values = split(made)
    asking = [f for qkv in made for f in qkv[0].split(N, 1)][-4:]
    query = frames_by_hand(asking, range(start - 1, start + 3)).sum(1)
    candidates = range(3, start - 1)
    for b in range(2):
        key = frames_by_hand([keys[f] for f in candidates], candidates)[b]
        score = torch.einsum("hd,nhd->n", query[b], key)
        kept = score.topk(2 * N).indices.sort().values
        exact = torch.cat(
            [*values[:3], torch.cat([values[f] for f in candidates], 1)[:, kept], *values[start - 1 :]], 1
        )
        assert torch.equal(cache.window(0)[1][b], exact[b])
        place = [start - 3] * N + [start - 2] * N if rope == "compact" else [3 + i // N for i in kept.tolist()]
        chosen = torch.cat([keys[f] for f in candidates], 1)[:, kept]
        moved = torch.stack([turned(chosen[b, i], p, kept[i].item() % N) for i, p in enumerate(place)])
        q = frames_by_hand([made[-1][0].split(N, 1)[0]], [start])[b]
        torch.testing.assert_close(
            logits(cache, 0, made[-1][0])[b, :, :N, 3 * N : 5 * N], torch.einsum("qhd,khd->hqk", q, moved),
            atol=1e-11, rtol=0,
        )  # fmt: skip


def test_compression_sizes_and_survivors():
    config = preset("deep_forcing")
    cache = cache_of(config, layers=1)
    sizes, slots = [], cache._slots[0]
    for number in range(20):
        made = run(cache, 1, first=number)
        sizes.append(cache.valid_frames)
        end = cache.valid
        assert torch.equal(
            slots.frame[0, : min(10, 3 * number + 3) * N], torch.arange(min(10, 3 * number + 3) * N) // N
        )
        assert (
            slots.frame[0, end - 4 * N : end].tolist() == [cache.end - 4 + i // N for i in range(4 * N)] or number < 1
        )
        order = slots.frame[0, :end] * N + slots.cell[0, :end]
        assert bool((order.diff() > 0).all())
        assert torch.equal(cache._layers[0].key[:, end - 3 * N : end], made[0][1])
    assert sizes == [3, 6, 9, 12, 15, 18, 21] + [16, 19] * 6 + [16]


# Transactions.


def everything(cache):
    return [t.clone() for t in cache._tensors()], cache.valid, cache.end


@pytest.mark.parametrize("config", [CASES["gap"][0], PC, CacheConfig("ema_sink", window_frames=9, sink_frames=3)])
@pytest.mark.parametrize("chunks", [0, 2, 6])
def test_an_aborted_chunk_leaves_every_bit(config, chunks):
    cache, control = cache_of(config), cache_of(config)
    run(cache, chunks)
    run(control, chunks)
    before = everything(cache)
    cache.begin()
    cache.write(0, *random_chunk(99, 3))  # the second layer never runs
    cache.window(0)
    cache.abort()
    assert all(torch.equal(a, b) for a, b in zip(before[0], everything(cache)[0], strict=True))
    assert everything(cache)[1:] == before[1:]
    run(cache, 3, first=chunks)
    run(control, 3, first=chunks)
    assert all(torch.equal(a, b) for a, b in zip(everything(cache)[0], everything(control)[0], strict=True))


@pytest.mark.parametrize("config", [CASES["gap"][0], PC, CacheConfig("ema_sink", window_frames=9, sink_frames=3)])
def test_room_is_made_once_per_chunk(config):
    once, often = cache_of(config), cache_of(config)
    run(once, 8)
    run(often, 8, forwards=5)
    assert all(torch.equal(a, b) for a, b in zip(everything(once)[0], everything(often)[0], strict=True))


def test_bytes_never_change_and_are_what_the_settings_say():
    for config in (preset("self_forcing"), preset("deep_forcing"), preset("reward_forcing"), preset("longlive")):
        cache = cache_of(config)
        stored = sum(x.key.nbytes + x.value.nbytes for x in cache._layers)
        assert stored == 2 * 2 * 2 * (config.window_frames + 3) * N * 2 * 8 * 8
        before = cache.bytes()
        for number in range(25):
            run(cache, 1, first=number)
            assert cache.bytes() == before
            assert cache.valid <= config.window_frames * N


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_rotation_does_not_drift(dtype, limit):
    """1,000 chunks on, the sinks' keys are those of the first chunk at their place beside the window."""
    cache = cache_of(CacheConfig("deep_sink", window_frames=9, sink_frames=3), dtype=dtype)
    made = run(cache, 1000)
    cache.begin()
    cache.write(0, *random_chunk(3, 3, dtype=dtype))
    found = cache.history(0)[0][:, : 3 * N].double()
    exact = frames_by_hand([f.double() for f in made[0][1].split(N, 1)], range(-6, -3))
    assert (found - exact).norm() / exact.norm() < limit


def test_a_rewound_stream_is_refilled():
    cache = cache_of(CacheConfig("sink", window_frames=9, sink_frames=3))
    made = run(cache, 6)
    exact = everything(cache)
    assert cache.tail_start == 12
    cache.rewind(12)
    assert (cache.valid_frames, cache.end) == (3, 12)
    run(cache, 2, first=4)
    assert all(torch.equal(a, b) for a, b in zip(exact[0], everything(cache)[0], strict=True))
    cache.rewind(15, keep_sinks=False)
    run(cache, 1, first=5)
    assert torch.equal(cache._layers[0].key[:, : 3 * N], made[5][1])
    run(cache, 1)
    assert (cache.valid_frames, cache.end) == (6, 21)
    with pytest.raises(UsageError, match="go back to latent frames 15 to 21; got 3"):
        cache.rewind(3)


def test_misuse_is_told():
    cache = cache_of(CacheConfig("window", window_frames=6))
    with pytest.raises(UsageError, match="no chunk is open"):
        cache.commit()
    cache.begin(1)
    with pytest.raises(UsageError, match="latent frame 0 is still open"):
        cache.begin()
    with pytest.raises(UsageError, match=r"takes keys of shape \(2, 6, 2, 8\).*got \(2, 18, 2, 8\)"):
        cache.write(0, *random_chunk(0, 3))
    cache.abort()
    with pytest.raises(UsageError, match="1 to chunk_frames=3 latent frames; got 4"):
        cache.begin(4)
    with pytest.raises(UsageError, match=r"whole chunks of 3 latent frames here; got 1"):
        cache_of(preset("reward_forcing")).begin(1)


def test_roped_storage_equals_raw_and_ends_at_its_table():
    settings = {"policy": "sink", "window_frames": 9, "sink_frames": 3, "positions": "absolute"}
    raw = cache_of(CacheConfig(**settings))
    roped = cache_of(CacheConfig(**settings, key_storage="roped", max_frames=20))
    found = []
    for cache in (raw, roped):
        run(cache, 5)
        cache.begin()
        q, k, v = random_chunk(11, 3)
        cache.write(0, q, k, v)
        found.append(logits(cache, 0, q))
        cache.commit()
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    with pytest.raises(UsageError, match="max_frames=20: this chunk would reach latent frame 21"):
        roped.begin()
