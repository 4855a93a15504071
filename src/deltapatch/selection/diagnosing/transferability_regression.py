"""What transferability by parameter distance depends on: a regression on gap, variance and images."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..score import SelectionError

_FEW = 20


@dataclass(frozen=True)
class TransferRecord:
    """One fine-tuned task.

    Attributes:
        gap: G, how far its features are from those of the base's own images; see `frechet_distance`.
        variance: D, how much of its features' variance is within classes; see `intra_class_variance`.
        images: N, how many training images it has.
        transferability: T; see `parameter_distance`.
    """

    gap: float
    variance: float
    images: float
    transferability: float


@dataclass(frozen=True)
class TransferabilityRegression:
    """Coefficients of log T ≈ a G + b D + c log N + e, with natural logarithms.

    Attributes:
        gap: a.
        variance: b.
        log_images: c.
        intercept: e.
        r_squared: share of the variance of log T that is explained, on the records it was fitted to.
        records: how many these were.
        standardized: whether a, b and c are for predictors of mean 0 and variance 1 over the records.
        warnings: one sentence each.
    """

    gap: float
    variance: float
    log_images: float
    intercept: float
    r_squared: float
    records: int
    standardized: bool
    warnings: tuple[str, ...]


def fit_transferability_regression(
    table: Iterable[TransferRecord], standardize: bool = True
) -> TransferabilityRegression:
    """Ordinary least squares of log T on G, D and log N.

    All records must have been measured in one way: G and D of different backbones or scales do not belong
    into one table. The coefficients describe these records; they are too few to predict others. (Those that
    arXiv 2212.00399 prints do not follow from the records that it prints.)

    Args:
        table: at least five records.
        standardize: give each predictor mean 0 and variance 1 first, so that coefficients can be compared.

    Raises:
        SelectionError: there are too few records, a number cannot be used, or a predictor is constant or
            follows from the others.
    """
    records = list(table)
    if len(records) < 5:
        raise SelectionError(f"{len(records)} records cannot determine four coefficients; give at least five")
    numbers = np.array([(r.gap, r.variance, r.images, r.transferability) for r in records], np.float64)
    if not np.isfinite(numbers).all() or (numbers[:, 2:] <= 0).any():
        raise SelectionError("every record needs finite numbers, with images and transferability above 0")
    predictors = np.column_stack([numbers[:, 0], numbers[:, 1], np.log(numbers[:, 2])])
    response = np.log(numbers[:, 3])
    centred = predictors - predictors.mean(axis=0)
    spread = centred.std(axis=0)
    if (spread <= 1e-12 * np.abs(predictors).max(axis=0)).any() or np.ptp(response) == 0:
        raise SelectionError("a column of the table is constant; give records that differ in every column")
    scaled = centred / spread
    slopes, _, rank, _ = np.linalg.lstsq(scaled, response - response.mean(), rcond=1e-10)
    if rank < 3:
        raise SelectionError(
            "gap, variance and images of these records follow from each other; give more records"
        )
    residual = response - response.mean() - scaled @ slopes
    r_squared = 1 - float(residual @ residual) / float(((response - response.mean()) ** 2).sum())
    intercept = float(response.mean())
    if not standardize:
        slopes = slopes / spread
        intercept -= float(predictors.mean(axis=0) @ slopes)
    few = (f"{len(records)} records are few for four coefficients",) if len(records) < _FEW else ()
    a, b, c = slopes.tolist()
    return TransferabilityRegression(a, b, c, intercept, r_squared, len(records), standardize, few)
