# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Small images, and parquet files with them."""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


def png(value: int, size=(12, 10)) -> bytes:
    """A PNG of one colour, whose red is `value`."""
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (value, 10, 20)).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(folder, labels, names=("cat", "dog"), images=None, column="image"):
    """Writes one parquet file with an image per label, and returns its folder; without `names` labels are plain integers."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images or [png(i % 256) for i in range(len(labels))]
    features = Features({column: Image(), "label": ClassLabel(names=list(names)) if names else Value("int64")})
    rows = {column: [{"bytes": image, "path": None} for image in images], "label": list(labels)}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def numbered(row: int) -> bytes:
    """A PNG of 8 x 8 pixels that says which row it is."""
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (row % 256, row // 256, 0)).save(buffer, "png")
    return buffer.getvalue()


def write_files(folder: Path, rows=403, files=2, group_rows=10, names=10, images=None, **options) -> str:
    """Parquet files in `data/`, with labels row mod 10; one row group has `group_rows` rows."""
    (folder / "data").mkdir(parents=True)
    features = Features({"image": Image(), "note": Value("string"), "label": Value("int64")})
    if names:
        features["label"] = ClassLabel(names=[f"class {i}" for i in range(names)])
    images = images or [numbered(row) for row in range(rows)]
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        columns = {"image": [{"bytes": images[row], "path": None} for row in part.tolist()]}
        columns |= {"note": [f"row {row}" for row in part], "label": (part % 10).tolist()}
        path = folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=group_rows, **options)
    return str(folder)
