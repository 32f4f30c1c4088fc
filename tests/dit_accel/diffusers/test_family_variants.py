"""Other ways to call the models: padding, masks and conditioning that move the tokens, or that we leave to stock."""

import pytest
import torch
from tiny_families import tiny

from dit_accel import AllBlocksProcessor, Layout, Schedule
from dit_accel.diffusers import engines, set_attn_processor

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


def run(case):
    """(engine, largest difference to stock, whether the outputs are the same to the bit)."""
    stock = case.out(case.model(**case.call))
    set_attn_processor(case.model, AllBlocksProcessor(**SPARSE))
    out = case.out(case.model(**case.call))
    return engines(case.model)[0], (out - stock).abs().max(), torch.equal(out, stock)


def live(*counts, keys):
    return torch.arange(keys) < torch.tensor(counts)[:, None]


def lumina2_ragged(case):
    case.call["encoder_attention_mask"] = live(4, 7, keys=9)


def cogview4_mask(case):
    case.call["attention_mask"] = live(4, 6, keys=6)


def chroma_numbers(case):
    case.call["attention_mask"] = case.call["attention_mask"].float()


def ltx2_pairs(case):
    case.call["video_self_attention_mask"] = torch.ones(2, 105, 105).tril()


def skyreels_causal(case):
    case.model.register_to_config(num_frame_per_block=3)
    case.call["hidden_states"] = torch.randn(2, 4, 6, 10, 12)


def allegro_padded_frames(case):
    case.call["attention_mask"][0, 2] = 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lumina2", lumina2_ragged),
        ("cogview4", cogview4_mask),
        ("chroma", chroma_numbers),
        ("ltx2", ltx2_pairs),
        ("skyreels-v2", skyreels_causal),
        ("allegro", allegro_padded_frames),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_masks_that_are_more_than_padded_text_run_stock_counted_and_told_once(name, change):
    case = tiny(name)
    change(case)
    engine, _, same = run(case)
    assert same
    layers = len(engine.stats.layers)
    assert (engine.stats.sparse, engine.stats.dense, engine.stats.fallback) == (0, {"mask": layers}, layers)
    assert len(engine.stats.warnings) == 1


def z_image_sizes(case):
    case.call["x"][1] = torch.randn(4, 1, 10, 12)


def ltx_coordinates(case):
    case.call["video_coords"] = torch.rand(2, 3, 105)
    case.call |= {"num_frames": None, "height": None, "width": None}


def hidream_sizes(case):
    hidden, masks, sizes, ids = case.model.patchify(case.call["hidden_states"])
    sizes[1] = torch.tensor([3, 5])
    case.call |= {"hidden_states": hidden, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}
    case.model.unpatchify = lambda x, *_: x


@pytest.mark.parametrize(
    ("name", "change"),
    [("z-image", z_image_sizes), ("ltx", ltx_coordinates), ("hidream", hidream_sizes)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_a_grid_that_the_arguments_do_not_tell_runs_stock_counted_and_told(name, change):
    case = tiny(name)
    change(case)
    if name == "z-image":
        case.out = lambda output: output.sample[1]
    engine, _, same = run(case)
    assert same
    layers = len(engine.stats.layers)
    assert (engine.stats.sparse, engine.stats.dense) == (0, {"layout": layers})
    assert "cannot tell the token grid" in engine.stats.warnings[0]


@torch.no_grad()
def test_mochi_texts_of_different_lengths_each_get_their_own_layout():
    case = tiny("mochi")
    case.call["encoder_attention_mask"] = live(6, 2, keys=8)
    engine, difference, _ = run(case)
    assert difference < 1e-5
    assert [layer.sparse for layer in engine.stats.layers] == [2, 2]
    assert engine.stats.layers[0].layout == Layout(grid=(3, 5, 6), text=2)
    assert engine.forward.layout == Layout(grid=(3, 5, 6), text=8)


@torch.no_grad()
def test_mochi_without_any_live_word():
    case = tiny("mochi")
    case.call["encoder_attention_mask"] = live(6, 0, keys=8)
    engine, difference, _ = run(case)
    assert difference < 1e-5
    assert engine.stats.layers[0].layout == Layout(grid=(3, 5, 6))


@torch.no_grad()
def test_hunyuan_video_15_from_an_image():
    case = tiny("hunyuan-video-15")
    case.call["image_embeds"] = torch.randn(2, 2, 8)
    engine, difference, _ = run(case)
    assert difference < 1e-5
    assert engine.stats.sparse == len(engine.stats.layers)


@torch.no_grad()
def test_hidream_tokens_that_the_pipeline_patched():
    case = tiny("hidream")
    hidden, masks, sizes, ids = case.model.patchify(case.call["hidden_states"])
    case.call |= {"hidden_states": hidden, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}
    engine, difference, _ = run(case)
    assert difference < 1e-5
    assert (engine.forward.layout, engine.stats.dense) == (case.layout, {})


@pytest.mark.parametrize(("name", "words"), [("helios", "latents_history"), ("framepack", "history_4x")])
@torch.no_grad()
def test_a_history_that_is_left_out_leaves_the_prefix(name, words):
    case = tiny(name)
    if name == "framepack":  # its forward names all three, so the history shrinks instead
        case.call["latents_history_4x"] = case.call["latents_history_4x"][:, :, :3]
        case.call["indices_latents_history_4x"] = torch.arange(3)
        prefix = 4 + 9 + 60
    else:
        case.call = {key: value for key, value in case.call.items() if words not in key}
        prefix = 0
    engine, difference, _ = run(case)
    assert difference < 1e-5
    assert engine.forward.layout == Layout(grid=(3, 5, 6), prefix=prefix, text=case.layout.text)
    assert engine.stats.dense == {}


@torch.no_grad()
def test_a_mask_made_anew_at_every_site_is_read_once(monkeypatch):
    from dit_accel.diffusers import engine as module

    reads, read = [], module.live_keys
    monkeypatch.setattr(module, "live_keys", lambda *args: reads.append(1) or read(*args))
    for name in ("hunyuan-video-15", "chroma", "qwen-image-padded", "pixart", "allegro", "z-image"):
        reads.clear()
        engine, _, _ = run(tiny(name))
        assert (len(reads), engine.stats.sparse) == (1, len(engine.stats.layers)), name
