# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Images of every mode of PIL: which value is white, transparency, and images of extreme aspect ratios."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PILImage

from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.data import image_decoding
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import (
    PixelRange,
    decode_image,
    find_pixel_range,
    resize_and_crop,
    sample_rows,
)
from diffusers_vrpo.data.image_source import ImageDataset, ImageSource
from diffusers_vrpo.data.latent_encoding import ImageRows, cache_config
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_sets import open_images
from support.data import png, write_files, write_parquet


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def encoded(image: PILImage.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def row(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def deep(largest: float, dtype=np.uint16, format: str = "png", least: float = 0) -> bytes:
    """A ramp from `least` to `largest` in a file of the dtype."""
    values = least + RAMP * (largest - least)
    if np.issubdtype(np.dtype(dtype), np.integer):
        values = np.rint(values)
    return encoded(PILImage.fromarray(values.astype(dtype)), format)


def png_file(depth: int, colour_type: int, values: list[int], transparency: list[int] = ()) -> bytes:
    """A PNG of one line with 16-bit or 8-bit samples, which PIL does not write itself."""
    code = {8: "B", 16: "H"}[depth]
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(values) // channels, 1, depth, colour_type, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(f">{len(transparency)}H", *transparency)) if transparency else b""
    line = zlib.compress(b"\0" + struct.pack(f">{len(values)}{code}", *values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", line) + chunk(b"IEND", b"")


class Files(ImageSource):
    """Training data of the contents of files."""

    num_classes = 1

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, rows):
        return {"image": [row(self.contents[r]) for r in rows], "label": [0] * len(rows)}


# ----------------------------------------------------------------------------------------------------------------------
# Which value is white


DEEP = {
    "I to 255": (deep(255, np.int32, "tiff"), "I", PixelRange(bits=8)),
    "I to 4095": (deep(4095, np.int32, "tiff"), "I", PixelRange(bits=12)),
    "I;16 to 255": (deep(255), "I;16", PixelRange(bits=8)),
    "I;16 to 1023": (deep(1023), "I;16", PixelRange(bits=10)),
    "I;16 to 4095": (deep(4095), "I;16", PixelRange(bits=12)),
    "I;16 to 16383": (deep(16383), "I;16", PixelRange(bits=14)),
    "I;16 to 65535": (deep(65535), "I;16", PixelRange(bits=16)),
    "I;16 TIFF to 4095": (deep(4095, "<u2", "tiff"), "I;16", PixelRange(bits=12)),
    "I;16B TIFF to 4095": (deep(4095, ">u2", "tiff"), "I;16B", PixelRange(bits=12)),
    "I;16B TIFF to 65535": (deep(65535, ">u2", "tiff"), "I;16B", PixelRange(bits=16)),
    "F to 1": (deep(1, np.float32, "tiff"), "F", PixelRange(floats=(0, 1))),
    "F from -1 to 1": (deep(1, np.float32, "tiff", -1), "F", PixelRange(floats=(-1, 1))),
    "F to 255": (deep(255, np.float32, "tiff"), "F", PixelRange(floats=(0, 255))),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_depth_keeps_its_brightness(name, caplog):
    content, mode, expected = DEEP[name]
    with PILImage.open(io.BytesIO(content)) as image:
        assert image.mode == mode
    with caplog.at_level(logging.INFO):
        found = find_pixel_range([row(png(1)), row(content)], "the data")
    assert found == expected
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("the data: ")
    for image in (decode_image(row(content), found), decode_image(row(content))):
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
        assert (pixels == pixels[..., :1]).all()
        # The same ramp whatever the depth: integers lose their lower bits, floats are rounded.
        assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 1
        assert pixels.min() == 0 and pixels.max() == 255


def test_16_bits_are_the_upper_8_as_before():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode_image(PILImage.fromarray(values)))
    np.testing.assert_array_equal(pixels[..., 0], values >> 8)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (deep(900, np.float32, "tiff", -3), "mode F hold floating-point numbers from -3 to 900"),
        (deep(2, np.float32, "tiff", -1), "mode F hold floating-point numbers from -1 to 2"),
        (deep(np.nan, np.float32, "tiff"), "mode F hold floating-point numbers from nan to nan"),
        (deep(70000, np.int32, "tiff"), "mode I hold integers from 0 to 70000"),
        (deep(3000, np.int32, "tiff", -1024), "mode I hold integers from -1024 to 3000"),
    ],
)
def test_values_of_no_known_range_are_refused(content, found):
    with pytest.raises(InputError, match=f"^the training data: images of {found}, .*; convert the images to 8-bit$"):
        Files([png(1), content]).check()
    with pytest.raises(ValueError, match="convert the images to 8-bit"):
        decode_image(row(content))


def test_all_images_of_a_data_set_have_one_range(tmp_path):
    """A dark image stays dark beside a bright one: in training, a cache, the first grid, streams, and evaluation."""
    contents = [deep(100), deep(4095)] * 5
    dark = np.asarray(decode_image(row(contents[0]), PixelRange(bits=12)))
    assert dark.max() == 100 >> 4

    tables = write_parquet(tmp_path / "table", [0] * 10, images=contents)
    stream = write_files(tmp_path / "stream", rows=10, images=contents, group_rows=5)
    on_disk = ImageDataset(*load_image_dataset(tables, cache_dir=str(tmp_path / "cache")))
    for data in (Files(contents), on_disk, stream_image_dataset(stream, cache_dir=str(tmp_path / "cache"))):
        assert data.pixel_range == PixelRange(bits=12)
        data.check()
        images, _ = data.examples(np.arange(2), 8)
        np.testing.assert_array_equal(images[0], dark)
        options = {"seed": 0, "resolution": 8, "latent_shape": (3, 8, 8), "null_class_id": None, "label_dropout": 0}
        pixels = data.samples(**options, global_batch_size=2)[list(range(10))]["pixels"]
        assert sorted(image.max().item() for image in pixels) == [6] * 5 + [255] * 5

    folder = tmp_path / "folder"
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    for images in (
        open_images("SAMPLES", str(folder)),
        open_images("SAMPLES", str(folder), resolution=8),
        open_images("`reference`", tables, resolution=8, cache_dir=str(tmp_path / "cache")),
    ):
        np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), dark)


