"""Whole blocks of tiny models: both sides ran, times by kind of block, ratios that follow from them."""

from dataclasses import replace

import pytest

from dit_accel.eval.blocks import MODELS, main, markdown, measure
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


@pytest.mark.parametrize("name", TINY)
def test_a_row(name):
    text, config, grid, tokens = TINY[name]
    model = replace(MODELS[name], config=config, grid=grid, text=text)
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


def test_it_needs_a_gpu(capsys):
    assert main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
