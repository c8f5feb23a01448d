# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo evaluate` from images to numbers, on tiny real encoders."""

import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_vrpo.commands import probe as probing
from diffusers_vrpo.commands.evaluate import main
from diffusers_vrpo.data.image_decoding import resize_and_crop
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation import metrics as evaluation
from diffusers_vrpo.evaluation.compare import choose_metrics
from diffusers_vrpo.evaluation.feature_statistics import batch_moments
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder, pooled_features
from diffusers_vrpo.evaluation.image_sets import open_images, read_npz
from diffusers_vrpo.evaluation.inception import inception_from_state
from support.paths import ROOT


def pictures(count, seed=0, side=16):
    """uint8 `[N, side, side, 3]`: smooth random colours with some noise."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(40, 215, (count, 2, 2, 3)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse]
    return (np.stack(images) + random.normal(0, 12, (count, side, side, 3))).clip(0, 255).astype(np.uint8)


def save_folder(folder, images, classes=3):
    for i, image in enumerate(images):
        path = folder / f"class {i % classes}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def run(encoder_checkpoint, tmp_path):
    """`run(samples, reference, *options)`: the report, with a tiny DINOv2 unless another encoder is named."""

    def evaluate(samples, reference, *options, encoder="dinov2"):
        arguments = [samples, "--reference_cache", tmp_path / "cache", "--dataloader_num_workers", 0, *options]
        arguments += ["--reference", reference] if reference is not None else []
        arguments += ["--encoder", encoder_checkpoint(encoder)] if "--encoder" not in options else []
        report = main([str(argument) for argument in arguments])
        return next(iter(report["metrics"].values())) if report else None

    return evaluate


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def test_numbers_are_those_of_the_features(run, encoder_checkpoint, tmp_path):
    samples, reference = pictures(70), pictures(90, seed=1)
    np.savez(tmp_path / "reference.npz", reference)
    found = run(save_folder(tmp_path / "samples", samples), tmp_path / "reference.npz", "--kid_subset_size", 40)
    encoder = load_image_encoder(str(encoder_checkpoint("dinov2")))
    order = sorted(range(70), key=lambda i: (i % 3, i))  # the folder's
    y, x = (pooled_features(encoder, as_tensor(images)) for images in (samples[order], reference))
    direct = evaluation.frechet_distance(*evaluation.mean_and_covariance(y), *evaluation.mean_and_covariance(x))
    assert found["fd"] == pytest.approx(direct, rel=1e-6)
    assert (found["kid"], found["kid_std"]) == pytest.approx(evaluation.kernel_distance(x, y, 100, 40), rel=1e-4)
    assert (found["precision"], found["recall"]) == pytest.approx(evaluation.precision_recall(x, y), abs=1e-12)
    assert (found["density"], found["coverage"]) == pytest.approx(evaluation.density_coverage(x, y), abs=1e-12)


def test_folders_and_npz_are_the_same_images(tmp_path):
    images = pictures(12)
    save_folder(tmp_path / "folder", images, classes=1)
    np.savez(tmp_path / "plain.npz", images, labels=np.arange(12))
    np.savez_compressed(tmp_path / "compressed.npz", images)
    assert isinstance(read_npz("", tmp_path / "plain.npz", "arr_0"), np.memmap)
    for name in ("folder", "plain.npz", "compressed.npz"):
        opened = open_images("SAMPLES", str(tmp_path / name))
        assert opened.size == (16, 16) and torch.equal(torch.stack([opened[i] for i in range(12)]), as_tensor(images))


def test_images_pickle_for_workers_that_are_not_forked(tmp_path):
    np.savez(tmp_path / "images.npz", pictures(40))
    folder = save_folder(tmp_path / "folder", pictures(4), classes=1)
    for images in (
        open_images("SAMPLES", str(tmp_path / "images.npz")),
        open_images("SAMPLES", str(folder)),
        open_images("--reference", str(folder), resolution=8),
        open_images("--reference", "digits", dataset_resolution=8),
    ):
        pickled = pickle.dumps(images)
        assert torch.equal(pickle.loads(pickled)[3], images[3])
        assert images.kind != ".npz" or len(pickled) < 1000  # where the pixels are, not what they are


def test_fid_of_all_images_with_one_feature_for_other_metrics(run, tmp_path):
    folders = [save_folder(tmp_path / name, pictures(12, seed)) for seed, name in enumerate("ab")]
    assert run(*folders, "--metrics", "fid", "--max_features", 1) == run(*folders, "--metrics", "fid")


def test_folders_of_samples(run, tmp_path, caplog):
    """What `vrpo sample` wrote, when it is not whole or has no image files."""
    folder = save_folder(tmp_path / "samples", pictures(30), classes=1)
    manifest = {"complete": True, "options": {"num_images": 40}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.savez(folder / "samples.npz", pictures(30))  # of --output_format both
    run(folder, folder)
    assert "unfinished" not in caplog.text and "not used" not in caplog.text
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    run(folder, folder)
    assert f"SAMPLES {folder} is an unfinished set of 40 samples; only those that exist are measured" in caplog.text
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "samples.npz", pictures(30))
    with pytest.raises(SystemExit, match="SAMPLES .*npz has no image files; give .*npz/samples.npz, which is in it"):
        run(tmp_path / "npz", folder)
    (tmp_path / "npz" / "samples.npz").unlink()
    (tmp_path / "npz" / "manifest.json").write_text((folder / "manifest.json").read_text())
    with pytest.raises(SystemExit, match="SAMPLES .*npz is an unfinished set of 40 samples; run the same command"):
        run(tmp_path / "npz", folder)


def test_a_wrong_second_encoder_costs_no_work_of_the_first(run, encoder_checkpoint, tmp_path):
    np.savez(tmp_path / "images.npz", pictures(30))
    with pytest.raises(SystemExit, match="--encoder .*nowhere: the folder does not exist"):
        run(*[tmp_path / "images.npz"] * 2, "--encoder", encoder_checkpoint("dinov2"), tmp_path / "nowhere")
    assert not (tmp_path / "cache").exists()  # where the statistics of the reference go


def test_numbers_are_printed_before_files_are_written(run, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "images.npz", pictures(30))

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=r"--output_file .*a.json cannot be written \(No space left"):
        run(tmp_path / "images.npz", tmp_path / "images.npz", "--output_file", tmp_path / "a.json")
    assert "coverage" in capsys.readouterr().out


def test_the_embedded_digits_are_a_reference():
    opened = open_images("--reference", "digits", dataset_resolution=8)
    assert opened.size == (8, 8) and opened[0].shape == (3, 8, 8) and len(opened) > 1000


def test_a_set_has_no_distance_to_itself(run, tmp_path):
    np.savez(tmp_path / "images.npz", pictures(60))
    found = run(tmp_path / "images.npz", tmp_path / "images.npz")
    assert found["fd"] < 1e-6 and found["precision"] == found["recall"] == found["coverage"] == 1


def test_references_are_cropped_and_may_be_data_sets(run, tmp_path):
    """A data set, a folder and an .npz of the same cropped images give the same numbers."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    np.savez(tmp_path / "samples.npz", pictures(40))
    wide = [np.concatenate([a, b], axis=1) for a, b in zip(pictures(40, 1, 24), pictures(40, 2, 24))]
    np.savez(tmp_path / "cropped.npz", np.stack([resize_and_crop(Image.fromarray(image), 16) for image in wide]))
    folder = save_folder(tmp_path / "folder", wide, classes=1)
    column = {"picture": [Image.fromarray(image) for image in wide]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(column, Features({"picture": ImageFeature()})).to_parquet(tmp_path / "data" / "train.parquet")
    options = ["--metrics", "fid", "precision_recall"]
    expected = run(tmp_path / "samples.npz", tmp_path / "cropped.npz", *options)
    assert run(tmp_path / "samples.npz", folder, "--resolution", 16, *options) == pytest.approx(expected, rel=1e-9)
    data = [tmp_path / "data", "--image_column", "picture", *options]
    assert run(tmp_path / "samples.npz", *data) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(SystemExit, match="48x24, those of SAMPLES 16x16; --resolution 16 crops the reference to it"):
        run(tmp_path / "samples.npz", folder)
    with pytest.raises(SystemExit, match="--image_column 'image' is not a column of images .*; these are: 'picture'"):
        run(tmp_path / "samples.npz", tmp_path / "data")
    with pytest.raises(SystemExit, match="--reference_split 'test' is not in .*; it has 'train'"):
        run(tmp_path / "samples.npz", *data, "--reference_split", "test")


def test_statistics_of_the_reference_are_kept(run, tmp_path, caplog):
    np.savez(tmp_path / "samples.npz", pictures(30))
    reference = save_folder(tmp_path / "reference", pictures(40, seed=1))
    caplog.set_level("INFO")
    first = run(tmp_path / "samples.npz", reference)
    assert "are kept in" in caplog.text and len([*(tmp_path / "cache").iterdir()]) == 1
    caplog.clear()
    assert run(tmp_path / "samples.npz", reference) == first
    assert "are read from" in caplog.text and "are kept in" not in caplog.text

    # Other images, another encoder: other statistics.
    caplog.clear()
    Image.fromarray(pictures(1, seed=9)[0]).save(reference / "class 0" / "00000.png")
    changed = run(tmp_path / "samples.npz", reference)
    assert "are kept in" in caplog.text and changed["fd"] != first["fd"]
    run(tmp_path / "samples.npz", reference, encoder="vit")
    assert len([*(tmp_path / "cache").iterdir()]) == 3

    # Where they cannot be kept, the numbers are there all the same.
    for file in (tmp_path / "cache").iterdir():
        (tmp_path / "taken" / file.name).mkdir(parents=True)
    assert run(tmp_path / "samples.npz", reference, "--reference_cache", tmp_path / "taken") == changed
    assert "are not kept" in caplog.text
    (tmp_path / "file").write_text("")
    for place in ("file", "file/x", "/proc/x"):
        with pytest.raises(
            SystemExit, match="--reference_cache .* (is not a folder|cannot be written .*); choose another place"
        ):
            run(tmp_path / "samples.npz", reference, "--reference_cache", tmp_path / place)

    # A torn file is made again.
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    caplog.clear()
    assert run(tmp_path / "samples.npz", reference) == changed
    assert "computing them again" in caplog.text


def test_a_statistics_file_is_a_reference(run, tmp_path, monkeypatch):
    np.savez(tmp_path / "samples.npz", pictures(30))
    np.savez(tmp_path / "reference.npz", pictures(40, seed=1))
    file = tmp_path / "statistics.safetensors"
    expected = run(tmp_path / "samples.npz", tmp_path / "reference.npz", "--save_reference", file)
    assert run(tmp_path / "samples.npz", file) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(tmp_path / "samples.npz", "~/statistics.safetensors") == expected
    with pytest.raises(SystemExit, match="--image_column picture needs a data set, which .* is not; remove it"):
        run(tmp_path / "samples.npz", file, "--image_column", "picture")
    with pytest.raises(SystemExit, match="is of another encoder or other weights .*; give the images instead"):
        run(tmp_path / "samples.npz", file, encoder="vit")
    with pytest.raises(SystemExit, match="is of another vector of the encoder"):
        run(tmp_path / "samples.npz", file, "--pooling", "mean")
    np.savez(tmp_path / "large.npz", pictures(30, side=20))
    with pytest.raises(SystemExit, match=r"is of images of \[16, 16\], SAMPLES are \[20, 20\]"):
        run(tmp_path / "large.npz", file)
    file.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="is not a statistics file of this program"):
        run(tmp_path / "samples.npz", file)


