# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The scaffold of REPI: keys and values of a block from an encoder's features, and the block that learns them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo.alignment.attach import AlignedTransformer, transformer_blocks
from diffusers_vrpo.alignment.objective import REPA, REPI, VRPO, NoAlignment
from diffusers_vrpo.alignment.scaffold import ScaffoldStep, image_tokens, self_attention
from diffusers_vrpo.errors import InputError
from support.models import aligned_with, digits_model, needs_compiler, tiny_model
from support.transformers import TRANSFORMERS, build


T = torch.tensor([0.3, 0.6])


class Pixels:
    """An encoder that is a plain callable: the pixels of 2 x 2 patches of an image of 8 x 8."""

    embed_dim = 12

    def __call__(self, images):
        return F.unfold(images, 2, stride=2).mT


def scaffolded(model, layer=2, layers=(), dims=(12, 20)) -> AlignedTransformer:
    """A scaffold with random weights, and projectors on `layers`."""
    aligned = aligned_with(model, layers, dims, scaffold_layer=layer)
    for parameter in aligned.scaffold.parameters():
        nn.init.normal_(parameter, std=0.3)
    return aligned


def features(*shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(2, *shape, generator=generator) + 1 for shape in shapes or ((16, 12), (16, 20))]


def by_hand(scaffold, joined) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the maps, written out."""
    normed = [(f - f.mean(-1, keepdim=True)) / (f.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() for f in joined]
    x = torch.cat(normed, -1)
    return tuple(x @ linear.weight.T + linear.bias for linear in (scaffold.keys, scaffold.values))


def test_attention_by_hand():
    """In the scaffold phase the block attends with its own queries to the keys and values of the features."""
    model, arguments = build("SiT")
    aligned, seen = scaffolded(model), {}
    attention = model.transformer_blocks[1].attn
    attention.register_forward_hook(lambda module, args, output: seen.update(input=args[0], output=output))
    step = ScaffoldStep(features(), replaces=True)
    with torch.no_grad():
        aligned(**arguments, scaffold=step)
        keys, values = by_hand(aligned.scaffold, features())
        queries = attention.to_q(seen["input"])
        heads = [x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (queries, keys, values)]
        weights = (heads[0] @ heads[1].mT / 4).softmax(-1)
        expected = attention.to_out[0]((weights @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"], expected, atol=1e-5, rtol=1e-5)
    assert step.distance() == 0


def test_distance_by_hand():
    """Afterwards the prediction is the model's own, and the distance that of its keys and values to the maps'."""
    model, arguments = build("SiT")
    with torch.no_grad():
        plain = model(**arguments).sample
    aligned, seen = scaffolded(model), {}
    attention = model.transformer_blocks[1].attn
    attention.register_forward_hook(lambda module, args, output: seen.update(input=args[0]))
    step = ScaffoldStep(features(), replaces=False)
    prediction, _ = aligned(**arguments, scaffold=step)
    assert torch.equal(prediction, plain)
    keys, values = by_hand(aligned.scaffold, features())
    expected = (attention.to_k(seen["input"]) - keys).square().mean()
    expected = expected + (attention.to_v(seen["input"]) - values).square().mean()
    torch.testing.assert_close(step.distance(), expected)
    step.distance().backward()
    assert all(p.grad is None for p in aligned.scaffold.parameters())  # the target rests
    assert attention.to_k.weight.grad.any() and model.transformer_blocks[0].ff.net[2].weight.grad.any()
    assert model.transformer_blocks[2].attn.to_k.weight.grad is None


@pytest.mark.parametrize("replaces", [True, False])
def test_gradients_are_finite_differences(replaces):
    """Of flow matching's part and the pull; in the scaffold phase also at the maps, which then have no pull."""
    model, arguments = build("SiT")
    aligned = scaffolded(model).double()
    arguments["hidden_states"] = arguments["hidden_states"].double()
    attention = model.transformer_blocks[1].attn

    def loss():
        step = ScaffoldStep(features(), replaces)
        prediction, _ = aligned(**arguments, scaffold=step)
        return prediction.square().mean() + 2 * step.distance()

    loss().backward()
    trained = [attention.to_q.weight, model.patch_embed.weight]
    trained += [aligned.scaffold.keys.weight, aligned.scaffold.values.bias] if replaces else [attention.to_k.weight]
    resting = [attention.to_k.weight, attention.to_v.bias] if replaces else [aligned.scaffold.keys.weight]
    assert all(parameter.grad is None for parameter in resting)
    generator = torch.Generator().manual_seed(4)
    for parameter in trained:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * 1e-3 * direction
                values.append(loss())
            parameter += 1e-3 * direction
        measured = (values[0] - values[1]) / 2e-3
        torch.testing.assert_close(measured, (parameter.grad * direction).sum(), rtol=2e-3, atol=1e-5)


