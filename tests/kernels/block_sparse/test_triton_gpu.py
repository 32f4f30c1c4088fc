"""The Triton tier on a real GPU, against float64, at ragged sizes and all head dims: ``pytest -m gpu``."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import GNA, Layout, Pisa, Radial, RandomBlocks, attend, plan
from dit_accel.kernels import BlockList, TilePlan, autotune, tuning
from dit_accel.kernels.block_sparse import triton as tier
from dit_accel.kernels.block_sparse import triton_order

pytestmark = pytest.mark.gpu

LAYOUTS = [Layout((5, 13, 17), text=77), Layout((9, 11, 24), text=31, text_first=True), Layout((33, 8, 10))]
METHODS = [RandomBlocks(seed=3), RandomBlocks(seed=4, block_size=128), GNA((3, 5, 7)), Pisa(density=0.3)]


def tensors(layout, dim, dtype, batch=2, heads=4, kv_heads=2):
    generator = torch.Generator("cuda").manual_seed(layout.tokens + dim)
    shapes = ((heads,), (kv_heads,), (kv_heads,))
    return [
        torch.randn(batch, layout.tokens, *h, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
        for h in shapes
    ]


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")


# Head dims stand in the ids as d64, so that -k cuts the suite into parts (``python -m dit_accel.eval.gpu --list``).
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 72, 96, 128, 256], ids="d{}".format)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_error_is_at_most_twice_plain_torch(layout, method, dim, dtype):
    q, k, v = tensors(layout, dim, dtype)
    made = plan(q, k, v, method, layout=layout)
    if made.reps:
        out = attend(q, k, v, plan=made, layout=layout, backend="triton")
        # The means are part of the plan, in q's dtype: the same ones on both sides.
        wide = replace(
            made, reps=tuple(replace(g, key=g.key.double(), value=g.value.double()) for g in made.reps),
            first_order=made.first_order.double(), _memo={},
        )  # fmt: skip
        exact = attend(*(x.double() for x in (q, k, v)), plan=wide, layout=layout, backend="reference")
        assert (out.double() - exact).norm() / exact.norm() < {2: 1e-2, 4: 1e-5}[q.element_size()]
        return
    out, lse = attend(q, k, v, plan=made, layout=layout, backend="triton", return_lse=True)
    exact, exact_lse = attend(
        *(x.double() for x in (q, k, v)), plan=made, layout=layout, backend="reference", return_lse=True
    )
    # Plain torch over the same pairs, in the same precision.
    mask = made.token_mask()
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (out, plain))
    assert torch.isfinite(out).all()
    assert error <= 2 * allowed + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-3)


def test_dead_keys_are_never_seen():
    layout = LAYOUTS[0]
    q, k, v = tensors(layout, 64, torch.bfloat16)
    valid = torch.tensor([layout.tokens - 40, layout.tokens], dtype=torch.int32, device="cuda")
    method = RandomBlocks(seed=1)
    clean = attend(q, k, v, method, layout=layout, kv_valid=valid, backend="triton")
    k, v = k.clone(), v.clone()
    k[0, :, -40:] = v[0, :, -40:] = torch.nan
    assert torch.equal(clean, attend(q, k, v, method, layout=layout, kv_valid=valid, backend="triton"))


def test_long_sequences_use_wide_addresses():
    """131,072 + 77 tokens, 24 heads of 128: nearly 2^29 elements per tensor; compared on the last rows."""
    layout = Layout((37, 46, 77), text=95)
    q, k, v = tensors(layout, 128, torch.bfloat16, batch=1, heads=24, kv_heads=24)
    method = Radial()
    out = attend(q, k, v, method, layout=layout, backend="triton")
    made = plan(q, k, v, method, layout=layout)
    rows = slice(layout.tokens - 64, layout.tokens)
    seen = made.block_mask[0, 0, -1].repeat_interleave(128)[: layout.tokens]
    scores = q[:, :, rows].float() @ k.float().mT * 128**-0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()
    assert (out[:, :, rows].float() - expected).norm() / expected.norm() < 1e-2


N, TILE, HEADS = 1000, 128, 4


def tiles(share=0.5, order=None, kept=True, n=N, tile=TILE):
    """A plan of random whole tiles, rows of every length, the first tile always."""
    generator = torch.Generator().manual_seed(5)
    count = -(-n // tile)
    mask = torch.rand(1, HEADS, count, count, generator=generator) < torch.linspace(0, 2 * share, count)[:, None]
    mask[..., 0] = True
    made = TilePlan(tile, tile, n, n, BlockList.from_mask(mask), order=order, kv_order=order, kept=kept)
    return made.to(torch.device("cuda"))


def truth(q, k, v, made):
    """float64 output and that of plain torch, over the plan's pairs."""
    mask = made.token_mask()
    if made.order is not None:
        inverse = made.order.argsort()
        mask = mask[..., inverse, :][..., inverse]
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return exact, (plain.double() - exact).norm() / exact.norm()


