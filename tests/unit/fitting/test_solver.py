"""The solved head: its gradient, scikit-learn's answers, and the examples that break solvers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltapatch.errors import DeltapatchError
from deltapatch.fitting import solver
from deltapatch.fitting.loop import Outcome, Scored
from deltapatch.fitting.solver import DEFAULT_PENALTY, PATIENCE, PENALTIES, solve_head

Examples = tuple[Tensor, Tensor]


def _overlapping(count: int = 120, features: int = 8, classes: int = 3, seed: int = 0) -> Examples:
    """Rows far from the origin, features of very different scales, and classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(count, features, generator=generator)
    noise = torch.randn(count, classes, generator=generator)
    labels = (signal[:, :classes] + noise).argmax(1)
    return signal * torch.logspace(-1, 1, features) + 5, labels


def _head(examples: Examples, classes: int = 3) -> nn.Linear:
    return nn.Linear(examples[0].shape[1], classes)


def _scaled(features: Tensor) -> tuple[Tensor, float]:
    """Rows as the penalty sees them, in float64, and the number they were divided by."""
    centred = features.double() - features.double().mean(0)
    length = float(centred.square().sum(1).mean().sqrt())
    return centred / length, length


def _gradient(head: nn.Linear, examples: Examples, penalty: float, **options: Tensor | float) -> Tensor:
    """Of the penalised loss at the head's parameters, in float64."""
    rows, length = _scaled(examples[0])
    weight = (head.weight.detach().double() * length).requires_grad_()
    mean = examples[0].double().mean(0)
    bias = (head.bias.detach().double() + head.weight.detach().double() @ mean).requires_grad_()
    loss = cross_entropy(rows @ weight.T + bias, examples[1], **options)
    (loss + penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return torch.cat([weight.grad.flatten(), bias.grad])


def _answers(head: nn.Linear, features: Tensor) -> Tensor:
    with torch.no_grad():
        return head(features)


def _parameters(head: nn.Linear) -> Tensor:
    return torch.cat([head.weight.detach().flatten(), head.bias.detach()]).clone()


# --- the solution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weights": torch.tensor([0.2, 1.0, 3.0])},
        {"label_smoothing": 0.2, "class_weights": torch.tensor([2.0, 1.0, 0.5])},
    ],
    ids=["plain", "smoothed", "weighted", "both"],
)
def test_the_gradient_of_the_penalised_loss_is_zero_at_the_solution(options) -> None:
    examples = _overlapping()
    head = _head(examples)
    solve_head(head, examples, None, **options)
    in_float64 = {"label_smoothing": options.get("label_smoothing", 0.0)}
    if "class_weights" in options:
        in_float64["weight"] = options["class_weights"].double()
    solved = _gradient(head, examples, DEFAULT_PENALTY, **in_float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    at_the_start = _gradient(head, examples, DEFAULT_PENALTY, **in_float64)
    assert solved.abs().max() < 2e-4
    assert at_the_start.abs().max() > 2e-2


@pytest.mark.parametrize("penalty", [PENALTIES[0], DEFAULT_PENALTY])
@pytest.mark.parametrize("features", [8, 200])
def test_answers_equal_those_of_scikit_learn_at_the_same_penalty(monkeypatch, penalty, features) -> None:
    monkeypatch.setattr(solver, "DEFAULT_PENALTY", penalty)
    examples = _overlapping(features=features)
    head = _head(examples)
    solve_head(head, examples, None)
    rows = _scaled(examples[0])[0].numpy()
    reference = LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-10, max_iter=100_000)
    expected = reference.fit(rows, examples[1].numpy()).predict_proba(rows)
    np.testing.assert_allclose(_answers(head, examples[0]).softmax(1).numpy(), expected, atol=5e-3)