def gradients(aligned, arguments, replaces) -> list[torch.Tensor]:
    step = ScaffoldStep(features(), replaces)
    aligned.zero_grad()
    torch.manual_seed(2)  # DiT drops labels
    prediction, projections = aligned(**arguments, scaffold=step)
    loss = prediction.square().mean() + 2 * step.distance() + sum(p.sin().mean() for p in projections)
    loss.backward()
    return [torch.zeros(1) if p.grad is None else p.grad for p in aligned.parameters()]


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_any_transformer_of_diffusers_has_a_scaffold(name, replaces):
    """Also with gradient checkpointing, and beside projectors; a pipeline's own call is as before."""
    model, arguments = build(name)
    with torch.no_grad():
        plain = model(**arguments, return_dict=False)[0]
    aligned = scaffolded(model, layers=(2, 3)).train()
    exact = gradients(aligned, arguments, replaces)
    attention = self_attention(transformer_blocks(model)[1])
    assert (attention.to_k.weight.grad is None) == replaces
    assert all((p.grad is not None) == replaces for p in aligned.scaffold.parameters())
    assert all(gradient.isfinite().all() for gradient in exact)
    model.enable_gradient_checkpointing()
    for a, b in zip(exact, gradients(aligned, arguments, replaces), strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**arguments, return_dict=False)[0], plain)
        aligned.detach()
        assert torch.equal(model(**arguments, return_dict=False)[0], plain)


@pytest.mark.parametrize("number", [1, 3])
def test_text_tokens_keep_their_keys(number):
    """Flux has the text's tokens in an attention of their own layers, then in front of the image's."""
    model, arguments = build("Flux")
    aligned, seen = scaffolded(model, number), {}
    attention = self_attention(transformer_blocks(model)[number - 1])
    attention.norm_k.register_forward_pre_hook(lambda module, args: seen.update(keys=args[0].flatten(2)))
    handle = attention.to_k.register_forward_pre_hook(lambda module, args: seen.update(input=args[0]))
    step = ScaffoldStep(features(), replaces=True)
    aligned(**arguments, scaffold=step)
    handle.remove()
    keys, _ = by_hand(aligned.scaffold, features())
    torch.testing.assert_close(seen["keys"][:, -16:], keys, atol=1e-5, rtol=1e-5)
    if number == 3:
        own = F.linear(seen["input"], attention.to_k.weight, attention.to_k.bias)
        torch.testing.assert_close(seen["keys"][:, :5], own[:, :5])
    assert bool(step.resting) == (number == 1)  # else the text trains the layers


@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients(checkpointing):
    model, arguments = build("SiT")
    aligned = scaffolded(model, layers=(2,)).train()
    exact = [gradients(aligned, arguments, replaces) for replaces in (True, False)]
    torch._dynamo.reset()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for replaces, expected in zip((True, False), exact):
        for a, b in zip(expected, gradients(aligned, arguments, replaces), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_features_on_another_grid_are_resampled():
    model, arguments = build("SiT")
    aligned = scaffolded(model)
    step = ScaffoldStep(features((36, 12), (1, 20)), replaces=True)
    aligned(**arguments, scaffold=step)
    assert [x.shape for x in step.mapped] == [(2, 16, 32)] * 2
    assert image_tokens(torch.zeros(1, 4, 8, 16), 2, (4, 4)) == (32, (4, 8))
    assert image_tokens(torch.zeros(1, 8, 4), 1, (2, 4)) == (8, (2, 4))
    assert image_tokens(torch.zeros(1, 8, 4), 1, (4, 4)) == (8, None)


def test_autocast():
    """Keys and values have the dtype of the block's own, the distance is float32."""
    model, arguments = build("SiT")
    aligned = scaffolded(model)
    for replaces in (True, False):
        step = ScaffoldStep(features(), replaces)
        with torch.autocast("cpu", torch.bfloat16):
            prediction, _ = aligned(**arguments, scaffold=step)
        distance = step.distance()
        assert prediction.isfinite().all() and distance.dtype == torch.float32
        (prediction.float().mean() + distance).backward()


def make(kind, aligned, steps, fraction, **options):
    if kind is not REPI:
        options |= {"alignment_coeff": 0.25}
    return kind(aligned, steps, scaffold_fraction=fraction, **options)


@pytest.mark.parametrize("kind", [REPI, REPA, VRPO])
@pytest.mark.parametrize("name", ["SiT", "DiT", "PixArt"])
def test_the_phases_of_a_loop(name, kind):
    """The maps learn in the first phase and then rest, the block's own layers the other way round; the distance falls."""
    model, arguments = build(name)
    aligned = AlignedTransformer(
        model, [] if kind is REPI else [3], [Pixels()], projector_dim=16, scaffold_layer=2
    ).train()
    objective = make(kind, aligned, 12, 0.25)
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=3e-3, weight_decay=0.1)
    attention, images, distances = self_attention(transformer_blocks(model)[1]), torch.rand(2, 3, 8, 8) * 2 - 1, []
    for number in range(12):
        maps, own = (torch.cat([p.detach().flatten() for p in part.parameters()])
                     for part in (aligned.scaffold, nn.ModuleList([attention.to_k, attention.to_v])))  # fmt: skip
        step = objective.begin(T, images)
        prediction, projections = aligned(**arguments, fork=step.fork, align=step.active, scaffold=step.scaffold)
        loss_fm = prediction[:, :4].square().flatten(1).mean(1)
        loss = loss_fm.mean() + objective.alignment_coeff * objective(step, projections, images, loss_fm)
        loss = loss + objective.scaffold_coeff * step.scaffold_distance()
        optimizer.zero_grad()
        loss.backward()
        objective.observe(step)
        optimizer.step()
        objective.update()
        distances.append(step.scaffold_distance().item())
        assert step.scaffold.replaces == (number < 3)
        assert torch.equal(maps, torch.cat([p.flatten() for p in aligned.scaffold.parameters()])) == (number >= 3)
        now = torch.cat([p.flatten() for p in (*attention.to_k.parameters(), *attention.to_v.parameters())])
        assert torch.equal(own, now) == (number < 3)
    assert distances[:3] == [0, 0, 0] and 0 < distances[-1] < distances[3]
    assert bool(projections) == (kind is not REPI)


