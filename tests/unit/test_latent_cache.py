# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The latent cache: what is written, that nothing interrupts it for good, and that training sees the same from it."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from diffusers_vrpo import files
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.commands import latents as latents_command
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.data import latent_cache_export, latent_cache_writer
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image, resize_and_crop
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.latent_cache import CachedEncoder, CachedSamples, LatentCache
from diffusers_vrpo.data.samples import TrainingSamples
from diffusers_vrpo.data.sources import TrainingData, load_training_data
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import encode_images, encode_moments, load_vae
from support.data import png, write_parquet
from support.models import tiny_vae


ROWS = 1437  # of the digits


@pytest.fixture(autouse=True)
def one_thread():
    """As the subprocesses have: kernels round differently with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vae"
    tiny_vae("kl").save_pretrained(folder)
    return str(folder)


def options(vae, output_dir, **changes) -> list[str]:
    merged = {"dataset_name": "digits", "vae": vae, "resolution": 8, "output_dir": output_dir, "flip": True}
    merged |= {"encoder": "digits", "patch_size": 1, "chunk_rows": 16, "dataloader_num_workers": 0, **changes}
    argv = []
    for name, value in merged.items():
        argv += (
            [f"--{name}"] if value is True else [] if value is None or value is False else [f"--{name}", str(value)]
        )
    return argv


PREPARE = "diffusers_vrpo.commands.prepare"


def prepare(vae, output_dir, **changes):
    args = prepare_latents.parse_args(options(vae, output_dir, **changes))
    prepare_latents.prepare(args)
    return output_dir


@pytest.fixture(scope="module")
def reference(vae_folder, tmp_path_factory, trainers):
    """Made by one process from beginning to end; with flipped copies, features and images."""
    folder = tmp_path_factory.mktemp("reference") / "cache"
    output = trainers(options(vae_folder, folder), program=PREPARE).finish()
    assert f"wrote {ROWS} images" in output and "image/s" in output
    return folder


@pytest.fixture
def copy(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def content(folder) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(a, b):
    a, b = content(a), content(b)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def damage(path: Path, position: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 16
    path.write_bytes(data)


def digits_images(rows):
    data = load_image_dataset("digits")[0]
    return np.stack([resize_and_crop(decode_image(data[int(row)]["image"]), 8) for row in rows])


# What is written


def test_a_huge_image_in_a_cache_is_damage(reference, monkeypatch):
    cache = LatentCache(reference)
    assert cache.pixels(3).shape == (8, 8, 3)
    monkeypatch.setattr(files, "LARGEST_IMAGE", 63)
    with pytest.raises(InputError, match=r"is damaged \(the image of row 3: 8x8 are more than 63 pixels\)"):
        cache.pixels(3)


def test_the_cache_holds_what_the_models_give(reference, vae_folder):
    cache = LatentCache(reference)
    rows = np.array([0, 15, 16, 700, ROWS - 1])
    pixels = digits_images(rows)
    vae, encoder = load_vae(vae_folder), load_encoder("digits", (4, 4))
    assert len(cache) == ROWS and cache.id2label[3] == "three"
    np.testing.assert_array_equal(cache["label"], load_image_dataset("digits")[0]["label"][:])
    for flips in (np.zeros(5, dtype=bool), np.ones(5, dtype=bool)):
        seen = pixels[:, :, ::-1] if flips[0] else pixels
        images = torch.from_numpy(seen.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, std = encode_moments(vae, images)
        latents = cache.read("latents", rows, flips)
        assert latents.dtype == torch.float16 and latents.shape == (5, 8, 4, 4)
        torch.testing.assert_close(latents[:, :4].float(), (mean - 0.1) * 0.3, rtol=6e-4, atol=1e-6)
        torch.testing.assert_close(latents[:, 4:].float(), std * 0.3, rtol=6e-4, atol=1e-6)
        features = cache.read("features-0", rows, flips)
        torch.testing.assert_close(features.float(), encoder(images), rtol=6e-4, atol=1e-4)
    np.testing.assert_array_equal(np.stack([cache.pixels(row) for row in rows]), pixels)


def test_kinds_of_latents(tmp_path, vae_folder):
    small = {"max_train_samples": 40, "flip": None, "encoder": None, "images": "none"}
    moments = LatentCache(prepare(vae_folder, tmp_path / "moments", **small))
    sampled = [LatentCache(prepare(vae_folder, tmp_path / str(n), sampled=True, seed=n, **small)) for n in (0, 1)]
    mean, std = moments.read("latents", np.arange(40)).float().chunk(2, dim=1)
    drawn = [cache.read("latents", np.arange(40)).float() for cache in sampled]
    assert drawn[0].shape == (40, 4, 4, 4) and not torch.equal(*drawn)
    for latents in drawn:
        z = (latents - mean) / std
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    tiny_vae("tiny").save_pretrained(tmp_path / "tiny")
    small["resolution"] = 16
    cache = LatentCache(prepare(str(tmp_path / "tiny"), tmp_path / "deterministic", **small))
    batch = CachedSamples(cache, 0, 10).__getitem__([0, 1])
    assert cache.config["kind"] == "latents" and "posterior_noise" not in batch
    assert torch.equal(cache.latents(None, batch), batch["latents"].float())
    with pytest.raises(InputError, match="`sampled`: .*AutoencoderTiny, which has no posterior"):
        prepare(str(tmp_path / "tiny"), tmp_path / "no", sampled=True, **small)


def test_unreadable_images_are_replaced_as_without_a_cache(tmp_path, vae_folder):
    images = [png(i % 256) for i in range(300)]
    images[47] = images[48] = images[299] = b"broken"
    folder = write_parquet(tmp_path / "data", [i % 2 for i in range(300)], images=images)
    cache = LatentCache(prepare(vae_folder, tmp_path / "cache", dataset_name=folder, encoder=None))
    assert cache.corrupt_rows == {47, 48, 299} and cache.id2label == {0: "cat", 1: "dog"}
    assert np.array_equal(cache.pixels(47), cache.pixels(49)) and np.array_equal(cache.pixels(299), cache.pixels(0))
    data = load_image_dataset(folder)[0]
    a = TrainingSamples(data, 3, 8, (4, 4, 4), 2).__getitem__(list(range(300)))
    b = CachedSamples(cache, 3, 2, images=True).__getitem__(list(range(300)))
    for name in ("pixels", "class_labels", "corrupt_rows"):
        assert torch.equal(a[name], b[name]), name
    images[5] = b"broken"
    folder = write_parquet(tmp_path / "four", [0] * 300, images=images)
    with pytest.raises(InputError, match="4 of 300 images tried cannot be decoded"):
        prepare(vae_folder, tmp_path / "no", dataset_name=folder, encoder=None)


# Interruptions


@pytest.mark.slow
def test_killed_and_continued(reference, vae_folder, tmp_path, trainers):
    folder = tmp_path / "cache"
    journal = folder / "journal-0.jsonl"
    process = trainers(options(vae_folder, folder), program=PREPARE)
    deadline = time.monotonic() + 120
    while not journal.exists() or len(journal.read_text().split()) < 20:
        assert time.monotonic() < deadline, process.log.read_text()[-3000:]
        time.sleep(0.002)
    process.kill()
    assert process.wait() == [-signal.SIGKILL]
    done = len(journal.read_text().splitlines()) // 2
    assert 3 <= done < 90
    with pytest.raises(InputError, match="is not finished"):
        LatentCache(folder)
    whole = (folder / "latents.npy").read_bytes()
    assert whole != (reference / "latents.npy").read_bytes()
    prepare(vae_folder, folder)
    assert_same(folder, reference)


@pytest.mark.slow
def test_two_processes_write_the_same(reference, vae_folder, tmp_path, trainers):
    trainers(options(vae_folder, tmp_path / "cache"), program=PREPARE, processes=2).finish()
    assert_same(tmp_path / "cache", reference)


def unfinish(folder, chunks) -> list[str]:
    """Puts a cache back to where only these chunks were journalled; gives the journal's lines."""
    meta = json.loads((folder / "meta.json").read_text())
    lines = [json.dumps({"chunk": c, "crc": meta["checksums"][c], "corrupt": []}) for c in chunks]
    kept = {"format": meta["format"], "complete": False, "about": meta["about"], "config": meta["config"]}
    (folder / "meta.json").write_text(json.dumps(kept))
    return lines