def test_a_weighted_class_counts_as_often_as_its_weight_says() -> None:
    features, labels = _overlapping()
    twice = torch.cat([torch.arange(len(labels)), (labels == 1).nonzero()[:, 0]])
    # The copies would move the mean, and with it the rows' lengths that the penalty depends on.
    features = features - features.mean(0)
    weighted, repeated = _head((features, labels)), _head((features, labels))
    solve_head(weighted, (features, labels), None, class_weights=torch.tensor([1.0, 2.0, 1.0]))
    solve_head(repeated, (features[twice], labels[twice]), None)
    torch.testing.assert_close(
        _answers(weighted, features).softmax(1), _answers(repeated, features).softmax(1), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_of_the_features_does_not_change_the_answers(factor) -> None:
    features, labels = _overlapping()
    first, second = _head((features, labels)), _head((features, labels))
    solve_head(first, (features, labels), None)
    solve_head(second, (features * factor - 7 * factor, labels), None)
    torch.testing.assert_close(
        _answers(first, features).softmax(1),
        _answers(second, features * factor - 7 * factor).softmax(1),
        atol=1e-2,
        rtol=0,
    )


def test_neither_the_callers_random_state_nor_the_layers_parameters_change_the_result() -> None:
    examples, judge = _overlapping(), _overlapping(seed=1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        head = _head(examples)
        solve_head(head, examples, judge)
        results.append(_parameters(head))
    state = torch.get_rng_state()
    solve_head(head, examples, judge)
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_works_where_the_caller_has_switched_gradients_off() -> None:
    examples = _overlapping()
    inside, outside = _head(examples), _head(examples)
    with torch.no_grad():
        solve_head(inside, examples, None)
    solve_head(outside, examples, None)
    assert torch.equal(_parameters(inside), _parameters(outside))
    assert inside.weight.requires_grad
    assert inside.weight.grad is None


# --- the path of penalties --------------------------------------------------------------------------------


def test_the_best_point_on_the_validation_rows_is_kept_and_described() -> None:
    examples, judge = _overlapping(40, 30), _overlapping(60, 30, seed=1)
    head = _head(examples)
    outcome = solve_head(head, examples, judge)
    scores = [Scored(epoch.validation_loss or 0, epoch.validation_accuracy or 0) for epoch in outcome.history]
    best = scores[outcome.best - 1]
    assert outcome.score == best
    assert not any(score.better_than(best) for score in scores)
    assert any(best.better_than(score) for score in scores)
    logits = _answers(head, judge[0])
    assert float((logits.argmax(1) == judge[1]).float().mean()) == pytest.approx(best.accuracy)
    assert float(cross_entropy(logits, judge[1])) == pytest.approx(best.loss, rel=1e-4)


def test_the_kept_point_is_the_solution_at_its_own_penalty() -> None:
    examples, judge = _overlapping(), _overlapping(seed=1)
    head = _head(examples)
    outcome = solve_head(head, examples, judge)
    assert _gradient(head, examples, PENALTIES[outcome.best - 1]).abs().max() < 2e-4


def test_each_point_is_one_entry_of_the_history_and_fits_the_training_rows_more_closely() -> None:
    examples = _overlapping(features=60)
    outcome = solve_head(_head(examples), examples, _overlapping(features=60, seed=1))
    losses = [epoch.training_loss for epoch in outcome.history]
    assert [epoch.number for epoch in outcome.history] == list(range(1, len(losses) + 1))
    assert all(epoch.learning_rate == 0 for epoch in outcome.history)
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_the_path_ends_when_validation_has_not_become_better_several_times() -> None:
    """Validation labels are the training labels of other classes: the first point is the least bad."""
    features, labels = _overlapping()
    outcome = solve_head(_head((features, labels)), (features, labels), (features, (labels + 1) % 3))
    assert outcome.best == 1
    assert len(outcome.history) == 1 + PATIENCE


def test_the_path_goes_to_its_end_while_validation_becomes_better() -> None:
    examples = _overlapping(features=60)
    outcome = solve_head(_head(examples), examples, examples)
    assert outcome.best == len(outcome.history) == len(PENALTIES)


@pytest.mark.parametrize("validation", [None, (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))])
def test_without_a_validation_row_there_is_one_point_at_the_default_penalty(validation) -> None:
    examples = _overlapping()
    head = _head(examples)
    outcome = solve_head(head, examples, validation)
    assert (outcome.best, outcome.score, len(outcome.history)) == (1, None, 1)
    assert outcome.history[0].validation_loss is None
    assert _gradient(head, examples, DEFAULT_PENALTY).abs().max() < 2e-4
    loss = cross_entropy(_answers(head, examples[0]), examples[1])
    assert outcome.history[0].training_loss == pytest.approx(float(loss), rel=1e-4)


def test_the_validation_loss_is_weighted_but_not_smoothed() -> None:
    examples, judge = _overlapping(), _overlapping(seed=1)
    weights = torch.tensor([0.5, 1.0, 2.0])
    head = _head(examples)
    outcome = solve_head(head, examples, judge, class_weights=weights, label_smoothing=0.3)
    summed = cross_entropy(_answers(head, judge[0]), judge[1], weight=weights, reduction="sum")
    assert outcome.score is not None
    assert outcome.score.loss == pytest.approx(float(summed) / len(judge[1]), rel=1e-4)


# --- ctrl-c -----------------------------------------------------------------------------------------------


class _CtrlC:
    """Stands in for the loss, and is interrupted when it is asked for the given time."""

    def __init__(self, at: float = float("inf")) -> None:
        self.calls, self.at = 0, at

    def __call__(self, *arguments: Tensor, **options: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return cross_entropy(*arguments, **options)


def _interrupted(
    monkeypatch, at: float, path: tuple[float, ...] = PENALTIES
) -> tuple[Outcome, nn.Linear, int]:
    loss = _CtrlC(at)
    monkeypatch.setattr(solver, "cross_entropy", loss)
    monkeypatch.setattr(solver, "PENALTIES", path)
    examples = _overlapping()
    torch.manual_seed(0)
    head = _head(examples)
    return solve_head(head, examples, _overlapping(seed=1)), head, loss.calls


def test_ctrl_c_keeps_the_best_solution_so_far(monkeypatch) -> None:
    two_points, expected, calls = _interrupted(monkeypatch, float("inf"), PENALTIES[:2])
    outcome, head, _ = _interrupted(monkeypatch, calls + 3)
    assert outcome.interrupted
    assert not two_points.interrupted
    assert len(outcome.history) == 2
    assert (outcome.best, outcome.score) == (two_points.best, two_points.score)
    assert torch.equal(_parameters(head), _parameters(expected))


def test_ctrl_c_before_the_first_solution_leaves_the_layer_as_it_was(monkeypatch) -> None:
    outcome, head, _ = _interrupted(monkeypatch, 3)
    torch.manual_seed(0)
    assert torch.equal(_parameters(head), _parameters(_head(_overlapping())))
    assert (outcome.interrupted, outcome.best, outcome.score, outcome.history) == (True, 0, None, [])


# --- examples that break solvers --------------------------------------------------------------------------


@pytest.mark.parametrize("with_validation", [False, True])
def test_separable_rows_are_all_right_and_the_weights_stay_finite(with_validation) -> None:
    features, labels = _overlapping()
    examples = (features + 100 * torch.eye(3, 8)[labels], labels)
    head = _head(examples)
    outcome = solve_head(head, examples, examples if with_validation else None)
    assert outcome.history[outcome.best - 1].training_accuracy == 1
    assert (_answers(head, examples[0]).argmax(1) == labels).all()
    assert _parameters(head).isfinite().all()


def test_a_class_without_a_row_is_never_the_answer_and_the_others_are_as_without_it() -> None:
    features, labels = _overlapping()
    without, among = _head((features, labels), 3), _head((features, labels), 4)
    solve_head(without, (features, labels), None)
    # Class 1 of four has no row.
    solve_head(among, (features, labels + (labels > 0)), None, class_weights=torch.ones(4))
    probabilities = _answers(among, features).softmax(1)
    assert probabilities[:, 1].max() < 1e-2
    torch.testing.assert_close(
        probabilities[:, [0, 2, 3]], _answers(without, features).softmax(1), atol=1e-2, rtol=0
    )


def test_more_features_than_rows() -> None:
    examples = _overlapping(12, 500)
    head = _head(examples)
    solve_head(head, examples, _overlapping(12, 500, seed=1))
    assert _parameters(head).isfinite().all()
    assert (_answers(head, examples[0]).argmax(1) == examples[1]).all()


def test_a_constant_feature_gets_no_weight() -> None:
    features, labels = _overlapping()
    features = torch.cat([features, torch.full((len(features), 1), 0.1), torch.zeros(len(features), 1)], 1)
    head = _head((features, labels))
    solve_head(head, (features, labels), None)
    assert not head.weight[:, -2:].any()
    assert _parameters(head).isfinite().all()


def test_constant_features_alone_give_the_shares_of_the_classes() -> None:
    features, labels = torch.full((10, 4), 0.3), torch.tensor([0] * 6 + [1] * 3 + [2])
    head = _head((features, labels))
    outcome = solve_head(head, (features, labels), None)
    assert not head.weight.any()
    torch.testing.assert_close(
        _answers(head, features)[0].softmax(0), torch.tensor([0.6, 0.3, 0.1]), atol=5e-3, rtol=0
    )
    entropy = -(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1))
    assert outcome.history[0].training_loss == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("labels", [[2, 0, 1], [1]])
def test_one_row_a_class_and_one_row_in_all_are_learned(labels) -> None:
    examples = (_overlapping(len(labels))[0], torch.tensor(labels))
    head = _head(examples)
    solve_head(head, examples, examples)
    assert _parameters(head).isfinite().all()
    assert _answers(head, examples[0]).argmax(1).tolist() == labels


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_features_that_are_not_finite_are_refused_and_the_layer_stays_as_it_was(bad, part) -> None:
    examples, judge = _overlapping(), _overlapping(seed=1)
    (examples if part == "training" else judge)[0][[3, 5], 2] = bad
    head = _head(examples)
    before = _parameters(head)
    with pytest.raises(DeltapatchError, match=f"2 of 120 {part} images are NaN or infinite"):
        solve_head(head, examples, judge)
    assert torch.equal(_parameters(head), before)


def test_no_training_row_is_refused() -> None:
    examples = (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DeltapatchError, match="no training features"):
        solve_head(_head(examples), examples, None)
