"""Partitions: the published arrangement where sizes divide the grid, boxes of the grid everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.layout import Layout
from dit_accel.methods.vmoba_chunks import PUBLISHED, SPATIAL, SPATIO_TEMPORAL, Chunking, rule

CPU = torch.device("cpu")


def chunking(grid, chunk, **layout):
    return Chunking.make(Layout(grid, **layout), chunk, CPU)


def published_order(grid, chunk):
    """As released: each axis split into (tiles, tile), tiles moved to the front; runs of frames stay in order."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    if not isinstance(chunk, tuple):
        return tokens.flatten()
    ct, ch, cw = chunk if len(chunk) == 3 else (grid[0], *chunk)
    split = tokens.view(grid[0] // ct, ct, grid[1] // ch, ch, grid[2] // cw, cw)
    return split.permute(0, 2, 4, 1, 3, 5).flatten()


@pytest.mark.parametrize(("grid", "chunk", "sizes"), [
    ((4, 6, 8), 1, [48] * 4), ((4, 6, 8), 2, [96] * 2), ((4, 6, 8), 0.5, [24] * 8),
    ((4, 6, 8), (3, 4), [48] * 4), ((4, 6, 8), (2, 3, 4), [24] * 8), ((5, 6, 8), 2, [96, 96, 48]),
])  # fmt: skip
def test_order_and_sizes_are_the_published_ones_and_can_be_undone(grid, chunk, sizes):
    made = chunking(grid, chunk)
    order = torch.arange(math.prod(grid)) if made.order is None else made.order
    assert torch.equal(order, published_order(grid, chunk))
    assert made.chunks.sizes.tolist() == sizes
    x = torch.randn(len(order))
    assert torch.equal(x[order][torch.argsort(order)], x)


@pytest.mark.parametrize(("grid", "counts"), [
    ((21, 30, 52), (7, 24, 72)), ((21, 45, 80), (7, 40, 36)), ((24, 36, 64), (8, 48, 72)), ((36, 30, 52), (12, 24, 36)),
])  # fmt: skip
def test_published_chunks_give_the_published_counts(grid, counts):
    assert rule(grid) == PUBLISHED[grid]
    assert tuple(chunking(grid, chunk).chunks.count for chunk in rule(grid)) == counts


@pytest.mark.parametrize("grid", [(33, 8, 10), (13, 30, 45), (1, 64, 64), (1, 1, 5000), (5, 17, 23), (31, 45, 80)])
def test_the_rule_gives_as_many_chunks_elsewhere(grid):
    temporal, spatial, both = (chunking(grid, chunk).chunks for chunk in rule(grid))
    assert 7 <= temporal.count <= 14
    assert SPATIAL[0] <= spatial.count <= SPATIAL[1]
    assert SPATIO_TEMPORAL[0] <= both.count <= SPATIO_TEMPORAL[1]
    for blocks in (temporal, spatial, both):
        assert blocks.sizes[:-1].float().mean() > blocks.sizes.max() * 0.7


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (3, 1, 2)])
def test_small_grids_are_cut_as_finely_as_they_go(grid):
    assert chunking(grid, rule(grid)[2]).chunks.count == math.prod(grid)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 10)),
    kind=st.sampled_from(["frames", "rectangle", "box"]),
    text=st.integers(0, 5),
    first=st.booleans(),
    size=st.integers(1, 20),
)
def test_every_token_lies_in_one_box_and_in_one_piece(grid, tile, kind, text, first, size):
    made = chunking(
        grid, {"frames": tile[0] / 2, "rectangle": tile[1:], "box": tile}[kind], text=text, text_first=first
    )
    start, n = made.layout.main.start, math.prod(grid)
    order = torch.arange(made.layout.tokens) if made.order is None else made.order
    assert torch.equal(order.sort().values, torch.arange(n + text))
    assert torch.equal(made.main, order[:n])
    assert torch.equal(made.main.sort().values, start + torch.arange(n))
    inside = made.main - start
    owner = made.owner()
    if kind != "frames":
        sides = tile if kind == "box" else (grid[0], *tile[1:])
        places = inside // (grid[1] * grid[2]), inside // grid[2] % grid[1], inside % grid[2]
        boxes = torch.stack([x // side for x, side in zip(places, sides, strict=True)], 1)
        assert len(boxes.unique(dim=0)) == made.chunks.count
        for chunk in range(made.chunks.count):
            assert len(boxes[owner == chunk].unique(dim=0)) == 1
    pieces = made.pieces(size)
    assert pieces.n == n
    assert pieces.sizes.min() >= 1
    assert pieces.sizes.max() <= size
    table = made.tokens(pieces)
    assert torch.equal(table[table >= 0], made.main)
    for piece, chunk in enumerate(made.owner(pieces).tolist()):
        assert (owner[pieces.bounds[piece] : pieces.bounds[piece + 1]] == chunk).all()
    assert pieces.count == sum(-(-s // size) for s in made.chunks.sizes.tolist())
