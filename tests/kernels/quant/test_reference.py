"""Quantised attention against an online softmax written tile by tile from the papers' equations, in float64."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dit_accel.kernels import BlockList, TilePlan
from dit_accel.kernels.quant import quantize
from dit_accel.kernels.quant.api import choose, quantized_attention
from dit_accel.quant import PRESETS, Quant

LOG2E = math.log2(math.e)
BITS = {"int8": 8, "int4": 4}
SMALL = {"block_q": 16, "warp_q": 8, "block_k": 16}

RECIPES = {
    **{name: make() for name, make in PRESETS.items()},
    "small-blocks": Quant(qk="int4", pv="int8", granularity="warp", **SMALL),
    "small-threads": Quant(qk="int8", pv="fp8", granularity="thread", smooth_v=True, p_scale="tile", **SMALL),
    "rows": Quant(qk="int8", pv="fp8", granularity="block", smooth_q=True, p_scale="row", accumulate="fp16", **SMALL),
    "int8-tile": Quant(qk="int4", smooth_q=False, smooth_k=False, pv="int8", p_scale="tile", smooth_v=True),
    "int8-static": Quant(qk="int8", pv="int8", p_scale="static"),
    "weights-only": Quant(qk=None, pv="fp8", smooth_v=True),
    "logits-only": Quant(qk="int8"),
}
FEATURES = {
    "plain": {},
    "batch": {"b": 2, "per_sample": True, "heads": 4, "kv_heads": 2},
    "predicate": {"predicate": "box2+always", "gate": "h"},
    "orders": {"order": "heads", "kv_order": "heads", "kv_heads": 1, "predicate": "disc"},
    "dead": {"b": 2, "alive": [61, 0], "kv_order": "shared", "predicate": "band", "empty": True},
    "long-tiles": {"tile": (16, 128), "n_k": 300},
}


def orders(order, heads, n):
    if order is None:
        return [list(range(n))] * heads
    return order.tolist() if order.ndim == 2 else [order.tolist()] * heads


def kinds_of(entry, b, h, tile):
    table = min(b, entry.count.shape[0] - 1), min(h, entry.count.shape[1] - 1), tile
    return entry.index[table][: entry.count[table]].tolist()


def scaled(x, recipe, role):
    """Codes and the scale of each token, float64, of x (N, D) float32; the quantiser has its own test."""
    block = {"q": (recipe.block_q, recipe.warp_q), "k": (recipe.block_k, None)}[role]
    codes, scales = quantize(
        x[None, None], bits=BITS[recipe.qk], granularity=recipe.granularity, role=role, block=block[0], warp=block[1]
    )
    return codes[0, 0].double(), scales[0, 0, [group_of(t, recipe, role) for t in range(len(x))]].double()


def group_of(n, recipe, role):
    block, warp = (recipe.block_q, recipe.warp_q) if role == "q" else (recipe.block_k, recipe.block_k)
    return {
        "token": n,
        "block": n // block,
        "warp": n // warp,
        "thread": 8 * (n // warp) + n % 8 if role == "q" else 4 * (n // warp) + n % 8 // 2,
    }[recipe.granularity]


def half_away(x):
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def e4m3(x):
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def values(v, recipe):
    largest = v.abs().amax(0)
    if recipe.pv == "fp8":
        scale = largest / (2.25 if recipe.accumulate == "fp16" else 448)
        return e4m3(torch.nan_to_num(v / scale)), scale.double()
    if recipe.pv == "int8":
        scale = largest / 127 + 1e-7
        return half_away(v / scale).double(), scale.double()
    return (v.half() if recipe.pv == "fp16" else v).double(), torch.ones(v.shape[1], dtype=torch.float64)


def weights(p, recipe):
    """Rounded weights of one tile p (R, K) in [0, 1], and the unit of their codes per row."""
    if recipe.pv == "fp16":
        return p.half().double(), torch.ones(len(p), 1, dtype=torch.float64)
    if recipe.pv is None:
        return p, torch.ones(len(p), 1, dtype=torch.float64)
    limit = {"fp8": 448, "int8": 127}[recipe.pv]
    unit = {"static": torch.ones(len(p)), "tile": p.max().expand(len(p)), "row": p.amax(1)}[recipe.p_scale]
    unit = (unit.double().clamp_min(1e-30) / limit)[:, None]
    return (e4m3 if recipe.pv == "fp8" else half_away)(p / unit), unit


def online(case, recipe):
    """out and LSE (B, H, Nq, ..) in float64, one key tile after the other with a running maximum."""
    (batch, heads, n_q, _), n_k, plan = case.q.shape, case.k.shape[2], case.plan
    out = torch.zeros(batch, heads, n_q, case.v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, n_q), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        live = n_k if case.kv_valid is None else int(case.kv_valid[b])
        for h in range(heads):
            kv = h // (heads // case.k.shape[1])
            q_at, k_at = orders(plan.order, heads, n_q)[h], orders(plan.kv_order, heads, n_k)[h]
            alive = torch.tensor([t < live for t in k_at])[:, None]
            q, k, v = case.q[b, h, q_at].float(), case.k[b, kv, k_at].float(), case.v[b, kv, k_at].float()
            k_mean, v_mean = (case.k[b, kv, :live].mean(0), case.v[b, kv, :live].mean(0)) if live else (k[0], v[0])
            k_mean = k_mean * (recipe.smooth_k and recipe.qk is not None)
            v_mean = v_mean * recipe.smooth_v
            ks, vs = (k - k_mean).masked_fill(~alive, 0), (v - v_mean).masked_fill(~alive, 0)
            q_mean = torch.zeros_like(q)
            if recipe.smooth_q:
                for start in range(0, n_q, recipe.block_q):
                    q_mean[start : start + recipe.block_q] = q[start : start + recipe.block_q].mean(0)
            if recipe.qk is None:
                logits = q.double() @ ks.double().T
            else:
                (qc, sq), (kc, sk) = scaled(q - q_mean, recipe, "q"), scaled(ks, recipe, "k")
                logits = (qc @ kc.T) * sq[:, None] * sk + q_mean.double() @ ks.double().T
            logits = (logits * case.scale * LOG2E).masked_fill(~case.mask[b, h][q_at][:, k_at], -torch.inf)
            vc, sv = values(vs, recipe)
            for tile in range(plan.tiles_q):
                rows = slice(tile * plan.tile_q, min((tile + 1) * plan.tile_q, n_q))
                top = torch.full((rows.stop - rows.start, 1), -1e30, dtype=torch.float64)
                total, acc = torch.zeros_like(top), torch.zeros(len(top), vc.shape[1], dtype=torch.float64)
                lists = [plan.full] if plan.partial is None else [plan.full, plan.partial]
                for entry in lists:
                    for j in kinds_of(entry, b, h, tile):
                        keys = slice(j * plan.tile_k, min((j + 1) * plan.tile_k, n_k))
                        s = logits[rows, keys]
                        new = torch.maximum(top, s.amax(1, keepdim=True))
                        p, fade = torch.exp2(s - new), torch.exp2(top - new)
                        codes, unit = weights(p, recipe)
                        step = codes @ vc[keys]
                        if recipe.accumulate == "fp16":
                            parts = [codes[:, i : i + 64] @ vc[keys][i : i + 64] for i in range(0, codes.shape[1], 64)]
                            step = sum(part.half().double() for part in parts)
                        acc, total, top = acc * fade + step * unit, total * fade + p.sum(1, keepdim=True), new
                seen = total[:, 0] > 0
                token = torch.tensor(q_at[rows])
                o = acc / total.masked_fill(total == 0, 1) * sv + v_mean.double()
                out[b, h, token] = o.masked_fill(~seen[:, None], 0)
                back = case.scale * (q[rows].double() @ k_mean.double())
                lse[b, h, token] = (torch.log(total[:, 0]) + top[:, 0] / LOG2E + back).masked_fill(~seen, -torch.inf)
    return out, lse


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_online_softmax(make_case, name, features):
    case = make_case(seed=len(name), n_q=37, **{"n_k": 70, **FEATURES[features]})
    recipe = RECIPES[name]
    before = [x.clone() for x in (case.q, case.k, case.v)]
    out, lse = quantized_attention(
        case.q, case.k, case.v, case.plan, recipe, scale=case.scale, kv_valid=case.kv_valid, return_lse=True
    )
    expected, expected_lse = online(case, recipe)
    # A float32 quotient next to a rounding boundary moves one weight by one step; sums in FP16 likewise.
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)
    error = (out.double() - expected).abs()
    step = {None: 0, "fp16": 2**-10, "fp8": 1 / 16, "int8": 1 / 127}[recipe.pv]
    assert error.max() <= 1e-5 + step * case.v.abs().max() / 4
    assert error.mean() <= 1e-5 + (2e-4 if recipe.pv else 0)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.q, case.k, case.v), strict=True))


def test_what_is_added_to_a_row_is_added_where_no_key_is_seen():
    q, k, v = torch.randn(3, 1, 2, 32, 8)
    lists = BlockList.from_mask(torch.tensor([[False, False], [False, True]])[None, None])
    scale, add = torch.full((1, 2, 2), 3.0), torch.randn(1, 2, 2, 8)
    plan = TilePlan(16, 16, 32, 32, lists, row_scale=scale, row_add=add)
    out, _ = quantized_attention(q, k, v, plan, Quant.sage2(), scale=0.3)
    torch.testing.assert_close(out[:, :, :16], add[:, :, :1].expand(1, 2, 16, 8))


def dense(n_q, n_k, tile=64):
    tiles = -(-n_q // tile), -(-n_k // tile)
    return TilePlan(tile, tile, n_q, n_k, BlockList.from_mask(torch.ones(1, 1, *tiles, dtype=torch.bool)))


def synthetic(dim, n=1024, heads=2, bias=3.0):
    """Keys biased by channel, queries by block of 128, as in video transformers."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(1, heads, n // 128, 1, dim, generator=g).expand(-1, -1, -1, 128, -1).reshape(1, heads, n, dim)
    q = 0.6 * torch.randn(1, heads, n, dim, generator=g) + blocks
    k = torch.randn(1, heads, n, dim, generator=g) + bias * torch.randn(1, heads, 1, dim, generator=g)
    v = torch.randn(1, heads, n, dim, generator=g) + torch.randn(1, heads, 1, dim, generator=g)
    return q, k, v


