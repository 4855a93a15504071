import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deltapatch.base import Base
from deltapatch.data.sources.npz import read_npz
from deltapatch.data.sources.source import Split
from deltapatch.data.transforms import evaluation_transform
from deltapatch.demo.base import (
    PREPROCESSING,
    WEIGHTS,
    build_demo_model,
    handwritten_digits,
    old_task_test,
    to_input,
    write_digits_npz,
)
from deltapatch.demo.characters import CLASSES

SPLIT_SIZES = {"train": 897, "val": 360, "test": 540}


@pytest.fixture(scope="module")
def model():
    return build_demo_model()


@pytest.fixture(scope="module")
def digits():
    return handwritten_digits()


def test_the_weights_are_at_most_two_megabytes():
    assert WEIGHTS.stat().st_size <= 2_000_000


def test_the_weights_are_float32_once_loaded_and_the_model_is_in_eval_mode(model):
    floating = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    assert floating == {torch.float32}
    assert not any(module.training for module in model.modules())


def test_the_base_reads_fonts_that_it_has_never_seen(model):
    images, labels = old_task_test(500)
    with torch.inference_mode():
        predicted = model(to_input(images)).argmax(dim=1)
    assert (predicted.numpy() == labels).mean() >= 0.95


def test_the_base_has_four_stages_of_two_sub_blocks(model):
    base = Base(model, "printed-characters", "", PREPROCESSING, CLASSES)
    assert [len(stage.sub_blocks) for stage in base.anatomy.stages] == [2, 2, 2, 2]


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    tensors = load_file(WEIGHTS)
    del tensors["fc.bias"]
    save_file(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        build_demo_model(tmp_path / "incomplete.safetensors")


def test_input_made_in_one_go_equals_the_ordinary_preprocessing():
    images, _ = old_task_test(5)
    transform = evaluation_transform(PREPROCESSING)
    one_by_one = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])
    torch.testing.assert_close(to_input(images), one_by_one, rtol=0, atol=1e-5)


def test_the_old_task_test_is_the_same_every_time():
    assert np.array_equal(old_task_test(100)[0], old_task_test(100)[0])


def test_every_split_of_the_digits_has_its_size_and_types(digits):
    for split, size in SPLIT_SIZES.items():
        images, labels = digits[f"{split}_images"], digits[f"{split}_labels"]
        assert (images.shape, images.dtype) == ((size, 32, 32), np.uint8)
        assert (labels.shape, labels.dtype) == ((size,), np.int64)
    assert digits["classes"].tolist() == list("0123456789")


def test_no_digit_is_in_two_splits(digits):
    images = np.concatenate([digits[f"{split}_images"] for split in SPLIT_SIZES])
    assert len({image.tobytes() for image in images}) == sum(SPLIT_SIZES.values())


def test_every_split_has_its_share_of_every_digit(digits):
    for split, size in SPLIT_SIZES.items():
        shares = np.bincount(digits[f"{split}_labels"], minlength=10) / size
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_the_seed_decides_the_splits_of_the_digits(digits):
    assert np.array_equal(handwritten_digits(seed=0)["test_images"], digits["test_images"])
    assert not np.array_equal(handwritten_digits(seed=1)["test_images"], digits["test_images"])


def test_digits_are_white_on_black_with_the_margin_of_printed_characters(digits):
    images = digits["train_images"]
    inside = images[:, 4:-4, 4:-4]
    assert inside.sum(dtype=np.int64) == images.sum(dtype=np.int64)
    assert np.all(inside[:, :4].max(axis=(1, 2)) > 128)
    assert np.median(inside[:, :, 0]) == 0


def test_the_written_digits_are_read_like_any_other_set(tmp_path, digits):
    path = tmp_path / "digits.npz"
    write_digits_npz(path)
    source = read_npz(path)
    assert source.classes == tuple("0123456789")
    assert {split.value: len(images.store) for split, images in source.splits.items()} == SPLIT_SIZES
    assert np.array_equal(source.splits[Split.VAL].labels, digits["val_labels"])
    assert np.array_equal(source.splits[Split.TEST].store.read(7), digits["test_images"][7])
