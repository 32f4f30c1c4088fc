"""The flash tier against a masked softmax in float64, and proof that the dense kernel saw visible pairs only."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import BlockList, Box, Group, Predicate, TilePlan
from dit_accel.kernels.block_sparse import block_sparse_attention, choose, flash_rows, flash_strips, flex
from dit_accel.kernels.block_sparse import order as order_module


def tensors(n_q, n_k, heads=4, kv_heads=4, dim=24, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(n_q * 31 + n_k)
    shapes = ((n_q, heads), (n_k, kv_heads), (n_k, kv_heads))
    # Tokens before heads in memory, as diffusers makes them.
    return [torch.randn(batch, n, h, dim, generator=generator, dtype=dtype).transpose(1, 2) for n, h in shapes]


def brute(q, k, v, seen, scale):
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).mT * scale).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return weights @ v.repeat_interleave(groups, 1), scores.logsumexp(-1)


def token_mask(blocks, tile_q, tile_k, n_q, n_k):
    rows, columns = torch.arange(n_q) // tile_q, torch.arange(n_k) // tile_k
    return blocks[rows][:, columns]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 150), st.sampled_from([(8, 8), (16, 32), (64, 16)]),
    st.sampled_from([1, 2, 4]), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_equals_the_masked_softmax(n_q, n_k, tile, kv_heads, density, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (-(-n_q // tile[0]), -(-n_k // tile[1]))
    blocks = torch.rand(size, generator=generator) < density
    blocks[0] = False  # a query tile that sees nothing
    plan = TilePlan(*tile, n_q, n_k, BlockList.from_mask(blocks[None, None]))
    q, k, v = tensors(n_q, n_k, kv_heads=kv_heads)
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.3, backend="flash", return_lse=True)
    expected, expected_lse = brute(q, k, v, token_mask(blocks, *tile, n_q, n_k), 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_plain_torch(dtype):
    blocks = torch.rand((5, 5), generator=torch.Generator().manual_seed(3)) < 0.5
    blocks |= torch.eye(5, dtype=torch.bool)
    plan = TilePlan(32, 32, 150, 150, BlockList.from_mask(blocks[None, None]))
    q, k, v = tensors(150, 150, dim=64, dtype=dtype)
    seen = token_mask(blocks, 32, 32, 150, 150)
    expected, _ = brute(q, k, v, seen, 0.125)
    out, _ = block_sparse_attention(q, k, v, plan, scale=0.125, backend="flash")
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.125)
    error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (out, plain))
    assert out.dtype == dtype
    assert error <= 2 * allowed + 1e-7


def test_the_dense_kernel_runs_once_per_run_on_visible_pairs_only(monkeypatch):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    plan = TilePlan(16, 16, 60, 60, BlockList.from_mask(mask[None, None]))
    calls, kernel = [], flash_strips.kernel
    monkeypatch.setattr(
        flash_strips, "kernel", lambda q, k, *rest: calls.append((q.shape[2], k.shape[2])) or kernel(q, k, *rest)
    )
    q, k, v = tensors(60, 60)
    block_sparse_attention(q, k, v, plan, scale=0.2, backend="auto")
    assert calls == [(32, 32), (16, 32), (12, 12)]


def test_an_order_is_taken_and_put_back():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    mask = torch.eye(4, dtype=torch.bool)
    plan = TilePlan(16, 16, 60, 60, BlockList.from_mask(mask[None, None]), order=order, kv_order=order)
    q, k, v = tensors(60, 60)
    out, _ = block_sparse_attention(q, k, v, plan, scale=0.2, backend="flash")
    block = torch.empty(60, dtype=torch.long)
    block[order] = torch.arange(60) // 16
    torch.testing.assert_close(out, brute(q, k, v, block[:, None] == block[None, :], 0.2)[0])


@pytest.mark.parametrize("per_head", [False, True], ids=["one order", "an order per head"])
def test_copies_in_plan_order_exist_for_heads_in_turn(per_head, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    order = torch.rand((4, 60) if per_head else (60,), generator=generator).argsort(-1)
    mask = torch.rand(1, 4, 4, 4, generator=generator) < 0.5
    mask |= torch.eye(4, dtype=torch.bool)
    plan = TilePlan(16, 16, 60, 60, BlockList.from_mask(mask), order=order, kv_order=order)
    q, k, v = tensors(60, 60)
    k, v, valid = k[:, :2], v[:, :2], torch.tensor([60, 41], dtype=torch.int32)
    call = {"scale": 0.2, "kv_valid": valid, "backend": "flash", "return_lse": True}
    once = block_sparse_attention(q, k, v, plan, **call)
    copied, real = [], order_module.take
    monkeypatch.setattr(order_module, "take", lambda x, *rest: copied.append(x.shape[1]) or real(x, *rest))
    monkeypatch.setattr(flash_rows, "SOURCE", 1)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan, **call), once)
    assert copied == ([2, 2] if per_head else [1, 1]) * 2


def test_what_it_does_not_serve_goes_elsewhere_with_the_reason():
    q, k, v = tensors(32, 32)
    full = BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    axis = torch.arange(32, dtype=torch.int32)
    partial = TilePlan(16, 16, 32, 32, full, full, Predicate(box=Box((axis,), (axis + 1,), (axis,))))
    assert "partial tiles" in choose(q, partial)[1]
    with pytest.raises(NotImplementedError, match=r"'flash' cannot serve.*partial tiles"):
        block_sparse_attention(q, k, v, partial, scale=1.0, backend="flash")


@pytest.mark.parametrize("source", [1, 1 << 26], ids=["heads in turn", "heads at once"])
@pytest.mark.parametrize("strips", [1, 5000, 1 << 22], ids=["a row a call", "some", "all in one"])
@pytest.mark.parametrize("tables", [(1, 4), (2, 4), (2, 1)], ids=["head", "sample and head", "sample"])
def test_lists_by_sample_and_head_ragged_gqa_dead_keys(tables, strips, source, monkeypatch):
    monkeypatch.setattr(flash_strips, "STRIPS", strips)
    monkeypatch.setattr(flash_rows, "SOURCE", source)
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(*tables, 5, 4, generator=generator) < 0.5
    mask[0, 0, 2] = False  # a tile without a key
    plan = TilePlan(16, 20, 71, 77, BlockList.from_mask(mask))
    q, k, v = tensors(71, 77)
    k, v = k[:, :2], v[:, :2, :, :20]
    valid = torch.tensor([77, 50], dtype=torch.int32)
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.3, kv_valid=valid, backend="flash", return_lse=True)
    seen = mask.repeat_interleave(16, 2)[:, :, :71].repeat_interleave(20, 3)[..., :77]
    seen = seen & (torch.arange(77) < valid[:, None])[:, None, None]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=2e-6, rtol=1e-5)
    assert out[0, 0, 32:48].abs().max() == 0
    assert (lse[0, 0, 32:48] == -torch.inf).all()


def test_whole_tiles_of_queries_with_tokens_before_heads():
    mask = torch.eye(4, dtype=torch.bool).expand(1, 4, 4, 4).contiguous()
    plan = TilePlan(16, 16, 64, 64, BlockList.from_mask(mask))
    q, k, v = tensors(64, 64)
    assert not q.is_contiguous()
    out, _ = block_sparse_attention(q, k, v, plan, scale=0.3, backend="flash")
    torch.testing.assert_close(out, brute(q, k, v, token_mask(mask[0, 0], 16, 16, 64, 64), 0.3)[0])


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_of_one_length_take_whole_tiles_and_no_bias(ragged, monkeypatch):
    n = 61 if ragged else 64
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    for h in range(4):
        for tile in range(4):
            mask[0, h, tile, : 1 + tile] = True
    plan = TilePlan(16, 16, n, n, BlockList.from_mask(mask))
    copied, biased, stock, bias = [], [], flash_strips.gathered, flash_strips.Strips._bias
    monkeypatch.setattr(
        flash_strips, "gathered", lambda *x: copied.append((x[0].shape[-1], x[1].shape[-1])) or stock(*x)
    )
    monkeypatch.setattr(flash_strips.Strips, "_bias", lambda *a: biased.append(bias(*a)) or biased[-1])
    q, k, v = tensors(n, n)
    out, _ = block_sparse_attention(q, k, v, plan, scale=0.2, backend="flash")
    torch.testing.assert_close(out, brute(q, k, v, token_mask(mask[0, 0], 16, 16, n, n), 0.2)[0])
    assert set(copied) == {(16 * k.shape[-1], 16 * v.shape[-1])}
    assert any(x is not None for x in biased) == ragged


@pytest.mark.parametrize(("share", "runs"), [(0.9, {16}), (0.2, {2})], ids=["most are seen", "few are seen"])
def test_representatives_that_most_rows_see_are_copied_in_one_piece(share, runs, monkeypatch):
    generator = torch.Generator().manual_seed(8)
    q, k, v = tensors(60, 60)
    exact = BlockList.from_mask(torch.rand(1, 4, 4, 4, generator=generator) < 0.5)
    seen = torch.rand(1, 4, 4, 9, generator=generator) < share
    group = Group(k[:, :, :18], v[:, :, :18], torch.full((1, 1, 18), 3), BlockList.from_mask(seen), torch.arange(19), 2)
    plan = TilePlan(16, 16, 60, 60, exact, reps=(group,))
    copied, stock = set(), flash_strips.gathered
    monkeypatch.setattr(flash_strips, "gathered", lambda *x: copied.add(x[0].shape[-1] // k.shape[-1]) or stock(*x))
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.2, backend="flash", return_lse=True)
    expected = block_sparse_attention(q, k, v, plan, scale=0.2, backend="reference", return_lse=True)
    torch.testing.assert_close((out, lse), expected)
    assert copied == runs


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("heads", [1, 4], ids=["shared", "by head"])
def test_whole_tiles_come_here_before_they_are_compiled(heads, kept, monkeypatch):
    monkeypatch.setattr(flex, "unavailable", lambda device: None)
    q = torch.zeros(1, 4, 64, 16)
    lists = BlockList.from_mask(torch.ones(1, heads, 4, 4, dtype=torch.bool))
    assert choose(q, TilePlan(16, 16, 64, 64, lists, kept=kept))[0] == "flash"


def everything(per_head, holes, seed):
    """A plan with an order, representatives, a first-order term and row factors, of 4 query and 2 key heads."""
    generator = torch.Generator().manual_seed(seed)
    slots, tokens, tile = 64, 61 if holes else 64, 16
    order = torch.rand((4, slots) if per_head else (slots,), generator=generator).argsort(-1)
    order = order.masked_fill(order >= tokens, -1)
    heads = 4 if per_head else 2
    full = torch.rand(2, 4, 4, 4, generator=generator) < 0.5
    partial = None
    if holes:
        # A tile with a hole is tested.
        partial = full & (order < 0).view(-1, 4, tile).any(-1)[None, :, None]
        if not per_head:
            full, partial = full & ~partial, partial
        full &= ~partial
    rows = {"generator": generator, "dtype": torch.float64}
    group = Group(
        key=torch.randn(2, heads, 6, 24, **rows), value=torch.randn(2, heads, 6, 24, **rows),
        count=torch.randint(0, 9, (2, 1, 6), generator=generator, dtype=torch.int32),
        seen=BlockList.from_mask(torch.rand(2, 4, 4, 3, generator=generator) < 0.5), bounds=torch.arange(7), width=2,
    )  # fmt: skip
    return TilePlan(
        tile, tile, slots, slots, BlockList.from_mask(full),
        partial=None if partial is None else BlockList.from_mask(partial),
        predicate=Predicate(dead=order < 0) if holes else None, order=order, kv_order=order,
        tokens_q=tokens if holes else None, tokens_k=tokens if holes else None, reps=(group,),
        first_order=torch.randn(2, heads, 24, 24, **rows), row_scale=torch.rand(2, 4, 4, **rows),
        row_add=torch.randn(2, 4, 4, 24, **rows),
    )  # fmt: skip


@pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens before heads", "heads before tokens"])
@pytest.mark.parametrize("source", [1, 1 << 26], ids=["heads in turn", "heads at once"])
@pytest.mark.parametrize(("per_head", "holes"), [(False, False), (False, True), (True, False)])
def test_rows_are_read_and_written_where_the_tokens_lie(per_head, holes, source, tokens_first, monkeypatch):
    monkeypatch.setattr(flash_rows, "SOURCE", source)
    plan = everything(per_head, holes, 5)
    q, k, v = tensors(plan.queries, plan.keys, kv_heads=2)
    q = q if tokens_first else q.contiguous()
    valid = torch.tensor([plan.keys, 40], dtype=torch.int32)
    call = {"scale": 0.3, "kv_valid": valid}
    out, _ = block_sparse_attention(q, k, v, plan, backend="flash", **call)
    expected, _ = block_sparse_attention(q, k, v, plan, backend="reference", **call)
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous() == tokens_first


def test_strips_are_kept_up_to_a_size_by_thread_and_outlive_inference_mode(monkeypatch):
    monkeypatch.setattr(flash_strips, "_kept", flash_strips._Kept())
    monkeypatch.setattr(flash_strips, "STRIPS", 2 * 1000)
    x = torch.zeros(3, 100)

    def addresses(rows):
        return [strip.data_ptr() for strip in flash_strips.gathered(x, x, torch.zeros(rows, dtype=torch.int64))]

    with torch.inference_mode():
        first = addresses(10)
    assert addresses(4) == first
    assert first[0] != first[1]
    addresses(11)
    assert sorted(strip.numel() for strip in flash_strips._kept.memory.values()) == [1000, 1000]
    with ThreadPoolExecutor(1) as pool:
        assert not set(pool.submit(addresses, 10).result()) & set(first)


def test_a_plan_that_is_kept_keeps_its_tables_for_every_kind_of_call(monkeypatch):
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(1, 4, 4, 4, generator=generator) < 0.5
    plan = TilePlan(16, 16, 60, 60, BlockList.from_mask(mask), kept=True)
    made, stock = [], flash_strips.Strips.of
    monkeypatch.setattr(flash_strips.Strips, "of", lambda *a: made.append(1) or stock(*a))
    q, k, v = tensors(60, 60)
    kinds = [
        (q, k, v), (q[:1], k[:1], v[:1]), (q, k[:, :2], v[:, :2]), (q.contiguous(), k, v), (q, k, v[..., :8]),
        (q[..., :8], k[..., :8], v[..., :8]),
    ]  # fmt: skip
    seen = mask.repeat_interleave(16, 2)[:, :, :60].repeat_interleave(16, 3)[..., :60]
    for again in (False, True):
        made.clear()
        for number, (query, key, value) in enumerate(kinds):
            with torch.inference_mode(number == 0):
                out, lse = block_sparse_attention(query, key, value, plan, scale=0.3, backend="flash", return_lse=True)
            expected, expected_lse = brute(query, key, value, seen, 0.3)
            torch.testing.assert_close((out, lse), (expected, expected_lse))
        assert bool(made) != again
    made.clear()
    monkeypatch.setattr(flash_rows, "KEPT", 0)
    plan = TilePlan(16, 16, 60, 60, BlockList.from_mask(mask), kept=True)
    for _ in range(2):
        made.clear()
        block_sparse_attention(q, k, v, plan, scale=0.3, backend="flash")
    assert made, "a large plan's tables are not kept"
