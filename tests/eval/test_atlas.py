"""The mask atlas: numbers against the plan's own, pictures at every size, parameters from text."""

import builtins
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from dit_accel import Layout, Radial, RandomBlocks, plan
from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.eval import atlas
from dit_accel.eval.atlas import FULL, PARTIAL, Panel, layout_for, panel, synthetic_tensors
from dit_accel.eval.atlas_figure import draw, save
from dit_accel.eval.method_spec import build, describe
from dit_accel.kernels import BlockList
from dit_accel.methods import REGISTRY, Method
from dit_accel.plans import Blocks, Plan

ODD = Layout(grid=(3, 5, 7), text=9, text_first=True)


@dataclass(frozen=True)
class Nearest(Method):
    """Looks at q and k: each block of queries keeps the block of keys it likes best."""

    static: ClassVar[bool] = False
    block_size: int = 8

    def plan(self, q, k, v, call):
        blocks = Blocks.uniform(call.layout.tokens, self.block_size)
        pooled = [torch.stack([b.mean(0) for b in x[0, 0].split(self.block_size)]) for x in (q, k)]
        best = (pooled[0] @ pooled[1].T).argmax(1)
        mask = torch.nn.functional.one_hot(best, blocks.count).bool()
        return Plan(call.layout, blocks, blocks, BlockList.from_mask(mask[None, None]))


@pytest.mark.parametrize("method", [
    Radial(block_size=16), Radial(block_size=16, rule="paper"), RandomBlocks(block_size=32, seed=3),
])  # fmt: skip
def test_the_numbers_are_those_of_the_plan(method):
    found, made = panel(method, ODD, query=(2, 1, 6)), plan(None, None, None, method, layout=ODD)
    mask = made.token_mask()[0, 0]
    row = mask[9 + (2 * 5 + 1) * 7 + 6]
    assert np.array_equal(found.seen.ravel(), row[9:].numpy())
    assert found.seen_outside == int(row[:9].sum())
    assert found.outside == 9
    assert found.density == pytest.approx(mask.float().mean().item())
    assert found.density_video == pytest.approx(mask[9:, 9:].float().mean().item())
    assert np.array_equal(found.blocks > 0, made.block_mask[0, 0].numpy())
    assert found.counts["full"] == int(made.full.count.sum())
    assert sum(found.counts.values()) == found.blocks.size
    assert made.q_blocks.owner()[9 + (2 * 5 + 1) * 7 + 6] == found.query_block


def test_the_densities_of_too_many_partial_pairs_are_estimated_and_said_so(monkeypatch):
    exact = panel(Radial(block_size=16, rule="paper"), ODD)
    monkeypatch.setattr(atlas, "COUNT_LIMIT", 0)
    found = panel(Radial(block_size=16, rule="paper"), ODD)
    assert (exact.estimated, found.estimated) == (False, True)
    assert found.density == pytest.approx(exact.density, rel=0.02)
    assert found.density_video == pytest.approx(exact.density_video, rel=0.02)
    assert found.to_dict()["density_estimated"]
    assert any("≈" in text.get_text() for text in draw([found]).texts)


def test_a_density_is_solved_or_set():
    radial, random = panel(Radial(), layout_for("mini"), density=0.25), panel(RandomBlocks(), ODD, density=0.3)
    assert radial.density == pytest.approx(0.25, rel=0.2)
    assert radial.target == 0.25
    assert random.method.density == 0.3


def test_methods_that_look_at_tensors_get_made_up_ones_and_the_picture_says_so():
    found = panel(Nearest(), ODD)
    assert found.synthetic
    assert found.to_dict()["synthetic_tensors"]
    assert any("made-up" in text.get_text() for text in draw([found]).texts)
    assert not panel(Radial(block_size=16), ODD).synthetic


def test_synthetic_tensors_repeat_and_have_structure():
    layout = Layout(grid=(4, 9, 12), text=5)
    (q, k, v), again = synthetic_tensors(layout, 1), synthetic_tensors(layout, 1)
    assert torch.equal(q, again[0])
    assert torch.equal(v, again[2])
    assert not torch.equal(q, synthetic_tensors(layout, 2)[0])
    attention = (q @ k.mT / 8).softmax(-1)[0, 0, layout.main, layout.main].view(4, 9, 12, 4, 9, 12)
    near, far = attention[1, 4, 6, 1, 3:6, 5:8].mean(), attention[1, 4, 6, 3, :2, :3].mean()
    assert near > 3 * far


@pytest.mark.parametrize(("family", "expected"), [
    ("wan", Layout(grid=(21, 30, 52))),
    ("hunyuan", Layout(grid=(33, 45, 80), text=256)),
    ("cogvideox", Layout(grid=(13, 30, 45), text=226, text_first=True)),
    ("flux", Layout(grid=(1, 64, 64), text=512, text_first=True)),
])  # fmt: skip
def test_a_family_brings_its_grid_and_text(family, expected):
    assert layout_for(family) == expected


def test_grid_and_text_replace_the_family_s():
    assert layout_for("cogvideox", (3, 4, 5), 7) == Layout(grid=(3, 4, 5), text=7, text_first=True)
    assert layout_for(None, (3, 4, 5)) == Layout(grid=(3, 4, 5))
    with pytest.raises(UsageError, match="unknown model family 'wam'; known: wan"):
        layout_for("wam")
    with pytest.raises(UsageError, match="give a grid like 21x30x52"):
        layout_for()


