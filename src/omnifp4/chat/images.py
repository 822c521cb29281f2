"""Images: anything that Pillow reads, or arrays, to RGB.

The size is read from the header and judged before a pixel is decoded, so a decompression bomb costs nothing. Scaling to
the model's patches is left to the processor, which does it once.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from omnifp4.chat.arrays import as_array
from omnifp4.chat.errors import MediaError, need
from omnifp4.chat.sources import Encoded

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What Pillow may read: not EPS, which it hands to an outside program."""

MAX_RATIO = 200
"""Longest side over shortest; the processor takes no more."""


def decode_image(encoded: Encoded, max_pixels: int, where: str) -> Any:
    """Reads an encoded image.

    Args:
        encoded: the file.
        max_pixels: a larger image is refused before it is decoded.
        where: for errors.

    Returns:
        A ``PIL.Image`` in RGB, upright, transparency on white.
    """
    pil = need("PIL.Image", "reading images", "pillow")
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb check has fixed limits, first a warning, then an error; ours follows.
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)
            pil.init()
            image = pil.open(encoded.open(), formats=[name for name in FORMATS if name in pil.OPEN])
        check_size(image.size, max_pixels, where, encoded.name)
        image.load()
        return rgb(image, max_pixels, where, encoded.name)
    except MediaError:
        raise
    except pil.DecompressionBombError as error:
        raise MediaError(
            f"{where}: {encoded.name} has more pixels than Pillow decodes ({error}); the limit is {max_pixels:,} pixels",
            hint="scale it down first",
        ) from error
    except MemoryError as error:
        raise MediaError(f"{where}: {encoded.name} does not fit into memory") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files.
        raise MediaError(f"{where}: {encoded.name} is damaged or no image: {error or type(error).__name__}") from error


def image_from_value(value: Any, max_pixels: int, where: str) -> Any:
    """A ``PIL.Image`` or an array ``(height, width[, 1 | 3 | 4])`` (also channels first) to RGB.

    Arrays hold uint8, or floats in [0, 1].
    """
    pil = need("PIL.Image", "reading images", "pillow")
    if not isinstance(value, pil.Image):
        value = pil.fromarray(pixels(value, where))
    check_size(value.size, max_pixels, where, "the image")
    return rgb(value, max_pixels, where, "the image")


def pixels(value: Any, where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image array as uint8, channels last; shape ``(height, width)`` or ``(height, width, 3 | 4)``."""
    array = as_array(value, "image", where)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or not array.size:
        raise MediaError(f"{where}: an array of shape {array.shape} is no image", hint="(height, width, 3)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise MediaError(
            f"{where}: an image array of type {array.dtype} is not read", hint="uint8, or floats in [0, 1]"
        )
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise MediaError(f"{where}: image values lie outside [0, 1]", hint="uint8, or floats in [0, 1]")
    return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))


def rgb(image: Any, max_pixels: int, where: str, name: str) -> Any:
    pil = need("PIL.Image", "reading images", "pillow")
    image = need("PIL.ImageOps", "reading images", "pillow").exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = pil.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to its lowest 8 bits.
        grey = np.asarray(image).astype(np.float64)
        image = pil.fromarray(np.rint(grey * (255 / max(65535.0, float(grey.max())))).astype(np.uint8))
    return image.convert("RGB")


def check_size(size: tuple[int, int], max_pixels: int, where: str, name: str) -> None:
    """Refuses an image, or a video's frame, of so many pixels or so long and thin that the processor fails on it.

    Args:
        size: width and height.
        max_pixels: the most there may be.
        where: for errors.
        name: likewise.
    """
    width, height = size
    if width * height > max_pixels:
        raise MediaError(
            f"{where}: {name} has {width} x {height} = {width * height:,} pixels; the limit is {max_pixels:,}",
            hint="scale it down first",
        )
    if min(size) < 1 or max(size) > MAX_RATIO * min(size):
        raise MediaError(f"{where}: {name} is {width} x {height}; the longer side may be {MAX_RATIO} times the shorter")
