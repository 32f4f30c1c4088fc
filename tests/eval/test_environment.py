import json
from types import SimpleNamespace

import torch

from dit_accel.eval import environment as module
from dit_accel.eval.environment import differences, environment, tiers


def test_everything_is_plain_json_and_the_safe_tiers_work(monkeypatch):
    monkeypatch.setattr(module, "_flex", lambda: None)
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "versions",
        "cpu",
        "gpus",
        "tiers",
        "dense_kernels",
        "optional_packages",
        "model",
        "variables",
    }
    assert found["tiers"]["gather"] == found["tiers"]["reference"] == {"usable": True}
    assert found["versions"]["torch"]
    assert found["cpu"]["cores"] >= 1


def test_differences_are_of_what_times_depend_on(monkeypatch):
    monkeypatch.setattr(module, "_flex", lambda: None)
    here = environment()
    there = json.loads(json.dumps(here))
    assert differences(there, here) == []
    there["cpu"]["threads"] = 96
    there["gpus"]["cuda:7"] = "H200"
    there["variables"]["HF_HOME"] = "elsewhere"
    there["model"]["bundled"] = "missing"
    threads = here["cpu"]["threads"]
    assert differences(there, here) == [
        f"cpu.threads (96 there, {threads} here)", "gpus.cuda:7 (H200 there, None here)",
    ]  # fmt: skip


def test_an_unusable_tier_says_why(monkeypatch):
    monkeypatch.setattr(module, "_flex", lambda: "no C++ compiler")
    assert tiers()["flex"] == {"usable": False, "why": "no C++ compiler"}


def test_an_absent_package_is_none_and_nothing_is_imported(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    assert module._optional("a_package_that_is_not_there") is None
    module._optional("matplotlib")
    assert "matplotlib" not in sys.modules


def test_a_missing_model_is_told(monkeypatch):
    from dit_accel.pipelines import mini

    def absent():
        raise FileNotFoundError("nothing here")

    monkeypatch.setattr(mini, "path", absent)
    assert module._bundled() == "missing (nothing here)"


def test_accelerators_other_than_nvidia_are_told_which_tier_they_get(monkeypatch):
    properties = SimpleNamespace(name="MI300X", gcnArchName="gfx942", major=9, minor=4, total_memory=192 * 2**30)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.version.hip", "6.4")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.xpu.device_count", lambda: 1)
    monkeypatch.setattr("torch.xpu.get_device_name", lambda index: "Arc B580")
    found = module.gpus()
    assert set(found) == {"cuda:0", "mps", "xpu:0"}
    assert all("gather tier" in text for text in found.values())
    assert "gfx942, ROCm" in found["cuda:0"]
    monkeypatch.setattr("torch.version.hip", None)
    assert module.gpus()["cuda:0"] == "MI300X, sm94, 192 GiB"


def test_rocm_gets_no_triton_kernel(monkeypatch):
    """Its devices call themselves cuda, with capabilities that would pass."""
    from dit_accel.kernels.block_sparse import triton as tier

    monkeypatch.setattr(tier, "interpreted", lambda: False)
    monkeypatch.setattr("torch.version.hip", "6.4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 4))
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 1, 64, 64))
    assert "ROCm" in tier.refuses(query, None)
    monkeypatch.setattr("torch.version.hip", None)
    assert tier.refuses(query, None) is None
