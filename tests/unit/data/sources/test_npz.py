import numpy as np
import pytest

from deltapatch.data.decode import decode_image
from deltapatch.data.sources.npz import ArrayStore, read_npz
from deltapatch.data.sources.source import Split
from deltapatch.errors import DataError, DeltapatchWarning

IMAGES = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
LABELS = np.array([0, 1, 1, 0])


@pytest.fixture
def save(tmp_path):
    """Writes an .npz with four training images, changed by the given arrays; None leaves one out."""

    def write(**arrays):
        arrays = {"train_images": IMAGES, "train_labels": LABELS} | arrays
        path = tmp_path / "set.npz"
        np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


def test_splits_labels_and_classes_are_read(save):
    source = read_npz(save(val_images=IMAGES[:2], val_labels=[1, 0], classes=np.array(["cat", "dog"])))
    assert source.classes == ("cat", "dog")
    assert {split: images.labels.tolist() for split, images in source.splits.items()} == {
        Split.TRAIN: [0, 1, 1, 0],
        Split.VAL: [1, 0],
    }


def test_images_are_named_by_file_split_and_row(save):
    path = save()
    store = read_npz(path).splits[Split.TRAIN].store
    assert store.name(3) == f"{path}[train][3]"
    assert np.array_equal(store.read(3), IMAGES[3])


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3)])
def test_grey_and_rgb_arrays_are_images(save, shape):
    store = read_npz(save(train_images=np.zeros(shape, np.uint8))).splits[Split.TRAIN].store
    assert decode_image(store.read(0)).size == (6, 5)


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.astype(np.uint8), LABELS.astype(float)])
def test_labels_may_be_a_column_and_of_any_whole_type(save, labels):
    numbers = read_npz(save(train_labels=labels)).splits[Split.TRAIN].labels
    assert numbers.dtype == np.int64
    assert numbers.tolist() == LABELS.tolist()


def test_without_names_the_classes_are_the_numbers(save):
    assert read_npz(save()).classes == ("0", "1")


def test_classes_without_unicode_are_read(save):
    assert read_npz(save(classes=np.array([b"cat", b"dog"]))).classes == ("cat", "dog")


def test_a_split_of_unlabelled_images_is_left_out_with_a_warning(save):
    path = save(test_images=IMAGES, test_labels=np.full(4, -1))
    with pytest.warns(DeltapatchWarning, match="split 'test' has no labels"):
        assert list(read_npz(path).splits) == [Split.TRAIN]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": None}, "the array 'train_labels' is missing"),
        ({"train_images": None}, "train_images and train_labels are expected, but it holds train_labels"),
        (
            {"train_labels": np.array([0, 1, 2, 0]), "classes": np.array(["a", "b"])},
            "label 2 is outside 0 to 1",
        ),
        ({"train_labels": np.array([0, 1, -1, 0])}, "labels from -1 to 1"),
        (
            {"train_labels": np.array([0, 1, -1, 0]), "classes": np.array(["a", "b"])},
            "label -1 is outside 0 to 1",
        ),
        ({"train_labels": np.array([1, 2, 1, 2])}, "labels from 1 to 2 were found, but 0 to 1 is expected"),
        ({"train_labels": np.array([0, 1, np.nan, 0])}, "a label is NaN"),
        ({"train_labels": np.array([0, 1, 0.5, 0])}, "a label is a fraction"),
        ({"train_labels": np.zeros(4, int)}, "only the class '0' was found"),
        (
            {"train_labels": np.zeros(4, int), "classes": np.array(["a", "b"])},
            "all training images have the same",
        ),
        ({"train_labels": LABELS[:3]}, "there are 4 images but 3 labels"),
        ({"train_labels": np.zeros((4, 2), int)}, "labels have shape"),
        ({"train_labels": np.zeros(4, "datetime64[s]")}, "datetime64"),
        ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "split 'test': there are no images"),
        ({"train_images": np.zeros((4, 5, 6, 2), np.uint8)}, r"train_images has shape \(5, 6, 2\)"),
        ({"train_images": np.zeros((4, 30), np.uint8)}, r"has shape \(30,\)"),
        ({"train_images": IMAGES.astype(np.int64)}, "holds int64 values"),
        ({"classes": np.array(["a", "b"], dtype=object)}, "'classes' cannot be read .*dtype=str"),
        ({"train_images": np.array([IMAGES, None], dtype=object)}, "'train_images' cannot be read"),
        ({"classes": np.array([1.0, 2.0])}, "'classes' must be a list of texts"),
        ({"classes": np.array(["a", "a"])}, "classes 'a' and 'a' have the same name"),
        ({"classes": np.array(["a", " "])}, "a class has an empty name"),
    ],
)
def test_an_npz_of_another_form_is_refused_with_the_array_at_fault(save, arrays, message):
    with pytest.raises(DataError, match=message):
        read_npz(save(**arrays))


def test_nothing_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("!",))

    path = tmp_path / "trap.npz"
    np.savez(path, train_images=np.array([Trap()], dtype=object), train_labels=LABELS)
    with pytest.raises(DataError):
        read_npz(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.npz: cannot be read as \.npz"):
        read_npz(path)


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match="holds a single array"):
        read_npz(tmp_path / "one.npz")


def test_a_damaged_array_is_refused_by_name(save):
    path = save(train_images=np.random.default_rng(0).integers(0, 256, (4, 50, 50), np.uint8))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError, match="'train_images' cannot be read"):
        read_npz(path)


def test_the_digest_is_that_of_the_content(save):
    first = read_npz(save()).digest
    assert read_npz(save(train_labels=LABELS[::-1])).digest == first
    assert read_npz(save(train_labels=1 - LABELS)).digest != first
    assert len(first) == 64


def test_the_version_is_that_of_the_images_alone(save):
    def version(**arrays):
        return read_npz(save(**arrays)).splits[Split.TRAIN].store.version()

    first = version()
    assert version(train_labels=1 - LABELS) == first
    changed = IMAGES.copy()
    changed[3, 4, 5] ^= 1
    # The same bytes in another shape or of another type are other images.
    others = [changed, IMAGES[::-1], IMAGES.reshape(4, 6, 5), IMAGES[..., None], IMAGES[:, :, ::2]]
    versions = [version(train_images=images) for images in others]
    versions.append(ArrayStore((IMAGES > 0) & True, "bool").version())
    versions.append(ArrayStore((IMAGES > 0).astype(np.uint8), "uint8").version())
    assert len({first, *versions}) == 1 + len(versions)
    assert len(first) == 64


def test_the_version_does_not_depend_on_how_an_array_lies_in_memory():
    assert ArrayStore(IMAGES[:, ::2], "a").version() == ArrayStore(IMAGES[:, ::2].copy(), "b").version()