def test_a_query_outside_the_grid_is_refused():
    with pytest.raises(UsageError, match=r"got 3,0,0, allowed 0\.\.2,0\.\.4,0\.\.6"):
        panel(Radial(), ODD, query=(3, 0, 0))


def png(path):
    from matplotlib.image import imread

    return imread(path)


def test_pictures_are_written_in_the_size_that_the_panels_need(tmp_path):
    panels = [panel(Radial(block_size=16), ODD), panel(RandomBlocks(block_size=32), ODD)]
    one, two = save(panels[:1], tmp_path / "a" / "one.png", dpi=50), save(panels, tmp_path / "two.png", dpi=50)
    assert png(one).std() > 0.1
    assert png(two).shape[:2] == (400, 445)
    with pytest.raises(UsageError, match=r"must end in .png, .svg or .pdf"):
        save(panels, tmp_path / "one.jpeg2")
    with pytest.raises(UsageError, match="name at least one method"):
        draw([])


@pytest.mark.parametrize("number", [1, 2])
def test_no_heading_runs_into_its_map(number):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    panels = [panel(build(["pisa"], [])[0], Layout(grid=(4, 8, 8)))] * number
    assert panels[0].synthetic
    figure = draw(panels)
    FigureCanvasAgg(figure).draw()
    lowest = min(text.get_window_extent().y0 for text in figure.texts)
    assert lowest > max(axes.get_window_extent().y1 for axes in figure.axes)


def test_a_single_frame_and_a_plain_sequence_can_be_drawn(tmp_path):
    for layout in (Layout(grid=(1, 9, 13), text=3), Layout(grid=(1, 1, 40))):
        assert save([panel(RandomBlocks(block_size=8), layout)], tmp_path / "x.png", dpi=40).stat().st_size > 1000


def test_a_map_of_two_thousand_blocks_keeps_its_thin_lines(tmp_path):
    blocks = np.zeros((2000, 2000), dtype=np.uint8)
    blocks[:, 1000] = FULL
    blocks[np.arange(2000), np.arange(2000)] = PARTIAL
    layout = Layout(grid=(2, 250, 256))
    found = Panel(Radial(), layout, blocks, (64, 64), (1, 2, 3), 5, np.ones((2, 250, 256), dtype=bool), 0, 0.001, 0.001)
    start = time.process_time()
    image = png(save([found], tmp_path / "large.png", dpi=100))[..., :3]
    assert time.process_time() - start < 10
    background = np.array([0xF1, 0xF2, 0xF4]) / 255
    # A column of one block in 2000 is narrower than a pixel, and still there on every line of the map.
    row = image[300, 60:400]
    assert (np.abs(row - background).max(-1) > 0.03).sum() >= 2


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    found = panel(Radial(block_size=16), ODD)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedError, match=r'pip install "dit-accel\[report\]"'):
        draw([found])


def test_specs_and_settings_make_methods():
    assert build(["radial"]) == [Radial()]
    made = build(["radial", "radial:rule=upstream:decay=1", "random-blocks"], ["block_size=64", "radial.decay=0.5"])
    assert made == [
        Radial(decay=0.5, block_size=64), Radial(decay=1, block_size=64, rule="upstream"), RandomBlocks(block_size=64)
    ]  # fmt: skip
    assert build(["radial:variant=none"]) == [Radial()]


def test_tuples_presets_and_lone_values():
    if "gna" not in REGISTRY:
        pytest.skip("no GNA in this build")
    gna = REGISTRY["gna"]
    assert build(["gna:window=5,7,9:stride=1"]) == [gna(window=(5, 7, 9), stride=1)]
    assert build(["gna"], ["window=5"]) == [gna(window=5)]
    assert build(["gna:preset=cosmos"]) == [gna.preset("cosmos")]
    assert build(["gna:causal=true,false,false:window=3"])[0].causal == (True, False, False)


def test_every_method_can_be_named_and_described():
    assert describe(Radial()) == "defaults"
    gna = REGISTRY["gna"]
    assert describe(gna(window=(3, 5, 5), dilation=(1, 1, 1))) == describe(gna(window=(3, 5, 5)))
    assert describe(Radial(decay=0.25, rule="upstream")) == "decay=0.25, rule=upstream, variant=wan"


@pytest.mark.parametrize(("specs", "settings", "message"), [
    (["radail"], [], "did you mean 'radial'"),
    (["radial:blok=3"], [], "no parameter 'blok'; allowed are radial: decay, block_size"),
    (["radial"], ["widow=3"], "no parameter 'widow'; allowed are radial: decay, block_size"),
    (["radial:decay=abc"], [], "radial.decay takes float; got 'abc'"),
    (["radial:block_size=1.5"], [], "radial.block_size takes int; got '1.5'"),
    (["radial:block_size"], [], "written radial:PARAMETER=VALUE"),
    (["radial"], ["block_size="], "written PARAMETER=VALUE or METHOD.PARAMETER=VALUE; got 'block_size='"),
    (["radial"], ["random-blocks.seed=1"], "sets a method that is not asked for; the methods here: radial"),
    (["radial"], ["radial.seed=1"], "no parameter 'seed'; allowed are radial:"),
    (["radial:rule=bold"], [], "choose one of safe, upstream, paper"),
])  # fmt: skip
def test_what_a_spec_may_not_say(specs, settings, message):
    with pytest.raises(UsageError, match=message):
        build(specs, settings)
