"""Seconds of each score beside the way in which it is commonly computed, in one run on the same features.

    python benchmarks/selection/speed.py

The references are written here, after the formulas in use (TLlib, the repositories of LogME and SFDA): a
pseudo- inverse, a singular value decomposition for each model, loops over classes. Every pair of values is
compared; where the common way has another value by a known flaw, that is said. Features are random with
class structure.
"""

import argparse
import statistics as middle
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import softmax

from deltapatch.selection import Statistics, h_score, logme, sfda, shrinkage_h_score, transrate
from deltapatch.selection.score import Score, ranking_scores
from deltapatch.selection.spectrum import in_eigenbasis
from deltapatch.selection.subject import read_samples

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accuracy"))

from settings import REPOSITORY, write_table

Array = NDArray[np.float64]
OUT = REPOSITORY / "benchmarks" / "results" / "selection_speed.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = np.concatenate(
        [np.arange(options.classes), rng.integers(0, options.classes, options.samples - options.classes)]
    )
    means = 0.3 * rng.standard_normal((options.classes, options.width))
    mixing = rng.standard_normal((options.width, options.width)) / np.sqrt(options.width)
    features = np.maximum((rng.standard_normal((options.samples, options.width)) + means[labels]) @ mixing, 0)
    features = features.astype(np.float32)
    rows = [*_against_references(features, labels, options.repeats)]
    title = (
        f"Seconds of scores at N = {options.samples:,}, d = {options.width}, K = {options.classes}, median of"
        f" {options.repeats}; float32 features, float64 sums"
    )
    write_table(
        options.out, title, ["score", "common way", "here", "ratio", "after the pass", "values"], rows
    )
    with options.out.open("a", encoding="utf-8") as file:
        dense = (h_score, shrinkage_h_score, logme, transrate, sfda)
        everything = [score.compute for score in ranking_scores().values() if score.reads != "probabilities"]
        for line in (
            *_shared_pass("The five that are matrix products", dense, features, labels, options.repeats),
            *_shared_pass("All that read features", everything, features, labels, 1),
            *_memory(options),
        ):
            print(line)
            file.write(f"\n{line}\n")


