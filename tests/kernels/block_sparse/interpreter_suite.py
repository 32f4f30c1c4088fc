"""The Triton kernel in Triton's interpreter, against float64. Run by test_triton.py with TRITON_INTERPRET=1 set."""

from dataclasses import fields, replace

import covering
import pytest
import represented
import torch

from dit_accel.kernels import BlockList, TilePlan, tuning
from dit_accel.kernels.block_sparse import block_sparse_attention, choose, flex, schedule, triton_order
from dit_accel.kernels.block_sparse import triton as tier
from dit_accel.lowering import lower

SMALL = tuning.Tuning(block_q=32, full=32, tested=16, gathered=16, warps=4, stages=1)
DESCRIBED = replace(SMALL, described=32)
GUARD = 64

CASES = {
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
    "gate-batch": {"gate": "b", "b": 2},
    "gate-box": {"gate": "", "predicate": "box2"},
    "gate-band-always": {"gate": "bh", "predicate": "band+always", "b": 2, "per_sample": True},
    "order": {"order": "shared"},
    "order-heads": {"order": "heads", "kv_order": "heads", "kv_heads": 1, "predicate": "box2"},
    "kv-order": {"kv_order": "shared", "predicate": "disc"},
    "gqa": {"heads": 4, "kv_heads": 2, "bshd": True},
    "alive": {"alive": [61, 0], "b": 2},
    "alive-partial": {"alive": [40], "predicate": "box2+always"},
    "alive-order": {"alive": [70, 37], "b": 2, "kv_order": "heads", "gate": "h"},
    "empty-rows": {"empty": True, "alive": [32]},
    "tile-odd": {"tile": (20, 24), "predicate": "box1"},
    "tile-large": {"tile": (128, 64), "n_q": 150, "n_k": 131, "heads": 1, "predicate": "box2"},
    "tile-tiny": {"tile": (8, 8), "n_q": 21, "n_k": 19},
    "exact": {"n_q": 64, "n_k": 96, "tile": (32, 32), "predicate": "box1"},
    "one-query": {"n_q": 1, "n_k": 33},
}
# Each case is run one way by default; those in which blocks and tiles differ most, both ways.
BOTH = {"box3", "gate-band-always", "order-heads", "alive-order", "tile-odd", "tile-large", "empty-rows"}
DIMS = [(16, None), (24, None), (40, 24), (64, 72), (72, None), (80, 64), (96, None), (128, None), (250, 256), (7, 5)]


