import json

from dit_accel.pipelines import sidecar


def test_what_is_not_ours_is_none(tmp_path):
    path = tmp_path / "a.json"
    assert sidecar.read(path) is None
    for text in ("", "[]", "{", '{"schema": 99}', "{}"):
        path.write_text(text)
        assert sidecar.read(path) is None
    sidecar.write(path, {"schema": 1, "prompt": "größer"})
    assert sidecar.read(path)["prompt"] == "größer"
    assert "größer" in path.read_text(encoding="utf-8")


def test_differences_are_told_by_their_path():
    old = {"steps": 20, "attention": {"method": {"decay": 0.2}}, "gif": False, "gone": 1}
    new = {"steps": 30, "attention": {"method": {"decay": 0.2, "block": 64}}, "gif": False}
    assert sidecar.differences(old, new) == ["steps: 20 -> 30", "attention.method.block: null -> 64", "gone: 1 -> null"]
    assert sidecar.differences(old, json.loads(json.dumps(old))) == []
    assert sidecar.differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert sidecar.differences({"attention": None}, {"attention": {"x": 1}}) == ["attention.x: null -> 1"]


def test_versions_name_what_made_the_output():
    assert {"dit_accel", "python", "torch", "diffusers"} <= set(sidecar.versions())
