"""The training loop on linear models, whose losses can be worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.examples import StoredExamples
from deltapatch.fitting.history import Epoch
from deltapatch.fitting.loop import Outcome, Progress, Scored, train


class Linear(nn.Module):
    """Zero weights and the given biases: every example gets the biases as its first logits."""

    def __init__(self, *biases: float) -> None:
        super().__init__()
        self.layer = nn.Linear(2, len(biases))
        nn.init.zeros_(self.layer.weight)
        self.layer.bias = nn.Parameter(torch.tensor(biases, dtype=torch.float32))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layer(inputs[0])


def _examples(*labels: int, batch_size: int = 8, seed: int | None = None) -> StoredExamples:
    """One example a label, with the label in its first feature."""
    inputs = torch.stack([torch.tensor(labels).float(), torch.ones(len(labels))], 1)
    return StoredExamples([inputs], torch.tensor(labels), batch_size, seed)


def _train(
    model: nn.Module, training: StoredExamples, validation: StoredExamples | None = None, **options: Any
) -> Outcome:
    given = {name: options.pop(name) for name in ("class_weights", "progress") if name in options}
    return train(model, training, validation, FitConfig(**options), **given)


def _first_loss(*labels: int, biases: tuple[float, ...], **options: Any) -> float:
    """The loss of the first step, before anything has been learned."""
    return _train(Linear(*biases), _examples(*labels), epochs=1, **options).history[0].training_loss


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_loss_of_logits_that_are_all_zero_is_the_logarithm_of_the_number_of_classes() -> None:
    assert _first_loss(0, 2, 1, biases=(0, 0, 0)) == pytest.approx(math.log(3))


def test_label_smoothing_mixes_the_loss_with_that_of_all_classes_alike() -> None:
    probabilities = torch.tensor([3.0, 1.0]).softmax(0).log()
    smooth = 0.8 * -probabilities[0] + 0.2 * -probabilities.mean()
    assert _first_loss(0, 0, biases=(3, 1), label_smoothing=0.2) == pytest.approx(float(smooth))


def test_class_weights_weigh_the_mean_over_the_images() -> None:
    first, second = (-torch.tensor([2.0, 0.0]).log_softmax(0)).tolist()
    expected = (3 * 0.5 * first + 1 * 2 * second) / (3 * 0.5 + 1 * 2)
    weights = torch.tensor([0.5, 2.0])
    assert _first_loss(0, 0, 0, 1, biases=(2, 0), class_weights=weights) == pytest.approx(expected)


def test_validation_is_not_smoothed() -> None:
    outcome = _train(
        Linear(3, 1), _examples(0, 0), _examples(0, 0), epochs=1, learning_rate=1e-12, label_smoothing=0.5
    )
    assert outcome.history[0].validation_loss == pytest.approx(math.log(1 + math.exp(-2)))


# --- which epoch is kept ----------------------------------------------------------------------------------


def test_separable_examples_are_learned() -> None:
    outcome = _train(Linear(0, 0), _examples(0, 1, 0, 1), _examples(1, 0), epochs=30, learning_rate=0.1)
    assert outcome.score is not None
    assert outcome.score.accuracy == 1
    assert outcome.history[-1].training_accuracy == 1


def test_the_starting_point_is_kept_where_training_only_makes_validation_worse() -> None:
    model = Linear(0, 1)
    outcome = _train(model, _examples(0, 0), _examples(1, 1), epochs=3, learning_rate=0.5, patience=None)
    assert (outcome.best, len(outcome.history)) == (0, 3)
    assert outcome.score is not None
    assert outcome.score.accuracy == 1
    assert model.layer.bias.tolist() == [0, 1]
    assert not model.layer.weight.any()


def test_the_best_epoch_is_kept_where_training_goes_on_past_it() -> None:
    """Training wants class 0 for sure; three of four validation images do: their loss has a minimum."""
    model, validation = Linear(0, 0), _examples(0, 0, 0, 1)
    outcome = _train(model, _examples(0, 0), validation, epochs=40, learning_rate=0.3, patience=None)
    losses = [epoch.validation_loss for epoch in outcome.history]
    assert 1 < outcome.best < 40
    assert losses[outcome.best - 1] == min(losses)
    with torch.no_grad():
        kept = cross_entropy(model(validation.inputs), validation.labels)
    assert float(kept) == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_fit_after_that_many_epochs_without_gain(patience: int) -> None:
    outcome = _train(
        Linear(0, 1), _examples(0, 0), _examples(1, 1), epochs=9, learning_rate=0.5, patience=patience
    )
    assert len(outcome.history) == patience


def test_patience_counts_anew_after_each_gain() -> None:
    outcome = _train(Linear(0, 1), _examples(0, 0), _examples(0, 0), epochs=6, patience=1)
    assert outcome.best == len(outcome.history) == 6


def test_without_validation_the_last_epoch_is_kept_and_patience_has_no_say() -> None:
    model = Linear(0, 0)
    outcome = _train(model, _examples(0, 1), epochs=4, patience=1)
    assert (outcome.best, outcome.score, len(outcome.history)) == (4, None, 4)
    assert model.layer.weight.any()


def test_better_is_a_higher_accuracy_and_with_the_same_a_lower_loss() -> None:
    assert Scored(loss=2, accuracy=0.8).better_than(Scored(loss=1, accuracy=0.7))
    assert Scored(loss=1, accuracy=0.8).better_than(Scored(loss=2, accuracy=0.8))
    assert not Scored(loss=1, accuracy=0.8).better_than(Scored(loss=1, accuracy=0.8))


# --- steps ------------------------------------------------------------------------------------------------


def test_a_last_batch_of_one_example_is_left_out_since_it_has_no_statistics() -> None:
    seen: list[int] = []
    progress = Progress(step=lambda epoch, step, images, loss, accuracy: seen.append(images))
    _train(Linear(0, 0), _examples(0, 1, 0, 1, 0, batch_size=2), epochs=1, progress=progress)
    assert seen == [2, 4]


def test_biases_do_not_decay_and_weights_do() -> None:
    model = Linear(1, 1)
    nn.init.ones_(model.layer.weight)
    # All logits are equal and so are the classes: the gradient is zero, and only decay can move anything.
    inputs = torch.zeros(2, 2)
    _train(model, StoredExamples([inputs], torch.tensor([0, 1]), 8), epochs=5, weight_decay=0.5)
    assert model.layer.bias.tolist() == [1, 1]
    assert (model.layer.weight < 1).all()


def test_the_learning_rate_rises_to_the_one_given_and_falls_to_nearly_nothing() -> None:
    rates: list[float] = []
    progress = Progress(epoch=lambda epoch: rates.append(epoch.learning_rate))
    _train(Linear(0, 0), _examples(0, 1), epochs=10, learning_rate=0.1, progress=progress)
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates.index(max(rates)) == 2
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_fit_of_one_or_two_steps_has_a_schedule_too(epochs: int) -> None:
    model = Linear(0, 0)
    _train(model, _examples(0, 1), epochs=epochs, learning_rate=0.1)
    assert model.layer.weight.any()


def test_each_epoch_is_told_and_the_model_is_left_in_eval_mode() -> None:
    told: list[Epoch] = []
    model = Linear(0, 0)
    outcome = _train(model, _examples(0, 1), epochs=3, progress=Progress(epoch=told.append))
    assert told == outcome.history
    assert [epoch.number for epoch in told] == [1, 2, 3]
    assert not model.training


def test_ctrl_c_ends_the_loop_and_is_not_an_error() -> None:
    def press_ctrl_c(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    outcome = _train(Linear(0, 0), _examples(0, 1), epochs=5, progress=Progress(epoch=press_ctrl_c))
    assert outcome.interrupted
    assert len(outcome.history) == 2