def test_traces_of_a_kill_are_harmless(copy, reference, vae_folder):
    lines = unfinish(copy, range(0, 88))
    # By three processes; a line cut short, a chunk half written, temporary files.
    (copy / "journal-0.jsonl").write_text("\n".join(lines[:40]) + "\n" + lines[40][:-20])
    (copy / "journal-2.jsonl").write_text("\n".join(lines[41:]))
    (copy / "images" / "00089.bin").unlink()
    (copy / "images" / ".00089.bin.123.tmp").write_bytes(b"half")
    (copy / ".meta.json.123.tmp").write_bytes(b"{")
    damage(copy / "features-0.npy", 1436 / 2874)
    prepare(vae_folder, copy)
    assert_same(copy, reference)


def test_a_lost_array_is_written_again(copy, reference, vae_folder):
    (copy / "labels.npy").unlink()
    os.truncate(copy / "latents.npy", 400_000)
    with pytest.raises(InputError, match="`latents_dir` .* is damaged .*npy.*; `vrpo prepare` with `verify` mends it"):
        LatentCache(copy)
    prepare(vae_folder, copy)
    assert_same(copy, reference)


def test_a_complete_cache_is_left_alone(copy, vae_folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    monkeypatch.setattr(prepare_latents, "write_chunks", None)
    prepare(vae_folder, copy)
    prepare(vae_folder, copy, verify=True)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


@pytest.mark.parametrize(
    "file", ["latents.npy", "labels.npy", "features-0.npy", "image_offsets.npy", "images/00030.bin"]
)
def test_damage_is_found_and_mended(copy, reference, vae_folder, file):
    damage(copy / file)
    with pytest.raises(InputError, match=r"1 of 90 chunks differ from their checksum \(first: rows \d+ to \d+\)"):
        latents_command.verify(SimpleNamespace(latents_dir=copy))
    prepare(vae_folder, copy, verify=True)
    assert_same(copy, reference)
    latents_command.verify(SimpleNamespace(latents_dir=copy))


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolution": 16}, "with other options: `resolution` was 8 and is 16; use the same"),
        ({"flip": None}, "`flip` was True and is False"),
        ({"images": "none"}, "`images` was webp and is none"),
        ({"sampled": True}, r"the kind of latents \(`sampled`\) was moments and is sampled"),
        ({"encoder": None}, "`encoder`, its layer, weights or token grid differs"),
        ({"encoder_layer": 2}, "`encoder`, its layer, weights or token grid differs"),
        ({"max_train_samples": 100}, "the number of images was 1437 and is 100"),
        ({"dataset_split": "validation"}, "the number of images was 1437 and is 360"),
        ({"chunk_rows": 32}, "`chunk_rows` was 16 and is 32"),
    ],
)
def test_two_configurations_do_not_mix(reference, vae_folder, change, message):
    with pytest.raises(InputError, match=message):
        prepare(vae_folder, reference, **change)
    LatentCache(reference)


