# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Publishing and loading over HTTP, from a small local Hub: with the package and without, and when the Hub fails."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline
from huggingface_hub import constants

from diffusers_vrpo import SiTSDEScheduler, VRPOPipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.hub import publish as publishing
from diffusers_vrpo.hub.background import HubPublisher, check_license, fetch_state, push_state, stage_state
from diffusers_vrpo.hub.publish import push_folder
from diffusers_vrpo.pipelines.adapters import adapter_for
from diffusers_vrpo.training.checkpoints import find_damage, write_manifest
from diffusers_vrpo.training.interruption import Interruption
from support.hub_server import Repository, metadata_errors, serve
from support.models import tiny_model, tiny_vae
from support.official import tiny_dit
from support.paths import ROOT, SRC
from support.pipelines import save_pipeline
from support.runs import write_run


TOKEN, READ_TOKEN = "hf_thisIsTheWriteToken", "hf_thisIsTheReadToken"
NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "tench"}


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        hub.tokens = {TOKEN: ("alice", "write", ["org"]), READ_TOKEN: ("alice", "read", ["org"])}
        yield hub


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """That Hub for this process, too."""
    known = {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
    known |= {"HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in (known | {"HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publishing, "WAITS", (0.01,))
    return hub


def python(hub, folder: Path, script: str, token: str | None = TOKEN, package: bool = True, ok: bool = True) -> str:
    """Runs a script in a fresh process, and looks for the token in everything that it printed; returns that."""
    home = folder / f"home{len(list(folder.glob('home*')))}"
    environment = hub.environment(home, token)
    if package:
        environment["PYTHONPATH"] = str(SRC)
    else:
        environment.pop("PYTHONPATH", None)
        script = HIDE_THE_PACKAGE + script
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=folder)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-5000:]
    assert TOKEN not in output and READ_TOKEN not in output and "signed-address" not in output
    return output


HIDE_THE_PACKAGE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_vrpo":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""

SAMPLE = """
import numpy as np, torch
def sample(pipeline, label="goldfish"):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(label, num_inference_steps=2, generator=generator, output_type="np").images
"""

PUBLISH = (
    SAMPLE
    + """
import os
from pathlib import Path
from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.hub import publish as hub
hub.WAITS = (0.1, 0.1)

pipeline = VRPOPipeline.from_pretrained("saved")
np.save("expected.npy", sample(pipeline))
pipeline.push_to_hub("org/tiny")
pipeline.push_to_hub("org/tiny")
first = hub.HfApi().repo_info("org/tiny").sha

# Other weights: the old ones stay where a revision has them. Then half precision beside them.
with torch.no_grad():
    pipeline.transformer.proj_out.weight.add_(0.1)
pipeline.push_to_hub("org/tiny", commit_message="Second")
pipeline.save_pretrained("sharded", max_shard_size="40KB")
hub.push_folder("sharded", "org/sharded")
pipeline.save_pretrained("saved again", push_to_hub=True, repo_id="org/nested")
pipeline.push_to_hub("org/nested", subfolder="inner")
pipeline.to(torch.float16)
pipeline.push_to_hub("org/tiny", variant="fp16")

# Everything from the Hub by the package, without leave to run the repository's code.
again = VRPOPipeline.from_pretrained("org/tiny")
assert type(again.transformer) is SiTTransformer2DModel and type(again) is VRPOPipeline
assert again.scheduler.__class__.__module__ == "diffusers_vrpo.pipelines.scheduling_sit_sde"
np.save("second.npy", sample(again))
old = VRPOPipeline.from_pretrained("org/tiny", revision=first)
assert np.array_equal(sample(old), np.load("expected.npy")) and not np.array_equal(sample(again), sample(old))
half = VRPOPipeline.from_pretrained("org/tiny", variant="fp16", torch_dtype=torch.float16)
assert half.transformer.dtype == torch.float16
assert np.array_equal(sample(VRPOPipeline.from_pretrained("org/sharded")), sample(again))
again = VRPOPipeline.from_pretrained("org/tiny", local_files_only=True)
given = VRPOPipeline.from_pretrained("org/tiny", transformer=old.transformer)
assert given.transformer is old.transformer
again.save_pretrained("again")
"""
)

