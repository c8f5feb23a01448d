# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Alignment attached to transformers of diffusers: SiT, DiT, PixArt, SD3, Flux and Sana."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from diffusers_vrpo.alignment.attach import AlignedTransformer, image_tokens_index, transformer_blocks
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.gradient_fork import alignment_fork, measuring_probe
from diffusers_vrpo.alignment.objective import REPA, VRPO, NoAlignment
from diffusers_vrpo.alignment.projectors import ConvProjector, token_grid
from support.models import aligned_with, inputs, needs_compiler, tiny_model
from support.transformers import TRANSFORMERS, build


def gradients(aligned, arguments, conflict="project") -> list[torch.Tensor]:
    """The fork's cosines and all gradients of one forward and backward pass."""
    probe = measuring_probe(2)
    aligned.zero_grad()
    torch.manual_seed(2)  # DiT drops labels
    prediction, projections = aligned(**arguments, fork=alignment_fork(torch.tensor([0.3, 0.6]), probe, conflict))
    (prediction.square().mean() + sum((i + 1) * p.sin().mean() for i, p in enumerate(projections))).backward()
    return [probe.grad, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in aligned.parameters())]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_any_transformer_of_diffusers_is_aligned(name):
    """The prediction stays, the projections are those of the image tokens, and gradients reach the blocks below only."""
    model, arguments = build(name)
    with torch.no_grad():
        plain = model(**arguments, return_dict=False)[0]
    names = list(model.state_dict())
    seen = {}
    for number in (2, 3):
        block = transformer_blocks(model)[number - 1]
        block.register_forward_hook(lambda block, args, output, number=number: seen.update({number: output}))
    aligned = aligned_with(model, layers=(2, 3), dims=(12, 20))
    with torch.no_grad():
        prediction, projections = aligned(**arguments)
    assert torch.equal(prediction, plain)
    assert [tuple(p.shape) for p in projections] == [(2, 16, 12), (2, 16, 20)] * 2
    for i, projection in enumerate(projections):
        output = seen[2 + i // 2]
        # Of several outputs the image's tokens are those of 16; the others are those of the text.
        tokens = output if isinstance(output, torch.Tensor) else next(x for x in output if x.shape[1] == 16)
        assert torch.equal(projection, aligned.projectors[i](tokens))
    assert list(model.state_dict()) == names and not any("projector" in name for name, _ in model.named_modules())

    cosine, *found = gradients(aligned, arguments)
    assert (cosine != 0).all() and all(gradient.isfinite().all() for gradient in found)
    assert all(p.grad.any() for p in aligned.projectors.parameters())
    # A pipeline calls the transformer itself; nothing of the last aligned call is left in it.
    with torch.no_grad():
        assert torch.equal(model(**arguments, return_dict=False)[0], plain)
    assert aligned.detach() is model
    with torch.no_grad():
        assert torch.equal(model(**arguments, return_dict=False)[0], plain)
    assert len(transformer_blocks(model)[1]._forward_hooks) == 1  # this test's own


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, arguments = build(name)
    aligned = aligned_with(model, layers=(2, 3), dims=(12, 20)).train()
    exact = gradients(aligned, arguments)
    model.enable_gradient_checkpointing()
    for a, b in zip(exact, gradients(aligned, arguments), strict=True):
        torch.testing.assert_close(a, b)


@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients(checkpointing):
    """All blocks are compiled, the aligned ones too; the hooks run between the graphs."""
    model, arguments = build("SiT")
    aligned = aligned_with(model, layers=(1, 3), dims=(12, 20)).train()
    exact = gradients(aligned, arguments)
    torch._dynamo.reset()
    calls = []

    def count(graph, example_inputs):
        def call(*arguments):
            calls.append(1)
            return graph(*arguments)

        return call

    model.compile_repeated_blocks(fullgraph=True, backend=count)
    with torch.no_grad():
        aligned(**arguments)
    assert len(calls) == 4
    torch._dynamo.reset()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for a, b in zip(exact, gradients(aligned, arguments), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("conflict", ["none", "project"])
def test_two_layers_and_two_encoders_by_hand(conflict):
    """The blocks called one after another, with the fork between them, as the formulas have it; equal to the bit."""
    model, arguments = build("SiT")
    aligned = aligned_with(model, layers=(2, 3), dims=(12, 20)).train()
    found = gradients(aligned, arguments, conflict)

    reference = copy.deepcopy(aligned)
    for handle in reference._handles:
        handle.remove()
    probe = measuring_probe(2)
    split = alignment_fork(torch.tensor([0.3, 0.6]), probe, conflict)
    projections = []

    class Forked(nn.Module):
        """A block, then the fork and the projectors."""

        def __init__(self, block, number):
            super().__init__()
            self.block, self.number = block, number

        def forward(self, *args):
            onward, to_project = split(self.block(*args), self.number == 3)
            first = 2 * (self.number - 2)
            projections.extend(projector(to_project) for projector in reference.projectors[first : first + 2])
            return onward

    blocks = reference.transformer.transformer_blocks
    parameters = list(reference.parameters())
    for number in (2, 3):
        blocks[number - 1] = Forked(blocks[number - 1], number)
    prediction = reference.transformer(**arguments).sample
    (prediction.square().mean() + sum((i + 1) * p.sin().mean() for i, p in enumerate(projections))).backward()
    for a, b in zip([probe.grad, *(p.grad for p in parameters)], found, strict=True):
        assert torch.equal(a, b)


def test_the_register_of_diffusers_is_where_it_was():
    """diffusers' private register tells where image tokens stand; a block that is not in it has them last."""
    metadata = TransformerBlockRegistry.get(JointTransformerBlock)
    assert isinstance(metadata, TransformerBlockMetadata) and metadata.return_hidden_states_index == 1
    with pytest.raises(ValueError):
        TransformerBlockRegistry.get(nn.Linear)
    x = torch.zeros(1)
    assert image_tokens_index(nn.Linear(1, 1), x) is None
    assert image_tokens_index(nn.Linear(1, 1), (x, x, x)) == 2


def test_grid_of_the_tokens():
    latents = torch.zeros(1, 4, 8, 16)
    assert token_grid(32, (4, 8), None) == token_grid(32, (4, 4), latents) == (4, 8)
    with pytest.raises(ValueError, match="`grid_size`"):
        token_grid(32, None, torch.zeros(1, 32, 64))
    model, arguments = build("Flux")
    with pytest.raises(ValueError, match="`grid_size`"):
        aligned_with(model, projector="conv")(**arguments)
    aligned = aligned_with(model, projector="conv", grid_size=(4, 4))
    assert isinstance(aligned.projectors[0], ConvProjector)
    assert aligned(**arguments)[1][0].shape == (2, 16, 12)
    # Another resolution than the trained one.
    aligned = aligned_with(tiny_model(), projector="conv")
    assert aligned(*inputs(height=8, width=16))[1][0].shape == (2, 32, 12)


def test_what_cannot_be_attached():
    with pytest.raises(ValueError, match=r"layers \[4\] must lie in 1 ... 3"):
        aligned_with(tiny_model(), layers=(4,))
    with pytest.raises(ValueError, match="projector 'linear' must be one of mlp, conv"):
        aligned_with(tiny_model(), projector="linear")
    with pytest.raises(ValueError, match="Linear has no transformer_blocks"):
        aligned_with(nn.Linear(1, 1))
    # Blocks and width may be told.
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.forward = lambda x, return_dict: (nn.Sequential.forward(model, x),)
    aligned = aligned_with(model, layers=(1,), blocks=list(model), hidden_dim=8)
    assert aligned(torch.randn(2, 5, 8))[1][0].shape == (2, 5, 12)


def test_wrong_arguments_are_named():
    for arguments, problem in (
        ({"layers": 2, "encoders": [Pixels()]}, "`layers` must be a list, not 2"),
        ({"layers": [2], "encoders": Pixels()}, "`encoders` must be a list, not <"),
        ({"layers": [2], "encoders": "digits"}, "`encoders` must be a list, not 'digits'"),
    ):
        with pytest.raises(ValueError, match=problem):
            AlignedTransformer(tiny_model(), **arguments)
    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    aligned = AlignedTransformer(tiny_model(), [2], [encoder], projector_dim=16)
    with pytest.raises(ValueError, match="prediction_type 'v_prediction' must be one of velocity, epsilon"):
        REPA(aligned, 10, prediction_type="v_prediction")
    for objective in (REPA(aligned, 10), VRPO(aligned, 10)):
        for t in (torch.tensor([3, 600]), torch.tensor(0.3), 0.3):
            with pytest.raises(
                ValueError, match=r"`t` must be flow times in \[0, 1\], floating-point numbers \[B\], not"
            ):
                objective.begin(t)
        step = objective.begin(torch.tensor([0.3, 0.6]))
        _, projections = aligned(*inputs(), fork=step.fork)
        with pytest.raises(ValueError, match=r"`loss_fm` must be the loss of each sample, \[2\], not \[\]"):
            objective(step, projections, torch.rand(2, 3, 8, 8), torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"`images` must be pixels \[B, 3, H, W\], not \[2, 4, 8, 8\]; latents"):
            objective(step, projections, torch.rand(2, 4, 8, 8), torch.rand(2))


def test_no_layers_is_the_transformer_alone():
    model = tiny_model()
    aligned = AlignedTransformer(model)
    prediction, projections = aligned(*inputs())
    assert torch.equal(prediction, model(*inputs()).sample) and projections == ()
    assert aligned._no_split_modules == ["SiTTransformerBlock"]
    assert [name for name, _ in aligned.named_parameters()] == [
        f"transformer.{n}" for n, _ in model.named_parameters()
    ]


# With the objectives


class Pixels:
    """An encoder that is a plain callable: the mean colour of each of 3 x 3 patches of an image, and its negative."""

    embed_dim = 6

    def __call__(self, images):
        patches = torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(2).mT
        return torch.cat([patches, -patches], dim=-1)


def closeness(action, mu, y, subset):
    return -(action - y).square().sum(-1)


@pytest.mark.parametrize("objective", [REPA, VRPO])
@pytest.mark.parametrize("name", ["SiT", "DiT", "SD3"])
def test_the_loop_of_the_documentation(name, objective):
    """Eight lines on any transformer, with an encoder that is a plain callable on another grid of tokens."""
    model, arguments = build(name)
    aligned = AlignedTransformer(model, [2], [Pixels()], projector_dim=16).train()
    objective = objective(aligned, max_train_steps=100)
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=3e-3)
    images, t, rewards = torch.rand(2, 3, 12, 12) * 2 - 1, torch.tensor([0.3, 0.6]), []
    for _ in range(12):
        step = objective.begin(t)
        prediction, projections = aligned(**arguments, fork=step.fork)
        loss_fm = prediction[:, :4].square().flatten(1).mean(1)
        loss = loss_fm.mean() + 0.5 * objective(step, projections, images, loss_fm)
        optimizer.zero_grad()
        loss.backward()
        objective.observe(step)
        optimizer.step()
        objective.update()
        rewards.append(step.logs["reward/semantic"].item())
    assert rewards[-1] > rewards[0] and objective.step_number == 12
    assert projections[0].shape == (2, 16, 6)


@pytest.mark.parametrize("estimator", ["expected", "sampled"])
def test_a_reward_of_a_user(estimator):
    model, arguments = build("SiT")
    aligned = AlignedTransformer(model, [2], [Pixels()], projector_dim=16).train()
    objective = VRPO(
        aligned, 100, rewards=["fidelity", "semantic", closeness], reward_weighting="1,1,2", estimator=estimator
    )
    assert objective.reward_names == ("fidelity", "semantic", "closeness")
    step = objective.begin(torch.tensor([0.3, 0.6]))
    prediction, projections = aligned(**arguments, fork=step.fork)
    loss_fm = prediction.square().flatten(1).mean(1)
    (loss_fm.mean() + objective(step, projections, torch.rand(2, 3, 12, 12), loss_fm)).backward()
    objective.observe(step)
    objective.update()
    # On unit vectors -||a - y||^2 is 2 <a, y> - 2.
    expected = 2 * step.logs["reward/semantic"] - 2
    torch.testing.assert_close(step.logs["reward/closeness"], expected, atol=1e-5, rtol=1e-5)
    assert objective.statistics.state["spread"].shape == (1, 3, 10)
    assert {"share/closeness", "std/closeness"} <= set(objective.summary())


def test_the_end_of_alignment():
    """After the stop no projector runs, encoders are freed, and the projectors have no gradient."""
    model, arguments = build("SiT")
    aligned = AlignedTransformer(model, [2], [Pixels()], projector_dim=16).train()
    objective = VRPO(aligned, 100, alignment_stop_step=1, kl_coeff=0.1)
    assert objective.reference is not None and objective.reference.encoders == []
    images = torch.rand(2, 3, 12, 12)
    for number in range(2):
        step = objective.begin(torch.tensor([0.3, 0.6]))
        assert step.active == (number == 0)
        prediction, projections = aligned(**arguments, fork=step.fork, align=step.active)
        loss_fm = prediction.square().flatten(1).mean(1)
        inputs = tuple(arguments.values())
        loss = loss_fm.mean() + 0.5 * objective(step, projections, images, loss_fm, inputs=inputs)
        loss.backward()
        objective.observe(step)
        objective.update()
    assert projections == () and aligned.encoders == [] and objective.reference is None
    assert all(parameter.grad is None for parameter in aligned.projectors.parameters())
    assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
    assert step.logs["alignment_coeff"] == 0


def test_no_alignment_has_the_same_interface():
    aligned = AlignedTransformer(tiny_model())
    objective = NoAlignment(aligned)
    step = objective.begin(torch.rand(2))
    prediction, projections = aligned(*inputs(), fork=step.fork, align=step.active)
    assert objective(step, projections, None, prediction.flatten(1).mean(1)) == 0
    objective.observe(step)
    objective.update()
    assert step.logs == objective.summary() == objective.stateful() == {} and not objective.active(0)


def test_projectors_are_taken_over_where_they_are_alike():
    first = aligned_with(tiny_model(), layers=(1, 2), dims=(12,))
    state = {f"projectors.{name}": tensor for name, tensor in first.projectors.state_dict().items()}
    for second, alike in (
        (aligned_with(tiny_model(), layers=(1, 2), dims=(12,)), True),
        (aligned_with(tiny_model(), layers=(1, 3), dims=(12,)), False),
        (aligned_with(tiny_model(), layers=(1, 2), dims=(13,)), False),
        (aligned_with(tiny_model(), layers=(1, 2), dims=(12,), projector="conv"), False),
        (aligned_with(tiny_model(), layers=(1, 2), dims=(12,), projector_dim=8), False),
    ):
        nn.init.zeros_(next(second.projectors.parameters()))
        assert second.load_projectors(first.description(), state) == alike
        assert next(second.projectors.parameters()).any() == alike


def test_a_copy_has_hooks_of_its_own():
    model, arguments = build("SiT")
    aligned = aligned_with(model)
    aligned.encoders = [SimpleNamespace(embed_dim=12)]
    frozen = aligned.frozen_copy()
    assert frozen.encoders == [] and len(aligned.encoders) == 1
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.zero_()
    assert frozen(**arguments)[1][0].any() and not aligned(**arguments)[1][0].any()
