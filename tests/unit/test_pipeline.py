# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.pipelines.scheduling_sit_sde import SiTSDEScheduler
from support.models import TINY, load_golden, tiny_model, tiny_vae
from support.paths import ROOT
from support.pipelines import ALPHA_BAR, FLOW_SIGMAS, NAMES, exact_gaussian, moment_errors, quiet_pipeline, sample


def make_pipeline(vae=None, names=NAMES, **changes) -> VRPOPipeline:
    pipeline = VRPOPipeline(tiny_model(**{"in_channels": 3, **changes}), FlowMatchEulerDiscreteScheduler(), vae, names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class GivenNoises(SiTSDEScheduler):
    """Takes its draws from `noises` instead of a generator."""

    def step(self, model_output, timestep, sample, generator=None, noise=None, return_dict=True):
        step = self.begin_index if self.step_index is None else self.step_index
        noise = self.noises[step] if step < len(self.noises) else None
        return super().step(model_output, timestep, sample, noise=noise, return_dict=return_dict)


@pytest.mark.parametrize(
    "name, kind, steps, guided",
    [
        ("repa_c10", "ode", 10, False),
        ("repa_c10", "heun", 6, False),
        ("repa_c10", "sde", 10, False),
        ("repa_c1000", "ode", 10, False),
        ("repa_c1000", "ode", 10, True),
        ("repa_c1000", "heun", 6, False),
        ("repa_c1000", "sde", 10, True),
    ],
)
def test_samples_match_the_official_samplers(shared, name, kind, steps, guided):
    aligned, golden = load_golden(shared, name)
    kinds = {"ode": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler, "sde": GivenNoises}
    pipeline = quiet_pipeline(aligned.transformer, kinds[kind]())
    pipeline.scheduler.noises = golden["sde_noises"]
    images = pipeline(
        golden["sampler_labels"],
        latents=golden["sampler_latents"],
        num_inference_steps=steps,
        guidance_scale=1.8 if guided else 1.0,
        guidance_interval=(0.0, 0.7),
        output_type="latent",
    ).images
    expected = golden[f"sample_{kind}_{steps}" + ("_cfg1.8_interval0_0.7" if guided else "")]
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_three_guided_channels_match_the_official_code(shared):
    aligned, golden = load_golden(shared, "sit_learn_sigma")
    model = aligned.transformer
    # t = 0 is noise there, and the velocity is x0 - noise.
    model.register_to_config(time_direction="noise_to_data")
    pipeline = quiet_pipeline(model, FlowMatchEulerDiscreteScheduler())
    for i in range(3):
        x, t, label = golden["x_t"][i : i + 1], 1 - golden["t"][i], golden["labels"][i : i + 1]
        v = pipeline.predict(x, t, label, guidance_scale=1.5, guidance_channels=3)
        torch.testing.assert_close(-v, golden["velocity_cfg1.5_three_channels"][i : i + 1], atol=1e-4, rtol=0)


def test_ids_and_names():
    pipeline = make_pipeline()
    assert pipeline.get_label_ids("goldfish") == [0]
    assert pipeline.get_label_ids(["Carassius Auratus", 3, "tench"]) == [0, 3, 3]
    assert pipeline.get_label_ids("goldfish, Carassius auratus") == [0]
    assert pipeline.get_label_ids(torch.tensor([4, 1])) == [4, 1]
    assert pipeline.get_label_ids(np.int64(2)) == [2]


@pytest.mark.parametrize(
    "labels, message",
    [
        ("goldfsh", "no class is named 'goldfsh'; did you mean 'goldfish'"),
        ("xyzzy", "pipeline.labels"),
        ("crane", r"'crane' names the classes \[1, 2\]"),
        (5, "5 is not a class; this model has 5, ids 0 ... 4"),
        (-1, "-1 is not a class"),
        ([0, 1.5], "1.5 is not a class"),
        (True, "True is not a class"),
        (3.5, "3.5 is not a class"),
        ([], "empty"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().get_label_ids(labels)


def test_names_that_differ_in_case():
    pipeline = make_pipeline(names={0: "Cardigan, corgi", 1: "cardigan", 2: "corgi", 3: "Pug"})
    assert pipeline.get_label_ids(["Cardigan, corgi", "cardigan", "corgi", "pug", "PUG"]) == [0, 1, 2, 3, 3]


def test_names_without_names():
    with pytest.raises(ValueError, match="no class names; use ids 0 ... 4"):
        make_pipeline(names=None)("cat")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"guidance_interval": (0.5, 1.2)}, "guidance_interval"),
        ({"guidance_channels": 0}, "`guidance_channels` must be in 1 ... 3, not 0"),
        ({"guidance_channels": 4}, "`guidance_channels` must be in 1 ... 3, not 4"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"latents": torch.zeros(3, 3, 8, 8)}, "latents.*2, 3, 8, 8"),
        ({"generator": [torch.Generator()] * 3}, "list of 3, but 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["sigmas"]}, "sigmas"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(), **arguments)


def test_output_types():
    pipeline = make_pipeline()
    assert sample(pipeline, output_type="pil")[0].size == (8, 8)
    array = sample(pipeline, output_type="np")
    assert array.shape == (2, 8, 8, 3) and array.min() >= 0 and array.max() <= 1
    tensor = sample(pipeline, output_type="pt")
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    latent = sample(pipeline, output_type="latent")
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), tensor)
    assert isinstance(pipeline(0, num_inference_steps=1, output_type="latent", return_dict=False), tuple)


