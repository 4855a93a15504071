import os
import pickle
from pathlib import Path

import pytest

from deltapatch.data.sources.folder import FileStore, read_folder
from deltapatch.data.sources.source import Split
from deltapatch.errors import DataError, ImageError


def labels_by_name(images, root):
    paths = [images.store.name(row) for row in range(len(images.store))]
    return {
        os.path.relpath(path, root): label for path, label in zip(paths, images.labels.tolist(), strict=True)
    }


def test_a_tree_without_splits_is_training_with_sorted_classes(grow_tree):
    root = grow_tree({"dog": 1, "cat": 2})
    source = read_folder(root)
    assert source.classes == ("cat", "dog")
    assert list(source.splits) == [Split.TRAIN]
    assert labels_by_name(source.splits[Split.TRAIN], root) == {
        "cat/0.png": 0,
        "cat/1.png": 0,
        "dog/0.png": 1,
    }


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_split_folders_are_found_under_their_usual_names(grow_tree, name):
    source = read_folder(
        grow_tree({"train/a": 2, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1, "test/a": 3, "test/b": 1})
    )
    assert {split: len(images.store) for split, images in source.splits.items()} == {
        "train": 4,
        "val": 2,
        "test": 4,
    }


def test_a_tree_with_only_a_test_split_has_no_training(grow_tree):
    assert list(read_folder(grow_tree({"test/a": 1, "test/b": 1})).splits) == [Split.TEST]


def test_a_class_may_have_the_name_of_a_split(grow_tree):
    assert read_folder(grow_tree({"bus": 1, "train": 2})).classes == ("bus", "train")


def test_images_in_deeper_folders_belong_to_the_class_above(grow_tree):
    root = grow_tree({"cat/indoor/dark": 2, "dog": 1})
    assert read_folder(root).splits[Split.TRAIN].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "notes.txt", "table.CSV", "._0.png"])
def test_files_that_are_known_to_be_no_images_are_ignored(grow_tree, name):
    root = grow_tree({"a": 1, "b": 1})
    (root / "a" / name).write_text("no image")
    assert len(read_folder(root).splits[Split.TRAIN].store) == 2


def test_hidden_folders_are_no_classes(grow_tree):
    root = grow_tree({"a": 1, "b": 1, ".cache": 1, "__MACOSX": 1})
    assert read_folder(root).classes == ("a", "b")


def test_any_other_file_is_listed_so_that_it_is_found_bad(grow_tree):
    root = grow_tree({"a": 1, "b": 1})
    (root / "a" / "photo.jpgx").write_text("no image")
    assert len(read_folder(root).splits[Split.TRAIN].store) == 3


def test_an_empty_class_folder_is_named(grow_tree):
    root = grow_tree({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 0})
    with pytest.raises(DataError, match="test/b: the class folder has no images"):
        read_folder(root)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train/a": 1, "train/b": 1, "val/a": 1},
            "val: the class folder 'b' of the training split is missing",
        ),
        (
            {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "val/c": 1},
            "val: the class folder 'c' is not in",
        ),
        ({"train/a": 1, "train/b": 1, "extra/a": 1}, "extra: this folder lies beside train, but is no split"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "valid: val is the same split"),
        ({"Cat": 1, "cat": 1}, "classes 'Cat' and 'cat' have the same name"),
        ({"cat": 1}, "only the class 'cat' was found"),
        (
            {"train": 1, "test": 1},
            r"train: there are no class folders in it; expected folder/<class>/<image>",
        ),
    ],
)
def test_a_tree_of_another_layout_is_refused_with_the_folder_at_fault(grow_tree, counts, message):
    with pytest.raises(DataError, match=message):
        read_folder(grow_tree(counts))


def test_a_flat_folder_is_told_the_layout(grow_tree):
    root = grow_tree({"only": 2}) / "only"
    with pytest.raises(
        DataError, match="only: there are no class folders in it; expected folder/<class>/<image>"
    ):
        read_folder(root)


def test_a_link_that_leaves_the_tree_is_refused(grow_tree):
    outside = grow_tree({"c": 1}, name="elsewhere") / "c" / "0.png"
    root = grow_tree({"a": 1, "b": 1})
    (root / "a" / "link.png").symlink_to(outside)
    (root / "b" / "inside.png").symlink_to(root / "a" / "0.png")
    store = read_folder(root).splits[Split.TRAIN].store
    assert [os.path.basename(store.name(row)) for row in range(4)] == [
        "0.png",
        "link.png",
        "0.png",
        "inside.png",
    ]
    with pytest.raises(ImageError, match="is a link that leaves"):
        store.read(1)
    assert store.read(3) == root / "b" / "inside.png"