def inputs(dim, n=N, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(dim)
    return [
        torch.randn(1, n, HEADS, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3)
    ]


ENTRIES = {
    "table": {}, "rows one by one": {"described": 0}, "persistent": {"persistent": 1}, "two stages": {"stages": 2},
    "four warps": {"warps": 4, "described": 64, "full": 64},
}  # fmt: skip


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("copied", [False, True], ids=["found", "copied"])
@pytest.mark.parametrize("dim", [64, 72, 96, 128], ids="d{}".format)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_way_to_launch_gives_the_same(name, dim, permuted, copied, monkeypatch):
    monkeypatch.setattr(triton_order, "COPY_FROM", 0 if copied else 1 << 60)
    q, k, v = inputs(dim)
    made = tiles(order=torch.randperm(N, generator=torch.Generator().manual_seed(1)) if permuted else None)
    entry = replace(tuning.tuning(torch.cuda.get_device_capability(), dim, 2, TILE, TILE), **ENTRIES[name])
    if torch.cuda.get_device_capability()[0] < 9:
        entry = replace(entry, described=0)
    out, _ = tier.attention(q, k, v, made, scale=dim**-0.5, entry=entry)
    exact, allowed = truth(q, k, v, made)
    assert (out.double() - exact).norm() / exact.norm() <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dim", [64, 128], ids="d{}".format)
def test_guard_bands_stay_untouched(dim, monkeypatch):
    """Outputs start as NaN between bands of NaN: all of them is written and nothing beside them."""
    made = []
    plain = torch.Tensor.new_empty

    def new_empty(self, shape, *, dtype=None, **other):
        size = torch.Size(shape)
        flat = torch.full((size.numel() + 8192,), torch.nan, dtype=dtype or self.dtype, device=self.device)
        made.append(flat)
        return flat[4096:-4096].view(size)

    q, k, v = inputs(dim)
    plan_ = tiles()
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    tier.attention(q, k, v, plan_, scale=dim**-0.5, return_lse=True)
    monkeypatch.setattr(torch.Tensor, "new_empty", plain)
    assert len(made) == 2
    for flat in made:
        assert flat[:4096].isnan().all()
        assert flat[-4096:].isnan().all()
        assert not flat[4096:-4096].isnan().any()


def test_131149_tokens_of_whole_tiles():
    """The copy engine at 131,072 + 77 tokens: the last rows against float64, one head at a time."""
    n, dim = 131072 + 77, 128
    q, k, v = inputs(dim, n)
    made = tiles(0.1, n=n)
    out, _ = tier.attention(q, k, v, made, scale=dim**-0.5)
    rows = slice(n - 77, n)
    for h in range(HEADS):
        seen = made.full.mask(made.tiles_k)[0, h, -1].repeat_interleave(TILE)[:n]
        scores = q[0, h, rows].double() @ k[0, h].double().mT * dim**-0.5
        exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, h].double()
        assert (out[0, h, rows].double() - exact).norm() / exact.norm() < 1e-2


def test_a_dynamic_plan_is_captured_and_replayed():
    """Planning and attention in one CUDA graph: nothing waits for the host."""
    layout = Layout((4, 16, 16))
    method = Pisa(density=0.25, tile=None)
    q, k, v = tensors(layout, 64, torch.bfloat16, batch=1, kv_heads=4)
    run = lambda: attend(q, k, v, method, layout=layout, backend="triton")  # noqa: E731
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, run(), atol=0, rtol=0)


def test_tuning_is_found_kept_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "tuning.json"))
    autotune._entries.cache_clear()
    q, k, v = inputs(128)
    made = tiles()
    best = autotune.warm(made, q, k, v)
    assert tier.tuned(made, q, 128) == best
    out, _ = tier.attention(q, k, v, made, scale=128**-0.5)
    exact, allowed = truth(q, k, v, made)
    assert (out.double() - exact).norm() / exact.norm() <= 2 * allowed + 1e-6
    autotune._entries.cache_clear()
