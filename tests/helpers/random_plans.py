"""Random plans, ragged, ordered and with predicates, beside their visible pairs by definition."""

import torch
from hypothesis import strategies as st

from dit_accel.blocks import Blocks
from dit_accel.kernels import Band, BlockList, Box, Disc, Predicate
from dit_accel.layout import Layout
from dit_accel.plans import Plan


def random_blocks(draw, n):
    if draw(st.booleans()):
        return Blocks.uniform(n, draw(st.sampled_from([4, 8, 16])))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=6)))
    return Blocks(torch.tensor([0, *cuts, n]))


@st.composite
def plans(draw):
    """A plan with random ragged blocks, classes, predicate and order, and its visible pairs by definition."""
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 7)))
    layout = Layout(grid, text=draw(st.integers(0, 5)), text_first=draw(st.booleans()))
    n, heads = layout.tokens, draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    q_blocks, k_blocks = random_blocks(draw, n), random_blocks(draw, n)
    kinds = integers(3, 1, heads, q_blocks.count, k_blocks.count)
    lo, coord, other = integers(6, n), integers(8, n), integers(8, n)
    predicate = draw(st.sampled_from([
        Predicate(box=Box((lo, lo), (lo + 4, lo + 5), (coord, other))),
        Predicate(disc=Disc((lo, coord), (coord, other), integers(20, n)), always=integers(2, n).bool()),
        Predicate(band=Band(lo, coord, lo % 3, coord % 3, integers(5, 3, 3) - 1)),
    ]))  # fmt: skip
    order = draw(st.sampled_from([None, "shared", "heads"]))
    if order == "shared":
        order = torch.randperm(n, generator=generator)
    elif order == "heads":
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(heads)])
    made = Plan(
        layout, q_blocks, k_blocks, BlockList.from_mask(kinds == 1), BlockList.from_mask(kinds == 2), predicate, order
    )
    seen = torch.zeros((1, heads, n, n), dtype=torch.bool)
    q_owner, k_owner = q_blocks.owner(), k_blocks.owner()
    for h in range(heads):
        token = torch.arange(n) if order is None else order if order.ndim == 1 else order[h]
        for q in range(n):
            for k in range(n):
                kind = int(kinds[0, h, q_owner[q], k_owner[k]])
                passes = kind == 2 and bool(predicate.visible(torch.tensor(q), torch.tensor(k)))
                seen[0, h, token[q], token[k]] = kind == 1 or passes
    return made, seen
