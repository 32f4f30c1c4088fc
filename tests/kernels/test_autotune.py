"""What is kept of a search, with a timer that invents its times."""

import importlib.util
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import Band, BlockList, Predicate, TilePlan, autotune
from dit_accel.kernels.tuning import TABLE, tuning

BASE = TABLE["sm90", 128]


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    where = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv(autotune.VARIABLE, str(where))
    autotune._entries.cache_clear()
    yield where
    autotune._entries.cache_clear()


def plan(tile=128, partial=False):
    listed = BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    slots = torch.zeros(2 * tile, dtype=torch.int32)
    band = Predicate(band=Band(slots, slots, slots, slots, torch.zeros(1, 1, dtype=torch.int32)))
    return TilePlan(tile, tile, 2 * tile, 2 * tile, listed, listed if partial else None, band if partial else None)


def test_the_cheapest_is_found_one_choice_after_the_other():
    asked = []

    def cost(entry):
        asked.append(entry)
        return abs(entry.described - 64) + abs(entry.warps - 4) + abs(entry.stages - 4) + abs(entry.persistent - 1)

    assert autotune.search(BASE, cost) == replace(BASE, described=64, warps=4, stages=4, persistent=1)
    assert len(asked) <= 12
    assert len(set(asked)) == len(asked)


def test_sizes_that_do_not_run_are_left_out():
    def cost(entry):
        return float("inf") if entry.described == 64 or entry.persistent else entry.warps

    best = autotune.search(BASE, cost)
    assert (best.described, best.warps, best.persistent) != (64, 4, 1)
    assert best.warps == 4
    assert autotune.search(BASE, lambda entry: float("inf")) == BASE


def test_entries_are_kept_by_gpu_and_kind(file):
    autotune.store("GPU one", "a", BASE)
    autotune.store("GPU one", "b", replace(BASE, stages=4))
    autotune.store("GPU two", "a", replace(BASE, stages=2))
    found = autotune._entries(autotune.path())
    assert {key: entry.stages for key, entry in found.items()} == {
        ("GPU one", "a"): 3, ("GPU one", "b"): 4, ("GPU two", "a"): 2,
    }  # fmt: skip
    assert json.loads(file.read_text())["version"] == autotune.VERSION
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_no_file_and_another_version_are_an_empty_table(file):
    assert autotune._entries(file) == {}
    autotune.store("GPU", "a", BASE)
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    autotune._entries.cache_clear()
    assert autotune._entries(file) == {}


BROKEN = ["", "{", "[]", '{"version": 1}', '{"version": 1, "entries": {"a|b": {"block_q": 1}}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_and_can_be_replaced(file, text):
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"is no tuning file.*Delete it"):
        assert autotune._entries(file) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autotune._entries(file) == {}
        autotune.store("GPU", "a", BASE)
    assert autotune._entries(file) == {("GPU", "a"): BASE}


def test_kinds_of_calls_differ_where_the_kernel_does():
    q = torch.zeros(1, 1, 256, 72, dtype=torch.bfloat16)
    kinds = {
        autotune.kind(made, x, dim)
        for made in (plan(), plan(64), plan(partial=True), replace(plan(), kv_order=torch.arange(256)))
        for x in (q, q.float())
        for dim in (64, 72)
    }
    assert len(kinds) == 16
    assert autotune.kind(plan(), q, 72) == autotune.kind(plan(), q, 128) == "16bit-d128-q128-k128-full"


def test_the_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv(autotune.VARIABLE)
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.path() == tmp_path / "dit_accel" / "tuning.json"


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autotune.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None and not os.environ.get("CI"), reason="needs Triton")
def test_warm_measures_once_and_calls_then_use_it(monkeypatch):
    """On tensors that say they are on a GPU: what a launch takes is the invented time of its entry."""
    from dit_accel.kernels.block_sparse import triton as tier

    class Fake:
        device = torch.device("cuda:0")
        dtype, shape = torch.bfloat16, torch.Size((1, 2, 256, 128))
        element_size = torch.zeros(1, dtype=dtype).element_size

    launched = []
    monkeypatch.setattr(tier, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "An H200")
    monkeypatch.setattr(autotune, "gpu", lambda device: "An H200 sm90")
    monkeypatch.setattr(tier, "attention", lambda *args, entry, **how: launched.append(entry))

    def timer(launch):
        launch()
        if launched[-1].stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return 2.0 if launched[-1].described == 128 else 1.0

    q = Fake()
    assert tier.tuned(plan(), q, 128) == tuning((9, 0), 128, 2, 128, 128)
    best = autotune.warm(plan(), q, q, q, timer=timer)
    assert best.described == 64
    assert best.stages != 4
    count = len(launched)
    assert 5 < count <= 12
    assert autotune.warm(plan(), q, q, q, timer=timer) == best == tier.tuned(plan(), q, 128)
    assert len(launched) == count
    assert tier.tuned(plan(64), q, 128) != best
    autotune.warm(plan(), q, q, q, timer=timer, again=True)
    assert len(launched) > count
    assert autotune.warm(plan(), torch.zeros(1, 2, 256, 128), q, q) is None
