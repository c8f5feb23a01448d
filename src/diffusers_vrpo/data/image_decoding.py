# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Turns image files of any mode into square RGB images: pixel values, transparency and the crop.

In 8-bit images, 255 is white. In others (modes I, I;16 and F of PIL), the file does not say which value is white. This
is decided once for a data set, from a fixed sample of its images, so that it is the same for all images, processes and
runs.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from ..errors import InputError
from ..files import open_image


logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 64  # images of a data set that decide which value is white
INTEGER_BITS = (8, 10, 12, 14, 16)
FLOAT_RANGES = ((0, 1), (-1, 1), (0, 255))
LONGEST_RATIO = 8  # images up to this aspect ratio are resized as a whole before the crop


# ----------------------------------------------------------------------------------------------------------------------
# Pixel values


@dataclass(frozen=True)
class PixelRange:
    """Which values are black and white in the images of a data set that are not 8-bit, as `find_pixel_range` decides.

    Attributes:
        bits (`int`, *optional*): in modes I and I;16, black is 0 and white is `2**bits - 1`; None if the sample has no
            such image.
        floats (`tuple[float, float]`, *optional*): black and white in mode F; None if the sample has no such image.
    """

    bits: int | None = None
    floats: tuple[float, float] | None = None


def sample_rows(count: int) -> range:
    """The evenly spaced rows, at most `SAMPLED_IMAGES`, that decide the pixel range of a data set of `count` images."""
    return range(0, count, max(1, math.ceil(count / SAMPLED_IMAGES)))


def find_pixel_range(images: Iterable[dict | PILImage.Image], name: str) -> PixelRange:
    """Decides the pixel range of a data set from a sample of its images, and logs what is unusual about them.

    If an image is 8-bit and not transparent, only its header is read. Images that cannot be read are skipped.

    Args:
        images: the sample, as `decode_image` takes them.
        name: what the log and errors call the data set.

    Raises:
        InputError: if the values of images that are not 8-bit have no known range.
    """
    extremes, sampled, transparent = {}, 0, 0
    for encoded in images:
        sampled += 1
        try:
            with opened(encoded) as image:
                if not is_8_bit(image):
                    kind = "F" if image.mode == "F" else "I"
                    values = np.asarray(image)
                    extremes.setdefault(kind, []).extend((values.min().item(), values.max().item()))
                elif image.has_transparency_data:
                    transparent += image.convert("RGBA").getchannel("A").getextrema()[0] < 255
        except Exception:  # PIL's readers raise many types; damaged images are counted where they are decoded
            continue

    bits = floats = None
    try:
        if "I" in extremes:
            bits = integer_bits(np.min(extremes["I"]), np.max(extremes["I"]))
            logger.info(f"{name}: integer images with values up to {max(extremes['I'])} are taken as {bits}-bit")
        if "F" in extremes:
            floats = float_range(np.min(extremes["F"]), np.max(extremes["F"]))
            logger.info(f"{name}: in floating-point images black is {floats[0]} and white is {floats[1]}")
    except ValueError as error:
        raise InputError(None, f"{name}: {error}") from error
    if transparent:
        logger.info(f"{name}: {transparent} of {sampled} images tried have transparent pixels; they are put on white")
    return PixelRange(bits, floats)


def is_8_bit(image: PILImage.Image) -> bool:
    """Whether `convert("RGB")` keeps the brightness of an image."""
    return image.mode != "F" and not image.mode.startswith("I")


def integer_bits(low: int, high: int) -> int:
    """The smallest number of bits out of `INTEGER_BITS` that holds the values.

    Raises:
        ValueError: if none of them does.
    """
    if low < 0 or high >= 2 ** INTEGER_BITS[-1]:
        raise ValueError(
            f"images of mode I hold integers from {low} to {high}, and only 0 to 65535 can be read; "
            "convert the images to 8-bit"
        )
    return next(bits for bits in INTEGER_BITS if high < 2**bits)


def float_range(low: float, high: float) -> tuple[float, float]:
    """The first of `FLOAT_RANGES` that holds the values.

    Raises:
        ValueError: if none of them does.
    """
    for black, white in FLOAT_RANGES:
        if black <= low and high <= white:
            return black, white
    raise ValueError(
        f"images of mode F hold floating-point numbers from {low:g} to {high:g}, and only [0, 1], [-1, 1] and [0, 255] "
        "can be read; convert the images to 8-bit"
    )


