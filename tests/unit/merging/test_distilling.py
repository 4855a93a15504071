"""A merged patch is checked against those that it was made of, and taught where it falls short."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_tree
from toys import copied_state, disturb, same_state

from deltapatch.base import Base
from deltapatch.data import ImageSet, evaluation_transform, list_images, open_images
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation.answers import answer
from deltapatch.loading import load_base
from deltapatch.merging.distilling import Check, agreements, lesson_of
from deltapatch.merging.gathering.patch_statistics import re_estimate_patch
from deltapatch.merging.patches import merge_patches
from deltapatch.method import make_method
from deltapatch.patch import Patch


@pytest.fixture(scope="module")
def base() -> Base:
    """Shared by all tests, since none may change it."""
    return load_base("demo")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Sixty digits."""
    return open_images(list_images([write_tree(tmp_path_factory.mktemp("tree"), (0, 1, 2), 20)]))


def made(base: Base, name: str, seed: int, scale: float, **options: object) -> Patch:
    return disturb(make_method(name, options).build(base, ("a", "b", "c"), seed=0), seed, scale)


@pytest.mark.parametrize("name", ["norm", "delta"])
def test_patches_that_are_the_same_agree_wholly_and_nothing_is_taught(
    base: Base, images: ImageSet, name: str
) -> None:
    patch = made(base, name, 1, 0.2)
    figures = merge_patches(base, [patch] * 2, names=["x", "y"], images=[images] * 2)["x"].info.figures
    assert figures["merge/agreement/x"] == 1
    assert figures["merge/distillation/epochs"] == 0
    assert "merge/agreement/y" not in figures


def test_a_merged_patch_that_answers_otherwise_is_taught_and_the_base_stays(
    base: Base, images: ImageSet
) -> None:
    patches = [made(base, "norm", seed, 0.8) for seed in (1, 2)]
    before = [copied_state(base.module), *map(copied_state, patches)]
    check = Check(agreement=1.0, epochs=6, learning_rate=1e-2)
    merged = merge_patches(base, patches, names=["x", "y"], images=[images] * 2, check=check)
    taught = [merged[name].info.figures[f"merge/agreement/{name}"] for name in "xy"]
    untaught = [merged[name].info.figures[f"merge/agreement_before/{name}"] for name in "xy"]
    assert merged["x"].info.figures["merge/distillation/epochs"] == 6
    assert sum(taught) > sum(untaught) + 0.5
    assert all(tensor.isfinite().all() for tensor in merged["x"].state_dict().values())
    assert same_state(base.module, before[0])
    assert all(same_state(patch, state) for patch, state in zip(patches, before[1:], strict=True))


def test_a_joint_head_is_taught_to_tell_the_tasks_apart(base: Base, images: ImageSet) -> None:
    """With Δ-modules in the last stage, so that what comes before runs once an image."""
    patches = [made(base, "delta", seed, 0.2, modules=1) for seed in (1, 2)]
    of_tasks = [images.subset(range(20)), images.subset(range(40, 60))]
    check = Check(agreement=1.0, epochs=8, learning_rate=1e-2)
    merged = merge_patches(base, patches, names=["x", "y"], heads="joint", images=of_tasks, check=check)
    figures = merged["merged"].info.figures
    assert figures["merge/distillation/epochs"] == 8
    taught = figures["merge/agreement/x"] + figures["merge/agreement/y"]
    assert taught > figures["merge/agreement_before/x"] + figures["merge/agreement_before/y"] + 0.2


def test_what_is_written_is_what_the_patch_that_comes_out_does(base: Base, images: ImageSet) -> None:
    patches = [made(base, "norm", seed, 0.8) for seed in (1, 2)]
    check = Check(agreement=1.0, epochs=2, learning_rate=1e-2)
    merged = merge_patches(base, patches, names=["x", "y"], images=[images] * 2, check=check)
    for name, patch in zip("xy", patches, strict=True):
        lesson = lesson_of(base, name, patch, images, slice(0, 3), None)
        found = agreements(base, merged[name], [lesson])[name]
        assert found == merged[name].info.figures[f"merge/agreement/{name}"]


