"""Derived processors: the installed code with one call redirected."""

import inspect

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_accel import UnsupportedError
from dit_accel.diffusers.derive import adopt, derive, stock_of

HANDLE = torch.tensor([-1, 0])


@pytest.mark.parametrize("cls", [WanAttnProcessor, HunyuanVideoAttnProcessor2_0, CogVideoXAttnProcessor2_0])
def test_signature_name_and_place_stay(cls):
    derived = derive(cls)
    assert derive(cls) is derived
    assert issubclass(derived, cls)
    assert inspect.signature(derived.__call__) == inspect.signature(cls.__call__)
    assert derived.__call__.__code__.co_firstlineno == cls.__call__.__code__.co_firstlineno
    assert derived.__call__.__code__.co_filename == cls.__call__.__code__.co_filename
    assert derived.__call__.__globals__ is cls.__call__.__globals__


def test_attributes_are_shared_both_ways():
    stock = WanAttnProcessor()
    derived = adopt(stock, HANDLE)
    derived._attention_backend = "x"
    assert stock._attention_backend == "x"
    stock.more = 1
    assert derived.more == 1
    assert stock_of(derived) is stock
    assert stock_of(stock) is stock


def test_linear_attention_has_nothing_to_redirect():
    with pytest.raises(UnsupportedError, match="no softmax"):
        derive(SanaLinearAttnProcessor2_0)


def test_a_class_without_source_is_refused():
    scope = {}
    exec("class Generated:\n    def __call__(self, attn, x):\n        return x", scope)
    with pytest.raises(UnsupportedError, match="source of"):
        derive(scope["Generated"])


class Base:
    def __call__(self, attn, x, *, twice=True):
        return x


class WithClosure(Base):
    def __call__(self, attn, x, *, twice=False):
        x = super().__call__(attn, x)
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return out * 2 if twice else out


def test_super_and_keyword_defaults_work():
    x = torch.randn(1, 1, 4, 8)
    stock = WithClosure()
    derived = adopt(stock, HANDLE)  # no engine has this number, so the call is stock
    assert torch.equal(derived(None, x), stock(None, x))
    assert torch.equal(derived(None, x, twice=True), stock(None, x) * 2)


class ModuleProcessor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def __call__(self, attn, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x) * self.scale


def test_processors_that_are_modules_keep_their_parameters():
    stock = ModuleProcessor()
    owner = torch.nn.Module()
    owner.processor = adopt(stock, HANDLE)
    assert owner.processor.scale is stock.scale
    assert [name for name, _ in owner.named_parameters()] == ["processor.scale"]
    x = torch.randn(1, 1, 4, 8)
    assert torch.equal(owner.processor(None, x), stock(None, x))