def grey_8_bit(image: PILImage.Image, values: PixelRange | None) -> PILImage.Image:
    """Converts an image of mode I, I;16 or F to 8-bit grey; values outside the range are clipped, with one warning.

    Without the range of a data set, or if its sample had no image of this kind, the range is found from the image
    itself.

    Raises:
        ValueError: if no known range holds the values of the image.
    """
    array, is_float = np.asarray(image), image.mode == "F"
    low, high = array.min().item(), array.max().item()
    decided = None
    if values is not None:
        decided = values.floats if is_float else values.bits
        if decided is None:
            warn_once(
                f"an image has the mode {image.mode}, which does not occur in the sample of images that decides which value is "
                "white; the range of each such image is found from its own values"
            )
    if is_float:
        black, white = decided or float_range(low, high)
        grey = np.nan_to_num(array, nan=black).clip(black, white)
        grey = np.rint((grey - black) * (255 / (white - black))).astype(np.uint8)
    else:
        bits = decided or integer_bits(low, high)
        black, white = 0, 2**bits - 1
        grey = (array.clip(black, white) >> (bits - 8)).astype(np.uint8)
    if not (black <= low and high <= white):
        warn_once(
            f"an image of mode {image.mode} has values outside [{black}, {white}], the range that a sample of the data set "
            "has given; such values are clipped"
        )
    key = image.info.get("transparency")  # in a 16-bit PNG, the one value that is transparent
    if isinstance(key, int):
        grey[array == key] = 255
    return PILImage.fromarray(grey)


@cache
def warn_once(message: str):
    """Logs a warning unless this process has logged it before; worker processes of a data loader each log their own."""
    logger.warning(message)


# ----------------------------------------------------------------------------------------------------------------------
# Images


@contextlib.contextmanager
def opened(encoded: dict | PILImage.Image) -> Iterator[PILImage.Image]:
    """Opens the image of `{"bytes": ..., "path": ...}` for a `with` block; a PIL image is returned as it is."""
    if isinstance(encoded, PILImage.Image):
        yield encoded
        return
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    if source is None:
        raise ValueError("the row holds no image")
    with open_image(source) as image:
        yield image


def decode_image(
    encoded: dict | PILImage.Image, values: PixelRange | None = None, draft_side: int | None = None
) -> PILImage.Image:
    """Returns the RGB image of `{"bytes": ..., "path": ...}`, as `datasets` stores it, or of a PIL image.

    Args:
        values: the pixel range of the data set; by default, it is found from the image alone. 8-bit images do not need
            it.
        draft_side: decode a JPEG file at a half, a quarter or an eighth of its size: at the smallest of these whose
            shorter side is still at least this long, in pixels. This replaces the first up to three halvings of
            `resize_and_crop`, which give the same size within a pixel.

    Raises:
        ValueError: if the image has more than `LARGEST_IMAGE` pixels, or its values have no known range. PIL's readers
            raise many other types of exceptions.
    """
    with opened(encoded) as image:
        if draft_side is not None and image.format == "JPEG" and isinstance(encoded, dict):
            image.draft(None, (draft_side, draft_side))
        return to_rgb(image, values)


def to_rgb(image: PILImage.Image, values: PixelRange | None = None) -> PILImage.Image:
    """Converts an image to RGB and rotates it upright; transparent pixels are put on white.

    Raises:
        ValueError: if the image is not 8-bit, and its values have no known range.
    """
    image = ImageOps.exif_transpose(image)
    if not is_8_bit(image):
        image = grey_8_bit(image, values)
    elif image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = PILImage.new("RGB", image.size, "white")
        image.paste(transparent, mask=transparent)
    return image.convert("RGB")


def resize_and_crop(image: PILImage.Image, resolution: int, position: tuple[float, float] | None = None) -> np.ndarray:
    """Resizes an image and crops it to a square, as ADM, DiT, SiT and REPA do.

    The image is halved while its shorter side is at least twice `resolution`, then resized bicubically so that this
    side is `resolution`, and cut to a square. If its aspect ratio is above 8:1, only the square is resized. Its pixels
    then differ by rounding from those of the whole image resized, and by more only where black and white pixels
    alternate and Pillow runs its two passes in another order.

    Args:
        resolution: side of the square in pixels.
        position: the place of the square, as x and y in [0, 1); by default, it is in the centre.

    Returns:
        uint8 `[resolution, resolution, 3]`.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    if position is not None:
        left, top = (int(p * (side - resolution + 1)) for p, side in zip(position, size))
    if max(size) > LONGEST_RATIO * resolution:
        return resized_square(image, size, left, top, resolution)
    image = image.resize(size, PILImage.Resampling.BICUBIC)
    return np.asarray(image)[top : top + resolution, left : left + resolution]


def resized_square(image: PILImage.Image, size: tuple[int, int], left: int, top: int, resolution: int) -> np.ndarray:
    """The square at `left`, `top` of an image resized to `size`, without the rest, which could take gigabytes."""
    # Where the square is in the image, and the pixels that its bicubic resize depends on. The image is below twice the
    # size, so that the filter reaches over less than four pixels.
    x, y = image.width / size[0], image.height / size[1]
    square = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
    first = (max(0, int(square[0]) - 4), max(0, int(square[1]) - 4))
    last = (min(image.width, math.ceil(square[2]) + 4), min(image.height, math.ceil(square[3]) + 4))
    part = image.crop((*first, *last))
    # Rounding must not move the end of the square out of the image.
    box = (
        square[0] - first[0],
        square[1] - first[1],
        min(square[2] - first[0], part.width),
        min(square[3] - first[1], part.height),
    )
    return np.asarray(part.resize((resolution, resolution), PILImage.Resampling.BICUBIC, box=box))
