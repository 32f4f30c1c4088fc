"""Pyramids of means against loops over the runs of every block."""

import pytest
import torch

from dit_accel.kernels.pooling import Runs, pyramid, pyramid_counts, pyramid_means, pyramid_similarity

B, H, N, D, SIZE = 2, 3, 30, 5, 8
LEVELS = [2, 4, 8]


def case(dead=()):
    """Four blocks of 8 places over 30 tokens in random order; the last block is short, and so are dead tokens."""
    g = torch.Generator().manual_seed(0)
    x, order = torch.randn(B, H, N, D, generator=g), torch.randperm(N, generator=g)
    slot = torch.arange(4 * SIZE).view(4, SIZE)
    tokens, real = order[slot.clamp_max(N - 1)], slot < N
    live = real[None].repeat(B, 1, 1)
    for b, token in dead:
        live[b] &= tokens != token
    return x, tokens, live


DEAD = {"all live": (), "some dead": [(0, 3), (0, 17), *((1, token) for token in range(12, 30))]}


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("levels", [[2], [8], [2, 8], LEVELS], ids=str)
@pytest.mark.parametrize("dead", DEAD)
def test_means_and_counts_are_those_of_live_tokens(dead, levels, chunk, monkeypatch):
    monkeypatch.setattr(pyramid, "CHUNK", chunk)
    x, tokens, live = case(DEAD[dead])
    means, counts = pyramid_means(x, tokens, live, levels), pyramid_counts(live, levels)
    for h, mean, count in zip(levels, means, counts, strict=True):
        assert mean.shape == (B, H, 4 * SIZE // h, D)
        for b in range(B):
            for r in range(4 * SIZE // h):
                places = [divmod(place, SIZE) for place in range(r * h, (r + 1) * h)]
                kept = [int(tokens[i]) for i in places if live[b][i]]
                assert int(count[b, 0, r]) == len(kept)
                expected = x[b, :, kept].double().mean(1) if kept else torch.zeros(H, D).double()
                torch.testing.assert_close(mean[b, :, r].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("levels", [[2, 4], [2, 8], LEVELS], ids=str)
@pytest.mark.parametrize("dead", DEAD)
def test_a_level_is_the_one_below_added_in_order_to_the_last_bit(dead, levels):
    x, tokens, live = case(DEAD[dead])
    held, done = x[:, :, tokens.flatten()] * live.flatten(1)[:, None, :, None], 1
    for h, mean, count in zip(
        levels, pyramid_means(x, tokens, live, levels), pyramid_counts(live, levels), strict=True
    ):
        total = held[:, :, :: h // done]
        for i in range(1, h // done):
            total = total + held[:, :, i :: h // done]
        assert torch.equal(mean, total / count[..., None].clamp_min(1))
        held, done = total, h


@pytest.mark.parametrize("dead", DEAD)
def test_runs_that_are_kept_give_the_same_means(dead):
    x, tokens, live = case(DEAD[dead])
    runs = Runs.of(tokens, live, LEVELS)
    for y in (x, x + 1, x.double(), x.bfloat16()):
        kept = pyramid_means(y, tokens, live, LEVELS, runs)
        assert all(map(torch.equal, kept, pyramid_means(y, tokens, live, LEVELS)))
    assert Runs.of(tokens, live, []).counts == pyramid_means(x, tokens, live, []) == []


def test_dead_tokens_do_not_reach_the_means():
    x, tokens, live = case(DEAD["some dead"])
    poisoned = x.clone()
    for b, token in DEAD["some dead"]:
        poisoned[b, :, token] = float("nan")
    for a, b in zip(pyramid_means(x, tokens, live, LEVELS), pyramid_means(poisoned, tokens, live, LEVELS), strict=True):
        assert torch.equal(a, b)


def test_16_bit_means_are_rounded_once():
    x, tokens, live = case()
    half = x.bfloat16()
    for a, b in zip(
        pyramid_means(half, tokens, live, LEVELS), pyramid_means(half.float(), tokens, live, LEVELS), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("dead", DEAD)
def test_similarity_is_that_of_first_and_last_of_each_run(dead):
    x, tokens, live = case(DEAD[dead])
    found = pyramid_similarity(x, tokens, live, LEVELS)
    for b in range(B):
        for block in range(4):
            for number, h in enumerate(LEVELS):
                pairs = [(i, i + h - 1) for i in range(0, SIZE, h) if live[b, block, i] and live[b, block, i + h - 1]]
                cosine = torch.zeros(H)
                for i, j in pairs:
                    a, c = x[b, :, tokens[block, i]], x[b, :, tokens[block, j]]
                    cosine += (a * c).sum(-1) / a.norm(dim=-1) / c.norm(dim=-1) / len(pairs)
                torch.testing.assert_close(found[b, :, block, number], cosine, atol=1e-6, rtol=1e-5)
