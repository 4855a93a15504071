"""The evidence of a Bayesian linear model, and its maximum: what LogME is made of."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize.elementwise import find_root

from ..spectrum import in_eigenbasis, rank_of
from ..statistics import Array

# τ = α / β in units of the mean eigenvalue, which is where maxima are looked for.
_RATIOS = np.logspace(-12, 12, 97)
# A squared rest in units of the target's length that is rounding.
_NO_REST = 1e-12


@dataclass(frozen=True, eq=False)
class Evidence:
    """Of each target, shape (K,).

    Attributes:
        evidence: log p(t | F, α, β) / N.
        alpha: precision of the weights.
        beta: precision of the targets given the weights.
        no_signal: whether α / β ran into its upper bound, since the features tell nothing.
        separable: whether β ran into its bound, since the targets are fitted without error.
    """

    evidence: Array
    alpha: Array
    beta: Array
    no_signal: NDArray[np.bool_]
    separable: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Profile:
    """The evidence as a function of τ alone, β being the best for it: with the eigenvalues σ² > 0 of FᵀF, r
    of them, the squared coordinates x² of a target in the left singular vectors and its squared rest ρ₀,

        q = ρ₀ + Σ x² τ / (σ² + τ),   β = N / q,   2 log p = r log τ - Σ log(σ² + τ) - N log(2π q / N) - N.

    Columns that F lacks to rank d cancel. Shapes: eigenvalues (r,), in units of their mean; squares (K, r);
    rest (K,).
    """

    eigenvalues: Array
    squares: Array
    rest: Array
    samples: int

    def residuals(self, ratio: Array) -> Array:
        """q of each target at its own τ, both of shape (K,)."""
        shifted = self.eigenvalues + ratio[:, None]
        return self.rest + (self.squares / shifted).sum(axis=1) * ratio

    def evidence(self, ratio: Array, residuals: Array) -> Array:
        """log p; the shapes of τ and q broadcast."""
        volumes = np.log(self.eigenvalues + ratio[..., None]).sum(axis=-1)
        rank = len(self.eigenvalues)
        fit = self.samples * (np.log(2 * np.pi * residuals / self.samples) + 1)
        return 0.5 * (rank * np.log(ratio) - volumes - fit)

    def slope(self, log_ratio: Array, target: NDArray[np.int64]) -> Array:
        """2 d log p / d log τ of the numbered targets, all shapes (n,): γ - N τ‖m‖² / q, zero where the
        fixed point α = γ / ‖m‖², β = (N - γ) / e² of the paper is.
        """
        ratio = np.exp(log_ratio)
        shifted = self.eigenvalues + ratio[:, None]
        squares = self.squares[target] / shifted
        effective = (self.eigenvalues / shifted).sum(axis=1)
        size = (squares * (self.eigenvalues / shifted)).sum(axis=1)
        residuals = self.rest[target] + squares.sum(axis=1) * ratio
        return effective - self.samples * ratio * size / residuals


def maximise_evidence(gram: Array, projected: Array, lengths: Array, samples: int) -> Evidence:
    """The largest evidence of each target over α and β, all targets at once.

    Its stationary points are those of the fixed point of You et al. (JMLR 2022). For N ≤ d there may be
    two, and the iteration may end in the lower one or run away, so the best point of a grid of τ is taken
    and its neighbourhood searched.

    Args:
        gram: FᵀF, shape (d, d).
        projected: Fᵀt of each target, shape (K, d).
        lengths: ‖t‖² of each target, shape (K,).
        samples: N.
    """
    values, turned = in_eigenbasis(gram, projected.T)
    rank = rank_of(values, samples)
    if rank == 0:
        return _noise_alone(lengths, samples)
    eigenvalues = values[len(values) - rank :]
    unit = float(eigenvalues.mean())
    squares = turned[len(values) - rank :].T ** 2 / eigenvalues
    rest = np.maximum(lengths - squares.sum(axis=1), 0.0)
    rest[rest <= _NO_REST * lengths] = 0.0
    profile = _Profile(eigenvalues / unit, squares, rest, samples)
    place = _best_of_grid(profile)
    ratio = _refined(profile, place)
    residuals = profile.residuals(ratio)
    beta = samples / residuals
    return Evidence(
        profile.evidence(ratio, residuals) / samples,
        ratio * beta * unit,
        beta,
        place == len(_RATIOS) - 1,
        (place == 0) & (samples > rank),
    )


def _best_of_grid(profile: _Profile) -> NDArray[np.int64]:
    """Where on the grid of τ the evidence of each target is largest, shape (K,)."""
    shares = _RATIOS / (profile.eigenvalues[:, None] + _RATIOS)
    residuals = profile.rest[:, None] + profile.squares @ shares
    return profile.evidence(_RATIOS, residuals).argmax(axis=1)


def _refined(profile: _Profile, place: NDArray[np.int64]) -> Array:
    """τ at the maximum between the neighbours of a place of the grid, shape (K,)."""
    ratio = _RATIOS[place]
    inside = np.flatnonzero((place > 0) & (place < len(_RATIOS) - 1))
    if len(inside):
        bracket = np.log(_RATIOS[place[inside] - 1]), np.log(_RATIOS[place[inside] + 1])
        found = find_root(profile.slope, bracket, args=(inside,))
        ratio[inside[found.success]] = np.exp(found.x[found.success])
    return ratio


def _noise_alone(lengths: Array, samples: int) -> Evidence:
    """The evidence of targets for features that are all zero."""
    beta = samples / lengths
    everywhere = np.ones(len(lengths), np.bool_)
    evidence = 0.5 * (np.log(beta / (2 * np.pi)) - 1)
    return Evidence(evidence, np.full(len(lengths), np.inf), beta, everywhere, ~everywhere)
