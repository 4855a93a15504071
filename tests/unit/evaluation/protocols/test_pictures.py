"""The accuracy matrix as a picture."""

from xml.etree import ElementTree

import numpy as np

from deltapatch.evaluation.protocols import AccuracyMatrix, draw_accuracy_matrix

NAN = float("nan")


def words(svg: str) -> list[str | None]:
    tree = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    return [element.text for element in tree.iter("text")]


def draw(*names: str, step: str = "step", last: tuple[float, ...] = (0.5, 0.25)) -> str:
    return draw_accuracy_matrix(AccuracyMatrix(names, ("base", step), np.array([(0.5, NAN), last])))


def test_every_measured_accuracy_is_printed_in_percent_beside_the_names() -> None:
    printed = words(draw("own", "pets"))
    assert sorted(word for word in printed if word and "." in word) == ["25.0", "50.0", "50.0"]
    assert {"own", "pets", "base", "step", "after", "accuracy on (%)"} <= set(printed)


def test_numbers_on_a_strong_cell_are_white() -> None:
    assert "fill: #ffffff" not in draw("own", "pets")
    assert draw("own", "pets", last=(0.9, 0.8)).count("fill: #ffffff") == 2


def test_names_from_the_data_are_text_and_neither_markup_nor_formulas() -> None:
    svg = draw("<script>", r"$\frac{1}{2}$", step="$x^2$")
    assert "<script" not in svg
    assert {"<script>", r"$\frac{1}{2}$", "$x^2$"} <= set(words(svg))


def test_a_long_name_is_cut_short() -> None:
    assert f"{'x' * 23}…" in words(draw("own", "x" * 300))


def test_the_picture_takes_its_colours_from_the_page_and_is_the_same_every_time() -> None:
    svg = draw("own", "pets")
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert draw("own", "pets") == svg