LOAD_WITHOUT_THE_PACKAGE = (
    SAMPLE
    + """
import importlib.util, json, sys
from pathlib import Path
from diffusers import DiffusionPipeline
assert "diffusers_vrpo" not in sys.modules

try:
    DiffusionPipeline.from_pretrained("org/tiny")
    raise SystemExit("code was run without leave")
except ValueError as error:
    assert "trust_remote_code" in str(error)
second = np.load("second.npy")
own = DiffusionPipeline.from_pretrained("org/tiny", custom_pipeline=CUSTOM, trust_remote_code=True)
assert np.array_equal(sample(own), second) and Path(sys.modules[type(own).__module__].__file__).name == "vrpo.py"
pipeline = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)
assert type(pipeline).__name__ == "VRPOPipeline" and type(pipeline.scheduler).__name__ == "SiTSDEScheduler"
assert np.array_equal(sample(pipeline), second)
half = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True, variant="fp16", torch_dtype=torch.float16)
assert half.transformer.dtype == torch.float16
assert np.array_equal(sample(DiffusionPipeline.from_pretrained("org/sharded", trust_remote_code=True)), second)

# Saved from here it has the same layout, and opens again. Nor does publishing need the package.
pipeline.save_pretrained("standalone")
assert np.array_equal(sample(DiffusionPipeline.from_pretrained("standalone", trust_remote_code=True)), second)
pipeline.push_to_hub("org/standalone")
print("loaded", len(second))
"""
)


