import numpy as np
import pytest
import torch
from PIL import Image

from deltapatch.data.dataset import BadImage, ImageSet, drawn_views
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


@pytest.mark.parametrize("augment", ["crop", "standard"])
def test_a_view_is_the_same_picture_whatever_seed_epoch_order_and_subset(noisy, augment):
    at_view = noisy.at_view(PREPROCESSING, augment, 2)
    pictures = [at_view[index][0] for index in range(4)]
    torch.manual_seed(99)
    assert torch.equal(at_view.for_epoch(7, seed=5)[3][0], pictures[3])
    assert torch.equal(at_view.subset([3, 1])[0][0], pictures[3])
    assert not torch.equal(pictures[0], noisy.at_view(PREPROCESSING, augment, 1)[0][0])


def test_images_at_one_view_are_cut_differently():
    values = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 16, 16), np.uint8), 2, axis=0)
    twins = ImageSet.of(ArrayStore(values, "twins"), None, ImageLimits()).at_view(PREPROCESSING, "crop", 1)
    assert not torch.equal(twins[0][0], twins[1][0])


def test_views_do_not_share_their_draws_with_fresh_augmentation(noisy):
    """Row and view are numbers as small as seed and epoch are."""
    fresh = noisy.with_transform(training_transform(PREPROCESSING, "crop"))
    for row in range(4):
        view = noisy.at_view(PREPROCESSING, "crop", 2)[row][0]
        drawn = [fresh.for_epoch(2, seed=row).subset([row])[0][0], fresh.for_epoch(row, seed=2)[row][0]]
        assert not any(torch.equal(view, picture) for picture in drawn)


def test_reading_a_view_leaves_the_global_generator_alone(noisy):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    noisy.at_view(PREPROCESSING, "crop", 1)[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("augment", "views"), [("none", 1), ("flip", 2), ("crop", 3), ("standard", 3)])
def test_an_epoch_changes_which_view_is_drawn_and_nothing_else(noisy, augment, views):
    at = [noisy.at_view(PREPROCESSING, augment, view) for view in range(views)]
    images = noisy.with_views(PREPROCESSING, augment, views)
    seen = set()
    for epoch in range(8):
        drawn = drawn_views(4, views, seed=6, epoch=epoch).tolist()
        items = images.for_epoch(epoch, seed=6)
        assert all(torch.equal(items[index][0], at[view][index][0]) for index, view in enumerate(drawn))
        seen.update(drawn)
    assert seen == set(range(views))


def test_a_copy_of_a_set_with_views_draws_for_itself(noisy):
    images = noisy.with_views(PREPROCESSING, "flip", 2).for_epoch(1, seed=6)
    images[0]  # draws for four images
    many = images.subset(np.arange(4).repeat(10))
    at = [noisy.at_view(PREPROCESSING, "flip", view) for view in range(2)]
    drawn = drawn_views(40, 2, seed=6, epoch=1).tolist()
    assert all(torch.equal(many[i][0], at[view][i // 10][0]) for i, view in enumerate(drawn))


def test_another_transform_or_one_view_ends_the_drawing(noisy):
    images = noisy.with_views(PREPROCESSING, "flip", 2)
    plain = evaluation_transform(PREPROCESSING)
    for ended in (images.with_transform(plain), images.at_view(PREPROCESSING, "flip", 0)):
        assert ended.transform == plain
        assert all(torch.equal(ended.for_epoch(e)[0][0], ended[0][0]) for e in range(10))


def test_a_bad_image_is_bad_at_every_view(images):
    assert isinstance(images.with_views(PREPROCESSING, "crop", 3)[4], BadImage)
    assert isinstance(images.at_view(PREPROCESSING, "crop", 2)[4], BadImage)


@pytest.mark.parametrize(
    ("augment", "views", "message"), [("crop", 0, "views cannot be 0"), ("flip", 3, "has no view 2")]
)
def test_a_number_of_views_that_cannot_be_had_is_refused(noisy, augment, views, message):
    with pytest.raises(DeltapatchError, match=message):
        noisy.with_views(PREPROCESSING, augment, views)
