import pytest
import torch

from dit_accel.pipelines.mini.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=8))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_both_halves_descend():
    torch.manual_seed(0)
    module = torch.nn.Linear(12, 5)
    target = torch.nn.Linear(12, 5)
    optimizer = Muon([{"params": [module.weight], "muon": True}, {"params": [module.bias]}], lr=3e-2)
    x = torch.randn(64, 12)
    first = None
    for _ in range(120):
        loss = (module(x) - target(x).detach()).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first
