"""What is kept of a search, with a timer that invents its times."""

import importlib.util
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from simulated import Simulated

from dit_accel.kernels import Band, BlockList, Predicate, TilePlan, autotune, timing
from dit_accel.kernels.faults import DeviceLost
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
    assert autotune.search(BASE, lambda entry: float("inf")) is None


def test_a_base_that_does_not_run_gives_way_to_one_that_does():
    best = autotune.search(BASE, lambda entry: 1.0 if entry.described == 64 else float("inf"))
    assert best == replace(BASE, described=64)


def test_less_than_the_spread_is_no_gain():
    assert autotune.search(BASE, lambda entry: 1.0 if entry == BASE else 0.99) == BASE
    assert autotune.search(BASE, lambda entry: 1.0 if entry == BASE else 0.9) != BASE


def test_a_wrong_entry_is_never_taken_however_fast():
    asked = []

    def right(entry):
        asked.append(entry)
        return entry.warps == 8

    best = autotune.search(BASE, lambda entry: entry.warps + entry.stages, right)
    assert best.warps == 8
    assert best.stages == 2
    assert asked[0] == BASE
    assert any(entry.warps == 4 for entry in asked)


def test_the_distance_of_two_outputs():
    a = torch.randn(2, 3, 5, 7)
    assert autotune.distance(a, a) == 0
    assert autotune.distance(1.5 * a, a) == pytest.approx(0.5)
    hole = a.clone()
    hole[1, 2, 3] = torch.nan
    assert autotune.distance(hole, a) == float("inf")
    assert autotune.distance(a, hole) == 0
    assert autotune.distance(a, torch.zeros_like(a)) > 1


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


VERSION = f'"version": {autotune.VERSION}'
BROKEN = ["", "{", "[]", f"{{{VERSION}}}", f'{{{VERSION}, "entries": {{"a|b": {{"block_q": 1}}}}}}']


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
    assert autotune.kind(plan(), q, 72) == autotune.kind(plan(), q, 128) == "16bit-d128-q128-k128-full-to1k"


def test_lengths_fall_into_few_classes():
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
    kinds = [
        autotune.kind(replace(plan(), n_q=n_q, n_k=n_k), q, 64).rsplit("-", 1)[1]
        for n_q, n_k in ((1024, 1), (1025, 1), (4096, 4096), (1, 4097), (16384, 1), (16385, 1), (131072, 131072))
    ]
    assert kinds == ["to1k", "to4k", "to4k", "to16k", "to16k", "over16k", "over16k"]


def test_the_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv(autotune.VARIABLE)
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.path() == tmp_path / "dit_accel" / "tuning.json"


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autotune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


class Faked:
    """A tensor that says it is on a GPU. ``launched``: the entries of all launches; ``answer``: what one gives."""

    device = torch.device("cuda:0")
    dtype, shape = torch.bfloat16, torch.Size((1, 2, 256, 128))
    element_size = torch.zeros(1, dtype=dtype).element_size

    def __init__(self):
        self.launched = []
        self.answer = lambda entry: torch.ones(1, 2, 3, 4)

    def launch(self, *args, entry, **how):
        self.launched.append(entry)
        return self.answer(entry), None


@pytest.fixture
def faked(monkeypatch):
    if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
        pytest.skip("needs Triton")
    from dit_accel.kernels.block_sparse import triton as tier

    made = Faked()
    monkeypatch.setattr(tier, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "An H200")
    monkeypatch.setattr(autotune, "gpu", lambda device: "An H200 sm90")
    monkeypatch.setattr(tier, "attention", made.launch)
    return made


def test_warm_measures_once_and_calls_then_use_it(faked):
    """On tensors that say they are on a GPU: what a launch takes is the invented time of its entry."""
    from dit_accel.kernels.block_sparse import triton as tier

    launched = faked.launched

    def timer(launch):
        launch()
        if launched[-1].stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return 2.0 if launched[-1].described == 128 else 1.0

    q = faked
    assert tier.tuned(plan(), q, 128) == tuning((9, 0), 128, 2, 128, 128)
    best = autotune.warm(plan(), q, q, q, timer=timer)
    assert best.described == 64
    assert best.stages != 4
    count = len(launched)
    assert 5 < count <= 15
    assert autotune.warm(plan(), q, q, q, timer=timer) == best == tier.tuned(plan(), q, 128)
    assert len(launched) == count
    assert tier.tuned(plan(64), q, 128) != best
    autotune.warm(plan(), q, q, q, timer=timer, again=True)
    assert len(launched) > count
    assert autotune.warm(plan(), torch.zeros(1, 2, 256, 128), q, q) is None


def test_what_could_not_be_measured_is_not_kept(faked, file):
    def timer(launch):
        raise RuntimeError("no kernel image\nmore")

    with pytest.warns(UserWarning, match=r"nothing ran for 16bit-d128.*RuntimeError: no kernel image\)"):
        assert autotune.warm(plan(), faked, faked, faked, timer=timer) is None
    assert not file.exists()


def test_a_fast_entry_with_another_output_is_warned_of_and_left_out(faked):
    faked.answer = lambda entry: torch.ones(1, 2, 3, 4) * (1.5 if entry.described == 64 else 1.001)

    def timer(launch):
        launch()
        return {64: 1.0, 128: 2.0}[faked.launched[-1].described]

    with pytest.warns(UserWarning, match=r"described=64.* is off by 5.0e-01 for 16bit"):
        best = autotune.warm(plan(), faked, faked, faked, timer=timer)
    assert best.described == 128


def test_a_broken_device_ends_the_search(faked, file):
    def timer(launch):
        launch()
        if len(faked.launched) > 2:
            raise torch.AcceleratorError("illegal address")
        return 1.0

    with pytest.raises(DeviceLost):
        autotune.warm(plan(), faked, faked, faked, timer=timer)
    assert len(faked.launched) == 3
    assert not file.exists()


def test_the_time_of_a_launch_is_the_devices(monkeypatch):
    device = Simulated().install(monkeypatch, timing)
    assert autotune._time(lambda: device.work(4e-4, 1e-4)) == pytest.approx(1e-4)
    timing.cycles_per_second.cache_clear()


@pytest.mark.parametrize("missing", [False, True])
def test_a_kind_without_an_entry_ends_with_1(monkeypatch, capsys, missing):
    """Every length, head dim and tile is asked for on the GPU."""
    asked = []

    def warm(plan, q, k, v, *, again):
        asked.append((autotune.kind(plan, q, q.shape[-1]), again))
        return None if len(asked) == 1 else BASE

    plain = {name: getattr(torch, name) for name in ("randn", "rand")}
    for name, made in plain.items():
        monkeypatch.setattr(torch, name, lambda *shape, device, made=made, **how: made(1).expand(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(autotune, "warm", warm)
    assert autotune.main(["--missing"] if missing else []) == 1
    assert len(set(asked)) == 12
    assert capsys.readouterr().out.count("None") == 1
    assert {again for _, again in asked} == {not missing}
