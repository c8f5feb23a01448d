# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Arrays in files whose headers promise more than there is, or other things than expected."""

import os
import struct
import zipfile

import numpy as np
import pytest

from diffusers_vrpo.arrays import map_array
from diffusers_vrpo.data.latent_cache import checksum_on_disk
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation import image_sets
from diffusers_vrpo.evaluation.feature_statistics import batch_moments
from diffusers_vrpo.evaluation.image_sets import array_images
from diffusers_vrpo.pipelines.sample_folder import is_whole_part


# The options of a cache of two latents.
CACHE = {"count": 2, "chunk_rows": 2, "flip": False, "latent_shape": [4, 2, 2], "kind": "mean", "features": []}
CACHE |= {"images": "none"}


def npy(shape, descr="|u1", content=b""):
    """The bytes of a `.npy` file whose header promises a shape."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def archive(file, content, compression, name="arr_0.npy"):
    with zipfile.ZipFile(file, "w", compression) as opened:
        opened.writestr(name, content)
    return file


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy((50_000_000, 256, 256, 3)), "its header promises 9830400000000 bytes, and 0 follow"),
        (npy((2, 8, 8, 3), content=bytes(100)), "its header promises 384 bytes, and 100 follow"),
        (npy((10**30, 8, 8, 3)), "promises 192"),
        (npy((-2, -8, 8, 3), content=bytes(384)), "its header has the shape"),
        (npy((2, 8, 8, 3), "|O"), "it holds Python objects"),
        (npy((2, 8, 8, 3), "<f4", bytes(1536)), r"arr_0 must be uint8 .* not float32 \[2, 8, 8, 3\]"),
        (npy((0, 8, 8, 3)), r"arr_0 must be uint8 .* not uint8 \[0, 8, 8, 3\]"),
        (npy((192,), content=bytes(192)), "arr_0 must be uint8"),
        (npy("(" * 5000 + ")" * 5000), "arr_0 cannot be read"),
        (b"garbage", "arr_0 cannot be read"),
        (b"", "arr_0 cannot be read"),
    ],
)
def test_images_in_an_npz_are_judged_by_their_headers(tmp_path, compression, content, message):
    file = archive(tmp_path / "x.npz", content, compression)
    with pytest.raises(InputError, match=message):
        array_images("SAMPLES x.npz", file)


def test_a_compressed_array_of_next_to_nothing_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "SMALL_UNPACKED", 1 << 16)
    images = np.zeros((200, 16, 16, 3), np.uint8)
    np.savez_compressed(tmp_path / "zeros.npz", images)
    with pytest.raises(InputError, match=r"arr_0 takes 0\.0 GB unpacked .* np\.savez, which does not compress"):
        array_images("SAMPLES", tmp_path / "zeros.npz")
    np.savez(tmp_path / "stored.npz", images)
    assert len(array_images("SAMPLES", tmp_path / "stored.npz")) == 200
    monkeypatch.setattr(image_sets, "SMALL_UNPACKED", 1 << 20)
    assert len(array_images("SAMPLES", tmp_path / "zeros.npz")) == 200
    monkeypatch.setattr(image_sets, "MAX_UNPACKED", 1 << 16)
    with pytest.raises(InputError, match="of it are unpacked"):
        array_images("SAMPLES", tmp_path / "zeros.npz")


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (np.zeros(2048, complex), "mu is not of 2048 Inception features.* not complex128"),
        (np.array(["a"] * 2048), "mu is not of 2048 Inception features"),
        (np.zeros(7), r"mu is not of 2048 Inception features: .* not float64 \[7\]"),
        (np.full(2048, np.nan), "mu has values that are not finite"),
        (np.array([{}]), "mu cannot be read"),
    ],
)
def test_moments_of_another_kind_are_refused(tmp_path, mean, message):
    np.savez(tmp_path / "x.npz", mu=mean, sigma=np.zeros(1))
    with pytest.raises(InputError, match=message):
        batch_moments(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    "content", [b"", b"garbage", npy((10**12,)), npy((10**30,)), npy((2,), "|O"), npy((-1,)), "pipe", "zip"]
)
def test_a_file_of_a_cache_or_of_samples_that_is_no_array_counts_as_damaged(tmp_path, content):
    file = tmp_path / "latents.npy"
    if content == "pipe":
        os.mkfifo(file)
    elif content == "zip":
        with file.open("wb") as stream:
            np.savez(stream, np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        map_array(file)
    assert checksum_on_disk(tmp_path, CACHE, 0) is None
    assert not is_whole_part(file, 2)


def test_a_number_is_neither_a_file_of_a_cache_nor_of_samples(tmp_path):
    (tmp_path / "latents.npy").write_bytes(npy("()", content=b"7"))
    assert checksum_on_disk(tmp_path, CACHE, 0) is None
    assert not is_whole_part(tmp_path / "latents.npy", 1)


def test_parts_of_samples_are_whole_if_they_hold_all_images_of_their_batch(tmp_path):
    np.save(tmp_path / "part.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert is_whole_part(tmp_path / "part.npy", 2) and not is_whole_part(tmp_path / "part.npy", 3)
    os.truncate(tmp_path / "part.npy", 300)
    assert not is_whole_part(tmp_path / "part.npy", 2)


def test_arrays_are_mapped_whatever_their_order_and_size(tmp_path):
    for i, array in enumerate([np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 4))), np.empty((0, 3))]):
        np.save(tmp_path / f"{i}.npy", array)
        assert np.array_equal(map_array(tmp_path / f"{i}.npy"), array)
