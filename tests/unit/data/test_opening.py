import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from deltapatch.data import evaluation_transform, list_images, load_batches, open_data, open_images
from deltapatch.data.decode import ImageLimits
from deltapatch.errors import DataError, ImageError
from deltapatch.preprocessing import Preprocessing

REPOSITORY = Path(__file__).parents[3]
SHARED = Path(os.environ.get("DELTAPATCH_SHARED", REPOSITORY.parent / "shared"))


def names(images):
    return [images.names(index) for index in range(len(images))]


def test_a_tree_becomes_a_task(grow_tree):
    data = open_data(
        grow_tree({"train/a": 2, "train/b": 3, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 2})
    )
    assert data.name == "photos"
    assert data.classes == ("a", "b")
    assert data.provenance.model_dump(exclude={"digest"}) == {
        "source": "photos",
        "kind": "folder",
        "train": 5,
        "val": 2,
        "test": 3,
        "validation": "given",
        "bad_images": 0,
    }
    assert data.val.labels.tolist() == [0, 1]
    assert data.test.image(2).getpixel((0, 0)) == (200, 10, 0)


def test_a_missing_test_split_is_none(grow_tree):
    assert open_data(grow_tree({"a": 2, "b": 2})).test is None


def test_a_source_with_only_a_test_split_opens_for_evaluation(grow_tree):
    data = open_data(grow_tree({"test/a": 2, "test/b": 2}))
    assert (data.train, data.val, data.provenance.validation) == (None, None, "none")
    assert len(data.test) == 4


def test_validation_is_held_out_class_by_class(grow_tree):
    root = grow_tree({"many": 20, "few": 5, "two": 2, "one": 1})
    data = open_data(root, validation=0.2, seed=3)
    classes = np.array(data.classes)
    assert sorted(classes[data.val.labels].tolist()) == ["few"] + ["many"] * 4 + ["two"]
    assert sorted(names(data.train) + names(data.val)) == sorted(names(open_data(root, validation=0).train))
    assert set(classes[data.train.labels]) == set(data.classes)
    assert data.provenance.validation == "stratified 20 % of train, seed 3"
    assert (data.provenance.train, data.provenance.val) == (22, 6)


def test_the_validation_split_depends_on_the_seed_alone(grow_tree):
    root = grow_tree({"a": 20, "b": 20})
    assert names(open_data(root, seed=1).val) == names(open_data(root, seed=1).val)
    assert names(open_data(root, seed=1).val) != names(open_data(root, seed=2).val)


def test_both_parts_keep_the_order_of_the_source(grow_tree):
    data = open_data(grow_tree({"a": 20, "b": 20}), validation=0.5)
    assert names(data.train) == sorted(names(data.train), key=os.fsencode)
    assert names(data.val) == sorted(names(data.val), key=os.fsencode)


