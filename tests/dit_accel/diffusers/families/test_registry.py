"""Which row serves a class: ours, those of entry points, and what is told where there is none."""

import re

import diffusers
import pytest
import torch
from tiny_families import tiny

from dit_accel import AllBlocksProcessor, Layout, Schedule, UnsupportedError
from dit_accel.diffusers import engines, family_of, set_attn_processor
from dit_accel.diffusers.families import Family, registry


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    return registry._FAMILIES


class Strange(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
        for layer in self.layers:
            layer.attn = torch.nn.Module()
            layer.attn.processor = object()

    def forward(self, sample, sigma):
        return sample


def test_the_message_names_class_sites_and_arguments():
    with pytest.raises(UnsupportedError) as caught:
        family_of(Strange())
    message = str(caught.value)
    for part in (
        "Strange",
        "register_family",
        "hunyuan-video",
        r"layers\\.\\d+\\.attn",
        "reads=('sample',)",
        "timestep:",
    ):
        assert part in message


def test_linear_attention_is_no_site():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="none of its attention can run sparse") as caught:
        family_of(model)
    assert "register_family" not in str(caught.value)
    assert r"Not a site: transformer_blocks\.\d+\.attn1" in str(caught.value)


@torch.no_grad()
def test_the_row_proposed_for_a_forgotten_video_model_runs_as_it_stands(own_registry):
    case = tiny("cosmos")
    family = own_registry.pop("CosmosTransformer3DModel")
    with pytest.raises(UnsupportedError) as caught:
        family_of(case.model)
    lines = str(caught.value).split("\n")
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))
    exec(code, {})
    proposed = family_of(case.model)
    assert (proposed.sites, proposed.cross_sites) == (family.sites, family.cross_sites)
    set_attn_processor(case.model, AllBlocksProcessor(schedule=Schedule.none(), block_size=16, backend="gather"))
    case.model(**case.call)
    assert engines(case.model)[0].forward.layout == case.layout
    assert engines(case.model)[0].stats.sparse == 2


class Point:
    """What importlib.metadata gives for an entry point."""

    def __init__(self, name, found):
        self.name, self.value, self.found = name, f"package:{name}", found

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def row(name, model):
    return Family(name, (model,), r"x", (), lambda config: Layout(grid=(1, 1, 1)))


def test_rows_come_from_entry_points_and_a_broken_one_is_named(own_registry, monkeypatch, caplog):
    points = [
        Point("one", row("one", "OneModel")),
        Point("broken", ImportError("no such module")),
        Point("thief", [row("thief", "WanTransformer3DModel")]),
        Point("strange", [1]),
        Point("two", [row("two", "TwoModel"), row("three", "ThreeModel")]),
    ]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda *, group: asked.append(group) or points)
    registry._load_plugins.cache_clear()
    names = {family.name for family in registry.known_families()}
    registry.known_families()
    assert asked == ["dit_accel.families"]
    assert {"one", "two", "three", "wan"} <= names
    assert not {"thief", "broken", "strange"} & names
    assert own_registry["WanTransformer3DModel"].name == "wan"
    left_out = [re.search(r"entry point (\w+) = ", record.message)[1] for record in caplog.records]
    assert left_out == ["broken", "thief", "strange"]
    assert family_of(type("OneModel", (torch.nn.Module,), {})()).name == "one"


def test_a_row_says_where_its_text_is():
    with pytest.raises(ValueError, match="allowed: 'none', 'first', 'last'"):
        Family("f", ("F",), r"x", (), lambda config: None, text="middle")
