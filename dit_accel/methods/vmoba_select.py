"""VMoBA's selections (arXiv 2506.23858): which chunks each query takes, from query-chunk similarities.

A scope says which similarities compete: those of one query in one head, of one chunk, of one head, or all of a sample.
Nothing is sorted. The cut between chosen and left out is found by bisecting the bits of the values: 32 passes over
them, however many compete, and the memory of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import select

SCOPES = ("query_head", "block", "overall", "head_global")
# As released: similarities that span less than this are not stretched; weight added to every total.
EPSILON = 1e-6


def topk(gate: Tensor, own: Tensor, valid: Tensor | None, scope: str, k: int) -> Tensor:
    """bool (B, H, S, C): the ``k`` best chunks per query, own chunk first; on average where queries compete.

    gate: float32 (B, H, S, C) similarities of S queries and C chunks; own: bool (S, C), the chunk each query lies in;
    valid: bool (B, S, C), False for dead queries and chunks, which take no part, or None. ``scope`` is ``query_head``,
    ``head_global`` (k S best of a head) or ``overall`` (k H S best of a sample).
    """
    own = _live(own, valid)
    score = _hidden(gate, valid).masked_fill(own, torch.inf)
    if scope == "query_head":
        chosen = select.largest(score, k) & (score > -torch.inf)
    else:
        rows = _rows(score, scope)
        chosen = _back(largest(rows, k * (rows == torch.inf).sum(-1)), gate, scope)
    # Where similarities are no numbers the own chunk may not be among the largest; it is read, and the fault shows.
    return chosen | own


def threshold(gate: Tensor, own: Tensor, valid: Tensor | None, scope: str, tau: float) -> Tensor:
    """bool (B, H, S, C): own chunks, and the fewest others until ``tau`` of the scope's total weight is chosen.

    Weights are similarities stretched to 0..1 over the scope. At ``tau`` 1 and above everything is chosen.
    Arguments as in :func:`topk`; all scopes.
    """
    own = _live(own, valid)
    if tau >= 1:
        return torch.ones_like(gate, dtype=torch.bool) if valid is None else valid[:, None].expand(gate.shape)
    rows, mine = _rows(gate, scope), _rows(own.expand(gate.shape), scope)
    shut = None if valid is None else ~_rows(valid[:, None].expand(gate.shape), scope)
    low, high = ((rows if shut is None else rows.masked_fill(shut, end)) for end in (torch.inf, -torch.inf))
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    weight = (rows - low) / torch.where(high - low > EPSILON, high - low, 1)
    weight = weight if shut is None else weight.masked_fill_(shut, 0)
    total = weight.sum(-1, dtype=torch.float64) + EPSILON
    held = torch.where(mine, weight, 0).sum(-1, dtype=torch.float64)
    others = weight.masked_fill_(mine if shut is None else mine | shut, -torch.inf)
    return own | _back(largest(others, tau * total - held, weighted=True), gate, scope)


def largest(values: Tensor, amount: Tensor, *, weighted: bool = False) -> Tensor:
    """bool like ``values``: along the last axis the fewest largest that make up ``amount``.

    values: float32 (.., n), -inf is never taken; amount: (..), how many, or with ``weighted`` the sum to reach. None
    are taken for an amount of 0 or less, all where the amount is out of reach. Among equals the first ones are taken.
    """
    # Read as integers with the negative half mirrored, floats keep their order.
    bits = values.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def reached(taken: Tensor) -> Tensor:
        if weighted:
            return torch.where(taken, values, 0).sum(-1, dtype=torch.float64)
        return taken.sum(-1, dtype=torch.int32)

    low = torch.full(amount.shape, -(2**31), dtype=torch.long, device=values.device)
    high = torch.full_like(low, 2**31 - 1)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = reached(keys >= middle[..., None].int()) >= amount
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    cut = low[..., None].int()
    above, equal = keys > cut, keys == cut
    missing = amount - reached(above)
    each = torch.where(equal, values, 0).amax(-1).double() if weighted else 1
    before = equal.cumsum(-1, dtype=torch.int32) - 1
    tied = equal & (before * (each[..., None] if weighted else 1) < missing[..., None])
    return (above | tied) & (values > -torch.inf)


def _live(own: Tensor, valid: Tensor | None) -> Tensor:
    """bool (1 or B, 1, S, C): own chunks of live queries."""
    return own[None, None] if valid is None else (own & valid)[:, None]


def _hidden(gate: Tensor, valid: Tensor | None) -> Tensor:
    return gate if valid is None else gate.masked_fill(~valid[:, None], -torch.inf)


def _rows(x: Tensor, scope: str) -> Tensor:
    """x (B, H, S, C) with what competes along the last axis."""
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x if scope == "query_head" else x.flatten({"head_global": 2, "overall": 1}[scope])


def _back(rows: Tensor, like: Tensor, scope: str) -> Tensor:
    """The inverse of :func:`_rows`."""
    b, h, s, c = like.shape
    return rows.view(b, c, h, s).permute(0, 2, 3, 1) if scope == "block" else rows.view(b, h, s, c)
