"""Block statistics against loops over single tokens in float64, and the size of what they create."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.pooling import block_means, block_spreads, block_statistics, segments
from dit_accel.kernels.pooling import blocks as implementation

SIZES = {
    "uniform": [8] * 6,
    "tail": [8, 8, 8, 8, 3],
    "ragged": [5, 8, 2, 8, 1, 7],
    "uneven": [1] * 12 + [40, 2],
    "one": [9],
    "empty block": [4, 0, 3],
}
B, H, D, DV = 2, 3, 5, 4


def case(sizes, *, dead=False, order=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(sizes))
    n = sum(sizes)
    k, v = (torch.randn(B, H, n, d, generator=g).to(dtype) + 3 for d in (D, DV))
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    live = torch.arange(n) < torch.tensor([n, n // 2])[:, None] if dead else None
    if order is not None:
        shape = (n,) if order == "shared" else (H, n)
        order = torch.rand(shape, generator=g).argsort(-1)
    return k, v, bounds, {"live": live, "order": order}


def brute(k, v, bounds, live, order):
    """Means, counts, moments of every block, one token at a time."""
    n, blocks = k.shape[2], len(bounds) - 1
    key, value = torch.zeros(B, H, blocks, D).double(), torch.zeros(B, H, blocks, DV).double()
    count, moment = torch.zeros(B, H, blocks, dtype=torch.int), torch.zeros(B, H, blocks, D, DV).double()
    for b in range(B):
        for h in range(H):
            slots = torch.arange(n) if order is None else order if order.ndim == 1 else order[h]
            for j in range(blocks):
                tokens = [t for t in slots[bounds[j] : bounds[j + 1]].tolist() if live is None or live[b, t]]
                count[b, h, j] = len(tokens)
                if tokens:
                    key[b, h, j] = sum(k[b, h, t].double() for t in tokens) / len(tokens)
                    value[b, h, j] = sum(v[b, h, t].double() for t in tokens) / len(tokens)
                for t in tokens:
                    moment[b, h, j] += torch.outer(k[b, h, t].double() - key[b, h, j], v[b, h, t].double())
    return key, value, count, moment


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22], ids=["single blocks", "small parts", "whole"])
@pytest.mark.parametrize("order", [None, "shared", "per head"])
@pytest.mark.parametrize("dead", [False, True], ids=["all live", "dead keys"])
@pytest.mark.parametrize("name", SIZES)
def test_equals_brute_force(name, dead, order, chunk, monkeypatch):
    monkeypatch.setattr(implementation, "CHUNK", chunk)
    k, v, bounds, more = case(SIZES[name], dead=dead, order=order)
    key, value, count, moment = brute(k, v, bounds, **more)
    means, counts = block_means(k, bounds, **more)
    found = block_statistics(k, v, bounds, **more, norms=True)
    plain = block_statistics(k, v, bounds, **more)
    assert torch.equal(counts.expand_as(count), count)
    assert torch.equal(found.count, counts)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(means.double(), key, **close)
    torch.testing.assert_close(found.key, means, **close)
    torch.testing.assert_close(found.value.double(), value, **close)
    torch.testing.assert_close(found.moment.double(), moment.sum(2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(plain.moment.double(), moment.sum(2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.norm.double(), moment.flatten(3).norm(dim=-1), atol=1e-4, rtol=1e-5)
    assert plain.norm is None


@pytest.mark.parametrize("order", [None, "shared", "per head"])
@pytest.mark.parametrize("dead", [False, True], ids=["all live", "dead keys"])
@pytest.mark.parametrize("name", SIZES)
def test_spreads_are_mean_absolute_deviations(name, dead, order, monkeypatch):
    monkeypatch.setattr(implementation, "CHUNK", 200)
    monkeypatch.setattr(segments, "CHUNK", 200)
    k, _, bounds, more = case(SIZES[name], dead=dead, order=order)
    calls = []
    monkeypatch.setattr(
        implementation, "segment_spreads", lambda *args: calls.append(1) or segments.segment_spreads(*args)
    )
    means, spreads, count = block_spreads(k, bounds, **more)
    assert bool(calls) == (not dead and order != "per head" and name != "empty block")
    known, counted = block_means(k, bounds, **more)
    torch.testing.assert_close(means, known)
    assert torch.equal(count, counted)
    for b, h in ((0, 0), (1, 2)):
        slots = torch.arange(k.shape[2]) if order is None else more["order"] if order == "shared" else more["order"][h]
        for j in range(len(bounds) - 1):
            tokens = [t for t in slots[bounds[j] : bounds[j + 1]].tolist() if not dead or more["live"][b, t]]
            each = [(k[b, h, t].double() - means[b, h, j].double()).abs() for t in tokens]
            expected = sum(each) / len(each) if each else torch.zeros(D).double()
            torch.testing.assert_close(spreads[b, h, j].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
def test_dead_and_foreign_tokens_do_not_reach_the_statistics(norms):
    k, v, bounds, more = case(SIZES["ragged"], dead=True, order="shared")
    before = block_statistics(k, v, bounds, **more, norms=norms)
    for x in (k, v):
        x[~more["live"][:, None].expand(B, H, -1)] = torch.nan
    after = block_statistics(k, v, bounds, **more, norms=norms)
    for name in ("key", "value", "moment", *(["norm"] if norms else [])):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_sums_of_16_bit_tokens_are_float32_and_of_double_ones_double():
    k, v, bounds, more = case([512, 512, 9], dtype=torch.bfloat16)
    means, _ = block_means(k, bounds)
    assert means.dtype == torch.float32
    key, _, _, moment = brute(k, v, bounds, **more)
    torch.testing.assert_close(means.double(), key, atol=1e-5, rtol=1e-5)
    found = block_statistics(k, v, bounds)
    torch.testing.assert_close(found.moment.double(), moment.sum(2), atol=2e-3, rtol=1e-5)
    assert block_statistics(k.double(), v.double(), bounds, norms=True).norm.dtype == torch.float64


def test_strided_heads_are_the_same():
    k, _, bounds, _ = case(SIZES["tail"])
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(block_means(strided, bounds)[0], block_means(k, bounds)[0])
    torch.testing.assert_close(block_spreads(strided, bounds), block_spreads(k, bounds))


def test_a_common_bias_of_the_keys_does_not_cost_the_moment_its_digits():
    k, v, bounds, more = case(SIZES["uniform"])
    _, _, _, moment = brute(k, v, bounds, **more)
    biased = block_statistics(k + 100, v, bounds).moment
    torch.testing.assert_close(biased.double(), moment.sum(2), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("strided", [False, True])
def test_means_on_cpu_are_segments_of_rows(strided, monkeypatch):
    """Heads that lie side by side are added together: one pass per sample, else one per head."""
    passes = []
    real = segments.embedding_bag
    monkeypatch.setattr(segments, "embedding_bag", lambda *a, **kw: passes.append(a[1].shape) or real(*a, **kw))
    k, _, bounds, _ = case(SIZES["tail"])
    block_means(k.transpose(1, 2).contiguous().transpose(1, 2) if strided else k, bounds)
    assert passes == [(35, H * D)] * B if strided else [(35, D)] * B * H
    passes.clear()
    block_means(k.double(), bounds)
    block_means(k.bfloat16(), bounds)
    assert not passes


class Largest(TorchDispatchMode):
    """The most elements of any tensor created, views not counted."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("order", [None, "shared"])
def test_moments_of_all_blocks_never_exist_together(order, monkeypatch):
    monkeypatch.setattr(implementation, "CHUNK", 1 << 14)
    sizes, d = [16] * 64 + [5], 32
    n = sum(sizes)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    k, v = torch.randn(2, 1, 2, n, d).unbind(0)
    order = None if order is None else torch.randperm(n)
    with Largest() as seen:
        block_statistics(k, v, bounds, order=order, norms=True)
    assert seen.elements <= 1 << 14  # of which [blocks, D, D] would take 133,120 and one copy of k 65,856
    with Largest() as seen:
        block_means(k, bounds, order=order)
    assert seen.elements <= 1 << 14
