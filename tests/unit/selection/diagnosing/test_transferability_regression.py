"""The regression of log T: the printed table's own coefficients, known ones, and what is refused."""

import csv
from importlib.resources import files

import numpy as np
import pytest
from scipy.stats import spearmanr

from deltapatch.selection.diagnosing.transferability_regression import (
    TransferRecord,
    fit_transferability_regression,
)
from deltapatch.selection.score import SelectionError


@pytest.fixture
def printed() -> list[TransferRecord]:
    """The twelve rows that the source prints."""
    table = files("deltapatch.selection") / "tables" / "paramdist_resnet50_12datasets.csv"
    columns = ("domain_gap_G", "intraclass_variance_D", "data_amount_N", "transferability_T")
    rows = csv.DictReader(table.read_text().splitlines())
    return [TransferRecord(*(float(row[name]) for name in columns)) for row in rows]


def known(count: int = 30) -> list[TransferRecord]:
    """log T = -0.26 G + 0.32 D - 0.61 log N + 2.86, without noise."""
    random = np.random.default_rng(0)
    gap, variance, images = (
        random.uniform(0, 3, count),
        random.uniform(0, 1, count),
        random.uniform(1e3, 1e5, count),
    )
    values = np.exp(-0.26 * gap + 0.32 * variance - 0.61 * np.log(images) + 2.86)
    return [TransferRecord(*row) for row in zip(gap, variance, images, values, strict=True)]


def test_the_printed_rows_give_these_coefficients_and_not_the_printed_ones(
    printed: list[TransferRecord],
) -> None:
    found = fit_transferability_regression(printed, standardize=False)
    assert (found.gap, found.variance) == pytest.approx((0.0244, 0.0004), abs=5e-5)
    assert (found.log_images, found.intercept) == pytest.approx((-0.5415, 7.664), abs=5e-4)
    assert found.r_squared == pytest.approx(0.881, abs=5e-4)
    assert found.warnings == ("12 records are few for four coefficients",)


def test_of_the_printed_rows_the_number_of_images_decides(printed: list[TransferRecord]) -> None:
    rank = spearmanr([r.transferability for r in printed], [r.images for r in printed]).statistic
    assert rank == pytest.approx(-0.96, abs=5e-3)


def test_known_coefficients_come_back() -> None:
    found = fit_transferability_regression(known(), standardize=False)
    assert (found.gap, found.variance, found.log_images, found.intercept) == pytest.approx(
        (-0.26, 0.32, -0.61, 2.86)
    )
    assert found.r_squared == pytest.approx(1)
    assert found.warnings == ()


def test_standardised_coefficients_are_per_standard_deviation() -> None:
    raw, found = (fit_transferability_regression(known(), standardize=s) for s in (False, True))
    assert found.gap == pytest.approx(raw.gap * np.std([r.gap for r in known()]))
    assert found.log_images == pytest.approx(raw.log_images * np.std(np.log([r.images for r in known()])))
    assert found.intercept == pytest.approx(np.mean(np.log([r.transferability for r in known()])))
    assert found.r_squared == pytest.approx(raw.r_squared)
    assert found.standardized


def test_what_determines_no_coefficients_is_refused() -> None:
    with pytest.raises(SelectionError, match="4 records cannot determine four coefficients"):
        fit_transferability_regression(known(4))
    with pytest.raises(SelectionError, match="a column of the table is constant"):
        fit_transferability_regression(
            [TransferRecord(1.0, r.variance, r.images, r.transferability) for r in known()]
        )
    with pytest.raises(SelectionError, match="follow from each other"):
        fit_transferability_regression(
            [TransferRecord(r.gap, 2 * r.gap, r.images, r.transferability) for r in known()]
        )
    with pytest.raises(SelectionError, match="above 0"):
        fit_transferability_regression([*known(), TransferRecord(1, 1, 0, 1)])
