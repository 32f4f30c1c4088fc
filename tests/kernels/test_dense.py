"""Dense kernels: only an installed one that proves itself is used."""

import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dit_accel.kernels import dense

CPU = torch.device("cpu")


def good(q, k, v, scale):
    return sdpa(q, k, v, scale=scale, enable_gqa=True)


def changes_keys(q, k, v, scale):
    k -= k.mean(2, keepdim=True)
    return good(q, k, v, scale)


def raises(q, k, v, scale):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


BROKEN = {
    "is off by": lambda q, k, v, scale: torch.zeros_like(q),
    "head dim 128": lambda q, k, v, scale: good(q, k, v, scale) if q.shape[-1] == 64 else good(q, k, -v, scale),
    "is off by ": lambda q, k, v, scale: good(q, k, v, q.shape[-1] ** -0.5),
    "is off by nan": lambda q, k, v, scale: good(q, k, v, scale) * torch.nan,
    "gave shape": lambda q, k, v, scale: good(q, k, v, scale).transpose(1, 2),
    "inputs changed": changes_keys,
    "raised RuntimeError: no kernel image is available$": raises,
}


def test_a_good_kernel_passes():
    assert dense.self_check(good, CPU, exact=True) is None
    quantised = lambda *a: good(*a) * 1.01  # noqa: E731
    assert dense.self_check(quantised, CPU, exact=False) is None
    assert "is off by" in dense.self_check(quantised, CPU, exact=True)


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_kernel_is_found(words):
    import re

    assert re.search(words, dense.self_check(BROKEN[words], CPU, exact=True))


@pytest.fixture
def gpu(monkeypatch):
    """A process that believes in a GPU and in installed packages, which run on CPU tensors."""

    def make(capability, **modules):
        dense.unusable.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: modules.get(name))
        for name, functions in modules.items():
            module = types.ModuleType(name)
            vars(module).update(functions)
            monkeypatch.setitem(sys.modules, name, module)
        check = dense.self_check
        monkeypatch.setattr(dense, "self_check", lambda run, device, exact: check(run, CPU, exact=exact))
        return lambda name: dense.unusable(name, torch.device("cuda"))

    yield make
    dense.unusable.cache_clear()


def flash(q, k, v, softmax_scale):
    return good(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale).transpose(1, 2)


def sage(q, k, v, tensor_layout, is_causal, sm_scale):
    assert (tensor_layout, is_causal) == ("HND", False)
    k -= k.mean(2, keepdim=True)
    return good(q, k, v, sm_scale)


def test_each_package_is_called_as_it_wants(gpu):
    usable = gpu(
        (9, 0),
        flash_attn_interface={"flash_attn_func": lambda *a, **k: (flash(*a, **k), None)},
        flash_attn={"flash_attn_func": flash},
        sageattention={"sageattn": sage},
    )
    assert [usable(name) for name in dense.DENSE] == [None] * 4


def test_what_is_not_used_says_why(gpu):
    usable = gpu((8, 6), flash_attn_interface={}, flash_attn={"flash_attn_func": lambda q, k, v, softmax_scale: q})
    assert usable("flash-attn-3") == "it needs compute capability 9.0; this is 8.6"
    assert usable("flash-attn").startswith("its self-check is off by")
    assert usable("sageattention") == "not installed"
    assert dense.unusable("flash-attn", CPU) == "it needs a CUDA device; this is cpu"


def test_the_choice_names_its_reasons():
    q = torch.zeros(1, 2, 8, 16)
    backend, why = dense.choose_dense(q, q)
    assert backend.name == "torch"
    assert why.startswith("flash-attn-3: dtype torch.float32; it takes float16 and bfloat16; flash-attn: ")
    half = q.half()
    assert "head dims 16 (q, k) and 8 (v)" in dense.refusal(dense.DENSE["flash-attn"], half, half[..., :8])
    assert dense.refusal(dense.DENSE["flash-attn"], half.requires_grad_(), half) == "a gradient is asked for"
