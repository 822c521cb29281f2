"""Axes, shades and escaping of the pictures."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from omnifp4.report.drawing import Drawing, clean, shortened
from omnifp4.report.figures import figure
from omnifp4.report.plots.changes import changes_plot
from omnifp4.report.plots.divergence import divergence_plot
from omnifp4.report.plots.heatmap import Grid, heatmap_plot
from omnifp4.report.plots.layers import LayerPoint, LayerStrip, layers_plot
from omnifp4.report.plots.rows import Row
from omnifp4.report.plots.sizes import SizeRow, merged, sizes_plot
from omnifp4.report.scales import Scale, log_range, round_step
from omnifp4.report.sections.weights import layer_strips

SVG = "{http://www.w3.org/2000/svg}"


def parsed(drawing: Drawing) -> ElementTree.Element:
    """As a file of its own, read by a strict XML parser."""
    return ElementTree.fromstring(drawing.standalone("text { fill: red }"))


def test_scales_map_and_clamp() -> None:
    linear = Scale(0, 10, 100, 200)
    assert [linear.at(value) for value in (-1, 0, 5, 10, 99)] == [100, 100, 150, 200, 200]
    log = Scale(1e-4, 1, 0, 400, log=True)
    assert [round(log.at(value), 6) for value in (0, 1e-4, 1e-2, 1)] == [0, 0, 200, 400]
    assert Scale(3, 3, 0, 10).at(3) == 5


def test_ticks_are_round_and_inside() -> None:
    assert Scale(0, 1, 0, 1).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1e-5, 0.1, 0, 1, log=True).ticks(9) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert Scale(0.01, 0.1, 0, 1, log=True).ticks(9) == pytest.approx([0.01, 0.02, 0.05, 0.1])
    assert len(Scale(1e-12, 1, 0, 1, log=True).ticks(5)) <= 5
    assert [round_step(value) for value in (0.07, 0.2, 3, 7, 0, math.nan)] == pytest.approx([0.1, 0.2, 5, 10, 1, 1])


def test_log_ranges_hold_everything_positive() -> None:
    assert log_range([0.002, 0.05, 0.0, math.nan, math.inf]) == pytest.approx((1e-3, 1e-1))
    assert log_range([1.0]) == (1.0, 10.0)
    assert log_range([0.0]) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0310, "0.0310"), (1.0, "1.00"), (12.34, "12.3"), (999.6, "1000"), (12345.6, "12,346"),
        (2e-5, "2.00e-5"), (-0.5, "-0.500"), (math.nan, "not finite"), (math.inf, "not finite"),
    ],
)  # fmt: skip
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_text_is_escaped_and_cleaned() -> None:
    drawing = Drawing("k", 10, 10, title="<a>&", description='"x"\x00')
    drawing.text(0, 0, "</text><script>\x07\u202e\ud800\uffff")
    root = parsed(drawing)
    assert root.findtext(f"{SVG}title") == "<a>&"
    assert root.findall(f"{SVG}text")[-1].text == "</text><script>" + "\ufffd" * 4
    assert clean("a\tb\nc") == "a b c"


def test_long_labels_lose_their_middle() -> None:
    assert shortened("short", 100) == "short"
    assert shortened("thinker.model.layers.31", 71) == "thin…rs.31"
    assert shortened("画像の数字を読む", 71) == "画像…読む", "these letters take twice the room"
    assert shortened("anything", 1) == "a…g"


def test_small_components_become_one_row() -> None:
    rows = [SizeRow("big", 1000, 300), *(SizeRow(f"s{n}", 3, 3) for n in range(4)), SizeRow("mid", 200, 60)]
    assert [(row.name, row.before, row.after) for row in merged(rows)] == [
        ("big", 1000, 300), ("mid", 200, 60), ("4 smaller ones", 12, 12)
    ]  # fmt: skip
    assert merged([SizeRow("a", 0, 0)]) == [SizeRow("a", 0, 0)]


@pytest.mark.parametrize("width", [343.0, 920.0])
def test_bars_are_as_long_as_what_they_show(width: float) -> None:
    root = parsed(sizes_plot([SizeRow("a", 4000, 1000), SizeRow("b", 2000, 2000)], key="k", width=width))
    before = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if r.attrib["class"] == "before"][1:]
    after = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if r.attrib["class"] == "after"][1:]
    assert before[1] / before[0] == pytest.approx(0.5, abs=0.01)
    assert after[0] / before[0] == pytest.approx(0.25, abs=0.01)


def test_points_stand_where_their_values_are() -> None:
    rows = [Row("a", 0.01, 0.005, 0.02, 0.001), Row("b", 0.1), Row("c", 0.0)]
    root = parsed(divergence_plot(rows, key="k", width=900, title="t", axis="x"))
    circles = [float(c.attrib["cx"]) for c in root.iter(f"{SVG}circle")][1:]
    # From 0.001 to 0.1 are two decades.
    assert circles[1] - circles[0] == pytest.approx(circles[0] - circles[2])
    assert "a 0.0100, interval 0.00500 to 0.0200, noise floor 0.00100" in (root.findtext(f"{SVG}desc") or "")


def heights(root: ElementTree.Element) -> list[float]:
    """Of all dots but the legend's."""
    return [float(circle.attrib["cy"]) for circle in root.iter(f"{SVG}circle")][1:]


