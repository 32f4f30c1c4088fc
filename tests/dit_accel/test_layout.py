import pickle

import pytest

from dit_accel.errors import UsageError
from dit_accel.layout import Layout, Segment


def test_shorthand_equals_segments():
    assert Layout((3, 4, 5), text=7) == Layout(segments=(Segment("main", (3, 4, 5)), Segment("text", 7)))
    first = Layout((3, 4, 5), text=7, text_first=True, prefix=2)
    assert first == Layout(segments=[Segment("text", 7), Segment("prefix", 2), Segment("main", (3, 4, 5))])
    assert len({first, Layout((3, 4, 5), 7, True, 2)}) == 1


def test_where_the_tokens_are():
    layout = Layout((3, 4, 5), text=7, text_first=True, prefix=2)
    assert (layout.tokens, layout.text, layout.grid) == (69, 7, (3, 4, 5))
    assert layout.main == slice(9, 69)
    assert Layout(grid=(1, 1, 50)).main == slice(0, 50)


def test_survives_pickle_and_reads_well():
    layout = Layout((3, 4, 5), text=7)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert str(layout) == "main 3x4x5 + text 7"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"grid": (1, 2)}, {"grid": (0, 2, 3)}, {"grid": (1, 2, 3), "segments": ()}, {"segments": [Segment("text", 3)]},
     {"segments": [Segment("main", 3)]}, {"segments": [Segment("main", (1, 2, 3)), Segment("text", 0)]}],
)  # fmt: skip
def test_bad_layouts(arguments):
    with pytest.raises(UsageError):
        Layout(**arguments)
