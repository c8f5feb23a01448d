# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Options of models and their training that users bring: what they change, what is refused, and resuming with them."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file

from diffusers_vrpo import VRPO, SiTTransformer2DModel, VRPOConfig, VRPOPipeline
from diffusers_vrpo.alignment.custom_encoders import load_custom_encoder
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.gradient_fork import compiled_mix_gradients
from diffusers_vrpo.alignment.policy import timestep_weight
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder
from diffusers_vrpo.models.flow import flow_time, sample_time
from diffusers_vrpo.models.start import lora_layers, read_start
from diffusers_vrpo.training.checkpoints import write_manifest
from diffusers_vrpo.training.interruption import Interruption, StepGuard
from diffusers_vrpo.training.metrics import read_metrics
from diffusers_vrpo.training.setup import build_optimizer
from support.models import aligned_with, digits_model
from support.training import assert_same_files, losses, run


def train_twice(command, tmp_path, *flags: str, **options):
    """Trains four steps at once, and two and two in another folder, which must end with the same bits."""
    options = {"logging_steps": 2, **options}
    run([*command(**options), *flags])
    halves = tmp_path / "halves"
    for steps in (2, 4):
        run([*command(**options, output_dir=halves, max_train_steps=steps), *flags])
    ends = tmp_path / "run" / "checkpoint-4", halves / "checkpoint-4"
    names = [str(file.relative_to(ends[0])) for file in ends[0].rglob("*.safetensors")]
    assert_same_files(*ends, names)
    left, right = (torch.load(end / "optimizer.bin", weights_only=True)["state"] for end in ends)
    assert left.keys() == right.keys() and left
    for key, state in left.items():
        assert state.keys() == right[key].keys()
        for name, tensor in state.items():
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(right[key][name])), name
    assert losses(tmp_path / "run") == losses(halves)


# Noise levels


@pytest.mark.parametrize("prediction_type", ["velocity", "epsilon"])
def test_logit_normal_noise_levels(prediction_type):
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert sample_time(u) is u
    t = sample_time(u, "logit_normal", -0.5, 1.5)
    assert t.min() >= 0 and t.max() < 1
    # The formula of diffusers' `compute_density_for_timestep_sampling`, which draws from a generator of its own.
    generator = torch.Generator().manual_seed(1)
    drawn = compute_density_for_timestep_sampling("logit_normal", len(t), -0.5, 1.5, generator=generator)
    quantiles = torch.linspace(0.01, 0.99, 33)
    torch.testing.assert_close(t.quantile(quantiles), drawn.quantile(quantiles), atol=5e-3, rtol=0)
    assert sample_time(torch.tensor([0.0, 1 - 2**-24]), "logit_normal", 10.0, 10.0).tolist() == [0.0, 1 - 2**-24]
    # The weights of the noise levels have the mean 1 over what is drawn.
    aligned, logit = aligned_with(digits_model(prediction_type=prediction_type)), ("logit_normal", -0.5, 1.5)
    names = dict(zip(("timestep_sampling", "logit_mean", "logit_std"), logit))
    objective = VRPO(aligned, 100, timestep_weighting="low_noise", **names)
    weight = timestep_weight(flow_time(t, aligned.transformer.config), "low_noise") / objective.mean_weight
    assert weight.mean().item() == pytest.approx(1, abs=6e-3)
    uniform = VRPO(aligned, 100, timestep_weighting="low_noise").mean_weight
    assert (uniform == 1) == (prediction_type == "velocity") and abs(objective.mean_weight - uniform) > 0.05


# Adapters


@pytest.mark.slow
def test_adapters_with_scale_dropout_and_targets(command, tmp_path):
    base = digits_model()
    base.save_pretrained(tmp_path / "start")
    start = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "lora_rank": 2}
    options = start | {"lora_alpha": 6, "lora_dropout": 0.3}
    targets = ["--lora_target", "to_q", r"transformer_blocks\.1\.ff\.net\.\d.*", "modulation"]
    train_twice(command, tmp_path, *targets, **options)
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "transformer.safetensors")
    adapted = {name.split(".lora_")[0] for name in saved}
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    assert adapted == {
        *(f"{block}.{name}" for block in blocks for name in ("attn.to_q", "modulation")),
        "transformer_blocks.1.ff.net.0.proj",
        "transformer_blocks.1.ff.net.2",
    }
    # The pipeline has them merged with their scale, and loads them with it.
    merged = VRPOPipeline.from_pretrained(tmp_path / "run").transformer.state_dict()
    layers = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    change = 3 * layers[f"transformer.{name}.lora_B.weight"] @ layers[f"transformer.{name}.lora_A.weight"]
    expected = base.state_dict()[f"{name}.weight"] + change
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    base.load_lora_adapter(str(tmp_path / "run" / "lora"), use_safetensors=True)
    layer = base.transformer_blocks[0].attn.to_q
    assert list(layer.scaling.values()) == [3.0]
    with pytest.raises(InputError, match="`lora_dropout` is 0.0, but .* was trained with 0.3"):
        run([*command(**options | {"lora_dropout": 0.0}), *targets])