@pytest.mark.parametrize("width", [320.0, 920.0])
def test_rows_of_a_group_stand_under_its_heading(width: float) -> None:
    rows = [Row("x", 0.1, group="text"), Row("y", 0.2, group="text"), Row("x", 0.3, group="audio")]
    root = parsed(divergence_plot(rows, key="k", width=width, title="t", axis="x"))
    heading = {t.text: float(t.attrib["y"]) for t in root.iter(f"{SVG}text") if t.attrib["class"] == "heading"}
    first, second, third = heights(root)
    assert heading["text"] < first < second < heading["audio"] < third
    assert third - second > second - first
    assert "text, y 0.200" in (root.findtext(f"{SVG}desc") or "")


def test_losses_stand_left_of_the_line_and_gains_right_of_it() -> None:
    rows = [Row("a", -1.0, -2.5, 0.5, floor=0.25), Row("b", 0.0, 0.0, 0.0), Row("c", 0.5, 0.0, 1.0)]
    root = parsed(changes_plot(rows, key="k", width=900, title="t", axis="points"))
    line = next(float(found.attrib["x1"]) for found in root.iter(f"{SVG}line") if found.attrib["class"] == "limit")
    a, b, c = (float(found.attrib["cx"]) for found in list(root.iter(f"{SVG}circle"))[1:])
    assert b == line
    assert line - a == pytest.approx(2 * (c - line), abs=0.02)
    (floor,) = [found for found in root.iter(f"{SVG}rect") if found.attrib["class"] == "floor"][1:]
    assert float(floor.attrib["x"]) == line
    # What did not change has no whiskers: two lines for each end and one between, for two rows and the legend.
    assert sum(found.attrib["class"] == "interval" for found in root.iter(f"{SVG}line")) == 9
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"-1.0", "+0.5", "0"} <= set(texts)
    assert "a -1.00, interval -2.50 to 0.500, noise floor 0.250; b +0.00" in (root.findtext(f"{SVG}desc") or "")


def test_small_changes_do_not_look_large() -> None:
    root = parsed(changes_plot([Row("a", -0.1)], key="k", width=900, title="t", axis="points"))
    line = next(float(found.attrib["x1"]) for found in root.iter(f"{SVG}line") if found.attrib["class"] == "limit")
    (dot,) = (float(found.attrib["cx"]) for found in list(root.iter(f"{SVG}circle"))[1:])
    assert 0 < line - dot < 0.05 * 900


