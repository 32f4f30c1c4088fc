"""Whole blocks of tiny models: both sides ran, times by kind of block, ratios that follow from them."""

from dataclasses import replace

import pytest
import torch

from dit_accel import Guard
from dit_accel.diffusers import watch
from dit_accel.eval import blocks
from dit_accel.eval.blocks import MODELS, build, main, markdown, measure
from tiny_models import WAN

TINY = {
    "wan-14b-480p": (3, {k: v for k, v in WAN.items() if k != "num_layers"}, (3, 10, 12), 3 * 5 * 6),
    "hunyuan-video-720p": (
        9,
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
            "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        (2, 5, 7),
        2 * 5 * 7 + 9,
    ),
}  # fmt: skip


def tiny(name):
    text, config, grid, _ = TINY[name]
    model = replace(MODELS[name], config=config, grid=grid, text=text)
    return replace(model, live=4) if model.live else model


@pytest.mark.parametrize("name", TINY)
def test_a_row(name):
    tokens, model = TINY[name][-1], tiny(name)
    method = "random-blocks" if name.startswith("wan") else "gna"
    row = measure(name, method, 0.5, blocks=2, repeats=2, device="cpu", backend="gather", model=model)
    assert row["tokens"] == tokens
    assert set(row["tiers"]) == {"gather"}
    parts = set(model.depth)
    assert set(row["times"]["dense"]) == set(row["times"]["accelerated"]) == parts
    assert all(row["times"]["dense"][part]["runs"] == 2 for part in parts)
    expected = sum(row["times"]["dense"][part]["median"] / 2 * depth for part, depth in model.depth.items())
    assert row["loop"]["dense"] == pytest.approx(expected * model.steps * model.branches)
    assert row["speedup"] == pytest.approx(row["loop"]["dense"] / row["loop"]["accelerated"])
    assert 0 < row["attention_share"] < 1
    # One block of all tokens changes nothing; a window does.
    assert (row["changed"] < 1e-4) == (row["density"] == 1)
    assert f"| {name} | {tokens} | {row['method']} |" in markdown({"rows": [row]})


@pytest.mark.parametrize("guard", [None, Guard(fault=True)])
def test_the_guards_rows_are_not_in_the_times(monkeypatch, guard):
    """With a guard that checks rows they would be in every forward: all are at the first step."""
    sampled = []
    plain = watch.sample

    def sample(*given, **how):
        sampled.append(1)
        return plain(*given, **how)

    monkeypatch.setattr(watch, "sample", sample)
    if guard is not None:
        monkeypatch.setattr(blocks, "Guard", lambda **how: guard)
    row = measure(
        "wan-14b-480p", "random-blocks", 0.5, blocks=2, repeats=3, device="cpu", backend="gather",
        model=tiny("wan-14b-480p"),
    )  # fmt: skip
    # The first layer in every of five forwards, the others in their first.
    assert len(sampled) == (0 if guard is None else 5 + 1)
    assert row["guard"]["fault"] == bool(guard)
    assert row["guard"]["nonfinite"]


def test_a_prompt_fills_a_part_of_hunyuans_text():
    model = MODELS["hunyuan-video-720p"]
    assert 0 < model.live < model.text
    _, call = build(tiny("hunyuan-video-720p"), 1, "cpu", torch.float32)
    assert call["encoder_attention_mask"].tolist() == [[True] * 4 + [False] * 5]


def test_it_needs_a_gpu(capsys):
    assert main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
