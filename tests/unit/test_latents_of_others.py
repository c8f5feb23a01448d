# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Latents that REPA and LightningDiT have encoded, read into a cache."""

import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

from diffusers_vrpo.commands import prepare as command
from diffusers_vrpo.data import latents_of_others
from diffusers_vrpo.data.latent_cache import LatentCache
from diffusers_vrpo.data.latents_of_others import LightningLatents, RepaLatents
from diffusers_vrpo.errors import InputError
from support.models import tiny_vae


COUNT, SIDE = 5, 16
SCALE, SHIFT = 0.3, 0.1  # of the tiny autoencoder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vae"
    tiny_vae("kl").save_pretrained(folder)
    return str(folder)


def moments(row: int, size: int = 8) -> np.ndarray:
    """Mean and standard deviation of a row, as REPA stores them."""
    draw = np.random.default_rng(row)
    mean = draw.normal(0, 3, (4, size, size))
    return np.concatenate([mean, draw.uniform(0.1, 0.5, mean.shape)]).astype(np.float32)


def picture(row: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(100 + row).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_repa(folder, labels=(3, 0, 3, 1, 2), images=True, zipped=False, change=lambda files: None):
    """REPA's data set in a folder, after `change` has changed its files."""
    names = [f"{row:08d}" for row in range(len(labels))]
    files = {}
    for row, name in enumerate(names):
        buffer = io.BytesIO()
        np.save(buffer, moments(row))
        files[f"vae-sd/{name[:5]}/img-mean-std-{name}.npy"] = buffer.getvalue()
        if images:
            files[f"images/{name[:5]}/img{name}.png"] = png(picture(row))
    table = [[f"{name[:5]}/img-mean-std-{name}.npy", label] for name, label in zip(names, labels)]
    files["vae-sd/dataset.json"] = json.dumps({"labels": table}).encode()
    files["images/dataset.json"] = b"{}"
    change(files)
    for part in ("vae-sd", "images"):
        inside = {name.removeprefix(f"{part}/"): data for name, data in files.items() if name.startswith(part)}
        folder.mkdir(exist_ok=True)
        if zipped:
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                for name, data in inside.items():
                    archive.writestr(name, data)
        elif len(inside) > 1:
            for name, data in inside.items():
                (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / part / name).write_bytes(data)
    return folder


def write_shards(folder, shards=({}, {})):
    """LightningDiT's shards of three and two rows, whose tensors `shards` may replace, or remove by None."""
    folder.mkdir()
    for number, (rows, changes) in enumerate(zip((range(3), range(3, 5)), shards)):
        latents = torch.stack([torch.from_numpy(moments(row)[:4]) for row in rows])
        tensors = {"latents": latents, "latents_flip": latents.flip(-1), "labels": torch.tensor([*rows])}
        tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / f"latents_rank{number:02d}_shard000.safetensors")
    return folder


def argv(kind, path, vae, output_dir, *more) -> list[str]:
    words = ["--from", kind, path, "--vae", vae, "--resolution", SIDE, "--chunk_rows", 2, "--output_dir", output_dir]
    return [str(word) for word in (*words, *more)]


def prepare(kind, path, vae, output_dir, *more) -> LatentCache:
    command.prepare_from_latents(command.parse_args(argv(kind, path, vae, output_dir, *more)))
    return LatentCache(output_dir)


# What is written


@pytest.mark.parametrize("zipped", [False, True])
def test_repa(vae, tmp_path, zipped):
    cache = prepare("repa-zip", write_repa(tmp_path / "data", zipped=zipped), vae, tmp_path / "cache")
    assert (len(cache), cache.num_classes, cache.config["kind"], cache.config["flip"]) == (COUNT, 4, "moments", False)
    assert cache["label"].tolist() == [3, 0, 3, 1, 2]
    rows = np.arange(COUNT)
    stored = cache.read("latents", rows).float()
    expected = torch.from_numpy(np.stack([moments(row) for row in rows]))
    assert torch.allclose(stored[:, :4], (expected[:, :4] - SHIFT) * SCALE, atol=2e-3)
    assert torch.allclose(stored[:, 4:], expected[:, 4:] * SCALE, atol=2e-3)
    assert all((cache.pixels(row) == picture(row)).all() for row in rows)
    assert cache.damaged_chunks() == []


def test_the_folder_of_latents_alone_has_no_images(vae, tmp_path):
    folder = write_repa(tmp_path / "data", images=False)
    cache = prepare("repa-zip", folder / "vae-sd", vae, tmp_path / "cache")
    assert not cache.has_images and cache["label"].tolist() == [3, 0, 3, 1, 2]


