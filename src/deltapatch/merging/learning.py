"""Learns the coefficients of `atlas` on images, with or without labels."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from .inputs import Inputs, check_inputs
from .merges.atlas import Atlas
from .rules import Chunk
from .running import RunOptions
from .sources import MergeError, ModelLike, open_source, open_sources

Batch = tuple[Tensor, Any] | Tensor
"""Images and whatever the objective compares the outputs with; images alone where it needs nothing."""

Objective = Callable[[Any, Any], Tensor]
"""(the module's outputs, the batch's second part) -> the mean loss of the batch, a scalar."""


@dataclass(frozen=True)
class LearningConfig:
    """How coefficients are learned.

    Attributes:
        learning_rate: of AdamW; 1e-3 to 1e-2 for adding and taking off tasks, 1e-1 with a few images.
        epochs: passes over the batches.
        weight_decay: of AdamW, towards the base.
        clip: the largest length of the gradient of all coefficients together.
        schedule: of the learning rate, step by step.
        l1: weight of Σ|λ| in the loss.
        partitions: in how many groups each tensor's entries are split, see `atlas`.
        seed: of that split.
    """

    learning_rate: float = 1e-3
    epochs: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["constant", "cosine"] = "cosine"
    l1: float = 0.0
    partitions: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """What `learn_coefficients` found.

    Attributes:
        how: the merge with the coefficients of the best epoch, for `merge` or, by its fields, for `atlas`.
        best_epoch: where they come from; 0 is the base itself.
        losses: the mean training loss of every epoch.
        validation_losses: the mean loss on the validation batches, at the start and after every epoch; empty
            where none were given.
    """

    how: Atlas
    best_epoch: int
    losses: tuple[float, ...]
    validation_losses: tuple[float, ...]


def learn_coefficients(
    module: nn.Module,
    models: Sequence[ModelLike],
    base: ModelLike,
    batches: Iterable[Batch],
    *,
    objective: Literal["supervised", "entropy"] | Objective = "supervised",
    validation: Iterable[Batch] | None = None,
    config: LearningConfig | None = None,
    run: RunOptions | None = None,
) -> Learned:
    """Learns for every block and model how much of what the model learned is added to the base.

    The gradient by a coefficient is the inner product of the gradient by the block's weights with what the
    model adds there, ∂L/∂λ_tʲ = ⟨∂L/∂θʲ, θ_tʲ - θ₀ʲ⟩. So a step is one backward pass of one network, after
    which the models are read part by part: in memory are the module, the merged weights and their gradient,
    however many models there are. Blocks of every kind are learned: matrices, convolutions, biases, norms.

    The module runs in eval mode with its weights exchanged for the merged ones, and stays as it is. Buffers
    are the base's: their coefficients are 0. Norm statistics can be re-estimated on the merged model. Tensors
    left out with ``run.skip``, such as the head, are the module's own.

    Args:
        module: a network of the models' architecture, on the device to learn on.
        models: what was fine-tuned from the base.
        base: what all coefficients start from, with 0.
        batches: of images (N, …), with int64 labels for "supervised"; gone through once an epoch. For several
            tasks, let the second part of a batch say whose images are whose, and the objective use it.
        objective: "supervised" is the cross entropy, "entropy" the mean entropy of the answers, which needs
            no labels. Anything else is a function of the outputs and the batch's second part: to make a
            network forget a task, the negative loss on it plus the loss on what is to be kept.
        validation: batches that are not trained on. The epoch (the start is one) with the lowest mean loss on
            them is kept; without them the last one is.
        config: how it is learned.
        run: which tensors are skipped, and how the models are read.

    Raises:
        MergeError: the models do not fit together or do not fit the module, there are no batches, or the loss
            is not finite.

    Example:
        >>> learned = learn_coefficients(module, [birds, cars], base, batches, validation=held_out)
        >>> merge(learned.how, [birds, cars], base, "both.safetensors")
    """
    config = config or LearningConfig()
    _check_repeatable(batches, "the batches")
    if validation is not None:
        _check_repeatable(validation, "the validation batches")
    inputs = _inputs(models, base, run or RunOptions())
    blocks = _Blocks(module, inputs, config)
    loss_of = _objective(objective)
    steps = config.epochs * sum(1 for _ in batches)
    if not steps:
        raise MergeError("there are no batches or epochs to learn coefficients from; give one or more")
    optimiser = torch.optim.AdamW(
        [blocks.coefficients], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(config, step / steps))
    losses: list[float] = []
    scores: list[float] = []
    kept = blocks.coefficients.detach().clone()
    best_epoch = 0
    with _in_eval_mode(module):
        if validation is not None:
            scores.append(_mean_loss(module, blocks, validation, loss_of))
        for epoch in range(1, config.epochs + 1):
            losses.append(_epoch(module, blocks, batches, loss_of, optimiser, schedule, config))
            if validation is not None:
                scores.append(_mean_loss(module, blocks, validation, loss_of))
            if validation is None or scores[-1] < min(scores[:-1]):
                kept, best_epoch = blocks.coefficients.detach().clone(), epoch
    return Learned(blocks.merge(kept), best_epoch, tuple(losses), tuple(scores))


class _Blocks:
    """The coefficients of all blocks, and what they make of the base.

    Attributes:
        coefficients: fp64, shape (blocks, models, partitions).
    """

    def __init__(self, module: nn.Module, inputs: Inputs, config: LearningConfig) -> None:
        self.inputs = inputs
        self.config = config
        self.tensors = _tensors_of(module, inputs)
        first: dict[int, str] = {}
        # Tied parameters have several names; they are one block.
        parameters = {name: one for name, one in self.tensors.items() if isinstance(one, nn.Parameter)}
        self.block_of = {name: first.setdefault(id(one), name) for name, one in parameters.items()}
        self.rows = {name: row for row, name in enumerate(first.values())}
        shape = (len(self.rows), len(inputs.models), config.partitions)
        self.coefficients = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def merge(self, coefficients: Tensor) -> Atlas:
        """The merge with these coefficients; buffers have 0."""
        numbers = coefficients.tolist()
        zeros = [[0.0] * self.config.partitions for _ in self.inputs.models]
        table: dict[str, tuple[float | tuple[float, ...], ...]] = {}
        for name in self.inputs.merged:
            rows = numbers[self.rows[self.block_of[name]]] if name in self.block_of else zeros
            table[name] = tuple(row[0] if self.config.partitions == 1 else tuple(row) for row in rows)
        return Atlas(table, self.config.partitions, self.config.seed)

    def merged(self) -> dict[str, Tensor]:
        """Merged tensors as the module takes them: name -> tensor of its own shape, dtype and device."""
        rule = self.merge(self.coefficients).rule(self.inputs)
        found: dict[str, Tensor] = {}
        for name, own in self.tensors.items():
            if self.block_of.get(name, name) != name:
                continue
            values = torch.empty_like(own, memory_format=torch.contiguous_format)
            flat = values.view(-1)

            def put(chunk: Chunk, flat: Tensor = flat) -> None:
                flat[chunk.start : chunk.start + len(chunk.models[0])] = rule(chunk).to(flat)

            for _ in self.inputs.over_chunks(put, [name]):
                pass
            found[name] = values
        return found

    def gradient(self, gradients: dict[str, Tensor]) -> Tensor:
        """∂L/∂λ from the gradients by the blocks' weights; both fp64, shape as `coefficients`."""
        how = Atlas({}, self.config.partitions, self.config.seed)
        total = torch.zeros_like(self.coefficients)
        for name, gradient in gradients.items():
            flat = gradient.reshape(-1).cpu()

            def products(chunk: Chunk, flat: Tensor = flat) -> Tensor:
                part = flat[chunk.start : chunk.start + len(chunk.models[0])].double()
                if how.partitions == 1:
                    return torch.stack([torch.dot(part, delta.double()) for delta in chunk.deltas])[:, None]
                groups = how.groups(chunk)
                zeros = torch.zeros(how.partitions, dtype=torch.float64)
                return torch.stack(
                    [zeros.index_add(0, groups, part * delta.double()) for delta in chunk.deltas]
                )

            for found in self.inputs.over_chunks(products, [name]):
                total[self.rows[name]] += found
        return total


