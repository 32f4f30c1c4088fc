"""Quant: settings, presets, and every method of the registry with quantised products."""

import pickle

import pytest
import represented
import torch
from quantised import COMPUTE, LATE, error, make
from quantised import tensors as of_layout

import dit_accel
from dit_accel import Layout, Quant, QuantProcessor, RadialProcessor, UnsupportedError, UsageError, attend
from dit_accel.kernels.quant import capability
from dit_accel.methods import REGISTRY
from dit_accel.quant import PRESETS, parse_quant, quant_name, resolve_quant

LAYOUT = Layout((5, 6, 7), text=9)


def tensors(layout=LAYOUT, **settings):
    return of_layout(layout, **settings)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.filterwarnings("ignore:Clear is experimental")
def test_every_method_takes_every_format(name, compute, tmp_path):
    """The same plan quantised loses at most half again what dense attention loses on the same tensors."""
    method, layout = make(name, tmp_path, LAYOUT)
    q, k, v = tensors(layout)
    before = [x.clone() for x in (q, k, v)]
    plan = dit_accel.plan(q, k, v, method, layout=layout, step=LATE)
    out = attend(q, k, v, plan=plan, layout=layout, quant=COMPUTE[compute])
    assert out.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    lost = error(out, attend(q, k, v, plan=plan, layout=layout, backend="reference"))
    dense = error(attend(q, k, v, layout=layout, quant=COMPUTE[compute]), attend(q, k, v, layout=layout))
    assert 0 < lost <= 1.5 * dense


@pytest.mark.parametrize("name", [name for name in ("pisa", "pyramid") if name in REGISTRY])
def test_keys_with_a_large_common_bias(name, tmp_path):
    """Representatives are those of the smoothed keys, so all logits of a row share one offset."""
    method, layout = make(name, tmp_path, LAYOUT)
    lost = []
    for bias in (0.0, 40.0):
        q, k, v = tensors(layout, bias=bias)
        plan = dit_accel.plan(q, k, v, method, layout=layout, step=LATE)
        assert plan.reps
        expected = attend(*(x.double() for x in (q, k, v)), plan=plan, layout=layout, backend="reference")
        lost.append(error(attend(q, k, v, plan=plan, layout=layout, quant=COMPUTE["int8"]).double(), expected))
    assert lost[1] <= 1.5 * lost[0]


@pytest.mark.parametrize("smooth_v", [False, True])
@pytest.mark.parametrize("features", represented.CASES)
def test_representatives_are_not_quantised(features, smooth_v):
    """With FP8 weights and values alone, what is left of the error is theirs."""
    settings = represented.CASES[features]
    order = torch.randperm(sum(settings["sizes"]), generator=torch.Generator().manual_seed(1))
    q, k, v, plan, kind = represented.case(**settings, order=order)
    expected, _ = represented.brute(q, k, v, plan, kind, settings["sizes"])
    for quant, limit in ((Quant(qk=None, pv="fp8", smooth_v=smooth_v), 0.04), (Quant(qk=None, pv="fp16"), 1e-3)):
        out = attend(q, k, v, plan=plan, layout=plan.layout, quant=quant)
        assert error(out.double(), expected) < limit


def test_presets_are_the_published_recipes():
    sage1, sage2, four, fast = (PRESETS[name]() for name in ("sage1", "sage2", "sage2-int4", "sage2pp"))
    assert (sage1.qk, sage1.pv, sage1.granularity, sage1.accumulate) == ("int8", "fp16", "block", "fp16")
    assert (sage1.block_q, sage1.block_k, sage1.smooth_k, sage1.smooth_q) == (128, 64, True, False)
    assert (sage2.qk, sage2.pv, sage2.granularity, sage2.accumulate) == ("int8", "fp8", "thread", "fp32")
    assert (sage2.warp_q, sage2.smooth_q, sage2.smooth_v, sage2.p_scale) == (32, False, False, "static")
    assert (four.qk, four.smooth_q, four.smooth_k) == ("int4", True, True)
    assert (fast.qk, fast.accumulate) == ("int8", "fp16")
    assert Quant(pv="int8").p_scale == "row"


def test_a_quant_is_a_value():
    for make_one in PRESETS.values():
        quant = make_one()
        assert Quant.from_dict(quant.to_dict()) == quant == pickle.loads(pickle.dumps(quant))
        assert hash(quant) == hash(make_one())
        assert parse_quant(quant_name(quant)) == quant
    assert quant_name(Quant(granularity="warp")) == "quant"
    with pytest.raises(UsageError, match="no field bits"):
        Quant.from_dict({"bits": 8})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk": "int2"}, "qk='int2' is unknown; choose one of None, 'int8', 'int4'"),
        ({"pv": "bf16"}, "pv='bf16'"),
        ({"granularity": "tensor"}, "granularity='tensor'"),
        ({"smooth_k": 1}, "smooth_k=1"),
        ({"qk": None}, "quantise nothing"),
        ({"qk": None, "pv": "fp8", "smooth_q": True}, "queries that are not quantised"),
        ({"smooth_v": True}, "smooth_v is for 8-bit"),
        ({"pv": "fp16", "p_scale": "row"}, "p_scale is for 8-bit"),
        ({"accumulate": "fp16"}, "got pv=None"),
        ({"warp_q": 48}, "does not divide"),
        ({"block_q": 0}, "does not divide"),
        ({"block_k": 64.0}, "whole numbers"),
        ({"granularity": "thread", "block_k": 12}, "multiple of 8"),
    ],
)
def test_values_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        Quant(**settings)


