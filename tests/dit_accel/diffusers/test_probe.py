"""The probe: the row it finds is the row we wrote, and it never guesses."""

import pytest
import torch
from tiny_families import tiny

from dit_accel import AllBlocksProcessor, Layout, Schedule, UnsupportedError
from dit_accel.diffusers import engines, family_of, ops, probe_family, register_family, set_attn_processor
from dit_accel.diffusers.families import registry

FOUND = ("wan-vace", "anyflow", "kandinsky5", "cogvideox-1-5", "hunyuan-video", "cosmos-2", "pixart", "cogview4")


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    return registry._FAMILIES


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_a_forgotten_row_is_found_again(name, own_registry):
    case = tiny(name, batch=1)
    written = family_of(case.model)
    before = {name: module.processor for name, module in case.model.named_modules() if hasattr(module, "processor")}
    held = set(ops.ENGINES)
    found = probe_family(case.model, case.call)
    after = {name: module.processor for name, module in case.model.named_modules() if hasattr(module, "processor")}
    assert all(after[name] is processor for name, processor in before.items())
    assert set(ops.ENGINES) <= held
    assert found.layout == case.layout
    assert found.family.text == written.text
    assert found.family.find_sites(case.model) == written.find_sites(case.model)
    assert found.family.find_cross_sites(case.model) == written.find_cross_sites(case.model)
    assert found.family.image == written.image
    del own_registry[type(case.model).__name__]
    register_family(found.family)
    stock = case.out(case.model(**case.call))
    set_attn_processor(case.model, AllBlocksProcessor(schedule=Schedule.none(), block_size=16, backend="gather"))
    assert (case.out(case.model(**case.call)) - stock).abs().max() < 1e-5
    stats = engines(case.model)[0].stats
    assert (stats.sparse, stats.dense) == (len(stats.layers), {})


@pytest.mark.parametrize("name", ["cogvideox-1-5", "cosmos"])
def test_the_row_as_python_is_the_same_row(name, own_registry):
    case = tiny(name, batch=1)
    found = probe_family(case.model, case.call, name="mine")
    del own_registry[type(case.model).__name__]
    exec(str(found), {})
    row = family_of(case.model)
    assert (row.name, row.sites, row.reads, row.text) == (
        "mine",
        found.family.sites,
        found.family.reads,
        case_text(case),
    )
    latents, *rest = (case.call[name] for name in row.reads)
    assert row.layout(None, latents, *rest) == case.layout
    assert row.layout(None, latents[..., :4], *rest).grid == (*case.layout.grid[:2], 2), "not the probed size only"


def case_text(case):
    return "none" if not case.layout.text else ("first" if case.layout.main.start else "last")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ltx", "tokens of 'hidden_states' are 105 in one run"),
        ("helios", r"are 86 \+ a grid of \(3, 5, 6\) from 'hidden_states' \+ 0"),
        ("easyanimate", r"are 9 \+ a grid of \(3, 5, 6\) from 'hidden_states' \+ 0"),
        ("motif-video-decoder", "maps its positions to single tokens"),
    ],
)
def test_what_cannot_be_followed_is_told_and_not_guessed(name, words):
    case = tiny(name, batch=1)
    with pytest.raises(UnsupportedError, match=words):
        probe_family(case.model, case.call)


def test_a_model_without_softmax_attention():
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(UnsupportedError, match="no self-attention call"):
        probe_family(Nothing(), {"x": torch.zeros(1, 2, 3)})


def test_tokens_that_are_not_row_major_are_no_grid():
    """The same model with its tokens backwards: the strides say so, and nothing is proposed."""
    case = tiny("cosmos", batch=1)
    embed = case.model.patch_embed.forward
    case.model.patch_embed.forward = lambda x: (
        embed(x).flatten(1, 3)[:, torch.arange(90).flip(0)].reshape(1, 3, 5, 6, -1)
    )
    with pytest.raises(UnsupportedError, match="single tokens"):
        probe_family(case.model, case.call)
    assert case.layout == Layout(grid=(3, 5, 6))
