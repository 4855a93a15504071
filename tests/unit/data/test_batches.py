import logging

import numpy as np
import pytest
import torch

from deltapatch.data.batches import collate, drawn_views, load_batches, shuffled
from deltapatch.data.dataset import BadImage, ImageSet
from deltapatch.data.decode import ImageLimits
from deltapatch.data.sources.npz import ArrayStore
from deltapatch.data.transforms import evaluation_transform, training_transform
from deltapatch.errors import DeltapatchError, ImageError
from deltapatch.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_size=(1, 4, 4), mean=(0.0,), std=(1.0,), crop_pct=1.0)


def noise(count, bad=()):
    values = np.random.default_rng(0).random((count, 8, 8)).astype(np.float32)
    values[list(bad)] = np.nan
    images = ImageSet.of(ArrayStore(values, "noise"), np.arange(count) % 3, ImageLimits())
    return images.with_transform(training_transform(PREPROCESSING, "standard"))


def order(batches):
    return torch.cat([batch.indices for batch in batches]).tolist()


def test_a_batch_holds_images_labels_and_indices_in_the_same_order():
    images = noise(5).with_transform(evaluation_transform(PREPROCESSING))
    first, second = load_batches(images, batch_size=3, shuffle=False)
    assert first.images.shape == (3, 1, 4, 4)
    assert second.indices.tolist() == [3, 4]
    assert second.labels.tolist() == [0, 1]
    assert second.labels.dtype == torch.int64
    assert torch.equal(second.images[1], images[4][0])


def test_bad_images_are_left_out_and_listed():
    batch = next(load_batches(noise(4, bad=[1, 2]), batch_size=4, shuffle=False).epoch(0))
    assert batch.indices.tolist() == [0, 3]
    assert len(batch.images) == 2
    assert [image.path for image in batch.bad] == ["noise[1]", "noise[2]"]


def test_a_batch_without_a_good_image_is_empty_but_has_the_shape():
    batch = next(iter(load_batches(noise(2, bad=[0, 1]), batch_size=2, shuffle=False)))
    assert batch.images.shape == (0, 1, 4, 4)
    assert batch.labels.shape == (0,)
    assert batch.labels.dtype == torch.int64
    assert len(batch.bad) == 2


def test_collate_keeps_what_it_is_given():
    items = [(torch.ones(1, 2, 2), 4, 7), BadImage("a", "b")]
    batch = collate(items, (1, 2, 2))
    assert (batch.labels.item(), batch.indices.item(), batch.bad) == (4, 7, (BadImage("a", "b"),))


def test_the_order_depends_on_seed_and_epoch_alone():
    batches = load_batches(noise(20), batch_size=6, shuffle=True, seed=1)
    again = load_batches(noise(20), batch_size=6, shuffle=True, seed=1)
    third = order(batches.epoch(3))
    order(again.epoch(0))
    assert order(again.epoch(3)) == third
    assert sorted(third) == list(range(20))
    assert order(batches.epoch(4)) != third
    assert order(load_batches(noise(20), batch_size=6, shuffle=True, seed=2).epoch(3)) != third


def test_augmentation_draws_anew_in_each_epoch_and_for_each_seed():
    def pixels(seed, epoch):
        batches = load_batches(noise(3), batch_size=3, shuffle=False, seed=seed)
        return next(batches.epoch(epoch)).images

    assert torch.equal(pixels(1, 2), pixels(1, 2))
    assert not torch.equal(pixels(1, 2), pixels(1, 3))
    assert not torch.equal(pixels(1, 2), pixels(4, 2))


def test_without_shuffling_every_epoch_has_the_order_of_the_set():
    batches = load_batches(noise(5), batch_size=2, shuffle=False)
    assert order(batches.epoch(0)) == order(batches.epoch(1)) == [0, 1, 2, 3, 4]


def test_epochs_can_be_read_side_by_side():
    batches = load_batches(noise(6), batch_size=2, shuffle=True)
    pairs = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert torch.cat([first.indices for first, _ in pairs]).tolist() == order(batches.epoch(0))
    assert torch.cat([second.indices for _, second in pairs]).tolist() == order(batches.epoch(1))


