"""Operations counted from configurations against torch's own counter, and against published totals."""

import re
from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_families import CASES, tiny
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.diffusers.families import family_of
from dit_accel.errors import UnsupportedError
from dit_accel.eval.flops import attention_flops, count, skeleton, sparse_total
from dit_accel.layout import Layout
from dit_accel.pipelines.model import inspect_model
from tiny_models import FAMILIES, tiny_transformer

TEXT = {"wan": 7, "hunyuan-video": 9, "cogvideox": 8, "ltx": 9, "flux": 6, "qwen-image": 6}
# Rows of arXiv 2505.18875, table 1, Wan 2.1 14B at 720p: dense total, attention, density, total; PFLOPs.
SVG2 = [
    (658.46, 468.20, 0.2951, 427.43),
    (658.46, 468.20, 0.1287, 372.89),
    (526.76, 374.56, 0.3128, 346.59),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_operations_equal_those_torch_counts(name):
    """torch counts what runs; its counter leaves the fused CPU attention out, which is what is wanted here."""
    model, call, layout = tiny_transformer(name, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**call)
    found = count(model, family_of(model), layout, TEXT[name])
    assert found.linear == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_operations_equal_those_torch_counts(name):
    """Unfused attention is two batched matmuls, which the counter does see."""
    model, call, layout = tiny_transformer(name, batch=1)
    with FlopCounterMode(display=False) as fused, torch.no_grad():
        model(**call)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as unfused,
        torch.no_grad(),
    ):
        model(**call)
    found = count(model, family_of(model), layout, TEXT[name])
    seen = unfused.get_total_flops() - fused.get_total_flops()
    refiner = 4 * 9 * 9 * 20 if name == "hunyuan-video" else 0  # text attends to itself once, before the blocks
    assert found.attention + found.cross + refiner == seen


# Sound, decoder and low-rank branches whose rows the names do not tell: rough there, exact everywhere else.
ROUGH = {"z-image", "wan-animate", "framepack", "mochi", "ltx2", "cosmos-2", "cosmos-2-5", "motif-video",
         "motif-video-decoder", "helios", "kandinsky6"}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_every_known_architecture(name):
    """Rows that pass each linear layer of a block, against those that really pass."""
    case = tiny(name, batch=1)
    family, seen = family_of(case.model), {}

    def watch(module, inputs, output, where):
        seen[where] = seen.get(where, 0) + module.weight.numel() * output.numel() // output.shape[-1]

    for where, module in case.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if re.match(r"(\w*blocks|layers)\.\d+\.", where):
                module.register_forward_hook(partial(watch, where=where))
            else:
                seen[where] = 0
    with torch.no_grad():
        case.model(**case.call)
    for where, module in case.model.named_modules():  # what lies outside of blocks leaves the count
        if where not in seen and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            seen[where] = 0
        if seen.get(where) == 0:
            module.weight = torch.nn.Parameter(module.weight[:0])
    words = case.layout.text
    if not words:
        given = case.call[case.words]
        words = (given[0] if isinstance(given, tuple) else given).shape[1]
    found = count(case.model, family, case.layout, words)
    assert found.linear == pytest.approx(2 * sum(seen.values()), rel=0.25 if name in ROUGH else 0.01)
    assert found.layers == len(family.find_sites(case.model))


def test_wan_14b_at_720p_is_as_published():
    """468.20 PFLOPs of attention over 50 steps and two branches, within the published total."""
    with torch.device("meta"):
        model = WanTransformer3DModel()  # the defaults are those of the 14B model
    layout = Layout(grid=(21, 45, 80))
    found = count(model, family_of(model), layout, 512)
    assert (layout.tokens, found.layers, found.width, found.heads) == (75600, 40, 5120, 40)
    assert found.attention * 100 / 1e15 == pytest.approx(468.20, abs=0.01)
    assert found.total * 100 / 1e15 == pytest.approx(652.4, abs=0.3)
    assert found.attention * 80 / 1e15 == pytest.approx(374.56, abs=0.01)


@pytest.mark.parametrize(("dense", "attention", "density", "total"), SVG2)
def test_the_accounting_reproduces_published_rows(dense, attention, density, total):
    """Thirty percent of the steps dense."""
    assert sparse_total(dense, attention, density, 0.7) == pytest.approx(total, abs=0.02)


def test_one_call():
    assert attention_flops(100, 50, 64, density=0.25) == 4 * 100 * 50 * 64 / 4


def test_a_skeleton_has_no_weights():
    model = skeleton(inspect_model(None))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_an_unknown_transformer_is_refused(configs_only):
    folder = configs_only("m", "WanPipeline", {}, {"_class_name": "SanaTransformer2DModel"})
    with pytest.raises(UnsupportedError, match="no family row knows SanaTransformer2DModel"):
        skeleton(inspect_model(str(folder)))


def test_a_configuration_that_builds_nothing_is_refused(configs_only):
    folder = configs_only("m", "WanPipeline", {}, {"num_attention_heads": "many"})
    with pytest.raises(UnsupportedError, match="cannot be built from the configuration"):
        skeleton(inspect_model(str(folder)))
