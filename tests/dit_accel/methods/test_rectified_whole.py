"""Layouts of which Rectified can leave nothing out."""

import pytest
import torch

from dit_accel import Layout, Rectified, attend


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        (Layout(grid=(1, 5, 6)), Rectified()),
        (Layout(grid=(1, 5, 6)), Rectified(neighbors=False, first_frame_blocks=False)),
        (Layout(grid=(2, 5, 6), text=9), Rectified()),
        (Layout(grid=(2, 7, 6), text=9), Rectified(block_size=64)),
    ],
)
def test_a_layout_of_which_nothing_can_be_left_out_is_dense_and_has_an_lse(layout, method):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, layout.tokens, 16, generator=generator) for _ in range(3))
    valid = torch.tensor([layout.tokens - 4, layout.tokens], dtype=torch.int32)
    found = attend(q, k, v, method, layout=layout, kv_valid=valid, return_lse=True)
    for mine, dense in zip(found, attend(q, k, v, layout=layout, kv_valid=valid, return_lse=True), strict=True):
        torch.testing.assert_close(mine, dense)
