"""The benchmark's cases: every section has some, each once, each with a known shape and method."""

import pytest

from dit_accel.eval.kernels.cases import SECTIONS, SHAPES, cases
from dit_accel.eval.kernels.subjects import method_of, tensors
from dit_accel.layout import Layout


@pytest.mark.filterwarnings("ignore:Clear is experimental")
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_names_shapes_and_methods_that_exist(section):
    found = cases(section)
    assert found
    assert len({case.key for case in found}) == len(found)
    for case in found:
        assert case.section == section
        assert case.shape in SHAPES
        if case.method is not None:
            grid = (1, 8, 12) if SHAPES[case.shape].grid[0] == 1 else (3, 8, 12)
            method_of(case.method, case.density, Layout(grid)).check(Layout(grid))


def test_the_lengths_double_from_8k_to_128k():
    assert [SHAPES[f"{n}k"].layout.tokens for n in (8, 16, 32, 64, 128)] == [8192 * 2**i for i in range(5)]


def test_tensors_have_local_structure():
    shape = SHAPES["cogvideox"].__class__((4, 8, 8), heads=2, dim=32, text=3)
    q, k, v = tensors(shape, "cpu")
    assert q.shape == k.shape == v.shape == (1, 2, 259, 32)
    scores = (q @ k.mT)[0, 0, :256, :256]
    near, far = scores.diagonal(1).mean(), scores.diagonal(128).mean()
    assert near > far + 5
    assert not q[0, 0].equal(q[0, 1])
