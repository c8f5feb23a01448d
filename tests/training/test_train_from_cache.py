# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training from prepared latents: the same run as from the images, with the encoder's features computed or cached."""

import shutil

import pytest

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.metrics import read_metrics
from support.models import tiny_vae
from support.training import losses, run, train_vrpo


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An autoencoder of 8 x 8 to 4 x 4, and digits encoded with it: with features, and with images alone."""
    root = tmp_path_factory.mktemp("cache")
    tiny_vae("kl").save_pretrained(root / "vae")
    for name, more in (("features", ["--encoder", "digits", "--patch_size", "1"]), ("images", [])):
        argv = ["--dataset_name", "digits", "--vae", str(root / "vae"), "--resolution", "8", "--flip"]
        prepare_latents.main([*argv, "--output_dir", str(root / name), "--dataloader_num_workers", "0", *more])
    return root


@pytest.mark.slow
def test_the_losses_are_those_of_training_from_images(command, folders, tmp_path):
    changes = {"model_config": None, "preset": "SiT-XS/1", "max_train_steps": 4}
    fd = {"fd_encoder": "digits", "num_fd_samples": 32}
    run(command(**changes, **fd, vae=folders / "vae") + ["--random_flip"])
    rows = {"run": read_metrics(tmp_path / "run" / "metrics.jsonl")}
    for name in ("features", "images"):
        cached = {"dataset_name": None, "vae": None, "latents_dir": folders / name, "output_dir": tmp_path / name}
        run(command(**changes, **cached, **(fd if name == "images" else {})) + ["--random_flip"])
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        for expected, row in zip(rows["run"], rows[name], strict=True):
            for key in ("loss_fm", "reward/semantic", "reward/structural"):
                assert row[key] == pytest.approx(expected[key], abs=2e-3), key
    assert rows["images"][-1]["validation/fd_digits"] == pytest.approx(
        rows["run"][-1]["validation/fd_digits"], rel=2e-2
    )
    # The pipeline decodes with the autoencoder that the cache names, and knows the classes.
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "features")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("seven", num_inference_steps=1).images[0].size[0] >= 8


@pytest.mark.slow
def test_pixels_with_features_in_a_cache(command, tmp_path):
    argv = ["--dataset_name", "digits", "--vae", "none", "--encoder", "digits", "--resolution", "8"]
    prepare_latents.main([*argv, "--output_dir", str(tmp_path / "cache"), "--dataloader_num_workers", "0"])
    run(command())
    expected = read_metrics(tmp_path / "run" / "metrics.jsonl")
    run(command(dataset_name=None, vae=None, latents_dir=tmp_path / "cache", output_dir=tmp_path / "cached"))
    for row, cached in zip(expected, read_metrics(tmp_path / "cached" / "metrics.jsonl"), strict=True):
        for key in ("loss_fm", "reward/semantic", "reward/structural"):
            assert cached[key] == pytest.approx(row[key], abs=2e-3), key
    assert VRPOPipeline.from_pretrained(tmp_path / "cached").vae is None


@pytest.mark.slow
def test_another_cache_does_not_continue_the_run(command, folders, tmp_path):
    changes = {"model_config": None, "preset": "SiT-XS/1", "dataset_name": None, "vae": None, "max_train_steps": 2}
    run(command(**changes, latents_dir=folders / "features"))
    moved = shutil.copytree(folders / "features", tmp_path / "moved")
    run(command(**{**changes, "max_train_steps": 3}, latents_dir=moved))
    assert len(losses(tmp_path / "run")) == 3
    with pytest.raises(InputError, match="the checksum of `latents_dir` is"):
        run(command(**{**changes, "max_train_steps": 4}, latents_dir=folders / "images"))


def test_a_cache_and_images_exclude_each_other(command, capsys):
    with pytest.raises(SystemExit):
        train_vrpo.parse_args(command(latents_dir="somewhere"))
    assert "give either --dataset_name or --train_data_dir or --latents_dir" in capsys.readouterr().err
    with pytest.raises(InputError, match="`latents_dir` nowhere"):
        run(command(dataset_name=None, latents_dir="nowhere"))