def cut(monkeypatch, blocks):
    """Both ways to cut a tile: one block per tile, and several."""
    if blocks == "split":
        monkeypatch.setattr(tuning, "EMULATED", SMALL)


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN between guard bands, which are checked afterwards."""
    made = []
    plain = torch.Tensor.new_empty

    def new_empty(self, shape, *, dtype=None, **other):
        if other:  # the interpreter's own
            return plain(self, shape, dtype=dtype, **other)
        size = torch.Size(shape)
        flat = torch.full((size.numel() + 2 * GUARD,), torch.nan, dtype=dtype or self.dtype)
        made.append(flat)
        return flat[GUARD:-GUARD].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert made
    for flat in made:
        assert flat[:GUARD].isnan().all()
        assert flat[-GUARD:].isnan().all()
        assert not flat[GUARD:-GUARD].isnan().any()


def run(case, **changes):
    arguments = {"scale": case.scale, "kv_valid": case.kv_valid, "return_lse": True} | changes
    return tier.attention(case.q, case.k, case.v, case.plan, **arguments)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "blocks"), covering.diagonal(CASES, ["wide", "split"], also=lambda n, _: n in BOTH))
def test_features(make_case, monkeypatch, name, blocks):
    cut(monkeypatch, blocks)
    case = make_case(seed=len(name), **CASES[name])
    case.check(*run(case))


@pytest.fixture
def launches(monkeypatch):
    """The keys of every launch: how they were read."""
    seen = []
    plain = tier.keys_for
    monkeypatch.setattr(tier, "keys_for", lambda *a, **k: seen.append(plain(*a, **k)) or seen[-1])
    return seen


# Cases whose keys lie as the copy engine needs them, and one for each reason why they do not.
BY_TILE = {"full-per-sample": True, "box2-always": True, "gqa": True, "gate-batch": True, "order": True, "exact": True}
BY_ROW = {"tile-odd": False, "alive": False, "kv-order": False}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [*BY_TILE, *BY_ROW])
def test_blocks_by_descriptor(make_case, launches, monkeypatch, name):
    monkeypatch.setattr(tuning, "EMULATED", DESCRIBED)
    case = make_case(seed=len(name), **CASES[name])
    case.check(*run(case))
    assert launches[0].described == (BY_TILE | BY_ROW)[name]


def test_16_bit_blocks_by_descriptor(make_case, launches, monkeypatch):
    monkeypatch.setattr(tuning, "EMULATED", DESCRIBED)
    for dtype in (torch.float16, torch.bfloat16):
        case = make_case(seed=2, dtype=dtype, dim=32, bshd=True, predicate="box1")
        case.check(*run(case))
    assert all(keys.described for keys in launches)
    # 24 channels are no power of two, and rows of 20 bytes are no whole 16.
    for dim in (24, 10):
        run(make_case(dtype=torch.float16, dim=dim))
    assert not any(keys.described for keys in launches[2:])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("entry", [SMALL, DESCRIBED], ids=["rows", "tiles"])
@pytest.mark.parametrize("name", ["kv-order", "alive-order", "order-heads"])
def test_keys_copied_into_plan_order(make_case, launches, monkeypatch, name, entry):
    """The same result whether keys are found while loading or copied first; the copy holds 0 for dead ones."""
    monkeypatch.setattr(tuning, "EMULATED", entry)
    case = make_case(seed=len(name), **{**CASES[name], "kv_heads": 2})
    found, lse = run(case)
    monkeypatch.setattr(triton_order, "COPY_FROM", 0)
    out, lse_copied = run(case)
    assert [keys.in_order for keys in launches] == [False, True]
    assert launches[1].described == bool(entry.described)
    case.check(out, lse_copied)
    assert torch.equal(out, found)
    assert torch.equal(lse, lse_copied)
    order, keys = case.plan.kv_order, launches[1]
    for h in range(2):
        token = order if order.ndim == 1 else order[h]
        for b in range(len(case.k)):
            dead = token >= (token.numel() if case.kv_valid is None else case.kv_valid[b])
            assert torch.equal(keys.k[b, h], case.k[b, h, token].masked_fill(dead[:, None], 0))
            assert torch.equal(keys.v[b, h], case.v[b, h, token].masked_fill(dead[:, None], 0))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["alive", "alive-partial", "empty-rows"])
def test_dead_values_are_cleaned_for_the_copy_engine(make_case, launches, monkeypatch, name):
    """Plans in the tokens' own order keep their blocks by descriptor where keys are dead, whatever those hold."""
    monkeypatch.setattr(tuning, "EMULATED", DESCRIBED)
    case = make_case(seed=len(name), **CASES[name])
    found, lse = run(case)
    monkeypatch.setattr(triton_order, "COPY_FROM", 0)
    for b, alive in enumerate(case.kv_valid.tolist()):
        case.k[b, :, alive:], case.v[b, :, alive:] = torch.nan, torch.inf
    out, lse_cleaned = run(case)
    assert [keys.described for keys in launches] == [False, True]
    assert launches[1].k is case.k
    assert torch.equal(out, found)
    assert torch.equal(lse, lse_cleaned)
    for b, alive in enumerate(case.kv_valid.tolist()):
        assert (launches[1].v[b, :, alive:] == 0).all()
        case.k[b, :, alive:] = case.v[b, :, alive:] = 0
    case.check(out, lse_cleaned)


def test_shared_keys_of_heads_with_orders_of_their_own_are_not_copied(make_case, launches, monkeypatch):
    monkeypatch.setattr(triton_order, "COPY_FROM", 0)
    run(make_case(**CASES["order-heads"]))
    assert not launches[0].in_order


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("programs", "blocks"), covering.diagonal([1, 3, 1000], ["wide", "split"]))
def test_any_number_of_programs_in_any_order_of_rows(make_case, monkeypatch, programs, blocks):
    cut(monkeypatch, blocks)
    case = make_case(
        seed=9, n_q=37, n_k=45, b=2, heads=3, predicate="box1", per_sample=True, alive=[30, 45], tile=(16, 16)
    )
    expected, lse = run(case)
    plan = replace(case.plan, kept=True, _memo={})
    rows = schedule.row_order(plan, 2, 3, 1)
    assert rows is not None
    assert rows.tolist() != list(range(len(rows)))
    plain = tier.programs
    monkeypatch.setattr(tier, "programs", lambda *a: min(programs, plain(*a)))
    out, again = tier.attention(case.q, case.k, case.v, plan, scale=case.scale, kv_valid=case.kv_valid, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, again)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dim", "dim_v"), DIMS)
