# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Rewards of estimated images: gradients against finite differences, their length, which samples have them, errors."""

import functools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from diffusers_vrpo.alignment.encoders import load_encoder, map_sizes
from diffusers_vrpo.alignment.image_rewards import (
    ImageReward,
    ImageRewards,
    image_semantic_reward,
    images_at_a_time,
    load_image_rewards,
    perceptual_reward,
    shallow_layers,
)
from diffusers_vrpo.assets.digits import digits_pixels
from diffusers_vrpo.config import VRPOConfig, check_image_rewards
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import decode_latents
from diffusers_vrpo.models.flow import (
    flow_matching_gradient,
    flow_matching_loss,
    flow_time,
    forward_process,
    x0_estimate,
)
from support.encoders import CONVS, VITS
from support.models import tiny_vae


CONVENTIONS = {
    "velocity": SimpleNamespace(prediction_type="velocity", time_direction="data_to_noise"),
    "noise_to_data": SimpleNamespace(prediction_type="velocity", time_direction="noise_to_data"),
    "epsilon": SimpleNamespace(prediction_type="epsilon", time_direction="data_to_noise"),
}


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("embedded:digits", (4, 4))


def colour(x0_hat, x0):
    """A reward of images without an encoder."""
    return -(x0_hat.mean((2, 3)) - x0.mean((2, 3))).square().sum(1)


@functools.cache
def pixels():
    return digits_pixels("train")[0]


def states(convention="velocity", batch=16, seed=0, error=0.3):
    """Arguments of `ImageRewards` for noisy digits and predictions that are off."""
    config = CONVENTIONS[convention]
    generator = torch.Generator().manual_seed(seed)
    x0 = pixels().roll(-seed * batch, 0)[:batch]
    noise, u = torch.randn(x0.shape, generator=generator), torch.rand(batch, generator=generator)
    x_t, timestep, target, t = forward_process(x0, noise, u, config)
    prediction = target + error * torch.randn(x0.shape, generator=generator)
    return prediction.requires_grad_(), target, x0, x_t, t, timestep


def gradient_of(image_rewards, arguments, **choice):
    """The gradient of the term at the prediction."""
    (gradient,) = torch.autograd.grad(image_rewards(*arguments, **choice), arguments[0])
    return gradient


# Rewards and their gradients


def test_both_rewards_in_formulas_and_best_for_the_image_itself():
    maps = [torch.randn(3, 5, 4, 4), torch.randn(3, 7, 2, 2)]
    others = [torch.randn(3, 5, 4, 4), torch.randn(3, 7, 2, 2)]
    distance, cosine = torch.zeros(3), torch.zeros(3)
    for a, b in zip(maps, others):
        a, b = (x / (x.square().sum(1, keepdim=True) + 1e-4).sqrt() for x in (a, b))
        distance += (a - b).square().sum(1).mean((1, 2)) / 2
        cosine += torch.nn.functional.cosine_similarity(a, b).mean((1, 2)) / 2
    torch.testing.assert_close(perceptual_reward(maps, others), -distance)
    torch.testing.assert_close(image_semantic_reward(maps, others), cosine)
    assert perceptual_reward(maps, maps).tolist() == [0, 0, 0]
    torch.testing.assert_close(image_semantic_reward(maps, maps), torch.ones(3))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", [None, "kl", "tiny", "dc"])