def test_targets_of_adapters_are_linear_layers():
    model = digits_model()
    assert lora_layers(model, ["to_out.0", "proj_out"]) == ["to_out.0", "proj_out"]
    assert lora_layers(model, [r".*\.modulation"]) == [f"transformer_blocks.{i}.modulation" for i in range(2)]
    for wrong in ("to_x", "label_embedding", "norm_q", "(to_q"):
        with pytest.raises(
            InputError, match="names no linear layer; give names out of ff.net.0.proj, ff.net.2, "
        ) as e:
            lora_layers(model, [wrong])
        assert e.value.field == "lora_target" and wrong in str(e.value)
    for option in ({"lora_alpha": 4.0}, {"lora_dropout": 0.1}, {"lora_target": ["to_q"]}):
        with pytest.raises(InputError, match="has no effect without `lora_rank`; remove it"):
            VRPOConfig(**option)


# How a step is computed


@pytest.mark.slow
def test_an_average_that_moves_rarely_and_recomputed_blocks_resume_exactly(command, tmp_path):
    options = {"ema_every": 2, "gradient_checkpointing": "mlp", "optimizer": "NAdam", "max_grad_norm": 0.1}
    train_twice(command, tmp_path, **options, checkpointing_steps=1)
    second, third = tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-3"
    file = "diffusion_pytorch_model.safetensors"
    assert_same_files(second / "transformer_ema", third / "transformer_ema", [file])
    before, after = load_file(second / "transformer" / file), load_file(third / "transformer" / file)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_compiled_steps_resume_exactly(command, tmp_path, monkeypatch):
    """Tracing and AOT autograd, as with Inductor, whose code would take minutes to make."""
    compile_with_inductor, compiled = torch.compile, []

    def compile(model, *arguments, mode=None, **options):
        compiled.append(model)
        return compile_with_inductor(model, *arguments, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    compiled_mix_gradients.cache_clear()
    train_twice(command, tmp_path, "--compile")
    compiled_mix_gradients.cache_clear()
    assert len(compiled) > 3  # three runs
    monkeypatch.setattr(torch, "compile", compile_with_inductor)
    run(command(output_dir=tmp_path / "eager", logging_steps=2))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


# Queries and keys


@pytest.mark.slow
def test_qk_norm_and_noise_levels_train_resume_and_open(command, tmp_path):
    train_twice(command, tmp_path, "--qk_norm", timestep_sampling="logit_normal", logit_mean=0.5)
    transformer = VRPOPipeline.from_pretrained(tmp_path / "run").transformer
    assert transformer.config.qk_norm == "rms_norm"
    norm = transformer.transformer_blocks[0].attn.norm_q
    # It began at 1, as the scale of a norm does, and has been trained.
    assert 0 < (norm.weight - 1).abs().max() < 0.2
    with pytest.raises(InputError, match="`timestep_sampling` is uniform, but .* was trained with logit_normal"):
        run([*command(), "--qk_norm"])
    with pytest.raises(InputError, match="the model's qk_norm is False, but .* was trained with rms_norm"):
        run(command(timestep_sampling="logit_normal", logit_mean=0.5))
    # Weights keep the norm that they have, and get none that they were not trained with.
    start = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "run", "max_train_steps": 1}
    run(command(**start, output_dir=tmp_path / "next"))
    assert VRPOPipeline.from_pretrained(tmp_path / "next").transformer.config.qk_norm == "rms_norm"
    for found, message in ((False, "without a norm of"), (True, "with a LayerNorm on")):
        digits_model(qk_norm=found).save_pretrained(tmp_path / "other")
        start["pretrained_model_name_or_path"] = tmp_path / "other"
        with pytest.raises(InputError, match=f"`qk_norm`: .*other was trained {message} queries and keys; remove it"):
            run([*command(**start, output_dir=tmp_path / "third"), "--qk_norm"])


