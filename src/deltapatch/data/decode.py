"""From a file, bytes, an array or a Pillow image to an 8-bit RGB image, or to one clear ``ImageError``.

Nothing is trusted: sizes are read from the header before a pixel is decoded, only an allow-list of formats is
tried, and every way of storing a picture (16 bits, floats, palettes, alpha) is turned into RGB on purpose
instead of by Pillow's defaults, some of which silently lose the picture.
"""

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deltapatch.errors import DeltapatchWarning, ImageError

ImageInput = Path | bytes | np.ndarray | Image.Image

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "TIFF")
WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost; anything larger is refused before it is decoded.

    Attributes:
        max_bytes: size of the encoded file.
        max_pixels: height times width.
        max_side: the longer side, in pixels.
        max_aspect: the longer side divided by the shorter.
        formats: Pillow's names of the formats that are tried, whatever the file is called.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_side: int = 20_000
    max_aspect: float = 100
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


DEFAULT_LIMITS = ImageLimits()


class _Refused(Exception):
    """The reason why an image is not accepted, before its name is known."""


def decode_image(
    source: ImageInput, *, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Decodes one image to RGB, upright, with transparent parts on white.

    Safe in threads and worker processes: it keeps no state and changes none of Pillow's settings.

    Args:
        source: a file, an encoded image, an array (H x W, H x W x 1, H x W x 3, or H x W x 4 with alpha, of
            uint8, uint16, bool, or float in 0..1 or 0..255), or a Pillow image.
        name: what to call the image in errors; the path by default.
        limits: what is refused for its size or format.

    Raises:
        ImageError: the image cannot be decoded or is refused; it carries the name and the reason.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, limits)
        if isinstance(source, Image.Image):
            return _from_pillow(source, name, limits)
        encoded = _read_file(source, limits) if isinstance(source, Path) else source
        return _from_bytes(encoded, name, limits)
    except _Refused as refusal:
        raise ImageError(name, str(refusal)) from None
    except DeltapatchWarning:  # raised where the user turned warnings into errors
        raise
    except Exception as error:  # Pillow's parsers raise errors of any kind on damaged files
        raise ImageError(name, f"cannot be decoded ({error}); replace or remove it") from error


def array_fault(shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """Says why an array of this shape and type is no image, or returns None where it can be one."""
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        return f"has shape {shape}, but H x W, H x W x 1, H x W x 3 or H x W x 4 is expected"
    if dtype.name not in ("uint8", "uint16") and dtype.kind not in "fb":
        return f"holds {dtype} values, but uint8, uint16, bool or float is expected"
    return None


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    """Reads a regular file; a pipe or device of that name would block or never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _Refused("is not a file, but an image file is expected")
    with path.open("rb") as file:
        return file.read(limits.max_bytes + 1)


def _from_bytes(encoded: bytes, name: str, limits: ImageLimits) -> Image.Image:
    if not encoded:
        raise _Refused("is empty (0 bytes); replace or remove it")
    if len(encoded) > limits.max_bytes:
        raise _Refused(f"is larger than the limit of {limits.max_bytes:,} bytes; make it smaller")
    try:
        with Image.open(io.BytesIO(encoded), formats=limits.formats) as image:
            return _from_pillow(image, name, limits)
    except UnidentifiedImageError:
        expected = ", ".join(limits.formats)
        raise _Refused(f"is no image in an accepted format ({expected}); convert or remove it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Refused(f"has more than {limits.max_pixels:,} pixels; make it smaller") from None


def _from_pillow(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    _check_size(image.width, image.height, limits)
    if image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False):
        warnings.warn(
            f"{name}: has several frames, of which the first is used.", DeltapatchWarning, stacklevel=3
        )
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _from_array(array: np.ndarray, limits: ImageLimits) -> Image.Image:
    fault = array_fault(array.shape, array.dtype)
    if fault:
        raise _Refused(fault)
    _check_size(array.shape[1], array.shape[0], limits)
    pixels = _to_uint8(array)
    return _to_rgb(Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    longer, shorter = max(width, height), min(width, height)
    size = f"is {width} x {height} pixels"
    if shorter < 1:
        raise _Refused(f"{size}, but each side needs at least one")
    if longer > limits.max_side:
        raise _Refused(f"{size}, but a side may have at most {limits.max_side:,}; make it smaller")
    if width * height > limits.max_pixels:
        raise _Refused(f"{size}, more than the limit of {limits.max_pixels:,}; make it smaller")
    if longer > limits.max_aspect * shorter:
        raise _Refused(f"{size}, but one side may be at most {limits.max_aspect:g} times the other; crop it")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any of Pillow's modes to RGB without losing range or letting transparency become a colour."""
    if image.mode in SIXTEEN_BIT_MODES:
        return _sixteen_bit_to_rgb(image)
    if image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Rescales 0..65535 to 0..255, where Pillow's own conversion would saturate everything above 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise _Refused("has values outside 0..65535; save it with 8 or 16 bits")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray(_to_uint8(values.astype(np.uint16))).convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Brings pixel values of any accepted type to 0..255, in the same shape."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return np.rint(values / np.float32(257)).astype(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if np.isnan(values).any():
        raise _Refused("has NaN values; remove the image or mend what wrote it")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise _Refused(f"has values from {low:g} to {high:g}, but 0..1 or 0..255 is expected; rescale them")
    scale = 255 if high <= 1 else 1
    return np.rint(values * scale).astype(np.uint8)
