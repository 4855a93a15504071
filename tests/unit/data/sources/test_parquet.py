import json
import sys

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from deltapatch.data.decode import decode_image
from deltapatch.data.sources.parquet import read_parquet
from deltapatch.data.sources.source import Split
from deltapatch.errors import DataError, ImageError


@pytest.fixture
def save(tmp_path, encode):
    """Writes a Parquet file of one-colour images, the i-th of value i, with the given labels."""

    def write(labels, name="set.parquet", *, struct=False, columns=("image", "label"), metadata=None):
        images = [encode(Image.new("L", (2, 2), row)) for row in range(len(labels))]
        if struct:
            images = [{"bytes": image, "path": "ignored.png"} for image in images]
        table = pyarrow.table(dict(zip(columns, (images, labels), strict=True)))
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)} if metadata else None)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(table, path)
        return path

    return write


def features(*names, column="label"):
    return {"info": {"features": {"image": {"_type": "Image"}, "boxes": [], column: {"names": list(names)}}}}


def values_of(images):
    return [decode_image(images.store.read(row)).getpixel((0, 0))[0] for row in range(len(images.store))]


@pytest.mark.parametrize("struct", [False, True])
def test_plain_bytes_and_the_hugging_face_struct_are_read(save, struct):
    path = save([1, 0, 1], struct=struct)
    train = read_parquet(path).splits[Split.TRAIN]
    assert values_of(train) == [0, 1, 2]
    assert train.labels.tolist() == [1, 0, 1]
    assert train.store.name(2) == f"{path}[2]"


def test_class_names_come_from_hugging_face_metadata(save):
    assert read_parquet(save([0, 1], metadata=features("cat", "dog"))).classes == ("cat", "dog")


@pytest.mark.parametrize("metadata", [{"info": []}, {"info": {"features": {}}}, ["text"]])
def test_other_metadata_counts_as_none(save, metadata):
    assert read_parquet(save([0, 1], metadata=metadata)).classes == ("0", "1")


def test_texts_become_sorted_classes(save):
    source = read_parquet(save(["dog", "cat", "dog"]))
    assert source.classes == ("cat", "dog")
    assert source.splits[Split.TRAIN].labels.tolist() == [1, 0, 1]


def test_texts_in_a_dictionary_column_are_read(save):
    source = read_parquet(save(pyarrow.array(["dog", "cat"]).dictionary_encode()))
    assert source.classes == ("cat", "dog")


def test_other_usual_column_names_are_read(save):
    assert len(read_parquet(save([0, 1], columns=("img", "labels"))).splits[Split.TRAIN].store) == 2


def test_a_folder_of_files_is_read_split_by_split_and_in_order(save):
    save([0, 1], "set/train-00000-of-00002.parquet")
    save([1, 1, 0], "set/train-00001-of-00002.parquet")
    save([1], "set/validation-00000-of-00001.parquet")
    folder = save([0], "set/test.parquet").parent
    source = read_parquet(folder)
    train = source.splits[Split.TRAIN]
    assert train.labels.tolist() == [0, 1, 1, 1, 0]
    assert values_of(train) == [0, 1, 0, 1, 2]
    assert train.store.name(4) == f"{folder / 'train-00001-of-00002.parquet'}[2]"
    assert {split: len(images.store) for split, images in source.splits.items()} == {
        "train": 5,
        "val": 1,
        "test": 1,
    }


def test_a_row_without_bytes_is_a_bad_image_and_its_path_is_not_opened(tmp_path, encode):
    (tmp_path / "secret.png").write_bytes(encode())
    images = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": encode(), "path": None}, None]
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 1, 0]}), tmp_path / "set.parquet")
    store = read_parquet(tmp_path / "set.parquet").splits[Split.TRAIN].store
    for row in (0, 2):
        with pytest.raises(ImageError, match=rf"set\.parquet\[{row}\]: has no image bytes"):
            store.read(row)
    assert decode_image(store.read(1)).size == (12, 8)


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, None], {}, "row 1 has no label"),
        ([0.0, np.nan], {}, "a label is NaN"),
        ([[0], [0, 1]], {}, "a label is a list"),
        ([[0, 1], [0, 1]], {}, "one label per image"),
        ([0, 5], {"metadata": features("a", "b")}, "label 5 is outside 0 to 1"),
        ([0, 0], {}, "only the class '0'"),
        (["Cat", "cat"], {}, "have the same name"),
        ([], {}, "no images|no class"),
        (
            [0, 1],
            {"columns": ("picture", "label")},
            "a column 'image' is expected, but the columns are picture, label",
        ),
        ([0, 1], {"columns": ("image", "y")}, "a column 'label' is expected"),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_is_at_fault(save, labels, arguments, message):
    with pytest.raises(DataError, match=message):
        read_parquet(save(labels, **arguments))


def test_a_text_label_that_training_lacks_is_named(save):
    save(["a", "b"], "set/train.parquet")
    folder = save(["c"], "set/test.parquet").parent
    with pytest.raises(DataError, match="label 'c' of split 'test' is not a class of the training split"):
        read_parquet(folder)


def test_files_with_different_class_names_are_refused(save):
    save([0, 1], "set/train.parquet", metadata=features("a", "b"))
    folder = save([0, 1], "set/test.parquet", metadata=features("b", "a")).parent
    with pytest.raises(DataError, match="different class names"):
        read_parquet(folder)


def test_a_file_of_no_split_is_named(save):
    save([0, 1], "set/train.parquet")
    folder = save([0, 1], "set/extra.parquet").parent
    with pytest.raises(DataError, match=r"extra\.parquet: the name must start with train, val or test"):
        read_parquet(folder)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as Parquet"):
        read_parquet(tmp_path / "broken.parquet")


def test_without_pyarrow_the_command_that_installs_it_is_named(save, monkeypatch):
    path = save([0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install deltapatch\[parquet\]"):
        read_parquet(path)


def test_the_digest_is_that_of_names_and_contents(save):
    save([0, 1], "one/train.parquet")
    one = save([0, 1], "one/test.parquet").parent
    save([0, 1], "two/train.parquet")
    two = save([0, 1], "two/test.parquet").parent
    assert read_parquet(one).digest == read_parquet(two).digest
    save([1, 0], "two/test.parquet")
    assert read_parquet(one).digest != read_parquet(two).digest


def version_of(path):
    return read_parquet(path).splits[Split.TRAIN].store.version()


def test_the_version_is_that_of_the_images_however_they_are_filed(save):
    first = version_of(save([0, 1, 0, 1]))
    assert version_of(save([1, 0, 1, 0], "other.parquet", struct=True)) == first
    assert version_of(save([0, 1, 0], "short.parquet")) != first
    # Each file of this folder begins with image 0 again.
    save([0, 1], "set/train-0.parquet")
    assert version_of(save([0, 1], "set/train-1.parquet").parent) != first


def test_bytes_cannot_move_from_one_image_to_the_next_or_vanish_unnoticed(tmp_path):
    def version(*images):
        path = tmp_path / "set.parquet"
        table = pyarrow.table({"image": pyarrow.array(images, pyarrow.binary()), "label": [0, 1, 0]})
        parquet.write_table(table, path)
        return version_of(path)

    lists = [
        (b"ab", b"c", b""),
        (b"a", b"bc", b""),
        (b"ab", b"c", None),
        (b"ab", None, b"c"),
        (b"c", b"ab", b""),
    ]
    assert len({version(*images) for images in lists}) == len(lists)