def test_qk_norm_in_a_file_of_arguments(tmp_path):
    file = tmp_path / "model.json"
    file.write_text('{"qk_norm": "rms_norm", "num_layers": 2}')
    assert read_start(VRPOConfig(model_config=file)).config["qk_norm"] == "rms_norm"
    file.write_text('{"num_layers": 2}')
    assert read_start(VRPOConfig(model_config=file, qk_norm=True)).config["qk_norm"] == "rms_norm"
    assert "qk_norm" not in read_start(VRPOConfig(model_config=file)).config
    file.write_text('{"qk_norm": true}')
    with pytest.raises(InputError, match="`qk_norm` cannot be combined with qk_norm true in `model_config`"):
        read_start(VRPOConfig(model_config=file, qk_norm=True))


@torch.no_grad()
def test_rms_norm_of_queries_and_keys(tmp_path):
    model = digits_model(qk_norm="rms_norm")
    x = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(model(*x).sample, loaded(*x).sample)
    # As LightningDiT has it: x / rms(x), times a scale of each channel, without a bias; float32 under autocast.
    norm, query = model.transformer_blocks[0].attn.norm_k, torch.randn(2, 16, 2, 16)
    expected = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(query), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(query.bfloat16()).dtype == torch.float32
        assert model(*x).sample.isfinite().all()
    with pytest.raises(ValueError, match="qk_norm 'layer' must be one of False, True, rms_norm"):
        digits_model(qk_norm="layer")


# Optimizers


def built(**options) -> torch.optim.Optimizer:
    """The optimizer of some options, over a matrix, a vector and a convolution."""
    shapes = ((4, 3), (3,), (2, 3, 2, 2))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    return build_optimizer(VRPOConfig(**options), parameters)


@pytest.mark.parametrize(
    "name",
    [
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
        "sgd",
    ],
)
def test_optimizers_of_torch_by_name(name):
    optimizer = built(optimizer=name, learning_rate=0.01)
    assert type(optimizer).__name__.lower() == name.lower()
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.01 and group["weight_decay" if name != "Rprop" else "lr"] in (0, 0.01)
    optimizer.step()
    assert all((parameter < 1).all() for parameter in group["params"])


def test_adamw_is_what_it_was():
    optimizer = built(optimizer="AdamW", adam_beta1=0.8, adam_weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.999) and group["weight_decay"] == 0.1 and group["fused"] is True


def test_arguments_of_optimizers():
    (group,) = built(optimizer="SGD", optimizer_args='{"nesterov": true, "momentum": 0.9}').param_groups
    assert group["momentum"] == 0.9 and group["nesterov"] is True
    assert built(optimizer="Adam", optimizer_args={"betas": [0.8, 0.9]}).param_groups[0]["betas"] == (0.8, 0.9)
    one, other = ({"momentum": 0.9, "nesterov": True}, '{ "nesterov": true,"momentum": 0.9}')
    assert VRPOConfig(optimizer_args=one).optimizer_args == VRPOConfig(optimizer_args=other).optimizer_args


@pytest.mark.parametrize(
    "options, field, message",
    [
        ({"optimizer": "Lion"}, "optimizer", "`optimizer` Lion is not known; give one of adamw8bit, .*SGD"),
        (
            {"optimizer": "Muon"},
            "optimizer",
            "`optimizer` Muon: it updates matrices only, and the transformer also has",
        ),
        ({"optimizer": "LBFGS"}, "optimizer", "it computes the loss several times in a step; give one of"),
        ({"optimizer_args": "momentum=0.9"}, "optimizer_args", "`optimizer_args` momentum=0.9 is not JSON"),
        ({"optimizer_args": "[1]"}, "optimizer_args", "must map names of arguments to values, such as"),
        (
            {"optimizer": "SGD", "optimizer_args": '{"beta": 1}'},
            "optimizer_args",
            "has 'beta', which it cannot set for SGD; the arguments that it can set are momentum, dampening,",
        ),
        (
            {"optimizer": "SGD", "optimizer_args": '{"lr": 1}'},
            "optimizer_args",
            "has 'lr', which it cannot set for SGD",
        ),
        (
            {"optimizer_args": '{"betas": [0.9, 0.9]}'},
            "optimizer_args",
            "has 'betas', which it cannot set for adamw",
        ),
        (
            {"optimizer": "SGD", "optimizer_args": '{"momentum": "high"}'},
            "optimizer_args",
            '`optimizer` SGD refuses .*"momentum": "high"',
        ),
        (
            {"optimizer": "SGD", "adam_beta1": 0.5},
            "adam_beta1",
            "has no effect without `optimizer` adamw, adamw8bit, torchao:adamw8bit, torchao:adamw4bit or torchao:adamwfp8",
        ),
    ],
)
def test_optimizers_that_cannot_work(options, field, message):
    if options.get("optimizer") == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(InputError, match=message) as error:
        built(**options)
    assert error.value.field == field