def _epoch(
    module: nn.Module,
    blocks: _Blocks,
    batches: Iterable[Batch],
    loss_of: Objective,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: LearningConfig,
) -> float:
    """One pass of learning; the mean training loss."""
    total, count = 0.0, 0
    for images, targets in _on_device(module, batches):
        merged = blocks.merged()
        weights = {name: merged[name].requires_grad_() for name in blocks.rows}
        loss = loss_of(functional_call(module, merged, (images,)), targets)
        found = cast(
            "tuple[Tensor | None, ...]",
            torch.autograd.grad(loss, list(weights.values()), allow_unused=True),
        )
        gradients = {
            name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None
        }
        coefficients = blocks.coefficients
        coefficients.grad = blocks.gradient(gradients) + config.l1 * coefficients.detach().sign()
        nn.utils.clip_grad_norm_([coefficients], config.clip)
        optimiser.step()
        schedule.step()
        total, count = total + _finite(loss) * len(images), count + len(images)
    return total / max(count, 1)


@torch.no_grad()
def _mean_loss(module: nn.Module, blocks: _Blocks, batches: Iterable[Batch], loss_of: Objective) -> float:
    merged = blocks.merged()
    total, count = 0.0, 0
    for images, targets in _on_device(module, batches):
        total += _finite(loss_of(functional_call(module, merged, (images,)), targets)) * len(images)
        count += len(images)
    if not count:
        raise MergeError("there are no validation images; give some, or no validation batches at all")
    return total / count


