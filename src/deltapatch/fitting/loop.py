"""The training loop: steps, validation, the best epoch, early stopping, and a checkpoint after each epoch."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from ..method import Method
from .checkpoint import Checkpoint
from .config import FitConfig
from .examples import Examples, Step
from .history import Epoch


@dataclass(frozen=True)
class Scored:
    """Mean loss and share of right answers over some examples."""

    loss: float
    accuracy: float

    def better_than(self, other: "Scored") -> bool:
        """Higher accuracy, or the same with a lower loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass
class Progress:
    """What the loop tells whoever watches; the defaults watch nothing."""

    step: Callable[[int, int, int, float, float], None] = lambda epoch, step, images, loss, accuracy: None
    epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass
class Outcome:
    """What a loop ends with; the model holds the parameters of the best epoch.

    Attributes:
        history: one entry an epoch.
        best: number of the epoch whose parameters were kept; 0 is the starting point.
        score: what those parameters reach on the validation images; None without any.
        interrupted: whether the user stopped it.
    """

    history: list[Epoch] = field(default_factory=list)
    best: int = 0
    score: Scored | None = None
    interrupted: bool = False


def train(
    model: nn.Module,
    training: Examples,
    validation: Examples | None,
    config: FitConfig,
    *,
    class_weights: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> Outcome:
    """Fits ``model`` and leaves the parameters of the best validation epoch in it (of the last without
    validation).

    The starting point counts as epoch 0: a fit never ends worse on the validation images than it began.
    Ctrl-C
    ends the loop after the step at hand and keeps the best so far. With a checkpoint that holds an earlier
    state of
    the same fit, the loop goes on from there to the same result. ``rates`` are learning rates of parameters
    where the configuration names none for all.
    """
    run = _Run(
        model,
        training,
        validation,
        config,
        class_weights,
        progress or Progress(),
        accelerator or Accelerator(),
        rates,
    )
    start = run.restore(checkpoint) if checkpoint is not None else 1
    try:
        if start == 1:
            run.score_start()
        for number in range(start, config.epochs + 1):
            if run.is_over():
                break
            run.run_epoch(number)
            if checkpoint is not None and run.accelerator.is_main_process:
                run.save(checkpoint)
    except KeyboardInterrupt:
        run.outcome.interrupted = True
    run.keep_best()
    return run.outcome


class _Run:
    """The state of one loop: model, optimiser, schedule, history and the best parameters so far."""

    def __init__(
        self,
        model: nn.Module,
        training: Examples,
        validation: Examples | None,
        config: FitConfig,
        class_weights: Tensor | None,
        progress: Progress,
        accelerator: Accelerator,
        rates: Mapping[nn.Parameter, float] | None,
    ) -> None:
        self.config = config
        self.training = training
        self.validation = validation
        self.progress = progress
        self.accelerator = accelerator
        groups = _parameter_groups(model, config, rates or {})
        optimizer = torch.optim.AdamW(groups)
        steps = max(config.epochs * len(training), 2)
        # The first steps climb to the highest rate, also in a fit of a few steps.
        rise = min(max(0.3, 2 / steps), 0.9)
        highest = [group["lr"] for group in groups]
        self.schedule = OneCycleLR(optimizer, max_lr=highest, total_steps=steps + 1, pct_start=rise)
        self.bare = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.class_weights = None if class_weights is None else class_weights.to(accelerator.device)
        self.outcome = Outcome()
        self.best_state = _copied_state(model)

    def score_start(self) -> None:
        if self.validation is not None:
            self.outcome.score = self.score(self.validation)

    def run_epoch(self, number: int) -> None:
        started = time.perf_counter()
        # What is random in a step (dropout in a part) depends on seed and epoch alone, so that a resumed
        # fit agrees.
        torch.manual_seed(self.config.seed * 1_000_003 + number)
        loss, accuracy = self.train_epoch(number)
        scored = None if self.validation is None else self.score(self.validation)
        epoch = Epoch(
            number=number,
            training_loss=loss,
            training_accuracy=accuracy,
            validation_loss=None if scored is None else scored.loss,
            validation_accuracy=None if scored is None else scored.accuracy,
            learning_rate=max(map(float, self.schedule.get_last_lr())),
            seconds=time.perf_counter() - started,
        )
        self.outcome.history.append(epoch)
        best = self.outcome.score
        if scored is None or best is None or scored.better_than(best):
            self.outcome.score, self.outcome.best = scored, number
            self.best_state = _copied_state(self.bare)
        self.progress.epoch(epoch)

    def train_epoch(self, number: int) -> tuple[float, float]:
        self.model.train()
        total = _Total()
        for index, step in enumerate(self.training.epoch(number)):
            if len(step.labels) == 1:
                if len(self.training) > 1:
                    continue  # one example has no batch statistics; it comes in another batch next time
                step = Step([torch.cat([tensor, tensor]) for tensor in step.inputs], step.labels.repeat(2))
            logits, labels = self.answer(step)
            loss = cross_entropy(
                logits, labels, weight=self.class_weights, label_smoothing=self.config.label_smoothing
            )
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            total.add(loss.detach() * len(labels), (logits.argmax(1) == labels).sum(), len(labels))
            self.progress.step(number, index + 1, total.images, total.mean().loss, total.mean().accuracy)
        mean = total.mean()
        return mean.loss, mean.accuracy

    @torch.no_grad()
    def score(self, examples: Examples) -> Scored:
        self.model.eval()
        total = _Total()
        for step in examples.epoch(0):
            logits, labels = self.answer(step)
            loss = cross_entropy(logits, labels, weight=self.class_weights, reduction="sum")
            total.add(loss, (logits.argmax(1) == labels).sum(), len(labels))
        return total.mean()

    def answer(self, step: Step) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        with self.precision():
            logits = self.model([tensor.to(device) for tensor in step.inputs])
        return logits.float(), step.labels.to(device)

    def precision(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device.type
        wanted = self.config.precision
        mixed = wanted == "bf16" or (wanted == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
        return torch.autocast(device, dtype=torch.bfloat16) if mixed else nullcontext()

    def is_over(self) -> bool:
        """Whether the validation figure has not become better for as long as the patience lasts."""
        waited = len(self.outcome.history) - self.outcome.best
        return (
            self.validation is not None
            and self.config.patience is not None
            and waited >= self.config.patience
        )

    def keep_best(self) -> None:
        if self.outcome.score is not None:
            self.bare.load_state_dict(self.best_state)
        self.model.eval()

    def save(self, checkpoint: Checkpoint) -> None:
        checkpoint.save(
            {
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best_state": self.best_state,
                "best": None
                if self.outcome.score is None
                else (self.outcome.score.loss, self.outcome.score.accuracy),
                "best_epoch": self.outcome.best,
                "history": [vars(epoch) for epoch in self.outcome.history],
            }
        )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Takes up the checkpoint's state, if it holds one; returns the number of the next epoch."""
        state = checkpoint.load()
        if state is None:
            return 1
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best_state = state["best_state"]
        score = None if state["best"] is None else Scored(*state["best"])
        history = [Epoch(**epoch) for epoch in state["history"]]
        self.outcome = Outcome(history=history, best=state["best_epoch"], score=score)
        return len(history) + 1


@dataclass
class _Total:
    """Sums over batches. Images are counted here, everything else stays on the device until it is asked
    for.
    """

    loss: Tensor | float = 0.0
    right: Tensor | int = 0
    images: int = 0

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        self.loss, self.right, self.images = self.loss + loss, self.right + right, self.images + images

    def mean(self) -> Scored:
        count = max(self.images, 1)
        return Scored(float(self.loss) / count, float(self.right) / count)


def _parameter_groups(
    model: nn.Module, config: FitConfig, rates: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """By learning rate; weight matrices and convolutions decay, biases, norms and gains do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = config.learning_rate or rates.get(parameter, Method.learning_rate)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
