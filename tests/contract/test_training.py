"""Invariant 5: what trains is exactly what is in the file, and nothing of the base is among it."""

from pathlib import Path

import torch
from safetensors import safe_open
from subjects import CLASSES, Subject
from torch import nn
from toys import copied_state, same_state

from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


def test_the_file_holds_the_trainable_parameters_and_the_patchs_own_statistics(
    patch: Patch, tmp_path: Path
) -> None:
    with safe_open(patch.save(tmp_path / "patch.safetensors"), "pt") as file:
        in_file = set(file.keys())
    trainable = {name for name, parameter in patch.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in patch.named_buffers()}
    assert trainable == {name for name, _ in patch.named_parameters()}
    assert in_file == trainable | statistics


def test_only_the_patch_gets_gradients_and_all_of_it_does(
    subject: Subject, method: Method, patch: Patch
) -> None:
    trained = subject.new_patch(method)
    model = PatchedModel(subject.base)
    model.add_patch("task", trained)
    model.train()
    logits = model(subject.images, patch="task")
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    without = [name for name, parameter in trained.named_parameters() if parameter.grad is None]
    assert without == []
    subject.assert_untouched()


def test_the_base_gets_no_gradients_where_only_its_answers_are_asked_for(subject: Subject) -> None:
    assert not PatchedModel(subject.base)(subject.images).requires_grad


def test_an_optimiser_over_everything_moves_nothing_of_the_base(resnet18: Subject, method: Method) -> None:
    """Weight decay moves every parameter that has a gradient; those of the base have none."""
    trained = resnet18.new_patch(method)
    model = PatchedModel(resnet18.base)
    model.add_patch("task", trained)
    before = copied_state(trained)
    optimizer = torch.optim.SGD([*model.parameters(), *trained.parameters()], lr=0.1, weight_decay=0.1)
    model(resnet18.images, patch="task").sum().backward()
    optimizer.step()
    assert not same_state(trained, before)
    resnet18.assert_untouched()


def test_the_start_of_a_patch_depends_on_the_seed_alone(resnet18: Subject, method: Method) -> None:
    torch.manual_seed(1)
    first = method.build(resnet18.base, CLASSES, seed=7)
    state_of_the_caller = torch.get_rng_state()
    torch.manual_seed(2)
    second = method.build(resnet18.base, CLASSES, seed=7)
    other = method.build(resnet18.base, CLASSES, seed=8)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state_of_the_caller)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))