def test_a_subset_of_the_features(run, tmp_path):
    """FID takes all images, the neighbours only some."""
    np.savez(tmp_path / "samples.npz", pictures(30))
    np.savez(tmp_path / "reference.npz", pictures(40, seed=1))
    every = run(tmp_path / "samples.npz", tmp_path / "reference.npz")
    some = run(tmp_path / "samples.npz", tmp_path / "reference.npz", "--max_features", 20)
    assert some["fd"] == pytest.approx(every["fd"], rel=1e-9) and some["kid_subset_size"] == 10
    assert some["precision"] * 20 == pytest.approx(round(some["precision"] * 20))


def frechet_of_features(y, x):
    """Of few images, by the singular values of the product of the centred features: no matrix of D x D."""
    y, x = y.double(), x.double()
    centred = [(f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (y, x)]
    traces = sum(f.square().sum() for f in centred)
    root_trace = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return ((y.mean(0) - x.mean(0)).square().sum() + traces - 2 * root_trace).item()


@pytest.mark.slow
def test_reference_batch_of_adm(run, inception_weights, tmp_path):
    """Its moments give FID and sFID, its images precision and recall."""
    save_file(inception_weights, tmp_path / "inception.safetensors")
    samples, reference = pictures(4), pictures(5, seed=1)
    np.savez(tmp_path / "samples.npz", samples)
    model = inception_from_state(inception_weights)
    features, known = model(as_tensor(samples)), model(as_tensor(reference))
    moments, others = {}, {}
    for name, suffix in (("pool", ""), ("spatial", "_s")):
        others[name] = known[name] + 0.1  # not those of arr_0
        mu, sigma = evaluation.mean_and_covariance(others[name])
        moments |= {f"mu{suffix}": mu.numpy(), f"sigma{suffix}": sigma.numpy()}
    np.savez(tmp_path / "VIRTUAL.npz", reference, **moments)
    np.savez(tmp_path / "moments.npz", **moments)
    options = ["--encoder", "inception", "--inception_weights", tmp_path / "inception.safetensors"]
    options += ["--inception_score_splits", 2, "--no-shuffle", "--plot_file", tmp_path / "plot.png", "--metrics"]
    found = run(tmp_path / "samples.npz", tmp_path / "VIRTUAL.npz", *options, "sfid", "is", "precision_recall")
    assert found["sfid"] == pytest.approx(frechet_of_features(features["spatial"], others["spatial"]), rel=1e-4)
    score = evaluation.inception_score(features["logits"], 2)
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(score, rel=1e-4)
    neighbours = evaluation.precision_recall(known["pool"], features["pool"])
    assert (found["precision"], found["recall"]) == pytest.approx(neighbours)
    assert Image.open(tmp_path / "plot.png").width > 500

    # Statistics alone are enough for FID and sFID, and not for the rest.
    assert choose_metrics(None, "inception", has_images=False, has_spatial=True) == ["fid", "sfid", "is"]
    assert choose_metrics(None, "inception", has_images=False, has_spatial=False) == ["fid", "is"]
    for name, (mu, sigma) in batch_moments(str(tmp_path / "moments.npz")).items():
        direct = evaluation.mean_and_covariance(others[name])
        assert torch.equal(mu, direct[0]) and torch.equal(sigma, direct[1])
    with pytest.raises(SystemExit, match="--reference_split test needs a data set, which .*moments.npz is not"):
        run(tmp_path / "samples.npz", tmp_path / "moments.npz", *options[:-1], "--reference_split", "test")
    with pytest.raises(SystemExit, match="--metrics kid: the reference has statistics only; it needs images"):
        run(tmp_path / "samples.npz", tmp_path / "moments.npz", *options, "kid")
    with pytest.raises(SystemExit, match="has no images, only statistics of Inception features; give images"):
        run(tmp_path / "samples.npz", tmp_path / "moments.npz")


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, encoder_checkpoint, digits_pipeline, tmp_path, trainers):
    """Evaluation and probing, one after the other, as a launcher starts them."""
    np.savez(tmp_path / "samples.npz", pictures(45))
    np.savez(tmp_path / "reference.npz", pictures(38, seed=1))
    # Two batches of samples, one of the reference: a process has none.
    evaluated = [tmp_path / "samples.npz", "--reference", tmp_path / "reference.npz", "--batch_size", 40]
    evaluated += ["--encoder", encoder_checkpoint("dinov2"), "--output_file", tmp_path / "evaluate.json"]
    evaluated += ["--reference_cache", tmp_path / "another cache"]
    probed = [digits_pipeline, "--dataset_name", "digits", "--num_train", 200, "--num_test", 50, "--timesteps", 0.1]
    probed += ["--batch_size", 40, "--encoder", encoder_checkpoint("dinov2"), "--output_file", tmp_path / "probe.json"]
    script = "import runpy, sys\n"
    for name, arguments in (("evaluate", evaluated), ("probe", probed)):
        script += f"sys.argv = {[name, *map(str, arguments), '--dataloader_num_workers', '0']}\n"
        script += f"runpy.run_module('diffusers_vrpo.commands.{name}', run_name='__main__')\n"
    (tmp_path / "both.py").write_text(script)
    output = trainers([], program=str(tmp_path / "both.py"), processes=2).finish()
    assert output.count("precision") == 1  # the main process alone prints
    two = next(iter(json.loads((tmp_path / "evaluate.json").read_text())["metrics"].values()))
    assert two == pytest.approx(
        run(tmp_path / "samples.npz", tmp_path / "reference.npz", "--batch_size", 16), rel=1e-9
    )

    one = probing.main([*map(str, probed), "--dataloader_num_workers", "0"])
    two = json.loads((tmp_path / "probe.json").read_text())
    assert two["accuracy"] == one["accuracy"] and two["encoder_accuracy"] == one["encoder_accuracy"]
    for name, values in one["cknna"].items():
        assert two["cknna"][name][0] == pytest.approx(values[0], abs=1e-9)


