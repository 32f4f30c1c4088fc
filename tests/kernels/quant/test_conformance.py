"""Facts of quantised attention that hold in exact arithmetic, in float64 (SageAttention, 2410.02367; 2, 2411.10958).

Rounding to half a step, the number formats, the groups and a ragged end are in the tests of the quantisers, of the
values and of the reference tier.
"""

import torch

from dit_accel.kernels.quant.smooth import block_mean, mean

SCALE, N, DIM = 0.125, 300, 64
G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(1, 2, N, DIM, generator=G, dtype=torch.float64) + i for i in range(3))


def largest(a, b):
    return (a - b).abs().max()


def test_keys_may_lose_their_mean_and_the_lse_gets_it_back():
    k_mean = mean(K).double()
    logits, smoothed = SCALE * (Q @ K.mT), SCALE * (Q @ (K - k_mean).mT)
    assert largest(smoothed.softmax(-1), logits.softmax(-1)) < 1e-14
    back = SCALE * (Q @ k_mean.mT)[..., 0]
    assert largest(smoothed.logsumexp(-1) + back, logits.logsumexp(-1)) < 1e-12


def test_queries_may_lose_the_mean_of_their_block():
    rows = torch.arange(N) // 128
    centre, smooth = block_mean(Q, 128).double()[:, :, rows], K - mean(K).double()
    logits = SCALE * ((Q - centre) @ smooth.mT + centre @ smooth.mT)
    assert largest(logits.softmax(-1), (SCALE * (Q @ K.mT)).softmax(-1)) < 1e-14


def test_values_may_lose_their_mean():
    weights = (SCALE * (Q @ K.mT)).softmax(-1)
    v_mean = mean(V).double()
    assert largest(weights @ (V - v_mean) + v_mean, weights @ V) < 1e-12


def test_the_order_of_keys_and_of_all_tokens():
    order = torch.randperm(N, generator=G)

    def attention(q, k, v):
        return (SCALE * (q @ k.mT)).softmax(-1) @ v

    out = attention(Q, K, V)
    assert largest(attention(Q, K[:, :, order], V[:, :, order]), out) < 1e-12
    assert largest(attention(*(x[:, :, order] for x in (Q, K, V))), out[:, :, order]) < 1e-12


def test_two_level_sums_survive_an_accumulator_of_13_bits():
    """FP8 matrix units of Ada and Hopper drop the low 10 bits of a float32 sum after each product of 32."""

    def truncated(x):
        return (x.view(torch.int32) & ~1023).view(torch.float32)

    terms = torch.rand(4096, generator=G)
    exact = terms.double().sum()

    def level(parts):
        total = torch.zeros(())
        for part in parts.split(32):
            total = truncated(total + part.sum())
        return total

    single = abs(level(terms) - exact) / exact
    double = abs(sum(level(block) for block in terms.split(64)) - exact) / exact
    assert double < single / 10
    assert double < 2e-4