@pytest.mark.parametrize("kind", [REPI, REPA])
def test_the_stop_ends_the_pull_and_frees_the_encoders(kind):
    model, arguments = build("SiT")
    aligned = AlignedTransformer(model, [] if kind is REPI else [3], [Pixels()], projector_dim=16, scaffold_layer=2)
    objective = make(kind, aligned, 8, 0.125, alignment_stop_step=2)
    states = []
    for _ in range(3):
        step = objective.begin(T, torch.rand(2, 3, 8, 8))
        prediction, _ = aligned(**arguments, fork=step.fork, align=step.active, scaffold=step.scaffold)
        prediction.mean().backward()
        objective.observe(step)
        objective.update()
        states.append((step.active, step.scaffold and step.scaffold.replaces, len(aligned.encoders)))
    assert states == [(True, True, 1), (True, False, 1), (False, None, 0)]
    with pytest.raises(
        InputError, match="`alignment_stop_step` 2 must be above the end of the scaffold phase, which lasts 4"
    ):
        make(kind, scaffolded(tiny_model()), 8, 0.5, alignment_stop_step=2)


def test_the_length_of_the_phase_is_kept():
    """A run that is made longer does not go back into the scaffold phase."""
    aligned = scaffolded(tiny_model())
    first, longer = REPI(aligned, 100, 0.1), REPI(aligned, 1000, 0.1)
    assert [n for n in (0, 9, 10, 99) if first.scaffolding(n)] == [0, 9] and longer.scaffolding(99)
    longer.resume(50, first.release_state())
    assert longer.step_number == 50 and not longer.scaffolding(50)
    assert REPI(aligned, 3, 0.1).scaffolding(0)  # one step at least
    oracle = REPI(aligned, 100, 1)
    oracle.resume(100, REPI(aligned, 100, 1).release_state())
    assert oracle.scaffolding(10**9)
    objective = REPA(aligned_with(tiny_model()), 100)
    assert "scaffold_steps" not in objective.release_state() and not objective.scaffolding(0)
    assert REPA(scaffolded(tiny_model(), layers=(2,)), 100).release_state()["scaffold_steps"] == 5


def test_an_oracle_while_sampling():
    """The transformer's own calls get the features of real images, also where guidance doubles the batch."""
    model, arguments = build("SiT")
    aligned = AlignedTransformer(model, [], [Pixels()], scaffold_layer=2)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        plain = model(**arguments).sample
        expected, _ = aligned(**arguments, scaffold=ScaffoldStep([Pixels()(images)], replaces=True))
        with aligned.oracle(images):
            assert torch.equal(model(**arguments).sample, expected)
            twice = {name: torch.cat([x, x]) for name, x in arguments.items()}
            torch.testing.assert_close(model(**twice).sample, torch.cat([expected, expected]))
        assert torch.equal(model(**arguments).sample, plain) and not torch.equal(plain, expected)
    aligned.end()
    with pytest.raises(ValueError, match="an oracle needs `scaffold_layer`, and encoders"), aligned.oracle(images):
        pass


