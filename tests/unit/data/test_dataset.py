import numpy as np
import pytest
import torch
from PIL import Image

from deltapatch.data.dataset import BadImage, ImageSet
from deltapatch.data.decode import ImageLimits
from deltapatch.data.sources.npz import ArrayStore
from deltapatch.data.transforms import evaluation_transform, training_transform
from deltapatch.errors import DeltapatchError, ImageError
from deltapatch.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_size=(1, 4, 4), mean=(0.0,), std=(1.0,), crop_pct=1.0)


@pytest.fixture
def images():
    """Ten grey images, the i-th of value 10 i, labelled i mod 3; number 4 is NaN and so bad."""
    values = np.repeat(np.arange(10, dtype=np.float32) * 10, 16).reshape(10, 4, 4)
    values[4] = np.nan
    return ImageSet.of(ArrayStore(values, "ten.npz[train]"), np.arange(10) % 3, ImageLimits())


def test_an_item_is_tensor_label_and_index(images):
    tensor, label, index = images.with_transform(evaluation_transform(PREPROCESSING))[5]
    torch.testing.assert_close(tensor, torch.full((1, 4, 4), 50 / 255))
    assert (label, index) == (2, 5)


def test_a_bad_image_is_an_item_that_says_why(images):
    item = images.with_transform(evaluation_transform(PREPROCESSING))[4]
    assert isinstance(item, BadImage)
    assert item.path == "ten.npz[train][4]"
    assert "NaN" in item.reason


def test_a_bad_image_raises_where_the_picture_itself_is_asked_for(images):
    with pytest.raises(ImageError, match="NaN"):
        images.image(4)
    assert images.image(5).getpixel((0, 0)) == (50, 50, 50)


def test_a_subset_keeps_order_labels_and_names_and_counts_from_zero(images):
    some = images.subset([9, 2]).with_transform(evaluation_transform(PREPROCESSING))
    assert len(some) == 2
    assert some.labels.tolist() == [0, 2]
    assert some.names(0) == "ten.npz[train][9]"
    tensor, label, index = some[1]
    assert tensor[0, 0, 0] == pytest.approx(20 / 255)
    assert (label, index) == (2, 1)


def test_a_subset_of_a_subset_still_finds_its_images(images):
    assert images.subset([9, 2, 7]).subset([2]).names(0) == "ten.npz[train][7]"


def test_copies_leave_the_set_they_came_from_alone(images):
    images.subset([1]).with_transform(evaluation_transform(PREPROCESSING)).for_epoch(3)
    assert len(images) == 10
    assert images.epoch == 0
    with pytest.raises(DeltapatchError, match="with_transform"):
        images[0]


def test_an_index_beyond_the_end_is_an_index_error(images):
    with pytest.raises(IndexError):
        images.with_transform(evaluation_transform(PREPROCESSING))[10]


def test_the_limits_are_those_of_the_set():
    store = ArrayStore(np.zeros((2, 4, 4), np.uint8), "two")
    item = ImageSet.of(store, None, ImageLimits(max_side=3)).with_transform(
        evaluation_transform(PREPROCESSING)
    )[0]
    assert isinstance(item, BadImage)


@pytest.fixture
def noisy():
    values = np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8)
    images = ImageSet.of(ArrayStore(values, "noise"), None, ImageLimits())
    return images.with_transform(training_transform(PREPROCESSING, "standard"))


def test_augmentation_depends_on_seed_epoch_and_index_alone(noisy):
    first = noisy.for_epoch(2, seed=5)[1][0]
    torch.manual_seed(99)
    noisy.for_epoch(2, seed=5)[0]
    assert torch.equal(noisy.for_epoch(2, seed=5)[1][0], first)
    assert not torch.equal(noisy.for_epoch(3, seed=5)[1][0], first)
    assert not torch.equal(noisy.for_epoch(2, seed=6)[1][0], first)


def test_images_of_one_epoch_are_augmented_differently():
    values = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 16, 16), np.uint8), 2, axis=0)
    images = ImageSet.of(ArrayStore(values, "twins"), None, ImageLimits())
    images = images.with_transform(training_transform(PREPROCESSING, "crop"))
    assert not torch.equal(images[0][0], images[1][0])


def test_reading_leaves_the_global_generator_alone(noisy):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    noisy[0]
    assert torch.equal(torch.rand(1), expected)


def test_images_without_labels_have_label_minus_one(noisy):
    assert noisy.labels.tolist() == [-1] * 4
    assert noisy[2][1] == -1


def test_the_picture_is_not_augmented(noisy):
    assert isinstance(noisy.image(0), Image.Image)
    assert noisy.image(0).size == (16, 16)
