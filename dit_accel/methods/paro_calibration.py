"""PARO's offline choices (arXiv 2506.16054, section 3.3): an axis order per head, a block map per timestep bin.

The paper leaves the threshold rule open, and its printed order metric disagrees with itself (see :func:`costs`); what
stands here for both is this library's own, stated in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .base import check_density
from .paro_statistics import BlockSums, LayerTally, OrderedBlocks, Statistics

METRICS = ("mass", "paper")
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
    order: int | None = None,
) -> Iterator[tuple[int, LayerPlan]]:
    """Choose orders and maps: (layer, plan) for every layer seen, one at a time, since maps of many layers are large.

    ``density``: kept fraction, reached per layer and bin by one threshold for its heads, so that heads that need more
    get more. ``metric``, ``alpha``, ``maximize_sparse``: as for :func:`costs`, without effect where the statistics
    were taken for chosen orders. ``order``: use this axis order for all heads instead of choosing, 0 for PARO without
    reordering. Raises ``UsageError`` for values out of range.
    """
    check_density(density)
    if not statistics.layers:
        raise UsageError("the calibration saw no attention call; run the model with Observe(statistics.observe) first")
    ids = torch.tensor(statistics.shape.ids, dtype=torch.int8)
    if statistics.orders is None:
        check_metric(metric, alpha, detail=statistics.detail)
        column = None if order is None else _column(statistics.shape, order)
    elif order is not None:
        raise UsageError(f"the statistics were taken for chosen orders and know no other; got order={order}")

    def one(layer: int, tally: LayerTally) -> LayerPlan:
        if statistics.orders is not None:
            return _layer_plan(statistics, tally, tally.mass[:, :, 0], statistics.orders[layer], density)
        price = costs(statistics, tally, metric=metric, alpha=alpha, maximize_sparse=maximize_sparse)
        index = price.argmin(-1) if column is None else torch.full(price.shape[:1], column)
        return _layer_plan(statistics, tally, tally.mass[:, torch.arange(len(index)), index], ids[index], density)

    return ((layer, one(layer, tally)) for layer, tally in sorted(statistics.layers.items()))


def _layer_plan(statistics: Statistics, tally: LayerTally, mass: Tensor, orders: Tensor, density: float) -> LayerPlan:
    """mass: float32 (bins, H, nb, nb), under each head's own order."""
    shape = statistics.shape
    seen = [_seen(tally, where) for where in range(statistics.bins)]
    maps = [threshold(mass[b], shape, density) for b in seen]
    return LayerPlan(
        orders=orders.to(torch.int8),
        maps=torch.stack(maps),
        density=tuple(block_density(kept, shape) for kept in maps),
        recall=torch.stack([_recall(mass[b], kept) for b, kept in zip(seen, maps, strict=True)]),
    )


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
    mean = tally.mass / statistics.entries.clamp_min(1).to(tally.mass.device)
    ratio = (tally.peak / mean).masked_fill(mean == 0, 1)
    return _over_bins(_free(statistics, ratio).double().mean(-1), tally)


def threshold(mass: Tensor, shape: OrderedBlocks, density: float) -> Tensor:
    """bool (H, nb, nb): the blocks that calibration keeps at ``density``, for block masses (H, nb, nb) of one bin.

    Every head keeps its smallest set of blocks with a share tau of its mass, tau solved for the mean density over
    heads. Kept in any case, and part of the density: rows and columns with tokens outside the video, the last ones
    where they are not full, and a row's diagonal block where the row has no other. Where those alone exceed
    ``density`` they are what is kept.
    """
    heads, nb = mass.shape[:2]
    forced = forced_blocks(shape).expand(heads, nb, nb)
    free = mass.double().masked_fill(forced, 0).flatten(1)
    ranked, rank = free.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    before = before / ranked.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def kept(tau: float) -> Tensor:
        chosen = torch.zeros_like(free, dtype=torch.bool).scatter_(1, rank, (before < tau) & (ranked > 0))
        chosen = chosen.view(heads, nb, nb) | forced
        empty = ~chosen.any(-1)
        return chosen | (empty[..., None] & torch.eye(nb, dtype=torch.bool, device=mass.device))

    low, high = 0.0, 1.0 + 1e-9
    if block_density(kept(high), shape) <= density:
        return kept(high)
    for _ in range(40):
        middle = (low + high) / 2
        if block_density(kept(middle), shape) <= density:
            low = middle
        else:
            high = middle
    return kept(low)


def forced_blocks(shape: OrderedBlocks) -> Tensor:
    """bool (nb, nb): blocks that every map keeps."""
    keep = ~shape.free
    if int(shape.blocks.sizes[-1]) < shape.block_size:
        keep[-1] = keep[:, -1] = True
    return keep


def block_density(kept: Tensor, shape: OrderedBlocks) -> float:
    """Share of all token pairs in the kept blocks (H, nb, nb), the mean over heads."""
    sizes = shape.blocks.sizes.double().to(kept.device)
    return float((kept.double() @ sizes @ sizes).mean() / sizes.sum() ** 2)


def _recall(mass: Tensor, kept: Tensor) -> Tensor:
    return (mass * kept).sum((1, 2)) / mass.sum((1, 2))


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
