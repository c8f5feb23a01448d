"""What is saved for the Hub, what of a folder goes there, and what the card says; without a server."""

import importlib.util
import inspect
import json
import shutil
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.pipelines import pipeline_loading_utils
from hub_server import metadata_errors
from test_transformer import tiny_model

from diffusers_vrpo import SiTSDEScheduler, SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.hub import outdated_files, published_files, variant_of, without_paths
from diffusers_vrpo.hub_run import HubPush
from diffusers_vrpo.interruption import Interruption
from diffusers_vrpo.model_card import public_name, render_card


ROOT = Path(__file__).parents[1]


def save_pipeline(folder: Path, scheduler=None, **options) -> VRPOPipeline:
    names = {0: "goldfish, Carassius auratus", 1: "crane"}
    pipeline = VRPOPipeline(tiny_model(in_channels=3), scheduler or FlowMatchEulerDiscreteScheduler(), id2label=names)
    pipeline.save_pretrained(folder, **options)
    return pipeline


def test_the_saved_layout_and_older_ones_open(tmp_path):
    save_pipeline(tmp_path, SiTSDEScheduler())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_vrpo", "VRPOPipeline"] and index["vae"] == [None, None]
    assert index["transformer"] == ["transformer_sit", "SiTTransformer2DModel"]
    for name, file in (("pipeline_vrpo", ""), ("transformer_sit", "transformer"), ("scheduling_sit_sde", "scheduler")):
        source = (ROOT / "src" / "diffusers_vrpo" / f"{name}.py").read_bytes()
        assert (tmp_path / file / f"{name}.py").read_bytes() == source
    loaded = VRPOPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is SiTTransformer2DModel and type(loaded.scheduler) is SiTSDEScheduler

    # As diffusers writes it by itself, and this package did before.
    index |= {
        "_class_name": "VRPOPipeline",
        "transformer": ["diffusers_vrpo.transformer_sit", "SiTTransformer2DModel"],
        "scheduler": ["diffusers_vrpo.scheduling_sit_sde", "SiTSDEScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for file in tmp_path.rglob("*.py"):
        file.unlink()
    older = VRPOPipeline.from_pretrained(tmp_path)
    assert older.labels == loaded.labels and type(older.scheduler) is SiTSDEScheduler
    older.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / "transformer_sit.py").is_file()
    # A saved folder opens by the code in it, or by a pipeline file given for it.
    by_its_code = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(by_its_code).__module__ != VRPOPipeline.__module__ and by_its_code.labels == loaded.labels


def test_a_sharded_transformer_is_saved_under_its_own_name(tmp_path):
    pipeline = save_pipeline(tmp_path / "whole")
    # FSDP puts a class of its own in front.
    pipeline.transformer.__class__ = type("FSDPSiTTransformer2DModel", (SiTTransformer2DModel,), {})
    pipeline.save_config(tmp_path / "sharded")
    names = ("model_index.json", "transformer/transformer_sit.py")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "sharded" / n).read_bytes() for n in names)


