"""From an RGB image to the tensor that a base expects, for evaluation and for training."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from deltapatch.errors import DeltapatchError
from deltapatch.preprocessing import Preprocessing

Augment = Literal["none", "flip", "crop", "standard"]
Steps = Callable[[Any], Any]

SMALLEST_CROP = 0.35


@dataclass(frozen=True)
class ImageTransform:
    """A base's preprocessing, ready to run, with an augmentation for training in front of or behind it.

    Two transforms are equal when they do the same.

    Attributes:
        preprocessing: what the base does to every picture.
        augment: what training changes at random; ``none`` in evaluation.
        steps: torchvision transforms that do both.
        view: which of the fixed versions of each image an `ImageSet` makes with it; None draws a new one in
            each epoch.
    """

    preprocessing: Preprocessing
    augment: Augment
    steps: Steps = field(repr=False, compare=False)
    view: int | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """Turns an RGB image of any size into a float32 tensor of shape (C, H, W)."""
        return self.steps(image)


def evaluation_transform(preprocessing: Preprocessing) -> ImageTransform:
    """Builds the base's own preprocessing: resize, crop, scale and normalise, with nothing random in it."""
    _check_channels(preprocessing)
    return ImageTransform(preprocessing, "none", transforms.Compose(_evaluation_steps(preprocessing)))


def training_transform(preprocessing: Preprocessing, augment: Augment) -> ImageTransform:
    """Builds the base's preprocessing with augmentation; all randomness comes from torch's global generator.

    Args:
        preprocessing: what the base does to every picture.
        augment: ``none`` is the evaluation transform; ``flip`` mirrors half of the pictures left to right
            (not for text or digits); ``crop`` takes a random part of 35 to 100 % of the area instead of the
            centre; ``standard`` is ``crop`` and ``flip``.
    """
    _check_channels(preprocessing)
    crops, flips = augment in ("crop", "standard"), augment in ("flip", "standard")
    steps = _random_crop_steps(preprocessing) if crops else _evaluation_steps(preprocessing)
    if flips:
        steps = [*steps, transforms.RandomHorizontalFlip()]
    return ImageTransform(preprocessing, augment, transforms.Compose(steps))


def view_transform(preprocessing: Preprocessing, augment: Augment, view: int) -> ImageTransform:
    """Builds one of the fixed versions that an augmentation makes of each image, so that it can be cached.

    View 0 is the evaluation transform. View 1 of ``flip`` is its mirror image, and there is no other. Each
    further view of ``crop`` and ``standard`` is one draw of the training transform; an `ImageSet` makes that
    draw depend on the image's row in its store and on the view alone.

    Raises:
        DeltapatchError: the augmentation has no such view.

    Example:
        >>> mirrored = view_transform(base.preprocessing, "flip", 1)
        >>> mirrored(image).equal(evaluation_transform(base.preprocessing)(image).flip(-1))
        True
    """
    _check_view(augment, view)
    plain = evaluation_transform(preprocessing)
    if view == 0:
        return plain
    if augment == "flip":
        return ImageTransform(preprocessing, augment, transforms.Compose([plain.steps, _mirrored]), view)
    return replace(training_transform(preprocessing, augment), view=view)


def _check_view(augment: Augment, view: int) -> None:
    count = {"none": 1, "flip": 2}.get(augment)
    if view < 0 or (count is not None and view >= count):
        how_many = "" if count is None else f", and there are {count}"
        raise DeltapatchError(f"augment '{augment}' has no view {view}; its views count from 0{how_many}.")


def _mirrored(image: Tensor) -> Tensor:
    return image.flip(-1)


def _evaluation_steps(preprocessing: Preprocessing) -> list[Steps]:
    resize_and_normalise: Any = create_transform(
        input_size=preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    steps: list[Steps] = [*_grey_step(preprocessing), resize_and_normalise]
    if preprocessing.crop_mode == "border":
        steps = [_KeepShorterSide(min(preprocessing.input_size[1:])), *steps]
    return steps


def _random_crop_steps(preprocessing: Preprocessing) -> list[Steps]:
    """Crops with torchvision, because timm's crop draws from Python's ``random``, not from torch."""
    return [
        *_grey_step(preprocessing),
        transforms.RandomResizedCrop(
            preprocessing.input_size[1:],
            scale=(SMALLEST_CROP, 1.0),
            interpolation=transforms.InterpolationMode(preprocessing.interpolation),
        ),
        transforms.ToTensor(),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]


def _grey_step(preprocessing: Preprocessing) -> list[Steps]:
    return [transforms.Grayscale()] if preprocessing.input_size[0] == 1 else []


def _check_channels(preprocessing: Preprocessing) -> None:
    channels = preprocessing.input_size[0]
    if channels not in (1, 3):
        raise DeltapatchError(f"input_size has {channels} channels, but 1 (grey) or 3 (RGB) is expected.")
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != channels:
            raise DeltapatchError(
                f"{name} has {len(values)} values for {channels} channels; give one value per channel."
            )


@dataclass(frozen=True)
class _KeepShorterSide:
    """Widens a very long image just so far that fitting its longer side leaves one pixel of the shorter."""

    target: int

    def __call__(self, image: Image.Image) -> Image.Image:
        needed = ceil(max(image.size) / self.target)
        if min(image.size) >= needed:
            return image
        return image.resize((max(image.width, needed), max(image.height, needed)))
