import re
from xml.etree import ElementTree

import numpy as np
import pytest

from deltapatch.evaluation import drawings


def parse(svg):
    """The drawing as a tree; the one namespace that its links need is left to the page."""
    return ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


def words(svg):
    return [element.text for element in parse(svg).iter("text")]


def stage(sub_blocks):
    """Weights 0.01, 0.02, ... with a spread of a tenth; the base has the skips from one state to the next."""
    none = np.triu(np.full((sub_blocks, sub_blocks), np.nan), 1)
    mean = none + np.arange(1, sub_blocks**2 + 1).reshape(sub_blocks, sub_blocks) / 100
    return mean, mean / 10, np.eye(sub_blocks, dtype=bool)


KINDS = ("curves", "matrix", "heat map", "class map", "arcs")


def draw_all():
    mean, spread, existing = stage(3)
    pictures = (
        drawings.draw_curves({"training": [1, 2], "validation": [2, 3]}, 1, "loss"),
        drawings.draw_matrix(np.eye(30, dtype=np.int64)),
        drawings.draw_heat_map(mean, spread),
        drawings.draw_heat_map(mean),
        drawings.draw_arcs(mean, spread, existing),
    )
    return dict(zip(KINDS, pictures, strict=True))


@pytest.fixture(scope="module")
def drawn_once():
    return draw_all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_is_one_element_that_loads_nothing_and_styles_nothing_else(kind, drawn_once):
    svg = drawn_once[kind]
    assert parse(svg).tag == "svg"
    assert not re.search(r"https?:|<style|<script|<metadata|font-family", svg)
    assert all(link.startswith(("#", "data:image/png")) for link in re.findall(r'href="([^"]*)', svg))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_takes_its_colours_from_the_page(kind, drawn_once):
    svg = drawn_once[kind]
    assert "var(--ink)" in svg
    assert not re.search(r"#01020\d", svg)
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) <= {"#ffffff"}


def test_every_link_inside_a_drawing_has_its_target_and_drawings_share_no_ids(drawn_once):
    seen = set()
    for svg in drawn_once.values():
        ids = set(re.findall(r'\bid="([^"]*)"', svg))
        assert set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)) <= ids
        assert not ids & seen
        seen |= ids


def test_the_same_drawing_is_the_same_text(drawn_once):
    assert draw_all() == drawn_once


def test_an_arc_diagram_has_a_pair_of_arcs_for_each_skip_and_prints_each_weight():
    mean, spread, existing = stage(3)
    svg = drawings.draw_arcs(mean, spread, existing)
    assert len(re.findall(r"stroke: var\(--weight\)", svg)) == 2 * 3
    assert len(re.findall(r"stroke: var\(--existing\)", svg)) == 2 * 3
    assert len(re.findall(r"stroke-dasharray: \d", svg)) == 3
    assert sorted(words(svg)) == sorted([*"0123", "0.01", "0.04", "0.05", "0.07", "0.08", "0.09"])


def test_an_arc_ends_at_its_two_states():
    svg = drawings.draw_arcs(*stage(2))
    zero, one, two = re.findall(r'<use [^>]*x="([\d.]+)"', svg)
    ends = re.findall(r'"M ([\d.]+) [\d.]+ \nC[^"]*?([\d.]+) [\d.]+ \n"', svg)
    assert ends == [(one, zero)] * 2 + [(two, zero)] * 2 + [(two, one)] * 2


def test_an_arc_is_thicker_for_a_larger_weight_and_its_band_for_a_larger_spread():
    def widths(weight, spread):
        svg = drawings.draw_arcs(np.array([[weight]]), np.array([[spread]]), np.array([[False]]))
        return [float(width) for width in re.findall(r"var\(--weight\); stroke-width: ([\d.]+)", svg)]

    band, line = widths(0.4, 0.1)
    assert band > line
    assert widths(0.8, 0.1)[1] > line
    assert widths(0.4, 0.3) == [pytest.approx(band + 2), line]


def test_the_weights_are_not_printed_on_more_than_ten_arcs():
    assert words(drawings.draw_arcs(*stage(5))) == list("012345")


def test_a_heat_map_prints_the_mean_and_the_spread_of_each_skip():
    mean, spread, _ = stage(2)
    printed = words(drawings.draw_heat_map(mean, spread))
    assert [word for word in printed if "." in word] == ["0.01", "± 0.00", "0.03", "± 0.00", "0.04", "± 0.00"]
    assert {"from state", "into sub-block", "0", "1", "2"} <= set(printed)


def test_the_heat_map_of_a_class_is_smaller_and_prints_only_a_few_means():
    mean, spread, _ = stage(4)
    assert [word for word in words(drawings.draw_heat_map(mean)) if "±" in word] == []
    assert len([word for word in words(drawings.draw_heat_map(mean)) if "." in word]) == 10
    assert not [word for word in words(drawings.draw_heat_map(stage(5)[0])) if "." in word]
    assert len(drawings.draw_heat_map(mean)) < len(drawings.draw_heat_map(mean, spread))


def test_numbers_on_a_strong_cell_are_white():
    weak, strong = (drawings.draw_heat_map(np.array([[value]])) for value in (0.5, 0.9))
    assert "fill: #ffffff" in strong
    assert "fill: #ffffff" not in weak


def test_the_opacity_of_a_cell_is_its_value_and_a_missing_one_is_clear():
    _, axes = drawings.new_figure(1, 1)
    assert drawings.shade(axes, np.array([[0.25, np.nan]])).tolist() == [[0.25, 0]]
    assert drawings.shade(axes, np.array([[4.0, -2.0]])).tolist() == [[1, 0.5]]


def test_a_curve_with_values_that_are_not_finite_is_drawn_with_gaps():
    svg = drawings.draw_curves({"training": [1.0, float("nan"), float("inf"), 2.0]}, 1, "loss")
    assert parse(svg).tag == "svg"
    assert "training" in words(svg)


def test_each_curve_has_its_own_line_style_and_name():
    svg = drawings.draw_curves({"training": [1, 2, 3], "validation": [2, 3, 4]}, 1, "accuracy")
    assert {"training", "validation", "accuracy", "epoch"} <= set(words(svg))
    assert re.search(r"stroke: var\(--existing\)[^\"]*", svg)
    assert "stroke-dasharray" in svg