def _finite(loss: Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise MergeError(f"the loss became {value} while coefficients were learned; lower the learning rate")
    return value


def _objective(objective: Literal["supervised", "entropy"] | Objective) -> Objective:
    if objective == "supervised":
        return functional.cross_entropy
    if objective == "entropy":
        return _entropy
    if callable(objective):
        return objective
    raise MergeError(f"there is no objective '{objective}'; give 'supervised', 'entropy' or a function")


def _entropy(outputs: Tensor, targets: object) -> Tensor:
    del targets
    logarithms = outputs.log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1).mean()


def _rate(config: LearningConfig, done: float) -> float:
    return 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _inputs(models: Sequence[ModelLike], base: ModelLike, run: RunOptions) -> Inputs:
    return check_inputs(
        open_sources(models),
        open_source(base, "the base"),
        skip=run.skip,
        threads=run.threads or torch.get_num_threads(),
        chunk_elements=run.chunk_elements,
        mixed_dtypes=run.mixed_dtypes,
    )


def _tensors_of(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The module's own tensors that are merged; buffers too, as the merged model has the base's."""
    known: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    known |= dict(module.named_parameters(remove_duplicate=False))
    for name, spec in inputs.merged.items():
        if name not in known:
            raise MergeError(
                f"the module has no tensor '{name}', which the models have; give one of their architecture,"
                " or leave the tensor out with skip"
            )
        if tuple(known[name].shape) != spec.shape:
            raise MergeError(
                f"tensor '{name}' has shape {tuple(known[name].shape)} in the module and {spec.shape} in the"
                " models; give a module of their architecture, or leave the tensor out with skip"
            )
    return {name: known[name] for name in inputs.merged}


def _check_repeatable(batches: Iterable[Batch], what: str) -> None:
    if isinstance(batches, Iterator):
        raise MergeError(f"{what} can be gone through only once; give a list or a data loader")


def _on_device(module: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Any]]:
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    for batch in batches:
        images, targets = (batch, None) if isinstance(batch, Tensor) else batch
        yield images.to(device), targets.to(device) if isinstance(targets, Tensor) else targets


@contextmanager
def _in_eval_mode(module: nn.Module) -> Generator[None]:
    """Norms use their statistics and leave them alone; every submodule's own mode is put back."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode
