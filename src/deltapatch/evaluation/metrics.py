"""How well a model answered on one labelled split, and whether it beats another on the same images."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from sklearn.metrics import confusion_matrix, f1_score, log_loss, recall_score, top_k_accuracy_score

from deltapatch.errors import DeltapatchError

Verdict = Literal["better", "worse", "tie"]

SIGNIFICANCE = 0.05
CALIBRATION_BINS = 15
_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_proportion(cls, successes: int, trials: int) -> "Interval":
        """The Wilson score interval of a proportion; ``trials`` is at least 1."""
        bounds = binomtest(successes, trials).proportion_ci(1 - SIGNIFICANCE, method="wilson")
        return cls(successes / trials, float(bounds.low), float(bounds.high))


@dataclass(frozen=True)
class ClassResult:
    """One class of a split.

    Attributes:
        name: the class.
        count: images that have this label.
        recall: the part of them that was answered with this class; None without images.
        precision: the part of the answers with this class that was right; None where it was never answered.
    """

    name: str
    count: int
    recall: Interval | None
    precision: float | None


@dataclass(frozen=True)
class ConfusedPair:
    """``count`` of the ``total`` images of the class ``truth`` were taken for ``prediction``."""

    truth: str
    prediction: str
    count: int
    total: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model answered on one labelled split.

    Attributes:
        classes: the names of the K classes.
        labels: the true class of each image, ``(N,)``.
        probabilities: one row per image that sums to one, ``(N, K)``.
        skipped: images of the split that could not be read; they count in no figure.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    skipped: int = 0

    def __post_init__(self) -> None:
        count, width = len(self.labels), len(self.classes)
        if count == 0:
            raise DeltapatchError("The split to evaluate has no readable image; give one with at least one.")
        if width < 2:
            raise DeltapatchError(f"An evaluation needs two or more classes and got {width}; name them all.")
        if self.labels.shape != (count,) or self.probabilities.shape != (count, width):
            raise DeltapatchError(
                f"Labels {self.labels.shape} and probabilities {self.probabilities.shape} do not fit; "
                f"for {width} classes give shapes (N,) and (N, {width})."
            )
        if self.labels.min() < 0 or self.labels.max() >= width:
            raise DeltapatchError(
                f"Labels run from {self.labels.min()} to {self.labels.max()} but there are {width} classes; "
                f"number them 0 to {width - 1}."
            )
        self._check_probabilities()

    def _check_probabilities(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.probabilities).all(axis=1))
        if len(bad):
            raise DeltapatchError(
                f"The probabilities of {len(bad)} of {len(self.labels)} images are not finite (first: image "
                f"{bad[0]}); the model has diverged, fit it again with a lower learning rate."
            )
        sums = self.probabilities.sum(axis=1, dtype=np.float64)
        bad = np.flatnonzero((self.probabilities < 0).any(axis=1) | (np.abs(sums - 1) > _SUM_TOLERANCE))
        if len(bad):
            raise DeltapatchError(
                f"The row of image {bad[0]} is not a set of probabilities (it sums to {sums[bad[0]]:.4g}); "
                "apply a softmax in float32 to the logits first."
            )

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """The most probable class of each image, ``(N,)``."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each image was answered right, ``(N,)``."""
        return self.predictions == self.labels

    @property
    def accuracy(self) -> Interval:
        """The part of the images that was answered right."""
        return Interval.of_proportion(int(self.correct.sum()), len(self.labels))

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images."""
        present = np.unique(self.labels)
        return float(recall_score(self.labels, self.predictions, labels=present, average="macro"))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that have images."""
        present = np.unique(self.labels)
        return float(f1_score(self.labels, self.predictions, labels=present, average="macro"))

    @property
    def top5(self) -> Interval | None:
        """The part of the images with the true class among the five most probable; None without a sixth."""
        if len(self.classes) <= 5:
            return None
        every = np.arange(len(self.classes))
        hits = top_k_accuracy_score(self.labels, self.probabilities, k=5, normalize=False, labels=every)
        return Interval.of_proportion(int(hits), len(self.labels))

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of each class (row) were answered with each class (column), ``(K, K)``."""
        return confusion_matrix(self.labels, self.predictions, labels=np.arange(len(self.classes)))

    @property
    def per_class(self) -> tuple[ClassResult, ...]:
        """One result for each class, in the order of the classes."""
        right = self.confusion.diagonal()
        counts, answers = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return tuple(
            ClassResult(
                name,
                int(counts[i]),
                Interval.of_proportion(int(right[i]), int(counts[i])) if counts[i] else None,
                float(right[i] / answers[i]) if answers[i] else None,
            )
            for i, name in enumerate(self.classes)
        )

    @property
    def log_loss(self) -> float:
        """The mean negative log-probability of the true class, in nats."""
        return float(log_loss(self.labels, self.probabilities, labels=np.arange(len(self.classes))))

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: the mean gap between confidence and accuracy over 15 equal bins."""
        # Imported here because it takes longer to import than everything else in this file.
        from torchmetrics.functional.classification import multiclass_calibration_error

        error = multiclass_calibration_error(
            torch.from_numpy(self.probabilities),
            torch.from_numpy(self.labels),
            num_classes=len(self.classes),
            n_bins=CALIBRATION_BINS,
        )
        return error.item()

    def most_confused(self, k: int) -> list[int]:
        """At most ``k`` wrong images, the ones with the highest confidence in a wrong class first."""
        wrong = np.flatnonzero(~self.correct)
        confidence = self.probabilities[wrong, self.predictions[wrong]]
        return wrong[np.argsort(-confidence, kind="stable")[:k]].tolist()

    def most_confused_pairs(self, k: int) -> list[ConfusedPair]:
        """At most ``k`` pairs of a class and the wrong answer that it got, the most frequent first."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:k]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        totals = self.confusion.sum(axis=1)
        return [
            ConfusedPair(self.classes[row], self.classes[column], int(wrong[row, column]), int(totals[row]))
            for row, column in pairs
            if wrong[row, column]
        ]

    def figures(self, prefix: str) -> dict[str, float]:
        """Every figure by name, all finite: ``{"test/accuracy": 0.87, ...}`` for the prefix ``test``."""
        accuracy = self.accuracy
        figures = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
            "images": float(len(self.labels)),
            "skipped": float(self.skipped),
        }
        if self.top5 is not None:
            figures["top5_accuracy"] = self.top5.value
        return {f"{prefix}/{name}": value for name, value in figures.items()}


@dataclass(frozen=True)
class PairedDifference:
    """How the accuracy of one model differs from another's on the same images.

    Attributes:
        difference: the first model's accuracy minus the second's.
        p_value: of the exact McNemar test, two-sided.
        only_first: images that only the first model answered right.
        only_second: images that only the second model answered right.
    """

    difference: Interval
    p_value: float
    only_first: int
    only_second: int

    @property
    def verdict(self) -> Verdict:
        """Whether the first model is better or worse than the second; a tie unless p < 0.05."""
        if self.p_value >= SIGNIFICANCE:
            return "tie"
        return "better" if self.difference.value > 0 else "worse"


def paired_difference(first: Evaluation, second: Evaluation) -> PairedDifference:
    """Compares two models that answered the same images in the same order; see `compare_answers`."""
    if first.classes != second.classes or not np.array_equal(first.labels, second.labels):
        raise DeltapatchError(
            f"Two evaluations with {len(first.labels)} and {len(second.labels)} images do not have the same "
            "classes and labels; evaluate both models on the same split in the same order."
        )
    return compare_answers(first.correct, second.correct)


def compare_answers(first: NDArray[Any], second: NDArray[Any]) -> PairedDifference:
    """Compares which images two models answered right, each of shape (images,).

    The interval is Bonett and Price's, which stays sensible where the models disagree on few images or none:
    two images are added on which they disagree, one in favour of each. The exact McNemar test is the more
    careful of the two: near p = 0.05 a tie can have an interval without zero.

    For models that were fitted with several seeds an answer is the share of the seeds with which it is right.
    The test then counts an image for the model with the larger share.
    """
    differences = first.astype(np.float64) - second.astype(np.float64)
    only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
    disagreements = only_first + only_second
    p_value = float(binomtest(only_first, disagreements).pvalue) if disagreements else 1.0
    total = len(differences) + 2
    centre = float(differences.sum()) / total
    variance = (float((differences**2).sum()) + 2) / total - centre**2
    margin = float(norm.ppf(1 - SIGNIFICANCE / 2)) * (variance / total) ** 0.5
    interval = Interval(float(differences.mean()), max(centre - margin, -1.0), min(centre + margin, 1.0))
    return PairedDifference(interval, p_value, only_first, only_second)