class Block(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4)


def test_what_cannot_have_a_scaffold():
    attention = Attention()
    assert self_attention(Block(inner=attention, ff=nn.Linear(4, 4))) is attention
    assert self_attention(Block(attn2=Attention(), attn1=attention)) is attention
    with pytest.raises(ValueError, match="Block has no attention with both of them"):
        self_attention(Block(ff=nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="Block has several attentions with them"):
        self_attention(Block(one=Attention(), two=Attention()))
    attention.fused_projections = True
    with pytest.raises(ValueError, match="fused with the queries; unfuse"):
        self_attention(Block(attn=attention))
    with pytest.raises(ValueError, match=r"scaffold_layer 4 must lie in 1 ... 3"):
        scaffolded(tiny_model(), 4)
    with pytest.raises(ValueError, match="scaffold_layer 2 needs `encoders`"):
        AlignedTransformer(tiny_model(), scaffold_layer=2)
    with pytest.raises(ValueError, match="REPI needs an aligned transformer with `scaffold_layer`"):
        REPI(aligned_with(tiny_model()), 10)
    with pytest.raises(ValueError, match="kl_coeff cannot be combined"):
        VRPO(scaffolded(tiny_model(), layers=(2,)), 10, kl_coeff=0.1)
    model, arguments = build("SiT")
    aligned = scaffolded(model)
    with pytest.raises(ValueError, match=r"call `begin\(t, images\)`"):
        REPI(aligned, 10).begin(T)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="its projections were fused or replaced"):
        aligned(**arguments, scaffold=ScaffoldStep(features(), replaces=True))


def test_without_an_objective_for_it_the_scaffold_rests():
    aligned = scaffolded(tiny_model())
    step = NoAlignment(aligned).begin(T)
    assert step.scaffold is None and step.scaffold_distance() == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scaffold_fraction": 0.1}, "`scaffold_fraction` 0.1 has no effect without `scaffold_layer`"),
        ({"scaffold_coeff": 1.0}, "`scaffold_coeff` 1.0 has no effect without `scaffold_layer`"),
        (
            {"scaffold_layer": 2, "objective": "none"},
            "`scaffold_layer` 2 has no effect without `objective` repa, irepa, rare, repi or vrpo",
        ),
        ({"scaffold_layer": 0}, "`scaffold_layer` 0 must be at least 1"),
        ({"scaffold_layer": 2, "scaffold_fraction": 0.0}, "`scaffold_fraction` 0.0 must be above 0 and at most 1"),
        ({"objective": "repi", "lora_rank": 4}, "`lora_rank` 4 cannot be combined with `objective` repi"),
        ({"scaffold_layer": 2, "kl_coeff": 0.1}, "`kl_coeff` 0.1 cannot be combined with `scaffold_layer` 2"),
        ({"scaffold_layer": 2, "alignment_coeff": 0.0}, "`alignment_coeff` 0 ends alignment"),
        (
            {"scaffold_layer": 2, "scaffold_fraction": 1.0, "release": "plateau"},
            "`release` plateau has no effect with `scaffold_fraction` 1, because it acts only after the scaffold phase",
        ),
        (
            {"scaffold_layer": 2, "scaffold_fraction": 1.0, "conflict": "gate"},
            "`conflict` gate has no effect with `scaffold_fraction` 1, because it acts only after the scaffold phase",
        ),
        (
            {"objective": "repi", "projector": "conv"},
            "`projector` conv has no effect without `objective` repa, irepa, rare or vrpo",
        ),
        (
            {"objective": "repi", "generative_policy_start_step": 4, "max_train_steps": 100},
            "`generative_policy_start_step` 4 must be at least 5, the end of the scaffold phase",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(InputError, match=message):
        VRPOConfig(**options)


def test_a_frozen_copy_after_a_step():
    model, arguments = build("SiT")
    aligned = scaffolded(model, layers=(2,))
    step = ScaffoldStep(features(), replaces=True)
    aligned(**arguments, scaffold=step)[0].mean().backward()
    assert aligned.frozen_copy().scaffold.keys.weight is not aligned.scaffold.keys.weight


def test_conv_nets_and_one_token_are_encoders_too(encoder_checkpoint):
    from diffusers_vrpo.alignment.encoders import load_encoder

    encoder = load_encoder(encoder_checkpoint("convnext"), (4, 4))
    aligned = AlignedTransformer(digits_model(), [], [encoder], scaffold_layer=1)
    objective = REPI(aligned, 10)
    images = torch.rand(2, 3, 8, 8)
    step = objective.begin(T, images)
    aligned(images, T, torch.tensor([0, 1]), scaffold=step.scaffold)[0].mean().backward()
    assert aligned.scaffold.keys.weight.grad.any()
