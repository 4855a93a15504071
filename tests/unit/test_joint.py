"""Rows of a batch that belong to patches, and modules of one structure as one computation."""

import pytest
import torch
from torch import Tensor, nn

from deltapatch.joint import Rows, grouped, stacked


def _modules(count: int, width: int = 3) -> list[nn.Module]:
    made: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(width)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        made.append(nn.Sequential(nn.Conv2d(2, width, 3), norm, nn.ReLU(), nn.Flatten()).eval())
    return made


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_grouped_modules_compute_what_each_computes(shared: bool) -> None:
    modules = _modules(5)
    x = torch.randn(*([] if shared else [5]), 4, 2, 6, 6)
    expected = [module(x if shared else x[index]) for index, module in enumerate(modules)]
    torch.testing.assert_close(grouped(modules, x, shared), torch.stack(expected))


@torch.no_grad()
def test_grouping_leaves_the_modules_as_they_were() -> None:
    modules = _modules(4)
    before = [{name: tensor.clone() for name, tensor in m.state_dict().items()} for m in modules]
    grouped(modules, torch.randn(4, 2, 6, 6), shared=True)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("counts", ["even", "uneven", "shared"])
@torch.no_grad()
def test_each_module_sees_its_own_rows(count: int, counts: str) -> None:
    """Few modules run in a loop and many as one; which of them is no matter."""
    modules = _modules(count)
    of_each = tuple(range(1, count + 1)) if counts == "uneven" else (3,) * count
    rows = Rows(of_each, shared=counts == "shared")
    x = torch.randn(3 if rows.shared else rows.total, 2, 6, 6)
    expected = torch.cat([module(own) for module, own in zip(modules, rows.split(x), strict=True)])
    torch.testing.assert_close(rows.each(modules, x), expected)
    assert len(expected) == rows.total


def test_large_modules_on_a_processor_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("stacked")

    monkeypatch.setattr("deltapatch.joint.grouped", refused)
    large = [nn.Linear(300, 300) for _ in range(6)]
    assert Rows((1,) * 6).each(large, torch.randn(6, 300)).shape == (6, 300)
    with pytest.raises(AssertionError, match="stacked"):
        Rows((1,) * 6).each([nn.Linear(3, 3) for _ in range(6)], torch.randn(6, 3))


def test_shared_rows_are_repeated_patch_after_patch() -> None:
    rows = Rows((2, 2, 2), shared=True)
    x = torch.tensor([[1.0], [2.0]])
    assert rows.fold(x).flatten().tolist() == [1, 2, 1, 2, 1, 2]
    assert rows.fold(rows.fold(x)) is not x
    assert torch.equal(rows.fold(rows.fold(x)), rows.fold(x))
    assert rows.spread(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5, 5, 6, 6, 7, 7]


def test_rows_of_uneven_patches() -> None:
    rows = Rows((1, 3))
    assert rows.total == 4
    assert [len(piece) for piece in rows.split(torch.arange(4))] == [1, 3]
    assert rows.spread(torch.tensor([5.0, 6.0])).tolist() == [5, 6, 6, 6]


def test_tensors_that_lie_evenly_are_stacked_without_a_copy() -> None:
    storage = torch.arange(24.0).view(4, 2, 3)
    found = stacked([storage[0], storage[2]])
    assert torch.equal(found, storage[::2])
    assert found.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "pick",
    [
        lambda s: [s[2], s[0]],
        lambda s: [s[0], s[0]],
        lambda s: [s[0], s[1], s[3]],
        lambda s: [s[0], s[1].clone()],
        lambda s: [s[0], s[1].T.contiguous().T],
        lambda s: [s[1]],
    ],
)
def test_all_other_tensors_are_copied_and_equal(pick) -> None:
    tensors = pick(torch.arange(36.0).view(4, 3, 3))
    found = stacked(tensors)
    assert torch.equal(found, torch.stack(tensors))
    found.zero_()
    assert all(tensor.abs().sum() > 0 for tensor in tensors)


def test_gradients_flow_through_a_stack_where_they_are_asked_for() -> None:
    weights = nn.Parameter(torch.ones(2, 3))
    stacked([weights[0], weights[1]]).sum().backward()
    assert torch.equal(weights.grad, torch.ones(2, 3))
