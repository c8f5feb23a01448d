# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo sample`: what is written, that it depends on (seed, index) alone, and what is refused."""

import functools
import importlib
import json
import shutil
import signal
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models import modeling_utils
from PIL import Image

from diffusers_vrpo import SiTSDEScheduler, SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.commands import sample, sample_options
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.models.official_checkpoints import default_scheduler
from diffusers_vrpo.pipelines import sampling
from diffusers_vrpo.pipelines.sample_folder import write_npz
from support.models import needs_compiler, tiny_model, tiny_vae
from support.paths import ROOT
from support.pipelines import FLOW_SIGMAS, NAMES, quiet_pipeline


KINDS = {
    "velocity": {"in_channels": 3},
    "latents": {"in_channels": 4},
    "epsilon": {"in_channels": 3, "prediction_type": "epsilon", "learn_sigma": True},
    "grey": {"in_channels": 1, "class_dropout_prob": 0.0},
}


@pytest.fixture(autouse=True)
def one_thread():
    """As the subprocesses have: kernels round differently with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a pipeline of every kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind, config in KINDS.items():
        model = tiny_model(**config)
        scheduler = default_scheduler(model.config.prediction_type)
        vae = tiny_vae("kl").eval() if kind == "latents" else None
        VRPOPipeline(model, scheduler, vae, NAMES).save_pretrained(folder / kind)
    return folder


def argv(pipeline, output_dir, **changes) -> list[str]:
    options = {"num_images": 10, "batch_size": 4, "num_inference_steps": 3, "output_dir": output_dir, **changes}
    words = [str(pipeline)]
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words


def run(pipeline, output_dir, **changes) -> Path:
    sample.main(argv(pipeline, output_dir, **changes))
    return Path(output_dir)


def refused(pipeline, output_dir, **changes) -> str:
    with pytest.raises(SystemExit) as error:
        run(pipeline, output_dir, **changes)
    assert error.value.code and "\n" not in str(error.value.code)
    return str(error.value.code)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pngs(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


SAMPLE = "diffusers_vrpo.commands.sample"


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """Fills with the batch size of every call of a transformer."""
    sizes, forward = [], SiTTransformer2DModel.forward

    def counted(self, hidden_states, *args, **kwargs):
        sizes.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SiTTransformer2DModel, "forward", counted)
    return sizes


# What is written


def test_the_files_and_the_manifest(models, tmp_path):
    folder = run(models / "latents", tmp_path / "out", output_format="both", guidance_interval=(0.1, 0.6), seed=3)
    names = [f"{i:06d}.png" for i in range(10)]
    assert sorted(contents(folder)) == [*names, "manifest.json", "samples.npz"]
    with np.load(folder / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (10, 16, 16, 3) and images.std() > 10
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert np.array_equal(pngs(folder), images)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["labels"] == labels.tolist()
    assert manifest["pipeline"] == str(models / "latents") and manifest["versions"]["torch"] == torch.__version__
    options = manifest["options"]
    assert options["seed"] == 3 and options["guidance_interval"] == [0.1, 0.6] and options["guidance_scale"] == 1.5
    assert options["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler" and options["guidance_channels"] == 4
    # Without PNG files the same .npz file, byte for byte.
    alone = run(models / "latents", tmp_path / "npz", output_format="npz", guidance_interval=(0.1, 0.6), seed=3)
    assert sorted(contents(alone)) == ["manifest.json", "samples.npz"]
    assert (alone / "samples.npz").read_bytes() == (folder / "samples.npz").read_bytes()


def test_the_header_of_the_npz_is_as_adms_evaluator_reads_it(models, tmp_path):
    folder = run(models / "velocity", tmp_path / "out", output_format="npz")
    with zipfile.ZipFile(folder / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((10, 8, 8, 3), False, np.dtype(np.uint8))
        assert len(file.read()) == 10 * 8 * 8 * 3


@pytest.mark.parametrize(
    "kind, sampler, scheduler",
    [
        ("latents", "ode", FlowMatchEulerDiscreteScheduler()),
        ("latents", "heun", FlowMatchHeunDiscreteScheduler()),
        ("velocity", "dpmsolver++", DPMSolverMultistepScheduler(**FLOW_SIGMAS)),
        ("velocity", "unipc", UniPCMultistepScheduler(**FLOW_SIGMAS)),
        ("latents", "sde", SiTSDEScheduler()),
        ("epsilon", "default", DDIMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="trailing")),
        ("epsilon", "ddim", DDIMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="trailing")),
        (
            "epsilon",
            "ddpm",
            DDPMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="linspace", variance_type="learned_range"),
        ),
        ("epsilon", "dpmsolver++", DPMSolverMultistepScheduler()),
        ("epsilon", "unipc", UniPCMultistepScheduler()),
    ],
)
def test_image_i_is_what_the_pipeline_gives_from_its_noise(models, tmp_path, kind, sampler, scheduler):
    folder = run(models / kind, tmp_path / "out", sampler=sampler, seed=7, num_inference_steps=5, guidance_scale=2.0)
    pipeline = VRPOPipeline.from_pretrained(models / kind)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    indices = range(4, 8)  # the second batch
    images = pipeline(
        [i % 5 for i in indices],
        latents=torch.stack([sampling.start_noise(7, i, (KINDS[kind]["in_channels"], 8, 8)) for i in indices]),
        generator=[sampling.step_generator(7, i) for i in indices],
        num_inference_steps=5,
        guidance_scale=2.0,
    ).images
    assert np.array_equal(pngs(folder)[4:8], np.stack([np.asarray(image) for image in images]))


def test_grey_images_without_a_null_class(models, tmp_path, rows):
    images = pngs(run(models / "grey", tmp_path / "out"))
    assert images.shape == (10, 8, 8, 3) and (images == images[..., :1]).all() and images.std() > 10
    assert rows == [4] * 9  # three batches of three steps, unguided


def test_labels(models, tmp_path):
    def labels(**changes):
        folder = run(models / "velocity", tmp_path / "out", overwrite=True, num_inference_steps=1, **changes)
        return json.loads((folder / "manifest.json").read_text())["labels"]

    assert labels(labels=["great white shark", 1, "Goldfish"]) == [4, 1, 0] * 3 + [4]
    drawn = labels(class_balance="random", num_images=300, batch_size=300)
    assert drawn == labels(class_balance="random", num_images=300, batch_size=300)
    assert min(drawn.count(c) for c in range(5)) > 30 and drawn != labels(num_images=300, batch_size=300)
    assert drawn != labels(class_balance="random", num_images=300, batch_size=300, seed=1)
    assert set(labels(class_balance="random", labels=[2, "tench"], num_images=100, batch_size=100)) == {2, 3}


def test_the_shift_of_the_pipelines_scheduler_is_kept():
    config = tiny_model().config
    for sampler in ("ode", "heun"):
        assert sampling.SAMPLERS["velocity"][sampler](config, {"shift": 3.0}).config.shift == 3.0
    for sampler in ("dpmsolver++", "unipc"):
        assert sampling.SAMPLERS["velocity"][sampler](config, {"shift": 3.0}).config.flow_shift == 3.0
    config = tiny_model(prediction_type="epsilon").config
    for sampler in sampling.SAMPLERS["epsilon"]:
        scheduler = sampling.SAMPLERS["epsilon"][sampler](
            config, {"beta_schedule": "scaled_linear", "beta_end": 0.012}
        )
        assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.beta_end == 0.012


def test_the_command_line_names_the_samplers():
    names = dict.fromkeys(("default", *sampling.SAMPLERS["velocity"], *sampling.SAMPLERS["epsilon"]))
    assert tuple(names) == sample_options.SAMPLER_NAMES


def test_a_sampler_is_a_name_and_a_row(models, tmp_path, monkeypatch):
    row = {"euler_with_shift": lambda config, own: FlowMatchEulerDiscreteScheduler(shift=2.0)}
    monkeypatch.setitem(sampling.SAMPLERS, "velocity", sampling.SAMPLERS["velocity"] | row)
    monkeypatch.setattr(sample_options, "SAMPLER_NAMES", (*sample_options.SAMPLER_NAMES, *row))
    run(models / "velocity", tmp_path / "mine", sampler="euler_with_shift", num_images=2)
    run(models / "velocity", tmp_path / "ode", sampler="ode", num_images=2)
    assert not np.array_equal(pngs(tmp_path / "mine"), pngs(tmp_path / "ode"))


# The unconditional half


@pytest.mark.parametrize(
    "kind, sampler, steps, guided",
    [
        # t = 1, 0.9, ..., 0.1: guided are 0.7 ... 0.3.
        ("velocity", "ode", 10, [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]),
        # Two evaluations a step, both by the t it starts from: 1, 0.8, 0.6, 0.4, 0.2; the last has one.
        ("velocity", "heun", 5, [0, 0, 0, 0, 1, 1, 1, 1, 0]),
        # t = 1, 0.76, 0.52, 0.28, 0.04.
        ("velocity", "sde", 5, [0, 0, 1, 0, 0]),
    ],
)
def test_the_rows_that_the_model_evaluates(models, tmp_path, rows, kind, sampler, steps, guided):
    options = {"sampler": sampler, "num_inference_steps": steps, "num_images": 6}
    run(models / kind, tmp_path / "some", guidance_interval=(0.3, 0.7), **options)
    # Two batches of four, the last one padded; rows of the class, and as many of no class where it is guided.
    assert rows == [4 * (1 + g) for g in guided] * 2
    rows.clear()
    run(models / kind, tmp_path / "all", **options)
    assert rows == [8] * len(guided) * 2
    rows.clear()
    run(models / kind, tmp_path / "none", guidance_scale=1, **options)
    assert rows == [4] * len(guided) * 2


def test_the_rows_of_noise_predicting_models_go_by_the_noise_level(models, tmp_path, rows):
    run(models / "epsilon", tmp_path / "out", num_inference_steps=10, num_images=4, guidance_interval=(0.3, 0.7))
    alpha_bar = DDPMScheduler(**ddpm.SCHEDULER_CONFIG).alphas_cumprod[torch.arange(999, 0, -100)]
    t = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    assert rows == [8 if 0.3 <= value <= 0.7 else 4 for value in t.tolist()] and 0 < rows.count(8) < 10


# A function of (seed, index)


@pytest.fixture(scope="module")
def reference(models, tmp_path_factory) -> Path:
    """Samples of an uninterrupted process, with noise in every step."""
    torch.set_num_threads(1)
    return run(models / "latents", tmp_path_factory.mktemp("reference") / "out", **REFERENCE)


REFERENCE = {"sampler": "sde", "output_format": "both", "num_images": 21, "num_inference_steps": 20}


@pytest.mark.slow
def test_two_processes_write_the_same(models, reference, tmp_path, trainers):
    trainers(argv(models / "latents", tmp_path / "out", **REFERENCE), program=SAMPLE, processes=2).finish()
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.slow
def test_killed_and_continued(models, reference, tmp_path, trainers):
    # So many steps that the kill comes in time: the images are others, which an uninterrupted run is compared with.
    options = {**REFERENCE, "num_inference_steps": 120}
    folder = tmp_path / "out"
    process = trainers(argv(models / "latents", folder, **options), program=SAMPLE)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("0*.png"))) < 5:
        assert time.monotonic() < deadline, process.log.read_text()[-3000:]
        time.sleep(0.005)
    process.kill()
    assert process.wait() == [-signal.SIGKILL]
    before = contents(folder)
    assert 5 <= len(list(folder.glob("0*.png"))) < 21 and not json.loads(before["manifest.json"])["complete"]
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    run(models / "latents", folder, **options)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert contents(folder) == contents(run(models / "latents", tmp_path / "whole", **options))


def test_one_process_reads_the_weights_for_their_checksum(models, tmp_path, monkeypatch):
    pipeline = VRPOPipeline.from_pretrained(models / "velocity")
    args = sample_options.parse_args(argv(models / "velocity", tmp_path))
    read = []
    monkeypatch.setattr(sample, "checksum", lambda pipeline: read.append(pipeline) or 1)
    for is_main, expected in ((True, 1), (False, None)):
        state = SimpleNamespace(is_main_process=is_main, device=torch.device("cpu"))
        manifest = sample.build_manifest(pipeline, args, {}, [0], state)
        assert manifest["pipeline_checksum"] == expected
    assert read == [pipeline]


@pytest.mark.parametrize("output_format", ["both", "npz"])
def test_only_what_is_missing_is_computed(models, tmp_path, rows, output_format):
    options = {"output_format": output_format, "guidance_scale": 1.0}
    folder = run(models / "velocity", tmp_path / "out", **options)
    expected = contents(folder)
    assert len(rows) == 9
    rows.clear()
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".json"}
    run(models / "velocity", folder, **options)
    assert not rows and contents(folder) == expected
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    # As if stopped after the first batch and amid the second: traces of a kill and of a power failure.
    manifest = json.loads(expected["manifest.json"])
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    (folder / "samples.npz").unlink()
    if output_format == "both":
        (folder / "000005.png").unlink()
        (folder / "000006.png").write_bytes(expected["000006.png"][:-20])
        (folder / ".000007.png.1234.tmp").write_bytes(b"half")
        (folder / "000009.png").write_bytes(b"")
    else:
        (folder / "parts").mkdir()
        with np.load(run_npz(models, tmp_path)) as archive:
            np.save(folder / "parts" / "000000.npy", archive["arr_0"][:4])
        (folder / "parts" / ".000001.npy.1234.tmp").write_bytes(b"half")
    rows.clear()
    run(models / "velocity", folder, **options)
    assert len(rows) == 6 and contents(folder) == expected


def run_npz(models, tmp_path) -> Path:
    return run(models / "velocity", tmp_path / "npz", output_format="npz", guidance_scale=1.0) / "samples.npz"


def test_more_images_of_the_same_kind(models, tmp_path, rows):
    options = {"output_format": "both", "num_inference_steps": 2, "guidance_scale": 1.0}
    whole = run(models / "velocity", tmp_path / "whole", **options)
    grown = run(models / "velocity", tmp_path / "grown", **{**options, "num_images": 5})
    assert len(list(grown.glob("*.png"))) == 5
    rows.clear()
    run(models / "velocity", grown, **options)
    assert rows == [4] * 4  # the first batch was whole
    assert contents(grown) == contents(whole)
    assert "--num_images was 10 and is 6" in refused(models / "velocity", grown, **{**options, "num_images": 6})
    npz = run(models / "velocity", tmp_path / "npz", **{**options, "num_images": 5, "output_format": "npz"})
    assert "--num_images was 5 and is 10" in refused(models / "velocity", npz, **{**options, "output_format": "npz"})


def test_another_batch_size_changes_a_rounding_at_most(models, tmp_path):
    options = {"sampler": "sde", "num_images": 48, "num_inference_steps": 10, "guidance_scale": 3.0}
    one = pngs(run(models / "latents", tmp_path / "one", batch_size=48, **options)).astype(int)
    for size in (1, 5, 32):
        other = pngs(run(models / "latents", tmp_path / str(size), batch_size=size, **options)).astype(int)
        difference = np.abs(one - other)
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    assert one.std() > 10 and np.abs(one[0] - one[5]).max() > 10  # of one class, from other noise


def test_streams_of_noise():
    shape = (4, 16, 16)
    noises = [sampling.start_noise(seed, i, shape) for seed in (0, 1) for i in range(20)]
    noises += [torch.randn(shape, generator=sampling.step_generator(seed, i)) for seed in (0, 1) for i in range(20)]
    noises = torch.stack(noises).flatten(1).double()
    assert noises.dtype == torch.float64 and abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02
    correlation = torch.corrcoef(noises) - torch.eye(80)
    assert correlation.abs().max() < 5 / noises.shape[1] ** 0.5
    assert torch.equal(sampling.start_noise(2**63 - 1, 3, shape), sampling.start_noise(2**63 - 1, 3, shape))
    assert len({sampling.step_generator(5, i).initial_seed() for i in range(2000)}) == 2000


# Computation


def test_bfloat16_is_close_and_latents_stay_float32(models, tmp_path, monkeypatch):
    seen, warnings = set(), []
    step = SiTSDEScheduler.step

    @functools.wraps(step)
    def watched(self, prediction, timestep, latents, *args, **kwargs):
        seen.update([prediction.dtype, latents.dtype])
        return step(self, prediction, timestep, latents, *args, **kwargs)

    monkeypatch.setattr(SiTSDEScheduler, "step", watched)
    monkeypatch.setattr(modeling_utils.logger, "warning", warnings.append)
    options = {"sampler": "sde", "num_inference_steps": 10}
    exact = pngs(run(models / "latents", tmp_path / "float32", **options)).astype(float)
    half = pngs(run(models / "latents", tmp_path / "bfloat16", dtype="bfloat16", **options)).astype(float)
    assert seen == {torch.float32} and not warnings  # of modules that diffusers would keep in float32
    assert 0 < np.abs(exact - half).mean() < 0.1 * exact.std()
    low = pngs(run(models / "latents", tmp_path / "vae", vae_dtype="bfloat16", **options)).astype(float)
    assert 0 < np.abs(exact - low).mean() < 0.1 * exact.std() and not warnings


@needs_compiler
def test_compile_compiles_the_blocks_alone(models, tmp_path, monkeypatch):
    exact = pngs(run(models / "velocity", tmp_path / "eager", guidance_interval=(0, 0.5))).astype(int)
    compiled, regional = [], SiTTransformer2DModel.compile_repeated_blocks

    def without_inductor(self, **options):
        compiled.append(options)
        return regional(self, backend="eager", **options)

    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", without_inductor)
    images = pngs(run(models / "velocity", tmp_path / "out", guidance_interval=(0, 0.5), compile=True)).astype(int)
    assert compiled == [{"dynamic": False}]
    assert np.abs(images - exact).max() <= 1


def test_the_first_block_cache_skips_blocks(models, tmp_path, monkeypatch, capsys):
    """A tiny threshold skips nothing and changes no byte; a large one computes the last block in the first step alone."""
    options = {"num_inference_steps": 6, "num_images": 4}
    whole = run(models / "velocity", tmp_path / "whole", **options)
    assert "first_block_cache" not in json.loads((whole / "manifest.json").read_text())["options"]
    same = run(models / "velocity", tmp_path / "same", first_block_cache=1e-9, **options)
    assert np.array_equal(pngs(same), pngs(whole))

    rows, load = [], sample.load_pipeline

    def counting(*arguments):
        pipeline = load(*arguments)
        pipeline.transformer.transformer_blocks[-1].attn.register_forward_pre_hook(lambda *_: rows.append(1))
        return pipeline

    monkeypatch.setattr(sample, "load_pipeline", counting)
    cached = run(models / "velocity", tmp_path / "cached", first_block_cache=10, **options)
    assert len(rows) == 1 and not np.array_equal(pngs(cached), pngs(whole))
    assert json.loads((cached / "manifest.json").read_text())["options"]["first_block_cache"] == 10
    assert "--first_block_cache was 10.0 and is None" in refused(models / "velocity", cached, **options)
    assert refused(models / "velocity", tmp_path / "none", first_block_cache=0, **options) == "2"
    assert "--first_block_cache 0.0 must be above 0" in capsys.readouterr().err
    assert refused(models / "velocity", tmp_path / "none", first_block_cache=0.1, compile=True, **options) == "2"
    assert "--first_block_cache 0.1 cannot be combined with --compile" in capsys.readouterr().err


def test_a_variant_of_the_weights(models, tmp_path):
    pipeline = VRPOPipeline.from_pretrained(models / "velocity")
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    folder = run(tmp_path / "variant", tmp_path / "out", variant="fp16")
    assert np.array_equal(pngs(folder), pngs(run(models / "velocity", tmp_path / "plain")))
    # The only variant opens without its name; of two, one must be named.
    assert np.array_equal(pngs(folder), pngs(run(tmp_path / "variant", tmp_path / "unnamed")))
    pipeline.transformer.save_pretrained(tmp_path / "variant" / "transformer", variant="other")
    assert "holds the variants fp16, other" in refused(tmp_path / "variant", tmp_path / "no")


def test_the_npz_is_written_batch_by_batch(tmp_path):
    generator = np.random.default_rng(0)
    batches = [generator.integers(256, size=(16, 128, 128, 3), dtype=np.uint8) for _ in range(20)]
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", iter(batches), 320, list(range(320)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * batches[0].nbytes < 0.2 * 320 * 128 * 128 * 3
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], np.concatenate(batches)) and archive["arr_1"].tolist() == list(
            range(320)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_images": 0}, "--num_images 0 must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
        ({"num_inference_steps": 0}, "--num_inference_steps 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must lie in [0, 9223372036854775808)"),
        ({"seed": 2**63}, "--seed 9223372036854775808 must lie in [0, 9223372036854775808)"),
        ({"guidance_scale": "nan"}, "--guidance_scale nan must be at least 0"),
        ({"guidance_interval": (0.7, 0.2)}, "--guidance_interval 0.7 0.2 must be LOW HIGH with 0 <= LOW <= HIGH <= 1"),
        ({"guidance_interval": (0, 700)}, "--guidance_interval 0.0 700.0 must be LOW HIGH"),
        ({"guidance_channels": "some"}, "'some' is neither a number of channels nor `all`"),
        ({"guidance_channels": 0}, "--guidance_channels 0 must be at least 1"),
        ({"sampler": "euler"}, "--sampler: invalid choice: 'euler'"),
        ({"dtype": "int8"}, "--dtype: invalid choice"),
        ({"output_format": "jpeg"}, "--output_format: invalid choice"),
        ({"steps": 3}, "unrecognized arguments: --steps"),
    ],
)
def test_wrong_options(models, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run(models / "velocity", tmp_path / "out", **options)
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("velocity", {"labels": ["goldfsh"]}, "--labels: `class_labels`: no class is named 'goldfsh'; did you mean"),
        ("velocity", {"labels": [5]}, "5 is not a class; this model has 5, ids 0 ... 4"),
        ("velocity", {"labels": ["crane"]}, "'crane' names the classes [1, 2]"),
        ("velocity", {"sampler": "ddim"}, "--sampler ddim cannot be combined with PIPELINE"),
        (
            "velocity",
            {"sampler": "ddpm"},
            "which predicts velocities; use ode, heun, dpmsolver++, unipc, sde or default",
        ),
        ("epsilon", {"sampler": "sde"}, "which predicts noise; use ddim, ddpm, dpmsolver++, unipc or default"),
        (
            "velocity",
            {"sampler": "sde", "num_inference_steps": 1},
            "--num_inference_steps 1: --num_inference_steps must",
        ),
        (
            "epsilon",
            {"num_inference_steps": 2000},
            "--num_inference_steps 2000: --num_inference_steps: 2000 cannot be",
        ),
        (
            "epsilon",
            {"num_inference_steps": 128},
            "--num_inference_steps 128: diffusers' DDIM needs a divisor of 1000",
        ),
        ("velocity", {"guidance_channels": 4}, "--guidance_channels must be in 1 ... 3, not 4"),
        ("grey", {"guidance_scale": 2.0}, "needs a null class"),
        (
            "velocity",
            {"guidance_scale": 1, "guidance_interval": (0, 0.7)},
            "--guidance_interval 0.0 0.7 has no effect with guidance scale 1",
        ),
        ("grey", {"guidance_channels": "all"}, "--guidance_channels all has no effect with guidance scale 1"),
        ("velocity", {"vae_dtype": "bfloat16"}, "--vae_dtype bfloat16: PIPELINE"),
        ("velocity", {"revision": "main"}, "--revision main needs a Hub name"),
        ("nowhere", {}, "cannot be opened"),
    ],
)
def test_what_does_not_go_with_the_pipeline(models, tmp_path, kind, options, message):
    pipeline = "nobody/nowhere" if kind == "nowhere" else models / kind
    assert message in refused(pipeline, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_pipeline(models, tmp_path):
    assert "is not a folder; `vrpo convert` makes one" in refused(tmp_path / "missing", tmp_path / "out")
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"weights")
    assert "is not a folder; `vrpo convert` makes one" in refused(checkpoint, tmp_path / "out")
    assert "has no model_index.json" in refused(models / "velocity" / "transformer", tmp_path / "out")
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    for unfinished in (tmp_path / "run", checkpoint):
        problem = refused(unfinished, tmp_path / "out")
        assert f"the run is not finished; `vrpo convert {checkpoint} NEW_FOLDER` makes one" in problem
    dit = tmp_path / "dit"
    shutil.copytree(models / "velocity", dit)
    index = json.loads((dit / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
    (dit / "model_index.json").write_text(json.dumps(index))
    assert "has DiTTransformer2DModel instead of a SiTTransformer2DModel" in refused(dit, tmp_path / "out")
    latents = tmp_path / "latents"
    VRPOPipeline(tiny_model(), FlowMatchEulerDiscreteScheduler()).save_pretrained(latents)
    assert "has no autoencoder for its 4-channel latents" in refused(latents, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "--seed was 0 and is 1; keep to that, choose another folder, or give --overwrite"),
        ({"sampler": "heun"}, "--sampler was ode and is heun"),
        ({"num_inference_steps": 4}, "--num_inference_steps was 3 and is 4"),
        ({"guidance_scale": 2}, "--guidance_scale was 1.5 and is 2.0"),
        ({"guidance_channels": 1}, "--guidance_channels was 3 and is 1"),
        ({"labels": [0]}, "--labels differed"),
        ({"class_balance": "random"}, "--class_balance was balanced and is random"),
        ({"batch_size": 2}, "--batch_size was 4 and is 2"),
        ({"dtype": "bfloat16"}, "--dtype was float32 and is bfloat16"),
        ({"output_format": "npz"}, "--output_format was png and is npz"),
    ],
)
def test_a_run_goes_on_with_the_same_options_only(models, one_run, change, message):
    before = contents(one_run)
    options = {"sampler": "ode", **change}
    assert message in refused(models / "velocity", one_run, **options)
    assert contents(one_run) == before


@pytest.fixture(scope="module")
def one_run(models, tmp_path_factory) -> Path:
    return run(models / "velocity", tmp_path_factory.mktemp("one") / "out", sampler="ode")


def test_a_run_goes_on_with_the_same_weights_only(models, one_run, tmp_path):
    shutil.copytree(models / "velocity", tmp_path / "copy")
    before = contents(one_run)
    run(tmp_path / "copy", one_run, sampler="ode")  # the same pipeline elsewhere
    pipeline = VRPOPipeline.from_pretrained(models / "velocity")
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] += 1e-6
    pipeline.save_pretrained(tmp_path / "other")
    message = refused(tmp_path / "other", one_run, sampler="ode")
    assert "the weights or the config of PIPELINE differed" in message
    for name, data in before.items():
        assert name == "manifest.json" or (one_run / name).read_bytes() == data


def test_overwrite_removes_samples_and_nothing_else(models, tmp_path):
    folder = run(models / "velocity", tmp_path / "out", num_images=12, output_format="both")
    (folder / "notes.png").write_bytes(b"mine")
    run(models / "velocity", folder, seed=1, num_images=5, overwrite=True)
    assert sorted(contents(folder)) == [*(f"{i:06d}.png" for i in range(5)), "manifest.json", "notes.png"]
    fresh = run(models / "velocity", tmp_path / "fresh", seed=1, num_images=5)
    assert np.array_equal(pngs(fresh), np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(5)]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "000000.png").write_bytes(b"mine")
    for overwrite in (None, True):
        message = refused(models / "velocity", other, overwrite=overwrite)
        assert "holds other files (000000.png) and no manifest.json of samples" in message
    assert contents(other) == {"000000.png": b"mine"}
    for text, message in (
        ("{", "manifest.json is not a manifest of samples"),
        ('{"format": 99}', "manifest.json is not one that this version reads"),
        ("[]", "manifest.json is not a manifest of samples"),
    ):
        (other / "manifest.json").write_text(text)
        assert message in refused(models / "velocity", other, overwrite=True)


def test_the_folder_may_be_a_link(models, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    for _ in range(2):
        run(models / "velocity", tmp_path / "link", num_images=2)
    assert (tmp_path / "scratch" / "000001.png").is_file()


def test_a_folder_that_cannot_be_made(models, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written (Not a directory)" in refused(models / "velocity", tmp_path / "file" / "out")


def test_images_that_are_not_finite_are_refused(models, tmp_path):
    pipeline = VRPOPipeline.from_pretrained(models / "velocity")
    torch.nn.init.constant_(pipeline.transformer.label_embedding.weight[3], 3e38)  # finite, but not what follows
    pipeline.save_pretrained(tmp_path / "huge")
    message = refused(tmp_path / "huge", tmp_path / "out", batch_size=2)
    assert "image 3 is not finite" in message
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) in ([], ["000000.png", "000001.png"])


def test_the_autoencoder_keeps_its_dtype_under_autocast(models, monkeypatch):
    pipeline = VRPOPipeline.from_pretrained(models / "latents")
    pipeline.set_progress_bar_config(disable=True)
    latents, decode = [], pipeline.decode_latents
    monkeypatch.setattr(pipeline, "decode_latents", lambda x: latents.append(x) or decode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = sample.sample_batch(pipeline, range(3), [0, 1, 2], 0, {"num_inference_steps": 2})
    with torch.no_grad():
        exact = pipeline.image_processor.postprocess(decode(latents[0]), output_type="np")
    assert np.array_equal(images, (exact * 255).round().astype(np.uint8))


def test_noise_that_no_seed_fixes_is_refused():
    class Unseeded(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            noise = torch.randn_like(sample)
            return super().step(model_output + noise, timestep, sample, return_dict=return_dict)

    with pytest.raises(InputError, match="the pipeline's Unseeded draws noise that no seed fixes; choose another"):
        sampling.check_steps(quiet_pipeline(tiny_model(), Unseeded()), 5)
    for scheduler in (SiTSDEScheduler(), FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**FLOW_SIGMAS)):
        sampling.check_steps(quiet_pipeline(tiny_model(), scheduler), 5)


# Its benchmark


@pytest.fixture(scope="module")
def sampling_cost():
    """benchmarks/sampling_cost.py as a module."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("sampling_cost")
    finally:
        sys.path.remove(folder)