def test_generators_and_latents_fix_the_images():
    pipeline = make_pipeline()
    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    both = sample(pipeline, generator=generators)
    second = sample(pipeline, labels=(3,), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(both[1:], second)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(pipeline), sample(pipeline, latents=noise))


def test_images_of_one_label_stand_together():
    noise = torch.randn(4, 3, 8, 8)
    pipeline = make_pipeline()
    together = sample(pipeline, (0, 3), num_images_per_label=2, latents=noise)
    apart = sample(pipeline, (0, 0, 3, 3), latents=noise)
    assert torch.equal(together, apart)


def test_guidance_is_the_formula_and_the_null_half_is_skipped_outside_the_interval():
    pipeline = make_pipeline()
    batch_sizes = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    x = torch.randn(1, 3, 8, 8)
    one_step = {"num_inference_steps": 1, "latents": x}
    v_class = x - sample(pipeline, (3,), guidance_scale=1.0, **one_step)
    guided = x - sample(pipeline, (3,), guidance_scale=2.5, **one_step)
    null = torch.tensor([pipeline.transformer.null_class_id])
    with torch.no_grad():
        v_null = pipeline.transformer(x, torch.ones(1), null).sample
    torch.testing.assert_close(guided, v_null + 2.5 * (v_class - v_null), atol=1e-5, rtol=1e-5)
    batch_sizes.clear()
    sample(pipeline, (3,), num_inference_steps=10, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    assert batch_sizes == [1, 1, 1, 2, 2, 2, 2, 2, 1, 1]


def test_guidance_channels():
    x = torch.randn(1, 3, 8, 8)
    arguments = {"num_inference_steps": 1, "latents": x, "guidance_scale": 3.0}
    pipeline = make_pipeline()
    every, of_class = sample(pipeline, (3,), **arguments), sample(pipeline, (3,), **{**arguments, "guidance_scale": 1})
    two = torch.cat([every[:, :2], of_class[:, 2:]], dim=1)
    assert not torch.allclose(every[:, 2:], of_class[:, 2:], atol=1e-3)
    torch.testing.assert_close(sample(pipeline, (3,), guidance_channels=2, **arguments), two)
    # Not given, the transformer's config decides.
    torch.testing.assert_close(sample(make_pipeline(guidance_channels=2), (3,), **arguments), two)
    torch.testing.assert_close(
        sample(make_pipeline(guidance_channels=2), (3,), guidance_channels=3, **arguments), every
    )


def times_seen(pipeline) -> list[float]:
    """A list that fills with the times that the transformer is called with."""
    times = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: times.append(float(args[1])))
    return times


