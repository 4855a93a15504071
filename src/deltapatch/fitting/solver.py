"""The head on pooled features: a convex problem, so it is solved and not trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ..errors import DeltapatchError
from .history import Epoch
from .loop import Outcome, Scored

PENALTIES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
DEFAULT_PENALTY = 3e-5
PATIENCE = 3

# An iteration that lowers the penalised loss by less is the last one at a penalty. Held-out accuracy does not
# change any more at this point, and single precision resolves little below it.
SMALLEST_GAIN = 1e-6
MOST_ITERATIONS = 200


def solve_head(
    head: nn.Linear,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Solves multinomial logistic regression by L-BFGS and leaves the solution in ``head``.

    With rows z that are the features less their mean, divided by one number so that their mean squared
    length is 1, it minimises

        mean cross entropy(W z + b) + penalty / 2 · ‖W‖²

    and then folds mean and number into the layer, so that it takes features as they come. With validation
    rows the penalty goes down through `PENALTIES`, each solution starting from the one before, and the
    solution that is best on them is kept; the path ends early after `PATIENCE` points in a row that are
    not better than the best so far. Without validation rows the only point is `DEFAULT_PENALTY`.

    The result depends on the arguments alone: not on the layer's parameters before, nor on random numbers.
    Ctrl-C keeps the best solution so far; before the first one the layer stays as it was.

    Args:
        head: the layer, D features to C logits.
        training: features of shape (N, D) and int64 labels of shape (N,); a class may have no row.
        validation: the same for the images that choose the penalty; None, or no row, if there are none.
        class_weights: weight of each class in the cross entropy, shape (C,).
        label_smoothing: of the training loss, from 0 to 1; validation is never smoothed.
        device: where it is computed.

    Returns:
        An outcome whose history has one entry for each point of the path. Its ``number`` counts points
        from 1, its ``training_loss`` is without the penalty, and its ``learning_rate`` is 0, since there
        is none. ``best`` is the number of the point that was kept; 0 if there is none.

    Raises:
        DeltapatchError: there is no training row, or a feature is NaN or infinite.

    Example:
        >>> outcome = solve_head(head, (features, labels), (validation_features, validation_labels))
        >>> outcome.history[outcome.best - 1].validation_accuracy
    """
    chosen_by = validation if validation is not None and len(validation[1]) else None
    _check(training[0], "training")
    if chosen_by is not None:
        _check(chosen_by[0], "validation")
    scaling = _Scaling.of(training[0])
    weights = None if class_weights is None else class_weights.to(device)
    regression = _Regression(scaling.rows(training, device), head.out_features, weights, label_smoothing)
    judge = None if chosen_by is None else scaling.rows(chosen_by, device)
    outcome, solution = _follow(regression, judge, (DEFAULT_PENALTY,) if judge is None else PENALTIES)
    if solution is not None:
        scaling.fold_into(head, solution)
    return outcome


def _check(features: Tensor, name: str) -> None:
    if not len(features):
        raise DeltapatchError(f"there are no {name} features to solve a head on; give at least one row.")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise DeltapatchError(
            f"the base's features of {bad} of {len(features)} {name} images are NaN or infinite; let the base"
            " compute in float32, or check its weights."
        )


@dataclass(frozen=True)
class _Rows:
    """Scaled features of shape (N, D) and labels of shape (N,)."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Solution:
    """Weight of shape (C, D) and bias of shape (C,) for scaled features."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Scaling:
    """What is taken off every row, shape (D,), and the one number that rows are divided by.

    A number for each feature would be no better on average, and would blow up features that hardly vary.
    """

    mean: Tensor
    length: float

    @classmethod
    def of(cls, features: Tensor) -> "_Scaling":
        # In double precision the mean of equal numbers is that number: constant features become exactly 0.
        mean = features.mean(0, dtype=torch.float64).float()
        squares = torch.linalg.vector_norm(features - mean, dim=1, dtype=torch.float64).square()
        return cls(mean, float(squares.mean().sqrt()) or 1.0)

    def rows(self, examples: tuple[Tensor, Tensor], device: torch.device | str) -> _Rows:
        features, labels = examples
        return _Rows(((features.float() - self.mean) / self.length).to(device), labels.to(device))

    @torch.no_grad()
    def fold_into(self, head: nn.Linear, solution: _Solution) -> None:
        # In double precision, since a large mean times the weights is taken off the bias.
        weight = solution.weight.cpu().double() / self.length
        head.weight.copy_(weight)
        head.bias.copy_(solution.bias.cpu().double() - weight @ self.mean.cpu().double())


class _Regression:
    """The training rows, and the solution at the penalty that was solved last (all zeros at first)."""

    def __init__(
        self, rows: _Rows, classes: int, class_weights: Tensor | None, label_smoothing: float
    ) -> None:
        self.training = rows
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.weight = rows.features.new_zeros(classes, rows.features.shape[1], requires_grad=True)
        self.bias = rows.features.new_zeros(classes, requires_grad=True)

    def logits(self, rows: _Rows) -> Tensor:
        return linear(rows.features, self.weight, self.bias)

    def loss(self, logits: Tensor) -> Tensor:
        return cross_entropy(
            logits, self.training.labels, weight=self.class_weights, label_smoothing=self.label_smoothing
        )

    def solve(self, penalty: float) -> None:
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=MOST_ITERATIONS,
            tolerance_grad=0.0,
            tolerance_change=SMALLEST_GAIN,
            line_search_fn="strong_wolfe",
        )

        def penalised_loss() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(self.logits(self.training)) + penalty / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(penalised_loss)

    @torch.no_grad()
    def training_score(self) -> Scored:
        logits = self.logits(self.training)
        return Scored(float(self.loss(logits)), _accuracy(logits, self.training.labels))

    @torch.no_grad()
    def validation_score(self, rows: _Rows) -> Scored:
        """As the training loop scores: weighted, not smoothed, and divided by the number of images."""
        logits = self.logits(rows)
        loss = cross_entropy(logits, rows.labels, weight=self.class_weights, reduction="sum")
        return Scored(float(loss) / len(rows.labels), _accuracy(logits, rows.labels))

    def solution(self) -> _Solution:
        return _Solution(self.weight.detach().clone(), self.bias.detach().clone())


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def _follow(
    regression: _Regression, judge: _Rows | None, penalties: Sequence[float]
) -> tuple[Outcome, _Solution | None]:
    """Goes down the path of penalties; returns its history and the solution that is best on ``judge``."""
    outcome, best = Outcome(), None
    try:
        for number, penalty in enumerate(penalties, start=1):
            if number - outcome.best > PATIENCE:
                break
            started = time.perf_counter()
            regression.solve(penalty)
            fitted = regression.training_score()
            scored = None if judge is None else regression.validation_score(judge)
            outcome.history.append(
                Epoch(
                    number=number,
                    training_loss=fitted.loss,
                    training_accuracy=fitted.accuracy,
                    validation_loss=None if scored is None else scored.loss,
                    validation_accuracy=None if scored is None else scored.accuracy,
                    learning_rate=0.0,
                    seconds=time.perf_counter() - started,
                )
            )
            if scored is None or outcome.score is None or scored.better_than(outcome.score):
                best = regression.solution()
                outcome.score, outcome.best = scored, number
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome, best
