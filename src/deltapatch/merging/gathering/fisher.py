"""The diagonal of the Fisher information: how much each weight of a classifier matters to its answers."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...touching import Freezer
from ..sources import MergeError

Gradients = Callable[[Mapping[str, Tensor], Tensor, Tensor], Mapping[str, Tensor]]


def diagonal_fisher(
    module: nn.Module,
    images: Iterable[Tensor],
    *,
    samples: int | None = None,
    micro_batch: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of a classifier's parameters, as `fisher` weights models by.

    F = 1/N Σ_x Σ_c p(c|x) (∂ log p(c|x) / ∂θ)²: each gradient is squared for itself, example by example and
    class by class, and the expectation is over the model's own answers, not over labels. (A well-known
    re-implementation sums over classes and the batch before it squares. That is another quantity: 0 instead
    of ¼ for one logit of two equally likely classes.)

    Args:
        module: the model, whose output for images (B, C, H, W) are logits (B, classes); it runs in eval mode
            and stays as it is.
        images: batches of shape (B, C, H, W), on the module's device; a few hundred images are usual.
        samples: how many classes to draw for each image from the model's answer, which keeps the expectation;
            left out, all classes are summed up, with one backward pass each.
        micro_batch: how many images' gradients are in memory at once; each is as large as the model.
        seed: of the classes that are drawn.

    Returns:
        Tensor name in the state dict -> fp32 tensor of the parameter's shape, not negative; buffers have
        none. safetensors' ``save_file`` stores it for a recipe.

    Raises:
        MergeError: there is no image, or the outputs are no logits.
    """
    if micro_batch < 1 or (samples is not None and samples < 1):
        raise MergeError(f"micro_batch {micro_batch} and samples {samples} must be 1 or more")
    # A parameter that stands under several names is one to the gradient, and each name gets its share.
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    # Other implementations of attention have no vectorised gradient and would run image by image.
    with Freezer(module).frozen(hold_mode=True), sdpa_kernel(SDPBackend.MATH):
        gradients = _gradients_of(module)
        for batch in images:
            classes, weights = _classes(module, batch, samples, generator)
            for part in torch.arange(len(batch), device=batch.device).split(micro_batch):
                for label, weight in zip(classes[part].T, weights[part].T, strict=True):
                    _add_squares(total, gradients(parameters, batch[part], label), weight)
            count += len(batch)
    if not count:
        raise MergeError("no image was given, so there is no Fisher information; give one or more")
    return _by_every_name(module, {name: (summed / count).float() for name, summed in total.items()})


def _gradients_of(module: nn.Module) -> Gradients:
    """The gradients of -log p(label|image), whose sign squares do away with, for each image on its own."""

    def surprise(parameters: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, dict(parameters), (image[None],))
        return functional.cross_entropy(logits, label[None])

    return vmap(grad(surprise), in_dims=(None, 0, 0))


@torch.no_grad()
def _classes(
    module: nn.Module, batch: Tensor, samples: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The classes to differentiate for, and the weight of each in the expectation: shape (B, K) both."""
    logits = module(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise MergeError(f"the Fisher information is that of logits (images, classes), but there are {found}")
    probabilities = logits.softmax(-1)
    if samples is None:
        every = torch.arange(logits.shape[1], device=logits.device)
        return every.expand(logits.shape), probabilities
    drawn = torch.multinomial(probabilities.cpu(), samples, replacement=True, generator=generator)
    return drawn.to(logits.device), torch.full_like(drawn, 1 / samples, dtype=logits.dtype).to(logits.device)


def _add_squares(total: dict[str, Tensor], gradients: Mapping[str, Tensor], weights: Tensor) -> None:
    for name, gradient in gradients.items():
        total[name] += torch.einsum("n,n...->...", weights, gradient.square())


def _by_every_name(module: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        name: fisher[name] if name in fisher else fisher[first[id(parameter)]].clone()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
