# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The trainer on transformers of diffusers: diffusers' DiT, and a model with an adapter of its own."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_vrpo import ModelAdapter, VRPOConfig, VRPOTrainer
from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.hub.background import stage_pipeline
from diffusers_vrpo.hub.card import render_card
from diffusers_vrpo.hub.publish import published_files
from diffusers_vrpo.pipelines.adapters import DiTAdapter, adapter_for
from diffusers_vrpo.training.given_transformer import add_lora
from diffusers_vrpo.training.metrics import read_metrics
from support.data import write_files
from support.models import digits_model
from support.official import tiny_dit
from support.trainers import assert_same_end
from support.training import losses, no_curves


SAMPLED = {"kl_coeff": 0.1, "policy_epochs": 1, "estimator": "sampled"}


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch):
    monkeypatch.setattr(trainer_module, "plot_metrics", no_curves)


def vae(**changes) -> AutoencoderKL:
    """A small autoencoder with random weights that keeps the size of images."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    return AutoencoderKL(**sizes, scaling_factor=0.5, **changes).eval()


def dit(**changes) -> DiTTransformer2DModel:
    """Diffusers' DiT with random weights, for digits."""
    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_embeds_ada_norm": 10}
    return tiny_dit(**{**sizes, **changes}).train()


class CaptionedPixArt(ModelAdapter):
    """PixArt on pixels as a flow: velocities, time in thousandths, and a caption of random vectors for each class."""

    null_class_id = 10

    def __init__(self):
        self.captions = torch.randn(11, 3, 12, generator=torch.Generator().manual_seed(1))
        self.times = []

    def call(self, model, x_t, timestep, batch):
        self.times.append(timestep)
        captions = self.captions.to(x_t.device)[batch["class_labels"]]
        nothing = {"resolution": None, "aspect_ratio": None}
        return model(x_t, captions, timestep=1000 * timestep, added_cond_kwargs=nothing)


def pixart(**changes) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 12}
    sizes |= {"in_channels": 3, "out_channels": 3, "sample_size": 8, "num_layers": 2}
    return PixArtTransformer2DModel(**{**sizes, "use_additional_conditions": False, **changes})


class Captioned(ModelAdapter):
    """A model that is called with a caption of random vectors."""

    def call(self, model, x_t, timestep, batch):
        return model(x_t, timestep=timestep, encoder_hidden_states=torch.randn(len(x_t), 3, 12))


def prx() -> PRXTransformer2DModel:
    sizes = {"hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8], "context_in_dim": 12}
    return PRXTransformer2DModel(in_channels=4, **sizes)


@pytest.fixture
def train(tmp_path):
    """`train(transformer, **changes)`: trains two steps on digits, saves, and returns the trainer."""

    def make(transformer, adapter=None, vae="none", callbacks=(), **changes) -> VRPOTrainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "output_dir": str(tmp_path / "run"),
            "dataset_name": "embedded:digits",
            "resolution": 8,
            "projector_dim": 16,
            "train_batch_size": 8,
            "max_train_steps": 2,
            "learning_rate": 0.01,
            "ema_decay": 0.5,
            "logging_steps": 1,
            "validation_steps": 10000,
            "checkpointing_steps": 1,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "dataloader_num_workers": 0,
            "report_to": "none",
        }
        args = VRPOConfig(**{**options, **changes})
        parts = {"encoders": "embedded:digits"} if args.objective != "none" else {}
        with VRPOTrainer(
            transformer=transformer, adapter=adapter, vae=vae, args=args, callbacks=callbacks, **parts
        ) as trainer:
            trainer.train()
            trainer.save_model()
        return trainer

    return make


@pytest.mark.slow
def test_dit_trains_continues_validates_saves_and_publishes(train, tmp_path):
    trainer = train(dit(), vae=vae())
    assert isinstance(trainer.adapter, DiTAdapter) and trainer.adapter.null_class_id == 10
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"loss_fm", "loss_vb", "reward/semantic", "tflops_per_device"} <= rows[0].keys()

    # A run in two parts is equal, bit by bit.
    train(dit(), vae=vae(), output_dir=str(tmp_path / "parts"), max_train_steps=1)
    train(dit(), vae=vae(), output_dir=str(tmp_path / "parts"))
    assert_same_end(tmp_path / "run", tmp_path / "parts", 2)

    # Diffusers opens the result, which has the averaged weights and the names of the classes.
    assert (tmp_path / "run" / "samples" / "step-0000002.png").is_file()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is DiTPipeline and pipeline.labels["three"] == 3
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([3], guidance_scale=1.0, num_inference_steps=2).images[0].size == (8, 8)
    for ours, saved in zip(trainer.ema.shadow_params, pipeline.transformer.parameters(), strict=False):
        assert torch.equal(ours, saved)

    # What a push would send, of the result and of a checkpoint on the way.
    assert {"model_index.json", "transformer/config.json", "vae/config.json", "samples.png"} <= {
        *published_files(tmp_path / "run")
    }
    stage_pipeline(trainer.pipeline, tmp_path / "run" / "checkpoint-2", tmp_path / "staged")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "staged")) is DiTPipeline
    card = render_card(tmp_path / "run", "org/digits-dit")
    assert "trust_remote_code" not in card and "noise-prediction" in card and "DiT diffusion transformer" in card
    assert "flow-matching" not in ModelCard(card).data.tags


