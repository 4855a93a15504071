"""Statistics gathered from images, and heads that are solved on what a patch makes of them."""

from typing import Any

import pytest
import torch
from torch import nn

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import DataError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import fit_task
from deltapatch.fitting.gathering import features_of, gather, random_versions
from deltapatch.fitting.judging import score
from deltapatch.method import Method
from deltapatch.methods.dua import BatchNormAdapt
from deltapatch.methods.head import Head
from deltapatch.methods.norm import Norm
from deltapatch.methods.parallel_adapter import ParallelAdapter
from deltapatch.normalising import Gathering, NormPart


def test_the_average_over_all_images_is_that_of_one_pass_over_them(base: Base, task: TaskData) -> None:
    """One batch of all images: the first norm's statistics are exactly theirs."""
    patch = BatchNormAdapt(images="all").build(base, task.classes)
    before = base.submodule(patch.sites[0].path).running_mean.clone()
    gather(base, patch, [task.train], Gathering(), batch_size=len(task.train))
    found = patch.parts[0].running_mean.clone()
    again = BatchNormAdapt(images="all").build(base, task.classes)
    gather(base, again, [task.train], Gathering(), batch_size=len(task.train) // 4)
    assert not torch.allclose(found, before)
    # The mean of equally large batches' means is the mean; only the rounding differs.
    torch.testing.assert_close(again.parts[0].running_mean, found, rtol=1e-4, atol=1e-5)
    assert torch.equal(base.submodule(patch.sites[0].path).running_mean, before)


def test_gathering_depends_on_the_seed_alone(base: Base, task: TaskData) -> None:
    method = BatchNormAdapt(images=3, copies=4)

    def gathered(seed: int) -> torch.Tensor:
        patch = method.build(base, task.classes)
        gather(base, patch, [task.train], method.gathering(), seed=seed)
        return patch.parts[-1].running_var

    assert torch.equal(gathered(0), gathered(0))
    assert not torch.equal(gathered(0), gathered(1))


def test_images_come_again_where_there_are_fewer_than_steps(base: Base, task: TaskData) -> None:
    method = BatchNormAdapt(images=5, copies=2)
    patch = method.build(base, task.classes)
    gather(base, patch, [task.train.subset([0, 1])], method.gathering())
    assert all(buffer.isfinite().all() for buffer in patch.buffers())


def test_without_a_readable_image_there_is_nothing_to_gather(base: Base, task: TaskData) -> None:
    patch = BatchNormAdapt().build(base, task.classes)
    with pytest.raises(DataError, match="no statistics can be gathered"):
        gather(base, patch, [task.train.subset([])], Gathering())


def test_versions_are_crops_mirrored_and_turned() -> None:
    image = torch.arange(3 * 16 * 16).float().reshape(3, 16, 16) + 1
    versions = random_versions(image, 40, torch.Generator().manual_seed(0))
    assert versions.shape == (40, 3, 16, 16)
    for version in versions:
        # Every pixel is one of the image's or of the border, and the channels stay together.
        assert set(version[0].unique().tolist()) <= {0.0, *range(1, 257)}
        inside = version[0] > 0
        assert torch.equal(version[1][inside], version[0][inside] + 256)
    assert len({tuple(version.flatten().tolist()) for version in versions}) > 30
    wide = random_versions(torch.rand(3, 8, 16), 20, torch.Generator().manual_seed(0))
    assert wide.shape == (20, 3, 8, 16)


def test_dua_solves_its_head_on_the_adapted_features(base: Base, task: TaskData, fit: Any) -> None:
    result = fit(task, BatchNormAdapt(images=4, copies=8))
    patch = result.patch
    assert patch.num_parameters(head=False) == 0
    batch = torch.stack([base.example(1)[0]] * 2)
    adapted = features_of(base, patch, batch)
    plain = features_of(base, result.head_only, batch)
    assert not torch.allclose(adapted, plain)
    # The figures are of the patch as it is, and the head-only patch is one on the base's own features.
    assert patch.info.figures["validation/accuracy"] == score(base, patch, task.val).accuracy
    assert (
        result.head_only.info.figures["validation/accuracy"]
        == score(base, result.head_only, task.val).accuracy
    )


def test_re_estimated_statistics_stay_as_they_were_gathered_while_the_rest_trains(
    base: Base, task: TaskData, fit: Any
) -> None:
    patch = fit(task, Norm(statistics="re-estimated")).patch
    expected = Norm(statistics="re-estimated").build(base, task.classes)
    gather(base, expected, [task.train], Gathering())
    for fitted, gathered in zip(patch.parts, expected.parts, strict=True):
        assert torch.equal(fitted.running_mean, gathered.running_mean)
    assert not torch.equal(patch.parts[-1].weight, expected.parts[-1].weight)


def test_a_head_that_is_not_to_train_stays_as_it_starts(task: TaskData, fit: Any) -> None:
    result = fit(task, Norm(), train_head=False)
    assert torch.equal(result.patch.head.weight, result.head_only.head.weight)
    assert result.patch.head.weight.requires_grad
    trained = fit(task, Norm())
    assert not torch.equal(trained.patch.head.weight, trained.head_only.head.weight)


def test_an_adapters_statistics_can_be_gathered_too(base: Base, task: TaskData, fit: Any) -> None:
    method = ParallelAdapter(modules=1, statistics="re-estimated")
    patch = fit(task, method).patch
    norms = [part for part in patch.parts if isinstance(part, NormPart)]
    expected = method.build(base, task.classes)
    gather(base, expected, [task.train], Gathering())
    gathered = [part for part in expected.parts if isinstance(part, NormPart)]
    assert norms
    for fitted, found in zip(norms, gathered, strict=True):
        assert torch.equal(fitted.running_var, found.running_var)


@pytest.mark.parametrize("method", [Head(), BatchNormAdapt(images=2, copies=4), Norm()])
def test_a_head_that_is_given_is_where_the_patchs_head_starts(
    base: Base, task: TaskData, method: Method
) -> None:
    given = nn.Linear(base.anatomy.head.features, len(task.classes))
    config = FitConfig(epochs=1, precision="fp32", train_head=False)
    patch = fit_task(base, task, method, config, progress=False, head=given).patch
    assert torch.equal(patch.head.weight, given.weight)
    assert patch.info.figures["validation/accuracy"] == score(base, patch, task.val).accuracy


def test_without_a_start_from_a_head_the_patchs_own_trains(base: Base, task: TaskData, fit: Any) -> None:
    method = Norm(statistics="re-estimated")
    fresh = method.build(base, task.classes, seed=0)
    patch = fit(task, method, start_from_head=False, train_head=False, seed=0).patch
    assert torch.equal(patch.head.weight, fresh.head.weight)