@pytest.mark.parametrize("shift, grid", [(1.0, [1, 0.75, 0.5, 0.25]), (3.0, [1, 0.9, 0.75, 0.5])])
def test_euler_and_heun_run_on_the_official_grid(shift, grid):
    pipeline = make_pipeline()
    times = times_seen(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sample(pipeline, num_inference_steps=4)
    assert times == pytest.approx(grid)
    times.clear()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    sample(pipeline, num_inference_steps=4)
    assert times == pytest.approx([grid[0]] + [t for t in grid[1:] for _ in range(2)])
    # One step of Heun is its last, which is Euler's.
    one = sample(pipeline, num_inference_steps=1)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(one, sample(pipeline, num_inference_steps=1))


def test_both_halves_of_a_step_of_heun_are_guided_or_neither():
    pipeline = make_pipeline()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    batch_sizes = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    sample(pipeline, (3,), num_inference_steps=5, guidance_interval=(0.3, 0.7))
    # From t = 1, 0.8, 0.6, 0.4 and 0.2.
    assert batch_sizes == [1, 1] + [1, 1] + [2, 2] + [2, 2] + [1]


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_flow_solvers(kind):
    pipeline = quiet_pipeline(exact_gaussian(), kind(**FLOW_SIGMAS))
    times = times_seen(pipeline)
    assert max(moment_errors(pipeline, 50)) < 0.01
    # The timesteps are rounded down to integers, the times must not be.
    assert times == pipeline.scheduler.sigmas[:-1].tolist()
    assert times != (pipeline.scheduler.timesteps / 1000).tolist()
    # Nor is a step skipped where that makes the first two the same.
    pipeline.scheduler = kind(flow_shift=10.0, **FLOW_SIGMAS)
    times.clear()
    sample(pipeline, (0,), guidance_scale=1, num_inference_steps=250)
    assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
    assert pipeline.scheduler.step_index == len(times) == 250


def test_a_model_with_the_other_direction_of_time_gives_the_same_images():
    class Flipped(SiTTransformer2DModel):
        def forward(self, hidden_states, timestep, class_labels, return_dict=True):
            return (-super().forward(hidden_states, 1 - timestep, class_labels).sample,)

    pipeline = make_pipeline()
    flipped = Flipped(**{**TINY, "in_channels": 3, "time_direction": "noise_to_data"}).eval()
    flipped.load_state_dict(pipeline.transformer.state_dict())
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), SiTSDEScheduler()):
        pipeline.scheduler = scheduler
        images = sample(quiet_pipeline(flipped, scheduler), guidance_scale=2.0)
        torch.testing.assert_close(images, sample(pipeline, guidance_scale=2.0), atol=1e-4, rtol=1e-4)


def epsilon_pipeline(scheduler, **changes) -> VRPOPipeline:
    model = tiny_model(**{"in_channels": 3, "prediction_type": "epsilon", "learn_sigma": True, **changes})
    return quiet_pipeline(model, scheduler)


def ddpm_loop(pipeline, x, labels, w, next_sample):
    """x_n to x_0 along the scheduler's timesteps, by guided noise and the class's variance, with DDPM's abar."""
    alpha_bar = ALPHA_BAR.double()
    timesteps = pipeline.scheduler.timesteps.tolist()
    null = torch.full_like(labels, pipeline.transformer.null_class_id)
    for n, previous in zip(timesteps, timesteps[1:] + [None]):
        of_class, of_null = (
            pipeline.transformer(x, torch.tensor(n), y, return_variance=True).sample for y in (labels, null)
        )
        epsilon = of_null[:, :3] + w * (of_class[:, :3] - of_null[:, :3])
        a, b = alpha_bar[n], torch.tensor(1.0) if previous is None else alpha_bar[previous]
        x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        x = next_sample(x, x0, epsilon, of_class[:, 3:], a, b).float()
    return x


@torch.no_grad()
def test_ddim_is_its_formula():
    pipeline = epsilon_pipeline(DDIMScheduler(**ddpm.SCHEDULER_CONFIG))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    images = sample(pipeline, num_inference_steps=5, latents=x, guidance_scale=2.0)

    def next_sample(x, x0, epsilon, variance, a, b):
        return b.sqrt() * x0 + (1 - b).sqrt() * epsilon

    torch.testing.assert_close(images, ddpm_loop(pipeline, x, labels, 2.0, next_sample), atol=1e-4, rtol=1e-4)


def test_ddim_warns_of_steps_that_miss_its_timesteps(caplog):
    pipeline = epsilon_pipeline(DDIMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="trailing"))
    for steps, warns in ((100, False), (128, True)):
        pipeline.prepare_times(steps, "cpu")
        assert ("a divisor of 1000 is exact" in caplog.text) == warns


@torch.no_grad()
def test_ddpm_uses_the_learned_variance_of_the_class():
    pipeline = epsilon_pipeline(DDPMScheduler(variance_type="learned_range", **ddpm.SCHEDULER_CONFIG))
    images = sample(pipeline, num_inference_steps=5, guidance_scale=2.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 8, 8, generator=generator)

    def next_sample(x, x0, epsilon, variance, a, b):
        beta = 1 - a / b
        mean = b.sqrt() * beta / (1 - a) * x0 + (a / b).sqrt() * (1 - b) / (1 - a) * x
        if b == 1:
            return mean
        log_variance = (variance + 1) / 2 * beta.log() + (1 - variance) / 2 * ((1 - b) / (1 - a) * beta).log()
        return mean + (log_variance / 2).exp() * torch.randn(x.shape, generator=generator)

    expected = ddpm_loop(pipeline, start, torch.tensor([0, 3]), 2.0, next_sample)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)
    # With a fixed variance the same transformer gives its noise only.
    pipeline.scheduler = DDPMScheduler(**ddpm.SCHEDULER_CONFIG)
    assert not torch.allclose(sample(pipeline, num_inference_steps=5, guidance_scale=2.0), expected, atol=1e-2)