def test_workers_change_nothing():
    arguments = {"batch_size": 3, "shuffle": True, "seed": 4}
    alone = list(load_batches(noise(8, bad=[2]), **arguments).epoch(1))
    shared = list(load_batches(noise(8, bad=[2]), workers=2, **arguments).epoch(1))
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.indices, theirs.indices)
        assert ours.bad == theirs.bad


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_each_image_of_an_epoch_is_at_its_drawn_view_whatever_the_workers_and_the_order(augment):
    images = noise(8, bad=[2])
    at = [images.at_view(PREPROCESSING, augment, view) for view in range(2)]
    drawn = drawn_views(8, 2, seed=4, epoch=1)
    for workers, shuffle in ((0, False), (0, True), (2, True)):
        batches = load_batches(
            images.with_views(PREPROCESSING, augment, 2),
            batch_size=3,
            shuffle=shuffle,
            seed=4,
            workers=workers,
        )
        read = 0
        for batch in batches.epoch(1):
            for picture, index in zip(batch.images, batch.indices.tolist(), strict=True):
                assert torch.equal(picture, at[drawn[index]][index][0])
                read += 1
        assert read == 7


def test_drawn_views_depend_on_seed_and_epoch_alone():
    first = drawn_views(100, 4, seed=1, epoch=2)
    torch.manual_seed(99)
    assert torch.equal(drawn_views(100, 4, seed=1, epoch=2), first)
    assert first.dtype == torch.int64
    assert first.shape == (100,)
    assert not torch.equal(drawn_views(100, 4, seed=1, epoch=3), first)
    assert not torch.equal(drawn_views(100, 4, seed=2, epoch=2), first)
    assert not torch.equal(drawn_views(100, 4, seed=2, epoch=1), first)


@pytest.mark.parametrize("views", [1, 2, 5])
def test_every_view_is_drawn_equally_often_over_images_and_over_epochs(views):
    """Each count is binomial: it strays less than five standard deviations from its mean."""
    count = 2000
    margin = 5 * (count * (1 / views) * (1 - 1 / views)) ** 0.5
    over_images = drawn_views(count, views, seed=3, epoch=0)
    over_epochs = torch.cat([drawn_views(1, views, seed=3, epoch=epoch) for epoch in range(count)])
    for drawn in (over_images, over_epochs):
        counts = torch.bincount(drawn, minlength=views)
        assert len(counts) == views
        assert ((counts - count / views).abs() <= margin).all()


def test_views_and_order_are_independent():
    """The first and the second half of an epoch see view 1 equally often, over many epochs."""
    ahead = sum(
        int(drawn_views(50, 2, seed=3, epoch=epoch)[shuffled(50, 3, epoch)[:25]].sum()) for epoch in range(80)
    )
    assert abs(ahead - 1000) <= 5 * (2000 * 0.25) ** 0.5


@pytest.mark.parametrize("workers", [0, 1])
def test_fail_raises_an_image_error_that_names_the_first_bad_image(workers):
    batches = load_batches(noise(4, bad=[2, 3]), batch_size=1, shuffle=False, workers=workers, on_bad="fail")
    reader = batches.epoch(0)
    assert next(reader).indices.tolist() == [0]
    next(reader)
    with pytest.raises(ImageError, match=r"^noise\[2\]: has NaN"):
        next(reader)


def test_a_bad_image_is_logged_once_however_many_epochs_meet_it(caplog):
    batches = load_batches(noise(4, bad=[1]), batch_size=2, shuffle=True)
    with caplog.at_level(logging.WARNING, "deltapatch"):
        for epoch in range(3):
            assert sum(len(batch.bad) for batch in batches.epoch(epoch)) == 1
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["noise[1]"]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 1]), (True, [3, 3])])
def test_the_length_is_the_number_of_batches(drop_last, sizes):
    batches = load_batches(noise(7), batch_size=3, shuffle=False, drop_last=drop_last)
    assert [len(batch.labels) for batch in batches] == sizes
    assert len(batches) == len(sizes)


def test_an_empty_set_gives_no_batch():
    batches = load_batches(noise(3).subset([]), batch_size=2, shuffle=True)
    assert len(batches) == 0
    assert list(batches) == []


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(load_batches(noise(4), batch_size=2, shuffle=True))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"workers": -1}, {"seed": -1}])
def test_unusable_numbers_are_refused(arguments):
    with pytest.raises(DeltapatchError, match="not usable"):
        load_batches(noise(2), **{"batch_size": 1, "shuffle": False} | arguments)


def test_images_without_a_transform_are_refused():
    images = ImageSet.of(ArrayStore(np.zeros((1, 2, 2), np.uint8), "one"), None, ImageLimits())
    with pytest.raises(DeltapatchError, match="with_transform"):
        load_batches(images, batch_size=1, shuffle=False)