class Recording(DiTAdapter):
    """Diffusers' DiT, and the labels that it is called with."""

    def __init__(self):
        self.labels = []

    def call(self, model, x_t, timestep, batch):
        self.labels += batch["class_labels"].tolist()
        return super().call(model, x_t, timestep, batch)


def test_dit_drops_labels_by_the_trainers_streams(train):
    adapter = Recording()
    trainer = train(dit(), adapter, vae=vae(), max_train_steps=2, label_dropout=0.5, objective="repa")
    model = trainer.transformer.train()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([5, 5, 5, 5]), torch.tensor([1, 2, 3, 4])
    assert torch.equal(model(*inputs).sample, model(*inputs).sample)  # none inside the blocks
    assert 10 in adapter.labels and len({*adapter.labels}) > 2 and trainer.settings["label_dropout"] == 0.5


@pytest.mark.slow
def test_an_adapter_in_a_script_trains_continues_and_saves_without_a_pipeline(train, tmp_path):
    adapter = CaptionedPixArt()
    trainer = train(pixart(), adapter, **SAMPLED)
    assert trainer.validation is None and not (tmp_path / "run" / "samples").exists()
    assert all(time.is_floating_point() and time.max() < 1 for time in adapter.times)
    train(pixart(), CaptionedPixArt(), output_dir=str(tmp_path / "parts"), max_train_steps=1, **SAMPLED)
    train(pixart(), CaptionedPixArt(), output_dir=str(tmp_path / "parts"), **SAMPLED)
    assert_same_end(tmp_path / "run", tmp_path / "parts", 2)
    saved = PixArtTransformer2DModel.from_pretrained(tmp_path / "run" / "transformer")
    assert torch.equal(trainer.ema.shadow_params[0], next(saved.parameters()))
    with pytest.raises(InputError, match="no pipeline"):
        published_files(tmp_path / "run")


