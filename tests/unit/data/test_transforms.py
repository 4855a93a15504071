import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from deltapatch.data.transforms import evaluation_transform, training_transform, view_transform
from deltapatch.errors import DeltapatchError
from deltapatch.preprocessing import Preprocessing

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0), crop_pct=1.0)
GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,), crop_pct=1.0)
AUGMENTATIONS = ("none", "flip", "crop", "standard")


@pytest.fixture
def ramp():
    """A picture that is darker on its left side and on top, so that every mirror and crop shows."""
    values = np.add.outer(np.arange(16), np.arange(16) * 15).astype(np.uint8)
    return Image.fromarray(np.stack([values] * 3, axis=2))


def test_pixels_are_scaled_and_normalised_per_channel():
    tensor = evaluation_transform(RGB)(Image.new("RGB", (8, 8), (255, 0, 51)))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 8, 8)
    torch.testing.assert_close(tensor[:, 3, 3], torch.tensor([1.0, -0.5, 0.2]))


def test_the_centre_is_what_crop_pct_leaves():
    preprocessing = GREY.model_copy(update={"crop_pct": 0.5, "interpolation": "nearest"})
    values = np.zeros((16, 16), np.uint8)
    values[4:12, 4:12] = 255
    tensor = evaluation_transform(preprocessing)(Image.fromarray(values).convert("RGB"))
    assert torch.equal(tensor, torch.ones(1, 8, 8))


def test_the_interpolation_is_the_bases_own():
    torch.manual_seed(0)
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 3), (18, 3))
    edges = Image.fromarray(stripes).convert("RGB")
    for augment in ("none", "crop"):
        sharp = training_transform(GREY.model_copy(update={"interpolation": "nearest"}), augment)(edges)
        smooth = training_transform(GREY.model_copy(update={"interpolation": "bilinear"}), augment)(edges)
        assert len(sharp.unique()) <= 2
        assert len(smooth.unique()) > 2


def test_one_channel_is_the_luminance():
    tensor = evaluation_transform(GREY)(Image.new("RGB", (8, 8), (255, 0, 0)))
    torch.testing.assert_close(tensor, torch.full((1, 8, 8), 76 / 255))


def test_squash_keeps_the_whole_picture_and_border_pads_it_with_the_mean():
    halves = Image.new("RGB", (16, 8), (255, 255, 255))
    border = evaluation_transform(RGB.model_copy(update={"crop_mode": "border"}))(halves)
    squash = evaluation_transform(RGB.model_copy(update={"crop_mode": "squash"}))(halves)
    assert border[:, 0].abs().max() < 0.01
    assert border[0, 4, 0] == 1
    assert (squash[0] == 1).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (5, 3)])
def test_every_accepted_shape_of_image_gets_the_input_size(crop_mode, augment, size):
    for preprocessing in (RGB, GREY, RGB.model_copy(update={"input_size": (3, 8, 12)})):
        preprocessing = preprocessing.model_copy(update={"crop_mode": crop_mode})
        tensor = training_transform(preprocessing, augment)(Image.new("RGB", size, "white"))
        assert tensor.shape == preprocessing.input_size


def test_none_is_the_evaluation_transform(ramp):
    assert torch.equal(training_transform(RGB, "none")(ramp), evaluation_transform(RGB)(ramp))


def test_flip_gives_the_picture_or_its_mirror_about_equally_often(ramp):
    torch.manual_seed(0)
    straight = evaluation_transform(RGB)(ramp)
    flip = training_transform(RGB, "flip")
    results = [flip(ramp) for _ in range(100)]
    mirrored = sum(torch.equal(result, straight.flip(-1)) for result in results)
    assert mirrored + sum(torch.equal(result, straight) for result in results) == 100
    assert 30 < mirrored < 70


