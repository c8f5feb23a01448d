# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What is saved for the Hub, what of a folder goes there, and what the card says; without a server."""

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.pipelines import pipeline_loading_utils
from safetensors.torch import load_file, save_file

from diffusers_vrpo import SiTSDEScheduler, SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.hub.background import HubPublisher, stage_pipeline
from diffusers_vrpo.hub.card import CITATIONS, OBJECTIVES, public_name, pushes_adapters_only, read_run, render_card
from diffusers_vrpo.hub.publish import (
    hub_sentence,
    is_passing,
    outdated_files,
    published_files,
    variant_of,
    without_paths,
)
from diffusers_vrpo.models.start import Start, build_transformer, load_start
from diffusers_vrpo.training.interruption import Interruption
from diffusers_vrpo.training.metrics import write_start
from support.hub_server import metadata_errors
from support.models import tiny_model
from support.paths import ROOT
from support.pipelines import save_pipeline
from support.runs import write_run


def test_the_saved_layout_and_older_ones_open(tmp_path):
    save_pipeline(tmp_path, SiTSDEScheduler())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_vrpo", "VRPOPipeline"] and index["vae"] == [None, None]
    assert index["transformer"] == ["transformer_sit", "SiTTransformer2DModel"]
    for source, folder in (
        ("pipelines/pipeline_vrpo.py", ""),
        ("models/transformer_sit.py", "transformer"),
        ("pipelines/scheduling_sit_sde.py", "scheduler"),
    ):
        source = ROOT / "src" / "diffusers_vrpo" / source
        assert (tmp_path / folder / source.name).read_bytes() == source.read_bytes()
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
    with pytest.raises(InputError, match="has no pipeline"):
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


def test_the_card_says_what_the_files_say(tmp_path):
    write_run(tmp_path)
    save_pipeline(tmp_path)
    report = {"samples": {"count": 50000}, "reference": {"source": "/data/VIRTUAL_imagenet256.npz"}}
    report["metrics"] = {
        "inception": {"fid": 7.25, "inception_score": 120.0, "inception_score_std": 1.0, "kid": float("nan")}
    }
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
        "| steps | 22, 5,120 samples |",
        "At step 20:",
        "| dinov2 | 20 | 120.2 |",
        "256 samples a step, bf16",
        'pipeline("goldfish"',
    ):
        assert text in card, text
    assert "/home/someone" not in card and "/data/" not in card and "not measured yet" not in card
    assert "nan" not in card and "KID" not in card and "pip install" not in card and "step-N" not in card
    assert "step-N" in render_card(tmp_path, "org/sit", tagged=True)
    # Every row of a table has as many cells.
    lines = card.splitlines()
    for above, below in zip(lines, lines[1:]):
        assert not (above.startswith("|") and below.startswith("|")) or above.count("|") == below.count("|"), below


def test_the_card_of_image_rewards_and_a_scaffold(tmp_path):
    """Rewards of estimated images have a table of their own; the encoder of a scaffold is named without a projector."""
    options = {"scaffold_fraction": 0.05, "scaffold_coeff": 2.0, "image_rewards": ["perceptual"]}
    write_run(tmp_path, scaffold_layer=3, **options)
    save_pipeline(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        row = {"step": 20, "reward/perceptual": -0.75, "image_share/perceptual": 0.5}
        file.write("\n" + json.dumps(row) + "\n")
    card = render_card(tmp_path, "org/sit")
    assert "| semantic | 0.5 | 0.1 | 0.3 | 0.5 |" in card and "| perceptual | -0.75 | 0.5 |" in card
    assert "| rewards | fidelity, semantic, weighted by" in card  # those of the run, which may have its own
    assert "| scaffold | block 3, 0.05 of the training; coefficient 2.0 |" in card and not metadata_errors(card)
    write_run(tmp_path, objective="repi", **options)
    card = render_card(tmp_path, "org/sit")
    assert "| encoder | dinov2 |" in card and "| scaffold | block at 2/7 of the depth, 0.05" in card
    assert "scaffold: [REPI](https://arxiv.org/abs/2609.35292). Trained" in card
    assert set(CITATIONS) == set(OBJECTIVES) - {"none"}


def test_cards_of_adapters_and_of_pipelines_without_a_record(tmp_path):
    write_run(tmp_path / "run", {"adapters_suffice": True}, pretrained_model_name_or_path="org/base", lora_rank=4)
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
    assert "license" not in yaml.safe_load(render_card(tmp_path / "plain", "org/plain").split("---")[1])
    card = render_card(tmp_path / "plain", "org/plain", license="mit")
    assert "without a record of their training" in card and "license: mit" in card and not metadata_errors(card)


HOSTILE = (
    "x|y](https://evil.test)\n---\nlicense: mit\n\n# Heading\n```\n<script>alert(1)</script> `code` {{ name }} $x$"
)


def rendered(card: str) -> str:
    """The HTML of a card's body, by a renderer that lets HTML and tables through, as the Hub's does."""
    markdown_it = pytest.importorskip("markdown_it", reason="the test of the card's HTML needs markdown-it-py")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("\n---\n", 1)[1])


