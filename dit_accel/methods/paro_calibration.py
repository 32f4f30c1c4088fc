"""PARO's offline choices (arXiv 2506.16054, section 3.3): an axis order per head, a block map per timestep bin.

The paper leaves the threshold rule open, and its printed order metric disagrees with itself (see :func:`costs`); what
stands here for both is this library's own, stated in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .base import check_density
from .paro_statistics import BlockSums, LayerTally, OrderedBlocks, Statistics
from .paro_threshold import block_density, density_curve, solve_tau, threshold

METRICS = ("mass", "paper")
BUDGETS = ("model", "layer")
# Share of the mass whose blocks are counted, and the share of small entries that makes a block count as empty.
MASS, EMPTY = 0.95, 0.9


@dataclass(frozen=True)
class LayerPlan:
    """What calibration decided for one layer.

    ``orders``: int8 (H,), axis order ids. ``maps``: bool (bins, H, nb, nb), kept blocks in plan order. ``density``:
    kept share of all token pairs, per bin. ``recall``: share of the attention mass on kept blocks, per bin and head.
    """

    orders: Tensor
    maps: Tensor
    density: tuple[float, ...]
    recall: Tensor


def calibrate(
    statistics: Statistics,
    *,
    density: float,
    metric: str = "mass",
    alpha: float = 1.0,
    maximize_sparse: bool = False,
    budget: str = "layer",
    order: int | None = None,
) -> Iterator[tuple[int, LayerPlan]]:
    """Choose orders and maps: (layer, plan) for every layer seen, one at a time, since maps of many layers are large.

    ``density``: kept fraction. ``budget``: ``"layer"`` meets it in every layer and bin, in the mean over heads;
    ``"model"`` in the mean over all of them, so that every layer loses the same share of its mass. ``metric``,
    ``alpha``, ``maximize_sparse``: as for :func:`costs`, without effect where the statistics were taken for chosen
    orders. ``order``: use this axis order for all heads instead of choosing, 0 for PARO without reordering. Raises
    ``UsageError`` for values out of range.
    """
    check_density(density)
    check_budget(budget)
    if not statistics.layers:
        raise UsageError("the calibration saw no attention call; run the model with Observe(statistics.observe) first")
    if statistics.orders is None:
        check_metric(metric, alpha, detail=statistics.detail)
    elif order is not None:
        raise UsageError(f"the statistics were taken for chosen orders and know no other; got order={order}")
    how = {"metric": metric, "alpha": alpha, "maximize_sparse": maximize_sparse}
    columns = {layer: _columns(statistics, tally, order, how) for layer, tally in sorted(statistics.layers.items())}

    def masses(layer: int) -> list[Tensor]:
        """Block masses (H, nb, nb) by bin, every head under its own order."""
        tally, index = statistics.layers[layer], columns[layer]
        mass = tally.mass[:, torch.arange(len(index)), index]
        return [mass[_seen(tally, where)] for where in range(statistics.bins)]

    return _plans(statistics, masses, columns, density, budget)


def _plans(
    statistics: Statistics,
    masses: Callable[[int], list[Tensor]],
    columns: dict[int, Tensor],
    density: float,
    budget: str,
) -> Iterator[tuple[int, LayerPlan]]:
    shape, ids = statistics.shape, torch.tensor(statistics.shape.ids, dtype=torch.int8)
    shared = None
    if budget == "model":
        shared = solve_tau((density_curve(m, shape) for layer in columns for m in masses(layer)), density)
    for layer, index in columns.items():
        found = masses(layer)
        taus = [solve_tau([density_curve(m, shape)], density) if shared is None else shared for m in found]
        maps = [threshold(m, shape, tau) for m, tau in zip(found, taus, strict=True)]
        yield (
            layer,
            LayerPlan(
                orders=ids[index] if statistics.orders is None else statistics.orders[layer].to(torch.int8),
                maps=torch.stack(maps),
                density=tuple(block_density(kept, shape) for kept in maps),
                recall=torch.stack(
                    [(m * kept).sum((1, 2)) / m.sum((1, 2)) for m, kept in zip(found, maps, strict=True)]
                ),
            ),
        )


def _columns(statistics: Statistics, tally: LayerTally, order: int | None, how: dict[str, Any]) -> Tensor:
    """int64 (H,): where in the tally each head's order lies."""
    if statistics.orders is not None:
        return torch.zeros(tally.mass.shape[1], dtype=torch.int64)
    if order is not None:
        return torch.full((tally.mass.shape[1],), _column(statistics.shape, order))
    return costs(statistics, tally, **how).argmin(-1)


def check_budget(budget: str) -> None:
    """Raise ``UsageError`` for an unknown budget."""
    if budget not in BUDGETS:
        raise UsageError(f"budget {budget!r} is unknown; choose one of {', '.join(BUDGETS)}")


def check_metric(metric: str, alpha: float, *, detail: bool) -> None:
    """Raise ``UsageError`` for an unknown metric, an alpha out of range, or statistics that lack what they need."""
    if metric not in METRICS:
        raise UsageError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha weighs the two terms of the order's cost and lies in [0, 1]; got {alpha}")
    if needs_detail(metric, alpha) and not detail:
        raise UsageError(
            f"metric {metric!r} with alpha={alpha} needs block maxima and counts; take Statistics(detail=True)"
        )


def needs_detail(metric: str, alpha: float) -> bool:
    """Whether a cost looks at more than the mass of the blocks."""
    return alpha < 1 or metric == "paper"


