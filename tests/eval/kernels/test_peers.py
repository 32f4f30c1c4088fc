"""Other packages' block-sparse kernels, played by torch: each must be given the plan that ours runs."""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.eval.kernels import peers
from dit_accel.kernels import BlockList, TilePlan
from dit_accel.kernels.block_sparse import reference

N, H, D, TILE = 500, 3, 64, 128


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, N, H, D, generator=g).transpose(1, 2) for _ in range(3)]


def tiles(**changes):
    count = -(-N // TILE)
    mask = torch.rand(1, H, count, count, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    return replace(TilePlan(TILE, TILE, N, N, BlockList.from_mask(mask)), **changes)


def expected(plan, q, k, v):
    return reference.attention(q, k, v, plan, scale=D**-0.5)[0]


@pytest.fixture
def installed(monkeypatch):
    """Both packages, their blocks and calls as their documentation has them."""
    calls = {"sparge": [], "plan": [], "run": []}
    capability = [9, 0]

    def sparge(q, k, v, mask_id):
        calls["sparge"].append(mask_id)
        sizes = (64, 128) if capability[0] == 9 else (128, 64)
        assert mask_id.shape == (1, H, *(-(-N // size) for size in sizes))
        assert all(x.is_contiguous() for x in (q, k, v, mask_id))
        seen = mask_id.bool()
        for dim, size in enumerate(sizes, start=2):
            seen = seen.repeat_interleave(size, dim)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen[:, :, :N, :N])

    class Wrapper:
        def __init__(self, workspace):
            self._int_workspace_buffer = workspace
            self.room = workspace.numel()

        def reset_workspace_buffer(self, workspace, integers, *, vector_sparse_indices_buffer):
            self.room = vector_sparse_indices_buffer.numel()

        def plan(self, mask, rows, columns, heads, kv_heads, dim, *, q_data_type):
            calls["plan"].append(self.room)
            assert (heads, kv_heads, dim, q_data_type) == (H, H, D, torch.float32)
            assert rows.sum(1).tolist() == columns.sum(1).tolist() == [N] * H
            self.seen = torch.stack(
                [m.repeat_interleave(r, 0).repeat_interleave(c, 1) for m, r, c in zip(mask, rows, columns, strict=True)]
            )

        def run(self, q, k, v):
            calls["run"].append(q.shape)
            return scaled_dot_product_attention(q, k, v, attn_mask=self.seen)

    fakes = {"spas_sage_attn": ModuleType("spas_sage_attn"), "flashinfer": ModuleType("flashinfer")}
    fakes["spas_sage_attn"].block_sparse_sage2_attn_cuda = sparge
    fakes["flashinfer"].sparse = SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in fakes or stock(name))
    monkeypatch.setattr(peers, "_on_gpu", lambda q: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(capability))
    calls["capability"] = capability
    return calls


@pytest.mark.parametrize("major", [8, 9])
def test_both_run_our_plan(installed, major):
    installed["capability"][0] = major
    q, k, v = tensors()
    calls, why = peers.block_sparse(tiles(), q, k, v)
    assert not why
    for name, call in calls.items():
        for _ in range(2):
            torch.testing.assert_close(call(), expected(tiles(), q, k, v), msg=lambda m, n=name: f"{n}: {m}")
    assert len(installed["plan"]) == 1
    assert len(installed["run"]) == 2


def test_flashinfer_gets_room_for_every_key_of_every_block(installed, monkeypatch):
    monkeypatch.setattr(peers, "_WORKSPACE", 1024)
    q, k, v = tensors()
    peers.block_sparse(tiles(), q, k, v)[0]["flashinfer"]()
    assert installed["plan"] == [4 * TILE * int(tiles().full.count.sum())]


def test_plans_that_they_cannot_run_are_told(installed):
    q, k, v = tensors()
    order = torch.arange(N)
    for plan, reason in (
        (tiles(partial=tiles().full), "whole blocks"),
        (tiles(order=order), "their own order"),
        (tiles(kv_order=order), "their own order"),
        (tiles(row_scale=torch.ones(1, H, 4), row_add=torch.zeros(1, H, 4, D)), "whole blocks"),
    ):
        calls, why = peers.block_sparse(plan, q, k, v)
        assert not calls
        assert all(reason in text for text in why.values())
        assert set(why) == {"SpargeAttn (quantised)", "flashinfer"}
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    _, why = peers.block_sparse(TilePlan(32, 32, N, N, BlockList.from_mask(mask)), q, k, v)
    assert why == {"SpargeAttn (quantised)": "it takes blocks of 64 x 128 and head dims 64 and 128"}


def test_what_is_not_installed_is_named():
    calls, why = peers.block_sparse(tiles(), *tensors())
    assert not calls
    assert set(why.values()) <= {"not installed", "its kernel needs a GPU"}
