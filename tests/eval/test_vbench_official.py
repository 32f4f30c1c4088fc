"""The official package by subprocess, with a stand-in that writes what it would write."""

import json
import sys

import pytest

from dit_accel.errors import DitAccelError, UsageError
from dit_accel.eval.vbench import CUSTOM, DIMENSIONS
from dit_accel.eval.vbench_official import WEIGHTS, cache_folder, doctor, run_official

PACKAGE = """
import json, os, pathlib
class VBench:
    def __init__(self, device, info, out):
        assert not isinstance(device, str)
        assert info.endswith("VBench_full_info.json")
        self.out = pathlib.Path(out)
    def evaluate(self, videos_path, name, dimension_list, local, read_frame, mode, **extra):
        (dimension,) = dimension_list
        if dimension == "motion_smoothness":
            raise RuntimeError("amt-s.pth is missing")
        assert ("imaging_quality_preprocessing_mode" in extra) == (dimension == "imaging_quality")
        assert os.environ["VBENCH_CACHE_DIR"]
        rows = [{"video_path": p, "video_results": 0.5} for p in sorted(os.listdir(videos_path))]
        (self.out / f"{name}_eval_results.json").write_text(json.dumps({dimension: [0.5, rows]}))
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A module path with stand-ins for vbench and what it imports; the interpreter is the one that runs the tests."""
    sources = {"vbench": PACKAGE, "torch": "class device:\n    def __init__(self, name): pass\n"}
    for name in ("vbench", "torch", "torchvision", "decord", "clip"):
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(sources.get(name, ""))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return sys.executable


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(3):
        (folder / f"a cat-{index}.mp4").touch()
    return folder


def test_the_doctor_names_what_each_dimension_lacks(environment, tmp_path):
    cache = tmp_path / "cache"
    ready = cache / "amt_model" / "amt-s.pth"
    ready.parent.mkdir(parents=True)
    ready.touch()
    found = doctor(environment, cache)["dimensions"]
    assert set(found) == set(DIMENSIONS) == set(WEIGHTS)
    assert found["motion_smoothness"] == {"ready": True, "missing": []}
    assert found["color"]["missing"] == [
        "module detectron2", str(cache / "grit_model" / "grit_b_densecap_objectdet.pth"),
    ]  # fmt: skip
    assert not found["scene"]["ready"]


def test_the_doctor_names_absent_modules(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = doctor(sys.executable, tmp_path)
    assert "module vbench" in found["dimensions"]["scene"]["missing"]
    assert found["environment"]["versions"]["torch"]
    with pytest.raises(UsageError, match="cannot run"):
        doctor(tmp_path / "no-python", tmp_path)


def test_one_failing_dimension_does_not_cost_the_others(environment, videos, tmp_path):
    told = []
    found = run_official(videos, tmp_path / "out", python=environment, mode="custom_input", cache=tmp_path,
                         dimensions=["motion_smoothness", "imaging_quality", "dynamic_degree"], device="cpu",
                         tell=told.append)  # fmt: skip
    assert told == ["motion_smoothness", "imaging_quality", "dynamic_degree"]
    assert found["failed"] == {"motion_smoothness": "RuntimeError: amt-s.pth is missing"}
    assert found["dimensions"]["vbench.imaging_quality"] == {"score": 0.5, "videos": 3}
    assert not found["complete"]
    assert "totals" not in found
    assert (tmp_path / "out" / "imaging_quality_eval_results.json").is_file()
    assert json.loads(json.dumps(found)) == found


def test_when_nothing_can_be_scored(environment, videos, tmp_path):
    with pytest.raises(DitAccelError, match=r"motion_smoothness: RuntimeError: amt-s.pth is missing.*doctor"):
        run_official(videos, tmp_path / "out", python=environment, dimensions=["motion_smoothness"], device="cpu")


def test_what_is_refused_before_anything_runs(environment, videos, tmp_path):
    with pytest.raises(UsageError, match="mode 'all' is unknown"):
        run_official(videos, tmp_path, python=environment, mode="all")
    with pytest.raises(UsageError, match="unknown VBench dimension beauty"):
        run_official(videos, tmp_path, python=environment, dimensions=["beauty"])
    with pytest.raises(UsageError, match="no mp4 or gif"):
        run_official(tmp_path / "absent", tmp_path, python=environment, dimensions=list(CUSTOM))


def test_the_cache_folder_follows_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder("elsewhere").name == "elsewhere"
    monkeypatch.delenv("VBENCH_CACHE_DIR")
    assert cache_folder().parts[-2:] == (".cache", "vbench")