def test_other_weights_do_not_mix(reference, tmp_path):
    vae = tiny_vae("kl")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="the checksum of the weights of `vae` was"):
        prepare(str(tmp_path / "vae"), reference)


def test_folders_with_something_else(tmp_path, vae_folder, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(thesis.txt\) and no latent cache"):
        prepare(vae_folder, tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    with pytest.raises(InputError, match="meta.json is damaged"):
        prepare(vae_folder, tmp_path / "damaged")
    with pytest.raises(InputError, match="`latents_dir` .*nowhere has no meta.json"):
        LatentCache(tmp_path / "nowhere")
    monkeypatch.setattr(latent_cache_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="has 0.0 GB of free space, but the arrays of the cache take"):
        prepare(vae_folder, tmp_path / "full")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": "none", "encoder": None}, "--vae none makes a cache of pixels, which only saves time with --encoder"),
        ({"vae": "none", "vae_dtype": "float16"}, "--vae_dtype float16 has no effect with --vae none; remove it"),
        ({"dataset_name": None}, "give either --dataset_name, --train_data_dir or --from"),
        ({"chunk_rows": 0}, "--chunk_rows 0 must be at least 1"),
        ({"encoder": None, "encoder_layer": 3}, "--encoder_layer has no effect without --encoder"),
        ({"seed": 3}, "--seed has no effect without --sampled"),
    ],
)
def test_command_lines_that_cannot_work(capsys, change, message):
    with pytest.raises(SystemExit):
        prepare_latents.parse_args(options(change.pop("vae", "vae"), "out", **change))
    assert message in capsys.readouterr().err


def test_command_line_errors_are_one_sentence(tmp_path):
    with pytest.raises(
        SystemExit, match="^vrpo latents verify: error: --latents_dir .* has no meta.json, so it is not a latent cache"
    ):
        latents_command.main(["verify", "--latents_dir", str(tmp_path)])


def test_too_large_values_are_refused(tmp_path):
    vae = tiny_vae("kl")
    vae.register_to_config(scaling_factor=1e7)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="latents of rows 0 to 15 are not finite in float16"):
        prepare(str(tmp_path / "vae"), tmp_path / "cache", encoder=None)


# Training from it


