import pytest
import torch

from dit_accel.pipelines.mini.model import (
    ChosenFramesRope,
    Denoiser,
    build_transformer,
    choose_frames,
    denoising_loss,
    sample_sigma,
)
from dit_accel.pipelines.mini.text import build_text_encoder, build_tokenizer


def small(layers: int = 2) -> Denoiser:
    torch.manual_seed(0)
    transformer = build_transformer(width=64, head_dim=32, layers=layers, channels=4, text_dim=16)
    return Denoiser(build_text_encoder(build_tokenizer(), 16, layers=1, heads=2), transformer)


def test_chosen_frames_rope_is_the_stock_rope_at_those_frames():
    rope = ChosenFramesRope(32, (1, 1, 1), 64)
    full = rope(torch.zeros(1, 4, 9, 3, 2))[0].view(9, 6, 32)
    rope.frames = torch.tensor([[0, 4, 8], [1, 2, 5]])
    part = rope(torch.zeros(2, 4, 3, 3, 2))[0].view(2, 3, 6, 32)
    torch.testing.assert_close(part[0], full[[0, 4, 8]])
    torch.testing.assert_close(part[1], full[[1, 2, 5]])


def test_wrong_frame_table_is_refused():
    rope = ChosenFramesRope(32, (1, 1, 1), 64)
    rope.frames = torch.tensor([[0, 4]])
    with pytest.raises(ValueError, match="one position per sample"):
        rope(torch.zeros(1, 4, 3, 3, 2))


def test_training_attention_equals_the_stock_processor():
    model = small()
    ids = torch.randint(3, 50, (2, 7))
    inputs = (torch.randn(2, 4, 5, 3, 4), torch.tensor([0.3, 0.9]), ids, torch.ones_like(ids))
    mine = model(*inputs)
    with model.stock():
        stock = model(*inputs)
    torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5)
    assert "TrainingAttention" in type(next(iter(model.transformer.attn_processors.values()))).__name__


def test_all_frames_chosen_equals_no_choice():
    model = small()
    ids = torch.randint(3, 50, (1, 7))
    inputs = (torch.randn(1, 4, 5, 3, 4), torch.tensor([0.5]), ids, torch.ones_like(ids))
    torch.testing.assert_close(model(*inputs), model(*inputs, torch.arange(5)[None]))


def test_chosen_frames_hold_both_borders():
    frames = choose_frames(50, 33, 5, torch.Generator().manual_seed(0))
    assert frames.shape == (50, 5)
    assert (frames[:, 0] == 0).all()
    assert (frames[:, -1] == 32).all()
    assert (frames.diff(dim=1) > 0).all()
    assert choose_frames(2, 3, 9, torch.Generator()).tolist() == [[0, 1, 2]] * 2


def test_noise_levels_lean_towards_noise():
    sigma = sample_sigma(4000, torch.Generator().manual_seed(0), 3.0)
    assert 0 < sigma.min() < sigma.max() < 1
    assert sigma.median() == pytest.approx(0.75, abs=0.02)


def test_a_tiny_model_learns_what_its_text_says():
    model = small(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    sign = torch.tensor([1.0, -1.0] * 4)
    clean = sign[:, None, None, None, None].expand(8, 4, 3, 2, 2)
    ids = torch.where(sign > 0, 5, 6)[:, None].expand(8, 4)
    frames = torch.arange(3).expand(8, 3)
    losses = []
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        loss, _ = denoising_loss(model, clean, ids, torch.ones_like(ids), frames, generator, 9.0, total=3, probe=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    # Without the text the sign cannot be known from pure noise: the same noise must follow its caption.
    noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(noise, torch.ones(2), torch.tensor([[5] * 4, [6] * 4]), torch.ones(2, 4, dtype=torch.long))
    assert out[0].mean() > 0.5
    assert out[1].mean() < -0.5