def test_a_very_large_part_still_leaves_one_of_each_class_for_training(grow_tree):
    data = open_data(grow_tree({"a": 3, "b": 2}), validation=0.99)
    assert sorted(data.train.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(("validation", "count"), [(0, 2), (0.2, 1)])
def test_no_validation_split_is_made_where_none_is_wanted_or_possible(grow_tree, validation, count):
    data = open_data(grow_tree({"a": count, "b": count}), validation=validation)
    assert data.val is None
    assert data.provenance.validation == "none"
    assert len(data.train) == 2 * count


@pytest.mark.parametrize(
    "arguments", [{"validation": 1}, {"validation": -0.1}, {"validation": np.nan}, {"seed": -1}]
)
def test_an_unusable_part_or_seed_is_refused(grow_tree, arguments):
    with pytest.raises(DataError, match="is expected"):
        open_data(grow_tree({"a": 2, "b": 2}), **arguments)


def test_npz_and_parquet_files_and_folders_are_told_apart(tmp_path, encode):
    np.savez(tmp_path / "cells.npz", train_images=np.zeros((4, 3, 3), np.uint8), train_labels=[0, 1, 0, 1])
    (tmp_path / "shards").mkdir()
    parquet.write_table(
        pyarrow.table({"image": [encode()] * 4, "label": [0, 1, 0, 1]}), tmp_path / "one.parquet"
    )
    (tmp_path / "one.parquet").rename(tmp_path / "shards" / "train.parquet")
    for name, kind in (("cells.npz", "npz"), ("shards", "parquet"), ("shards/train.parquet", "parquet")):
        data = open_data(tmp_path / name)
        assert data.name == Path(name).stem
        assert (data.provenance.kind, data.provenance.source) == (kind, Path(name).name)
        assert data.provenance.train + data.provenance.val == 4


def test_a_relative_path_of_two_parts_is_a_folder_where_it_exists(grow_tree, monkeypatch):
    root = grow_tree({"a": 2, "b": 2})
    monkeypatch.chdir(root.parent.parent)
    assert open_data(f"{root.parent.name}/photos").provenance.kind == "folder"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "nothing: no such file or folder"),
        (Path("owner/name"), "owner/name: no such file or folder; check the path"),
        ("owner/name", r"owner/name: no such file or folder; .*pip install deltapatch\[hub\]"),
        (Path(__file__), r"test_opening\.py: a folder, an \.npz or a \.parquet file is expected"),
    ],
)
def test_a_source_that_is_not_there_or_of_no_known_kind_is_refused(monkeypatch, source, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=message):
        open_data(source)


def test_the_limits_reach_the_images(grow_tree):
    data = open_data(grow_tree({"a": 2, "b": 2}), limits=ImageLimits(max_side=5))
    with pytest.raises(ImageError, match="6 x 6 pixels"):
        data.train.image(0)


def test_files_and_folders_are_listed_sorted_and_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/b.JPG", "deep/a.png", "deep/notes.txt", "deep/.hidden.png", "odd.dat"):
        (tmp_path / name).touch()
    listed = list_images([tmp_path / "odd.dat", tmp_path / "deep", tmp_path / "deep" / "a.png"])
    assert listed == [tmp_path / "deep/a.png", tmp_path / "deep/er/b.JPG", tmp_path / "odd.dat"]


def test_a_missing_path_and_a_folder_without_images_are_named(tmp_path):
    with pytest.raises(DataError, match="none: no such file or folder"):
        list_images([tmp_path / "none"])
    with pytest.raises(DataError, match="no image was found"):
        list_images([tmp_path])


def test_images_for_prediction_keep_their_order_and_have_no_label(tmp_path):
    paths = [tmp_path / "b.png", tmp_path / "a.png"]
    for path in paths:
        Image.new("RGB", (2, 2)).save(path)
    images = open_images(paths)
    assert names(images) == [str(path) for path in paths]
    assert images.labels.tolist() == [-1, -1]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "classes", "counts", "size"),
    [
        ("cifar10", 10, (2600, 400, 1500), (32, 32)),
        ("mnist", 10, (6000, 1000, 10_000), (28, 28)),
        ("caltech101", 101, (505, 101, 303), (64, 64)),
    ],
)
def test_real_sets_open_with_their_documented_counts(name, classes, counts, size):
    path = SHARED / "data" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{name}.npz is not in the shared folder")
    data = open_data(path)
    provenance = data.provenance
    assert (provenance.train, provenance.val, provenance.test) == counts
    assert len(data.classes) == classes
    assert data.train.image(0).size == size
    transform = evaluation_transform(Preprocessing(input_size=(3, 32, 32), crop_pct=1.0))
    images = data.train.with_transform(transform).subset(range(64))
    batch = next(iter(load_batches(images, batch_size=64, shuffle=True)))
    assert batch.bad == ()
    assert torch.equal(batch.labels, torch.from_numpy(data.train.labels)[batch.indices])
    assert 0.3 < batch.images.std() < 3
