import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deltapatch.data.decode import ImageLimits, decode_image
from deltapatch.errors import DeltapatchWarning, ImageError

SIGNATURES = (
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"RIFF\0\0\0\0WEBP",
    b"P6 ",
)


def png_of_zeros(width, height):
    """A one-bit PNG with a true header and well-formed content, without ever holding its pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (width // 8 + 1)), 9)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pixel(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def refusal(source, **arguments):
    with pytest.raises(ImageError) as caught:
        decode_image(source, **arguments)
    return caught.value


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b"hello\n", "is no image in an accepted format")]
)
def test_an_empty_file_and_a_text_file_are_reported_by_path(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    error = refusal(path)
    assert error.path == str(path)
    assert error.reason.startswith(reason)


def test_a_truncated_jpeg_is_reported_by_path(tmp_path, encode):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encode(Image.effect_noise((200, 200), 90), "JPEG")[:-2000])
    with Image.open(path) as opened:
        assert opened.size == (200, 200)
    error = refusal(path)
    assert error.path == str(path)
    assert "truncated" in error.reason


def test_a_missing_file_and_a_folder_are_reported_by_path(tmp_path):
    assert refusal(tmp_path / "none.png").path == str(tmp_path / "none.png")
    assert "is not a file" in refusal(tmp_path).reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_pixel_bomb_is_refused_from_its_header():
    bomb = png_of_zeros(13_000, 13_000)
    assert len(bomb) < 25_000
    assert "13000 x 13000 pixels, more than the limit" in refusal(bomb).reason


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_pixel_bomb_is_an_image_error_where_warnings_are_errors():
    assert refusal(png_of_zeros(13_000, 13_000)).reason.startswith("has more than 50,000,000 pixels")


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (1, 60_000, "at most 20,000"),
        (60_000, 1, "at most 20,000"),
        (1, 101, "at most 100 times"),
        (0, 4, "at least one"),
    ],
)
def test_an_image_of_a_hopeless_shape_is_refused(width, height, reason):
    assert reason in refusal(np.zeros((height, width), np.uint8)).reason


def test_a_strip_at_the_aspect_limit_is_accepted():
    assert decode_image(np.zeros((100, 1), np.uint8)).size == (1, 100)


def test_a_file_above_the_byte_limit_is_refused(tmp_path, encode):
    path = tmp_path / "large.png"
    path.write_bytes(encode())
    size = path.stat().st_size
    assert decode_image(path, limits=ImageLimits(max_bytes=size)).size == (12, 8)
    assert "larger than the limit" in refusal(path, limits=ImageLimits(max_bytes=size - 1)).reason


def test_a_single_pixel_is_accepted(encode):
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).getpixel((0, 0)) == (1, 2, 3)


def test_cmyk_becomes_rgb(encode):
    red, green, blue = pixel(decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_rescaled_and_not_saturated(encode, format):
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    image = decode_image(encode(Image.fromarray(values), format))
    assert np.asarray(image)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_a_transparent_grey_of_sixteen_bits_becomes_white(encode):
    encoded = encode(Image.fromarray(np.array([[300, 0]], np.uint16)), transparency=300)
    assert np.asarray(decode_image(encoded))[0].tolist() == [[255] * 3, [0] * 3]


def test_one_bit_becomes_black_and_white(encode):
    picture = Image.fromarray(np.array([[False, True]]))
    assert picture.mode == "1"
    assert np.asarray(decode_image(encode(picture)))[0].tolist() == [[0] * 3, [255] * 3]
    assert np.asarray(decode_image(np.array([[False, True]])))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(("values", "expected"), [([0, 0.2, 1], [0, 51, 255]), ([0, 51, 255], [0, 51, 255])])
def test_floats_in_either_range_become_the_same_bytes(encode, values, expected):
    array = np.array([values], np.float32)
    for source in (array, encode(Image.fromarray(array), "TIFF")):
        assert np.asarray(decode_image(source))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN"), (np.inf, "inf"), (-1, "from -1 to 0"), (256, "from 0 to 256")]
)
def test_floats_outside_both_ranges_are_refused(value, reason):
    assert reason in refusal(np.array([[0, value]], np.float64)).reason


def test_a_32_bit_integer_image_is_refused_outside_16_bits(encode):
    assert "outside 0..65535" in refusal(encode(Image.new("I", (2, 2), 70_000), "TIFF")).reason
    assert pixel(decode_image(encode(Image.new("I", (2, 2), 65_535), "TIFF"))) == (255, 255, 255)


def test_transparent_parts_become_white(encode):
    red_but_transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half_black = Image.new("LA", (2, 2), (0, 128))
    assert pixel(decode_image(encode(red_but_transparent))) == (255, 255, 255)
    assert pixel(decode_image(encode(half_black))) == (127, 127, 127)
    assert pixel(decode_image(np.array([[[255, 0, 0, 0]]], np.uint8))) == (255, 255, 255)


def test_a_transparent_palette_entry_becomes_white(encode):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    image = decode_image(encode(picture, transparency=0))
    assert np.asarray(image)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame_and_says_so(tmp_path, encode, format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    path = tmp_path / "moving.gif"
    path.write_bytes(encode(frames[0], format, save_all=True, append_images=frames[1:]))
    with pytest.warns(DeltapatchWarning, match=r"moving\.gif: has several frames"):
        image = decode_image(path)
    assert max(pixel(image)) < 5


def test_a_photo_with_a_second_picture_behind_it_is_no_animation(encode):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    assert max(pixel(decode_image(encode(frames[0], "MPO", save_all=True, append_images=frames[1:])))) < 5


def test_exif_rotation_is_applied(encode):
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    image = decode_image(encode(picture, "PNG", exif=exif))
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_a_wrong_extension_does_not_matter(tmp_path, encode):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode())
    assert decode_image(path).size == (12, 8)


def fits():
    cards = [("SIMPLE", "T"), ("BITPIX", "8"), ("NAXIS", "2"), ("NAXIS1", "2"), ("NAXIS2", "2")]
    header = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards) + "END"
    return header.encode().ljust(2880) + bytes(2880)


@pytest.mark.parametrize("format", ["FITS", "EPS", "PCX", "TGA", "ICO"])
def test_formats_off_the_allow_list_are_refused(encode, format):
    content = fits() if format == "FITS" else encode(format=format)
    assert Image.open(io.BytesIO(content)).format == format
    assert "accepted format" in refusal(content).reason


def test_the_allow_list_is_the_callers(encode):
    assert "(JPEG)" in refusal(encode(), limits=ImageLimits(formats=("JPEG",))).reason


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_every_accepted_shape_and_type_decode(shape, dtype):
    image = decode_image(np.zeros(shape, dtype))
    assert image.mode == "RGB"
    assert image.size == (3, 2)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((2, 2), np.int64)]
)
def test_other_arrays_are_refused_with_what_is_expected(array):
    assert "is expected" in refusal(array).reason


def test_a_pillow_image_is_copied_and_keeps_its_pixels():
    source = Image.new("RGB", (2, 2), (1, 2, 3))
    image = decode_image(source)
    image.putpixel((0, 0), (9, 9, 9))
    assert source.getpixel((0, 0)) == (1, 2, 3)


def test_the_given_name_is_the_one_in_the_error():
    assert refusal(b"", name="photos.npz[train][17]").path == "photos.npz[train][17]"


def test_threads_decode_the_same_as_one_after_the_other(encode):
    sources = [encode(format=format) for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM") * 6]
    alone = [decode_image(source).tobytes() for source in sources]
    with ThreadPoolExecutor(8) as pool:
        assert [image.tobytes() for image in pool.map(decode_image, sources)] == alone


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@given(signature=st.sampled_from(SIGNATURES), rest=st.binary(max_size=200))
def test_any_bytes_are_an_image_or_an_image_error(signature, rest):
    with suppress(ImageError):
        assert decode_image(signature + rest).mode == "RGB"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    assert "is not a file" in refusal(path).reason