def test_adamw8bit_is_that_of_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        InputError, match="`optimizer` adamw8bit needs bitsandbytes, which .* pip install bitsandbytes"
    ):
        built(optimizer="adamw8bit")

    class AdamW8bit(torch.optim.AdamW):
        """Stands for the class of a library that is not installed here."""

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    optimizer = built(optimizer="adamw8bit", adam_beta2=0.95)
    assert type(optimizer) is AdamW8bit and optimizer.param_groups[0]["betas"] == (0.9, 0.95)


class TorchaosAdamW8bit(torch.optim.AdamW):
    """Stands for torchao's: it keeps the rate in a tensor, takes no number in its place, and keeps moments in few bits."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, block_size=256):
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                raise RuntimeError("lr was changed to a number")
        super().step(closure)
        for state in self.state.values():
            state["exp_avg"].copy_(state["exp_avg"].bfloat16())


@pytest.fixture
def torchao(monkeypatch):
    """A torchao.optim with one optimizer."""
    monkeypatch.setitem(sys.modules, "torchao", package := ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", ModuleType("torchao.optim"))
    package.optim = sys.modules["torchao.optim"]
    package.optim.AdamW8bit = TorchaosAdamW8bit


def test_optimizers_of_torchao(torchao, monkeypatch):
    options = {"optimizer": "torchao:AdamW8bit", "adam_beta2": 0.95, "optimizer_args": {"block_size": 128}}
    (group,) = built(**options).param_groups
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0  # that of the option, not of the class
    assert VRPOConfig(optimizer="torchao:AdamW8bit").optimizer == "torchao:adamw8bit"
    with pytest.raises(
        InputError, match="`optimizer` torchao:Lion is not in torchao.optim; give one of torchao:AdamW8bit"
    ):
        built(optimizer="torchao:Lion")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError, match="`optimizer` torchao:adamw8bit needs torchao, which .* pip install torchao"):
        built(optimizer="torchao:AdamW8bit")


@pytest.mark.slow
def test_an_optimizer_of_torchao_trains_resumes_and_takes_another_rate(command, torchao, tmp_path):
    options = {"optimizer": "torchao:AdamW8bit", "lr_warmup_steps": 3, "logging_steps": 2}
    train_twice(command, tmp_path, **options)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "training_state.json").read_text())["lr_scheduler"]
    assert state["base_lrs"] == [0.01]  # of `command`; a tensor would have rounded it
    changed = {"learning_rate": 0.5, "allow_changed": "learning_rate", "max_train_steps": 6}
    run(command(**options, **changed))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["learning_rate"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_a_step_that_is_not_finite_changes_no_weights(name):
    AcceleratorState._reset_state(reset_partial_state=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(VRPOConfig(optimizer=name), [parameter])
    guard = StepGuard(Accelerator(cpu=True), optimizer, Interruption(), skip_nonfinite=True)
    for loss, gradient, problem in ((1.0, math.nan, "the gradient"), (math.inf, 1.0, "the loss"), (1.0, 1.0, None)):
        parameter.grad = torch.full((3,), gradient)
        guard.watch(torch.tensor(loss))
        guard.ask(parameter.grad.norm())
        if guard.may_step():
            optimizer.step()
        assert guard.answer() == problem
        assert (parameter == 1).all() == (problem is not None)
    assert guard.skipped == 2


# Encoders of code


ENCODERS = """
import torch

class Patches(torch.nn.Conv2d):  # an encoder whose width the trainer asks for
    def __init__(self):
        torch.manual_seed(1)
        super().__init__(3, 12, 2, stride=2)
    def forward(self, images):
        return super().forward(images).flatten(2).mT

def from_hub():  # as torch.hub.load or timm.create_model return it
    model = Patches()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model.patch_embed = torch.nn.Module()
    model.patch_embed.patch_size, model.num_prefix_tokens = (2, 2), 1
    def forward_features(images):
        tokens = Patches.forward(model, images)
        return torch.cat([tokens.new_full((len(tokens), 1, 12), 9.0), tokens], 1)
    model.forward_features = forward_features
    return model