def test_adapters_of_given_transformers_have_scale_dropout_and_targets():
    pytest.importorskip("peft")
    transformer = dit()
    add_lora(
        transformer, VRPOConfig(lora_rank=2, lora_alpha=6, lora_dropout=0.5, lora_target=["to_v", r".*1\.ff\.net\.2"])
    )
    adapted = {name for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {*(f"transformer_blocks.{i}.attn1.to_v" for i in range(2)), "transformer_blocks.1.ff.net.2"}
    layer = transformer.transformer_blocks[0].attn1.to_v
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.5
    with pytest.raises(InputError, match="`lora_target` query names no linear layer; give names out of .*attn1.to_q"):
        add_lora(dit(), VRPOConfig(lora_rank=2, lora_target=["query"]))


@pytest.mark.slow
def test_adapters_train_continue_and_are_merged(train, tmp_path):
    trainer = train(dit(), vae=vae(), lora_rank=2)
    written = (tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    trainer.save_model()  # the trainer still has the adapters
    assert (tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == written
    trainer.train()
    state = load_file(tmp_path / "run" / "checkpoint-2" / "transformer.safetensors")
    assert len(state) == 2 * 2 * 6 and all(".lora_" in name for name in state)
    train(dit(), vae=vae(), lora_rank=2, output_dir=str(tmp_path / "parts"), max_train_steps=1)
    train(dit(), vae=vae(), lora_rank=2, output_dir=str(tmp_path / "parts"))
    parts = load_file(tmp_path / "parts" / "checkpoint-2" / "transformer.safetensors")
    assert all(torch.equal(parts[name], state[name]) for name in state)

    # The result is a plain DiT whose attention and feed-forward layers have moved; the adapters are there, too.
    base, saved = dit().state_dict(), DiTPipeline.from_pretrained(tmp_path / "run").transformer.state_dict()
    moved = {name.split(".", 2)[2] for name in base if not torch.equal(base[name], saved[name])}
    assert moved == {f"attn1.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")} | {
        "ff.net.0.proj.weight",
        "ff.net.2.weight",
    }
    assert len(load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")) == len(state)

    other = dit()
    torch.nn.init.zeros_(other.transformer_blocks[0].ff.net[2].bias)
    with pytest.raises(InputError, match="the checksum of the frozen weights"):
        train(other, vae=vae(), lora_rank=2, max_train_steps=3)


@pytest.mark.slow
def test_a_latent_cache_gives_the_losses_of_its_images(train, tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    argv = ["--dataset_name", "digits", "--vae", str(tmp_path / "vae"), "--resolution", "8", "--encoder", "digits"]
    prepare_latents.main([*argv, "--output_dir", str(tmp_path / "cache"), "--dataloader_num_workers", "0"])
    train(dit(), vae=vae(), output_dir=str(tmp_path / "images"))
    trainer = train(dit(), vae=None, dataset_name=None, latents_dir=str(tmp_path / "cache"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "images"), abs=2e-3)
    assert trainer.data.vae == str(tmp_path / "vae")
    assert (tmp_path / "run" / "samples" / "step-0000002.png").is_file()


@pytest.mark.slow
def test_streamed_files_train_and_continue(train, tmp_path):
    data = {"dataset_name": write_files(tmp_path / "files"), "streaming": True}
    train(pixart(), CaptionedPixArt(), **data)
    train(pixart(), CaptionedPixArt(), **data, output_dir=str(tmp_path / "parts"), max_train_steps=1)
    train(pixart(), CaptionedPixArt(), **data, output_dir=str(tmp_path / "parts"))
    assert_same_end(tmp_path / "run", tmp_path / "parts", 2)


def test_the_distance_to_images_is_measured_with_the_adapters_samples(train, tmp_path):
    measured = {"fd_encoder": "embedded:digits", "num_fd_samples": 8, "max_train_samples": 32}
    train(dit(), vae=vae(), objective="none", max_train_steps=1, **measured)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["validation/fd_digits"] > 0


def test_image_rewards_and_a_transformer_of_the_packages_own_class(train):
    trainer = train(digits_model().train(), objective="repa", image_rewards=["perceptual"], max_train_steps=1)
    assert type(trainer.pipeline).__name__ == "VRPOPipeline" and trainer.validation.grid is not None


class WrongShape(CaptionedPixArt):
    def call(self, model, x_t, timestep, batch):
        return super().call(model, x_t, timestep, batch)[:, :1]


@pytest.mark.parametrize(
    ("field", "part", "given"),
    [
        ("transformer", "ModelMixin", {"transformer": torch.nn.Linear(1, 1)}),
        ("adapter", "is missing", {"transformer": pixart()}),
        ("adapter", "a ModelAdapter class", {"adapter": "dit"}),
        ("adapter", "call fails", {"transformer": pixart(), "adapter": ModelAdapter(), "vae": "none"}),
        ("adapter", r"must be \(1, 3, 8, 8\)", {"transformer": pixart(), "adapter": WrongShape(), "vae": "none"}),
        ("adapter", "without `transformer`", {"transformer": None, "adapter": DiTAdapter()}),
        ("transformer", "10", {"transformer": dit(num_embeds_ada_norm=7)}),
        ("transformer", "frozen", {"transformer": dit().requires_grad_(False)}),
        ("vae", "DiTPipeline decodes latents", {"transformer": dit(in_channels=3, out_channels=3), "vae": "none"}),
        ("vae", "channels", {"vae": "none"}),
        ("vae", "shift_factor", {"vae": vae(shift_factor=0.1)}),
        ("resolution", "sample_size", {"transformer": dit(sample_size=16)}),
        ("preset", "already is the model", {"preset": "SiT-XS/2"}),
        ("lora_rank", "at most 32, the width", {"lora_rank": 33}),
        (
            "lora_rank",
            "no attention layers called to_q",
            {"transformer": prx(), "adapter": Captioned(), "lora_rank": 4},
        ),
        ("compile", "needs a transformer with `_repeated_blocks`", {"compile": True}),
        ("push_to_hub", "pipeline", {"transformer": pixart(), "adapter": CaptionedPixArt(), "vae": "none", "push": 1}),
        ("fd_encoder", "pipeline", {"transformer": pixart(), "adapter": CaptionedPixArt(), "vae": "none", "fd": 1}),
        ("label_dropout", "null_class_id", {"adapter": ModelAdapter(), "label_dropout": 0.1}),
        ("validation_labels", "name of a class", {"validation_labels": ["thirteen"]}),
        ("callbacks", "generative policy", {"policy": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_any_work(field, part, given, train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "HubPublisher", lambda *parts: None)
    given = {"transformer": dit(), "vae": vae(), "objective": "none", **given}
    if given.pop("push", None):
        given["push_to_hub"] = True
    if given.pop("fd", None):
        given["fd_encoder"] = "embedded:digits"
    if given.pop("policy", None):
        given["callbacks"] = [GenerativePolicy(VRPOConfig(generative_policy_start_step=1))]
    with pytest.raises(InputError, match=part) as caught:
        train(given.pop("transformer"), **given)
    assert caught.value.field == field and not list(Path(tmp_path / "run").glob("checkpoint*"))
    assert len(str(caught.value).splitlines()) == 1


def test_another_model_or_convention_does_not_continue_a_run(train):
    train(dit(), vae=vae(), objective="none", max_train_steps=1)
    with pytest.raises(InputError, match="attention_head_dim"):
        train(dit(attention_head_dim=24), vae=vae(), objective="none")

    class Unguided(DiTAdapter):
        def prepare(self, transformer):
            super().prepare(transformer)
            self.null_class_id = None

    with pytest.raises(InputError, match="label_dropout|the adapter's null_class_id"):
        train(dit(), Unguided(), vae=vae(), objective="none")


def test_adapters_of_the_package():
    assert type(adapter_for(dit())) is DiTAdapter
    with pytest.raises(NotImplementedError, match="call"):
        ModelAdapter().call(None, None, None, {})
    assert json.loads(json.dumps(dict(dit().config)))["num_embeds_ada_norm"] == 10