@pytest.mark.parametrize(
    "scheduler, steps",
    [
        pytest.param(DDIMScheduler(**ddpm.SCHEDULER_CONFIG), 250, marks=pytest.mark.slow),
        (DPMSolverMultistepScheduler(), 50),
        # Scales the start by 157 and the transformer's input at every step.
        (EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"), 250),
    ],
)
def test_the_exact_noise_of_a_gaussian_gives_its_moments(scheduler, steps):
    assert max(moment_errors(quiet_pipeline(exact_gaussian(prediction_type="epsilon"), scheduler), steps)) < 0.02


def test_the_guidance_interval_of_ddpm_timesteps_is_in_flow_time():
    pipeline = epsilon_pipeline(DDIMScheduler(**ddpm.SCHEDULER_CONFIG))
    batch_sizes = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    sample(pipeline, (3,), num_inference_steps=10, guidance_interval=(0.3, 0.7))
    t = ddpm.flow_time(pipeline.scheduler.timesteps)
    assert batch_sizes == [2 if 0.3 <= value <= 0.7 else 1 for value in t]
    # They are other steps than by n / 1000.
    assert batch_sizes != [2 if 300 <= n <= 700 else 1 for n in pipeline.scheduler.timesteps]


@pytest.mark.parametrize(
    "changes, scheduler",
    [
        ({}, SiTSDEScheduler()),
        ({"prediction_type": "epsilon"}, DDPMScheduler(**ddpm.SCHEDULER_CONFIG)),
        ({"prediction_type": "epsilon"}, DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")),
    ],
)
def test_generators_fix_the_noise_of_every_step(changes, scheduler):
    pipeline = make_pipeline(**changes)
    pipeline.scheduler = scheduler
    assert torch.equal(sample(pipeline), sample(pipeline))
    noise = torch.randn(2, 3, 8, 8)
    one, other = (sample(pipeline, latents=noise, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.allclose(one, other, atol=1e-2)
    # One generator per image: the same image alone and in a batch.
    both = sample(pipeline, generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)])
    alone = sample(pipeline, labels=(3,), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="list of 3, but 2 images"):
        sample(pipeline, latents=noise, generator=[torch.Generator()] * 3)


@pytest.mark.parametrize(
    "changes, scheduler, message",
    [
        ({}, DDIMScheduler(), "predicts velocities, which this DDIMScheduler .*; use FlowMatchEuler"),
        ({}, EDMEulerScheduler(), "velocities, which this EDMEuler"),
        ({}, DPMSolverMultistepScheduler(), "velocities, which this DPMSolver.*use_flow_sigmas=True"),
        ({}, DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        ({"prediction_type": "epsilon"}, SiTSDEScheduler(), "predicts noise, which this SiTSDE.*; use DDPMScheduler"),
        ({"prediction_type": "epsilon"}, UniPCMultistepScheduler(**FLOW_SIGMAS), "noise, which this UniPC"),
        ({"prediction_type": "epsilon"}, EDMEulerScheduler(), "noise, which this EDMEuler"),
        ({"prediction_type": "epsilon"}, DDIMScheduler(prediction_type="v_prediction"), "noise, which this DDIM"),
        (
            {"prediction_type": "epsilon"},
            DDPMScheduler(variance_type="learned_range"),
            "a transformer with learn_sigma; build this DDPMScheduler with variance_type='fixed_small'",
        ),
        (
            {"prediction_type": "epsilon", "learn_sigma": True},
            DPMSolverMultistepScheduler(variance_type="learned_range"),
            "needs a DDPMScheduler.*; build this DPMSolverMultistepScheduler with variance_type=None",
        ),
    ],
)
def test_a_scheduler_of_the_wrong_kind(changes, scheduler, message):
    pipeline = make_pipeline(**changes)
    pipeline.scheduler = scheduler
    calls = times_seen(pipeline)
    with pytest.raises(ValueError, match=message):
        sample(pipeline)
    assert not calls


def test_a_converted_scheduler_is_judged_by_its_own_options():
    # `from_config` keeps what the old one had and the new one has not.
    pipeline = epsilon_pipeline(DDPMScheduler(variance_type="learned_range", **ddpm.SCHEDULER_CONFIG))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert sample(pipeline).shape == (2, 3, 8, 8)
    pipeline = make_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(DPMSolverMultistepScheduler(**FLOW_SIGMAS).config)
    times = times_seen(pipeline)
    sample(pipeline, num_inference_steps=2)
    assert times == [1.0, 0.5]


def test_without_a_null_class_there_is_no_guidance():
    pipeline = make_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="needs a null class.*pass guidance_scale=1"):
        sample(pipeline, guidance_scale=1.5)
    assert sample(pipeline, guidance_scale=1).shape == (2, 3, 8, 8)


def test_caching_keeps_guided_and_unguided_steps_apart():
    pipeline = make_pipeline()
    arguments = {"num_inference_steps": 8, "guidance_interval": (0.3, 0.7)}
    exact = sample(pipeline, **arguments)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(pipeline, **arguments), exact)
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    runs = []
    pipeline.transformer.transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    cached = sample(pipeline, **arguments)
    # Computed at the first step of each kind only.
    assert len(runs) == 2 and not torch.allclose(cached, exact, atol=1e-3)
    assert torch.equal(sample(pipeline, **arguments), cached)


def test_callback_sees_and_replaces_latents():
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, float(timestep)))
        return {"latents": tensors["latents"] * 0}

    images = sample(make_pipeline(), callback_on_step_end=callback)
    assert [step for step, _ in steps] == [0, 1, 2]
    assert steps[0][1] == pytest.approx(1000)
    assert torch.equal(images, torch.zeros_like(images))


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_save_and_load_with_an_autoencoder(tmp_path, kind):
    vae = tiny_vae(kind).eval()
    channels, size = {"kl": (4, 8), "tiny": (4, 8), "dc": (4, 8)}[kind]
    pipeline = make_pipeline(vae, in_channels=channels, sample_size=size)
    images = sample(pipeline, ("goldfish",), output_type="pt")
    pipeline.save_pretrained(tmp_path)
    loaded = VRPOPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipeline.labels
    assert torch.equal(sample(loaded, ("goldfish",), output_type="pt"), images)
    # Latents are unscaled before decoding.
    latents = sample(pipeline, ("goldfish",))
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        decoded = vae.decode(latents / scale + shift).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images)