def test_teaching_is_the_same_every_time(base: Base, images: ImageSet) -> None:
    patches = [made(base, "norm", seed, 0.8) for seed in (1, 2)]

    def state() -> dict[str, torch.Tensor]:
        check = Check(agreement=1.0, epochs=2, learning_rate=1e-2)
        return copied_state(merge_patches(base, patches, images=[images] * 2, check=check)["patch1"])

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_epochs_and_a_low_demand_teach_nothing(base: Base, images: ImageSet) -> None:
    patches = [made(base, "norm", seed, 0.8) for seed in (1, 2)]
    plain = copied_state(merge_patches(base, patches)["patch1"])
    for check in (Check(agreement=1.0, epochs=0), Check(agreement=0.0)):
        found = merge_patches(base, patches, images=[images] * 2, check=check)["patch1"]
        assert same_state(found, plain)


def test_an_answer_among_all_classes_has_zeros_for_those_of_others(base: Base, images: ImageSet) -> None:
    patch = made(base, "norm", 1, 0.2)
    lesson = lesson_of(base, "x", patch, images, slice(2, 5), 7)
    assert lesson.answers.shape == (60, 7)
    assert lesson.columns == slice(0, 7)
    np.testing.assert_array_equal(lesson.answers[:, 2:5].numpy(), answer(base, images, patch).probabilities)
    assert lesson.answers[:, :2].abs().sum() + lesson.answers[:, 5:].abs().sum() == 0
    assert len(lesson.checking) == 20
    assert sorted([*lesson.checking.labels, *lesson.teaching.labels]) == list(range(60))


def test_images_that_cannot_be_read_are_left_out(base: Base, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", (0,), 3)
    write_bad_image(tree / "zero" / "000a.png")
    patch = made(base, "norm", 1, 0.2)
    lesson = lesson_of(base, "x", patch, open_images(list_images([tree])), slice(0, 3), None)
    assert len(lesson.answers) == 3
    bad = open_images([tree / "zero" / "000a.png"])
    with pytest.raises(DataError, match="none of the images for patch 'x' can be read"):
        lesson_of(base, "x", patch, bad, slice(0, 3), None)


def test_there_are_as_many_sets_of_images_as_patches(base: Base, images: ImageSet) -> None:
    patch = made(base, "norm", 1, 0.2)
    with pytest.raises(DeltapatchError, match="1 sets of images were given for 2 patches"):
        merge_patches(base, [patch] * 2, names=["x", "y"], images=[images])


@pytest.mark.parametrize(
    ("field", "value"), [("agreement", 1.1), ("epochs", -1), ("batch_size", 0), ("learning_rate", 0.0)]
)
def test_a_check_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(DeltapatchError, match=f"{field} of a check cannot be {value}"):
        Check(**{field: value})


def test_statistics_are_those_of_the_images_whatever_their_order(base: Base, images: ImageSet) -> None:
    """Of the first norm of the base, whose inputs no patch changes, they can be said directly."""
    found: list[dict[str, torch.Tensor]] = []
    for order in (np.arange(24), np.random.default_rng(0).permutation(24)):
        patch = made(base, "dua", 1, 0.5)
        assert re_estimate_patch(base, patch, [images.subset(order[:7]), images.subset(order[7:])])
        found.append(copied_state(patch))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-3)
    stem = base.submodule("conv1.0")
    inputs = torch.stack([item[0] for item in _prepared(images.subset(range(24)), base)])
    with torch.no_grad():
        values = stem(inputs)
    torch.testing.assert_close(found[0]["parts.0.running_mean"], values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    expected = values.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(found[0]["parts.0.running_var"], expected, rtol=1e-4, atol=1e-5)


def test_a_patch_without_statistics_keeps_what_it_has(base: Base, images: ImageSet) -> None:
    patch = made(base, "norm", 1, 0.2)
    before = copied_state(patch)
    assert not re_estimate_patch(base, patch, [images])
    assert same_state(patch, before)


def _prepared(images: ImageSet, base: Base) -> list[tuple[torch.Tensor, int, int]]:
    ready = images.with_transform(evaluation_transform(base.preprocessing))
    return [ready[index] for index in range(len(ready))]
