# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reads NumPy arrays that other programs may have written; the header is checked before the content is read."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np


def read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the header of a `.npy` file: the shape, whether the array is in Fortran order, and the dtype.

    Raises:
        ValueError: if it is not a header of version 1.0 or 2.0, a side of the shape is negative, or the array holds
            Python objects, which are stored as pickles and may run code.
    """
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"it is of version {version[0]}.{version[1]} of the format")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if any(side < 0 for side in shape):
        raise ValueError(f"its header has the shape {list(shape)}")
    return shape, fortran, dtype


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The size of an array in bytes. Python's integers do not overflow, whatever shape a header claims."""
    return math.prod(shape) * dtype.itemsize


def map_array(path: Path, offset: int = 0) -> np.ndarray:
    """Maps the array of a `.npy` file into memory for reading.

    Args:
        path: the `.npy` file, or another file that contains one.
        offset: the byte at which the `.npy` file begins.

    Raises:
        OSError: if the file cannot be opened, or is a pipe, a device or a folder.
        ValueError: if there is no array, its header promises more bytes than the file holds, or it holds Python
            objects.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise OSError("it is not a regular file")
    with path.open("rb") as stream:
        stream.seek(offset)
        shape, fortran, dtype = read_header(stream)
        begin, size = stream.tell(), num_bytes(shape, dtype)
    there = path.stat().st_size - begin
    if size > there:
        raise ValueError(f"its header promises {size} bytes, and {there} follow")
    if size == 0:  # an empty array cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=begin, shape=shape, order="F" if fortran else "C")