def test_a_linked_folder_inside_a_class_is_not_followed_but_not_lost(grow_tree):
    outside = grow_tree({"c": 3}, name="elsewhere") / "c"
    root = grow_tree({"a": 1, "b": 1})
    (root / "a" / "more").symlink_to(outside)
    store = read_folder(root).splits[Split.TRAIN].store
    assert len(store) == 3
    with pytest.raises(ImageError, match="is a link that leaves"):
        store.read(1)


def test_a_link_to_itself_is_a_bad_image_only(grow_tree):
    root = grow_tree({"a": 1, "b": 1})
    (root / "a" / "loop.png").symlink_to(root / "a" / "loop.png")
    assert read_folder(root).splits[Split.TRAIN].store.read(1) == root / "a" / "loop.png"


def test_a_class_folder_that_is_a_link_is_refused(grow_tree):
    outside = grow_tree({"c": 1}, name="elsewhere") / "c"
    root = grow_tree({"a": 1, "b": 1})
    (root / "c").symlink_to(outside)
    with pytest.raises(DataError, match="photos/c: is a link to a folder"):
        read_folder(root)


def test_the_digest_is_that_of_names_sizes_and_labels(grow_tree):
    first = grow_tree({"a": 2, "b": 1}, name="first")
    second = grow_tree({"a": 2, "b": 1}, name="second")
    assert read_folder(first).digest == read_folder(second).digest
    with (second / "a" / "0.png").open("ab") as file:
        file.write(b"!")
    larger = read_folder(second).digest
    assert larger != read_folder(first).digest
    (second / "a" / "0.png").rename(second / "a" / "9.png")
    assert read_folder(second).digest != larger


def test_a_name_that_is_not_unicode_is_read(grow_tree):
    root = grow_tree({"a": 1, "b": 1})
    try:
        (root / "a" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system only takes Unicode names")
    assert len(read_folder(root).splits[Split.TRAIN].store) == 3


def test_a_store_survives_pickling(tmp_path):
    store = pickle.loads(pickle.dumps(FileStore([tmp_path / "a.png"], tmp_path)))
    assert store.read(0) == tmp_path / "a.png"


def version_of(root):
    return read_folder(root).splits[Split.TRAIN].store.version()


def test_the_version_is_that_of_names_sizes_and_times(grow_tree, monkeypatch):
    root = grow_tree({"a": 2, "b": 1})
    versions = [version_of(root)]
    monkeypatch.chdir(root.parent)
    assert version_of(Path(root.name)) == versions[0]
    image = root / "a" / "0.png"
    changed = image.stat().st_mtime_ns + 1
    os.utime(image, ns=(changed, changed))
    versions.append(version_of(root))
    with image.open("ab") as file:
        file.write(b"!")
    os.utime(image, ns=(changed, changed))
    versions.append(version_of(root))
    image.rename(root / "a" / "00.png")
    versions.append(version_of(root))
    (root / "b" / "0.png").rename(root / "a" / "9.png")
    (root / "a" / "1.png").rename(root / "b" / "0.png")
    versions.append(version_of(root))
    assert len(set(versions)) == len(versions)
    assert all(len(version) == 64 for version in versions)


def test_equal_files_elsewhere_have_another_version(grow_tree):
    one, two = (grow_tree({"a": 1, "b": 1}, name=name) for name in ("one", "two"))
    for file in one.rglob("*.png"):
        os.utime(file, (0, 0))
        os.utime(two / file.relative_to(one), (0, 0))
    assert version_of(one) != version_of(two)


def test_the_version_follows_the_order_of_the_files(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    assert FileStore(paths).version() != FileStore(paths[::-1]).version()


def test_a_link_has_the_version_of_what_it_leads_to_and_one_to_nowhere_has_one_too(grow_tree, tmp_path):
    root = grow_tree({"a": 1, "b": 1})
    store = FileStore([tmp_path / "link.png"])
    store.paths[0].symlink_to(root / "a" / "0.png")
    first = store.version()
    with (root / "a" / "0.png").open("ab") as file:
        file.write(b"!")
    second = store.version()
    (root / "a" / "0.png").unlink()
    assert len({first, second, store.version()}) == 3