def test_gradients_are_finite_differences(encoder, convention, kind):
    """At the estimate and through the prediction, in pixels and through decoders, a few images at a time."""
    config, vae = CONVENTIONS[convention], None if kind is None else tiny_vae(kind).eval().requires_grad_(False)
    image_rewards = ImageRewards(
        ["perceptual", "image_semantic", colour], encoder, config=config, vae=vae, batch_size=2
    )
    generator = torch.Generator().manual_seed(1)
    shape = (3, 3, 8, 8) if vae is None else (3, 4, 4, 4)
    x0, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    x_t, timestep, target, t = forward_process(x0, noise, torch.tensor([0.2, 0.4, 0.6]), config)
    v = target + 0.5 * torch.randn(shape, generator=generator)
    values, gradients = image_rewards.values_and_gradients(v, x0, x_t, t, timestep)

    def rewards_at(prediction):
        return image_rewards.values_and_gradients(prediction, x0, x_t, t, timestep)[0]

    # The rewards themselves: those of the decoded images.
    images = [decode_latents(vae, x) for x in (x0_estimate(v, x_t, timestep, t, config), x0)]
    maps = [encoder.hidden_maps(image, [1, 2, None]) for image in images]
    assert image_rewards.layers == [1, 2, None]
    torch.testing.assert_close(values[:, 0], perceptual_reward(maps[0][:2], maps[1][:2]))
    torch.testing.assert_close(values[:, 1], image_semantic_reward(maps[0][2:], maps[1][2:]))
    torch.testing.assert_close(values[:, 2], colour(*images))
    for k, gradient in enumerate(gradients):
        direction = gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        step = 0.005
        difference = (rewards_at(v + step * direction) - rewards_at(v - step * direction))[:, k] / (2 * step)
        torch.testing.assert_close(difference, (gradient * direction).flatten(1).sum(1), rtol=0.02, atol=3e-5)
    # At the estimate the gradient is that at the prediction divided by dx0_hat/dv, one number for each sample.
    x0_hat = x0_estimate(v, x_t, timestep, t, config).requires_grad_()
    value = colour(decode_latents(vae, x0_hat), images[1]).sum()
    (at_estimate,) = torch.autograd.grad(value, x0_hat)
    slope = {"velocity": -t, "noise_to_data": t, "epsilon": -t / (1 - t)}[convention].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradients[2], slope * at_estimate, rtol=1e-4, atol=1e-7)


def test_flow_matching_gradient_is_that_of_the_loss():
    prediction, target, *_ = states()
    (gradient,) = torch.autograd.grad(flow_matching_loss(prediction, target).sum(), prediction)
    torch.testing.assert_close(flow_matching_gradient(prediction, target), gradient)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_flow_times_are_those_of_the_forward_process(convention):
    u = torch.tensor([0.0, 0.1, 0.55, 0.999])
    zeros = torch.zeros(4, 1, 1, 1)
    config = CONVENTIONS[convention]
    assert torch.equal(flow_time(u, config), forward_process(zeros, zeros, u, config)[3])