def write_hostile_run(folder: Path):
    """A run whose options, facts, columns, class names and evaluations are `HOSTILE`."""
    options = {"layer_scope": HOSTILE, "reward_weighting": HOSTILE, "dataset_name": HOSTILE, "vae": HOSTILE}
    options |= {"encoder": [HOSTILE], "hub_token": "hf_abcdefghijkl", "unknown_option": HOSTILE, "seed": HOSTILE}
    options |= {"pretrained_model_name_or_path": HOSTILE, "dataset_config_name": "hf_mnopqrstuvwx", "lora_rank": 4}
    write_run(folder, {"hardware": HOSTILE, "mixed_precision": HOSTILE, "adapters_suffice": True}, **options)
    with (folder / "metrics.jsonl").open("w") as file:
        row = {"step": 20, f"reward/{HOSTILE}": 0.5, f"validation/fd_{HOSTILE}": 3.0, "loss_fm": 0.5}
        for line in ([1], {"step": HOSTILE, "loss_fm": 1}, {"loss_fm": 10**400}, row):
            file.write(json.dumps(line) + "\n")
    save_pipeline(folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"id2label": {"0": HOSTILE}}
    (folder / "model_index.json").write_text(json.dumps(index))
    report = {"samples": {"count": HOSTILE}, "reference": {"source": HOSTILE}, "metrics": {HOSTILE: {"fid": 7.25}}}
    (folder / "evaluation-`|<b>.json").write_text(json.dumps(report))