def costs(
    statistics: Statistics,
    tally: LayerTally,
    *,
    metric: str = "mass",
    alpha: float = 1.0,
    maximize_sparse: bool = False,
) -> Tensor:
    """float64 (H, O): what each candidate order costs each head, over all bins. The cheapest is chosen, of equal ones
    the smallest id.

    ``"mass"``: alpha N95 / sum N95 + (1 - alpha) M_quant / sum M_quant, the sums over the candidates. N95 is the
    number of blocks that hold 95 % of the mass, M_quant the mean over blocks of maximum / mean. ``alpha`` is 1 unless
    the weights are quantised, then 0.5 is proposed.

    ``"paper"``: the printed formula, with M_sparse, the share of blocks of which 90 % of the entries lie below
    epsilon, in the place of N95. The text minimises the sum although a larger M_sparse is the better;
    ``maximize_sparse`` turns that sign. Either way M_sparse cannot see a diagonal one token wide.

    Raises ``UsageError`` where the statistics were taken without ``detail`` and the cost needs it.
    """
    check_metric(metric, alpha, detail=tally.peak is not None)
    return _cost(_terms(statistics, tally, metric, alpha), metric, alpha, maximize_sparse)


def _terms(statistics: Statistics, tally: LayerTally, metric: str, alpha: float) -> Tensor:
    """float64 (1 or 2, H, O): the sparsity term, and the quantisation term where it counts."""
    terms = [block_count(statistics, tally) if metric == "mass" else sparse_share(statistics, tally)]
    if alpha < 1:
        terms.append(peakedness(statistics, tally))
    return torch.stack(terms)


def _cost(terms: Tensor, metric: str, alpha: float, maximize_sparse: bool) -> Tensor:
    sign = -1 if metric == "paper" and maximize_sparse else 1
    cost = sign * alpha * _normalised(terms[0])
    return cost if alpha == 1 else cost + (1 - alpha) * _normalised(terms[1])


class OrderVotes(Statistics):
    """Chooses axis orders from the costs of single calls, summed: a few numbers per head in the place of block sums.

    For models whose sums under every order do not fit in memory; ``Statistics(orders=votes.winners())`` then takes the
    maps in a second run. Arguments as for :class:`~.paro_statistics.Statistics` and :func:`costs`.
    """

    def __init__(
        self,
        *,
        block_size: int = 64,
        metric: str = "mass",
        alpha: float = 1.0,
        maximize_sparse: bool = False,
        rows: float = 1.0,
    ):
        check_metric(metric, alpha, detail=True)
        super().__init__(bins=1, block_size=block_size, detail=needs_detail(metric, alpha), rows=rows)
        self._how = metric, alpha, maximize_sparse
        self._terms: dict[int, Tensor] = {}

    def count(self, layer: int, heads: int, where: int, sums: BlockSums) -> None:
        whole = (None if x is None else x[None] for x in (sums.mass, sums.peak, sums.small))
        terms = _terms(self, LayerTally(*whole, torch.ones(1, dtype=torch.int64)), *self._how[:2]).cpu()
        self._terms[layer] = self._terms.get(layer, 0) + terms

    def winners(self) -> dict[int, Tensor]:
        """int8 (H,) per layer seen."""
        ids = torch.tensor(self.shape.ids, dtype=torch.int8)
        return {layer: ids[_cost(terms, *self._how).argmin(-1)] for layer, terms in sorted(self._terms.items())}


def block_count(statistics: Statistics, tally: LayerTally) -> Tensor:
    """N95: float64 (H, O), blocks that hold 95 % of the mass, the mean over bins."""
    mass = _free(statistics, tally.mass).double().sort(-1, descending=True).values
    share = mass.cumsum(-1) / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Equal blocks add up to 0.95 exactly in theory; the slack keeps rounding from asking for one more.
    count = (share < MASS - 1e-9).sum(-1) + 1
    return _over_bins(count.double(), tally)


def sparse_share(statistics: Statistics, tally: LayerTally) -> Tensor:
    """M_sparse: float64 (H, O), share of blocks of which at least 90 % of the entries are small."""
    entries = statistics.entries * tally.calls.clamp_min(1)[:, None, None, None, None]
    share = _free(statistics, tally.small / entries.clamp_min(1).to(tally.small.device))
    return _over_bins((share >= EMPTY - 1e-6).double().mean(-1), tally)


def peakedness(statistics: Statistics, tally: LayerTally) -> Tensor:
    """M_quant: float64 (H, O), mean over blocks of maximum / mean; 1 for a block of zeros."""
    sizes = statistics.shape.blocks.sizes.to(tally.mass.device)
    mean = tally.mass / (sizes[:, None] * sizes)
    ratio = (tally.peak / mean).masked_fill(mean == 0, 1)
    return _over_bins(_free(statistics, ratio).double().mean(-1), tally)


def _seen(tally: LayerTally, where: int) -> int:
    """``where``, or the nearest bin that saw a call: a run of fewer steps than bins leaves some out."""
    return min(torch.nonzero(tally.calls).flatten().tolist(), key=lambda b: abs(b - where))


def _column(shape: OrderedBlocks, order: int) -> int:
    if order not in shape.ids:
        known = ", ".join(map(str, shape.ids))
        raise UsageError(f"axis order {order} is not a candidate on {shape.layout}; allowed: {known}")
    return shape.ids.index(order)


def _free(statistics: Statistics, values: Tensor) -> Tensor:
    """(bins, H, O, blocks): the blocks of video tokens alone."""
    return values[..., statistics.shape.free]


def _over_bins(values: Tensor, tally: LayerTally) -> Tensor:
    """(H, O): the mean over the bins that saw a call."""
    return values[tally.calls > 0].mean(0)


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
