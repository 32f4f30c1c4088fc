"""Every number of a published configuration, copied by hand from its source: the presets say nothing else.

The numbers are literal on purpose. A test that read them from the library would pass whatever the library says.
"""

import pytest

from dit_accel.methods import (
    AdaSpa,
    Pisa,
    Pyramid,
    Rectified,
    VMoBA,
    adaspa,
    pisa,
    pyramid_presets,
    rectified_presets,
    vmoba,
)
from dit_accel.processors import AdaSpaProcessor, PisaProcessor, PyramidProcessor, RectifiedProcessor, VMoBAProcessor
from dit_accel.step import Step


def has(method, expected):
    assert {name: getattr(method, name) for name in expected} == expected


def dense_layers(schedule, step, total, layers):
    return [layer for layer in range(layers) if schedule.is_dense(Step(index=step, total=total), layer)]


# arXiv 2506.23858 (Wan 2.1 1.3B). Table 4: chunks, and for the rows without training k. Threshold 0.25 over a head for
# the trained rows; "local + top-k" per query without training (appendix A). The first 25 % of the steps are dense.
# FastVideo, its VMoBA configurations: chunks, k, threshold; first_full_step 12 of 50, first_full_layer 0.
VMOBA = {
    "wan-480p": ((3, (5, 13), (7, 5, 13)), "topk", "query_head", (2, 6, 18), None),
    "wan-720p": ((3, (9, 10), (7, 15, 20)), "topk", "query_head", (2, 10, 9), None),
    "wan-576p-trained": ((3, (6, 8), (8, 12, 8)), "threshold", "head_global", None, 0.25),
    "wan-480p-long-trained": ((3, (5, 13), (12, 10, 13)), "threshold", "head_global", None, 0.25),
    "fastvideo-480p": ((2, (3, 4), (4, 6, 4)), "threshold", "query_head", (3, 20, 15), 0.25),
    "fastvideo-448p": ((2, (4, 13), (4, 4, 13)), "topk", "query_head", (2, 6, 18), None),
}


@pytest.mark.parametrize("name", VMOBA)
def test_vmoba(name):
    chunks, select, scope, k, tau = VMOBA[name]
    expected = {"chunks": chunks, "select": select, "scope": scope, "granularity": "token"}
    has(VMoBA.preset(name), expected | ({"k": k} if k else {}) | ({"tau": tau} if tau else {}))


@pytest.mark.parametrize("name", VMOBA)
def test_vmoba_dense_steps(name):
    """FastVideo states a count, 12 of 50, which no share of a quarter gives; the paper a quarter, which is 10 of 40."""
    processor = VMoBAProcessor.preset(name)
    if name.startswith("fastvideo"):
        assert processor.dense_steps(50) == list(range(12))
        assert len(processor.dense_steps(30)) == 12
    else:
        assert processor.dense_steps(40) == list(range(10))
    assert dense_layers(processor.schedule, 49, 50, 30) == []


# arXiv 2602.01077. FLUX.1-dev: the release's README and processor: density 0.15, bias, 8 x 8 patches, start_layer_idx
# 4, no dense steps. Wan 2.1 14B and HunyuanVideo: the paper's comparison at 87.5 % sparsity. Blocks of 64 and the
# hybrid order everywhere. Sol-Engine: density 0.10 (nvlabs.github.io/Sana/Sol-Engine, page on PISA).
PISA = {"flux": 0.15, "wan": 0.125, "wan-sol-engine": 0.1, "hunyuan-video": 0.125}
WITH_BIAS = {"flux", "wan", "hunyuan-video"}


@pytest.mark.parametrize("name", PISA)
def test_pisa(name):
    expected = {"density": PISA[name], "block_size": 64, "order": "hybrid", "norm_bias": name in WITH_BIAS}
    has(Pisa.preset(name), expected | {"tile": (8, 8) if name == "flux" else "auto"})


def test_pisa_dense_layers():
    processor = PisaProcessor.preset("flux")
    assert processor.dense_steps(50) == []
    for step in (0, 49):
        assert dense_layers(processor.schedule, step, 50, 57) == [0, 1, 2, 3]