def test_bad_input_ends_in_a_sentence(run, tmp_path, capsys):
    images = pictures(20)
    np.savez(tmp_path / "good.npz", images)
    good = tmp_path / "good.npz"

    def npz(array):
        file = tmp_path / f"{len([*tmp_path.iterdir()])}.npz"
        np.savez(file, array)
        return file

    folder = save_folder(tmp_path / "mixed", images[:3])
    Image.new("RGB", (20, 16)).save(folder / "z.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    flat = np.full_like(images, 128)
    for samples, reference, options, message in (
        (tmp_path / "nowhere", good, [], "SAMPLES .*nowhere does not exist"),
        (tmp_path / "empty", good, [], "the folder has no images"),
        (tmp_path / "broken", good, [], "a.png is not an image that can be read"),
        (good, tmp_path / "nowhere.npz", [], "--reference .*nowhere.npz: the file does not exist"),
        (folder, good, [], r"several sizes \(00000.png is 16x16, z.png 20x16\)"),
        (npz(images.astype(np.float32)), good, [], "arr_0 must be uint8 .* not float32"),
        (npz(images[0]), good, [], r"not uint8 \[16, 16, 3\]"),
        (npz(np.array([{}])), good, [], "arr_0 cannot be read"),
        (npz(images[:1]), good, [], "--metrics fid needs at least 2 images; SAMPLES has 1 image"),
        (npz(images[:3]), good, [], "--metrics precision_recall needs at least 4 images; SAMPLES has 3 images"),
        (
            good,
            good,
            ["--precision_recall_k", 50],
            "at least 51 images; .*, or a smaller --precision_recall_k than 50",
        ),
        (good, npz(images[:5]), [], "--metrics density_coverage needs at least 6 images; --reference has 5 images"),
        (good, good, ["--kid_subset_size", 21], "--metrics kid needs at least 21 images"),
        (npz(flat), good, [], "all 20 images are of one colour; did the decoder give NaN"),
        (npz(np.repeat(images[:1], 20, 0)), good, [], "features of all 20 images are equal"),
        (good, good, ["--metrics", "is"], "is defined by the Inception network, not by --encoder"),
        (good, npz(pictures(20, side=20)), [], "its images are 20x20, those of SAMPLES 16x16$"),
        (
            good,
            good,
            ["--encoder", "inception", "--inception_weights", good],
            "is not the network that defines FID",
        ),
        (good, good, ["--resolution", 16], "--resolution 16: .*good.npz is used as it is"),
        (good, good, ["--reference_split", "test"], "--reference_split test needs a data set"),
        (good, good, ["--output_file", tmp_path / "no" / "a.json"], "does not exist; create it, or choose another"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(samples, reference, *options)

    for arguments, message in (
        (["x"], "--reference is missing"),
        (["x", "--reference", "y", "--kid_subset_size", "1"], "--kid_subset_size 1 must be at least 2"),
        (["x", "--reference", "y", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["x", "--reference", "y", "--save_reference", "z"], "must end in .safetensors"),
        (["x", "--reference", "y", "--pooling", "mean"], "--pooling mean cannot be combined with --encoder inception"),
        (["x", "--reference", "y", "--metrics", "fd"], "invalid choice: 'fd'"),
        (["x", "--metrics", "is", "--image_column", "y"], "--image_column y has no effect without --reference"),
        (["x", "--reference", "y.safetensors", "--encoder", "a", "b"], "has the statistics of one encoder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_features_that_are_not_finite(run, encoder_checkpoint, tmp_path):
    from diffusers_vrpo.evaluation.feature_statistics import measure
    from diffusers_vrpo.training.distributed import start_processes

    np.savez(tmp_path / "images.npz", pictures(6))
    encoder = load_image_encoder(str(encoder_checkpoint("dinov2")))
    encoder.model.layernorm.weight.data[0] = torch.nan
    images = open_images("SAMPLES", str(tmp_path / "images.npz"))
    with pytest.raises(InputError, match="the encoder's features of images 0 to 3 are not finite"):
        measure(images, encoder, start_processes(), batch_size=4)


@pytest.mark.slow
def test_order_on_real_images(shared):
    """Real images are nearer to other real ones, of training or validation, than noisy ones or a few classes are."""
    spec = importlib.util.spec_from_file_location("metric_sanity", ROOT / "benchmarks" / "metric_sanity.py")
    sanity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanity)
    from diffusers_vrpo.data.image_datasets import load_image_dataset

    splits = [
        load_image_dataset(str(shared / "data" / "tiny-imagenet-100"), split=s)[0] for s in ("train", "validation")
    ]
    encoder = load_image_encoder(str(shared / "encoders" / "efficientnet-lite2"))
    encoder.input_size = (64, 64)
    sets = sanity.build_sets(*splits, count=140)
    kept = ("train A (reference)", "train B", "validation", "noise 25", "1/10 of the classes")
    rows = sanity.compare(encoder, {name: sets[name] for name in kept})
    fd = {name: values["fd"] for name, values in rows.items()}
    assert max(fd["train B"], fd["validation"]) < min(fd["noise 25"], fd["1/10 of the classes"])
    for name, values in rows.items():
        same = name in ("train B", "validation")
        assert (abs(values["kid"]) < 2 * values["kid_std"]) if same else (values["kid"] > 2 * values["kid_std"])
    assert rows["noise 25"]["recall"] < 0.5 * rows["train B"]["recall"]