def test_the_sample_is_fixed_and_small(monkeypatch):
    assert [len(sample_rows(count)) for count in (0, 1, 64, 65, 128, 1_281_167)] == [0, 1, 64, 33, 64, 64]
    tried = []
    monkeypatch.setattr(image_decoding, "open_image", lambda source: tried.append(source))
    # What cannot be read decides nothing.
    assert Files([b""] * 1000).pixel_range == PixelRange() and len(tried) == 63


def test_a_later_image_beyond_the_range_is_clipped_with_one_warning(caplog):
    image_decoding.warn_once.cache_clear()
    content = deep(4095)
    pixels = [np.asarray(decode_image(row(content), PixelRange(bits=10))) for _ in range(3)]
    np.testing.assert_array_equal(pixels[0][..., 0], np.rint(RAMP * 4095).clip(0, 1023).astype(int) >> 2)
    assert len(caplog.messages) == 1 and "outside [0, 1023]" in caplog.text and "clipped" in caplog.text
    # NaN and infinity have a value, too.
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], dtype=np.float32)
    grey = np.asarray(decode_image(PILImage.fromarray(values), PixelRange(floats=(0, 1))))[..., 0]
    assert grey.tolist() == [[0, 255], [0, 128]] and "outside [0, 1]" in caplog.text


def test_a_kind_of_image_that_the_sample_lacks_has_its_own_range(caplog):
    image_decoding.warn_once.cache_clear()
    for _ in range(2):
        assert decode_image(row(deep(4095)), PixelRange()).getpixel((7, 7)) == (255, 255, 255)
    assert len(caplog.messages) == 1 and "the mode I;16, which does not occur in the sample of images" in caplog.text