def test_crop_never_mirrors_and_standard_does(ramp):
    torch.manual_seed(0)
    crop, standard = training_transform(RGB, "crop"), training_transform(RGB, "standard")
    rising = [tensor[0, :, -1].mean() > tensor[0, :, 0].mean() for tensor in (crop(ramp) for _ in range(50))]
    assert all(rising)
    rising = [
        tensor[0, :, -1].mean() > tensor[0, :, 0].mean() for tensor in (standard(ramp) for _ in range(50))
    ]
    assert 10 < sum(rising) < 40


def test_crops_differ(ramp):
    torch.manual_seed(0)
    crop = training_transform(RGB, "crop")
    assert not torch.equal(crop(ramp), crop(ramp))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_only_the_torch_seed_decides(ramp, augment):
    transform = training_transform(RGB, augment)
    results = []
    for python_seed in (1, 2):
        random.seed(python_seed)
        np.random.seed(python_seed)
        torch.manual_seed(7)
        results.append(torch.stack([transform(ramp) for _ in range(8)]))
    assert torch.equal(*results)


def test_transforms_that_do_the_same_are_equal_and_survive_pickling(ramp):
    transform = training_transform(RGB, "flip")
    assert transform == training_transform(RGB, "flip")
    assert transform != training_transform(RGB, "crop")
    assert transform != training_transform(GREY, "flip")
    again = pickle.loads(pickle.dumps(evaluation_transform(RGB)))
    assert torch.equal(again(ramp), evaluation_transform(RGB)(ramp))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_view_0_is_the_evaluation_transform(augment):
    assert view_transform(RGB, augment, 0) == evaluation_transform(RGB)


def test_view_1_of_flip_is_exactly_the_mirror_image_and_draws_nothing(ramp):
    plain = evaluation_transform(RGB)(ramp)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(view_transform(RGB, "flip", 1)(ramp), torch.flip(plain, [-1]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(plain, torch.flip(plain, [-1]))


@pytest.mark.parametrize("augment", ["crop", "standard"])
def test_a_further_view_is_a_draw_of_the_training_transform(ramp, augment):
    torch.manual_seed(3)
    expected = training_transform(RGB, augment)(ramp)
    torch.manual_seed(3)
    assert torch.equal(view_transform(RGB, augment, 5)(ramp), expected)


def test_views_are_told_apart_from_each_other_and_from_the_training_transform():
    first = view_transform(RGB, "crop", 1)
    assert first == view_transform(RGB, "crop", 1)
    assert first != view_transform(RGB, "crop", 2)
    assert first != view_transform(RGB, "standard", 1)
    assert first != training_transform(RGB, "crop")


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_last_view_survives_pickling(ramp, augment):
    view = view_transform(RGB, augment, {"none": 0, "flip": 1}.get(augment, 4))
    again = pickle.loads(pickle.dumps(view))
    torch.manual_seed(3)
    expected = view(ramp)
    torch.manual_seed(3)
    assert again == view
    assert torch.equal(again(ramp), expected)


@pytest.mark.parametrize(
    ("augment", "view", "message"),
    [
        ("none", 1, "augment 'none' has no view 1; its views count from 0, and there are 1"),
        ("flip", 2, "augment 'flip' has no view 2; its views count from 0, and there are 2"),
        ("crop", -1, "augment 'crop' has no view -1; its views count from 0."),
    ],
)
def test_a_view_that_is_not_there_is_refused(augment, view, message):
    with pytest.raises(DeltapatchError, match=message):
        view_transform(RGB, augment, view)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (4, 8, 8)}, "4 channels"),
        ({"input_size": (1, 8, 8)}, "mean has 3 values for 1 channels"),
        ({"std": (1.0,)}, "std has 1 values for 3 channels"),
    ],
)
def test_channels_that_do_not_fit_are_refused(change, message):
    preprocessing = RGB.model_copy(update=change)
    with pytest.raises(DeltapatchError, match=message):
        evaluation_transform(preprocessing)
    with pytest.raises(DeltapatchError, match=message):
        training_transform(preprocessing, "standard")
