"""What block_sparse_attention refuses, and its permutations."""

import sys
from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockList, Predicate, TilePlan, block_sparse
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.block_sparse.order import put, take

Q = torch.randn(2, 4, 32, 16, generator=torch.Generator().manual_seed(0))
PLAN = TilePlan(16, 16, 32, 32, BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool)))
THREE_HEADS = BlockList.from_mask(torch.ones(1, 3, 2, 2, dtype=torch.bool))
NOTHING = BlockList.from_mask(torch.zeros(1, 1, 2, 2, dtype=torch.bool))


def run(q=Q, k=Q, v=Q, plan=PLAN, **changes):
    return block_sparse_attention(q, k, v, plan, **({"scale": 0.25, "backend": "gather"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, r"q must be \(B, H, N, D\); got shape \(4, 32, 16\)"),
        ({"k": Q[:1], "v": Q[:1]}, "do not fit together"),
        ({"k": Q[:, :3], "v": Q[:, :3]}, "4 query heads are not a multiple of 3 key heads"),
        ({"v": Q.half()}, "cast them to one dtype"),
        ({"q": Q[:, :, :31]}, "the plan is for 32 queries and 32 keys; got 31 and 32"),
        ({"kv_valid": torch.tensor([3])}, r"kv_valid must be \(2,\)"),
        ({"backend": "cuda"}, "choose one of auto, reference"),
        ({"plan": replace(PLAN, full=THREE_HEADS)}, "full table is for 1 samples and 3"),
        ({"plan": replace(PLAN, partial=PLAN.full)}, "neither a predicate nor a gate"),
        ({"plan": replace(PLAN, order=torch.arange(31))}, r"order is \(31,\); allowed are \(32,\) and \(4, 32\)"),
        ({"plan": replace(PLAN, kv_order=torch.zeros(2, 32).long())}, r"kv_order is \(2, 32\)"),
    ],
)  # fmt: skip
def test_refusals_name_the_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_without_triton_the_other_tiers_serve_and_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delattr(block_sparse, "triton", raising=False)
    monkeypatch.setitem(sys.modules, f"{block_sparse.__name__}.triton", None)
    assert run()[0].shape == Q.shape
    with pytest.raises(NotImplementedError, match="pip install triton"):
        run(backend="triton")


def test_a_predicate_without_tests_shows_everything():
    plan = replace(PLAN, full=NOTHING, partial=PLAN.full, predicate=Predicate())
    assert torch.equal(run(plan=plan)[0], run()[0])


@pytest.mark.parametrize("per_head", [False, True])
def test_put_inverts_take(per_head):
    order = torch.stack([torch.randperm(32) for _ in range(4)]) if per_head else torch.randperm(32)
    for x in (Q, Q.transpose(0, 1).transpose(0, 1), Q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(put(take(x, order), order), x)
    row = order[2] if per_head else order
    assert torch.equal(take(Q, order)[:, 2], Q[:, 2][:, row])


@pytest.mark.parametrize("shape", [(0, 2, 16, 8), (1, 2, 16, 0)], ids=["no sample", "no head dim"])
def test_tensors_that_hold_nothing_are_refused(shape):
    plan = TilePlan(16, 16, 16, 16, BlockList.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool)))
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"q holds nothing: shape \("):
        block_sparse_attention(x, x, x, plan, scale=1.0)