def test_without_labels_all_images_have_one_class(vae, tmp_path):
    def unlabelled(files):
        files["vae-sd/dataset.json"] = b'{"labels": null}'

    cache = prepare("repa-zip", write_repa(tmp_path / "data", change=unlabelled), vae, tmp_path / "cache")
    assert cache.num_classes == 1 and cache["label"].tolist() == [0] * COUNT


def test_lightningdit(vae, tmp_path):
    cache = prepare("lightningdit", write_shards(tmp_path / "data"), vae, tmp_path / "cache")
    assert (len(cache), cache.config["kind"], cache.config["flip"], cache.has_images) == (5, "sampled", True, False)
    assert cache["label"].tolist() == [0, 1, 2, 3, 4]
    expected = (torch.from_numpy(np.stack([moments(row)[:4] for row in range(5)])) - SHIFT) * SCALE
    for flips in (False, True):
        stored = cache.read("latents", np.arange(5), np.full(5, flips)).float()
        assert torch.allclose(stored, expected.flip(-1) if flips else expected, atol=2e-3)
    without = write_shards(tmp_path / "unflipped", ({"latents_flip": None}, {"latents_flip": None}))
    assert not LightningLatents(without).flip


def test_a_stopped_command_continues(vae, tmp_path, monkeypatch):
    folder, whole = write_repa(tmp_path / "data"), tmp_path / "whole"
    prepare("repa-zip", folder, vae, whole)
    read = RepaLatents.read

    def stop(self, rows):
        if rows == [2, 3]:
            raise KeyboardInterrupt
        return read(self, rows)

    monkeypatch.setattr(RepaLatents, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("repa-zip", folder, vae, tmp_path / "cache")
    read_rows = []
    monkeypatch.setattr(RepaLatents, "read", lambda self, rows: read_rows.extend(rows) or read(self, rows))
    prepare("repa-zip", folder, vae, tmp_path / "cache")
    assert read_rows[COUNT:] == [2, 3, 4]  # after those whose scale is looked at
    for file in whole.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (tmp_path / "cache" / file.relative_to(whole)).read_bytes()
    other = write_repa(tmp_path / "other", labels=(3, 0, 3, 1, 1))
    with pytest.raises(InputError, match="the checksum of the data set"):
        prepare("repa-zip", other, vae, tmp_path / "cache")


def test_latents_of_another_scale_are_a_warning(vae, tmp_path, caplog):
    # 0.3 after the autoencoder's scale
    small = [{"latents": torch.randn(count, 4, 8, 8), "latents_flip": None} for count in (3, 2)]
    prepare("lightningdit", write_shards(tmp_path / "data", small), vae, tmp_path / "cache")
    assert "standard deviation of" in caplog.text
    shards = write_shards(tmp_path / "more")
    assert latents_of_others.scale_problem(LightningLatents(shards), tiny_vae("kl")) is None


# What is refused


def removed(name):
    return lambda files: files.pop(name)


def replaced(name, data):
    return lambda files: files.__setitem__(name, data)


def stored(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


FIRST, SECOND = (f"vae-sd/00000/img-mean-std-0000000{row}.npy" for row in (0, 1))


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        ((0, -1), None, "a label is -1; labels must be class ids from 0"),
        ((0, 10**9), None, "a label is 1000000000"),
        ((0, "cat"), None, 'the label of .* in dataset.json is "cat", not a class id'),
        ((0, 1), removed("vae-sd/dataset.json"), "dataset.json cannot be read"),
        ((0, 1), replaced("vae-sd/dataset.json", b'{"labels": [["a.npy", 0]]}'), "dataset.json has no entry"),
        ((0, 1), replaced("vae-sd/dataset.json", b"{"), "dataset.json is damaged"),
        ((0, 1), replaced(SECOND, b"text"), f"{SECOND[7:]} is damaged"),
        ((0, 1), replaced(SECOND, stored(np.array([{}]))), f"{SECOND[7:]} is damaged .it holds Python objects"),
        ((0, 1), replaced(SECOND, stored(np.zeros((8, 8, 8), int))), "holds int64, not floating-point numbers"),
        ((0, 1), replaced(SECOND, stored(moments(1, 4))), r"has the shape \[8, 4, 4\], others have \[8, 8, 8\]"),
        ((0, 1), replaced(SECOND, stored(-moments(1))), "negative numbers, so it is not a standard deviation"),
        ((0, 1), replaced(SECOND, stored(moments(1) * np.inf)), "are not finite in float16"),
        ((0, 1), replaced(FIRST, stored(np.zeros((7, 8, 8)))), r"has the shape \[7, 8, 8\]"),
        ((0, 1), removed("images/00000/img00000001.png"), "it has 2 latents and 1 images"),
        ((0, 1), replaced("images/00000/img00000001.png", b"text"), "cannot be decoded"),
        (
            (0, 1),
            replaced("images/00000/img00000001.png", png(picture(1, 8))),
            "has 8x8 pixels, and `resolution` is 16",
        ),
        (
            (0, 1),
            lambda files: files.__setitem__("images/a2.png", files.pop("images/00000/img00000001.png")),
            "have different numbers",
        ),
    ],
)
def test_faults_of_repas_files(vae, tmp_path, labels, change, message):
    folder = write_repa(tmp_path / "data", labels, change=change or (lambda files: None))
    with pytest.raises(InputError, match=message) as error:
        prepare("repa-zip", folder, vae, tmp_path / "cache")
    assert error.value.field == "from_latents"


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (({"labels": None}, {}), "latents_rank00_shard000.safetensors has no tensor labels"),
        (({}, {"latents_flip": None}), "rank00_.* has mirrored latents .*, latents_rank01_.* does not"),
        (({"labels": torch.tensor([0, 1, -5])}, {}), "a label is -5"),
        (({"labels": torch.tensor([0.0, 1.0, 2.0])}, {}), "are torch.float32 .*, not class ids"),
        (({"labels": torch.tensor([0, 1])}, {}), r"has the shape \[3, 4, 8, 8\] for 2 labels"),
        (({"latents_flip": torch.zeros(3, 4, 8, 4)}, {}), r"latents_flip in .* has the shape \[3, 4, 8, 4\]"),
        (({"latents": torch.zeros(3, 4, 8, 8, dtype=torch.int32)}, {}), "holds I32, not floating-point numbers"),
        (
            ({}, {"latents": torch.zeros(2, 4, 4, 4), "latents_flip": torch.zeros(2, 4, 4, 4)}),
            "its latents have different shapes: ",
        ),
        (({"latents": torch.full((3, 4, 8, 8), torch.nan)}, {}), "are not finite in float16"),
    ],
)
def test_faults_of_shards(vae, tmp_path, shards, message):
    with pytest.raises(InputError, match=message) as error:
        prepare("lightningdit", write_shards(tmp_path / "data", shards), vae, tmp_path / "cache")
    assert error.value.field == "from_latents"