def _against_references(
    features: NDArray[np.float32], labels: NDArray[np.int64], repeats: int
) -> list[list[str]]:
    statistics = Statistics.of(features, labels)
    pairs: list[tuple[str, Callable[[], float], Callable[[], float], Callable[[], float] | None]] = [
        (
            "H-score, pseudo-inverse",
            lambda: h_score_by_inverse(features, labels),
            lambda: h_score(features, labels).value,
            lambda: h_score(statistics).value,
        ),
        (
            "LogME, loop with the features",
            lambda: logme_by_loop(features, labels),
            lambda: logme(features, labels).value,
            lambda: logme(statistics).value,
        ),
        (
            "LogME, decomposition and fixed point",
            lambda: logme_by_decomposition(features, labels),
            lambda: logme(features, labels).value,
            lambda: logme(statistics).value,
        ),
        (
            "SFDA, generalised eigenvectors",
            lambda: sfda_by_eigenvectors(features, labels),
            lambda: sfda(features, labels, scaled=False).value,
            None,
        ),
    ]
    rows: list[list[str]] = []
    for name, reference, ours, shared in pairs:
        slow, expected = timed(reference, max(1, repeats // 2))
        fast, found = timed(ours, repeats)
        rest = "" if shared is None else f"{timed(shared, repeats)[0]:.2f}"
        rows.append(
            [
                name,
                f"{slow:.2f}",
                f"{fast:.2f}",
                f"{slow / fast:.1f} ×",
                rest,
                f"{expected:.5f} / {found:.5f}",
            ]
        )
        print(rows[-1], flush=True)
    gram = features.astype(np.float64)
    product, _ = timed(lambda: float((gram.T @ gram)[0, 0]), repeats)
    scatter = statistics.gram
    full, _ = timed(lambda: float(np.linalg.eigh(scatter).eigenvalues[0]), repeats)
    ours, _ = timed(lambda: float(in_eigenbasis(scatter, statistics.class_sums.T)[0][0]), repeats)
    rows.append(["floor: FᵀF in float64", "", f"{product:.2f}", "", "", ""])
    rows.append(["floor: eigendecomposition", f"{full:.2f}", f"{ours:.2f}", f"{full / ours:.1f} ×", "", ""])
    return rows


def _shared_pass(
    title: str,
    scores: Sequence[Callable[..., Score]],
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    repeats: int,
) -> list[str]:
    """Several scores after one reading, against the dearest alone."""
    alone = {score.__name__: timed(lambda s=score: s(features, labels).value, repeats)[0] for score in scores}

    def together() -> float:
        samples = read_samples(features, labels)
        return sum(score(samples).value for score in scores)

    all_of_them, _ = timed(together, repeats)
    dearest = max(alone, key=lambda name: alone[name])
    listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in alone.items())
    return [
        f"{title}, alone: {listed}; sum {sum(alone.values()):.2f} s. After one pass: {all_of_them:.2f} s,"
        f" {all_of_them / alone[dearest]:.2f} × the dearest ({dearest}),"
        f" {sum(alone.values()) / all_of_them:.1f} × faster than one by one."
    ]


def _memory(options: argparse.Namespace) -> list[str]:
    """Peak bytes of a streamed pass for N and 4 N samples."""
    peaks: list[float] = []
    for factor in (1, 4):
        rng = np.random.default_rng(0)

        def batches(count: int = factor * options.samples, rng: np.random.Generator = rng) -> object:
            for start in range(0, count, 500):
                size = min(500, count - start)
                yield (
                    rng.standard_normal((size, options.width), dtype=np.float32),
                    np.arange(start, start + size) % options.classes,
                )

        tracemalloc.start()
        Statistics.streamed(batches(), options.classes)  # pyright: ignore
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    return [
        f"Peak memory of a streamed pass: {peaks[0]:.0f} MiB for N, {peaks[1]:.0f} MiB for 4 N (d² in"
        f" float64: {options.width**2 * 8 / 2**20:.0f} MiB)."
    ]


def timed(run: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median seconds, and the value."""
    seconds: list[float] = []
    value = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - started)
    return middle.median(seconds), value


# --- how it is commonly done ------------------------------------------------------------------------------


def h_score_by_inverse(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Two covariances over all rows and a pseudo-inverse with a cut-off of 1e-15."""
    rows = features.astype(np.float64)
    classes = np.zeros_like(rows)
    for label in np.unique(labels):
        classes[labels == label] = rows[labels == label].mean(axis=0)
    inverse = np.linalg.pinv(_covariance(rows), rcond=1e-15)
    return float(np.trace(inverse @ _covariance(classes)))


def _covariance(rows: Array) -> Array:
    centred = rows - rows.mean(axis=0)
    return centred.T @ centred / (len(rows) - 1)


def logme_by_loop(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """A singular value decomposition, then for each class an iteration with products with the features."""
    rows = features.astype(np.float64)
    samples, width = rows.shape
    vectors, values, _ = np.linalg.svd(rows.T @ rows)
    found: list[float] = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        projected = vectors.T @ (rows.T @ target)
        alpha = beta = 1.0
        error = size = 0.0
        weights = np.zeros(width)
        for _ in range(11):
            ratio = alpha / beta
            effective = float((values / (values + ratio)).sum())
            weights = vectors @ (beta * projected / (alpha + beta * values))
            size = float(weights @ weights)
            error = float(((target - rows @ weights) ** 2).sum())
            alpha, beta = effective / size, (samples - effective) / error
            if abs(alpha / beta - ratio) / ratio <= 1e-3:
                break
        found.append(_evidence(values, samples, alpha, beta, error, size))
    return float(np.mean(found))


def logme_by_decomposition(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """A singular value decomposition and left singular vectors, then a scalar iteration for each class."""
    rows = features.astype(np.float64)
    samples = len(rows)
    vectors, values, _ = np.linalg.svd(rows.T @ rows)
    left = (rows @ vectors) / np.sqrt(values)
    found: list[float] = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        squares = (left.T @ target) ** 2
        rest = target.sum() - squares.sum()
        alpha = beta = 1.0
        error = size = 0.0
        for _ in range(11):
            ratio = alpha / beta
            effective = float((values / (values + ratio)).sum())
            size = float((values * squares / (values + ratio) ** 2).sum())
            error = float((squares / (1 + values / ratio) ** 2).sum() + rest)
            alpha, beta = effective / size, (samples - effective) / error
            if abs(alpha / beta - ratio) / ratio <= 1e-3:
                break
        found.append(_evidence(values, samples, alpha, beta, error, size))
    return float(np.mean(found))


def _evidence(values: Array, samples: int, alpha: float, beta: float, error: float, size: float) -> float:
    """Log evidence per sample, where there are more samples than features."""
    logarithms = len(values) * np.log(alpha) + samples * np.log(beta) - np.log(alpha + beta * values).sum()
    return float((logarithms - beta * error - alpha * size) / (2 * samples) - 0.5 * np.log(2 * np.pi))


def sfda_by_eigenvectors(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Covariances class by class and all generalised eigenvectors, twice."""
    rows = features.astype(np.float64)
    present = np.unique(labels)
    found, shrinkage = _fisher_posteriors(rows, labels, present, None)
    sureness = softmax(found, axis=1)[np.arange(len(rows)), labels]
    means = np.stack([rows[labels == label].mean(axis=0) for label in present])
    for place, label in enumerate(present):
        others = np.delete(means, place, axis=0).mean(axis=0)
        own = labels == label
        rows[own] = sureness[own, None] * rows[own] + (1 - sureness[own, None]) * others
    found, _ = _fisher_posteriors(rows, labels, present, shrinkage)
    return float(found[np.arange(len(rows)), labels].mean())


def _fisher_posteriors(
    rows: Array, labels: NDArray[np.int64], present: Sequence[int], shrinkage: float | None
) -> tuple[Array, float]:
    samples, width = rows.shape
    within = np.zeros((width, width))
    for label in present:
        own = rows[labels == label]
        within += len(own) / samples * np.cov(own, rowvar=False, bias=True)
    total = np.cov(rows, rowvar=False, bias=True)
    if shrinkage is None:
        vector = within.sum(axis=1)
        for _ in range(6):
            vector = within @ vector
            vector /= np.linalg.norm(vector)
        shrinkage = max(float(np.exp(-5 * vector @ within @ vector)), 1e-10)
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / width * np.eye(width)
    _, project = eigh(total - within, within)
    projected = rows @ project
    means = np.stack([rows[labels == label].mean(axis=0) for label in present]) @ project
    priors = np.log([float((labels == label).mean()) for label in present])
    return softmax(projected @ means.T - 0.5 * (means**2).sum(axis=1) + priors, axis=1), shrinkage


if __name__ == "__main__":
    main()
