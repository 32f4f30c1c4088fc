"""Two methods that exist for tests: both prove that the sparse path ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import whole
from ..kernels import BlockList
from ..layout import Layout
from ..plans import Blocks, Plan
from .base import Call, Method, check_density


@dataclass(frozen=True)
class AllBlocks(Method):
    """Every block, through the sparse kernel: equals dense attention and shows that the kernel was called."""

    name: ClassVar[str] = "all-blocks"
    block_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", whole("AllBlocks.block_size", self.block_size, "a number of tokens"))

    def plan(self, q, k, v, call: Call) -> Plan:
        q_blocks, k_blocks = _blocks(call, self.block_size)
        mask = torch.ones((1, 1, q_blocks.count, k_blocks.count), dtype=torch.bool)
        return _plan(call, q_blocks, k_blocks, mask)


@dataclass(frozen=True)
class RandomBlocks(Method):
    """A seeded random set of key blocks per query block, at least one each; text always seen, text queries dense.

    The mask follows from ``seed`` and the layout alone, so an independent computation can rebuild it.
    """

    name: ClassVar[str] = "random-blocks"
    seed: int = 0
    density: float = 0.5
    block_size: int = 64

    def __post_init__(self) -> None:
        for name, value in (
            ("seed", whole("RandomBlocks.seed", self.seed, "a whole number", None)),
            ("density", check_density(self.density)),
            ("block_size", whole("RandomBlocks.block_size", self.block_size, "a number of tokens")),
        ):
            object.__setattr__(self, name, value)

    def plan(self, q, k, v, call: Call) -> Plan:
        q_blocks, k_blocks = _blocks(call, self.block_size)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand((q_blocks.count, k_blocks.count), generator=generator)
        mask = noise < self.density
        mask.scatter_(1, noise.argmin(1, keepdim=True), True)
        mask[outside_main(q_blocks, call.layout)] = True
        mask[:, outside_main(k_blocks, call.kv_layout or call.layout)] = True
        return _plan(call, q_blocks, k_blocks, mask[None, None])


def outside_main(blocks: Blocks, layout: Layout) -> torch.Tensor:
    """bool (blocks,): blocks that hold any token outside the main segment."""
    return (blocks.bounds[:-1] < layout.main.start) | (blocks.bounds[1:] > layout.main.stop)


def _blocks(call: Call, size: int) -> tuple[Blocks, Blocks]:
    return Blocks.uniform(call.layout.tokens, size), Blocks.uniform((call.kv_layout or call.layout).tokens, size)


def _plan(call: Call, q_blocks: Blocks, k_blocks: Blocks, mask: torch.Tensor) -> Plan:
    return Plan(call.layout, q_blocks, k_blocks, BlockList.from_mask(mask), kv_layout=call.kv_layout)