def test_a_damaged_shard_and_folders_without_latents(vae, tmp_path):
    folder = write_shards(tmp_path / "data")
    (folder / "latents_rank00_shard000.safetensors").write_bytes(b"text")
    for kind, path, message in (
        ("lightningdit", folder, "is damaged"),
        ("lightningdit", tmp_path / "none", "it is not a folder"),
        ("repa-zip", folder, "it has no .npy files"),
        ("repa-zip", tmp_path / "none", "it does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(kind, path, vae, tmp_path / "cache")


def test_another_autoencoder_or_resolution(vae, tmp_path):
    message = r"has latents of \[4, 8, 8\], but `vae` .* with `resolution` 32 makes \[4, 16, 16\]"
    with pytest.raises(InputError, match=message):
        prepare("repa-zip", write_repa(tmp_path / "data"), vae, tmp_path / "cache", "--resolution", 32)


def test_options_of_images_to_encode_are_refused(vae, tmp_path, capsys):
    for more, message in (
        (["--flip"], "--flip cannot be combined with --from; remove it"),
        (["--dataset", "digits"], "--dataset_name cannot be combined with --from"),
        (["--encoder", "digits"], "--encoder cannot be combined with --from"),
        (["--vae", "none"], "--vae none cannot be combined with --from"),
        (["--from", "rae", "x"], "--from rae is not a known format; give repa-zip or lightningdit"),
    ):
        with pytest.raises(SystemExit):
            command.parse_args(argv("repa-zip", tmp_path, vae, tmp_path / "cache", *more))
        assert message in capsys.readouterr().err


def test_training_reads_the_cache(vae, tmp_path):
    from diffusers_vrpo.data.sources import open_cache

    PartialState()
    prepare("repa-zip", write_repa(tmp_path / "data"), vae, tmp_path / "cache")
    options = {"latents_dir": str(tmp_path / "cache"), "resolution": SIDE, "vae": None, "center_crop": True}
    cache = open_cache(SimpleNamespace(**options, max_train_samples=None))
    samples = cache.samples(seed=0, latent_shape=(4, 8, 8), null_class_id=4, encoders=[object()])
    batch = samples[[0, 1, 2]]
    assert batch["latents"].shape == (3, 8, 8, 8) and batch["pixels"].shape == (3, 3, SIDE, SIDE)
    assert cache.latents(None, batch).shape == (3, 4, 8, 8)
    with Image.open(io.BytesIO(cache.image_bytes(0))) as image:
        assert image.format == "WEBP"
