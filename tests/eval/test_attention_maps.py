import pytest
import torch

from dit_accel.eval.attention_maps import Distances
from dit_accel.layout import Layout
from dit_accel.methods import Call


def test_mass_is_where_the_attention_looks():
    grid = (5, 3, 4)
    layout = Layout(grid, text=2, text_first=True)
    frame = torch.arange(5).repeat_interleave(12)
    code = torch.nn.functional.one_hot(frame, 5).float() * 40
    k = torch.zeros(1, 1, layout.tokens, 5)
    k[0, 0, layout.main] = code
    found = Distances(2, grid, rows=30)
    found.listen(k, k, k, Call(layout, layer=1, scale=1.0))
    found.listen(torch.zeros_like(k), k, k, Call(layout, layer=0, scale=1.0))
    data = found.to_dict()
    assert data["by_frame"][1][0] == pytest.approx(1.0)
    assert sum(data["by_space"][1]) == pytest.approx(1.0)
    assert sum(data["uniform_by_frame"]) == pytest.approx(1.0)
    # Without structure the measured curve has the shape of the uniform one, up to the rows that were drawn.
    assert data["by_frame"][0][0] == pytest.approx(0.2)
