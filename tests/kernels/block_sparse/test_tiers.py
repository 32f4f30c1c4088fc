"""The torch tiers against a brute force over the definition of visibility, and proof that the sparse path ran."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from dit_accel.kernels import BlockList, Group, TilePlan
from dit_accel.kernels.block_sparse import block_sparse_attention, choose, flex, gather

FEATURES = {
    "full": {},
    "full-shared-table": {"per_head": False, "heads": 3, "b": 2},
    "full-per-sample": {"per_sample": True, "b": 2},
    "box1": {"predicate": "box1"},
    "box2-always": {"predicate": "box2+always"},
    "box3": {"predicate": "box3", "per_head": False},
    "disc-always": {"predicate": "disc+always"},
    "band": {"predicate": "band"},
    "always-only": {"predicate": "+always"},
    "gate": {"gate": "h"},
    "gate-per-sample-of-a-shared-plan": {"gate": "b", "b": 2, "per_head": False},
    "gate-band": {"gate": "bh", "predicate": "band+always", "b": 2, "per_sample": True},
    "order": {"order": "shared"},
    "order-heads": {"order": "heads", "kv_order": "heads", "kv_heads": 1, "predicate": "box2"},
    "kv-order": {"kv_order": "shared", "predicate": "disc"},
    "gqa": {"heads": 4, "kv_heads": 2, "bshd": True},
    "alive": {"alive": [61, 0], "b": 2},
    "alive-order": {"alive": [70, 37], "b": 2, "kv_order": "heads", "gate": "h", "per_head": False},
    "empty-rows": {"empty": True, "alive": [32], "per_head": False},
    "tile-odd": {"tile": (20, 24), "predicate": "box1", "n_q": 61, "n_k": 83},
    "one-query": {"n_q": 1, "n_k": 33},
    "dims": {"dim": 24, "dim_v": 7},
}
# Compiled in the default run; each is one kind, so it takes seconds once.
COMPILED = {
    "full": FEATURES["full"],
    "box2-always": FEATURES["box2-always"],
    "band-gate-alive-orders-gqa": {
        "b": 2, "predicate": "band+always", "gate": "bh", "alive": [61, 33], "order": "heads", "kv_order": "heads",
        "kv_heads": 1,
    },
}  # fmt: skip


def run(case, tier, **changes):
    arguments = {"scale": case.scale, "kv_valid": case.kv_valid, "backend": tier} | changes
    return block_sparse_attention(case.q, case.k, case.v, case.plan, **arguments)


@pytest.mark.parametrize("tier", ["reference", "gather"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(make_case, tier, name):
    case = make_case(seed=len(name), **FEATURES[name])
    case.check(*run(case, tier, return_lse=True))


@pytest.mark.parametrize("tier", ["reference", "gather"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(make_case, tier, dtype):
    case = make_case(dtype=dtype, predicate="box2", order="heads")
    case.check(*run(case, tier, return_lse=True))


@pytest.mark.parametrize("tier", ["reference", "gather", "flash"])
def test_what_is_added_to_a_row_is_added_where_no_key_is_seen(tier):
    q, k, v = torch.randn(3, 2, 2, 32, 8, dtype=torch.float64)
    lists = BlockList.from_mask(torch.tensor([[False, False], [False, True]]).expand(2, 2, 2, 2))
    scale, add = torch.full((2, 2, 2), 3.0), torch.randn(2, 2, 2, 8)
    plan = TilePlan(16, 16, 32, 32, lists, row_scale=scale, row_add=add)
    out, _ = block_sparse_attention(q, k, v, plan, scale=0.3, backend=tier)
    torch.testing.assert_close(out[:, :, :16], add[:, :, :1].double().expand(2, 2, 16, 8))


@pytest.mark.parametrize("tier", ["gather", "flash"])
@pytest.mark.parametrize("shared", [2, 4], ids=["of key heads", "of query heads"])
def test_first_order_where_each_head_has_its_own_order(tier, shared):
    order = torch.stack([torch.randperm(32) for _ in range(4)])
    q, (k, v) = torch.randn(1, 4, 32, 8), torch.randn(2, 1, 2, 32, 8)
    group = Group(
        key=torch.randn(1, 2, 2, 8), value=torch.randn(1, 2, 2, 8), count=torch.full((1, 1, 2), 16, dtype=torch.int32),
        seen=BlockList.from_mask(torch.eye(2, dtype=torch.bool)[None, None]), bounds=torch.tensor([0, 16, 32]),
    )  # fmt: skip
    plan = TilePlan(
        16, 16, 32, 32, BlockList.from_mask(~torch.eye(2, dtype=torch.bool)[None, None]), order=order, kv_order=order,
        reps=(group,), first_order=torch.randn(1, shared, 8, 8),
    )  # fmt: skip
    out, expected = (block_sparse_attention(q, k, v, plan, scale=0.3, backend=name)[0] for name in (tier, "reference"))
    torch.testing.assert_close(out, expected)


geometry = {
    "n_q": st.integers(2, 70), "n_k": st.integers(2, 70), "seed": st.integers(0, 2**20), "empty": st.booleans(),
}  # fmt: skip
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@settings(fuzz, max_examples=40)
@given(
    **geometry, tile=st.tuples(st.sampled_from([8, 16, 20]), st.sampled_from([8, 16, 27])),
    b=st.integers(1, 2), per_head=st.booleans(), per_sample=st.booleans(), bshd=st.booleans(),
    predicate=st.sampled_from([None, "box1", "box2+always", "disc", "band+always"]),
    gate=st.sampled_from([None, "", "h", "bh"]), order=st.sampled_from([None, "shared", "heads"]),
    kv_order=st.sampled_from([None, "shared", "heads"]), kv_heads=st.sampled_from([1, 2]), dead=st.booleans(),
)  # fmt: skip
def test_fuzz(make_case, b, n_k, dead, **features):
    case = make_case(b=b, n_k=n_k, alive=[n_k // 2] * b if dead else None, **features)
    for tier in ("reference", "gather"):
        case.check(*run(case, tier, return_lse=True))


@pytest.mark.parametrize("name", COMPILED)
def test_flex(make_case, name):
    case = make_case(seed=len(name), **COMPILED[name])
    case.check(run(case, "flex")[0])


@pytest.mark.parametrize("name", COMPILED)
def test_one_compiled_function_serves_every_plan_and_length(make_case, name):
    run(make_case(**COMPILED[name]), "flex")
    graphs = counters["stats"]["unique_graphs"]

    @settings(fuzz, max_examples=12)
    @given(n_q=st.integers(17, 70), n_k=st.integers(33, 70), seed=st.integers(0, 2**20), empty=st.booleans())
    def same_kind(**changes):
        case = make_case(**(COMPILED[name] | changes))
        case.check(run(case, "flex")[0])

    same_kind()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_flex_features(make_case, name):
    case = make_case(seed=len(name), **FEATURES[name])
    case.check(run(case, "flex")[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flex_dtypes(make_case, dtype):
    case = make_case(dtype=dtype, predicate="box2", order="heads", bshd=True)
    case.check(run(case, "flex")[0])


@pytest.mark.parametrize("tier", ["gather", "flex"])
def test_hidden_keys_are_not_read(make_case, tier):
    """Half of the key tiles are in no list: whatever they hold must not matter."""
    case = make_case(n_q=64, n_k=128)
    lists = BlockList.from_mask(torch.tensor([[True, False, True, False]]).expand(1, 2, 4, 4))
    plan = TilePlan(16, 32, 64, 128, lists)
    hidden = torch.arange(128) // 32 % 2 == 1
    out, _ = block_sparse_attention(case.q, case.k, case.v, plan, scale=case.scale, backend=tier)
    # Keys that are not finite go to the gather tier whichever was asked for.
    case.k[:, :, hidden], case.v[:, :, hidden] = torch.nan if tier == "gather" else 1e30, torch.nan
    again, _ = block_sparse_attention(case.q, case.k, case.v, plan, scale=case.scale, backend=tier)
    assert torch.equal(out, again)
    assert torch.isfinite(out).all()
    if tier == "flex":
        assert counters["stats"]["unique_graphs"] >= 1
        assert not counters["graph_break"]


def test_flex_in_any_grad_mode_and_with_any_strides(make_case):
    case = make_case()
    expected, _ = run(case, "flex")
    case.q.requires_grad_()
    out, _ = run(case, "flex")
    assert not out.requires_grad
    assert torch.equal(out, expected)
    case.q.requires_grad_(False)
    packed = torch.stack([case.q, case.q], -2).flatten(-2)[..., : case.q.shape[-1]]
    packed.copy_(case.q)
    assert not packed.is_contiguous()
    out, _ = block_sparse_attention(packed, case.k, case.v, case.plan, scale=case.scale, backend="flex")
    assert torch.equal(out, expected)


def test_flex_from_several_threads(make_case):
    case = make_case()
    expected, _ = run(case, "flex")
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(case, "flex")[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_a_wrong_compiled_function_is_caught_on_its_first_call(make_case, monkeypatch):
    case = make_case()
    run(case, "flex")
    kinds = []
    compiled = flex._compiled
    monkeypatch.setattr(flex, "_compiled", lambda kind: kinds.append(kind) or compiled(kind))
    run(case, "flex")
    wrong = flex._Run.__new__(flex._Run)
    wrong.__dict__.update(compiled(kinds[0]).__dict__, _verified=False, _call=lambda q, k, v, *_: torch.zeros_like(q))
    monkeypatch.setattr(flex, "_compiled", lambda kind: wrong)
    with pytest.raises(flex.FlexUnavailable, match=r"off by .* from the plan"):
        run(case, "flex")


def test_without_a_compiler_auto_takes_the_gather_tier_and_says_why(make_case, monkeypatch):
    monkeypatch.setattr(flex, "unavailable", lambda device: "no C++ compiler; install g++ or set CXX")
    monkeypatch.setattr(flex, "attention", lambda *a, **k: pytest.fail("flex ran"))
    calls = []
    attention = gather.attention
    monkeypatch.setattr(gather, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    case = make_case(predicate="box1")
    assert choose(case.q, case.plan) == (
        "gather",
        "triton: q is on cpu; flash: the plan has partial tiles; flex: no C++ compiler; install g++ or set CXX",
    )
    case.check(run(case, "auto")[0])
    assert calls == [1]
    with pytest.raises(NotImplementedError, match=r"'flex' cannot serve.*install g\+\+"):
        run(case, "flex")


def test_a_missing_compiler_is_found_out(monkeypatch):
    import torch._inductor.cpp_builder as cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "install g++" in flex.unavailable.__wrapped__("cpu")


def test_flex_leaves_an_lse_and_float64_to_the_gather_tier(make_case):
    case = make_case(predicate="box1")
    assert choose(case.q, case.plan, return_lse=True)[0] == "gather"
    assert choose(case.q.double(), case.plan)[0] == "gather"
