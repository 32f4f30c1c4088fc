"""Wan's rotation from frequencies: equal to the model's tables, composable, without a last position."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.pipelines.streaming.rotation import Rotary, rotate

T, ROWS, COLUMNS = 3, 4, 5


def places(first=0):
    index = torch.arange(T * ROWS * COLUMNS)
    return index // (ROWS * COLUMNS) + first, index // COLUMNS % ROWS, index % COLUMNS


@pytest.mark.parametrize("head_dim", [12, 32, 128])
def test_equal_to_the_models_tables(head_dim):
    rope = WanRotaryPosEmbed(head_dim, (1, 1, 1), 64)
    cos, sin = rope(torch.zeros(1, 1, T, ROWS, COLUMNS))
    rotary = Rotary.of(rope)
    assert rotary.dims == (rope.t_dim, rope.h_dim, rope.w_dim)
    found = rotary.tables(*places(), dtype=torch.float32)
    assert torch.equal(found[0], cos[0, :, 0, ::2])
    assert torch.equal(found[1], sin[0, :, 0, 1::2])


def test_shifts_in_time_compose_and_touch_time_alone():
    rotary = Rotary((44, 42, 42))
    x = torch.randn(2, T * ROWS * COLUMNS, 3, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(T * ROWS * COLUMNS, dtype=torch.int64)

    def shifted(x, by):
        return rotate(x, rotary.tables(zero + by, zero, zero))

    at = rotate(x, rotary.tables(*places()))
    moved = shifted(at, 7)
    torch.testing.assert_close(moved, rotate(x, rotary.tables(*places(7))), atol=1e-13, rtol=0)
    assert torch.equal(moved[..., 44:], at[..., 44:])
    torch.testing.assert_close(shifted(moved, -7), at, atol=1e-13, rtol=0)


def test_realigned_keys_in_lower_precision():
    """Turned at their frame and moved on, or turned once: equal to float32's rounding, and to one step of bfloat16."""
    rotary = Rotary((44, 42, 42))
    zero = torch.zeros(T * ROWS * COLUMNS, dtype=torch.int64)
    x = torch.randn(1, T * ROWS * COLUMNS, 2, 128, generator=torch.Generator().manual_seed(2))
    single = {"dtype": torch.float32}
    moved = rotate(rotate(x, rotary.tables(*places(), **single)), rotary.tables(zero + 9, zero, zero, **single))
    once = rotate(x, rotary.tables(*places(9), **single))
    torch.testing.assert_close(moved, once, atol=2e-6, rtol=0)
    steps = (moved.bfloat16().view(torch.int16).int() - once.bfloat16().view(torch.int16).int()).abs()
    near_zero = once.abs() < 1e-3  # where 2e-6 is more than a step
    assert steps[~near_zero].max() <= 1


def test_only_differences_show():
    rotary = Rotary((44, 42, 42))
    q, k = torch.randn(2, 1, T * ROWS * COLUMNS, 2, 128, generator=torch.Generator().manual_seed(1)).double()
    logits = [
        torch.einsum("bqhd,bkhd->bhqk", *(rotate(x, rotary.tables(*places(first))) for x in (q, k)))
        for first in (0, 50_000, -3)
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-12, rtol=0)


def test_other_frequencies_are_refused():
    rope = WanRotaryPosEmbed(12, (1, 1, 1), 64, theta=500.0)
    with pytest.raises(UnsupportedError, match="does not turn with base 10000"):
        Rotary.of(rope)
    with pytest.raises(UsageError, match="even numbers"):
        Rotary((5, 4, 4))
