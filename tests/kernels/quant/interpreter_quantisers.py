"""The Triton quantisers in the interpreter, bit for bit against those in torch. Run with TRITON_INTERPRET=1 set."""

import pytest
import torch

from dit_accel.kernels.quant import api, operands, pack_int4, quantize, triton_quantisers
from dit_accel.kernels.quant.api import quantized_attention
from dit_accel.kernels.quant.smooth import block_mean, mean
from dit_accel.kernels.quant.values import quantize_values
from dit_accel.quant import PRESETS, Quant

# block_q, warp_q, block_k and which tokens are dead: the tiles of sm80 and sm89, of sm90, and some of no power of two.
TILES = [((128, 32, 64), "heads"), ((64, 16, 128), None), ((48, 24, 40), "samples")]


def data(b=2, h=3, n=150, d=16, *, seed=0, dtype=torch.float32, bias=2.0):
    """(B, H, N, D), a transposed view as diffusers passes it, channels with means of their own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, h, d, generator=g) + bias * torch.randn(1, 1, h, d, generator=g)
    return x.to(dtype).transpose(1, 2)


def mask(kind, b=2, h=3, n=150):
    """Live tokens; some samples or heads have few."""
    if kind is None:
        return None
    if kind == "samples":
        return (torch.arange(n) < torch.tensor([n, 61])[:b, None])[:, None]
    return torch.rand(1, h, n, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.9, 0.5, 0.0])[:h, None]


def blank(x, live):
    return x if live is None else x.masked_fill(~live[..., None], 0)


def options(recipe, role):
    sizes = {"q": {"block": recipe.block_q, "warp": recipe.warp_q}, "k": {"block": recipe.block_k}}[role]
    return {"bits": {"int8": 8, "int4": 4}[recipe.qk], "granularity": recipe.granularity, "role": role, **sizes}


@pytest.mark.parametrize("granularity", ["block", "warp", "thread", "token"])
@pytest.mark.parametrize(("tile", "dead"), TILES)
def test_codes_and_scales_bit_for_bit(granularity, tile, dead):
    # Both widths with every granularity and tile; a launch in the interpreter takes a third of a second.
    qk = ("int8", "int4")[(tile[0] // 16 + len(granularity)) % 2]
    recipe = Quant(qk=qk, granularity=granularity, **dict(zip(("block_q", "warp_q", "block_k"), tile, strict=True)))
    live = mask(dead)
    for role, n in (("q", 150), ("k", 147)):
        x, alive = data(n=n, seed=n), None if live is None else live[..., :n]
        if alive is not None:
            x = x.masked_fill(~alive[..., None], torch.nan)
        kept = x.clone()
        found = triton_quantisers.tokens(x, recipe, role, alive)
        codes, scales = quantize(blank(x, alive), **options(recipe, role))
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scales, scales)
        index, _ = operands.groups(n, **{k: v for k, v in options(recipe, role).items() if k != "bits"})
        assert torch.equal(found.token_scales, scales[..., index])
        assert x.equal(kept) or dead


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 15), (torch.bfloat16, 72), (torch.float16, 64)])
def test_smoothed_keys_and_queries(dtype, d):
    """The means of live tokens, and codes of what is left: bit for bit, given the same mean."""
    recipe, live = Quant(qk="int4", granularity="thread"), mask("samples")
    x = data(d=d, dtype=dtype)
    found = triton_quantisers.moments(x, live, sums=True).mean
    torch.testing.assert_close(found, mean(x, live), atol=1e-5, rtol=1e-6)
    keys = triton_quantisers.tokens(x, recipe, "k", live, mean=found, keep=True)
    left = blank(x.float() - found, live)
    codes, scales = quantize(left, **options(recipe, "k"))
    assert torch.equal(keys.smooth, left)
    assert torch.equal(keys.codes, codes)
    assert torch.equal(keys.scales, scales)
    queries = triton_quantisers.tokens(x, recipe, "q", live, smooth=True, keep=True)
    torch.testing.assert_close(queries.block_mean, block_mean(x, 128, live), atol=1e-5, rtol=1e-6)
    left = blank(x.float() - queries.block_mean[:, :, torch.arange(150) // 128], live)
    codes, scales = quantize(left, **options(recipe, "q"))
    assert torch.equal(queries.codes, codes)
    assert torch.equal(queries.scales, scales)


def test_heads_of_their_own_bits():
    recipe, four = Quant(qk="int4", granularity="warp"), torch.tensor([True, False, True])
    x = data()
    found = triton_quantisers.tokens(x, recipe, "q", four=four)
    for head, bits in enumerate((4, 8, 4)):
        codes, scales = quantize(x, **options(recipe, "q") | {"bits": bits})
        assert torch.equal(found.codes[:, head], codes[:, head])
        assert torch.equal(found.scales[:, head], scales[:, head])


@pytest.mark.parametrize("d", [64, 72])
def test_packed_codes(d):
    recipe = Quant(qk="int4", granularity="thread")
    x = data(d=d)
    packed = triton_quantisers.tokens(x, recipe, "k", packed=True)
    assert packed.codes.shape == (2, 3, 150, d // 2)
    assert torch.equal(packed.codes, pack_int4(quantize(x, **options(recipe, "k"))[0]))
    with pytest.raises(ValueError, match="an even head dim; got int8"):
        triton_quantisers.tokens(x, Quant(qk="int8"), "k", packed=True)


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp16"])
@pytest.mark.parametrize(("smooth", "narrow", "dead"), [(False, True, None), (True, False, "heads")])
def test_values_bit_for_bit(kind, narrow, smooth, dead):
    live = mask(dead)
    v = data(d=72) * 1e3
    v[:, 1, :, 5] = 0
    found = triton_quantisers.moments(v, live, sums=smooth, extremes=smooth, peak=not smooth)
    left = blank(v if not smooth else v - found.mean, live)
    codes, scales = quantize_values(left, kind, narrow=narrow)
    own = triton_quantisers.value_scales(found.largest, kind, narrow=narrow)
    assert torch.equal(own, scales)
    out = triton_quantisers.values(v, own, kind, live, mean=found.mean)
    assert out.dtype == codes.dtype
    assert torch.equal(out.float(), codes.float())
    assert (kind == "fp16") or out.stride(2) == 1


def test_every_rounding_of_fp8_values():
    v = torch.cat([torch.linspace(-500, 500, 4001), torch.linspace(-(2**-5), 2**-5, 4001)]).view(1, 1, -1, 2)
    scales = torch.ones(1, 1, 1, 2)
    expected = v.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(triton_quantisers.values(v, scales, "fp8").float(), expected.float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_fault_makes_its_scale_one(bad):
    x = data(b=1, n=128)
    x[0, 1, 70, 3] = bad
    for granularity in ("thread", "token"):
        scales = triton_quantisers.tokens(x, Quant(qk="int8", granularity=granularity), "q").token_scales
        assert not scales[0, 1, 70].isfinite()
        assert scales[0, [0, 2]].isfinite().all()
    for smooth in (False, True):
        found = triton_quantisers.moments(x, None, sums=smooth, extremes=smooth, peak=not smooth).largest
        assert (~found.isfinite()).nonzero().tolist() == [[0, 1, 0, 3]]


def test_nothing_to_quantise():
    x = data(n=0)
    for asked in ({"sums": True, "extremes": True}, {"peak": True}):
        found = triton_quantisers.moments(x, None, **asked)
        assert found.mean is None or not found.mean.any()
    assert triton_quantisers.tokens(x, Quant.sage2(), "k").codes.shape == (2, 3, 0, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_the_triton_tier_runs_them_and_not_those_in_torch(make_case, monkeypatch, name):
    """Permuted order, dead keys and shared key heads: what the attention kernel is given."""
    case = make_case(b=2, n_q=37, tile=(32, 32), dim=32, alive=[61, 40], kv_order="heads", order="heads", kv_heads=1)
    seen = []
    ours = triton_quantisers.prepare

    def watched(q, k, v, recipe, **how):
        made = ours(q, k, v, recipe, **how)
        seen.append((made, operands.prepare(q, k, v, recipe, **how)))
        return made

    monkeypatch.setattr(triton_quantisers, "prepare", watched)
    monkeypatch.setattr(api, "prepare", None)
    quantized_attention(
        case.q, case.k, case.v, case.plan, PRESETS[name](), scale=case.scale, kv_valid=case.kv_valid, backend="triton"
    )
    ((made, expected),) = seen
    for field in ("q", "k", "v", "q_scale", "k_scale", "v_scale", "k_mean", "v_mean", "q_mean", "k_smooth"):
        own, other = getattr(made, field), getattr(expected, field)
        assert (own is None) == (other is None), field
        if own is not None:
            torch.testing.assert_close(own.float(), other.float(), atol=2e-6, rtol=2e-6, msg=field)


def test_poisoned_memory_and_strides():
    """Views with gaps of NaN on every side give what contiguous tensors give, and are left as they are."""
    room = torch.full((4, 160, 5, 40), torch.nan)
    x = room[1:3, 3:153, 1:4, 7:39].transpose(1, 2)
    x.copy_(data(d=32))
    kept, recipe = room.clone(), Quant(qk="int4", granularity="warp")
    for live in (None, mask("heads")):
        both = (x, x.contiguous())
        mine, plain = (triton_quantisers.moments(y, live, sums=True, extremes=True) for y in both)
        assert torch.equal(mine.mean, plain.mean)
        assert torch.equal(mine.largest, plain.largest)
        mine, plain = (triton_quantisers.tokens(y, recipe, "q", live) for y in both)
        assert torch.equal(mine.codes, plain.codes)
        scales = torch.ones(2, 3, 1, 32)
        mine, plain = (triton_quantisers.values(y, scales, "int8", live) for y in both)
        assert torch.equal(mine, plain)
    assert torch.equal(room.nan_to_num(9), kept.nan_to_num(9))


@pytest.mark.usefixtures("checked")
def test_offsets_past_two_to_the_31st():
    """The last tokens lie beyond 2^31 elements; what is never touched takes no memory."""
    n, stride = 130, 2**24 + 2**17
    assert (n - 1) * stride > 2**31
    x = torch.empty((n - 1) * stride + 16, dtype=torch.float16).as_strided((1, 1, n, 16), (0, 0, stride, 1))
    x.copy_(data(1, 1, n))
    near, recipe = x.contiguous(), Quant(qk="int8", granularity="token")
    far, plain = (triton_quantisers.tokens(y, recipe, "q") for y in (x, near))
    assert torch.equal(far.codes, plain.codes)
    far, plain = (triton_quantisers.moments(y, None, sums=True).mean for y in (x, near))
    assert torch.equal(far, plain)
    scales = torch.ones(1, 1, 1, 16)
    assert torch.equal(*(triton_quantisers.values(y, scales, "int8") for y in (x, near)))
