"""Batches of images are mixed, and hold each image once."""

from pathlib import Path

import pytest
import torch
from digits import write_digits
from toys import toy_base

from deltapatch import merging
from deltapatch.data import ImageSet, evaluation_transform, open_data
from deltapatch.errors import DeltapatchError


def digit_set(folder: Path, count: int, name: str = "digits") -> ImageSet:
    found = open_data(write_digits(folder / f"{name}.npz", train=count + 2)).train
    assert found is not None
    return found.subset(range(count))


def test_every_image_comes_once_and_each_time_in_the_same_order(tmp_path: Path) -> None:
    base, images = toy_base(), digit_set(tmp_path, 21)
    batches = merging.ImageBatches(images, base, batch_size=8)
    first, again = list(batches), list(batches)
    assert [len(batch) for batch in first] == [7, 7, 7]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    ready = images.with_transform(evaluation_transform(base.preprocessing))
    expected = sorted(tuple(ready[index][0].flatten().tolist()) for index in range(21))  # type: ignore[index]
    assert sorted(tuple(image.flatten().tolist()) for image in torch.cat(first)) == expected
    assert [tuple(image.flatten().tolist()) for image in torch.cat(first)] != expected
    other = torch.cat(list(merging.ImageBatches(images, base, batch_size=8, seed=1)))
    assert not torch.equal(torch.cat(first), other)


def test_each_batch_has_its_share_of_every_set(tmp_path: Path) -> None:
    base = toy_base()
    large, small = digit_set(tmp_path, 40), digit_set(tmp_path, 10, "few")
    batches = list(merging.ImageBatches([large, small], base, batch_size=11))
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 10]
    from_small = [list(merging.ImageBatches(small, base, batch_size=2))[number] for number in range(5)]
    for batch, share in zip(batches, from_small, strict=True):
        assert torch.equal(batch[-2:], share)


@pytest.mark.parametrize("sizes", [(64, 1), (3, 50, 7), (1,)])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_no_batch_is_larger_than_asked(tmp_path: Path, sizes: tuple[int, ...], batch_size: int) -> None:
    sets = [digit_set(tmp_path, size, str(size)) for size in sizes]
    lengths = [len(batch) for batch in merging.ImageBatches(sets, toy_base(), batch_size=batch_size)]
    assert max(lengths) <= batch_size
    assert sum(lengths) == sum(map(len, sets))


def test_a_batch_without_room_for_each_set_is_refused(tmp_path: Path) -> None:
    sets = [digit_set(tmp_path, 4)] * 3
    with pytest.raises(DeltapatchError, match="batch_size is 2, but a batch has one image or more of each"):
        merging.ImageBatches(sets, toy_base(), batch_size=2)
