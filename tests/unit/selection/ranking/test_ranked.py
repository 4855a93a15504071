"""Order, ties, stability and intervals follow from the values of whole and halves."""

import numpy as np
import pytest

from deltapatch.selection.ranking.ranked import Cell, RankedBase, Ranking
from deltapatch.selection.score import Diagnostics, Score

NOWHERE = Diagnostics(10, 3, 2)


def _cell(value: float, halves: list[float], warnings: tuple[str, ...] = ()) -> Cell:
    score = Score("logme", value, Diagnostics(10, 3, 2, warnings=warnings))
    return Cell(score, "", np.array(halves, np.float64))


def _ranking(**cells: Cell) -> Ranking:
    rows = tuple(RankedBase(name, cells={"logme": cell}) for name, cell in cells.items())
    return Ranking("photos", rows, ("logme",), "logme", 10, 2, 4, 0)


def test_a_tie_is_where_the_paired_difference_may_be_zero() -> None:
    """The values of b spread as far as those of a, but stand behind them in every half."""
    ranking = _ranking(
        a=_cell(3.0, [1.0, 2.0, 3.0, 4.0]),
        b=_cell(2.9, [0.9, 1.9, 2.9, 3.9]),
        c=_cell(2.5, [4.0, 1.0, 1.0, 1.0]),
    )
    assert ranking.best is ranking.rows[0]
    assert ranking.difference(ranking.rows[1]) == pytest.approx((-0.1, -0.1))
    assert ranking.ties == {"c"}


def test_stability_is_the_share_of_halves_that_pick_the_same_base() -> None:
    ranking = _ranking(a=_cell(3, [1, 2, 3, 4]), b=_cell(2, [2, 1, np.nan, 5]))
    assert ranking.stability("logme") == 0.5
    assert _ranking(a=_cell(3, [1, np.nan]), b=_cell(2, [0, np.nan])).stability("logme") == 1
    assert np.isnan(_ranking(a=_cell(3, [np.nan])).stability("logme"))


def test_a_base_without_a_value_is_never_picked() -> None:
    ranking = _ranking(a=Cell(None, "too few", np.full(4, np.nan)), b=_cell(-2, [-1, -1, -1, -1]))
    assert ranking.best is ranking.rows[1]
    assert ranking.stability("logme") == 1
    assert ranking.ties == frozenset()


def test_nothing_is_best_where_nothing_has_a_value() -> None:
    ranking = _ranking(a=Cell(None, "too few", np.full(4, np.nan)))
    assert ranking.best is None
    assert ranking.ties == frozenset()
    assert np.isnan(ranking.stability("logme"))


def test_an_interval_is_the_spread_of_the_halves_around_the_value() -> None:
    cell = _cell(10, [1.0, 2.0, 3.0])
    assert cell.interval == pytest.approx((10 - 0.9, 10 + 0.9))
    assert np.isnan(_cell(10, [1.0, np.nan]).interval).all()


def test_a_warning_is_said_once_with_its_bases() -> None:
    ranking = _ranking(a=_cell(3, [1], ("few",)), b=_cell(2, [1], ("few", "odd")))
    assert ranking.warnings == ("few (all scores)", "odd (logme of b)")
