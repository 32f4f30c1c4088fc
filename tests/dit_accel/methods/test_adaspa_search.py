"""Block mass, budgets and selection against loops over the materialised softmax."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel import Layout
from dit_accel.methods import adaspa_search
from dit_accel.methods.adaspa_search import block_mass, budgets, kept, levels, main_blocks, select, tokens_of

SCALE = 0.3


def tensors(rows=90, keys=90, batch=2, heads=4, kv_heads=4, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, rows, dim), (batch, kv_heads, keys, dim)
    return [2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def brute_mass(q, k, size, valid=None, lse=None):
    """Sums of exp(scores - lse) over blocks, element by element of the block grid."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * SCALE
    if valid is not None:
        for b, live in enumerate(valid):
            scores[b, :, :, live:] = -torch.inf
    weights = scores.softmax(-1) if lse is None else (scores - lse[..., None]).exp()
    nq, nk = -(-q.shape[2] // size), -(-k.shape[2] // size)
    mass = torch.zeros(*q.shape[:2], nq, nk, dtype=q.dtype)
    for p in range(nq):
        for j in range(nk):
            mass[:, :, p, j] = weights[:, :, p * size : (p + 1) * size, j * size : (j + 1) * size].sum((-1, -2))
    return mass


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "keys", "size", "kv_heads"), [(90, 90, 16, 4), (64, 96, 32, 2), (7, 50, 16, 1), (30, 5, 1, 4)]
)
def test_mass_is_the_block_sums_of_the_softmax(monkeypatch, chunk, rows, keys, size, kv_heads):
    monkeypatch.setitem(adaspa_search.CHUNK, "cpu", chunk)
    q, k = tensors(rows, keys, kv_heads=kv_heads)
    mass, lse = block_mass(q, k, size, scale=SCALE)
    torch.testing.assert_close(mass, brute_mass(q, k, size))
    full = k.repeat_interleave(4 // kv_heads, 1)
    torch.testing.assert_close(lse, (q @ full.mT * SCALE).logsumexp(-1))


def test_a_whole_block_of_queries_holds_its_size_and_all_hold_the_rows():
    q, k = tensors(90, 90)
    mass, _ = block_mass(q, k, 16, scale=SCALE)
    rows = mass.sum(-1)
    torch.testing.assert_close(rows[..., :-1], torch.full_like(rows[..., :-1], 16))
    torch.testing.assert_close(rows.sum(-1), torch.full_like(rows[..., 0], 90))


def test_dead_keys_hold_no_mass_and_a_sample_of_dead_keys_none_at_all():
    q, k = tensors()
    valid = torch.tensor([41, 90], dtype=torch.int32)
    k[0, :, 41:] = 1e4
    mass, _ = block_mass(q, k, 16, scale=SCALE, kv_valid=valid)
    torch.testing.assert_close(mass, brute_mass(q, k, 16, valid.tolist()))
    assert mass[0, :, :, 3:].eq(0).all()
    mass, _ = block_mass(q, k, 16, scale=SCALE, kv_valid=torch.tensor([0, 90], dtype=torch.int32))
    assert mass[0].eq(0).all()
    torch.testing.assert_close(mass[1].sum((-1, -2)), torch.full((4,), 90.0, dtype=torch.float64))


def test_what_dead_keys_hold_is_never_read():
    q, k = tensors()
    valid, gone = torch.tensor([41, 77], dtype=torch.int32), k.clone()
    for b, first in enumerate(valid.tolist()):
        gone[b, :, first:] = torch.nan
    for lse in (None, block_mass(q, k, 16, scale=SCALE)[1]):
        found, _ = block_mass(q, gone, 16, scale=SCALE, lse=lse, kv_valid=valid)
        torch.testing.assert_close(found, block_mass(q, k, 16, scale=SCALE, lse=lse, kv_valid=valid)[0])


def test_the_largest_score_is_looked_for_only_where_the_bound_is_far(monkeypatch):
    offsets, stock = [], adaspa_search._mass
    monkeypatch.setattr(adaspa_search, "_mass", lambda *a: offsets.append(a[3] is None) or stock(*a))
    q, k = tensors()
    block_mass(q, k, 16, scale=SCALE)
    assert offsets
    assert not any(offsets)
    q[..., 0], k[..., 0], k[..., 1], q[..., 1] = 3e2, 0, 3e2, 0
    block_mass(q, k, 16, scale=SCALE)
    assert offsets[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_vectors_that_hardly_meet(dtype):
    q, k = tensors(dtype=torch.float64)
    q[..., 0], k[..., 0], k[..., 1], q[..., 1] = 3e2, 0, 3e2, 0
    bound = q.norm(dim=-1) * k.norm(dim=-1).amax() * SCALE
    mass, lse = block_mass(q.to(dtype), k.to(dtype), 16, scale=SCALE)
    assert (bound - lse).min() > 1e3  # exp of that is 0
    torch.testing.assert_close(mass.double(), brute_mass(q, k, 16), rtol=1e-4, atol=1e-6)


def test_the_lse_of_another_step_is_taken_as_it_is():
    q, k = tensors()
    _, old = block_mass(*tensors(seed=1), 16, scale=SCALE)
    mass, used = block_mass(q, k, 16, scale=SCALE, lse=old)
    assert used is old
    torch.testing.assert_close(mass, brute_mass(q, k, 16, lse=old))
    far, _ = block_mass(q.float(), k.float(), 16, scale=SCALE, lse=old.float() - 1e3)
    assert far.isfinite().all()


def test_half_precision_is_computed_in_float32():
    q, k = tensors(dtype=torch.bfloat16)
    mass, lse = block_mass(q, k, 16, scale=SCALE)
    assert mass.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(mass, brute_mass(q.float(), k.float(), 16), rtol=1e-5, atol=1e-5)


def test_scores_are_never_held_for_all_rows(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setitem(adaspa_search.CHUNK, "cpu", 16 * 640 * 2)
    q, k = tensors(640, 640)
    with Largest() as seen:
        block_mass(q, k, 16, scale=SCALE)
    assert 16 * 640 <= seen.numel <= max(16 * 640 * 2, q.numel())
    assert seen.numel < 640 * 640 / 5


def test_five_heads_of_high_recall_pay_for_five_of_low_recall():
    recall = torch.linspace(0.5, 0.79, 24).index_fill(0, torch.tensor([2, 7, 11, 19, 23]), 0.9)[None]
    count = budgets(recall, (10, 20, 30))[0]
    assert count.dtype == torch.int32
    assert sorted(count.tolist()) == [10] * 5 + [20] * 14 + [30] * 5
    assert count[[2, 7, 11, 19, 23]].tolist() == [10] * 5
    assert (count == 30).nonzero().flatten().tolist() == [0, 1, 3, 4, 5]
    assert count.float().mean() == 20


def test_budgets_meet_in_the_middle_and_samples_are_apart():
    recall = torch.tensor([[0.99, 0.9, 0.85, 0.95, 0.82], [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.81, 0.5, 0.4, 0.3]])
    assert budgets(recall, (1, 2, 3)).tolist() == [[1, 2, 3, 1, 3], [2] * 5, [3, 1, 2, 2, 2]]
    assert budgets(torch.tensor([[0.9]]), (1, 2, 3)).tolist() == [[2]]


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 2 / 3, 0.8, 1.0])
def test_levels_keep_the_mean(density):
    few, usual, many = levels(density)
    assert usual == density
    assert (few + many) / 2 == pytest.approx(density)
    assert 0 < few <= many <= 1
    if density <= 2 / 3:
        assert (few, many) == pytest.approx((density / 2, 1.5 * density))


def test_kept_is_at_least_one_and_at_most_all():
    assert [kept(d, 10) for d in (0.01, 0.2, 0.26, 1.0)] == [1, 2, 3, 10]
    assert kept(0.2, 0) == 0


def test_selection_is_the_heaviest_of_each_row_by_the_budget_of_its_head():
    generator = torch.Generator().manual_seed(3)
    mass = 1 + torch.rand((2, 6, 8, 14), generator=generator, dtype=torch.float64)
    mass[0, 1] **= 12  # concentrated heads
    mass[1, 4] **= 12
    keys, counts = range(3, 12), (2, 4, 6)
    index, count = select(mass, keys, counts)
    for b in range(2):
        recalls = []
        for h in range(6):
            held = 0.0
            for row in mass[b, h]:
                inner = row[3:12].sort(descending=True).values
                held += float(inner[:4].sum() + row[:3].sum() + row[12:].sum())
            recalls.append(held / float(mass[b, h].sum()))
        n = min(sum(r > 0.8 for r in recalls), 3)
        by_recall = sorted(range(6), key=lambda h: -recalls[h])
        assert n == 1
        for place, h in enumerate(by_recall):
            expected = 2 if place < n else 6 if place >= 6 - n else 4
            assert int(count[b, h]) == expected
            for p in range(8):
                best = sorted(keys, key=lambda j: -float(mass[b, h, p, j]))[:expected]
                assert index[b, h, p, :expected].tolist() == best


@pytest.mark.parametrize(
    ("layout", "size", "blocks"),
    [
        (Layout((3, 5, 6)), 16, range(6)),  # the last block is short, and all video
        (Layout((3, 5, 6), text=7), 16, range(5)),  # block 5 holds video and text
        (Layout((2, 4, 8), text=7), 16, range(4)),
        (Layout((3, 5, 6), text=7, text_first=True), 16, range(1, 7)),
        (Layout((3, 5, 6), text=32, text_first=True), 16, range(2, 8)),
        (Layout((1, 2, 3), text=4), 16, range(0)),
        (Layout((1, 3, 3), text=4, text_first=True), 8, range(1, 2)),
        (Layout((1, 1, 9), text=4, prefix=5), 8, range(1, 1)),
    ],
)
def test_blocks_that_hold_other_tokens_are_not_main(layout, size, blocks):
    found = main_blocks(layout, size)
    assert list(found) == list(blocks)
    tokens = range(layout.tokens)[tokens_of(found, size, layout)]
    inside = [t for b in found for t in range(b * size, min((b + 1) * size, layout.tokens))]
    assert list(tokens) == inside
    assert all(layout.main.start <= t < layout.main.stop for t in tokens)
