"""NLEEP: LEEP with clusters of the features in place of a head."""

import warnings as python_warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..score import Score, SelectionError, ranking_score
from ..subject import Samples, read_samples
from ._empirical import expected_predictions, label_entropy
from ._principal import principal_components

Array = NDArray[np.float64]

_PER_CLASS = 5
_SAMPLES_PER_COMPONENT = 10
_RUNS = 3


@ranking_score("features")
def nleep(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    components: int | None = None,
    variance: float = 0.8,
    seed: int = 0,
) -> Score:
    """Gaussian LEEP (Li et al., "Ranking Neural Checkpoints", CVPR 2021), for models with or without a head.

    The features' principal components that keep 80 % of the variance are described by a mixture of Gaussians;
    the posteriors of its components stand for the source probabilities of LEEP (`leep`):

        NLEEP = 1/N Σ_i log Σ_v P̂(y_i | v) P(v | f_i),        -H(y) <= NLEEP <= 0,

    with v the components of the mixture. 0 means that no component is shared by classes.

    Covariances are diagonal (full ones would cost 5 K q² numbers); 1e-6 of the mean variance is added to
    each, so features may be scaled without effect. The value is the mean of 3 fits from different starts,
    whose standard deviation is ``spread`` in the details: a lead smaller than it is none. It rises with the
    number of components, up to 0 at one for each sample, so only values with the same number can be
    compared. Public code differs: some averages probabilities without the logarithm, and the usual scripts
    quietly take one component for each class on sets with many.

    Args:
        features: shape (N, d).
        labels: integers, shape (N,).
        components: of the mixture. Left out, 5 for each class, or fewer, with a warning, where these had less
            than 10 samples each; but never fewer than one for each class.
        variance: share that the principal components keep, above 0 and up to 1.
        seed: of the first fit; the others take the next two.

    Raises:
        SelectionError: the features cannot be scored (`read_samples`), or there are not 1 to N components, or
            the share of variance is not one.

    Example:
        >>> nleep(features, labels).diagnostics.details["spread"]
    """
    if not 0 < variance <= 1:
        raise SelectionError(f"nleep got variance={variance:g}; give a share above 0 and up to 1")
    subject = read_samples(features, labels)
    count, warnings = _component_count(subject, components)
    principal = principal_components(subject, variance=variance)
    # Alike for all models, so that what the mixture adds to variances weighs the same.
    coordinates = principal.coordinates / principal.coordinates.std()
    values: list[float] = []
    unfinished = 0
    for run in range(_RUNS):
        posteriors, converged = _posteriors(coordinates, count, seed + run)
        unfinished += not converged
        expected = expected_predictions(posteriors, subject.labels, subject.classes)
        values.append(float(np.log(expected).mean()))
    if unfinished:
        warnings += (f"{unfinished} of {_RUNS} fits of the mixture had not converged when they were stopped",)
    entropy = label_entropy(subject.counts)
    details = {
        "components": count,
        "dimensions": principal.count,
        "variance_kept": principal.variance_kept,
        "spread": float(np.std(values)),
        "label_entropy": entropy,
    }
    return subject.score(
        "nleep", float(np.mean(values)), low=-entropy, high=0, warnings=warnings, details=details
    )


def _component_count(subject: Samples, asked: int | None) -> tuple[int, tuple[str, ...]]:
    if asked is not None:
        if not 1 <= asked <= subject.samples:
            raise SelectionError(
                f"nleep got components={asked}; give 1 to {subject.samples}, the number of samples"
            )
        return asked, ()
    wanted = _PER_CLASS * subject.classes
    most = max(subject.classes, subject.samples // _SAMPLES_PER_COMPONENT)
    if wanted <= most:
        return wanted, ()
    return most, (
        f"{most} components are used instead of {wanted} ({_PER_CLASS} for each class), since"
        f" {subject.samples} samples are too few for more; compare values of the same images only",
    )


def _posteriors(coordinates: Array, count: int, seed: int) -> tuple[Array, bool]:
    """P(v | f_i) of shape (N, count), and whether the fit had converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(count, covariance_type="diag", reg_covar=1e-6, random_state=seed)
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(coordinates)
    return mixture.predict_proba(coordinates), bool(mixture.converged_)