def test_16_bit_colour_keeps_its_upper_8_bits():
    """PIL reads 16-bit PNGs with several channels as 8-bit."""
    colour = png_file(16, 2, [0xABCD, 0x0FFF, 0x00FF])
    assert decode_image(row(colour)).getpixel((0, 0)) == (0xAB, 0x0F, 0)
    assert find_pixel_range([row(colour)], "the data") == PixelRange()


# ----------------------------------------------------------------------------------------------------------------------
# 8-bit images and transparency


def random_image(mode: str) -> PILImage.Image:
    pixels = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return pixels.convert(mode)


OPAQUE = {
    "L": encoded(random_image("L"), "png"),
    "1": encoded(random_image("1"), "png"),
    "P": encoded(random_image("P"), "png"),
    "P GIF": encoded(random_image("P"), "gif"),
    "RGB": encoded(random_image("RGB"), "png"),
    "RGB WebP": encoded(random_image("RGB"), "webp"),
    "YCbCr": encoded(random_image("RGB"), "jpeg"),
    "CMYK": encoded(random_image("CMYK"), "tiff"),
    "CMYK JPEG": encoded(random_image("CMYK"), "jpeg"),
    "LA": encoded(random_image("LA"), "png"),
    "RGBA": encoded(random_image("RGBA"), "png"),
    "RGBA WebP": encoded(random_image("RGBA"), "webp", lossless=True),
    "P with opaque alpha": encoded(random_image("P"), "png", transparency=bytes([255] * 256)),
    "RGB, no pixel transparent": encoded(PILImage.new("RGB", (3, 3), (1, 2, 3)), "png", transparency=(9, 9, 9)),
    "L, no pixel transparent": encoded(PILImage.new("L", (3, 3), 7), "png", transparency=8),
}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_opaque_8_bit_images_are_what_pil_converts(name, caplog):
    with PILImage.open(io.BytesIO(OPAQUE[name])) as image:
        expected = np.asarray(image.convert("RGB"))
    with caplog.at_level(logging.INFO):
        found = find_pixel_range([row(OPAQUE[name])], "the data")
    assert found == PixelRange() and not caplog.messages
    for values in (None, found, PixelRange(bits=12, floats=(0, 1))):
        np.testing.assert_array_equal(np.asarray(decode_image(row(OPAQUE[name]), values)), expected)


def palette_image(entry_transparent: int | bytes) -> bytes:
    image = PILImage.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    return encoded(image, "png", transparency=entry_transparent)


def with_alpha(mode: str, pixels: list) -> PILImage.Image:
    image = PILImage.new(mode, (2, 1))
    image.putdata(pixels)
    return image


# The first pixel is opaque, (10, 20, 30) or grey 10; the second is black, or anything, and transparent.
TRANSPARENT = {
    "RGBA": encoded(with_alpha("RGBA", [(10, 20, 30, 255), (0, 0, 0, 0)]), "png"),
    "RGBA WebP": encoded(with_alpha("RGBA", [(10, 20, 30, 255), (0, 0, 0, 0)]), "webp", lossless=True),
    "RGBA TIFF": encoded(with_alpha("RGBA", [(10, 20, 30, 255), (0, 0, 0, 0)]), "tiff"),
    "LA": encoded(with_alpha("LA", [(10, 255), (0, 0)]), "png"),
    "P, one entry": palette_image(1),
    "P, alpha of entries": palette_image(bytes([255, 0])),
    "P GIF": encoded(PILImage.open(io.BytesIO(palette_image(1))), "gif", transparency=1),
    "RGB": png_file(8, 2, [10, 20, 30, 0, 0, 0], [0, 0, 0]),
    "L": png_file(8, 0, [10, 0], [0]),
    "RGBA of 16 bits": png_file(16, 6, [10 << 8, 20 << 8, 30 << 8, 65535, 0, 0, 0, 0]),
    "LA of 16 bits": png_file(16, 4, [10 << 8, 65535, 0, 0]),
    "1": encoded(with_alpha("1", [0, 255]), "png", transparency=255),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name, caplog):
    content = TRANSPARENT[name]
    first = {"L": (10, 10, 10), "1": (0, 0, 0)}.get(name.split()[0].rstrip("A") if name[0] == "L" else name)
    image = decode_image(row(content))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(2)] == [first or (10, 20, 30), (255, 255, 255)]
    with caplog.at_level(logging.INFO):
        find_pixel_range([row(png(1)), row(content), row(content)], "the data")
    assert caplog.messages == ["the data: 2 of 3 images tried have transparent pixels; they are put on white"]


