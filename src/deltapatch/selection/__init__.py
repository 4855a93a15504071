"""Which base is worth patching: transferability scores and how they are computed, compared and believed.

Every score of the folder ``scores`` is a function of this package by its own name:

    >>> from deltapatch import selection
    >>> selection.logme(features, labels).value

"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import scores as _scores
from .score import Diagnostics, Score, SelectionError
from .statistics import Statistics, sum_of

if TYPE_CHECKING:  # for editors; what there is, is what the folder holds
    from .scores.etran import etran as etran
    from .scores.gbc import gbc as gbc
    from .scores.h_score import h_score as h_score
    from .scores.leep import leep as leep
    from .scores.linear_probe import linear_probe as linear_probe
    from .scores.logme import logme as logme
    from .scores.nce import nce as nce
    from .scores.nleep import nleep as nleep
    from .scores.osborn import osborn as osborn
    from .scores.otce import otce as otce
    from .scores.parc import parc as parc
    from .scores.ped import ped as ped
    from .scores.sfda import sfda as sfda
    from .scores.shrinkage_h_score import shrinkage_h_score as shrinkage_h_score
    from .scores.tmi import tmi as tmi
    from .scores.transfer_score import transfer_score as transfer_score
    from .scores.transrate import transrate as transrate

# Name -> file, for what only some need.
_HOMES = {
    "Agreement": "ranking.agreement",
    "Candidate": "ranking.candidates",
    "Ensemble": "scores.osborn",
    "EnsembleCandidate": "scores.osborn",
    "History": "history.prior",
    "LinearRule": "closed_form",
    "OtceCoefficients": "scores.otce",
    "ParameterDistance": "diagnosing.parameter_distance",
    "Probe": "ranking.probing",
    "Ranking": "ranking.ranked",
    "Record": "history.record",
    "TransferRecord": "diagnosing.transferability_regression",
    "agreement": "ranking.agreement",
    "combine": "history.prior",
    "diagnose": "diagnosing",
    "discriminant": "closed_form",
    "etran_over_pool": "scores.etran",
    "filter_degeneracy": "quality.filter_degeneracy",
    "fit_transferability_regression": "diagnosing.transferability_regression",
    "frechet_distance": "diagnosing.frechet",
    "intra_class_variance": "quality.intra_class_variance",
    "logme_of_targets": "scores.logme",
    "mean_agreement": "ranking.agreement",
    "move_classes_apart": "scores.ped",
    "nearest_mean": "closed_form",
    "parameter_distance": "diagnosing.parameter_distance",
    "prior": "history.prior",
    "random_start": "diagnosing.parameter_distance",
    "rank": "ranking.rank_bases",
    "ranking_scores": "score",
    "read_candidates": "ranking.candidates",
    "v_information": "quality.v_information",
    "weighted_tau": "ranking.agreement",
}

__all__ = ["Diagnostics", "Score", "SelectionError", "Statistics", "sum_of"]  # and every score


def __getattr__(name: str) -> Any:
    """A score's function, or one of the names above."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _scores.NAMES:
        return getattr(import_module(f".scores.{name}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*__all__, *_HOMES, *_scores.NAMES))
