import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from deltapatch.data.decode import decode_image
from deltapatch.data.sources.hub import HubStore, is_hub_name, read_hub
from deltapatch.data.sources.source import Split
from deltapatch.errors import DataError, DeltapatchWarning, ImageError


@dataclass
class FakeDataset:
    """As much of ``datasets.Dataset`` as is used; asking for an image that is not cast is an error."""

    rows: list[dict]
    names: list[str] | None = field(default_factory=lambda: ["cat", "dog"])
    revision: str = "1"
    encoded: bool = False

    @property
    def column_names(self):
        return list(self.rows[0])

    @property
    def features(self):
        return {"image": SimpleNamespace(), "label": SimpleNamespace(names=self.names)}

    @property
    def info(self):
        return SimpleNamespace(download_checksums={f"hf://owner/name@{self.revision}": None})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self.rows]
        assert self.encoded
        return self.rows[key]

    def select_columns(self, columns):
        return FakeDataset([{column: row[column] for column in columns} for row in self.rows], self.names)

    def cast_column(self, column, feature):
        if not isinstance(self.rows[0][column], dict):
            raise TypeError("cannot cast to Image")
        assert feature == ("Image", False)
        return FakeDataset(self.rows, self.names, encoded=True)


@pytest.fixture
def publish(monkeypatch, encode):
    """Puts a ``datasets`` library in place that knows one set, made of a list of labels for each split."""

    def make(labels, names=("cat", "dog"), revision="1"):
        def split(values):
            image = {"bytes": encode(), "path": None}
            return FakeDataset([{"image": image, "label": label} for label in values], list(names), revision)

        def load_dataset(name):
            if name != "owner/name":
                raise FileNotFoundError(f"{name} does not exist on the hub")
            return {key: split(values) for key, values in labels.items()}

        library = ModuleType("datasets")
        library.load_dataset = load_dataset
        library.Image = lambda decode: ("Image", decode)
        monkeypatch.setitem(sys.modules, "datasets", library)

    return make


@pytest.mark.parametrize("source", ["owner/name", "hf:owner/name"])
def test_a_set_is_read_by_name(publish, source):
    publish({"train": [0, 1, 1], "validation": [1, 0]})
    found = read_hub(source)
    assert found.name == "owner/name"
    assert found.classes == ("cat", "dog")
    assert {split: images.labels.tolist() for split, images in found.splits.items()} == {
        Split.TRAIN: [0, 1, 1],
        Split.VAL: [1, 0],
    }


def test_images_are_fetched_encoded_and_decoded_by_our_rules(publish):
    publish({"train": [0, 1]})
    store = read_hub("owner/name").splits[Split.TRAIN].store
    assert isinstance(store.read(1), bytes)
    assert decode_image(store.read(1)).size == (12, 8)
    assert store.name(1) == "owner/name[train][1]"


def test_an_image_in_a_file_of_the_download_is_read_and_a_missing_one_is_bad(publish, tmp_path):
    publish({"train": [0, 1]})
    store = read_hub("owner/name").splits[Split.TRAIN].store
    store.images.rows = [{"image": {"bytes": None, "path": str(tmp_path / "a.png")}}, {"image": None}]
    assert store.read(0) == tmp_path / "a.png"
    with pytest.raises(ImageError, match=r"owner/name\[train\]\[1\]: has no image"):
        store.read(1)


def test_splits_of_other_names_are_left_out(publish):
    publish({"train": [0, 1], "unsupervised": [0]})
    assert list(read_hub("owner/name").splits) == [Split.TRAIN]


def test_a_test_split_without_labels_is_left_out_with_a_warning(publish):
    publish({"train": [0, 1], "test": [-1, -1]})
    with pytest.warns(DeltapatchWarning, match="split 'test' has no labels"):
        assert list(read_hub("owner/name").splits) == [Split.TRAIN]


def test_a_set_without_usual_splits_names_those_it_has(publish):
    publish({"all": [0, 1]})
    with pytest.raises(DataError, match="a split train, validation or test is expected, but it has all"):
        read_hub("owner/name")


def test_a_set_that_cannot_be_loaded_says_why(publish):
    publish({})
    with pytest.raises(DataError, match=r"hf:no/such: .*no/such does not exist on the hub"):
        read_hub("hf:no/such")


def test_a_column_of_something_else_is_refused(publish, monkeypatch):
    publish({})
    rows = [{"image": "a text", "label": 0}, {"image": "a text", "label": 1}]
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda name: {"train": FakeDataset(rows)})
    with pytest.raises(DataError, match=r"the column .image. holds no images \(cannot cast to Image\)"):
        read_hub("owner/name")


def test_a_label_outside_the_classes_is_refused(publish):
    publish({"train": [0, 1, 2]})
    with pytest.raises(DataError, match="label 2 is outside 0 to 1"):
        read_hub("owner/name")


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"owner/name: .*pip install deltapatch\[hub\]"):
        read_hub("owner/name")


def test_the_digest_changes_with_labels_and_revision(publish):
    digests = []
    for labels, revision in (([0, 1], "1"), ([0, 1], "1"), ([1, 0], "1"), ([0, 1], "2")):
        publish({"train": labels}, revision=revision)
        digests.append(read_hub("owner/name").digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("source", "is_name"),
    [
        ("owner/name", True),
        ("hf:mnist", True),
        ("photos", False),
        ("a/b/c", False),
        ("../photos", False),
        ("/a", False),
    ],
)
def test_only_owner_and_name_or_the_prefix_mean_the_hub(source, is_name):
    assert is_hub_name(source) == is_name


def test_the_version_is_that_of_the_fingerprint_where_the_set_has_one():
    def version(fingerprint, column="image"):
        return HubStore(SimpleNamespace(_fingerprint=fingerprint), column, "owner/name[train]").version()

    assert version("a") == version("a")
    assert len({version("a"), version("b"), version("a", "img")}) == 3


def test_without_a_fingerprint_the_version_is_that_of_the_images(publish, encode, tmp_path):
    publish({"train": [0, 1]})
    store = read_hub("owner/name").splits[Split.TRAIN].store
    versions = [store.version()]
    (tmp_path / "a.png").write_bytes(encode())
    store.images.rows[1] = {"image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    assert store.version() == versions[0]
    (tmp_path / "a.png").write_bytes(b"another image")
    versions.append(store.version())
    (tmp_path / "a.png").unlink()
    versions.append(store.version())
    store.images.rows.reverse()
    versions.append(store.version())
    assert len(set(versions)) == len(versions)
