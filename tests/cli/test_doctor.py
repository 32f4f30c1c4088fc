import json

import pytest

from dit_accel.cli import main
from dit_accel.eval import environment


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """Compiling the self-check takes seconds and has tests of its own."""
    monkeypatch.setattr(environment, "_flex", lambda: "the CPU lacks AVX2")


def test_text_says_what_works_and_why_not(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "flex              not usable: the CPU lacks AVX2" in text
    assert "gather            usable" in text
    for word in ("torch", "C++ compiler", "flash-attn", "bundled"):
        assert word in text


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "doctor")
    assert document["tiers"]["flex"] == {"usable": False, "why": "the CPU lacks AVX2"}
    assert "triton" in document["optional_packages"]
