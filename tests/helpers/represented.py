"""Random plans with representatives, and their meaning: one query at a time, in float64, from the definition."""

import math

import torch

from dit_accel import Layout
from dit_accel.blocks import Blocks
from dit_accel.kernels import BlockList, Group
from dit_accel.plans import Plan

B, H, HK, D = 2, 4, 2, 16


def case(sizes, *, widths=(1,), seed=0, first_order=False, factors=False, order=None):
    """A random plan over ragged blocks: each (query block, key block) is exact, seen pooled by one group, or hidden."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    blocks = Blocks(torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]))
    nb = len(sizes)
    q, k, v = (torch.randn(B, heads, n, D, generator=g) for heads in (H, HK, HK))
    kind = torch.randint(-1, len(widths) + 1, (B, H, nb, nb), generator=g)
    kind[..., 0] = 0
    groups = []
    for which, width in enumerate(widths, start=1):
        bounds = [0]
        for start, size in zip(blocks.bounds.tolist(), sizes, strict=False):
            bounds += [start + round(size * (i + 1) / width) for i in range(width)]
        bounds = torch.tensor(bounds)
        ordered = [x if order is None else x[:, :, order] for x in (k, v)]
        runs = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        key, value = (
            torch.stack([x[:, :, a:b].mean(2) if b > a else torch.zeros(B, HK, D) for a, b in runs], 2) for x in ordered
        )
        count = bounds.diff().int()[None, None]
        groups.append(Group(key, value, count, BlockList.from_mask(kind == which), bounds, width))
    more = {}
    if first_order:
        more["first_order"] = torch.randn(B, HK, D, D, generator=g)
    if factors:
        more["row_scale"] = torch.rand(B, H, nb, generator=g)
        more["row_add"] = torch.randn(B, H, nb, D, generator=g)
    plan = Plan(
        Layout(grid=(1, 1, n)), blocks, blocks, BlockList.from_mask(kind == 0), order=order, reps=tuple(groups), **more
    )
    return q, k, v, plan, kind


def brute(q, k, v, plan, kind, sizes):
    """One query at a time, from the definition."""
    q, k, v = (x.double() for x in (q, k, v))
    n, scale = q.shape[2], D**-0.5
    order = torch.arange(n) if plan.order is None else plan.order
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    out = torch.zeros_like(q)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            hk = h * HK // H
            for block in range(len(sizes)):
                for slot in range(starts[block], starts[block + 1]):
                    query = q[b, h, order[slot]]
                    top = bottom = mass = 0.0
                    for other in range(len(sizes)):
                        what = int(kind[b, h, block, other])
                        if what == 0:
                            tokens = order[starts[other] : starts[other + 1]]
                            e = torch.exp(scale * (k[b, hk, tokens] @ query))
                            top, bottom = top + e @ v[b, hk, tokens], bottom + float(e.sum())
                        elif what > 0:
                            group = plan.reps[what - 1]
                            for r in range(other * group.width, (other + 1) * group.width):
                                tokens = order[int(group.bounds[r]) : int(group.bounds[r + 1])]
                                if not len(tokens):
                                    continue
                                e = len(tokens) * math.exp(scale * float(query @ k[b, hk, tokens].mean(0)))
                                top, bottom, mass = top + e * v[b, hk, tokens].mean(0), bottom + e, mass + e
                    value = top / bottom
                    lse[b, h, order[slot]] = math.log(bottom)
                    if plan.first_order is not None:
                        value = value + scale * (mass / bottom) * (query @ plan.first_order[b, hk].double())
                    if plan.row_scale is not None:
                        value = plan.row_scale[b, h, block].double() * value + plan.row_add[b, h, block].double()
                    out[b, h, order[slot]] = value
    return out, lse


UNIFORM, RAGGED = [16, 16, 16, 7], [16, 9, 16, 3, 12]
CASES = {
    "one group": {"sizes": UNIFORM},
    "two groups of several": {"sizes": UNIFORM, "widths": (4, 2)},
    "ragged blocks": {"sizes": RAGGED, "widths": (1, 4)},
    "first order": {"sizes": RAGGED, "first_order": True},
    "row factors": {"sizes": RAGGED, "factors": True},
    "everything": {"sizes": RAGGED, "widths": (2, 1), "first_order": True, "factors": True},
    "wide": {"sizes": [40, 40, 25], "widths": (8,)},
}