def test_a_transparent_value_of_16_bit_grey_is_white():
    image = decode_image(row(png_file(16, 0, [4095, 0, 100], [0])))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [255, 255, 100 >> 4]


def test_half_transparent_pixels_are_mixed_with_white():
    image = PILImage.new("RGBA", (1, 1), (0, 100, 200, 128))
    assert decode_image(image).getpixel((0, 0)) == (127, 177, 227)
    assert image.getpixel((0, 0)) == (0, 100, 200, 128)  # an image of the caller is not changed


def test_pil_images_with_a_transparent_palette_or_premultiplied_alpha():
    premultiplied = with_alpha("RGBA", [(10, 20, 30, 255), (0, 0, 0, 0)]).convert("RGBa")
    palette = PILImage.open(io.BytesIO(palette_image(1))).convert("PA")
    for image in (premultiplied, palette):
        assert [decode_image(image).getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("format", ["tiff", "jpeg"])
def test_cmyk_has_the_colours_of_print(format):
    """Programs of Adobe, as Pillow, store CMYK inverted in JPEGs, with a marker that says Adobe."""
    image = PILImage.new("CMYK", (32, 16), (0, 0, 0, 0))
    image.paste((0, 255, 255, 0), (16, 0, 32, 16))
    content = encoded(image, format)
    assert (b"Adobe" in content) == (format == "jpeg")
    decoded = np.asarray(decode_image(row(content))).astype(int)
    assert np.abs(decoded[4, 4] - (255, 255, 255)).max() <= 4
    assert np.abs(decoded[4, 28] - (255, 0, 0)).max() <= 4


def test_grey_of_any_depth_is_turned_upright():
    for content in (deep(4095, "<u2", "tiff"), deep(4095, ">u2", "tiff"), deep(1, np.float32, "tiff")):
        image = PILImage.open(io.BytesIO(content))
        turned = io.BytesIO()
        image.save(turned, "tiff", tiffinfo={274: 3})
        upright = np.asarray(decode_image(row(turned.getvalue())))
        np.testing.assert_array_equal(upright, np.asarray(decode_image(row(content)))[::-1, ::-1])


# ----------------------------------------------------------------------------------------------------------------------
# Extreme aspect ratios


def resized_whole(image, resolution, position):
    """The crop by resizing the whole image."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    array = np.asarray(image.resize(size, PILImage.Resampling.BICUBIC))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    if position is not None:
        left, top = (int(p * (side - resolution + 1)) for p, side in zip(position, size))
    return array[top : top + resolution, left : left + resolution]


@pytest.fixture
def largest(monkeypatch):
    """The pixels of the largest image that PIL makes of another one."""
    sizes, new = [0], PILImage.Image._new

    def record(self, core):
        sizes[0] = max(sizes[0], core.size[0] * core.size[1])
        return new(self, core)

    monkeypatch.setattr(PILImage.Image, "_new", record)
    return sizes


def noise(width: int, height: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (1, 500), (17, 150), (40, 1000), (1100, 70), (33, 300)])
@pytest.mark.parametrize("position", [None, (0.0, 0.0), (0.999, 0.999), (0.3, 0.61)])
def test_long_images_are_cropped_before_they_are_resized(size, position, largest):
    # Without black and white: Pillow cuts what overshoots them between its two passes, whose order depends on the shape.
    image = noise(*size).point(lambda value: 64 + value // 2)
    largest[0] = 0
    found = resize_and_crop(image, 32, position)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    # The halves of an image are smaller than itself.
    assert largest[0] <= max((2 * 32 + 9) ** 2, size[0] * size[1] // 4)
    assert np.abs(found.astype(int) - resized_whole(image, 32, position)).max() <= 1


@pytest.mark.parametrize("size", [(8, 64), (80, 10), (31, 247), (500, 63), (64, 64), (20, 31)])
@pytest.mark.parametrize("position", [None, (0.3, 0.61)])
def test_ordinary_images_are_resized_as_a_whole(size, position):
    image = noise(*size)
    np.testing.assert_array_equal(resize_and_crop(image, 32, position), resized_whole(image, 32, position))


@pytest.mark.parametrize("size", [(2, 6000), (6000, 2), (1, 2_000_000)])
def test_the_longest_images_take_little_memory(size, largest):
    image = PILImage.new("RGB", size, (1, 2, 3))
    largest[0] = 0
    found = resize_and_crop(image, 256, (0.999, 0.999))
    assert (found == (1, 2, 3)).all() and largest[0] <= 256 * 256


# ----------------------------------------------------------------------------------------------------------------------
# JPEG files at a part of their size


def smooth(width: int, height: int, format: str = "jpeg", **options) -> dict:
    """A file with an image of few frequencies, which all sizes show alike."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    levels = np.stack([x, y, (x + y) / 2], axis=2) * 200 + 20
    return row(encoded(PILImage.fromarray(levels.astype(np.uint8)), format, **options))


def test_a_draft_is_as_small_as_the_square_allows():
    file = smooth(400, 300)
    assert decode_image(file).size == (400, 300)
    sizes = {100: (200, 150), 75: (100, 75), 37: (50, 38), 8: (50, 38), 151: (400, 300), 500: (400, 300)}
    for side, size in sizes.items():
        assert decode_image(file, draft_side=side).size == size
    assert decode_image(smooth(400, 300, "png"), draft_side=75).size == (400, 300)
    # What is smaller than that is halved as ever, and an image that is open already stays as it is.
    assert resize_and_crop(decode_image(file, draft_side=8), 8).shape == (8, 8, 3)
    with PILImage.open(io.BytesIO(file["bytes"])) as image:
        assert decode_image(image, draft_side=8).size == (400, 300)
    # Rotated by its EXIF tag: the shorter side is the same.
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert decode_image(smooth(400, 300, exif=exif), draft_side=75).size == (75, 100)


def test_samples_and_examples_decode_drafts_if_asked():
    data = Files([smooth(400, 300)["bytes"], smooth(250, 500)["bytes"]])
    expected = {}
    for side in (None, 64):
        data.jpeg_draft = side is not None
        squares = [resize_and_crop(decode_image(data[[row]]["image"][0], draft_side=side), 64) for row in (0, 1)]
        images, _ = data.examples(np.array([0, 1]), 64)
        samples = data.samples(seed=0, resolution=64, latent_shape=(3, 64, 64), null_class_id=1)
        rows = samples.rows_of([0, 1])
        found = samples[[0, 1]]["pixels"].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(images, np.stack(squares)) and np.array_equal(found, images[rows])
        expected[side] = images.astype(int)
    difference = np.abs(expected[None] - expected[64])
    assert difference.max() > 0 and difference.mean() < 2


def test_a_cache_says_that_it_was_made_from_drafts():
    data = Files([smooth(64, 64)["bytes"]])
    data.labels = lambda: np.zeros(1, np.int64)
    options = {"vae": None, "latent_shape": (3, 8, 8), "has_posterior": False, "resolution": 8}
    assert "jpeg_draft" not in cache_config(data, **options)
    data.jpeg_draft = True
    assert cache_config(data, **options)["jpeg_draft"] is True
    pixels = ImageRows(data, 8, "none")[[0]]["pixels"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, np.asarray(resize_and_crop(decode_image(data[[0]]["image"][0], draft_side=8), 8)))
    assert VRPOConfig(jpeg_draft=True, dataset_name="digits").jpeg_draft
    with pytest.raises(InputError, match="`jpeg_draft` has no effect with `latents_dir` cache"):
        VRPOConfig(jpeg_draft=True, latents_dir="cache")