def relative(out, expected):
    return ((out.double() - expected.double()).abs().sum() / expected.double().abs().sum()).item()


# Relative L1 error for head dims 64 and 128, measured once with an emulation of the published kernels.
THRESHOLDS = {
    "int8 block": (Quant(granularity="block", smooth_k=False), 0.0029, 0.0056),
    "int8 block, smooth k": (Quant(granularity="block"), 0.0011, 0.0014),
    "int8 thread": (Quant(granularity="thread"), 0.0009, 0.0012),
    "int4 block, smooth k": (Quant(qk="int4", granularity="block", smooth_q=False), 0.0194, 0.0266),
    "int4 block, smooth q and k": (Quant(qk="int4", granularity="block"), 0.0107, 0.0121),
    "int4 warp": (Quant(qk="int4", granularity="warp"), 0.0102, 0.0116),
    "int4 thread": (Quant(qk="int4", granularity="thread"), 0.0088, 0.0100),
    "int4 token": (Quant(qk="int4", granularity="token"), 0.0071, 0.0083),
    "sage2": (Quant.sage2(), 0.0037, 0.0043),
    "sage2, smooth v": (Quant(pv="fp8", granularity="thread", smooth_v=True), 0.0018, 0.0022),
    "sage2pp": (Quant.sage2pp(), 0.0035, 0.0042),
    "int8 values, static": (Quant(pv="int8", p_scale="static", granularity="thread"), 0.0243, 0.0345),
    "sage2-int4": (Quant.sage2(bits=4), 0.0096, 0.0110),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_accuracy(name):
    recipe, *limits = THRESHOLDS[name]
    for dim, limit in zip((64, 128), limits, strict=True):
        q, k, v = synthetic(dim)
        out, _ = quantized_attention(q, k, v, dense(1024, 1024), recipe, scale=dim**-0.5)
        assert relative(out, sdpa(*(x.double() for x in (q, k, v)))) <= 1.5 * limit


def test_each_refinement_helps():
    q, k, v = synthetic(64)
    expected = sdpa(*(x.double() for x in (q, k, v)))

    def error(**settings):
        recipe = Quant(**settings)
        return relative(quantized_attention(q, k, v, dense(1024, 1024), recipe, scale=64**-0.5)[0], expected)

    assert error(granularity="block") < 0.7 * error(granularity="block", smooth_k=False)
    four = {"qk": "int4", "granularity": "block"}
    assert error(**four) < 0.7 * error(**four, smooth_q=False)
    assert error(qk="int4", granularity="thread") < error(**four)
    assert error(pv="fp8", smooth_v=True) < 0.9 * error(pv="fp8")
    assert error(pv="int8", p_scale="row") < 0.7 * error(pv="int8", p_scale="static")


@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_head_dims_and_dtypes(dim, dtype, name):
    q, k, v = (x[:, :, :200].to(dtype) for x in synthetic(dim, 256))
    before = [x.clone() for x in (q, k, v)]
    out, lse = quantized_attention(
        q, k[:, :1], v[:, :1], dense(200, 200), PRESETS[name](), scale=dim**-0.5, return_lse=True
    )
    expected = sdpa(q.double(), k[:, :1].double(), v[:, :1].double(), enable_gqa=True)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert relative(out, expected) < (0.03 if name == "sage2-int4" else 0.012)
    logits = q.double() @ k[:, :1].double().mT * dim**-0.5
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=0.2, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_the_logits_stay_within_half_a_step_of_each_operand():
    """The bound of symmetric rounding, with smoothing in place: c (sq/2 |k|_1 + sk/2 |q|_1 + D sq sk / 4)."""
    from dit_accel.kernels.quant.operands import prepare

    q, k, v = synthetic(64, 256)
    for recipe in (Quant(granularity="thread"), Quant(qk="int4", granularity="warp")):
        x = prepare(q, k, v, recipe, scale=1 / LOG2E)
        smooth = (k - x.k_mean).double()
        codes = x.q.double() * x.q_scale[..., None], x.k.double() * x.k_scale[..., None]
        logits, means = codes[0] @ codes[1].mT, 0
        if recipe.smooth_q:
            means = x.q_mean[:, :, torch.arange(256) // recipe.block_q].double()
            logits = logits + means @ smooth.mT
        exact = q.double() @ smooth.mT
        sq, sk = x.q_scale.double()[..., None], x.k_scale.double()[:, :, None]
        norms = (q.double() - means).abs().sum(-1, keepdim=True), smooth.abs().sum(-1)[:, :, None]
        bound = sq / 2 * norms[1] + sk / 2 * norms[0] + 64 * sq * sk / 4
        assert ((logits - exact).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["sage1", "sage2", "small-threads"])
def test_a_ragged_end_is_no_key(name):
    """Keys past the valid ones, whatever they hold, give what slicing them away gives."""
    recipe = RECIPES[name]
    q, k, v = (x[:, :, :192] for x in synthetic(64, 256))
    valid = torch.tensor([150], dtype=torch.int32)
    k, v = k.clone(), v.clone()
    k[:, :, 150:], v[:, :, 150:] = torch.nan, torch.inf
    out, lse = quantized_attention(q, k, v, dense(192, 192), recipe, scale=0.125, kv_valid=valid, return_lse=True)
    cut = quantized_attention(q, k[:, :, :150], v[:, :, :150], dense(192, 150), recipe, scale=0.125, return_lse=True)
    assert out.isfinite().all()
    assert relative(out, cut[0]) < 1e-3
    torch.testing.assert_close(lse, cut[1], atol=1e-4, rtol=1e-4)


def test_the_order_of_tokens_does_not_matter_with_a_scale_each():
    q, k, v = synthetic(64, 256)
    recipe = Quant(qk="int8", pv="fp8", granularity="token")
    keys = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    out, _ = quantized_attention(q, k, v, dense(256, 256, 256), recipe, scale=0.125)
    again, _ = quantized_attention(q, k[:, :, keys], v[:, :, keys], dense(256, 256, 256), recipe, scale=0.125)
    assert relative(out, again) < 1e-4


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_fault_is_never_hidden(name, where, bad):
    tensors = dict(zip("qkv", (x[:, :, :200].clone() for x in synthetic(64, 256)), strict=True))
    tensors[where][0, 0, 70, 3] = bad
    out, _ = quantized_attention(*tensors.values(), dense(200, 200), PRESETS[name](), scale=0.125)
    rows = out[0, 0, 64:128] if where == "q" else out[0, 0]
    assert not rows.isfinite().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_values_beyond_fp16_do_not_overflow(name):
    q, k, v = (x[:, :, :200] for x in synthetic(64, 256))
    for size in (1e5, 1e-5):
        out, _ = quantized_attention(q, k, v * size, dense(200, 200), PRESETS[name](), scale=0.125)
        assert out.isfinite().all()
        assert relative(out, sdpa(q.double(), k.double(), v.double() * size)) < 0.03


def test_a_long_sequence():
    """163,840 tokens, each tile of queries seeing its own tile of keys and the first one."""
    n, tile = 163_840, 256
    q, k, v = torch.randn(3, 1, 1, n, 16, generator=torch.Generator().manual_seed(0))
    own = torch.arange(n // tile, dtype=torch.int32)
    lists = BlockList((1 + (own > 0).int())[None, None], torch.stack([own, torch.zeros_like(own)], -1)[None, None])
    out, _ = quantized_attention(q, k, v, TilePlan(tile, tile, n, n, lists), Quant.sage2(), scale=0.25)
    seen = torch.cat([torch.arange(tile), torch.arange(n - tile, n)])
    expected = sdpa(q[:, :, -tile:], k[:, :, seen], v[:, :, seen], scale=0.25)
    assert relative(out[:, :, -tile:], expected) < 0.05
    assert out.isfinite().all()


def test_what_cannot_run_says_why(monkeypatch):
    q = torch.zeros(1, 1, 64, 64)
    assert choose(q, dense(64, 64), Quant.sage2()) == ("quant-reference", "quant-triton: q is on cpu")
    with pytest.raises(NotImplementedError, match="'flex' cannot quantise; choose auto"):
        choose(q, dense(64, 64), Quant.sage2(), backend="flex")