@pytest.mark.slow
def test_published_pipelines_open_with_and_without_the_package(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    transformer = tiny_model(in_channels=4, sample_size=8)
    VRPOPipeline(transformer, SiTSDEScheduler(), tiny_vae("kl").eval(), NAMES).save_pretrained(folder / "saved")
    # The connection is cut in the middle of a file, the Hub fails at the commit: both are tried again.
    hub.faults = [("PUT /large/", None), ("POST .*org/tiny/commit", 503)]
    python(hub, folder, PUBLISH)
    assert not hub.faults
    repository = hub.repositories["org/tiny"]
    assert set(repository.files()) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "pipeline_vrpo.py",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_sit_sde.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_sit.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    whole = {path for path in repository.files() if ".fp16." not in path and path != "README.md"}
    nested = {f"inner/{path}" for path in whole - {".gitattributes"}}
    assert set(hub.repositories["org/nested"].files()) == whole | nested | {"README.md"}
    index = json.loads(repository.files()["model_index.json"])
    assert index["_class_name"] == ["pipeline_vrpo", "VRPOPipeline"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["transformer"] == ["transformer_sit", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_sit_sde", "SiTSDEScheduler"]
    cards = [files["README.md"].decode() for _, _, files in repository.commits if "README.md" in files]
    assert cards[0] == cards[1] and not metadata_errors(cards[-1]) and cards[-1].count("- diffusers\n") == 1
    # The second push changed nothing, and so is no commit; the files of the same name are replaced.
    assert [message for _, message, _ in repository.commits[1:]] == [
        "Upload VRPOPipeline",
        "Second",
        "Upload VRPOPipeline",
    ]
    saved = {path.name: path for path in (folder / "again").rglob("*.py")}
    assert sorted(saved) == ["pipeline_vrpo.py", "scheduling_sit_sde.py", "transformer_sit.py"]

    custom = f"CUSTOM = {str(ROOT / 'pipelines' / 'vrpo.py')!r}\n"
    assert "loaded 1" in python(hub, folder, custom + LOAD_WITHOUT_THE_PACKAGE, package=False)
    assert set(hub.repositories["org/standalone"].files()) == whole | {"README.md"}
    for name in ("expected.npy", "second.npy"):
        assert np.isfinite(np.load(folder / name)).all() and torch.from_numpy(np.load(folder / name)).std() > 0.01


TRAIN = """
import contextlib, importlib.util, io, json, logging, os, shutil, sys, time
from pathlib import Path
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi, constants
from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.hub import publish as hub
from diffusers_vrpo.command_line import flags_of, with_flags
from diffusers_vrpo.commands import push
from diffusers_vrpo.hub import background as hub_run
from diffusers_vrpo.errors import InputError
hub.WAITS = (0.1, 0.1)
spec = importlib.util.spec_from_file_location("train_vrpo", SCRIPT)
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)
Path("model.json").write_text(
    json.dumps({"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16})
)

def train(output_dir, repo_id, steps, *more, start=("--model_config", "model.json")):
    AcceleratorState._reset_state(reset_partial_state=True)
    options = f"--dataset_name digits --resolution 8 --vae none --objective vrpo --encoder digits --projector_dim 16"
    options += f" --train_batch_size 8 --max_train_steps {steps} --checkpointing_steps 2 --checkpoints_total_limit 1"
    options += " --learning_rate 0.01 --ema_decay 0.5 --logging_steps 1 --num_inference_steps 1 --num_validation_images 1"
    options += " --validation_steps 10000 --dataloader_num_workers 0 --report_to tensorboard --push_to_hub"
    options = options.split() + ["--output_dir", output_dir, "--hub_model_id", repo_id, *start, *more]
    train_vrpo.main(train_vrpo.parse_args(options))

def refused(*arguments, **options):
    began, errors = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            train(*arguments, **options)
    except SystemExit:  # by the command line
        print("REFUSED", round(time.monotonic() - began, 1), errors.getvalue().splitlines()[-1])
    except InputError as error:
        message = with_flags(error, flags_of(train_vrpo.build_parser()))
        print("REFUSED", round(time.monotonic() - began, 1), message)
    assert not Path(arguments[0], "metrics.jsonl").exists()

checkpoints = ("--hub_push_checkpoints",)
states = ("--push_training_state",)
train("first", "org/digits", 4, "--hub_private_repo", *checkpoints, *states)
assert not Path("first/.hub").exists()

refused("no9", "org/digits", 2, "--hub_license", "no-such")

# Elsewhere the run goes on from the Hub; its newest state there is damaged, and so from the one before.
HfApi().upload_file(
    path_or_fileobj=b"{}", path_in_repo="checkpoint-4/training_state.json", repo_id="org/digits-state"
)
train("second", "org/digits", 5, *states, "--resume_from_checkpoint", "hub")
rows = [json.loads(line) for line in Path("second/metrics.jsonl").read_text().splitlines()]
assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # what was measured elsewhere has come along
assert len(Path("second/starts.jsonl").read_text().splitlines()) == 2
hub_run.fetch_state("org/digits-state", Path("second"))  # has it already, and asks for nothing

# Adapters on a base that is on the Hub.
train(
    "adapted", "org/adapters", 2, *checkpoints, "--lora_rank", "2",
    start=("--pretrained_model_name_or_path", "org/digits"),
)
refused("no10", "org/digits", 2, "--lora_rank", "2", start=("--pretrained_model_name_or_path", "org/digits"))
base = VRPOPipeline.from_pretrained("org/digits")
def images():
    base.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return base("seven", num_inference_steps=2, latents=noise, output_type="latent").images
plain = images()
base.load_lora_weights("org/adapters")
adapted = images()
base.fuse_lora()
torch.testing.assert_close(images(), adapted, atol=1e-4, rtol=1e-4)
base.unfuse_lora()
base.unload_lora_weights()
torch.testing.assert_close(images(), plain, atol=1e-5, rtol=1e-5)
base.transformer = VRPOPipeline.from_pretrained("adapted").transformer
torch.testing.assert_close(images(), adapted, atol=1e-4, rtol=1e-4)
assert (adapted - plain).abs().max() > 1e-3

# A Hub that takes nothing any more does not cost the run; nor is there a push without a name for it.
train("unsent", "org/broken", 2, *checkpoints)
assert VRPOPipeline.from_pretrained("unsent").transformer.config.num_classes == 10

refused("no1", "org/x", 2, "--resume_from_checkpoint", "hub")
refused("no2", "other/x", 2)
refused("no3", "a/b/c", 2)
HfApi().create_repo("org/open-state")
refused("no8", "org/open", 2, *states)
token = os.environ.pop("HF_TOKEN")
refused("no4", "org/x", 2)
os.environ["HF_TOKEN"] = READ_TOKEN
refused("no5", "org/x", 2)
os.environ["HF_TOKEN"] = token[:-1]
refused("no6", "org/x", 2)
os.environ["HF_TOKEN"] = token
endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
refused("no7", "org/x", 2)
# What has a checkpoint goes on without the Hub, and can be published later.
train("unsent", "org/broken", 3)
constants.ENDPOINT = endpoint
push.main(["unsent", "--hub_model_id", "org/late"])
"""


@pytest.mark.slow
def test_a_run_publishes_itself_and_never_fails_for_it(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    hub.faults = [("PUT /large/", None)] + [("POST .*org/broken/commit", 503)] * 9
    head = f"SCRIPT, READ_TOKEN = {str(ROOT / 'train_vrpo.py')!r}, {READ_TOKEN!r}\n"
    output = python(hub, folder, head + TRAIN)
    refusals = [line.split(" ", 2)[1:] for line in output.splitlines() if line.startswith("REFUSED")]
    reasons = [
        "--hub_license no-such is not known to the Hub; give one such as apache-2.0",
        "--hub_model_id org/digits has the weights that the adapters change; publish the adapters under another name",
        "--resume_from_checkpoint hub continues from a training state on the Hub and needs --push_to_hub and --push_training_state",
        "--hub_model_id other/x: the token may not write to other/x (403); use one with write access to it",
        "--hub_model_id a/b/c: that is not the name of a repository; give owner/name",
        "--hub_model_id org/open-state: org/open-state already exists and is public; make it private",
        "--hub_model_id org/x: no token was found; run `hf auth login` or set HF_TOKEN",
        "--hub_model_id org/x: the token may only read; use one with write access",
        "--hub_model_id org/x: the Hub does not know the token (401); run `hf auth login` again or set HF_TOKEN to another token",
        "--push_to_hub: the Hub cannot be reached",
    ]
    assert len(refusals) == len(reasons)
    for (seconds, message), reason in zip(refusals, reasons):
        assert reason in message and float(seconds) < 30
    assert "vrpo push no7" in refusals[-1][1]

    digits, states = hub.repositories["org/digits"], hub.repositories["org/digits-state"]
    assert digits.private and states.private and not hub.repositories["org/adapters"].private
    names = set(digits.files())
    assert {"model_index.json", "pipeline_vrpo.py", "transformer/transformer_sit.py", "samples.png"} <= names
    assert names - {"scheduler/scheduler_config.json"} == {
        *(".gitattributes", "README.md", "model_index.json", "pipeline_vrpo.py"),
        *("samples.png", "training.png", "metrics.jsonl"),
        *(
            f"transformer/{name}"
            for name in ("config.json", "diffusion_pytorch_model.safetensors", "transformer_sit.py")
        ),
    }
    # A tag has the averaged weights of its step, and the card says so; the result is the last checkpoint's.
    step_2, step_4 = digits.files("step-2"), digits.files("step-4")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert "weights of step 2 of 4" in step_2["README.md"].decode() and step_2[weights] != step_4[weights]
    first_result = next(files for _, message, files in digits.commits if message == "Result")
    assert first_result[weights] == step_4[weights]
    card = first_result["README.md"].decode()
    assert "share s" in card and "FLOPs" in card and "| seed | 0 |" in card and "not measured yet" in card
    assert "In training" not in card and "![samples" in card and str(folder) not in card
    assert not metadata_errors(card)
    # Whole training states, the two newest, and nowhere else than in the private repository.
    assert {path.split("/")[0] for path in states.files()} == {".gitattributes", "checkpoint-4", "checkpoint-5"}
    assert "checkpoint-5/optimizer.bin" in states.files() and "checkpoint-5/metrics.jsonl" in states.files()
    assert len(states.commits) == 1  # no commit keeps older states
    assert "checkpoint-4 in org/digits-state is damaged (training_state.json has 2 bytes" in output
    assert sum(request.endswith("/manifest.json") for request in hub.requests if "GET" in request) == 2

    adapters = hub.repositories["org/adapters"]
    files = {".gitattributes", "README.md", "pytorch_lora_weights.safetensors", "metrics.jsonl"}
    assert set(adapters.files()) == files | {"samples.png", "training.png"} and set(adapters.files("step-2")) == files
    card = adapters.files()["README.md"].decode()
    assert 'load_lora_weights("org/adapters")' in card and "base_model: org/digits\n" in card and "- lora\n" in card
    assert "base_model_relation: adapter" in card and not metadata_errors(card)

    assert (
        "not on the Hub: step 2 (the Hub answers 503), the result (the Hub answers 503). The result is safe in"
        in output
    )
    assert len(hub.repositories["org/broken"].commits) == 1 and "org/x" not in hub.repositories
    assert set(hub.repositories["org/late"].files()) == names
    # The token is nowhere: no log, card, configuration or event file.
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for repository in hub.repositories.values():
        assert all(TOKEN.encode() not in data for _, _, files in repository.commits for data in files.values())


def whole_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.bin").write_text(str(step))
    write_manifest(path)
    return path


def test_states_of_later_steps_go_and_the_runs_history_comes_along(here, tmp_path, caplog):
    push_state(whole_checkpoint(tmp_path / "earlier", 30), "org/again-state")
    for step in (2, 4, 6):
        checkpoint = whole_checkpoint(tmp_path / "run", step)
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        stage_state(checkpoint, tmp_path / "staged" / checkpoint.name)
        push_state(tmp_path / "staged" / checkpoint.name, "org/again-state")
    there = here.repositories["org/again-state"]
    assert {path.split("/")[0] for path in there.files()} == {".gitattributes", "checkpoint-4", "checkpoint-6"}
    assert len(there.commits) == 1

    (tmp_path / "other").mkdir()
    fetch_state("org/again-state", tmp_path / "other")
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()
    fetched = tmp_path / "other" / "checkpoint-6"
    assert find_damage(fetched) is None and {path.name for path in fetched.iterdir()} == {
        "manifest.json",
        "optimizer.bin",
    }
    # That the history stays is worth a warning, no more.
    here.faults = [("super-squash", 403)]
    push_state(whole_checkpoint(tmp_path / "run", 8), "org/again-state")
    assert not here.faults and "the older commits of org/again-state could not be removed" in caplog.text


def test_what_has_no_record_leaves_the_card_and_claims_no_licence(here, tmp_path):
    pipeline = save_pipeline(tmp_path / "run")
    save_pipeline(tmp_path / "plain")
    write_run(tmp_path / "run", pretrained_model_name_or_path="org/base")
    push_folder(tmp_path / "run", "org/kept", license="cc-by-nc-4.0")
    kept = here.repositories["org/kept"]
    card = kept.files()["README.md"]
    pipeline._upload_folder(tmp_path / "plain", "org/kept")
    assert kept.files()["README.md"] == card and b"cc-by-nc-4.0" in card and b"base_model: org/base" in card
    # As diffusers leaves it, each of its tags is there once more.
    kept.commit("Tags", kept.files() | {"README.md": card.replace(b"- diffusers\n", b"- diffusers\n- diffusers\n")})
    push_folder(tmp_path / "plain", "org/kept")
    again = kept.files()["README.md"].decode()
    assert again.count("- diffusers\n") == 1 and yaml.safe_load(again.split("---")[1])["model-index"]
    push_folder(tmp_path / "plain", "org/kept", license="mit")
    assert "license: mit" in kept.files()["README.md"].decode()

    check_license("mit")
    with pytest.raises(InputError, match="`hub_license` no-such is not known to the Hub; give one such as"):
        check_license("no-such")

    push_folder(tmp_path / "plain", "org/plain")
    assert b"license" not in here.repositories["org/plain"].files()["README.md"].split(b"---")[1]


def test_diffusers_own_dit_is_published_as_its_own_pipeline(here, tmp_path):
    transformer = tiny_dit(num_embeds_ada_norm=10, sample_size=4)
    adapter = adapter_for(transformer)
    adapter.prepare(transformer)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    adapter.pipeline(transformer, vae, {0: "cat", 1: "dog"}).save_pretrained(tmp_path / "run")
    write_run(tmp_path / "run", {"prediction_type": "epsilon"}, pretrained_model_name_or_path=None)
    push_folder(tmp_path / "run", "org/dit")
    files = here.repositories["org/dit"].files()
    assert not any(name.endswith(".py") for name in files)
    card = files["README.md"].decode()
    assert "trust_remote_code" not in card and "DiffusionPipeline.from_pretrained('org/dit')" in card.replace('"', "'")
    for name, content in files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "there")
    assert type(pipeline) is DiTPipeline and pipeline.labels == {"cat": 0, "dog": 1}


def test_adapters_leave_the_weights_that_are_there(here, tmp_path):
    run = tmp_path / "run"
    save_pipeline(run, variant="fp16")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"adapters")
    write_run(run, {"adapters_suffice": True}, pretrained_model_name_or_path="org/base", lora_rank=2)
    base = here.repositories["org/base"] = Repository(private=False)
    before = {"transformer/diffusion_pytorch_model.safetensors": b"weights", "README.md": b"card"}
    base.commit("Weights", before)
    with pytest.raises(InputError, match="has the weights that the adapters change"):
        push_folder(run, "org/base")
    assert base.files() == before
    mixed = here.repositories["org/mixed"] = Repository(private=False)
    mixed.commit("Weights", before)
    push_folder(run, "org/mixed")
    assert {"transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"} <= set(
        mixed.files()
    )


def test_a_refused_pipeline_does_not_keep_its_training_state_back(here, tmp_path):
    options = {"hub_model_id": None, "hub_license": None, "hub_private_repo": False}
    push = HubPublisher(Namespace(**options), SimpleNamespace(is_main_process=False), tmp_path, Interruption())
    push.repo_id = "org/parts"
    save_pipeline(tmp_path / "step-2" / "pipeline")
    whole_checkpoint(tmp_path / "step-2", 2)
    here.faults = [("POST .*org/parts/commit", 403)]
    with pytest.raises(InputError, match="may not write to org/parts"):
        push._send_checkpoint(tmp_path / "step-2", 2)
    assert "checkpoint-2/optimizer.bin" in here.repositories["org/parts-state"].files()
    # Nor the other way round.
    save_pipeline(tmp_path / "step-4" / "pipeline")
    whole_checkpoint(tmp_path / "step-4", 4)
    here.faults = [("POST .*org/parts-state/commit", 403)]
    push._send_checkpoint(tmp_path / "step-4", 4)
    assert "may not write to org/parts-state" in push.missing["the training state of step 4"]
    assert (
        "step-4" in here.repositories["org/parts"].refs
        and b"step-N" in here.repositories["org/parts"].files()["README.md"]
    )
