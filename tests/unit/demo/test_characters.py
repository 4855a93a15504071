from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from deltapatch.demo.characters import CLASSES, FONT_FILES, render_characters

NOT_A_CHARACTER = "\uffff"


def draw(character, font):
    image = Image.new("L", (96, 96))
    ImageDraw.Draw(image).text((24, 16), character, fill=255, font=font)
    return image.tobytes()


@pytest.mark.parametrize("count", [0, 1, 1001])
def test_there_are_as_many_images_and_labels_as_asked_for(count):
    images, labels = render_characters(count, seed=0, fonts="training")
    assert (images.shape, images.dtype) == ((count, 32, 32), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)


@pytest.mark.parametrize("fonts", FONT_FILES)
def test_the_same_seed_gives_the_same_images(fonts):
    images, labels = render_characters(1200, seed=3, fonts=fonts)
    again, labels_again = render_characters(1200, seed=3, fonts=fonts)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)


def test_another_seed_gives_other_images_in_another_order():
    images, labels = render_characters(100, seed=0, fonts="training")
    others, other_labels = render_characters(100, seed=1, fonts="training")
    assert not any(np.array_equal(image, other) for image in images for other in others)
    assert not np.array_equal(labels, other_labels)


def test_the_font_sets_give_different_images_of_the_same_characters():
    training, labels = render_characters(100, seed=0, fonts="training")
    held_out, held_out_labels = render_characters(100, seed=0, fonts="held-out")
    assert np.array_equal(labels, held_out_labels)
    assert not any(np.array_equal(*pair) for pair in zip(training, held_out, strict=True))


def test_images_of_one_class_are_all_different():
    images, labels = render_characters(20 * len(CLASSES), seed=0, fonts="held-out")
    ones = images[labels == CLASSES.index("1")]
    assert len({image.tobytes() for image in ones}) == 20


def test_every_class_appears_equally_often():
    _, labels = render_characters(3 * len(CLASSES), seed=0, fonts="training")
    assert np.bincount(labels).tolist() == [3] * len(CLASSES)


def test_ink_is_white_in_the_middle_of_black():
    images, _ = render_characters(500, seed=0, fonts="training")
    edge = np.concatenate([images[:, :2].reshape(500, -1), images[:, -2:].reshape(500, -1)], axis=1)
    middle = images[:, 8:24, 8:24].reshape(500, -1)
    assert np.all(np.median(edge, axis=1) < 64)
    assert np.all(middle.max(axis=1) > 96)


def test_no_font_is_both_trained_on_and_held_out():
    assert not set(FONT_FILES["training"]) & set(FONT_FILES["held-out"])


@pytest.mark.parametrize("file", [file for files in FONT_FILES.values() for file in files])
def test_every_font_has_its_own_glyph_for_every_class(file):
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file), 40)
    glyphs = {draw(character, font) for character in (*CLASSES, NOT_A_CHARACTER)}
    assert len(glyphs) == len(CLASSES) + 1