@pytest.mark.parametrize("adapters", [True, False])
def test_what_others_chose_is_never_markup_in_a_card(tmp_path, adapters):
    write_hostile_run(tmp_path)
    if not adapters:
        (tmp_path / "starts.jsonl").unlink()
    card = render_card(tmp_path, f"org/{HOSTILE}", license=HOSTILE)
    assert len(metadata_errors(card)) == 1  # the licence
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"].startswith("x|y](https://evil.test) --- license: mit # Heading")
    page = rendered(card)
    assert "<script" not in page and "<b>" not in page and 'evil.test"' not in page and "<h1>Heading" not in page
    assert page.count("<h1>") == 1 and page.count("<details>") == page.count("</details>") == 1
    # Neither a token nor an option that does not exist, and no option of a wrong type.
    assert "hf_abc" not in card and "hf_mno" not in card and "unknown_option" not in card and "hub_token" not in card
    assert "| seed |  |" in card and "/home/someone" not in card
    # Every row of a table has as many cells.
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = [len(re.findall("<t[dh]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
        assert len(set(rows)) == 1 and "FD (" not in table


def test_a_card_of_files_with_wrong_types_is_rendered(tmp_path):
    write_run(tmp_path)
    save_pipeline(tmp_path)
    (tmp_path / "starts.jsonl").write_text(
        '{"hardware": 1, "num_processes": "8", "parameters": "x", "local": 3}\n[]\n1'
    )
    (tmp_path / "evaluation.json").write_text(
        '{"metrics": {"a": 3, "b": {"fid": "x"}}, "samples": [], "reference": 1}'
    )
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"id2label": [1, 2]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer" / "config.json").write_text('{"num_classes": "many"}')
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss_fm": 1.0}\n"\xff\xfe"\n{"step": 2, "loss_fm": true}\n'
    )
    card = render_card(tmp_path, "org/sit")
    assert not metadata_errors(card) and "Last flow-matching loss in `metrics.jsonl`: 1 (step 1)" in card


def test_links_to_files_outside_are_not_published(tmp_path):
    private = tmp_path / "private.txt"
    private.write_text("mine")
    folder = tmp_path / "run"
    save_pipeline(folder)
    (folder / "samples.png").symlink_to(private)
    with pytest.raises(InputError, match="samples.png is a link to .*private.txt outside the folder"):
        published_files(folder)
    (folder / "samples.png").unlink()
    # A component of this name is outside, too.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "key").write_text("mine")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"../other": ["diffusers", "X"], "empty": []}))
    assert not any("key" in name for name in published_files(folder))
    # Links inside are files like others, and so are those of a snapshot in the Hub's cache.
    (folder / "samples.png").symlink_to(folder / "model_index.json")
    assert "samples.png" in published_files(folder)
    blobs = tmp_path / "models--org--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = blobs.parent / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (snapshot / "samples.png").unlink()
    (blobs / "1").write_text("picture")
    (snapshot / "samples.png").symlink_to(blobs / "1")
    assert "samples.png" in published_files(snapshot)


def test_no_path_of_this_machine_gets_out():
    assert public_name("/data/models/dinov2") == "dinov2" and public_name(["~/x/y", "a/b"]) == ["y", "a/b"]
    assert public_name("SiT-B/2") == "SiT-B/2" and public_name(0.5) == 0.5
    assert public_name("C:\\x\\model.pt") == "model.pt" and public_name("/data/models/") == "models"
    assert public_name(str(ROOT)) == ROOT.name


def test_what_was_a_folder_there_is_no_name_on_the_hub_here(tmp_path, monkeypatch):
    (tmp_path / "there" / "outputs" / "digits").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    given = {"pretrained_model_name_or_path": "outputs/digits", "vae": "org/vae", "encoder": ["outputs/digits", "a/b"]}
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(given))
    model = tiny_model()
    model.adapters_suffice = False
    accelerator = SimpleNamespace(device=next(model.parameters()).device, num_processes=1, mixed_precision="no")
    write_start(tmp_path, 0, accelerator, AlignedTransformer(model), 8, 1250, given, "velocity")
    monkeypatch.chdir(tmp_path)
    run = read_run(tmp_path)
    assert run["options"] == given | {"pretrained_model_name_or_path": "digits", "encoder": ["digits", "a/b"]}
    assert run["max_train_steps"] == 1250
    data = yaml.safe_load(render_card(tmp_path, "org/x").split("---")[1])
    assert "base_model" not in data and data["license"] == "other"


@pytest.mark.parametrize(
    "change",
    [
        *(
            {},
            {"size": 16},
            {"labels": {0: "a", 1: "b", 2: "c", 3: "d", 4: "f"}},
            {"base": {"class_dropout_prob": 0.0}},
        ),
        *({"on_hub": False}, {"lora_rank": None}),
    ],
)
def test_adapters_suffice_where_all_else_is_the_bases(change):
    pytest.importorskip("peft")
    base = tiny_model(**change.get("base", {}))
    config = {key: value for key, value in base.config.items() if not key.startswith("_")}
    labels = dict(enumerate("abcde"))
    names = {str(key): name for key, name in labels.items()}
    start = Start(config, base, labels=names, on_hub=change.get("on_hub", True))
    args = Namespace(
        pretrained_model_name_or_path="org/base", vae=None, keep_labels=False, label_dropout=0.1, layer_scope="early",
        projector="mlp", projector_dim=16, model_config=None, preset=None, lora_rank=change.get("lora_rank", 2),
        lora_alpha=None, lora_dropout=0.0, lora_target=None,
    )  # fmt: skip
    size = change.get("size", base.config.sample_size)
    model, difference = build_transformer(args, start, (4, size, size), 5, change.get("labels", labels))
    load_start(model, args, start, difference)
    assert model.adapters_suffice == (change == {})


def test_adapters_of_a_checkpoint_and_its_card(tmp_path):
    start = {"adapters_suffice": True, "max_train_steps": 40}
    write_run(tmp_path / "run", start, pretrained_model_name_or_path="org/dit", lora_rank=2, max_train_steps=None)
    pipeline = VRPOPipeline(tiny_model(in_channels=3, prediction_type="epsilon"), DDPMScheduler())
    (tmp_path / "run" / "checkpoint-30").mkdir()
    weights = {"transformer_blocks.0.attn.to_q.lora_A.default.weight": pipeline.transformer.proj_out.weight.data}
    save_file(weights, tmp_path / "run" / "checkpoint-30" / "transformer_ema.safetensors")
    pipeline.transformer.adapters_suffice = False
    with pytest.raises(InputError, match="cannot be used without the rest of the pipeline"):
        stage_pipeline(pipeline, tmp_path / "run" / "checkpoint-30", tmp_path / "refused")
    pipeline.transformer.adapters_suffice = True
    stage_pipeline(pipeline, tmp_path / "run" / "checkpoint-30", tmp_path / "staged")
    assert set(published_files(tmp_path / "staged")) == {"pytorch_lora_weights.safetensors", "metrics.jsonl"}
    adapters = load_file(tmp_path / "staged" / "lora" / "pytorch_lora_weights.safetensors")
    assert list(adapters) == ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert pushes_adapters_only(read_run(tmp_path / "staged"))
    card = render_card(tmp_path / "staged", "org/adapters")
    assert "weights of step 30 of 40" in card and "a class-conditional DiT" in card and "flow-matching" not in card
    assert "| semantic | 0.5 |" in card and "| compute | 2 h" in card  # of the last line that has them


def test_mistakes_in_the_code_and_a_full_disk_are_not_the_hubs(tmp_path):
    full = OSError(28, "No space left on device", str(tmp_path / "x"))
    assert not is_passing(full) and hub_sentence(full, "org/x") == "the local disk is full; make room"
    mistake = KeyError("reward")
    assert not is_passing(mistake) and hub_sentence(mistake, "org/x").startswith("this program has failed (KeyError")
    assert is_passing(ConnectionError()) and "cannot be reached" in hub_sentence(ConnectionError(), "org/x")


IMPORT_WITHOUT = """
import importlib, importlib.util, sys
hidden, find_spec = ("transformers", "peft", "datasets"), importlib.util.find_spec
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
importlib.util.find_spec = lambda name, *package: None if name.split(".")[0] in hidden else find_spec(name, *package)
for name in ("diffusers_vrpo", "diffusers_vrpo.hub.publish", "diffusers_vrpo.commands.sample"):
    importlib.import_module(name)
assert not set(hidden) & set(sys.modules)
"""


@pytest.mark.slow
def test_publishing_and_sampling_import_without_what_only_training_needs():
    script = f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n{IMPORT_WITHOUT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_path_of_this_machine_is_in_what_is_sent(tmp_path):
    report = {"samples": {"source": "/data/samples", "count": 3}, "metrics": {"/models/dinov2": {"fd": 1.5}}}
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report))
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/data/vae", "eps": 1e-06}))
    sent = json.loads(without_paths("evaluation-a.json", tmp_path / "evaluation-a.json"))
    assert sent == {"samples": {"source": "samples", "count": 3}, "metrics": {"dinov2": {"fd": 1.5}}}
    sent = json.loads(without_paths("vae/config.json", tmp_path / "config.json"))
    assert sent == {"_name_or_path": "vae", "eps": 1e-06}
    (tmp_path / "config.json").write_text('{"_name_or_path": "outputs/vae"}')  # a folder of the machine that trained
    sent = without_paths("vae/config.json", tmp_path / "config.json", local=["outputs/vae"])
    assert json.loads(sent) == {"_name_or_path": "vae"}
    (tmp_path / "config.json").write_text('{"latent_channels": 4}')
    assert without_paths("vae/config.json", tmp_path / "config.json") == tmp_path / "config.json"


def test_the_recipes_cards_are_what_their_commands_give():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for recipe in render.RECIPES:
        card = (ROOT / "model_cards" / f"{recipe[0]}.md").read_text()
        assert card == render.card(*recipe), "run python model_cards/render.py"
        assert not metadata_errors(card) and "not measured yet" in card and "there are no weights yet" in card


def test_checkpoints_give_way_to_newer_ones_and_nothing_waits(tmp_path, caplog):
    options = {"hub_model_id": None, "hub_license": None, "hub_private_repo": False}
    options |= {"hub_push_checkpoints": False, "push_training_state": False}
    interruption = Interruption()
    # On another than the main process it does nothing.
    push = HubPublisher(Namespace(**options), SimpleNamespace(is_main_process=False), tmp_path, interruption)
    pipeline = save_pipeline(tmp_path / "saved")
    push.on_save(SimpleNamespace(pipeline=pipeline), tmp_path / "checkpoint-2")
    push.push_result()
    assert not (tmp_path / ".hub").exists()

    sent, may_send = [], threading.Event()

    def send(folder, step):
        assert may_send.wait(10)
        assert VRPOPipeline.from_pretrained(folder / "pipeline").labels == pipeline.labels
        sent.append(step)
        if step == 6:
            raise ConnectionError("hf_secret in an address")

    push.sends, push.args.hub_push_checkpoints = True, True
    push.repo_id, push.args.hub_private_repo, push.args.hub_license = "org/x", True, "mit"
    push._send_checkpoint, push._send_result = send, lambda: sent.append("result")
    threading.Thread(target=push._work, daemon=True).start()
    for step in (2, 4, 6):
        shutil.copytree(tmp_path / "saved" / "transformer", tmp_path / f"checkpoint-{step}" / "transformer_ema")
        push.on_save(SimpleNamespace(pipeline=pipeline), tmp_path / f"checkpoint-{step}")
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
    # Whoever follows the advice publishes as the run would have.
    assert f"{tmp_path} --hub_model_id org/x --hub_private_repo --hub_license mit`" in caplog.text
    assert caplog.text.count("safe in") == 1  # of the result alone: checkpoints may be gone


def test_a_checkpoint_that_cannot_be_shown_is_kept(tmp_path):
    options = {"hub_model_id": None, "hub_license": None, "hub_private_repo": False}
    options |= {"hub_push_checkpoints": False, "push_training_state": False}
    push = HubPublisher(Namespace(**options), SimpleNamespace(is_main_process=False), tmp_path, Interruption())
    push.sends = push.args.hub_push_checkpoints = push.args.push_training_state = True
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "transformer.safetensors").write_bytes(b"")
    (tmp_path / "metrics.jsonl").write_text("{}")
    pipeline = SimpleNamespace(transformer=SimpleNamespace(adapters_suffice=False))
    push.on_save(SimpleNamespace(pipeline=pipeline), tmp_path / "checkpoint-2")
    assert list(push.missing) == ["step 2"] and push._waiting[0] == "step 2"
    assert {path.name for path in (tmp_path / ".hub" / "step-2").iterdir()} == {"checkpoint-2"}
    assert (tmp_path / ".hub" / "step-2" / "checkpoint-2" / "metrics.jsonl").is_file()


def test_a_wheel_has_the_template_and_the_pipelines():
    text = (ROOT / "pyproject.toml").read_text()
    for folder in ("model_cards", "pipelines", "configs", "space", "train_vrpo.py"):
        assert f'"{folder}" = "diffusers_vrpo/{folder}"' in text