def test_layers_are_found_by_checkpoint_names() -> None:
    strips = layer_strips(
        {
            "thinker.model.layers.0.self_attn.q_proj.weight": 0.1,
            "thinker.model.layers.0.self_attn.k_proj.weight": 0.3,
            "thinker.model.layers.10.mlp.experts.7.up_proj.weight": 0.2,
            "thinker.visual.blocks.3.mlp.linear_fc1.weight": 0.4,
            "talker.model.layers.1.mlp.shared_expert.up_proj.weight": math.nan,
            "thinker.lm_head.weight": 9.0,
        }
    )
    assert [(strip.name, [p.layer for p in strip.points]) for strip in strips] == [
        ("thinker attention", [0]), ("thinker experts", [10]), ("thinker visual MLP", [3])
    ]  # fmt: skip
    assert strips[0].points[0] == LayerPoint(0, pytest.approx(0.2), 0.1, 0.3)


def test_the_worst_layer_is_told_and_equal_errors_are_drawn() -> None:
    strips = (
        LayerStrip("x", (LayerPoint(0, 0.1, 0.1, 0.1), LayerPoint(1, 0.1, 0.1, 0.7))),
        LayerStrip("y", (LayerPoint(0, 0.1, 0.1, 0.1),)),
    )
    assert "Largest in x, layer 1: 0.700" in layers_plot(strips, key="k", width=900).description
    same = layers_plot((LayerStrip("x", (LayerPoint(0, 0.1, 0.1, 0.1),)),), key="k", width=343)
    assert not re.search("nan|inf", same.inline())


def grid(values: tuple[tuple[float | None, ...], ...]) -> Grid:
    rows = tuple(f"r{n}" for n in range(len(values)))
    columns = tuple(str(n) for n in range(len(values[0])))
    return Grid(rows, columns, values, "t", "u", "row", "layer")


def test_shades_follow_the_values() -> None:
    root = parsed(heatmap_plot(grid(((0.0, 1.0), (None, 8.99), (math.nan, 9.0))), key="k", width=900))
    cells = {path.attrib["class"]: path.attrib["d"].count("M") for path in root.iter(f"{SVG}path")}
    assert cells == {"shade0": 1, "shade1": 1, "shade8": 2, "broken": 1}
    assert "Largest: r2, layer 1: 9.00; r1, layer 1: 8.99" in (root.findtext(f"{SVG}desc") or "")


def test_what_is_far_below_the_worst_is_calm() -> None:
    root = parsed(heatmap_plot(grid(((1e-12, 1e-5, 1.0),)), key="k", width=900))
    cells = {path.attrib["class"]: path.attrib["d"].count("M") for path in root.iter(f"{SVG}path")}
    assert cells == {"shade0": 2, "shade8": 1}
    assert "1.00e-4 or less to 1.00, log steps" in [text.text for text in root.iter(f"{SVG}text")]


def test_a_floor_far_below_is_told_and_not_drawn() -> None:
    rows = [Row("a", 0.01, 0.005, 0.02, floor=1e-13), Row("b", 0.1)]
    root = parsed(divergence_plot(rows, key="k", width=900, title="t", axis="x"))
    assert not [found for found in root.iter(f"{SVG}rect") if found.attrib["class"] == "floor"]
    ticks = {text.text for text in root.iter(f"{SVG}text") if text.attrib["class"] == "tick"}
    assert ticks == {"0.001", "0.01", "0.1", "x"}
    assert "noise floor 1.00e-13" in (root.findtext(f"{SVG}desc") or "")


def test_large_cells_hold_their_figures_and_small_ones_do_not() -> None:
    root = parsed(heatmap_plot(grid(((1.0, 9.0, None),)), key="k", width=900))
    found = {text.text: text.attrib["class"] for text in root.iter(f"{SVG}text")}
    assert (found["1.00"], found["9.00"]) == ("on-calm", "on-hot")
    small = parsed(heatmap_plot(grid((tuple(map(float, range(40))),)), key="k", width=900))
    assert not [text for text in small.iter(f"{SVG}text") if text.attrib["class"].startswith("on-")]


def test_shades_are_steps_of_the_logarithm_over_wide_ranges() -> None:
    root = parsed(heatmap_plot(grid(((1e-4, 1e-2, 1.0),)), key="k", width=900))
    assert sorted(path.attrib["class"] for path in root.iter(f"{SVG}path")) == ["shade0", "shade4", "shade8"]
    empty = heatmap_plot(grid(((None, None),)), key="k", width=343)
    assert empty.description == "Nothing was measured."
