"""Re-estimated statistics are those of all values together, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import OwnNet, copied_state, enliven, same_state

from deltapatch import merging
from deltapatch.merging import MergeError, Recipe, RunOptions
from deltapatch.skipping import LastAxisBatchNorm


def net(seed: int = 0) -> OwnNet:
    torch.manual_seed(seed)
    module = OwnNet()
    enliven(module, seed)
    return module


def drawn(count: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


def inputs_of_norms(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What enters each norm in eval mode, channels first."""
    found: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: found.__setitem__(name, inputs[0].transpose(0, 1).flatten(1))
        )
        for name, norm in module.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        module.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def test_norms_hold_the_statistics_that_their_inputs_have_in_eval_mode() -> None:
    module, images = net(), drawn(12)
    returned = merging.re_estimate_norms(module, [images])
    state = module.state_dict()
    inputs = inputs_of_norms(module, images)
    assert len(inputs) == 11
    for name, values in inputs.items():
        torch.testing.assert_close(state[f"{name}.running_mean"], values.mean(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state[f"{name}.running_var"], values.var(1), rtol=1e-4, atol=1e-4)
    assert set(returned) == {name for name in state if "running" in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in returned.items())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_unequal_batches_give_the_statistics_of_all_values(sizes: list[int], seed: int) -> None:
    values = torch.randn(sum(sizes) + 1, 3, generator=torch.Generator().manual_seed(seed))
    values += torch.arange(len(values))[:, None] * 10.0  # batches differ in their means
    norm = nn.BatchNorm1d(3)
    merging.re_estimate_norms(norm, values.split([*sizes, 1]))
    torch.testing.assert_close(norm.running_mean, values.mean(0))
    torch.testing.assert_close(norm.running_var, values.var(0))


def test_updating_as_in_training_would_be_wrong_there() -> None:
    values = torch.tensor([[0.0], [0.0], [0.0], [2.0], [10.0], [12.0]])
    norm, other = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    batches = values.split([4, 2])
    merging.re_estimate_norms(norm, batches)
    torch.optim.swa_utils.update_bn(batches, other)
    assert norm.running_mean == pytest.approx(4)
    assert other.running_mean == pytest.approx(5.75)  # the mean of the batches' means
    assert norm.running_var == pytest.approx(float(values.var()))
    assert other.running_var == pytest.approx(1.5)  # the mean of the batches' variances


def test_many_batches_come_near_one() -> None:
    images = drawn(64)
    one, many = net(), net()
    merging.re_estimate_norms(one, [images])
    merging.re_estimate_norms(many, iter(images.split(16)))
    for name, norm in one.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            other = many.get_submodule(name)
            spread = norm.running_var.sqrt()
            assert ((other.running_mean - norm.running_mean) / spread).abs().max() < 0.15
            assert (other.running_var.sqrt() / spread - 1).abs().max() < 0.15


def test_only_statistics_change() -> None:
    module = net().train()
    module.stem.eval()
    before = copied_state(module)
    merging.re_estimate_norms(module, [drawn(4)])
    after = module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "running" in name}
    assert (module.training, module.wide.training, module.stem.training) == (True, True, False)


def test_a_failure_in_the_middle_leaves_everything_as_it_was() -> None:
    def broken() -> Iterator[Tensor]:
        yield drawn(4)
        raise KeyboardInterrupt

    module = net()
    before = copied_state(module)
    with pytest.raises(KeyboardInterrupt):
        merging.re_estimate_norms(module, broken())
    assert same_state(module, before)
    with pytest.raises(MergeError, match="give one or more images"):
        merging.re_estimate_norms(module, [])
    assert same_state(module, before)


def test_one_value_has_no_variance() -> None:
    with pytest.raises(MergeError, match="norm '1' got one value"):
        merging.re_estimate_norms(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)), [torch.ones(1, 3)])


def test_norms_of_other_axes_that_do_not_run_or_keep_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = LastAxisBatchNorm(3)
            self.idle = nn.BatchNorm2d(3)
            self.own = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.last(x.movedim(1, -1)).flatten(0, 2))

    images, module = drawn(5), Net()
    found = merging.re_estimate_norms(module, [images])
    torch.testing.assert_close(found["last.running_mean"], images.mean((0, 2, 3)))
    torch.testing.assert_close(found["last.running_var"], images.transpose(0, 1).flatten(1).var(1))
    assert found["idle.running_var"].tolist() == [1, 1, 1]
    assert len(found) == 4


def test_a_model_without_batch_norm_has_nothing_to_estimate() -> None:
    assert merging.re_estimate_norms(nn.Linear(2, 2), [torch.ones(1, 2)]) == {}


def test_a_merged_file_keeps_all_but_its_statistics(tmp_path: Path) -> None:
    models, module, images = [net(1), net(2)], net(3), drawn(6)
    before = copied_state(module)
    path = merging.average(
        models, out=tmp_path / "merged.safetensors", run=RunOptions(skip=("classifier.*",))
    )
    assert isinstance(path, Path)
    merged = merging.average(models, run=RunOptions(skip=("classifier.*",)))
    assert isinstance(merged, dict)
    assert merging.re_estimate_file(path, module, [images]) == path
    assert same_state(module, before)
    expected = net(3)
    expected.load_state_dict(merged, strict=False)
    statistics = merging.re_estimate_norms(expected, [images])
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(merged)
        for name, tensor in (merged | statistics).items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert file.metadata()["deltapatch_norm_statistics"] == "re-estimated"
    assert Recipe.read(path).merge == "average"


def test_another_file_is_written_in_the_dtype_of_the_first(tmp_path: Path) -> None:
    path, out = tmp_path / "merged.safetensors", tmp_path / "out.safetensors"
    save_file(
        {
            name: one.bfloat16() if one.is_floating_point() else one
            for name, one in net().state_dict().items()
        },
        path,
    )
    content = path.read_bytes()
    assert merging.re_estimate_file(path, net(3), [drawn(6)], out=out) == out
    assert path.read_bytes() == content
    with safe_open(out, "pt") as file:
        assert file.get_tensor("narrow.0.norm1.running_mean").dtype == torch.bfloat16


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    state = net().state_dict()
    save_file({**state, "other": torch.ones(1)}, path)
    with pytest.raises(MergeError, match="has tensor 'other', which the model has not"):
        merging.re_estimate_file(path, net(), [drawn(2)])
    save_file({**state, "stem.bias": torch.ones(3)}, path)
    with pytest.raises(MergeError, match=r"'stem\.bias' has shape \(3,\) in .* and \(16,\) in the model"):
        merging.re_estimate_file(path, net(), [drawn(2)])
    save_file({name: tensor for name, tensor in state.items() if name != "stem.bias"}, path)
    with pytest.raises(MergeError, match=r"has no tensor 'stem\.bias', which the model has"):
        merging.re_estimate_file(path, net(), [drawn(2)])
