"""Muon for the weight matrices and AdamW for the rest: learns these small models in clearly fewer steps than AdamW
alone.

After Jordan et al. 2024 (momentum, then orthogonalisation by a Newton-Schulz iteration). Kernels of convolutions count
as matrices of shape (out, in x positions). The step is scaled to the size of an AdamW step (0.2 x sqrt(max(rows,
columns))), so both halves share one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the closest semi-orthogonal matrix to ``matrix`` (rows, columns), float32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with ``muon=True`` hold matrices or kernels; the other groups are stepped by AdamW."""

    def __init__(
        self, groups: Iterable[dict], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.98)
    ) -> None:
        super().__init__(groups, {"lr": lr, "muon": False, "momentum": momentum, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; all groups read ``lr`` times their own ``scale`` (default 1)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["muon"]:
                    self._muon(p, state, group)
                else:
                    self._adam(p, state, group)

    @staticmethod
    def _muon(p: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(p)
        moment = state["momentum"]
        moment.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(moment, group["momentum"]).flatten(1)
        update = orthogonalize(update) * (0.2 * max(update.shape) ** 0.5)
        p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"])

    @staticmethod
    def _adam(p: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            # Torch leaves an entry of this name on the CPU when a state is loaded, so reading it never waits for a GPU.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
        one, two = group["betas"]
        state["step"] += 1
        count = state["step"].item()
        state["first"].lerp_(p.grad, 1 - one)
        state["second"].lerp_(p.grad.square(), 1 - two)
        scale = (state["second"] / (1 - two**count)).sqrt_().add_(1e-8)
        p.addcdiv_(state["first"], scale, value=-group["lr"] / (1 - one**count))