def test_save_and_load_without_an_autoencoder(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = VRPOPipeline.from_pretrained(tmp_path).to(torch.bfloat16)
    assert loaded.vae is None and loaded.transformer.dtype == torch.bfloat16
    loaded.set_progress_bar_config(disable=True)
    exact = sample(pipeline)
    low = sample(loaded.to("cpu"))
    assert low.dtype == torch.float32
    assert (low - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()
    loaded.to(dtype=torch.float32)
    assert loaded.transformer.dtype == torch.float32
    components = VRPOPipeline(**pipeline.components, id2label=NAMES)
    assert isinstance(components, DiffusionPipeline)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
def test_cpu_offload():
    pipeline = make_pipeline()
    pipeline.enable_model_cpu_offload()
    assert sample(pipeline, generator=None).shape == (2, 3, 8, 8)


def test_the_custom_pipeline_file_is_the_packages():
    packaged = (ROOT / "src" / "diffusers_vrpo" / "pipelines" / "pipeline_vrpo.py").read_bytes()
    assert (ROOT / "pipelines" / "vrpo.py").read_bytes() == packaged


def test_latents_without_an_autoencoder_are_no_images():
    pipeline = make_pipeline(in_channels=4)
    assert sample(pipeline).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="`output_type` 'pil' needs the autoencoder of these 4-channel latents"):
        sample(pipeline, output_type="pil")


def test_clipped_latents_are_refused():
    pipeline = make_pipeline(in_channels=4, prediction_type="epsilon")
    pipeline.scheduler = DDIMScheduler(beta_schedule="linear")
    with pytest.raises(
        ValueError, match="clip_sample=True cuts latents off; build this DDIMScheduler with clip_sample=F"
    ):
        sample(pipeline)
    pipeline = make_pipeline(prediction_type="epsilon")  # pixels may be clipped
    pipeline.scheduler = DDIMScheduler(beta_schedule="linear")
    assert sample(pipeline).abs().max() <= 1


def test_class_names_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="`id2label` names class 5, but the transformer has ids 0 ... 4"):
        make_pipeline(names={5: "zebra"})
