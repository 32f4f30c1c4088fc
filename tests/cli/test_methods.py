import json

from dit_accel.cli import main
from dit_accel.methods import REGISTRY, Radial


def test_every_method_is_listed_with_a_line_and_its_defaults(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in REGISTRY:
        assert any(line.startswith(name) and len(line) > len(name) + 10 for line in text.splitlines())
    assert f"decay = {Radial().decay}" in text
    assert text.splitlines()[-1].startswith("dense")


def test_json(capsys):
    assert main(["methods", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "methods")
    methods = {m["name"]: m for m in document["methods"]}
    assert set(methods) == set(REGISTRY)
    assert methods["radial"]["parameters"]["block_size"] == Radial().block_size
    assert methods["all-blocks"]["for_tests"]
    assert not methods["radial"]["for_tests"]


def test_one_method_in_full(capsys):
    assert main(["methods", "radial"]) == 0
    text = capsys.readouterr().out
    assert "Defaults:" in text
    assert "random-blocks" not in text


def test_an_unknown_method_gets_a_suggestion(capsys):
    assert main(["methods", "radail"]) == 2
    assert "did you mean 'radial'?" in capsys.readouterr().err
