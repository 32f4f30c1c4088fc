"""Radial: conformance with the released mask, the paper's counts, and what the safe rule promises."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.lowering import lower
from dit_accel.methods import ModelFacts, Radial, RandomBlocks
from dit_accel.methods.radial import half_width, kept, nominal_width, paper_reach


def plan(method, layout):
    return make(None, None, None, method, layout=layout)


def block_mask(method, frames, tokens, text=0):
    return plan(method, Layout((frames, 1, tokens), text=text)).block_mask[0, 0]


def upstream(block, decay, variant="wan"):
    return Radial(decay=decay, block_size=block, rule="upstream", variant=variant)


# Facts read off the released mask builder (mit-han-lab/radial-attention 72788d4), run on CPU.
@pytest.mark.parametrize(
    ("frames", "tokens", "block", "decay", "true", "digest"),
    [
        (6, 256, 128, 1.0, 140, "faab63b7afaa26e5"),
        (9, 640, 128, 0.2, 1437, "e5ae674a25d4f52b"),
        (40, 128, 128, 1.0, 427, "d97934721d047b00"),
        (4, 160, 64, 0.2, 94, "0e2b32fe10c17b01"),
    ],
)
def test_upstream_rule_is_bit_exact(frames, tokens, block, decay, true, digest):
    mask = block_mask(upstream(block, decay), frames, tokens)
    assert int(mask.sum()) == true
    assert hashlib.sha256(np.packbits(mask.numpy()).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("frames", "tokens", "block", "decay", "variant", "true"),
    [
        (18, 3840, 128, 0.2, "wan", 83_728),
        (20, 3840, 64, 0.8, "wan", 502_720),
        (30, 3840, 128, 0.95, "hunyuan", 222_452),
    ],
)
def test_upstream_block_counts_at_published_sizes(frames, tokens, block, decay, variant, true):
    assert int(block_mask(upstream(block, decay, variant), frames, tokens).sum()) == true


@pytest.mark.parametrize(
    ("frames", "tokens", "block", "decay", "variant", "sparsity"),
    [
        (21, 3600, 128, 0.2, "wan", 0.7378),
        (21, 3600, 128, 1.0, "wan", 0.6035),
        (21, 1560, 128, 0.2, "wan", 0.6613),
        (21, 1560, 64, 0.2, "wan", 0.7319),
        (64, 3600, 128, 0.95, "hunyuan", 0.8250),
        (64, 3600, 128, 1.0, "wan", 0.8083),
        (128, 3600, 128, 0.95, "hunyuan", 0.8926),
    ],
)
def test_upstream_sparsity_where_frames_straddle_blocks(frames, tokens, block, decay, variant, sparsity):
    whole = frames * tokens // block
    mask = block_mask(upstream(block, decay, variant), frames, tokens)[:whole, :whole]
    assert 1 - mask.float().mean().item() == pytest.approx(sparsity, abs=5e-5)


def test_r1_one_block_per_frame_leaves_power_of_two_distances_and_the_sink():
    mask = block_mask(upstream(128, 1.0), 40, 128)
    seen = {row: torch.nonzero(mask[row]).flatten().tolist() for row in (0, 20, 39)}
    assert seen[0] == [0, 1, 2, 4, 8, 16, 32]
    assert seen[20] == [0, 4, 12, 16, 18, 19, 20, 21, 22, 24, 28, 36]
    assert seen[39] == [0, 7, 23, 31, 35, 37, 38, 39]


@pytest.mark.parametrize("method", [upstream(128, 1.0, "hunyuan"), Radial(decay=1.0, sink_frames=0)])
def test_r1_decimation_goes_on_where_a_band_is_less_than_a_token(method):
    # One block per frame is seen at power-of-two distances; at 256 the width is half a token.
    assert torch.nonzero(block_mask(method, 258, 128)[0]).flatten().tolist() == [0, *(2**i for i in range(9))]


def test_r2_band_widths_and_decimation():
    widths = [round(half_width(d, 3600, 0.95, 128), 1) for d in (2, 3, 4, 7, 8, 15, 16, 20)]
    assert widths == [972.8, 972.8, 486.4, 486.4, 243.2, 243.2, 128, 128]
    assert [round(half_width(d, 1560, 0.8, 128), 1) for d in (2, 4, 8)] == [409.6, 204.8, 128]
    assert nominal_width(0, 4096) == 8192
    for tokens, at, factor in ((3600, 40, 2), (3600, 100, 4), (3600, 130, 8), (1560, 20, 2), (256, 5, 2), (256, 9, 4)):
        near = [d for d in range(at, at + 2 * factor) if kept(d, tokens)]
        assert near == [d for d in range(at, at + 2 * factor) if d % factor == 0]


@pytest.mark.parametrize("decay", [0.2, 0.8])
def test_r3_neighbours_and_sink_are_whole(decay):
    frames, tokens, block = 7, 512, 128
    mask = block_mask(upstream(block, decay), frames, tokens)
    per = tokens // block
    dense = [
        (i, j)
        for i in range(frames)
        for j in range(frames)
        if mask[i * per : (i + 1) * per, j * per : (j + 1) * per].all()
    ]
    assert len([pair for pair in dense if abs(pair[0] - pair[1]) <= 1 or pair[1] == 0]) == 4 * frames - 4


@pytest.mark.parametrize(
    ("frames", "tokens", "bare", "with_sink"),
    [(8, 8, 2816, 3024), (12, 4, 1180, 1296), (12, 8, 5152, 5584), (16, 4, 1772, 1944), (33, 4, 4716, 5140),
     (64, 2, 2700, 2928)],
)  # fmt: skip
def test_r4_paper_rule_counts(frames, tokens, bare, with_sink):
    for sinks, pairs in ((0, bare), (1, with_sink)):
        made = plan(Radial(rule="paper", block_size=16, sink_frames=sinks), Layout((frames, 1, tokens)))
        assert int(made.token_mask().sum()) == pairs
        assert made.density * (frames * tokens) ** 2 == pytest.approx(pairs)


def test_r5_paper_rule_grows_as_n_log_n():
    tokens = 64

    def pairs(frames):
        return sum(
            (2 if d else 1) * (frames - d) * sum(max(0, tokens - abs(o)) for o in range(-r, r + 1))
            for d in range(frames)
            if (r := paper_reach(d, tokens)) >= 0
        )

    growth = [pairs(2 * frames) / pairs(frames) for frames in (8, 32, 128)]
    assert growth == sorted(growth, reverse=True)
    assert growth[-1] < 2.3


def test_r6_two_sizes_in_one_process():
    small, large = (block_mask(upstream(128, d), t, 256) for t, d in ((6, 1.0), (9, 0.2)))
    assert (small.shape[0], large.shape[0]) == (12, 18)


def test_r7_short_frames_keep_their_neighbours():
    def adjacent(rule, **kwargs):
        mask = block_mask(Radial(decay=1.0, block_size=32, rule=rule, **kwargs), 6, 96)
        return bool(mask[9:12, 12:15].all())

    assert not adjacent("upstream")
    assert adjacent("safe")


geometry = st.tuples(st.integers(2, 9), st.integers(1, 9), st.integers(1, 13)).filter(lambda g: len(set(g)) > 1)


@settings(max_examples=60, deadline=None)
@given(geometry, st.sampled_from([16, 32, 64]), st.sampled_from([0.2, 1.0]), st.integers(0, 30), st.booleans())
def test_safe_rule_keeps_neighbours_sink_and_text_at_any_size(grid, block, decay, text, text_first):
    layout = Layout(grid, text=text, text_first=text_first)
    mask = plan(Radial(decay=decay, block_size=block), layout).token_mask()[0, 0]
    frame = torch.full((layout.tokens,), -1)
    frame[layout.main] = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
    video = frame >= 0
    near = ((frame[:, None] - frame[None, :]).abs() <= 1) | (frame[None, :] == 0)
    must = (near & video[:, None] & video[None, :]) | ~video[:, None] | ~video[None, :]
    assert bool(mask[must].all())


@settings(max_examples=60, deadline=None)
@given(geometry, st.sampled_from([16, 32, 64]), st.sampled_from([0.2, 1.0]), st.integers(0, 30))
def test_safe_rule_keeps_what_upstream_keeps(grid, block, decay, text):
    layout = Layout(grid, text=text)
    whole = grid[0] * grid[1] * grid[2] // block
    methods = Radial(decay=decay, block_size=block), upstream(block, decay)
    safe, released = (plan(method, layout).block_mask[0, 0] for method in methods)
    assert not (released & ~safe)[:whole, :whole].any()


@settings(max_examples=40, deadline=None)
@given(geometry, st.integers(0, 20), st.booleans(), st.integers(0, 2))
def test_paper_rule_equals_its_formula(grid, text, text_first, sinks):
    layout = Layout(grid, text=text, text_first=text_first)
    made = plan(Radial(rule="paper", block_size=16, sink_frames=sinks), layout)
    s = grid[1] * grid[2]
    brute = torch.ones((layout.tokens, layout.tokens), dtype=torch.bool)
    start = layout.main.start
    for q in range(grid[0] * s):
        for k in range(grid[0] * s):
            d, offset = abs(q // s - k // s), abs(q % s - k % s)
            power = 2 ** int(np.log2(max(d, 1)))
            band = power <= s and offset + 1 <= s / power
            line = d % int(np.ceil(power / s)) == 0 and offset == 0
            brute[start + q, start + k] = band or line or k // s < sinks
    assert torch.equal(made.token_mask()[0, 0], brute)
    assert made.density == pytest.approx(brute.float().mean().item(), rel=1e-5)


def test_density_is_solved_and_reported():
    layout = Layout((21, 30, 52))
    solved, reached = Radial().with_density(0.5, layout)
    assert reached == pytest.approx(0.5, rel=0.05)
    assert plan(solved, layout).density == reached


def test_the_bundled_grid_leaves_radial_at_most_a_quarter():
    assert plan(Radial(block_size=64), Layout((33, 8, 10))).density <= 0.25
    assert plan(Radial(), Layout((33, 8, 10))).density <= 0.25


def test_image_models_are_refused_without_a_grid_that_nobody_gave():
    with pytest.raises(UnsupportedError, match=r"^Flux makes single images.*one frame.*GNA or Pisa") as told:
        Radial().check_model(ModelFacts("Flux", {}, layers=2, image=True))
    assert "grid" not in str(told.value)
    Radial().check_model(ModelFacts("Wan", {}, layers=2))


def test_images_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"GNA or Pisa"):
        plan(Radial(), Layout((1, 32, 48), text=20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rule": "fast"}, "safe, upstream, paper"), ({"variant": "wan"}, "rule='upstream'"), ({"decay": 0}, "positive"),
     ({"rule": "upstream", "variant": "flux"}, "wan, hunyuan"), ({"block_size": 0}, "at least 1; got 0")],
)  # fmt: skip
def test_bad_parameters(settings, message):
    with pytest.raises(UsageError, match=message):
        Radial(**settings)


def test_upstream_rule_refuses_text_first():
    with pytest.raises(UnsupportedError, match="Use 'safe'"):
        plan(upstream(32, 1.0), Layout((3, 8, 9), text=7, text_first=True))


def test_plans_of_every_rule_survive_any_tile():
    layout = Layout((5, 6, 7), text=11)
    rules = Radial(block_size=32), upstream(32, 0.5), Radial(rule="paper", block_size=32)
    for method in (*rules, RandomBlocks(block_size=32)):
        made = plan(method, layout)
        for tile in ((32, 32), (16, 32), (24, 40), (64, 64)):
            assert torch.equal(lower(made, tile).token_mask(), made.token_mask()), (method, tile)
