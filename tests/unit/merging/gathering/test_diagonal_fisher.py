"""Gradients are squared example by example and class by class, and weighted by the model's own answer."""

import math

import pytest
import torch
from torch import Tensor, nn
from toys import OwnNet, copied_state, enliven, same_state

from deltapatch import merging
from deltapatch.merging import MergeError


class Biased(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def one_by_one(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The definition, with one backward pass for each image and class."""
    module = module.double().eval()
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for image in images.double():
        logarithms = module(image[None]).log_softmax(-1)[0]
        for logarithm in logarithms:
            gradients = torch.autograd.grad(logarithm, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += logarithm.exp().detach() * gradient.square() / len(images)
    return total


def net() -> OwnNet:
    torch.manual_seed(0)
    module = OwnNet()
    enliven(module)
    return module


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.25), (0.9, 0.09)])
def test_a_logit_has_p_times_one_minus_p(p: float, expected: float) -> None:
    module = Biased(torch.tensor([math.log(p), math.log(1 - p)]))
    found = merging.diagonal_fisher(module, [torch.zeros(3, 1), torch.zeros(4, 1)])
    torch.testing.assert_close(found["logits"], torch.tensor([expected, expected]))


def test_a_linear_classifier_has_it_times_the_squared_input() -> None:
    torch.manual_seed(0)
    module, images = nn.Linear(4, 3), torch.randn(10, 4)
    p = module(images).softmax(-1).detach()
    slopes = p * (1 - p)
    found = merging.diagonal_fisher(module, [images])
    torch.testing.assert_close(found["bias"], slopes.mean(0))
    torch.testing.assert_close(found["weight"], slopes.T @ images.square() / 10)


@pytest.mark.parametrize(("cuts", "micro_batch"), [((5,), 8), ((2, 3), 1), ((1, 4), 2)])
def test_a_network_with_norms_has_what_the_definition_gives(cuts: tuple[int, ...], micro_batch: int) -> None:
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = one_by_one(net(), images)
    found = merging.diagonal_fisher(net(), images.split(cuts), micro_batch=micro_batch)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-3, atol=1e-7)


def test_drawn_classes_keep_the_expectation_and_are_the_same_for_a_seed() -> None:
    torch.manual_seed(0)
    module, images = nn.Linear(2, 5), torch.randn(4, 2)
    exact = merging.diagonal_fisher(module, [images])
    drawn = merging.diagonal_fisher(module, [images.repeat(2000, 1)], samples=2, micro_batch=8000, seed=3)
    torch.testing.assert_close(drawn["weight"], exact["weight"], rtol=0.05, atol=0.005)
    assert not torch.equal(drawn["weight"], exact["weight"])
    first, again, other = (
        merging.diagonal_fisher(module, [images], samples=1, seed=seed)["weight"] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_tied_parameter_has_one_value_under_both_names() -> None:
    torch.manual_seed(0)
    module, images = Tied(), torch.randn(4, 3)
    found = merging.diagonal_fisher(module, [images])
    assert list(found) == ["first.weight", "second.weight"]
    expected = one_by_one(module, images)["first.weight"]
    torch.testing.assert_close(found["first.weight"], expected.float(), rtol=1e-4, atol=1e-7)
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert found["first.weight"].data_ptr() != found["second.weight"].data_ptr()  # as safetensors wants it


def test_the_module_stays_as_it_is() -> None:
    module = net().train()
    module.stem.requires_grad_(False)
    state = copied_state(module)
    merging.diagonal_fisher(module, [torch.randn(2, 3, 8, 8)])
    assert same_state(module, state)
    assert module.training
    assert module.wide.training
    assert [p.requires_grad for p in module.parameters()][:3] == [False, False, True]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_no_image_and_other_outputs_are_refused() -> None:
    with pytest.raises(MergeError, match="no image was given"):
        merging.diagonal_fisher(nn.Linear(2, 2), [])
    with pytest.raises(MergeError, match=r"logits .* but there are shape \(1, 2, 4, 4\)"):
        merging.diagonal_fisher(nn.Conv2d(3, 2, 1), [torch.zeros(1, 3, 4, 4)])
    with pytest.raises(MergeError, match="samples 0 must be 1 or more"):
        merging.diagonal_fisher(nn.Linear(2, 2), [torch.zeros(1, 2)], samples=0)
