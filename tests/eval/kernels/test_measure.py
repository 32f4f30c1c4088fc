"""Rows of the kernel benchmark on tiny tensors: what ran, its error, and ratios that follow from its times."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel import AdaSpa, Pisa, Radial, Step
from dit_accel.eval.kernels import measure as module
from dit_accel.eval.kernels import rivals
from dit_accel.eval.kernels.cases import Case, Shape
from dit_accel.eval.kernels.clock import observed
from dit_accel.eval.kernels.kept import Run, run_of
from dit_accel.eval.kernels.measure import measure, workload
from dit_accel.eval.kernels.table import markdown
from dit_accel.kernels import BlockList, TilePlan, autotune
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.faults import DeviceLost

SHAPE = Shape((4, 8, 16), heads=2, dim=16)


@pytest.mark.parametrize(
    ("method", "backend", "tier"), [("random-blocks", "gather", "gather"), ("rectified", "auto", None)]
)
def test_a_row(method, backend, tier):
    case = Case("cpu", "tiny", method, 0.5, backend=backend)
    row = measure(case, "cpu", seconds=0, shape=SHAPE)
    median = {name: times["median"] for name, times in row["times"].items()}
    assert set(median) == {"torch", "sparse", "kernel", "planning", "whole"}
    assert row["tokens"] == 512
    assert len(row["tiers"]) == 1
    assert tier in (None, row["tiers"][0])
    assert row["of_best"] == pytest.approx(row["kept"] * median["torch"] / median["sparse"])
    assert row["of_own"] == pytest.approx(row["kept"] * median["whole"] / median["sparse"])
    assert row["rate"] == pytest.approx(row["work"]["flops"] / median["kernel"] / 1e12)
    assert max(row["error"].values()) < 1e-5
    assert f"| tiny | 512 | 16 | {method} |" in markdown({"section": "cpu", "rows": {case.key: row}})


def test_a_method_that_keeps_its_maps_is_timed_between_two_searches(monkeypatch):
    searched = []
    plain = AdaSpa._search

    def search(self, q, k, call, lse):
        searched.append(call.step)
        return plain(self, q, k, call, lse)

    monkeypatch.setattr(AdaSpa, "_search", search)
    case = Case("cpu", "tiny", "adaspa", 0.5, backend="gather")
    row = measure(case, "cpu", seconds=0, shape=SHAPE)
    # One that the timed calls use; then those of the side that searches, once untimed and thrice timed.
    assert searched == [Step(9, 50)] * 5
    assert row["run"] == {"steps": 50, "searches": 2, "sparse": 40}
    median = {name: times["median"] for name, times in row["times"].items()}
    sparse = median["sparse"] + median["search"] * 2 / 40
    assert row["speedup"] == pytest.approx(median["torch"] / sparse)
    assert row["of_own"] == pytest.approx(row["kept"] * median["whole"] / sparse)
    assert row["planning_share"] == pytest.approx((median["planning"] + median["search"] * 2 / 40) / median["torch"])
    assert row["error"]["kernel"] < 1e-5
    assert "tiny adaspa: 2 searches of" in markdown({"section": "cpu", "rows": {case.key: row}})


@pytest.mark.parametrize(("method", "run"), [
    (AdaSpa(), Run(Step(9, 50), Step(10, 50), 2, 40)),
    (AdaSpa(search_steps=(0, 1, 0.6)), Run(Step(0, 50), Step(2, 50), 3, 49)),
    (AdaSpa(search_steps=(49,)), None), (AdaSpa(search_steps=tuple(range(50))), None), (Radial(), None), (Pisa(), None),
], ids=str)  # fmt: skip
def test_runs_of_methods(method, run):
    assert run_of(method) == run


def test_quantised_attention_of_all_pairs_has_a_row():
    row = measure(Case("dense-quant", "tiny", None, quant="sage2"), "cpu", seconds=0, shape=SHAPE)
    assert row["tiers"] == ["quant-reference"]
    assert row["kept"] == 1
    assert 1e-4 < row["error"]["kernel"] < 0.1


def test_a_rival_that_ran_another_plan_is_not_compared(monkeypatch):
    wrong = {"rival": lambda: torch.zeros(1, 2, 512, 16)}
    monkeypatch.setattr(rivals, "sparse", lambda *_: (wrong, {}))
    row = measure(Case("sparse", "tiny", "random-blocks", 0.5, backend="gather"), "cpu", seconds=0, shape=SHAPE)
    assert "rival" not in row["times"]
    assert "off by 1 from the plan" in row["not_compared"]["rival"]


def test_a_method_that_would_run_dense_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "plan", lambda *_, **__: None)
    with pytest.raises(ValueError, match="runs this call dense"):
        measure(Case("cpu", "tiny", "radial", 0.5), "cpu", shape=SHAPE)


def test_a_rival_that_raises_says_why():
    def broken():
        raise RuntimeError("no kernel for this\nmore")

    calls, why = {"good": lambda: torch.ones(1), "bad": broken}, {}
    assert set(rivals.usable(calls, why)) == set(calls) == {"good"}
    assert why == {"bad": "RuntimeError: no kernel for this"}


def test_a_rival_that_breaks_the_device_ends_the_run():
    def broken():
        raise torch.AcceleratorError("illegal address")

    calls = {"bad": broken}
    with pytest.raises(DeviceLost, match="illegal address"):
        rivals.usable(calls, {})


def test_a_rivals_kernel_may_fail_after_its_call(monkeypatch):
    """The wait belongs to the call that made the kernel."""
    waited = []

    def synchronize():
        waited.append(1)
        if len(waited) == 1:
            raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    calls, why = {"late": lambda: SimpleNamespace(is_cuda=True), "good": lambda: torch.ones(1)}, {}
    assert set(rivals.usable(calls, why)) == {"good"}
    assert why == {"late": "RuntimeError: unspecified launch failure"}


@pytest.mark.parametrize(("quant", "others"), [(None, ["tested"]), ("sage2", [])])
def test_our_kernel_on_all_pairs_is_tuned_as_the_plan_is(monkeypatch, quant, others):
    """The kinds of calls that are warmed are those that are then timed: whole tiles have a kind of their own."""
    warmed = []

    class TimedNow(Exception):
        """Everything that is warmed has been."""

    def in_turn(sides, *_, **__):
        assert "whole" in sides
        raise TimedNow

    monkeypatch.setattr(module, "_warm", lambda tiles, q, k, v, backend: warmed.append(autotune.kind(tiles, q, 16)))
    monkeypatch.setattr(module, "in_turn", in_turn)
    with pytest.raises(TimedNow):
        measure(Case("cpu", "tiny", "gna", 0.3, backend="auto" if quant else "gather", quant=quant), "cpu", shape=SHAPE)
    assert [kind.split("-")[4] for kind in warmed] == ["full", *others]


@pytest.mark.parametrize(("device", "backend", "found"), [("cuda", "auto", 1), ("cuda", "flex", 0), ("cpu", "auto", 0)])
def test_only_the_kernel_is_tuned(monkeypatch, device, backend, found):
    asked = []
    monkeypatch.setattr(autotune, "warm", lambda *given: asked.append(given))
    q = SimpleNamespace(device=SimpleNamespace(type=device))
    module._warm("tiles", q, q, q, backend)
    assert asked == [("tiles", q, q, q)] * found


def test_workload_of_uneven_rows():
    """Rows of 1 and 3 tiles of 4, one of them partial in the second."""
    full, part = torch.zeros(1, 1, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    full[0, 0, 0, 0] = full[0, 0, 1, 0] = part[0, 0, 1, 1] = True
    tiles = TilePlan(4, 4, 8, 8, BlockList.from_mask(full), BlockList.from_mask(part))

    class Made:
        density = 0.6

        def bytes(self):
            return 5

    work = workload(Made(), tiles, Shape((1, 2, 4), heads=3, dim=2))
    assert work["executed"] == pytest.approx(0.75)
    assert work["partial"] == pytest.approx(1 / 3)
    assert work["longest"] == pytest.approx(2 / 1.5)
    assert work["flops"] == pytest.approx(4 * 64 * 2 * 3 * 0.75)


def test_the_tier_seen_is_the_one_that_ran():
    q = torch.randn(1, 1, 8, 4)
    plan = TilePlan(4, 4, 8, 8, BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool)))
    with observed() as tiers:
        block_sparse_attention(q, q, q, plan, scale=0.5, backend="gather")
        block_sparse_attention(q, q, q, plan, scale=0.5, backend="reference")
    assert tiers == ["gather", "reference"]