# github.com/BienLuky/Rectified-SpaAttn, the script of each model: drop rate, steps of the run, leading dense steps,
# dense layers, whether the first frame's blocks keep each other (Wan). CogVideoX: README. p_remain_rates 0.3 and
# blocks of 128 everywhere. The density is 1 - drop.
RECTIFIED = {
    "hunyuan-video": (0.8, 50, 0, [], False),
    "wan2.1-t2v": (0.75, 50, 5, [0, 1], True),
    "wan2.1-i2v": (0.75, 50, 0, [0, 1], True),
    "wan2.2-t2v": (0.85, 40, 3, [0, 1], True),
    "wan2.2-i2v": (0.85, 40, 0, [0, 1], True),
    "wan2.2-ti2v": (0.75, 50, 5, [0, 1], True),
    "cogvideox1.5-t2v": (0.85, 50, 5, [], False),
    "cogvideox1.5-i2v": (0.75, 50, 5, [], False),
    "flux-4k": (0.9, 50, 0, list(range(37, 57)), False),
}


@pytest.mark.parametrize("name", RECTIFIED)
def test_rectified(name):
    drop, steps, first, layers, anchor = RECTIFIED[name]
    method, schedule = Rectified.preset(name), RectifiedProcessor.preset(name).schedule
    has(method, {"top_p": 0.3, "block_size": 128, "curve": "gilbert", "first_frame_blocks": anchor})
    assert method.density == pytest.approx(1 - drop, abs=1e-12)
    assert rectified_presets.PRESETS[name].steps == steps
    assert schedule.dense_steps(steps) == list(range(first))
    assert dense_layers(schedule, steps - 1, steps, 60) == layers


# arXiv 2512.04025, the release's configurations: block_k, upper bounds of levels 1, 2, 4 and 8, mode, reorder, dense
# steps of the run's steps. Query blocks of 128 and tiles of 32 everywhere. Runs of unpublished length count as 50.
PYRAMID = {
    "wan2.1-14b": (128, (0.4, 0.5, 0.6, 0.8), "threshold", "gilbert", 15, 50),
    "wan2.1-1.3b": (128, (0.5, 0.6, 0.7, 0.8), "threshold", "gilbert", 15, 50),
    "wan2.1-1.3b-topk": (32, (0.05, 0.1, 0.15, 0.25), "topk", "gilbert", 15, 50),
    "wan2.2-a14b": (32, (0.5, 0.6, 0.6, 0.8), "threshold", "gilbert", 12, 40),
    "wan2.2-5b": (32, (0.6, 0.7, 0.7, 0.8), "threshold", "gilbert", 15, 50),
    "cogvideox1.5-5b": (32, (0.1, 0.15, 0.15, 0.35), "topk", "gilbert", 15, 50),
    "cogvideox-5b": (128, (0.1, 0.15, 0.15, 0.35), "topk", None, 15, 50),
    "cogvideox-5b-tdm": (128, (0.05, 0.15, 0.25, 0.5), "topk", None, 0, 4),
    "plug-and-play": (64, (0.1, 0.15, 0.15, 0.35), "topk", None, 0, 50),
}


@pytest.mark.parametrize("name", PYRAMID)
def test_pyramid(name):
    block_k, bounds, mode, curve, dense, steps = PYRAMID[name]
    similarity = (0.7, 0.65, 0.6) if name == "wan2.1-1.3b" else None
    has(Pyramid.preset(name), {
        "levels": (1, 2, 4, 8), "bounds": bounds, "mode": mode, "block_q": 128, "block_k": block_k, "tile": 32,
        "similarity": similarity, "min_level1": 0.06, "curve": curve,
    })  # fmt: skip
    assert PyramidProcessor.preset(name).dense_steps(steps) == list(range(dense))


# arXiv 2502.21079: blocks of 64, sparsity 0.8, searches at steps 10 and 30 of 50 (counted from 1), the first 10 dense;
# the study of longer videos: sparsity 0.9, searches at 0 and 30.
ADASPA = {
    "hunyuan-video": (0.2, (9, 29), 10),
    "cogvideox": (0.2, (9, 29), 10),
    "scaling": (0.1, (0, 29), 1),
}


@pytest.mark.parametrize("name", ADASPA)
def test_adaspa(name):
    density, searches, dense = ADASPA[name]
    has(AdaSpa.preset(name), {"density": density, "block_size": 64, "head_adaptive": True})
    assert AdaSpa.preset(name).searches(50) == searches
    assert AdaSpaProcessor.preset(name).dense_steps(50) == list(range(dense))


@pytest.mark.parametrize(("pinned", "presets"), [
    (VMOBA, vmoba.PRESETS), (PISA, pisa.PRESETS), (RECTIFIED, rectified_presets.PRESETS),
    (PYRAMID, pyramid_presets.PRESETS), (ADASPA, adaspa.PRESETS),
])  # fmt: skip
def test_none_is_left_out(pinned, presets):
    assert list(pinned) == list(presets)
