"""What a patch answers on images, and the skip weights that it used for each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_digits, write_tree
from toys import disturb, toy_base

from deltapatch.base import Base
from deltapatch.data import ImageSet, evaluation_transform, open_data, open_images
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.answers import answer, evaluate, skip_weights
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("demo")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    test = open_data(write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", test=12)).test
    assert test is not None
    return test


@pytest.fixture(scope="module")
def patch(base: Base) -> Patch:
    return disturb(Delta(modules=2).build(base, CLASSES, seed=0)).eval()


def test_probabilities_are_the_softmax_of_the_patchs_logits_and_sum_to_one(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    answers = answer(base, images, patch)
    model = PatchedModel(base)
    model.add_patch("digits", patch)
    ready = images.with_transform(evaluation_transform(base.preprocessing))
    with torch.no_grad():
        inputs = torch.stack([ready[index][0] for index in range(len(ready))])  # pyright: ignore[reportIndexIssue]
        expected = model(inputs, patch="digits").softmax(1)
    assert answers.probabilities.shape == (12, 10)
    np.testing.assert_allclose(answers.probabilities, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, rtol=1e-5)
    assert answers.labels.tolist() == images.labels.tolist()
    assert answers.indices.tolist() == list(range(12))


def test_without_a_patch_the_base_answers_with_its_own_classes(base: Base, images: ImageSet) -> None:
    answers = answer(base, images)
    assert answers.probabilities.shape == (12, 47)
    assert answers.skip_weights == ()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_no_answer(
    base: Base, images: ImageSet, patch: Patch, batch_size: int
) -> None:
    whole, parts = answer(base, images, patch), answer(base, images, patch, batch_size=batch_size)
    np.testing.assert_allclose(whole.probabilities, parts.probabilities, atol=1e-5)
    assert parts.indices.tolist() == list(range(12))


def test_a_bad_image_has_no_row_and_the_others_keep_order_labels_and_indices(
    base: Base, patch: Patch, tmp_path: Path
) -> None:
    folder = write_tree(tmp_path / "tree", (0, 1, 2), 3)
    write_bad_image(folder / "one" / "000.png")
    task = open_data(folder, validation=0)
    assert task.train is not None
    progress: list[int] = []
    answers = answer(base, task.train, patch, batch_size=2, advance=progress.append)
    assert answers.indices.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert answers.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [Path(bad.path).name for bad in answers.bad] == ["000.png"]
    assert sum(progress) == 9
    assert [len(weights) for weights in answers.skip_weights] == [8, 8]


def test_images_that_are_all_bad_give_no_rows_and_no_figures(
    base: Base, patch: Patch, tmp_path: Path
) -> None:
    images = open_images([write_bad_image(tmp_path / "bad.png")])
    answers = answer(base, images, patch)
    assert answers.probabilities.shape == (0, 10)
    assert len(answers.bad) == 1
    with pytest.raises(DeltapatchError, match="no readable image"):
        evaluate(base, images, patch)


def test_images_without_labels_are_answered_and_have_the_label_minus_one(
    base: Base, patch: Patch, tmp_path: Path
) -> None:
    folder = write_tree(tmp_path / "tree", (3,), 2)
    answers = answer(base, open_images(sorted((folder / "three").iterdir())), patch)
    assert answers.labels.tolist() == [-1, -1]


def test_an_evaluation_counts_right_answers_and_skipped_images(base: Base, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", (0, 1), 4)
    write_bad_image(folder / "one" / "000.png")
    task = open_data(folder, validation=0)
    assert task.train is not None
    always_first = Head().build(base, task.classes, seed=0)
    assert always_first.head is not None
    torch.nn.init.zeros_(always_first.head.weight)
    always_first.head.bias = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    evaluation = evaluate(base, task.train, always_first)
    # The first class is "one", of whose four images one is bad.
    assert evaluation.accuracy.value == pytest.approx(3 / 7)
    assert evaluation.skipped == 1


def test_the_base_and_a_patch_without_a_head_are_evaluated_by_the_bases_outputs(
    base: Base, images: ImageSet
) -> None:
    alone = evaluate(base, images)
    assert alone.classes == base.classes
    assert (alone.probabilities == answer(base, images).probabilities).all()
    headless = disturb(Delta(modules=1).build(base, seed=0))
    patched = evaluate(base, images, headless)
    assert patched.classes == base.classes
    assert patched.probabilities.shape == alone.probabilities.shape
    assert (patched.probabilities != alone.probabilities).any()


def test_the_outputs_of_a_base_without_class_names_are_numbered(images: ImageSet) -> None:
    nameless = toy_base()
    answered = images.subset(range(5)).with_labels(range(5))
    assert evaluate(nameless, answered).classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("has_patch", [False, True])
def test_images_that_are_all_bad_give_no_rows_of_the_bases_classes(
    base: Base, tmp_path: Path, has_patch: bool
) -> None:
    images = open_images([write_bad_image(tmp_path / "bad.png")])
    patch = Delta(modules=1).build(base, seed=0) if has_patch else None
    assert answer(base, images, patch).probabilities.shape == (0, 47)


# --- skip weights -----------------------------------------------------------------------------------------


def test_each_image_has_a_weight_between_zero_and_one_for_each_skip_of_a_patched_stage(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    weights = answer(base, images, patch).skip_weights
    assert [stage.shape for stage in weights] == [(12, 3), (12, 3)]
    for stage in weights:
        assert ((stage > 0) & (stage < 1)).all()
        assert stage.std(0).min() > 0


def test_a_delta_module_of_zeros_weighs_every_skip_by_one_half(base: Base, images: ImageSet) -> None:
    patch = Delta(modules=1).build(base, CLASSES, seed=0)
    torch.nn.init.zeros_(patch.parts[0].delta.fc.weight)  # pyright: ignore[reportArgumentType]
    (weights,) = answer(base, images, patch).skip_weights
    assert (weights == 0.5).all()


def test_looking_at_skip_weights_leaves_nothing_behind(base: Base, images: ImageSet, patch: Patch) -> None:
    answer(base, images, patch)
    assert not any(module._forward_hooks for module in patch.modules())


def test_skip_weights_are_summed_up_with_the_existing_skips_on_the_first_sub_diagonal(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    answers = answer(base, images, patch)
    summaries = skip_weights(patch, answers)
    assert [summary.stage for summary in summaries] == ["layer3", "layer4"]
    for summary, weights in zip(summaries, answers.skip_weights, strict=True):
        first, second, third = weights.mean(0)
        # Row i is what enters sub-block i + 1, column j is state j: the base has the skips (1, 0) and (2, 1).
        np.testing.assert_allclose(summary.mean, [[first, np.nan], [second, third]])
        np.testing.assert_allclose(summary.spread[1, 0], weights[:, 1].std())
        assert summary.existing.tolist() == [[True, False], [False, True]]


def test_skip_weights_are_summed_up_class_by_class_with_nan_for_a_class_without_images(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    answers = answer(base, images.subset([0, 1, 2]), patch)
    (_, last) = skip_weights(patch, answers)
    assert last.per_class.shape == (10, 2, 2)
    for label in range(10):
        rows = answers.skip_weights[1][answers.labels == label]
        expected = rows[:, 0].mean() if len(rows) else np.nan
        np.testing.assert_allclose(last.per_class[label, 0, 0], expected, rtol=1e-6)


def test_a_method_without_delta_modules_has_no_skip_weights(base: Base, images: ImageSet) -> None:
    patch = Head().build(base, CLASSES, seed=0)
    assert skip_weights(patch, answer(base, images, patch)) == ()


# --- preprocessing ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::deltapatch.errors.DeltapatchWarning")
def test_a_patchs_own_preprocessing_is_used_whatever_the_bases_is(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    loaded_otherwise = load_base("demo", mean=0.7, std=0.5)
    here, there = (answer(on, images, patch).probabilities for on in (base, loaded_otherwise))
    assert (here == there).all()
    assert (answer(base, images).probabilities != answer(loaded_otherwise, images).probabilities).any()
