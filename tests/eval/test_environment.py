import json

from dit_accel.eval import environment as module
from dit_accel.eval.environment import environment, tiers


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