def test_a_subclass_and_foreign_components_are_saved_as_they_are(tmp_path):
    class Mine(VRPOPipeline):
        pass

    Mine(tiny_model(in_channels=3), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "Mine" and index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert not (tmp_path / "pipeline_vrpo.py").exists() and isinstance(Mine.from_pretrained(tmp_path), Mine)
    with pytest.raises(ValueError, match="use `pipeline.push_to_hub`"):
        Mine.from_pretrained(tmp_path).save_config(tmp_path, push_to_hub=True)


def test_what_this_relies_on_in_diffusers_is_there():
    assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers_vrpo"] == {}
    assert "ModelMixin" in pipeline_loading_utils.LOADABLE_CLASSES["diffusers"]
    assert next(iter(inspect.signature(ConfigMixin._dict_from_json_file).parameters)) == "json_file"
    upload = inspect.signature(DiffusionPipeline._upload_folder).parameters
    assert set(upload) == set(inspect.signature(VRPOPipeline._upload_folder).parameters)
    assert CogVideoXLoraLoaderMixin._lora_loadable_modules == ["transformer"]


def test_nothing_but_the_pipeline_and_its_record_is_published(tmp_path):
    save_pipeline(tmp_path, variant="fp16", max_shard_size="40KB")
    expected = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {"samples.png", "training.png", "metrics.jsonl", "evaluation-inception.json"}
    left = [
        *(
            "checkpoint-10/optimizer.bin",
            "checkpoint-10/transformer/model.safetensors",
            "logs/vrpo/events.out.tfevents.1",
        ),
        *(
            ".lock",
            ".hub/step-3/x",
            "latents.npy",
            "labels.npy",
            "train_config.yaml",
            "starts.jsonl",
            "random_states_0.pkl",
        ),
        *("samples/step-0000001.png", "transformer/.cache/x", "transformer/__pycache__/x.pyc", "images/1.png"),
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(published_files(tmp_path)) == expected | kept
    with pytest.raises(InputError, match="holds no pipeline"):
        published_files(tmp_path / "logs")


def test_weights_that_are_replaced_go():
    name = "transformer/diffusion_pytorch_model"
    assert variant_of(f"{name}.safetensors") == variant_of(f"{name}-00001-of-00002.safetensors") == ""
    assert variant_of(f"{name}.safetensors.index.json") == "" and variant_of("transformer/config.json") is None
    for file in (".fp16.safetensors", ".fp16-00001-of-00002.safetensors", ".safetensors.index.fp16.json"):
        assert variant_of(name + file) == ".fp16"
    there = [f"{name}{x}" for x in ("-00001-of-00001.safetensors", ".safetensors.index.json", ".fp16.safetensors")]
    there += [f"{name}.safetensors", "transformer/config.json", "other/model.safetensors", "README.md"]
    new = {f"{name}.safetensors": Path()}
    assert outdated_files(there, new, ["transformer"], replace_variants=False) == there[:2]
    assert outdated_files(there, new, ["transformer"], replace_variants=True) == there[:3]


def write_run(folder: Path, **options):
    folder.mkdir(exist_ok=True)
    config = {"objective": "vrpo", "encoder": ["/data/models/dinov2"], "vae": "stabilityai/sd-vae-ft-ema", "seed": 3}
    config |= {"dataset_name": "ILSVRC/imagenet-1k", "resolution": 256, "learning_rate": 1e-4, "max_train_steps": 20}
    config |= {"output_dir": "/home/someone/run", "reward_weighting": "inverse_variance", "estimator": "expected"}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(config | options))
    row = {"step": 20, "loss_fm": 0.5, "train_seconds": 7200.0, "train_flops": 1.5e18, "samples_seen": 5120}
    for name, value in (("fidelity", 0.25), ("semantic", 0.5)):
        row |= {f"reward/{name}": value, f"std/{name}": 0.1, f"weight/{name}": 0.3, f"share/{name}": value}
    # Validation adds a line of its own for its step.
    rows = [{"step": 10, "loss_fm": 1.0, "fd/dinov2": 300.5}, row, {"step": 20, "fd/dinov2": 120.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo')
    start = {"hardware": "NVIDIA H200", "num_processes": 8, "global_batch_size": 256, "parameters": 130_000_000}
    (folder / "starts.jsonl").write_text(json.dumps(start | {"mixed_precision": "bf16", "trained": ["projectors"]}))


def test_the_card_says_what_the_files_say(tmp_path):
    write_run(tmp_path)
    save_pipeline(tmp_path)
    report = {"samples": {"count": 50000}, "reference": {"source": "/data/VIRTUAL_imagenet256.npz"}}
    report["metrics"] = {"inception": {"fid": 7.25, "inception_score": 120.0, "inception_score_std": 1.0}}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    card = render_card(tmp_path, "org/sit")
    assert not metadata_errors(card) and card == render_card(tmp_path, "org/sit")
    data = yaml.safe_load(card.split("---")[1])
    assert data["library_name"] == "diffusers" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["ILSVRC/imagenet-1k"] and len(data["tags"]) == len(set(data["tags"]))
    metrics = {m["name"]: m["value"] for result in data["model-index"][0]["results"] for m in result["metrics"]}
    assert metrics["FID (inception, 50000 samples)"] == 7.25 and metrics["FD (dinov2, step 20, in training)"] == 120.25
    for text in (
        "| semantic | 0.5 | 0.1 | 0.3 | 0.5 |",
        "| compute | 2 h, 1.5e+18 FLOPs |",
        "| hardware | 8 × NVIDIA H200 |",
        "| FID | 7.25 | inception | 50000 | VIRTUAL_imagenet256.npz | `evaluation.json` |",
        "| steps | 20, 5,120 samples |",
        "256 samples a step, bf16",
        'pipeline("goldfish"',
    ):
        assert text in card, text
    assert "/home/someone" not in card and "/data/" not in card and "not measured yet" not in card
    # Every row of a table has as many cells.
    lines = card.splitlines()
    for above, below in zip(lines, lines[1:]):
        assert not (above.startswith("|") and below.startswith("|")) or above.count("|") == below.count("|"), below


def test_cards_of_adapters_and_of_pipelines_without_a_record(tmp_path):
    write_run(tmp_path / "run", pretrained_model_name_or_path="org/base", lora_rank=4)
    (tmp_path / "run" / "lora").mkdir()
    (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    save_pipeline(tmp_path / "run")
    card = render_card(tmp_path / "run", "org/adapters")
    data = yaml.safe_load(card.split("---")[1])
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter" and data["license"] == "other"
    assert "load_lora_weights" in card and not metadata_errors(card)
    assert set(published_files(tmp_path / "run")) == {"pytorch_lora_weights.safetensors", "metrics.jsonl"}
    # With a label table of its own, or on a base that nobody else has, adapters are not enough.
    write_run(tmp_path / "run", pretrained_model_name_or_path="/models/base", lora_rank=4)
    assert "model_index.json" in published_files(tmp_path / "run")
    assert "base_model" not in yaml.safe_load(render_card(tmp_path / "run", "org/adapters").split("---")[1])

    save_pipeline(tmp_path / "plain")
    card = render_card(tmp_path / "plain", "org/plain", license="mit")
    assert "No record of a training" in card and "license: mit" in card and not metadata_errors(card)


def test_no_path_of_this_machine_gets_out():
    assert public_name("/data/models/dinov2") == "dinov2" and public_name(["~/x/y", "a/b"]) == ["y", "a/b"]
    assert public_name("SiT-B/2") == "SiT-B/2" and public_name(0.5) == 0.5
    assert public_name("C:\\x\\model.pt") == "model.pt" and public_name("/data/models/") == "models"
    assert public_name(str(ROOT)) == ROOT.name


def test_no_path_of_this_machine_is_in_what_is_sent(tmp_path):
    report = {"samples": {"source": "/data/samples", "count": 3}, "metrics": {"/models/dinov2": {"fd": 1.5}}}
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report))
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/data/vae", "eps": 1e-06}))
    sent = json.loads(without_paths("evaluation-a.json", tmp_path / "evaluation-a.json"))
    assert sent == {"samples": {"source": "samples", "count": 3}, "metrics": {"dinov2": {"fd": 1.5}}}
    sent = json.loads(without_paths("vae/config.json", tmp_path / "config.json"))
    assert sent == {"_name_or_path": "vae", "eps": 1e-06}
    (tmp_path / "config.json").write_text('{"latent_channels": 4}')
    assert without_paths("vae/config.json", tmp_path / "config.json") == tmp_path / "config.json"


def test_the_recipes_cards_are_what_their_commands_give():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for recipe in render.RECIPES:
        card = (ROOT / "model_cards" / f"{recipe[0]}.md").read_text()
        assert card == render.card(*recipe), "run python model_cards/render.py"
        assert not metadata_errors(card) and "not measured yet" in card and "no weights of it" in card


def test_checkpoints_give_way_to_newer_ones_and_nothing_waits(tmp_path, caplog):
    options = {"push_to_hub": False, "hub_model_id": None, "hub_license": None, "hub_private_repo": False}
    options |= {"resume_from_checkpoint": "latest", "hub_push_checkpoints": False, "push_training_state": False}
    interruption = Interruption()
    push = HubPush(Namespace(**options), SimpleNamespace(is_main_process=True), tmp_path, interruption)
    pipeline = save_pipeline(tmp_path / "saved")
    push.push_checkpoint(pipeline, 2)
    push.push_result()
    assert not (tmp_path / ".hub").exists()  # off, it does nothing

    sent, may_send = [], threading.Event()

    def send(folder, step):
        assert may_send.wait(10)
        assert VRPOPipeline.from_pretrained(folder / "pipeline").labels == pipeline.labels
        sent.append(step)
        if step == 6:
            raise ConnectionError("hf_secret in an address")

    push.active, push.args.hub_push_checkpoints = True, True
    push._send_checkpoint, push._send_result = send, lambda: sent.append("result")
    threading.Thread(target=push._work, daemon=True).start()
    for step in (2, 4, 6):
        shutil.copytree(tmp_path / "saved" / "transformer", tmp_path / f"checkpoint-{step}" / "transformer_ema")
        push.push_checkpoint(pipeline, step)
        while push._waiting and step == 2:
            pass  # until it is on its way
        shutil.rmtree(tmp_path / f"checkpoint-{step}")  # as --checkpoints_total_limit does
    assert not sent and not (tmp_path / ".hub" / "step-4").exists()
    may_send.set()
    push.push_result()
    assert sent == [2, 6, "result"]
    assert "step 4 (a newer one came before it could be sent), step 6 (the Hub cannot be reached (Conn" in caplog.text
    assert "hf_secret" not in caplog.text and not (tmp_path / ".hub").exists()
    # A signal ends the waiting.
    push._send_result = threading.Event().wait
    threading.Timer(0.3, lambda: setattr(interruption, "signum", 15)).start()
    push.push_result()
    assert "the result (interrupted)" in caplog.text


def test_a_wheel_has_the_template_and_the_pipelines():
    text = (ROOT / "pyproject.toml").read_text()
    for folder in ("model_cards", "pipelines", "configs"):
        assert f'"{folder}" = "diffusers_vrpo/{folder}"' in text