def test_the_streams_are_those_of_the_images(reference, vae_folder):
    data = ImageDataset(*load_image_dataset("digits"))
    vae, encoder = load_vae(vae_folder), load_encoder("digits", (4, 4))
    streams = {"label_dropout": 0.3, "random_flip": True, "num_tokens": 100}
    samples = TrainingSamples(data, 5, 8, (4, 4, 4), 10, sample_posterior=True, **streams)
    cached = CachedSamples(LatentCache(reference), 5, 10, images=True, features=[0], **streams)
    indices = list(range(ROWS - 40, ROWS + 40))  # from one epoch into the next
    a, b = samples.__getitem__(indices), cached.__getitem__(indices)
    assert set(b) == set(a) | {"latents", "features_0"}
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    a["pixels"] = a["pixels"].float() / 127.5 - 1
    x0 = encode_images(vae, a["pixels"], a["posterior_noise"])
    assert torch.equal(data.latents(vae, a), x0)
    assert (cached.cache.latents(None, b) - x0).abs().max() < 2e-3 * x0.abs().max()
    features = CachedEncoder(0, 0, 64)(b)
    expected = encoder(a["pixels"])
    assert features.dtype == torch.float32 and (features - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.slow
def test_worker_processes_read_the_same(reference):
    samples = CachedSamples(LatentCache(reference), 0, 10, random_flip=True, images=True, features=[0])
    here = samples.__getitem__([3, 99])
    assert "arrays" not in pickle.loads(pickle.dumps(samples)).cache.__dict__
    loader = torch.utils.data.DataLoader(
        samples, batch_size=None, sampler=[[3, 99], [0, 1]], num_workers=1, multiprocessing_context="spawn"
    )
    there = next(iter(loader))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def trainer_options(folder, **changes) -> SimpleNamespace:
    plain = "dataset_name dataset_config_name train_data_dir max_train_samples cache_dir vae encoder_layer"
    values = dict.fromkeys(plain.split())
    values |= {"dataset_split": "train", "image_column": "image", "label_column": "label", "seed": 0, "resolution": 8}
    values |= {
        "latents_dir": folder,
        "center_crop": True,
        "random_flip": False,
        "jpeg_draft": False,
        "encoder": ["digits"],
        "streaming": False,
    }
    return SimpleNamespace(**{**values, "objective": "vrpo", **changes})


OPTIONS = {"seed": 0, "resolution": 8, "latent_shape": (4, 4, 4), "null_class_id": 10, "num_tokens": 16}
OPTIONS |= {"global_batch_size": 16}


def test_what_the_trainer_opens(reference, vae_folder):
    data = load_training_data(trainer_options(reference))
    assert data.vae == vae_folder and data.num_classes == 10 and data.id2label[0] == "zero" and len(data) == ROWS
    assert isinstance(data, TrainingData) and data.has_images
    encoders = data.features(["digits"], [None], (4, 4))
    assert [encoder.embed_dim for encoder in encoders] == [64]
    batch = data.samples(**OPTIONS, encoders=encoders).__getitem__([0])
    assert {"latents", "features_0", "tokens"} <= set(batch) and "pixels" not in batch
    # For another grid the images are there.
    assert data.features(["digits"], [None], (2, 2)) == []
    batch = data.samples(**OPTIONS, encoders=[object()]).__getitem__([0])
    assert "pixels" in batch and "features_0" not in batch
    samples = data.samples(**OPTIONS | {"num_tokens": None}, encoders=[])
    assert not {"pixels", "features_0", "tokens"} & set(samples.__getitem__([0]))
    data = load_training_data(trainer_options(None, dataset_name="digits", vae="none"))
    assert isinstance(data, TrainingData) and data.vae is None and data.features(["digits"], [None], (4, 4)) == []
    assert "pixels" in data.samples(**OPTIONS | {"latent_shape": (3, 8, 8)}).__getitem__([0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolution": 256}, "`resolution` 256: .* prepared with `resolution` 8; give that"),
        ({"vae": "stabilityai/sd-vae-ft-ema"}, "`vae` stabilityai/sd-vae-ft-ema: .* prepared with .*vae; give that"),
        ({"center_crop": False}, "`center_crop` is off, but .* has centre crops only"),
        ({"max_train_samples": 5}, "`max_train_samples` needs images"),
    ],
)
def test_options_that_contradict_the_cache(reference, change, message):
    with pytest.raises(InputError, match=message):
        load_training_data(trainer_options(reference, **change))


def test_a_cache_that_lacks_what_training_needs(tmp_path, vae_folder):
    small = {"max_train_samples": 40, "flip": None, "images": "none"}
    args = trainer_options(prepare(vae_folder, tmp_path / "cache", **small))
    data = load_training_data(args)
    assert len(data.features(["digits"], [None], (4, 4))) == 1 and not data.has_images
    with pytest.raises(InputError, match="neither images nor all features of `encoder` digits for a 2x2 grid"):
        data.features(["digits"], [None], (2, 2))
    with pytest.raises(InputError, match="`random_flip`: .* has no flipped copies; prepare one with `flip`"):
        data.samples(**OPTIONS, random_flip=True)
    with pytest.raises(InputError, match=r"makes latents of \[4, 8, 8\]"):
        data.samples(**OPTIONS | {"latent_shape": (4, 8, 8)})


# Export and import


@pytest.fixture
def exported(reference, tmp_path):
    latents_command.main(["export", "--latents_dir", str(reference), "--output_dir", str(tmp_path / "export")])
    return tmp_path / "export"


def test_export_and_import_give_the_same_bytes(reference, exported, tmp_path):
    latents_command.main(["import", "--dataset", str(exported), "--output_dir", str(tmp_path / "cache")])
    assert_same(tmp_path / "cache", reference)
    cache = LatentCache(reference)
    data = load_dataset(str(exported), split="train", cache_dir=str(tmp_path / "hf"))
    assert data.features["label"].names == cache.about["class_names"] and len(data) == ROWS
    row = data[77]
    stored = cache.arrays["latents"]
    assert row["latents"] == stored[77].tobytes() and row["latents_flipped"] == stored[ROWS + 77].tobytes()
    assert row["features_0"] == cache.arrays["features-0"][77].tobytes() and row["label"] == cache["label"][77]
    data.set_format(None)
    assert np.array_equal(np.asarray(decode_image(row["image"])), cache.pixels(77))
    # Given again, both have nothing to do.
    before = (exported / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns
    latents_command.main(["export", "--latents_dir", str(reference), "--output_dir", str(exported)])
    latents_command.main(["import", "--dataset", str(exported), "--output_dir", str(tmp_path / "cache")])
    assert (exported / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns == before


def test_damaged_exports_are_refused(reference, exported, copy, tmp_path):
    damage(copy / "latents.npy")
    with pytest.raises(InputError, match="1 of 90 chunks differ"):
        latents_command.export(
            SimpleNamespace(latents_dir=copy, output_dir=tmp_path / "no", push_to_hub=None, private=False)
        )
    other = SimpleNamespace(latents_dir=reference, output_dir=copy / "images", push_to_hub=None, private=False)
    with pytest.raises(InputError, match="holds something else"):
        latents_command.export(other)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(InputError, match="`output_dir` .* cannot be written"):
            latents_command.export(
                SimpleNamespace(latents_dir=reference, output_dir=place, push_to_hub=None, private=False)
            )
    parquet = exported / "data" / "train-00000-of-00001.parquet"
    args = SimpleNamespace(dataset=str(exported), output_dir=tmp_path / "cache", cache_dir=None)
    whole = parquet.read_bytes()
    damage(parquet)
    with pytest.raises(InputError, match="differ from their checksum|is damaged"):
        latents_command.import_(args)
    with pytest.raises(InputError, match="is not finished"):
        LatentCache(args.output_dir)
    # What was sound is not done again.
    parquet.write_bytes(whole)
    latents_command.import_(args)
    assert_same(args.output_dir, reference)
    pq.write_table(pq.read_table(parquet).drop_columns(["label"]), parquet)
    args.output_dir = tmp_path / "unlabelled"
    with pytest.raises(InputError, match="does not have the columns of an export .*label"):
        latents_command.import_(args)
    parquet.unlink()
    args.output_dir = tmp_path / "empty"
    with pytest.raises(InputError, match="ends after 0 images of 1437"):
        latents_command.import_(args)


def test_push_uploads_the_folder(reference, exported, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return SimpleNamespace(repo_id=name)

        def repo_info(self, name, **options):
            return SimpleNamespace(private=private)

        def upload_folder(self, **options):
            calls.append(options)

    private = True
    monkeypatch.setattr(latent_cache_export, "HfApi", Api)
    args = ["export", "--latents_dir", str(reference), "--output_dir", str(exported), "--push_to_hub", "me/digits"]
    latents_command.main([*args, "--private"])
    assert calls[0] == ("me/digits", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == exported and calls[1]["repo_type"] == "dataset"
    private = False
    with pytest.raises(SystemExit, match="--push_to_hub me/digits already exists and is public"):
        latents_command.main([*args, "--private"])
    assert len(calls) == 3  # nothing was uploaded
    with pytest.raises(SystemExit, match="--private has no effect without --push_to_hub"):
        latents_command.main([*args[:-2], "--private"])

    def offline(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "create_repo", offline)
    with pytest.raises(SystemExit, match="--push_to_hub me/digits: .*the Hub cannot be reached"):
        latents_command.main(args)
