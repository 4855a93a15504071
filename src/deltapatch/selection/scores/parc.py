"""PARC: whether images of one class also look alike to the model."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ..drawing import draw_probe, stratified
from ..score import Score, SelectionError, ranking_score
from ..subject import Samples, read_samples
from ._principal import principal_components

Array = NDArray[np.float64]

_DRAWS = 5
# Round-off would rank equal distances apart.
_DIGITS = 9


@ranking_score("features")
def parc(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    components: int | None = 32,
    rows: int = 2000,
    seed: int = 0,
) -> Score:
    """Pairwise annotation representation comparison (Bolya et al., "Scalable Diverse Model Selection",
    NeurIPS 2021).

    Each pair of images has a distance to the model, 1 - Pearson's correlation of their features, and a
    distance in the labels: that of one-hot rows, 0 within a class and 1 + 1/(K-1) across. PARC is a hundred
    times Spearman's rank correlation of the two over all pairs, so between -100 and 100. Features are
    projected on principal components, whose columns are then standardised, at first.

    Without principal components, features that are one-hot labels of equally many images score 100 exactly:
    distances are rounded to 1e-9 before they are ranked, without which round-off splits equal ones and the
    score ends below 99. With them even such features score less, since a correlation of rows depends on the
    components' signs, and on the choice among components of equal variance. They are the default because the
    published rankings were better with 32 of them. The published protocol is one of 500 images in 5 draws
    (``rows=500``). The benchmark adds a fiftieth of the model's layers to standardised scores; that is the
    caller's to do.

    Args:
        features: shape (N, d), d of 2 or more.
        labels: integers, shape (N,).
        components: so many principal components of all N samples are kept; None takes the features.
        rows: where there are more samples than this, the value is the mean over 5 draws of about this
            many, which keep the shares of the classes and two samples of each. Time and memory grow with
            its square.
        seed: of the first draw; the others take the next four.

    Raises:
        SelectionError: the features cannot be scored (`read_samples`), fewer than two components or four
            rows are asked for, or the features vary in one direction only.

    Example:
        >>> features = [[1, 0, 0.2], [0.9, 0.1, 0], [0, 1, 0.1], [0.1, 0.8, 0.3]]
        >>> parc(features, [0, 0, 1, 1], components=None).value
        82.8078671210825
    """
    if components is not None and components < 2:
        raise SelectionError(f"parc got components={components}; give 2 or more, or None for the features")
    if rows < 4:
        raise SelectionError(f"parc got rows={rows}; give 4 or more")
    subject = read_samples(features, labels)
    warnings: tuple[str, ...] = ()
    details: dict[str, float] = {}
    if components is None:
        coordinates = subject.rows
    else:
        principal = principal_components(subject, most=components)
        coordinates = principal.coordinates
        details = {"components": principal.count, "variance_kept": principal.variance_kept}
        if subject.samples < 3 * principal.count:
            warnings += (
                f"{subject.samples} samples are few for {principal.count} standardised components, whose last"
                " ones are noise; give more images or fewer components",
            )
    draws = _draws(subject, rows, seed)
    if len(draws[0]) < subject.samples:
        warnings += (f"mean of {_DRAWS} draws of {len(draws[0])} of the {subject.samples} samples",)
    values = [100 * _rank_correlation(coordinates[draw], subject.labels[draw]) for draw in draws]
    if 0.0 in values:
        warnings += ("all pairs of images are equally far apart, so there is nothing to rank",)
    details |= {"rows": len(draws[0]), "draws": len(draws), "spread": float(np.std(values))}
    return subject.score(
        "parc", float(np.mean(values)), low=-100, high=100, warnings=warnings, details=details
    )


def _rank_correlation(features: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Spearman's correlation of distances between features and between labels; 0 where one is constant."""
    pairs = np.triu_indices(len(labels), 1)
    correlations = _correlations(features)[pairs]
    ranks = rankdata(np.round(1 - correlations, _DIGITS))
    # One-hot labels know two distances only, whose ranks are linear in this.
    apart = (labels[:, None] != labels)[pairs].astype(np.float64)
    ranks -= ranks.mean()
    apart -= apart.mean()
    norm = float(np.linalg.norm(ranks) * np.linalg.norm(apart))
    return float(ranks @ apart) / norm if norm else 0.0


def _correlations(features: NDArray[np.floating]) -> Array:
    """Pearson's, between the rows of features with standardised columns; 0 with a row that does not vary."""
    columns = features.astype(np.float64)
    columns -= columns.mean(axis=0)
    spread = columns.std(axis=0)
    columns = columns[:, spread > 1e-12 * spread.max()]
    if columns.shape[1] < 2:
        raise SelectionError(
            "the features vary in one direction only, and parc compares patterns over two or more; such a"
            " model cannot be scored by it"
        )
    columns /= columns.std(axis=0)
    columns -= columns.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(columns, axis=1, keepdims=True)
    columns /= np.where(lengths > 1e-9, lengths, np.inf)
    return columns @ columns.T


def _draws(subject: Samples, rows: int, seed: int) -> list[NDArray[np.int64]]:
    """Which samples are compared, of each draw: all of them where there are few enough."""
    if subject.samples <= rows:
        return [np.arange(subject.samples)]
    return [_draw(subject, rows, seed + number) for number in range(_DRAWS)]


def _draw(subject: Samples, rows: int, seed: int) -> NDArray[np.int64]:
    """About so many samples, stratified, with a pair of each class, or of a part of too many classes."""
    numbers = np.zeros(subject.classes, np.int64)
    members = np.flatnonzero(np.isin(subject.labels, stratified(numbers, rows // 2, seed)))
    return members[draw_probe(subject.labels[members], rows, seed)]
