"""What happened in each epoch of a fit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training images.

    Attributes:
        number: counted from 1.
        training_loss: mean cross entropy over the epoch's training batches.
        training_accuracy: share of right answers in the same batches, as they were given while training.
        validation_loss: mean cross entropy on the validation images afterwards; None without any.
        validation_accuracy: share of right answers there.
        learning_rate: at the end of the epoch.
        seconds: wall-clock time, validation included.
    """

    number: int
    training_loss: float
    training_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    seconds: float
