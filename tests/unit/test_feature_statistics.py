# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Features of image sets computed once, the store of their statistics, and comparisons from Python."""

import logging

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image as PILImage
from safetensors.torch import save_file

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation import compare
from diffusers_vrpo.evaluation.compare import MetricSettings, compare_images, fid, open_reference
from diffusers_vrpo.evaluation.feature_statistics import (
    FeatureSet,
    collect_features,
    describe,
    known_statistics,
    measure,
    read_statistics,
    save_statistics,
    shared_statistics,
)
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder, pooled_features
from diffusers_vrpo.evaluation.image_sets import as_image_set
from diffusers_vrpo.evaluation.metrics import frechet_distance, mean_and_covariance


@pytest.fixture(autouse=True)
def one_thread():
    """More only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder():
    return load_image_encoder("digits")


@pytest.fixture(scope="module")
def state():
    return PartialState()


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_moments_and_rows_are_those_of_all_images(encoder, state):
    images = as_tensor(pictures(10))
    features = pooled_features(encoder, images)
    seen = []
    moments, rows = collect_features(
        encoder,
        (
            (torch.tensor(places), images[start : start + 5])
            for start, places in ((0, [2, -1, 0, -1, -1]), (5, [1] + [-1] * 4))
        ),
        state,
        rows_of=("pool",),
        num_rows=3,
        inspect=lambda batch, vectors: seen.append((len(batch), list(vectors))),
    )
    mean, covariance = mean_and_covariance(features)
    torch.testing.assert_close(moments["pool"].mean, mean)
    torch.testing.assert_close(moments["pool"].covariance, covariance)
    torch.testing.assert_close(rows["pool"], features[[2, 5, 0]])
    assert seen == [(5, ["pool"])] * 2


def test_images_that_are_not_finite_make_the_moments_nan(encoder, state):
    batches = [(None, as_tensor(pictures(4))), (None, None)]
    moments, rows = collect_features(encoder, batches, state)
    assert moments["pool"].mean.isnan().all() and moments["pool"].count == 5 and rows == {}


def test_a_process_without_images_has_nothing_to_add(encoder, state):
    moments, _ = collect_features(encoder, [], state)
    assert moments["pool"].count == 0 and len(moments["pool"].mean) == encoder.dim


def test_a_file_gives_back_what_was_kept(tmp_path):
    mean, covariance = mean_and_covariance(torch.randn(9, 4))
    moments = {"pool": (mean, covariance), "shallow": (mean[:2].clone(), covariance[:2, :2].clone())}
    features = FeatureSet(9, moments, torch.randn(9, 4), others={"labels": torch.arange(9)})
    save_statistics(features, {"encoder": "x"}, tmp_path / "statistics.safetensors")
    found, description = read_statistics(tmp_path / "statistics.safetensors")
    assert description == {"encoder": "x"} and found.count == 9 and found.tensors().keys() == features.tensors().keys()
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in features.tensors().items())
    assert found.moments.keys() == moments.keys() and list(found.others) == ["labels"]


@pytest.mark.parametrize(
    "description", ["", "[1]", "3", "[" * 100_000, '{"images": 3}'], ids=["empty", "list", "3", "deep", "images"]
)
def test_a_description_of_another_form_is_named(tmp_path, description):
    file = tmp_path / "x.safetensors"
    save_file({"pool.mean": torch.zeros(2)}, file, {"description": description, "count": "1"})
    with pytest.raises(InputError, match="x.safetensors is not a statistics file of this program"):
        read_statistics(file)


def test_what_is_known_is_not_computed_again(encoder, state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = as_image_set("images", pictures(6))
    file, calls = tmp_path / "new" / "statistics.safetensors", []

    def compute():
        calls.append(1)
        return measure(images, encoder, state)

    wanted = describe(images.fingerprint(), "digits", encoder, 100)
    first = shared_statistics(file, wanted, compute, state)
    again = shared_statistics(file, wanted, compute, state)
    assert len(calls) == 1 and torch.equal(first.pool, again.pool)
    # Of other images they are not.
    other = describe(as_image_set("images", pictures(6, seed=1)).fingerprint(), "digits", encoder, 100)
    assert known_statistics(file, other) is None and "of other images or another encoder" in caplog.text
    shared_statistics(file, other, compute, state)
    assert len(calls) == 2 and known_statistics(file, other) is not None


def test_a_file_that_cannot_be_written(encoder, state, tmp_path, caplog):
    (tmp_path / "occupied").write_text("")
    file, features = tmp_path / "occupied" / "statistics.safetensors", FeatureSet(5, {})
    assert shared_statistics(file, {}, lambda: features, state, on_every_process=False) is features
    assert "are not kept" in caplog.text
    with pytest.raises(InputError, match="cannot be written"):
        shared_statistics(file, {}, lambda: features, state)


def test_the_reference_of_a_run_of_version_0_1_is_computed_again(tmp_path, caplog):
    """Its validation kept `mean` and `covariance`, with other metadata."""
    file = tmp_path / "fd_reference.safetensors"
    save_file({"mean": torch.zeros(3), "covariance": torch.zeros(3, 3)}, file, {"made_of": "[1, 2]"})
    assert known_statistics(file, {}) is None and "computing them again" in caplog.text


# From Python


def test_fid_of_folders_arrays_and_features(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = {"samples": pictures(20), "reference": pictures(30, seed=1)}
    features = []
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            PILImage.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
        features.append(pooled_features(encoder, as_tensor(images)))
    expected = frechet_distance(*mean_and_covariance(features[0]), *mean_and_covariance(features[1]))
    assert fid(*features) == pytest.approx(expected)
    assert fid(*sets.values(), encoder="digits") == pytest.approx(expected, rel=1e-6)
    assert fid(tmp_path / "samples", tmp_path / "reference", encoder="digits") == pytest.approx(expected, rel=1e-6)
    assert fid(sets["samples"], tmp_path / "reference", encoder="digits") == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="its images are 6x8, those of SAMPLES 8x8"):
        fid(sets["samples"], sets["reference"][:, :, :6], encoder="digits")
    with pytest.raises(InputError, match=r"`samples` must be uint8 of the shape .*, not float64"):
        fid(sets["samples"] / 255, sets["reference"], encoder="digits")


def test_every_process_gets_the_fid(monkeypatch):
    """Only the main process of several has the result of a comparison; the others get it from there."""
    monkeypatch.setattr(compare, "compare_images", lambda *arguments, **options: None)
    monkeypatch.setattr(compare, "broadcast_object_list", lambda values: [1.5])
    assert fid(pictures(2), pictures(2, seed=1), encoder="digits") == 1.5


def test_a_comparison_of_several_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "reference.npz", pictures(30, seed=1))
    samples = as_image_set("samples", pictures(20))
    reference = open_reference(str(tmp_path / "reference.npz"), samples)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    comparison = compare_images(samples, reference, ["digits"], settings=MetricSettings(kid_subset_size=5))
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    results = comparison.metrics["digits"]
    assert {"fd", "kid", "precision", "recall", "density", "coverage"} <= set(results)
    assert results["kid_subset_size"] == 5 and comparison.encoders["digits"]["reference_count"] == 30
    with pytest.raises(
        InputError, match="`metrics` sfid: it is defined by the Inception network, not by `encoder` digits"
    ):
        compare_images(samples, reference, ["digits"], ["sfid"])