def test_sage2_has_8_and_4_bits():
    with pytest.raises(UsageError, match="8 and 4 bits; got bits=6"):
        Quant.sage2(bits=6)


def test_names():
    q, k, v = tensors()
    by_name = attend(q, k, v, layout=LAYOUT, quant="sage2")
    assert torch.equal(by_name, attend(q, k, v, layout=LAYOUT, quant=Quant.sage2()))
    assert torch.equal(by_name, attend(q, k, v, layout=LAYOUT, quant="auto"))
    with pytest.raises(UsageError, match="unknown; did you mean 'sage1'"):
        attend(q, k, v, layout=LAYOUT, quant="sage-1")
    assert QuantProcessor("sage1") == QuantProcessor(Quant.sage1()) != QuantProcessor("sage2")
    assert RadialProcessor(quant="sage2").to_dict()["quant"]["pv"] == "fp8"
    assert QuantProcessor().to_dict()["quant"] == "auto"
    with pytest.raises(UsageError, match="needs a quant"):
        QuantProcessor(None)


@pytest.mark.parametrize(
    ("gpu", "preset"),
    [
        ((7, 5), None), ((8, 0), "sage1"), ((8, 6), "sage1"), ((8, 9), "sage2pp"), ((9, 0), "sage2"),
        ((10, 0), "sage2"), ((10, 3), "sage2"), ((12, 0), "sage2pp"), ((12, 1), "sage2pp"), (None, "sage2"),
    ],
)  # fmt: skip
def test_auto_is_what_the_gpu_can_do(monkeypatch, gpu, preset):
    assert capability.preset_for(gpu) == preset
    device = torch.device("cpu" if gpu is None else "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    if preset is None:
        with pytest.raises(UnsupportedError, match=r"Old GPU \(compute capability 7.5\)"):
            resolve_quant("auto", device)
    else:
        assert resolve_quant("auto", device) == PRESETS[preset]()
        assert capability.refusal(PRESETS[preset](), gpu) is None


def test_what_a_gpu_cannot_serve_says_why():
    assert "8.0 (A100) or newer" in capability.refusal(Quant.sage1(), (7, 5))
    assert "8.9 (RTX 4090) or newer. Use pv='fp16'" in capability.refusal(Quant.sage2(), (8, 6))
    assert capability.refusal(Quant.sage2(), (8, 9)) is None


def test_backends_that_cannot_quantise():
    q, k, v = tensors()
    with pytest.raises(UnsupportedError, match="'flex' cannot quantise"):
        attend(q, k, v, layout=LAYOUT, quant="sage2", backend="flex")


def test_lse_and_dead_keys():
    q, k, v = tensors(batch=2)
    valid = torch.tensor([LAYOUT.tokens - 5, LAYOUT.tokens], dtype=torch.int32)
    k[0, :, -5:] = torch.nan
    out, lse = attend(q, k, v, layout=LAYOUT, quant="sage2", kv_valid=valid, return_lse=True)
    _, exact = attend(q, k, v, layout=LAYOUT, kv_valid=valid, return_lse=True)
    assert out.isfinite().all()
    torch.testing.assert_close(lse, exact, atol=0.05, rtol=0)


def test_gradients_are_not_pretended():
    q, k, v = tensors()
    assert not attend(q.requires_grad_(), k, v, layout=LAYOUT, quant="sage2").requires_grad


def test_quantize_by_itself():
    x = torch.randn(1, 2, 70, 16)
    codes, scales = dit_accel.quantize(x, bits=8, granularity="thread", role="k", block=64)
    assert (codes.shape, scales.shape) == ((1, 2, 70, 16), (1, 2, 8))
    with pytest.raises(UsageError, match="choose 8 or 4"):
        dit_accel.quantize(x, bits=3, granularity="thread", role="k", block=64)
    with pytest.raises(UsageError, match="must be"):
        dit_accel.quantize(x[0], bits=8, granularity="thread", role="k", block=64)


def test_an_installed_package_that_proved_itself_serves_auto_alone(monkeypatch):
    from dit_accel.kernels import dense

    def unusable(name, device):
        return None if name in ("sageattention", "torch") else "not installed"

    calls = []
    fake = dense.Backend("sageattention", "sageattention", lambda *a: calls.append(a) or a[0], False, (8, 0), 128)
    monkeypatch.setattr(dense, "unusable", unusable)
    monkeypatch.setitem(dense.DENSE, "sageattention", fake)
    q, k, v = (x.half() for x in tensors())
    assert attend(q, k, v, layout=LAYOUT, quant="auto") is q
    assert calls[0][3] == q.shape[-1] ** -0.5
    for other in ({"quant": "sage2"}, {"quant": "auto", "return_lse": True}, {}):
        attend(q, k, v, layout=LAYOUT, **other)
    assert len(calls) == 1
