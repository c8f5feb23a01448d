# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The alignment term in training: one step by hand, several blocks and encoders, the gate, the stop, the estimators."""

import json
import math
import shutil
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.gradient_fork import alignment_fork, compiled_mix_gradients, measuring_probe
from diffusers_vrpo.alignment.objective import REPA, VRPO
from diffusers_vrpo.alignment.policy import action_noise, timestep_weight
from diffusers_vrpo.alignment.rewards import DEFAULT_REWARDS, normalize, semantic_reward, structural_reward
from diffusers_vrpo.alignment.start import build_aligned_transformer
from diffusers_vrpo.alignment.token_weights import residual_weights
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.samples import TrainingSamples
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.models.flow import forward_process
from diffusers_vrpo.trainer import VRPOTrainer
from diffusers_vrpo.training.metrics import read_metrics
from support.models import aligned_with, digits_model, inputs, needs_compiler, tiny_model
from support.paths import TRAINING_SCRIPT
from support.statistics import FedGate
from support.training import aligned_weights, assert_same_files, losses, projectors_of, run, train_vrpo


WEIGHTS = "diffusion_pytorch_model.safetensors"


def vrpo_gradients(aligned, x0, batch, y, shares=(1 / 3, 1 / 3, 1 / 3), coeff=0.5):
    """`L_FM + lambda L_rep` of one batch by two separate backward passes and the formulas written out, as `.grad`."""
    model = aligned.transformer
    x_t, timestep, target, _ = forward_process(x0, batch["noise"], batch["timestep"], model.config)
    hidden = {}
    for layer in aligned.layers:
        block = model.transformer_blocks[layer - 1]
        hooked = block.register_forward_hook(lambda module, args, output, layer=layer: hidden.update({layer: output}))
        hidden[layer] = hooked
    handles = list(hidden.values())
    prediction, projections = aligned(x_t, timestep, batch["class_labels"])
    for handle in handles:
        handle.remove()
    loss_fm = (prediction - target).square().mean()
    s_f, s_se, s_st = shares
    rest = s_se + s_st
    losses_rep = []
    for projection in projections:
        mu = normalize(projection)
        action = mu.detach().clone().requires_grad_()
        directions = []
        for reward in (semantic_reward(action, y), structural_reward(action, mu, y, batch["tokens"])):
            (gradient,) = torch.autograd.grad(reward.sum(), action, retain_graph=True)
            tangent = gradient - (gradient * mu).sum(-1, keepdim=True) * mu
            directions.append((tangent / tangent.norm(dim=-1, keepdim=True)).detach())
        direction = (s_se * directions[0] + s_st * directions[1]) / rest
        losses_rep.append(-coeff / len(projections) * (direction * mu).sum(-1).mean())
    h = hidden[max(aligned.layers)]
    (g_main,) = torch.autograd.grad(loss_fm, h, retain_graph=True)
    (g_align,) = torch.autograd.grad(losses_rep[-1], h, retain_graph=True)
    norms = [g.flatten(1).norm(dim=1).reshape(-1, 1, 1) for g in (g_main, g_align)]
    mixed = g_main + (1 - s_f) * g_align + s_f * norms[1] / norms[0] * g_main
    cosine = torch.nn.functional.cosine_similarity(g_main.flatten(1), g_align.flatten(1))
    ratio = (norms[1] / norms[0]).flatten()

    # Above the fork and in the projectors: the losses' own gradients. Below it: the mixture, and the shallower branches.
    parameters = dict(aligned.named_parameters())
    own = torch.autograd.grad(
        loss_fm + sum(losses_rep), parameters.values(), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    of_fm = torch.autograd.grad(
        loss_fm, parameters.values(), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    through_h = [
        torch.autograd.grad(h, parameters.values(), g, retain_graph=True, allow_unused=True, materialize_grads=True)
        for g in (g_main, mixed)
    ]
    shallow = torch.autograd.grad(
        sum(losses_rep[:-1]) + 0 * loss_fm,
        parameters.values(),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    for i, (name, parameter) in enumerate(parameters.items()):
        if name.startswith("projectors."):
            parameter.grad = own[i]
        else:
            parameter.grad = of_fm[i] - through_h[0][i] + through_h[1][i] + (1 - s_f) * shallow[i]
    return loss_fm.item(), cosine, ratio


def digits_batch_with_tokens():
    data, _, _ = load_image_dataset("digits")
    samples = TrainingSamples(data, 0, 8, (3, 8, 8), 10, num_tokens=16)
    batch = samples.__getitem__(list(range(16)))
    x0 = batch["pixels"].float() / 127.5 - 1
    return x0, batch, normalize(load_encoder("digits", (4, 4))(x0))


def save_start(aligned, folder):
    """Saves model and projectors as a training checkpoint does."""
    aligned.transformer.save_pretrained(folder / "transformer")
    description = {"description": json.dumps(aligned.description())}
    save_file(aligned.projectors.state_dict(), folder / "projectors.safetensors", description)


@pytest.mark.parametrize("layers", ["1", "2", "1,2"])
@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing"], ["--gradient_accumulation_steps", "2"]])
def test_one_step_of_the_script_is_the_formula(command, tmp_path, layers, options):
    numbers = [int(layer) for layer in layers.split(",")]
    aligned = aligned_with(digits_model(), numbers, (64,), projector_dim=32)
    save_start(aligned, tmp_path / "start")
    changes = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "layer_scope": layers}
    changes |= {"max_train_steps": 1, "max_grad_norm": 1e9, "train_batch_size": 8 if len(options) == 2 else 16}
    changes |= {"adam_epsilon": 1, "learning_rate": 1, "alignment_coeff": 0.5, "reward_weighting": "inverse_variance"}
    run(command(**changes) + options)
    x0, batch, y = digits_batch_with_tokens()
    loss_fm, cosine, ratio = vrpo_gradients(aligned, x0, batch, y)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss_fm"] == pytest.approx(loss_fm, rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in aligned.parameters()]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    bins = (batch["timestep"] * 10).long()
    for i in range(10):
        if (bins == i).any():
            name = f"{i / 10:.1f}-{(i + 1) / 10:.1f}"
            assert row[f"cosine/{name}"] == pytest.approx(cosine[bins == i].mean().item(), abs=2e-5)
            assert row[f"gradient_ratio/{name}"] == pytest.approx(ratio[bins == i].mean().item(), rel=1e-4)
    # With so large an epsilon Adam's first step is the gradient's: lr g / (|g| + 1).
    trained = aligned_weights(tmp_path / "run" / "checkpoint-1")
    for name, parameter in aligned.named_parameters():
        step = parameter.grad / (parameter.grad.abs() + 1)
        torch.testing.assert_close(parameter.detach() - trained[name], step, atol=2e-6, rtol=1e-4)


def test_repa_measures_its_gradients_on_request(command, tmp_path):
    aligned = aligned_with(digits_model(), [1], (64,), projector_dim=32)
    save_start(aligned, tmp_path / "start")
    options = {"objective": "repa", "model_config": None, "pretrained_model_name_or_path": tmp_path / "start"}
    options |= {"layer_scope": "1", "max_train_steps": 2}
    run(command(**options, output_dir=tmp_path / "plain"))
    run(command(**options, output_dir=tmp_path / "measured") + ["--log_gradients"])
    assert losses(tmp_path / "plain") == losses(tmp_path / "measured")
    plain, measured = (read_metrics(tmp_path / name / "metrics.jsonl")[1] for name in ("plain", "measured"))
    new = {name.split("/")[0] for name in measured.keys() - plain.keys()}
    assert new == {"cosine", "gradient_ratio"}
    assert all(value > 0 for name, value in measured.items() if name.startswith("gradient_ratio/"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("layers", [[2], [1, 3]])
def test_compiled_and_checkpointed_blocks_give_the_same_gradients(layers):
    """The fork stands between compiled blocks: gradients, cosines and statistics are those of the eager model."""
    x, t, labels = inputs()
    y = normalize(torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(3)))
    subset, results = torch.arange(16).expand(2, -1), []
    for kind in ("eager", "checkpointed", "compiled"):
        aligned = aligned_with(tiny_model(), layers).train()
        torch._dynamo.reset()
        if kind == "checkpointed":
            aligned.transformer.enable_gradient_checkpointing()
        elif kind == "compiled":
            aligned.transformer.compile_repeated_blocks(fullgraph=True)
        objective = VRPO(aligned, 100, conflict="project")
        step = objective.begin(t)
        prediction, projections = aligned(x, t, labels, fork=step.fork)
        loss_fm = prediction.square().flatten(1).mean(1)
        step.targets = [y]
        loss = objective(step, projections, None, loss_fm, subset=subset)
        (loss_fm.mean() + 0.5 * loss).backward()
        assert (step.probe.grad != 0).all()
        gradients = [p.grad for p in aligned.parameters()]
        objective.observe(step)
        results.append([step.probe.grad, *gradients, objective.sums.sums])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_a_compiled_objective_is_one_graph_with_the_same_numbers(backend, monkeypatch):
    """Loss, fork and sums of three steps, with everything on that a run can have; nothing is compiled twice."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        compiled_mix_gradients.cache_clear()
        torch._dynamo.utils.counters.clear()
        aligned = aligned_with(tiny_model(), [1, 3]).train()
        objective = VRPO(aligned, 100, release="plateau", token_weighting="residual", timestep_weighting="low_noise")
        if compiled:
            objective.compile()
        x, t, labels = inputs()
        found = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            step = objective.begin(t)
            prediction, projections = aligned(x, t, labels, fork=step.fork)
            loss_fm = prediction.square().flatten(1).mean(1)
            step.targets = [normalize(torch.randn(2, 16, 12, generator=generator))]
            subset = torch.stack([torch.randperm(16, generator=generator)[:8] for _ in range(2)])
            loss = objective(step, projections, None, loss_fm, subset=subset)
            (loss_fm.mean() + 0.5 * loss).backward()
            objective.observe(step)
            objective.collect()
            objective.update()
            found += [step.probe.grad, *step.logs.values()]
        found += [p.grad for p in aligned.parameters()]
        found += [x for holder in objective.stateful().values() for x in holder.state_dict().values()]
        results.append(found)
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(plain, ours, atol=1e-6, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    # The loss, the fork's backward pass, and the sums over samples.
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"] and not counters["recompiles"]
    compiled_mix_gradients.cache_clear()


def test_the_option_compiles_the_objective_too(command):
    with VRPOTrainer(args=train_vrpo.parse_args(command() + ["--compile"])) as trainer:
        assert trainer.objective.compiled  # nothing is compiled before the first step


@pytest.mark.parametrize("objective", ["repa", "vrpo"])
@pytest.mark.parametrize(
    "convention, tokens",
    [
        ({}, "uniform"),
        ({"time_direction": "noise_to_data"}, "uniform"),
        ({"prediction_type": "epsilon"}, "uniform"),
        ({}, "residual"),
    ],
)
def test_statistics_gate_and_timestep_weight_enter_where_the_formula_has_them(objective, convention, tokens):
    """Every projector and bin with shares and tau of its own, gates half and fully closed, against the sum written out."""
    model = tiny_model(**convention)
    aligned = aligned_with(model, (1, 3), (12, 20))
    alignment_class = {"repa": REPA, "vrpo": VRPO}[objective]
    options = {"timestep_weighting": "low_noise", "conflict": "gate", "token_weighting": tokens}
    alignment = alignment_class(aligned, 1000, alignment_coeff=0.5, **options)
    generator = torch.Generator().manual_seed(5)
    shares = torch.rand(4, 3, 10, generator=generator) + 0.1
    shares, tau = shares / shares.sum(1, keepdim=True), torch.rand(4, 3, 10, generator=generator)
    if objective == "vrpo":
        alignment.statistics._tables = shares, tau
    alignment.gate.state["closing"][:3] = torch.tensor([0.0, 0.5, 1.0]) * alignment.gate.window
    x, _, labels = inputs(batch=6)
    x0, noise, u = x, torch.randn(x.shape, generator=generator), torch.tensor([0.03, 0.15, 0.25, 0.5, 0.7, 0.95])
    x_t, timestep, target, t = forward_process(x0, noise, u, model.config)
    targets = [normalize(torch.randn(6, 16, dim, generator=generator)) for dim in (12, 20)]
    subset = torch.arange(16).expand(6, -1)
    step = alignment.begin(t)
    prediction, projections = aligned(x_t, timestep, labels, fork=step.fork)
    loss_fm = (prediction - target).square().flatten(1).mean(1)
    step.targets = targets
    loss = alignment(step, projections, None, loss_fm, subset=subset)
    logs = step.logs

    bins = (t * 10).long()
    gate = torch.tensor([1.0, 0.5, 0.0] + [1.0] * 7)[bins]
    w = torch.sigmoid(20 * (0.7 - t))
    grid = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    mean_w = torch.sigmoid(20 * (0.7 - grid)).mean()
    if convention.get("prediction_type") == "epsilon":
        mean_w = torch.sigmoid(20 * (0.7 - ddpm.flow_time(torch.arange(1000)))).mean()
    weight = gate * w / mean_w.float()
    assert logs["alignment_coeff"].item() == pytest.approx(0.5 * weight.mean().item(), rel=1e-4)
    expected = 0.0
    for i, projection in enumerate(projections):
        mu, y = normalize(projection), targets[i % 2]
        of_token = residual_weights(mu, y) if tokens == "residual" else torch.ones(mu.shape[:2])
        if objective == "repa":
            per_sample = -(of_token * (mu * y).sum(-1)).mean(-1)
        else:
            # The encoders of a block share its shares; tau is each projector's own.
            s = shares[2 * (i // 2) : 2 * (i // 2) + 2].mean(0)[:, bins].T
            s = s[:, 1:] / s[:, 1:].sum(1, keepdim=True)
            action, direction = mu.detach().clone().requires_grad_(), 0.0
            rewards = (semantic_reward(action, y), structural_reward(action, mu, y, subset))
            for k, reward in enumerate(rewards):
                (gradient,) = torch.autograd.grad(reward.sum(), action, retain_graph=True)
                tangent = gradient - (gradient * mu).sum(-1, keepdim=True) * mu
                unit = tangent / (tangent.norm(dim=-1, keepdim=True) + tau[i, k + 1, bins].reshape(-1, 1, 1))
                direction = direction + s[:, k].reshape(-1, 1, 1) * unit
            per_sample = -(of_token * (direction.detach() * mu).sum(-1)).mean(-1)
        expected = expected + (weight * per_sample).mean() / 4
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    if objective == "repa":
        # What is logged is the reward itself.
        plain = torch.stack([(normalize(p) * targets[i % 2]).sum(-1).mean() for i, p in enumerate(projections)])
        torch.testing.assert_close(logs["reward/semantic"], plain.detach().mean())
    gradients = [torch.autograd.grad(x, projections, retain_graph=True) for x in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-3)
    if objective == "vrpo":
        # What is observed goes to the right reward: fidelity first, without a gradient.
        count, *measures = step.measures
        assert (count == 1).all() and all(each.shape == (5, len(loss_fm)) for each in measures)
        assert torch.equal(measures[0][0], -loss_fm.detach()) and all((each[3:] > 0).all() for each in measures)


def test_several_encoders_have_a_projector_each(command, tmp_path):
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    options = command(encoder="digits", layer_scope="all", max_train_steps=3) + ["--encoder", str(tmp_path / "resnet")]
    run(options)
    description, state = projectors_of(tmp_path / "run" / "checkpoint-3")
    assert description["alignment_dims"] == [64, 12] and description["alignment_layers"] == [1, 2]
    assert [state[f"{i}.4.weight"].shape[0] for i in range(4)] == [64, 12, 64, 12] and len(state) == 24
    statistics = load_file(tmp_path / "run" / "checkpoint-3" / "reward_statistics.safetensors")
    assert statistics["spread"].shape == (4, 3, 10)
    # In a YAML file a list; the command line replaces it.
    again = train_vrpo.parse_args(["--config", str(tmp_path / "run" / "train_config.yaml")])
    assert again.encoder == ["digits", str(tmp_path / "resnet")]
    again = train_vrpo.parse_args(["--config", str(tmp_path / "run" / "train_config.yaml"), "--encoder", "digits"])
    assert again.encoder == ["digits"]


def test_baselines_by_flags_alone(command, tmp_path):
    irepa = command(objective="repa", projector="conv", spatial_norm=0.6, max_train_steps=2)
    run(irepa)
    assert projectors_of(tmp_path / "run" / "checkpoint-2")[0]["projector_type"] == "conv"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "reward/semantic" in rows[-1] and not any(name.startswith(("gate/", "share/")) for name in rows[-1])
    stopped = command(
        objective="repa",
        alignment_stop_step=2,
        timestep_weighting="low_noise",
        max_train_steps=3,
        output_dir=tmp_path / "stopped",
    )
    run(stopped)
    assert ["reward/semantic" in row for row in read_metrics(tmp_path / "stopped" / "metrics.jsonl")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("objective", ["repa", "vrpo"])
def test_whitened_targets_are_saved_and_resume_exactly(command, tmp_path, monkeypatch, objective):
    options = {"objective": objective, "target_norm": "whiten:6", "token_weighting": "residual", "spatial_norm": 0.3}
    options |= {"max_train_steps": 4, "checkpointing_steps": 2}
    run(command(**options))
    assert projectors_of(tmp_path / "run" / "checkpoint-2")[0]["alignment_dims"] == [6]

    # A run that goes on reads the statistics, and those are all that it needs.
    def fit(*arguments):
        raise AssertionError("the statistics were computed again")

    monkeypatch.setattr("diffusers_vrpo.training.targets.fit_whitening", fit)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run(command(**options, output_dir=tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[2:]
    names = ["target_whitening.safetensors", "conflict_gate.safetensors", "projectors.safetensors"]
    assert_same_files(*(tmp_path / name / "checkpoint-4" for name in ("run", "again")), names)
    with pytest.raises(InputError, match="`target_norm` is none, but .* was trained with whiten:6"):
        run(command(**options | {"target_norm": "none"}, output_dir=tmp_path / "again"))


def test_the_timestep_weight_acts_and_has_mean_one(command, tmp_path):
    for name in ("uniform", "low_noise"):
        run(command(objective="repa", timestep_weighting=name, max_train_steps=1, output_dir=tmp_path / name))
    a, b = (load_file(tmp_path / n / "checkpoint-1" / "transformer" / WEIGHTS) for n in ("uniform", "low_noise"))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    # Of a diffusion the timesteps are not uniform in t; the mean is 1 over those that are drawn.
    for prediction_type in ("velocity", "epsilon"):
        aligned = aligned_with(tiny_model(prediction_type=prediction_type))
        alignment = VRPO(aligned, 100, timestep_weighting="low_noise")
        t = (torch.arange(10_000) + 0.5) / 10_000
        if prediction_type == "epsilon":
            t = ddpm.flow_time(torch.arange(1000))
        weight = timestep_weight(t, "low_noise") / alignment.mean_weight
        assert weight.mean().item() == pytest.approx(1, abs=1e-3)


# Off


class Counted:
    """An encoder that remembers at which calls it was used."""

    def __init__(self, encoder):
        self.encoder, self.embed_dim, self.calls = encoder, encoder.embed_dim, 0

    def __call__(self, images):
        self.calls += 1
        return self.encoder(images)


def test_after_the_stop_neither_encoder_nor_projector_runs(command, tmp_path, monkeypatch):
    counted, projector_calls = [], []

    def load_counted(*args):
        counted.append(Counted(load_encoder(*args)))
        return counted[-1]

    def build_counted(*args):
        aligned = build_aligned_transformer(*args)
        aligned.projectors[0].register_forward_hook(lambda *_: projector_calls.append(1))
        return aligned

    monkeypatch.setattr("diffusers_vrpo.trainer.load_encoder", load_counted)
    monkeypatch.setattr("diffusers_vrpo.trainer.build_aligned_transformer", build_counted)
    run(command(alignment_stop_step=3, max_train_steps=8, checkpointing_steps=1))
    assert counted[0].calls == len(projector_calls) == 3
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["reward/semantic" in row for row in rows] == [True] * 3 + [False] * 5
    # The projector rests, the blocks train on.
    a, b = (aligned_weights(tmp_path / "run" / f"checkpoint-{n}") for n in (3, 8))
    for name in a:
        assert torch.equal(a[name], b[name]) == name.startswith("projectors."), name


def test_a_plateau_ends_alignment_and_a_resumed_run_ends_it_at_the_same_step(command, tmp_path):
    options = {"objective": "repa", "release": "plateau", "max_train_steps": 16, "checkpointing_steps": 3}
    run(command(**options))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    aligned = ["reward/semantic" in row for row in rows]
    # It counts from step 2 on, and then fades for two steps.
    assert aligned == sorted(aligned, reverse=True) and 3 <= sum(aligned) < 16
    assert [row["alignment_coeff"] for row in rows if row["alignment_coeff"] < 0.5][0] == pytest.approx(0.25)
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    run(command(**options, output_dir=tmp_path / "again"))
    again = read_metrics(tmp_path / "again" / "metrics.jsonl")
    for name in ("loss_fm", "alignment_coeff", "reward/semantic", "alignment_distance", "alignment_weight"):
        assert [row.get(name) for row in again] == [row.get(name) for row in rows[3:]], name


WRAPPER = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("train_vrpo", {script!r})
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)
from diffusers_vrpo.alignment.objective import VRPO

observe, targets = VRPO.observe, VRPO.targets
def conflicting(self, step):
    if step.active:
        step.probe.grad = torch.full_like(step.probe, -0.5)  # a conflict at every timestep
    observe(self, step)
def counted(self, images, *args, **features):
    if self.aligned.encoders:
        with open({log!r} + str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0), "a") as file:
            file.write(str(self.step_number) + "\\n")
    return targets(self, images, *args, **features)

VRPO.observe, VRPO.targets = conflicting, counted
train_vrpo.main(train_vrpo.parse_args())
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends_by", ["gate", "stop", "plateau"])
def test_two_processes_cross_the_end_of_alignment(command, tmp_path, trainers, ends_by):
    """The gate closes (or the stop or plateau comes) at the same step on both; nothing hangs; the losses stay those of one."""
    options = {"max_train_steps": 45, "train_batch_size": 128, "logging_steps": 1, "learning_rate": 1e-3}
    options |= {"conflict": "none", "alignment_stop_step": 36} if ends_by == "stop" else {}
    options |= {"release": "plateau"} if ends_by == "plateau" else {}
    options |= {"release": "gate"} if ends_by == "gate" else {}
    options |= {"resolution": 8, "alignment_coeff": 0.5, "reward_weighting": "inverse_variance"}
    runs = {}
    for processes in (1, 2):
        log = tmp_path / f"{processes}-calls-"
        script = tmp_path / f"wrapper-{processes}.py"
        script.write_text(textwrap.dedent(WRAPPER.format(script=str(TRAINING_SCRIPT), log=str(log))))
        options |= {"output_dir": tmp_path / str(processes), "train_batch_size": 128 // processes}
        trainers(command(**options), program=str(script), processes=processes).finish()
        steps = [Path(f"{log}{rank}").read_text().split() for rank in range(processes)]
        assert all(rank == steps[0] for rank in steps)
        runs[processes] = (losses(tmp_path / str(processes)), steps[0])
    assert len(runs[1][0]) == 45 and (torch.tensor(runs[1][0]) - torch.tensor(runs[2][0])).abs().max() <= 1e-5
    assert runs[1][1] == runs[2][1]
    last = int(runs[1][1][-1])
    # 4 steps of warm-up, 32 with samples before a bin's bound counts; the window is one step; every bin is populated.
    # A plateau counts from step 5 on and takes 5 steps to fade.
    expected = {"stop": range(35, 36), "gate": range(35, 41), "plateau": range(8, 44)}
    assert last in expected[ends_by]
    weights = [load_file(tmp_path / n / "checkpoint-45" / "transformer" / WEIGHTS) for n in ("1", "2")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-3, rtol=1e-2)


def test_the_gate_closes_where_targets_conflict_and_nowhere_else():
    """Real gradients: below t = 0.3 the alignment pulls the hidden tokens against flow matching, above it with it."""
    model = tiny_model()
    aligned = aligned_with(model)
    gate = FedGate(max_train_steps=1000, warmup=0)
    generator = torch.Generator().manual_seed(0)
    x, _, labels = inputs(batch=20)
    t = (torch.arange(20) + 0.5) / 20
    for _ in range(33 + 2 * gate.window):
        noise = torch.randn(x.shape, generator=generator)
        grabbed = {}

        def grab(h, deepest):
            grabbed["h"] = h  # noqa: B023
            return h, h

        probe = measuring_probe(20)
        prediction, _ = aligned(x + noise, t, labels, fork=grab)
        (g_main,) = torch.autograd.grad(prediction.square().sum(), grabbed["h"])

        split = alignment_fork(torch.full((20,), 0.3), probe, "gate")
        branches = {}

        def both(h, deepest):
            branches["main"], branches["align"] = split(h, deepest)  # noqa: B023
            return branches["main"], branches["align"]  # noqa: B023

        prediction, _ = aligned(x + noise, t, labels, fork=both)
        towards = torch.where(t < 0.3, -1.0, 1.0).reshape(-1, 1, 1) * g_main
        wobble = 0.5 * towards.norm() / math.sqrt(towards.numel()) * torch.randn(towards.shape, generator=generator)
        weight = gate.lookup(t).reshape(-1, 1, 1)
        loss = prediction.square().sum() + (weight * branches["align"] * (towards + wobble)).sum()
        loss.backward()
        gate.observe(t, *probe.grad)
        gate.update()
        model.zero_grad()
    assert gate.gates().tolist() == [0.0] * 3 + [1.0] * 7
    assert (gate.cosine()[:3] < -0.5).all() and (gate.cosine()[3:] > 0.5).all()


# Estimators


@pytest.mark.slow
def test_the_sampled_estimator_trains_and_resumes_exactly(command, tmp_path):
    options = {"estimator": "sampled", "group_size": 4, "policy_epochs": 2, "max_train_steps": 8}
    options |= {"checkpointing_steps": 4, "learning_rate": 3e-3}
    run(command(**options))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["reward/semantic"] > rows[0]["reward/semantic"]
    assert all(row["spread/semantic"] > 0 for row in rows)
    # The first step of a draw has ratio 1: nothing to clip. The second has moved.
    assert [row["clip_fraction"] > 0 for row in rows] == [False, True] * 4
    assert rows[-1]["samples_seen"] == 4 * 16
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-4", resumed / "checkpoint-4")
    run(command(**options, output_dir=resumed))
    names = [f"transformer/{WEIGHTS}", f"transformer_ema/{WEIGHTS}", "reward_statistics.safetensors"]
    assert_same_files(tmp_path / "run" / "checkpoint-8", resumed / "checkpoint-8", names)


@pytest.mark.slow
def test_sampled_actions_do_not_depend_on_how_the_batch_is_divided(command, tmp_path):
    options = {"estimator": "sampled", "policy_epochs": 2, "max_train_steps": 4}
    run(command(**options))
    run(command(**options, train_batch_size=8, gradient_accumulation_steps=2, output_dir=tmp_path / "two"))
    a, b = (torch.tensor(losses(tmp_path / name)) for name in ("run", "two"))
    assert (a - b).abs().max() <= 1e-5
    noise = action_noise(0, torch.tensor([5, 9]), 1, (3, 4, 6), torch.device("cpu"))
    assert noise.shape == (3, 2, 4, 6)
    assert torch.equal(noise[:, 1:], action_noise(0, torch.tensor([9]), 1, (3, 4, 6), torch.device("cpu")))
    for other in (action_noise(0, torch.tensor([9]), 0, (3, 4, 6), torch.device("cpu")), noise[:, :1]):
        assert not torch.equal(noise[:, 1:], other)


def test_the_reference_pulls_the_policy_back(command, tmp_path):
    options = {"max_train_steps": 10, "learning_rate": 3e-3}
    for name, coeff in (("free", 1e-9), ("held", 3.0)):
        run(command(**options, kl_coeff=coeff, output_dir=tmp_path / name))
    free, held = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("free", "held"))
    assert free[0]["kl"] == held[0]["kl"] == 0 and 0 < held[-1]["kl"] < 0.5 * free[-1]["kl"]


# What must not break it


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 1},
        {"label_dropout": 0.9999},
        {"mixed_precision": "bf16"},
        {"model_config": None, "preset": "SiT-XS/8"},  # one token
        {"reward_weighting": "1,0,0"},
        {"reward_weighting": "0,0,1", "layer_scope": "all"},
        {"estimator": "sampled", "mixed_precision": "bf16", "group_size": 2},
        {"conflict": "project", "layer_scope": "all"},
        {"conflict": "none"},
        {"objective": "repa", "conflict": "gate"},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_everything_stays_finite(command, tmp_path, changes):
    run(command(**{"max_train_steps": 3, **changes}))
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert all(math.isfinite(value) for value in row.values())
    for name, tensor in load_file(tmp_path / "run" / "transformer" / WEIGHTS).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["zeros", "constant", "one token"])
def test_no_nan_from_degenerate_features_in_half_precision(dtype, case):
    model = tiny_model(patch_size=8 if case == "one token" else 2)
    aligned = aligned_with(model)
    alignment = VRPO(aligned, 100)
    x, t, labels = inputs()
    tokens = model.grid_size[0] ** 2
    subset = torch.arange(min(tokens, 64)).expand(2, -1)
    for _ in range(3):
        step = alignment.begin(t)
        with torch.autocast("cpu", dtype=dtype):
            prediction, projections = aligned(x, t, labels, fork=step.fork)
            if case == "zeros":
                projections = tuple(projection * 0 for projection in projections)
            step.targets = [normalize(torch.ones(2, tokens, 12) if case != "zeros" else torch.zeros(2, tokens, 12))]
            loss_fm = prediction.float().square().flatten(1).mean(1)
            loss = alignment(step, projections, None, loss_fm, subset=subset)
        (loss_fm.mean() + loss).backward()
        alignment.observe(step)
        alignment.update()
        logs = step.logs
        assert all(p.grad.isfinite().all() for p in aligned.parameters() if p.grad is not None)
        assert all(value.isfinite() for value in logs.values())
    assert all(math.isfinite(value) for value in alignment.summary().values())
    assert {name for name in logs if name.startswith("reward/")} == {f"reward/{name}" for name in DEFAULT_REWARDS}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "repa", "kl_coeff": 1}, "--kl_coeff 1.0 has no effect without --objective vrpo"),
        (
            {"objective": "repa", "reward_weighting": "equal"},
            "--reward_weighting equal has no effect without --objective vrpo",
        ),
        (
            {"objective": "none", "conflict": "project"},
            "--conflict project has no effect without --objective repa, irepa, rare or vrpo",
        ),
        (
            {"estimator": "sampled", "clip_range": 0.1},
            "--clip_range 0.1 has no effect without --policy_epochs above 1",
        ),
        (
            {"estimator": "sampled", "policy_epochs": 3, "checkpointing_steps": 3, "max_train_steps": 400000},
            "400000 must be",
        ),
        ({"policy_epochs": 2}, "--policy_epochs 2 has no effect without --estimator sampled"),
        ({"estimator": "sampled", "group_size": 1}, "--group_size 1 must be at least 2"),
        ({"estimator": "sampled", "policy_epochs": 3}, "must be a multiple of --policy_epochs 3"),
        ({"policy_noise": 0}, "--policy_noise 0.0 must be above 0"),
        ({"policy_noise": 0.2}, "--policy_noise 0.2 has no effect without --estimator sampled or --kl_coeff"),
        ({"conflict": "close"}, "invalid choice: 'close'"),
    ],
)
def test_options_that_do_not_go_together(command, capsys, changes, message):
    with pytest.raises(SystemExit):
        train_vrpo.parse_args(command(**changes))
    assert message in capsys.readouterr().err


def test_one_layer_number_for_each_encoder(command, capsys):
    with pytest.raises(SystemExit):
        train_vrpo.parse_args(command() + ["--encoder_layer", "1", "2", "3"])
    assert "--encoder_layer has 3 numbers for 1 encoders" in capsys.readouterr().err
