"""Charts: inside their frame, one mark per value, nothing drawn for what is missing."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from dit_accel.eval.report import charts
from dit_accel.eval.report.html import Markup, join, table, tag


def parsed(figure):
    root = ElementTree.fromstring(figure)
    drawing = root.find("svg")
    _, _, width, height = map(float, drawing.get("viewBox").split())
    for element in drawing.iter():
        for across, down in marks(element):
            assert -0.1 <= across <= width + 0.1
            assert -0.1 <= down <= height + 0.1
    return drawing


def marks(element):
    number = {key: float(value) for key, value in element.attrib.items() if re.fullmatch(r"-?[\d.]+", value)}
    if element.tag == "polyline":
        return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]
    if element.tag == "rect":
        return [(number["x"], number["y"]), (number["x"] + number["width"], number["y"] + number["height"])]
    if element.tag == "line":
        return [(number["x1"], number["y1"]), (number["x2"], number["y2"])]
    return [(number.get("x", number.get("cx", 0)), number.get("y", number.get("cy", 0)))]


@pytest.mark.parametrize("values", [[30.0, 28.5, 31.2], [100.0] * 4, [0.98], [-3.0, 0.0]])
def test_lines(values):
    drawing = parsed(charts.lines({"PSNR": values, "other": values[::-1]}, title="t", x="frame"))
    drawn = drawing.findall("polyline") if len(values) > 1 else drawing.findall("circle")
    assert len(drawn) == 2
    if len(values) > 1:
        assert [len(line.get("points").split()) for line in drawn] == [len(values)] * 2


def test_higher_values_are_drawn_higher():
    (line,) = parsed(charts.lines({"a": [1.0, 3.0, 2.0]}, title="t", x="frame")).findall("polyline")
    heights = [y for _, y in marks(line)]
    assert heights[1] < heights[2] < heights[0]


def test_heat_maps_are_darker_where_larger_and_grey_where_missing():
    figure = charts.heat([[0.0, 0.5], [1.0, None]], title="t", x="step", y=["a", "b"])
    cells = {cell.find("title").text: cell.get("fill") for cell in parsed(figure).findall("rect")}
    assert set(cells) == {"a, step 0: 0", "a, step 1: 0.5", "b, step 0: 1", "b, step 1: not measured"}
    light = {name: int(fill[1:3], 16) for name, fill in cells.items() if fill.startswith("#")}
    assert light["a, step 0: 0"] > light["a, step 1: 0.5"] > light["b, step 0: 1"]
    assert cells["b, step 1: not measured"] == charts.NONE
    parsed(charts.heat([[None, None]], title="t", x="step", y=["a"]))
    parsed(charts.heat([[0.9] * 200, [0.9] * 150], title="t", x="step", y=["a", "b"], scale=(None, None)))


def test_bars_are_as_long_as_their_seconds():
    sides = {"dense": {"text": 1.0, "loop": 3.0}, "accelerated": {"text": 1.0, "loop": 1.0}}
    drawn = parsed(charts.bars(sides, title="t")).findall("rect")
    wide = [float(bar.get("width")) for bar in drawn]
    assert wide[1] == pytest.approx(3 * wide[0], abs=0.2)
    assert wide[0] == wide[2] == wide[3]
    parsed(charts.bars({"dense": {}}, title="t"))


def test_the_scatter_fills_the_series_that_nothing_beats():
    points = [("a", "p", 1.0, 40.0), ("b", "p", 2.0, 30.0), ("c", "p", 1.5, 29.0)]
    drawing = parsed(charts.scatter(points, title="t", x="speed", y="PSNR"))
    assert [mark.get("fill") == charts.PAPER for mark in drawing.findall("circle")] == [False, False, True]
    assert {"a", "b", "c"} <= {text.text for text in drawing.findall("text")}


def test_the_scatter_draws_every_point_small_and_the_series_where_it_lies():
    points = [("a", "first", 1.0, 30.0), ("a", "second", 3.0, 40.0), ("a", "third", 1.5, 35.0), ("b", "first", 0.9, 36)]
    drawn = parsed(charts.scatter(points, title="t", x="speed", y="PSNR")).findall("circle")
    told = [mark.find("title").text for mark in drawn]
    assert told[:3] == [f"{n}: speed {x:.3f}, PSNR {y:.2f}" for _, n, x, y in points[:3]]
    assert told[3:] == ["a: speed 1.500, PSNR 35.00, of 3", "b: speed 0.900, PSNR 36.00, of 1"]


def test_rows_of_a_tall_heat_map_are_labelled_apart():
    drawing = parsed(charts.heat([[0.5] * 50] * 60, title="t", x="step", y=[f"layer {i}" for i in range(60)]))
    heights = [float(text.get("y")) for text in drawing.findall("text") if text.text.startswith("layer")]
    assert 20 <= len(heights) < 60
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12


def test_phases_stand_in_one_order_and_empty_ones_nowhere():
    figure = charts.bars({"dense": {"plan": 0.0, "loop": 1.0, "x": 0.0}, "fast": {"plan": 0.2, "loop": 1.0}}, title="t")
    legend = [span.find("i").tail for span in ElementTree.fromstring(figure).iter("span")]
    assert legend == ["plan", "loop"]
    assert [b.find("title").text for b in parsed(figure).findall("rect")] == [
        "dense, loop: 1.000 s", "fast, plan: 0.200 s", "fast, loop: 1.000 s",
    ]  # fmt: skip


def test_text_and_attributes_are_escaped():
    made = tag("p", "<b>", ["&", None, Markup("<i>x</i>")], title='"', data_of="a", hidden=True, lang=None)
    assert made == '<p title="&quot;" data-of="a" hidden>&lt;b&gt;&amp;<i>x</i></p>'
    assert tag("meta", name="x") == '<meta name="x">'
    assert join([1, " ", 2.5]) == "1 2.5"
    made = table(["<h>"], [["1.5x", "-", "word", "-0.2"]])
    assert made.count('<td class="number"') == 3
    assert table(["word", "size"], [["a", "1.5x"], ["b", "-"]]).count('<th class="number"') == 1
    assert "&lt;h&gt;" in made
