# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo fid`: samples and their distance to a reference in one command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.commands import evaluate, fid, sample
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.official_checkpoints import default_scheduler
from support.models import tiny_model


@pytest.fixture
def run(encoder_checkpoint, tmp_path, monkeypatch):
    """`run(*options)`: the report on a tiny pipeline in the current folder, which is empty but for it and the reference."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(in_channels=3)
    VRPOPipeline(model, default_scheduler("velocity"), None).save_pretrained("model")
    Path("reference").mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(f"reference/{i}.png")
    options = "--num_images 10 --batch_size 4 --num_inference_steps 2 --metrics fid --dataloader_num_workers 0"
    common = ["model", *options.split(), "--reference_cache", "cache", "--encoder", str(encoder_checkpoint("dinov2"))]

    def call(*options, reference="reference"):
        return fid.main([*common, "--reference", reference, *options])

    return call


def distance(report: dict) -> float:
    return next(iter(report["metrics"].values()))["fd"]


def test_it_is_sample_and_evaluate(run, encoder_checkpoint, tmp_path):
    report = run("--output_file", "fid.json", "--seed", "3")
    assert (
        report["samples"]["count"] == 10 and json.loads(Path("fid.json").read_text())["metrics"] == report["metrics"]
    )
    assert not Path("model-fid").exists() and len(list(Path("reference").iterdir())) == 12

    options = "--num_images 10 --batch_size 4 --num_inference_steps 2 --seed 3 --output_dir samples"
    sample.main(["model", *options.split()])
    options = "samples --reference reference --reference_cache cache --metrics fid --dataloader_num_workers 0"
    alone = evaluate.main([*options.split(), "--encoder", str(encoder_checkpoint("dinov2"))])
    assert distance(alone) == pytest.approx(distance(report), rel=1e-6)
    # A whole set that was there is used, and stays.
    again = run("--seed", "3", "--output_dir", "samples")
    assert distance(again) == distance(alone) and len(list(Path("samples").glob("*.png"))) == 10
    run("--keep_images")
    assert len(list(Path("model-fid").glob("*.png"))) == 10


def test_an_interrupted_call_goes_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compare_images", lambda *arguments, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    Path("model-fid/000009.png").unlink()
    calls, forward = [], SiTTransformer2DModel.forward

    def counted(self, *arguments, **more):
        calls.append(0)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(SiTTransformer2DModel, "forward", counted)
    assert run()["samples"]["count"] == 10 and len(calls) == 2  # two steps of one batch
    assert not Path("model-fid").exists()


def test_what_cannot_be_measured_is_not_sampled(run):
    for options, reference, problem in (
        ([], "nowhere.npz", "`reference` nowhere.npz: the file does not exist"),
        ([], "./nowhere", "`reference` ./nowhere does not exist"),
        (["--resolution", "4"], "reference", "its images are 4x4, those of SAMPLES 8x8"),
        (["--output_file", "no/fid.json"], "reference", "the folder of `output_file` no/fid.json does not exist"),
        (["--encoder", "./nothing"], "reference", "`encoder` ./nothing"),
    ):
        args = fid.parse_args(["model", "--reference", reference, *options])
        args.encoder = args.encoder if "--encoder" in options else []
        with pytest.raises(InputError, match=problem):
            fid.fid(args)
    assert not Path("model-fid").exists()


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--metrics", "is"], "--metrics is: it is defined by the Inception network"),
        (["--metrics", "kid", "--kid_subset_size", "11"], "--metrics kid needs at least 11 images; SAMPLES has 10"),
        (
            ["--metrics", "precision_recall", "--precision_recall_k", "12"],
            "--metrics precision_recall needs at least 13",
        ),
    ],
)
def test_a_metric_that_cannot_be_computed_is_refused_before_sampling(run, options, problem):
    with pytest.raises(SystemExit, match=problem):
        run(*options)
    assert not Path("model-fid").exists()