@pytest.mark.parametrize("name", ["dinov2-registers", "clip-vision", "siglip-vision", *CONVS])
def test_every_family_gives_maps_with_gradients_and_stays_as_it_is(encoder_checkpoint, name):
    encoder = load_encoder(encoder_checkpoint(name), (4, 4)).train()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    image_rewards = ImageRewards(["perceptual", "image_semantic"], encoder)
    half = (len(map_sizes(encoder)) - 1) / 2
    perceptual, semantic = image_rewards.rewards
    assert perceptual.layers and all(1 <= layer <= max(1, half) for layer in perceptual.layers)
    assert semantic.layers == ((CONVS[name][2],) if name in CONVS else (None,))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5)
    values, gradients = image_rewards.values_and_gradients(x, x.flip(0), 2 * x, t, None)
    assert values.shape == (2, 2)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # Deep embeddings of EfficientNet with random weights are so small that they count as 0.
    assert [(gradient != 0).any().item() for gradient in gradients] == [True, name != "efficientnet"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", [*VITS, *CONVS])
def test_a_pass_ends_with_the_deepest_layer_that_is_asked_for(encoder_checkpoint, name):
    """The maps are those of the whole pass, and cost less."""
    encoder = load_encoder(encoder_checkpoint(name), (4, 4))
    images = torch.randn(2, 3, *encoder.input_size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    image_rewards = ImageRewards(["perceptual"], encoder)
    layers = [index for index, size in enumerate(map_sizes(encoder)) if size is not None]
    early, short = encoder.hidden_maps(images, layers), image_rewards.flops_per_sample((3, 32, 32))
    encoder.state_modules = [{}]  # none of them is known, as in Swin
    whole, long = encoder.hidden_maps(images, layers), image_rewards.flops_per_sample((3, 32, 32))
    for a, b in zip(early, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert short < 0.9 * long or (short <= long and name in ("swin", "resnet", "regnet"))


@pytest.mark.parametrize(
    "sizes, layers",
    [
        ([64] * 2 + [32] * 2 + [16] * 2 + [8] * 6 + [4] * 5, (1, 3, 5)),  # EfficientNet-lite0
        ([8, 8, 4, 2, 1], (1, 2)),  # ResNet, ConvNeXt
        ([16] * 13, (2, 4, 6)),  # ViT-B
        ([16] * 5, (1, 2)),
        ([4, 4], (1,)),
        ([4], (0,)),
    ],
)
def test_default_layers_of_the_perceptual_reward(sizes, layers):
    assert shallow_layers([(size, size) for size in sizes]) == layers
    assert shallow_layers([None, (4, 4), (4, 4)]) == (1,)


def test_layers_and_resolution_are_what_is_asked_for(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("resnet"), (4, 4))
    image_rewards = ImageRewards(
        ["perceptual", "image_semantic"], encoder, perceptual_layers=[1, -1], semantic_layer=-2, resolution=96
    )
    assert [reward.layers for reward in image_rewards.rewards] == [(1, 4), (3,)]
    maps = image_rewards._maps(torch.zeros(1, 3, 32, 32))
    assert {layer: each.shape[-1] for layer, each in maps.items()} == {1: 24, 4: 3, 3: 6}
    with pytest.raises(InputError, match="`perceptual_layer` 5 is not a hidden state .*; choose from 0, 1, 2, 3, 4"):
        ImageRewards(["perceptual"], encoder, perceptual_layers=[5])
    with pytest.raises(InputError, match="`image_semantic_layer` -6 is not a hidden state"):
        ImageRewards(["perceptual"], encoder, semantic_layer=-6)


# The length of the gradient


def test_the_gradient_has_the_share_that_is_asked_for(encoder):
    """`||d(w R)/dv||` over flow matching's, in every timestep bin, for two rewards; what is logged; no loss value."""
    image_rewards = ImageRewards(["perceptual", colour], encoder, share=[0.5, 2.0], max_t=1.0)
    for number in range(20):
        loss = image_rewards(*states(seed=number, batch=64))
        image_rewards.update()
        assert loss == 0
    sums, logs = torch.zeros(3, 10), []
    for number in range(20):
        prediction, target, x0, x_t, t, timestep = states(seed=number, batch=64)
        scale = image_rewards.shares * image_rewards.norms.lookup(t)
        _, gradients = image_rewards.values_and_gradients(prediction.detach(), x0, x_t, t, timestep)
        (flow,) = torch.autograd.grad(flow_matching_loss(prediction, target).sum(), prediction)
        scaled = [scale[:, k].reshape(-1, 1, 1, 1) * gradient for k, gradient in enumerate(gradients)]
        squares = torch.stack([g.flatten(1).square().sum(1) for g in (flow, *scaled)])
        sums.index_add_(1, (t * 10).long(), squares.detach())
        gradient = gradient_of(image_rewards, (prediction, target, x0, x_t, t, timestep))
        torch.testing.assert_close(gradient, -(scaled[0] + scaled[1]) / 64, rtol=1e-4, atol=1e-8)
        logs.append([image_rewards.logs[f"image_share/{name}"] for name in ("perceptual", "colour")])
    shares = (sums[1:] / sums[0]).sqrt()
    torch.testing.assert_close(shares, torch.tensor([[0.5], [2.0]]).expand(2, 10), rtol=0.3, atol=0)
    torch.testing.assert_close(torch.tensor(logs).mean(0), torch.tensor([0.5, 2.0]), rtol=0.1, atol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_unit_of_a_reward_does_not_matter(convention):
    gradients = []
    for unit in (1.0, 1e-4, 1e5):
        reward = ImageReward("colour", lambda x0_hat, x0, unit=unit: unit * colour(x0_hat, x0))
        image_rewards = ImageRewards([reward], config=CONVENTIONS[convention])
        for number in range(3):
            image_rewards(*states(convention, seed=number, batch=64))
            image_rewards.update()
        gradients.append(gradient_of(image_rewards, states(convention, seed=9, batch=64)))
    assert gradients[0].abs().sum() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-9)


def test_a_step_uses_the_statistics_before_it_and_waits_for_enough():
    image_rewards = ImageRewards([colour])
    arguments = states(batch=192)
    first = gradient_of(image_rewards, arguments)
    assert first.abs().sum() == 0 and "reward/colour" in image_rewards.logs
    assert torch.equal(gradient_of(image_rewards, arguments), first)  # observed twice, not updated
    image_rewards.update()
    counts = image_rewards.norms.state["count"]
    assert (counts[:7] >= 8).all() and (counts[7:] == 0).all() and counts.sum() == 2 * (arguments[4] <= 0.7).sum()
    assert (gradient_of(image_rewards, arguments).flatten(1).norm(dim=1) > 0).tolist() == (
        arguments[4] <= 0.7
    ).tolist()
    few = ImageRewards([colour])
    few(*states(batch=7))
    few.update()
    assert few.norms.ratio().sum() == 0


def test_a_reward_without_a_gradient_or_with_nan_has_no_influence_on_the_statistics():
    flat = ImageRewards([ImageReward("flat", lambda x0_hat, x0: 0 * x0_hat.sum((1, 2, 3)))])
    for number in range(3):
        flat(*states(seed=number, batch=64))
        flat.update()
    assert gradient_of(flat, states(batch=64)).abs().sum() == 0
    image_rewards = ImageRewards([colour])
    arguments = states(batch=64)
    image_rewards(*arguments)
    image_rewards.update()
    spoilt = [tensor.clone() for tensor in arguments]
    spoilt[0][arguments[4] <= 0.7] = float("nan")
    assert image_rewards(*spoilt).isnan()  # the run stops there
    image_rewards.update()
    assert image_rewards.norms.ratio().isfinite().all()


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_divided_batch_is_one_batch(monkeypatch, parts, fraction):
    """As processes (sums of all) and as micro-batches: the same statistics, and parts of the same gradient."""
    monkeypatch.setattr("diffusers_vrpo.alignment.image_rewards.MIN_SAMPLES", 1)
    whole, divided = ImageRewards([colour], fraction=fraction), ImageRewards([colour], fraction=fraction)
    processes = [ImageRewards([colour], fraction=fraction) for _ in range(parts)]
    for number in range(4):
        arguments, index = states(seed=number, batch=64), torch.arange(64) + 64 * number
        cut = list(zip(*(tensor.detach().split(64 // parts) for tensor in (*arguments, index))))
        results = []
        for each in (*processes, *[divided] * parts):
            *inputs, own = cut[len(results) % parts]
            results.append(gradient_of(each, [inputs[0].requires_grad_(), *inputs[1:]], index=own) / parts)
        gradient = gradient_of(whole, arguments, index=index)
        for found in (results[:parts], results[parts:]):
            torch.testing.assert_close(torch.cat(found), gradient, rtol=1e-4, atol=1e-9)
        total = sum(each.norms.pending for each in processes)
        for each in processes:
            each.update(lambda tensor: total)  # noqa: B023
        whole.update()
        divided.update()
    assert gradient.abs().sum() > 0
    for each in (divided, *processes):
        torch.testing.assert_close(each.norms.state, whole.norms.state, rtol=1e-6, atol=0)


def test_half_precision_of_the_prediction_and_of_an_autocast_around():
    image_rewards, other = ImageRewards([colour]), ImageRewards([colour])
    for number in range(3):
        prediction, *rest = states(seed=number, batch=64)
        image_rewards(prediction, *rest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other(prediction.bfloat16(), *rest)
        image_rewards.update()
        other.update()
    prediction, *rest = states(seed=3, batch=64)
    expected, half = gradient_of(image_rewards, (prediction, *rest)), prediction.detach().bfloat16().requires_grad_()
    found = gradient_of(other, (half, *rest))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_in_half_precision(encoder, dtype):
    """Half of what aligns on a GPU. Gradients of fp16 do not vanish, also of a reward in a small unit."""
    half = load_encoder("embedded:digits", (4, 4), dtype=dtype)
    small = ImageReward("small", lambda *maps: 1e-3 * perceptual_reward(*maps), layers=(1, 2))
    results = []
    for each in (encoder, half):
        prediction, _, x0, x_t, t, timestep = states()
        image_rewards = ImageRewards(["image_semantic", small], each)
        results.append(image_rewards.values_and_gradients(prediction.detach(), x0, x_t, t, timestep)[1])
    for a, b in zip(*results):
        assert torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).min() > 0.97
        torch.testing.assert_close(a.norm(), b.norm(), rtol=0.05, atol=0)


# Which samples and steps


def test_a_compiled_encoder_gives_several_gradients_of_one_pass(encoder):
    """Its compiled call would not: it is left for the targets of the alignment."""
    images = torch.rand(2, 3, 8, 8)
    rewards = ImageRewards(["perceptual", "image_semantic"], encoder)
    assert None in rewards.layers
    arguments = (torch.zeros(2, 3, 8, 8), images, images + 0.1, torch.tensor([0.3, 0.6]), None)
    expected = rewards.values_and_gradients(*arguments)

    def compiled(*args, **kwargs):
        raise AssertionError("the compiled call was used")

    encoder.model._compiled_call_impl = compiled
    try:
        found = rewards.values_and_gradients(*arguments)
    finally:
        encoder.model._compiled_call_impl = None
    assert all(torch.equal(a, b) for a, b in zip((expected[0], *expected[1]), (found[0], *found[1]), strict=True))


def test_gate_fraction_interval_and_start():
    image_rewards = ImageRewards([colour], every=3, start_step=4, fraction=0.25, max_t=0.5)
    assert [step for step in range(14) if image_rewards.active(step)] == [4, 7, 10, 13]
    t = torch.tensor([0.1, 0.5, 0.51, 0.9] * 4)
    assert image_rewards.rows(t, torch.arange(16)).tolist() == []  # every fourth sample, all of which are too noisy
    assert image_rewards.rows(t, torch.arange(16) + 2).tolist() == [1, 5, 9, 13]
    assert ImageRewards([colour], max_t=0.5).rows(t).tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert len(ImageRewards([colour], fraction=0.3).rows(torch.zeros(1000), torch.arange(1000) + 77)) in (
        299,
        300,
        301,
    )
    assert not ImageRewards().active()

    # Nothing is computed, observed or logged in the other steps; the count of steps goes on.
    arguments = states(batch=64)
    for step in range(14):
        image_rewards(*arguments)
        assert bool(image_rewards.logs) == (step in (4, 7, 10, 13))
        image_rewards.update()
    observed = ((torch.arange(64) % 4 == 3) & (arguments[4] <= 0.5)).sum()
    assert image_rewards.norms.state["count"].sum() == 4 * observed > 0
    assert image_rewards.step_number == 14


def test_a_batch_in_which_all_are_too_noisy_costs_nothing():
    image_rewards = ImageRewards([ImageReward("never", lambda *images: pytest.fail("was called"))], max_t=1e-6)
    loss = image_rewards(*states())
    # Another process may have samples to reward, so that the names of what is logged are there.
    assert loss == 0 and set(image_rewards.logs) == {"reward/never", "image_share/never"}
    assert all(value.isnan() for value in image_rewards.logs.values())


def test_state_comes_back():
    one, other = ImageRewards([colour], every=2), ImageRewards([colour], every=2)
    for number in range(5):
        one(*states(seed=number, batch=64))
        one.update()
    other.load_state_dict(load(save(one.state_dict())))
    other.resume(5)
    for number in range(5, 8):
        for each in (one, other):
            each(*states(seed=number, batch=64))
            each.update()
        arguments = states(seed=number + 1, batch=64)
        assert torch.equal(one(*arguments), other(*arguments))
    assert all(torch.equal(tensor, other.norms.state[name]) for name, tensor in one.norms.state.items())
    assert one.step_number == other.step_number == 8


# What is refused


def wrong_shape(x0_hat, x0):
    return (x0_hat - x0).square()


def no_gradient(x0_hat, x0):
    return (x0_hat.detach() - x0).square().mean((1, 2, 3))


@pytest.mark.parametrize(
    "rewards, message",
    [
        (["perceptua"], "`image_rewards` 'perceptua' is neither perceptual, image_semantic nor package.module:name"),
        (["no_module:f"], "`image_rewards` no_module:f cannot be imported"),
        (["math:pi"], "is not a function of"),
        ([3], "`image_rewards` 3 is not a function of"),
        (["perceptual", "perceptual"], "has perceptual twice"),
    ],
)
def test_rewards_that_cannot_be_loaded(rewards, message):
    with pytest.raises(InputError, match=message) as error:
        load_image_rewards(rewards)
    assert error.value.field == "image_rewards"


@pytest.mark.parametrize(
    "function, message",
    [
        (wrong_shape, r"wrong_shape returns \[2, 3, 8, 8\] for 2 images"),
        (no_gradient, "no_gradient: two images cannot"),
    ],
)
def test_rewards_that_cannot_work_fail_before_the_training(function, message):
    with pytest.raises(InputError, match=message):
        ImageRewards([function]).check((3, 8, 8), 8)
    ImageRewards([colour]).check((3, 8, 8), 8)


def test_an_autoencoder_of_other_latents_is_refused():
    vae = tiny_vae("tiny").requires_grad_(False)
    ImageRewards([colour], vae=vae).check((4, 2, 2), 8)
    for shape in ((8, 2, 2), (4, 4, 4)):
        with pytest.raises(InputError, match="does not decode latents of .*; give a `reward_vae`"):
            ImageRewards([colour], vae=vae).check(shape, 8)


def test_an_encoder_and_as_many_shares_as_rewards_are_needed(encoder):
    with pytest.raises(InputError, match="`image_rewards` image_semantic need an encoder"):
        ImageRewards(["image_semantic"])
    with pytest.raises(InputError, match="has 3 numbers for 2 rewards"):
        ImageRewards(["perceptual", colour], encoder, share=[1, 2, 3])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_reward_share": [1.0]}, "`image_reward_share` .* has no effect without `image_rewards`"),
        ({"image_reward_max_t": 0.5}, "`image_reward_max_t` 0.5 has no effect without `image_rewards`"),
        ({"image_reward_every": 2}, "has no effect"),
        ({"image_reward_fraction": 0.5}, "has no effect"),
        ({"image_reward_start_step": 5}, "has no effect"),
        ({"image_reward_encoder": "a"}, "has no effect"),
        ({"image_reward_resolution": 64}, "has no effect"),
        ({"perceptual_layer": [1]}, "has no effect"),
        ({"image_semantic_layer": 1}, "has no effect"),
        ({"reward_vae": "a"}, "has no effect"),
        ({"image_reward_batch_size": 2}, "has no effect"),
        ({"image_rewards": ["image_semantic"], "perceptual_layer": [1]}, "without `image_rewards` perceptual"),
        ({"image_rewards": ["perceptual"], "image_semantic_layer": 1}, "without `image_rewards` image_semantic"),
        ({"image_rewards": ["perceptual,a:b"], "image_reward_share": [1, 2, 3]}, "has 3 numbers for 2 rewards"),
        (
            {"image_rewards": ["perceptual"], "encoder": None},
            "`image_rewards` perceptual needs `image_reward_encoder`",
        ),
        ({"image_rewards": ["perceptual"], "image_reward_start_step": 10}, "is never reached"),
    ],
)
def test_options_without_effect(options, message):
    config = VRPOConfig(**{"encoder": ["digits"], "max_train_steps": 10, **options})
    with pytest.raises(InputError, match=message) as error:
        check_image_rewards(config)
    assert f"`{error.value.field}`" in str(error.value)


@pytest.mark.parametrize(
    "vae, resolution, device, expected",
    [
        (None, 256, "cuda", 64),
        ("AutoencoderTiny", 256, "cpu", 8),
        ("AutoencoderTiny", 64, "cuda", 64),
        ("AutoencoderTiny", 256, "cuda:1", 64),
        ("AutoencoderTiny", 512, "cuda", 16),
        ("AutoencoderTiny", 1024, "cuda", 8),
        ("AutoencoderKL", 256, "cuda", 8),
    ],
)
def test_a_gpu_takes_more_images_at_a_time_where_the_decoder_is_small(vae, resolution, device, expected):
    assert images_at_a_time(vae and type(vae, (), {})(), resolution, device) == expected