def test_head_dims(make_case, dim, dim_v):
    case = make_case(seed=dim, dim=dim, dim_v=dim_v, n_q=37, n_k=45, predicate="box1", alive=[41])
    case.check(*run(case))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "dtype"),
    covering.diagonal(
        ["full", "box2-always", "order-heads", "alive-order", "gate-box"], [torch.float16, torch.bfloat16]
    ),
)
def test_16_bit(make_case, name, dtype):
    case = make_case(seed=7, dtype=dtype, dim=40, **CASES[name])
    case.check(*run(case))


@pytest.mark.usefixtures("checked")
def test_every_feature_at_once(make_case):
    case = make_case(
        seed=3, b=2, heads=4, kv_heads=2, predicate="box3+always", gate="bh", order="heads", kv_order="heads",
        alive=[61, 33], dim=40, bshd=True, per_sample=True,
    )  # fmt: skip
    case.check(*run(case))


def test_output_lies_in_memory_as_the_queries_do(make_case):
    for bshd in (True, False):
        case = make_case(bshd=bshd, heads=3, dim=16, dim_v=24)
        out, lse = run(case, return_lse=False)
        assert lse is None
        assert (out.transpose(1, 2) if bshd else out).is_contiguous()


def test_strided_inputs_and_tables(make_case):
    case = make_case(predicate="box2", gate="h", order="heads", kv_order="shared", kv_heads=1)
    expected, _ = run(case)

    def strided(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    def all_strided(value):
        if isinstance(value, torch.Tensor):
            return strided(value)
        if isinstance(value, tuple):
            return tuple(all_strided(x) for x in value)
        if value is None or isinstance(value, int):
            return value
        return type(value)(**{f.name: all_strided(getattr(value, f.name)) for f in fields(value) if f.name != "_memo"})

    plan = all_strided(case.plan)
    assert plan.predicate.box.coord[0].stride() == (2,)
    out, _ = tier.attention(strided(case.q), strided(case.k), strided(case.v), plan, scale=case.scale)
    assert torch.equal(out, expected)


def test_expanded_tables_are_read_in_place(make_case):
    case = make_case(b=2, heads=3, per_head=False)
    full = case.plan.full
    wide = BlockList(full.count.expand(2, 3, -1), full.index.expand(2, 3, -1, -1))
    plan = TilePlan(case.plan.tile_q, case.plan.tile_k, case.plan.n_q, case.plan.n_k, wide)
    assert torch.equal(tier.attention(case.q, case.k, case.v, plan, scale=case.scale)[0], run(case)[0])


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(make_case, scale):
    case = make_case()
    out, _ = run(case, scale=scale)
    seen = case.mask.double().log()
    truth = torch.softmax(case.q.double() @ case.k.double().mT * scale + seen, -1) @ case.v.double()
    assert (out - truth).abs().max() < 2e-6


def test_large_logits_stay_finite(make_case):
    case = make_case(predicate="box1", dim=16)
    case.q *= 40
    case.check(*run(case))


def test_nan_in_dead_keys_is_not_read(make_case):
    case = make_case(alive=[61], predicate="box1")
    expected, _ = run(case)
    case.k[:, :, 61:] = torch.nan
    case.v[:, :, 61:] = torch.inf
    assert torch.equal(run(case)[0], expected)


@pytest.mark.usefixtures("checked")
def test_addresses_beyond_32_bits():
    step, n, dim = 2**26 + 16, 40, 16
    far = torch.empty(n * step, dtype=torch.float16).as_strided((1, 1, n, dim), (0, 0, step, 1))
    far.copy_(torch.randn(1, 1, n, dim, generator=torch.Generator().manual_seed(0)))
    near = far.clone()
    count = torch.ones(1, 1, 1, dtype=torch.int32)
    plan = TilePlan(64, 64, n, n, BlockList(count, torch.zeros(1, 1, 1, 1, dtype=torch.int32)))
    assert far.stride(2) * (n - 1) > 2**31
    out, expected = (tier.attention(x, x, x, plan, scale=0.25)[0] for x in (far, near))
    assert torch.equal(out, expected)


def test_a_hidden_key_changes_nothing_and_a_visible_one_does(make_case):
    case = make_case(per_head=False)
    before, _ = run(case)
    case.v[..., -1, :] += 100
    after, _ = run(case)
    seen = case.mask[0, 0, :, -1]
    assert 0 < seen.sum() < len(seen)
    assert torch.equal(before[:, :, ~seen], after[:, :, ~seen])
    assert (before[:, :, seen] != after[:, :, seen]).any(-1).all()


def test_the_tier_is_named_and_never_automatic(make_case, monkeypatch):
    monkeypatch.setattr(flex, "unavailable", lambda device: "switched off for this test")
    case = make_case()
    assert tier.interpreted()
    assert choose(case.q, case.plan, backend="triton")[0] == "triton"
    chosen, why = choose(case.q, case.plan)
    assert chosen in ("gather", "flash")
    assert why.startswith("triton: q is on cpu")
    out, _ = block_sparse_attention(case.q, case.k, case.v, case.plan, scale=case.scale, backend="triton")
    case.check(out)


def test_attend_reaches_the_kernel(monkeypatch):
    import dit_accel

    launches = []
    attention = tier.attention
    monkeypatch.setattr(tier, "attention", lambda *a, **k: launches.append(a[3]) or attention(*a, **k))
    layout = dit_accel.Layout(grid=(3, 5, 7), text=9)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.tokens, 32, generator=generator) for _ in range(3))
    for block in (8, 64):
        method = dit_accel.methods.RandomBlocks(seed=1, block_size=block)
        out, reference = (
            dit_accel.attend(q, k, v, method, layout=layout, backend=tier_name) for tier_name in ("triton", "reference")
        )
        assert (out - reference).abs().max() < 2e-6
    assert len(launches) == 2
    assert [plan.tile_q for plan in launches] == [128, 64]