def dino():  # DINOv2 of torch.hub gives a dictionary
    model = from_hub()
    features = model.forward_features
    model.forward_features = lambda images: {"x_norm_patchtokens": features(images)[:, 1:]}
    return model

class FixedSize(torch.nn.Module):  # takes its own size only, as a ViT of timm does
    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 12, 2, stride=2)
        self.patch_embed.patch_size, self.patch_embed.img_size = 2, 12
    def forward_features(self, images):
        assert images.shape[-1] == 12
        return self.patch_embed(images).flatten(2).mT

class Classes(torch.nn.Module):
    def forward(self, images):
        return torch.zeros(len(images), 1000)

instance = Patches().eval()
number = 3
"""


@pytest.fixture
def own_encoders(tmp_path):
    file = tmp_path / "own_encoders.py"
    file.write_text(ENCODERS)
    return file


def test_encoders_of_files_and_modules(own_encoders, monkeypatch):
    def load(name):
        return load_custom_encoder(name, (4, 4), None, 8, torch.device("cpu"))

    images = torch.rand(3, 3, 8, 8) * 2 - 1
    plain = load(f"{own_encoders}:Patches").train()
    assert plain.embed_dim == 12 and not plain.module.training
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    monkeypatch.syspath_prepend(own_encoders.parent)
    for name in ("own_encoders:instance", "own_encoders:from_hub", "own_encoders:dino"):
        # (x + 1) / 2 normalised by 0.5 and 0.5 is x again.
        torch.testing.assert_close(load(name)(images), plain(images))
    assert load("own_encoders:from_hub").grid_size == (4, 4)
    fixed = load("own_encoders:FixedSize")
    assert fixed.grid_size == (6, 6) and fixed(images).shape == (3, 36, 12)
    for name, message in (
        (f"{own_encoders}:Classes", "it returns .2, 1000. for 2 images; it must return patch embeddings"),
        (f"{own_encoders}:number", "does not give patch embeddings of an image: "),
        (f"{own_encoders}:absent", "cannot be imported: .*absent"),
        ("absent.py:f", "the file absent.py does not exist"),
        ("no_such_package:f", "cannot be imported: No module named"),
        ("own_encoders:", "give package.module:name or FILE.py:name"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load(name)
        assert error.value.field == "encoder"
    with pytest.raises(InputError, match="`encoder_layer` 2 has no effect with `encoder` own_encoders:dino"):
        load_custom_encoder("own_encoders:dino", (4, 4), 2, 8, torch.device("cpu"))


@pytest.mark.slow
def test_an_own_encoder_and_another_optimizer_train_and_resume(command, own_encoders, tmp_path):
    options = {"encoder": f"{own_encoders}:dino", "objective": "repa", "optimizer": "Adafactor"}
    options["optimizer_args"] = '{"weight_decay": 0.01}'
    train_twice(command, tmp_path, **options)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["reward/semantic"] != 0
    with pytest.raises(InputError, match="`optimizer` is SGD, but .* was trained with Adafactor"):
        run(command(**options | {"optimizer": "SGD"}))


def test_only_the_command_line_and_python_name_code_to_run(command, tmp_path, capsys):
    """Not a file that came with weights: neither a recorded configuration nor what the other commands read."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nencoder = None\n")
    name = f"{trap}:encoder"
    recorded = tmp_path / "train_config.yaml"
    for option, value in (
        ("image_rewards", "perceptual,package.module:reward"),
        ("reward_function", name),
        ("encoder", name),
    ):
        recorded.write_text(f"{option}: [{json.dumps(value)}]\n")
        with pytest.raises(SystemExit):
            run(command(config=recorded, encoder=None))
        expected = f"{value} names code to run, which a file must not do; give it on the command line as --{option}"
        assert expected in capsys.readouterr().err
    for load in (lambda: load_encoder(name, (4, 4)), lambda: load_image_encoder(name)):
        with pytest.raises(InputError, match="names code to run, which only `encoder` of training may do"):
            load()
    # A checkpoint compares the recorded name with the given one, and a pipeline does not record it.
    run(command(max_train_steps=1))
    state = tmp_path / "run" / "checkpoint-1" / "training_state.json"
    state.write_text(state.read_text().replace('"digits"', json.dumps(name)))
    write_manifest(state.parent)
    (tmp_path / "run" / "train_config.yaml").write_text(recorded.read_text())
    with pytest.raises(InputError, match="`encoder` is .*digits.*, but .* was trained with"):
        run(command())
    VRPOPipeline.from_pretrained(tmp_path / "run")
    assert not (tmp_path / "ran").exists()