def test_the_benchmark_counts_rows_and_compares_times(sampling_cost, tmp_path, monkeypatch, capsys):
    words = "--preset SiT-XS/8 --batch_size 3 --num_inference_steps 10 --rounds 2 --device cpu --clock cpu --json"
    report = sampling_cost.main(
        sampling_cost.build_parser().parse_args([*words.split(), str(tmp_path / "report.json")])
    )
    # t = 1, 0.9, 0.8 are not guided.
    assert {name: arm["rows"] for name, arm in report["arms"].items()} == {"always": 60, "interval": 51, "never": 30}
    assert all(len(arm["seconds"]) == 2 and min(arm["seconds"]) > 0 for arm in report["arms"].values())
    interval, never = report["ratios"]
    assert interval["share"] == 0.85 and interval["at_most"] == 0.88 and never["share"] == 0.5
    assert interval["low"] <= interval["ratio"] <= interval["high"]
    assert json.loads((tmp_path / "report.json").read_text())["arms"] == report["arms"]
    assert "<= 0.8800" in capsys.readouterr().out
    # Two precisions; nothing is compiled here.
    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", lambda self, **options: None)
    words = (
        "--preset SiT-XS/8 --batch_size 2 --num_inference_steps 3 --rounds 1 --device cpu --throughput --sampler sde"
    )
    report = sampling_cost.main(sampling_cost.build_parser().parse_args(words.split()))
    assert list(report["arms"]) == ["float32, eager", "bfloat16, compiled"]
    assert {arm["rows"] for arm in report["arms"].values()} == {12}
    assert all(arm["images_per_second"] > 0 for arm in report["arms"].values())
    for wrong in (["--throughput", "--compile"], ["--sampler", "ddim"], ["--device", "cuda", "--clock", "cpu"]):
        with pytest.raises(InputError, match="leave out|takes|use wall"):
            sampling_cost.main(sampling_cost.build_parser().parse_args(["--preset", "SiT-XS/8", *wrong]))