@pytest.mark.parametrize(
    ("name", "permuted"), covering.diagonal(represented.CASES, [False, True], also=lambda n, _: n == "everything")
)
def test_representatives_and_holes(name, permuted, monkeypatch):
    import dit_accel

    settings = dict(represented.CASES[name])
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(settings["sizes"]), generator=generator) if permuted else None
    q, k, v, plan, kind = represented.case(**settings, order=order)
    launches = []
    attention = tier.attention
    monkeypatch.setattr(tier, "attention", lambda *a, **k: launches.append(a[3]) or attention(*a, **k))
    out = dit_accel.attend(q, k, v, plan=plan, layout=plan.layout, backend="triton")
    assert len(launches[0].reps) == len(plan.reps) > 0
    expected, lse = represented.brute(q, k, v, plan, kind, settings["sizes"])
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    if plan.first_order is None and plan.row_scale is None:
        _, log = dit_accel.attend(q, k, v, plan=plan, layout=plan.layout, backend="triton", return_lse=True)
        torch.testing.assert_close(log.double(), lse, atol=1e-5, rtol=1e-5)


def test_row_factors_that_samples_and_heads_share():
    import dit_accel

    q, k, v, plan, _ = represented.case(represented.RAGGED, factors=True)
    plan = replace(plan, row_scale=plan.row_scale[:1, :1], row_add=plan.row_add[:1], _memo={})
    out, expected = (
        dit_accel.attend(q, k, v, plan=plan, layout=plan.layout, backend=name) for name in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_first_order_term_of_16_bit_queries(dtype):
    """It outweighs all else here and its matrix is beyond float16. What is lost is the output's own rounding."""
    import dit_accel

    q, k, v, plan, kind = represented.case(represented.RAGGED, seed=3, first_order=True)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    reps = tuple(replace(g, key=g.key.to(dtype), value=g.value.to(dtype)) for g in plan.reps)
    plan = replace(plan, reps=reps, first_order=plan.first_order * 3000 + 60000 * (plan.first_order > 2.4), _memo={})
    assert plan.first_order.amax() > 65504
    out = dit_accel.attend(q, k, v, plan=plan, layout=plan.layout, backend="triton")
    expected, _ = represented.brute(q, k, v, plan, kind, represented.RAGGED)
    # Which representatives a query sees, and how much mass they have, is known to 16 bits alone.
    error = (out.double() - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps


def test_ragged_blocks_without_representatives():
    import dit_accel

    q, k, v, plan, _ = represented.case([70, 9, 64, 33, 12], seed=5)
    plain = replace(plan, reps=(), _memo={})
    out, expected = (
        dit_accel.attend(q, k, v, plan=plain, layout=plan.layout, backend=name) for name in ("triton", "reference")
    )
    assert lower(plain).tokens_k == 188
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-5)
