# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What users of diffusers try on a pipeline: it works as they know it, or one sentence says what would."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.models.transformer_sit import SiTAttnProcessor
from diffusers_vrpo.pipelines.scheduling_sit_sde import SiTSDEScheduler
from support.models import tiny_model, tiny_vae
from support.pipelines import FLOW_SIGMAS, NAMES, quiet_pipeline, sample


def make_pipeline(vae=None, scheduler=None, **changes) -> VRPOPipeline:
    pipeline = VRPOPipeline(
        tiny_model(**{"in_channels": 3, **changes}), scheduler or FlowMatchEulerDiscreteScheduler(), vae, NAMES
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latent_pipeline(kind="kl") -> VRPOPipeline:
    return make_pipeline(tiny_vae(kind).eval(), in_channels=4, sample_size=8)


def epsilon_pipeline(scheduler) -> VRPOPipeline:
    return make_pipeline(scheduler=scheduler, prediction_type="epsilon")


def times_seen(pipeline) -> list[float]:
    """A list that fills with the times that the transformer is called with."""
    times = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: times.append(float(args[1])))
    return times


# ----------------------------------------------------------------------------------------------------------------------
# Callbacks


def test_a_callback_interrupts():
    pipeline, steps = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    halfway = []
    sample(
        pipeline,
        num_inference_steps=6,
        callback_on_step_end=lambda pipe, step, t, tensors: halfway.append(tensors["latents"]),
    )
    images = sample(pipeline, num_inference_steps=6, callback_on_step_end=callback)
    assert steps == [0, 1] and pipeline.interrupt
    assert torch.equal(images, halfway[1])
    # The next call starts afresh.
    sample(pipeline)
    assert not pipeline.interrupt


def test_a_callback_changes_guidance():
    pipeline, batch_sizes = make_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))

    def turn_off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
        return tensors

    sample(pipeline, (3,), num_inference_steps=4, guidance_scale=2.0, callback_on_step_end=turn_off)
    assert batch_sizes == [2, 2, 1, 1] and pipeline.guidance_scale == 1.0
    # The interval holds for changed guidance too.
    batch_sizes.clear()

    def turn_on(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    sample(
        pipeline,
        (3,),
        num_inference_steps=4,
        guidance_scale=1.0,
        guidance_interval=(0.4, 1),
        callback_on_step_end=turn_on,
    )
    assert batch_sizes == [1, 2, 2, 1]


@pytest.mark.parametrize("scale", [math.nan, -1.0, "a"])
def test_a_callback_that_sets_nonsense(scale):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = scale

    with pytest.raises(ValueError, match="`guidance_scale` must be"):
        sample(make_pipeline(), callback_on_step_end=callback)


def test_a_callback_knows_the_time_in_the_units_of_the_guidance_interval():
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert pipe.current_timestep == timestep
        seen.append((float(timestep), pipe.current_flow_time))

    pipeline = make_pipeline()
    sample(pipeline, num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [pytest.approx((1000 * t, t)) for t in (1, 0.75, 0.5, 0.25)]
    assert pipeline.current_flow_time is None and pipeline.num_timesteps == 4
    seen.clear()
    pipeline = epsilon_pipeline(DDIMScheduler(**ddpm.SCHEDULER_CONFIG))
    sample(pipeline, num_inference_steps=4, callback_on_step_end=callback)
    assert [t for _, t in seen] == pytest.approx(
        [float(ddpm.flow_time(torch.tensor(int(n)))) for n, _ in seen], rel=1e-3
    )


@pytest.mark.parametrize(
    "returned, message",
    [
        (5, "returned a int; it must return a dict"),
        ([torch.zeros(1)], "returned a list"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents that are \(1, 3, 8, 8\); .* \(2, 3, 8, 8\) is expected"),
        ({"latents": None}, "latents that are NoneType"),
    ],
)
def test_a_callback_that_returns_something_else(returned, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(), callback_on_step_end=lambda *_: returned)


def test_a_callback_may_return_nothing_or_other_dtypes():
    pipeline = make_pipeline()
    assert torch.equal(sample(pipeline, callback_on_step_end=lambda *_: None), sample(pipeline))
    half = sample(
        pipeline,
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"].half()},
        callback_on_step_end_tensor_inputs=["latents"],
    )
    assert half.dtype == torch.float32


def test_callbacks_of_diffusers():
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    twice = MultiPipelineCallbacks([Halve(), Halve()])
    quarter = sample(make_pipeline(), num_inference_steps=1, callback_on_step_end=twice)
    torch.testing.assert_close(quarter, sample(make_pipeline(), num_inference_steps=1) / 4)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_of_a_flow(kind, shift):
    pipeline = make_pipeline(scheduler=kind(shift=shift))
    expected = sample(pipeline, num_inference_steps=4)
    assert torch.equal(sample(pipeline, sigmas=[1.0, 0.75, 0.5, 0.25]), expected)
    assert torch.equal(sample(pipeline, timesteps=[1000, 750, 500, 250]), expected)
    times = times_seen(pipeline)
    sample(pipeline, sigmas=np.array([1.0, 0.4]), guidance_scale=1.0)
    shifted = shift * 0.4 / (1 + (shift - 1) * 0.4)
    assert sorted(set(times)) == pytest.approx([shifted, 1.0])


def test_sigmas_of_unipc():
    pipeline = make_pipeline(scheduler=UniPCMultistepScheduler(**FLOW_SIGMAS))
    times = times_seen(pipeline)
    sample(pipeline, sigmas=[1.0, 0.6, 0.1])
    assert times == pytest.approx([1.0, 0.6, 0.1], abs=1e-5)


def test_timesteps_of_a_diffusion():
    for scheduler in (DDPMScheduler(**ddpm.SCHEDULER_CONFIG), DPMSolverMultistepScheduler()):
        pipeline = epsilon_pipeline(scheduler)
        times = times_seen(pipeline)
        assert sample(pipeline, timesteps=torch.tensor([999, 500, 20])).isfinite().all()
        assert times == [999, 500, 20]
    pipeline = epsilon_pipeline(EulerDiscreteScheduler())
    assert sample(pipeline, sigmas=[10.0, 3.0, 0.5]).isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigmas": [1.0], "timesteps": [999]}, "`timesteps` and `sigmas` cannot be combined"),
        ({"sigmas": []}, "`sigmas` must be a list"),
        ({"sigmas": 0.5}, "`sigmas` must be a list of falling numbers, not 0.5"),
        ({"sigmas": ["a"]}, "`sigmas` must be a finite number, not 'a'"),
        ({"sigmas": [1.0, math.nan]}, "`sigmas` must be a finite number"),
        ({"sigmas": [0.5, 1.0]}, "`sigmas` must fall"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "`sigmas` must fall"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "the last step goes on to 0 by itself"),
        ({"sigmas": [14.6, 1.0]}, "up to 1 for a flow"),
        ({"timesteps": [1001]}, "`timesteps` must lie above 0 and up to 1000 for a flow"),
    ],
)
def test_wrong_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(), **arguments)


@pytest.mark.parametrize(
    "scheduler, name, message",
    [
        (SiTSDEScheduler(), "sigmas", "this SiTSDEScheduler has a schedule of its own; pass `num_inference_steps`"),
        (DPMSolverMultistepScheduler(**FLOW_SIGMAS), "timesteps", "FlowMatchEulerDiscreteScheduler, .* take one"),
    ],
)
def test_schedulers_without_custom_schedules(scheduler, name, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(scheduler=scheduler), **{name: [1.0, 0.5]})


@pytest.mark.parametrize(
    "scheduler, arguments, message",
    [
        (DDIMScheduler(**ddpm.SCHEDULER_CONFIG), {"timesteps": [999, 1]}, "DDPMScheduler and DPMSolver.* `timesteps`"),
        (DDPMScheduler(), {"sigmas": [1.0]}, "`sigmas`: this DDPMScheduler has a schedule of its own"),
        (DDPMScheduler(), {"timesteps": [1000, 1]}, r"integers of 0 \.\.\. 999"),
        (DDPMScheduler(), {"timesteps": [99.5]}, r"integers of 0 \.\.\. 999"),
        (EulerDiscreteScheduler(), {"sigmas": [3.0, 0.0]}, "must lie above 0"),
        (UniPCMultistepScheduler(), {"sigmas": [3.0, 1.0]}, "use_flow_sigmas"),
    ],
)
def test_wrong_schedules_of_a_diffusion(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(epsilon_pipeline(scheduler), **arguments)


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler, SiTSDEScheduler]
)
def test_a_scheduler_made_from_the_config_of_another(kind):
    pipeline = make_pipeline()
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **FLOW_SIGMAS)
    assert sample(pipeline).isfinite().all()


@pytest.mark.parametrize(
    "pipeline, scheduler, message",
    [
        (make_pipeline, FlowMatchLCMScheduler(), "a FlowMatchLCMScheduler is for inversion, for distilled"),
        (make_pipeline, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "with use_dynamic_shifting=False"),
        (make_pipeline, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "with invert_sigmas=False"),
        (make_pipeline, DDIMScheduler, "`scheduler` must be a scheduler of diffusers, not a type; use FlowMatchEuler"),
        (lambda: epsilon_pipeline(DDPMScheduler()), LCMScheduler(), "a LCMScheduler is for .*; use DDPMScheduler"),
        (lambda: epsilon_pipeline(DDPMScheduler()), None, "not a NoneType; use DDPMScheduler"),
    ],
)
def test_schedulers_of_other_models(pipeline, scheduler, message):
    pipeline = pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        sample(pipeline)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def test_num_images_per_prompt_is_num_images_per_label():
    pipeline = make_pipeline()
    assert torch.equal(sample(pipeline, num_images_per_prompt=2), sample(pipeline, num_images_per_label=2))
    with pytest.raises(ValueError, match="`num_images_per_prompt` 3 is another name of `num_images_per_label`, which"):
        sample(pipeline, num_images_per_label=2, num_images_per_prompt=3)


@pytest.mark.parametrize("kind", [None, "kl", "tiny", "dc"])
def test_height_and_width(kind):
    pipeline = make_pipeline() if kind is None else latent_pipeline(kind)
    trained = sample(pipeline, (3,), output_type="pt")
    factor, patch = trained.shape[-1] // 8, pipeline.transformer.config.patch_size
    assert torch.equal(sample(pipeline, (3,), height=8 * factor, width=8 * factor, output_type="pt"), trained)
    wide = sample(pipeline, (3,), width=(8 + 2 * patch) * factor, output_type="pt")
    assert wide.shape == (1, 3, 8 * factor, (8 + 2 * patch) * factor)
    unit = factor * patch
    with pytest.raises(
        ValueError, match=f"`height` must be a multiple of {unit} .*, not {unit + 1}; {unit} or {2 * unit} would"
    ):
        sample(pipeline, height=unit + 1)


@pytest.mark.parametrize("value", [0, -8, 8.0, "8", True, math.nan, math.inf])
def test_wrong_sizes(value):
    with pytest.raises(ValueError, match="`width` must be a multiple of"):
        sample(make_pipeline(), width=value)


def test_height_and_latents_must_agree():
    with pytest.raises(ValueError, match=r"`latents` have shape \(2, 3, 8, 8\); \(2, 3, 16, 8\) is expected"):
        sample(make_pipeline(), latents=torch.randn(2, 3, 8, 8), height=16)
    assert sample(make_pipeline(), latents=torch.randn(2, 3, 16, 8), height=16).shape == (2, 3, 16, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(
            ({"num_inference_steps": value}, "`num_inference_steps` must be an integer")
            for value in (2.5, "3", None, True)
        ),
        *(({"num_images_per_label": value}, "`num_images_per_label` must be an integer") for value in (1.0, "2", -1)),
        *(({"num_images_per_prompt": value}, "must be an integer") for value in (1.5, 0)),
        *(
            ({"guidance_scale": value}, "`guidance_scale` must be a finite number")
            for value in ("a", 10**400, math.nan, math.inf, -math.inf, None, [1.5, 2.0], True, 1j, torch.ones(2))
        ),
        ({"guidance_scale": -0.5}, "`guidance_scale` must be at least 0, not -0.5"),
        *(
            ({"guidance_interval": value}, "`guidance_interval` must be")
            for value in (0.5, None, (0.1,), (0, 0.5, 1), ("a", "b"), (math.nan, 1.0), (0.7, 0.1), "01")
        ),
        *(({"guidance_channels": value}, "`guidance_channels` must be in 1") for value in (1.5, "all", True)),
        *(
            ({"generator": value}, "`generator` must be a torch.Generator or a list of them.*manual_seed")
            for value in (5, "seed", [1, 2], [None, None], [torch.Generator(), 3], np.random.default_rng(0))
        ),
        ({"generator": []}, "list of 0, but 2 images"),
        *(
            ({"latents": value}, "`latents` must be a tensor of floating-point numbers")
            for value in (
                np.zeros((2, 3, 8, 8)),
                5,
                [[0.0]],
                torch.zeros(2, 3, 8, 8, dtype=torch.long),
                torch.zeros(2, 3, 8, 8, dtype=torch.complex64),
            )
        ),
        ({"latents": torch.zeros(3, 8, 8)}, r"`latents` have shape \(3, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"`latents` have shape \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 3, 7, 8)}, "must be multiples of the patch size 2"),
        ({"latents": torch.full((2, 3, 8, 8), math.nan)}, "`latents` have values that are not finite"),
        ({"latents": torch.full((2, 3, 8, 8), math.inf)}, "`latents` have values that are not finite"),
        *(({"output_type": value}, "`output_type` must be") for value in (None, "jpg", 1)),
        *(({"callback_on_step_end": value}, "`callback_on_step_end` must be a function") for value in (5, [print])),
        *(
            ({"callback_on_step_end_tensor_inputs": value}, "`callback_on_step_end_tensor_inputs`")
            for value in ("latents", None, ["prompt_embeds"], 3)
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    pipeline = make_pipeline()
    calls = times_seen(pipeline)
    with pytest.raises(ValueError, match=message):
        sample(pipeline, **arguments)
    assert not calls


@pytest.mark.parametrize(
    "labels",
    [None, 1.0, torch.tensor([0.5]), torch.tensor([True]), {0: 1}, [[0, 1]], [None], object(), math.nan, 10**30],
)
def test_wrong_labels_are_named(labels):
    with pytest.raises(ValueError, match="`class_labels`.* is not a class; this model has 5, ids 0 ... 4"):
        make_pipeline()(labels)


def test_arguments_of_other_number_types():
    pipeline = make_pipeline()
    expected = sample(pipeline, guidance_scale=2.0)
    for scale in (2, np.float32(2), torch.tensor(2.0)):
        assert torch.equal(sample(pipeline, guidance_scale=scale), expected)
    generators = (
        [torch.Generator().manual_seed(i) for i in range(2)],
        [torch.Generator().manual_seed(i) for i in (0, 1)],
    )
    assert torch.equal(
        sample(pipeline, generator=generators[0]), sample(pipeline, np.int64([0, 3]), generator=tuple(generators[1]))
    )
    images = pipeline(range(3), num_inference_steps=np.int64(1), num_images_per_label=np.int64(2)).images
    assert len(images) == 6
    interval = (0.3, 0.7)
    assert torch.equal(
        sample(pipeline, guidance_interval=np.array(interval)), sample(pipeline, guidance_interval=interval)
    )
    # Guidance with 0 leaves the null class.
    assert torch.equal(
        sample(pipeline, (0,), guidance_scale=0, num_inference_steps=1),
        sample(pipeline, (3,), guidance_scale=0, num_inference_steps=1),
    )


@pytest.mark.parametrize("names", [["cat"], {"a": "cat"}, {0: 5}, {0: None}, {1.5: "cat"}, "cat"])
def test_wrong_names(names):
    with pytest.raises(ValueError, match="`id2label` must"):
        VRPOPipeline(tiny_model(in_channels=3), FlowMatchEulerDiscreteScheduler(), id2label=names)


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines and their components


def test_from_pipe(tmp_path):
    pipeline = latent_pipeline()
    again = VRPOPipeline.from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert again.transformer is pipeline.transformer and again.vae is pipeline.vae and again.labels == pipeline.labels
    assert torch.equal(sample(again), sample(pipeline))
    pixels = VRPOPipeline.from_pipe(make_pipeline(), scheduler=SiTSDEScheduler(), id2label={0: "cat"})
    assert pixels.vae is None and isinstance(pixels.scheduler, SiTSDEScheduler) and pixels.labels == {"cat": [0]}

    class Mine(VRPOPipeline):
        pass

    mine = Mine.from_pipe(pipeline)
    assert type(mine) is Mine and VRPOPipeline.from_pipe(mine).vae is pipeline.vae
    mine.save_pretrained(tmp_path)
    assert Mine.from_pipe(Mine.from_pretrained(tmp_path)).labels == pipeline.labels


def test_from_a_pipeline_of_diffusers():
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    other = DiTPipeline(dit, tiny_vae("kl"), DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="`transformer` of this DiTPipeline is a DiTTransformer2DModel.*vrpo convert"):
        VRPOPipeline.from_pipe(other)
    transformer = tiny_model(in_channels=4, prediction_type="epsilon")
    pipeline = VRPOPipeline.from_pipe(other, transformer=transformer)
    assert pipeline.vae is other.vae and pipeline.scheduler is other.scheduler
    assert len(pipeline(0, num_inference_steps=1).images) == 1
    # And back, where the transformer is given.
    assert DiTPipeline.from_pipe(pipeline, transformer=dit).vae is other.vae
    with pytest.raises(ValueError, match="`transformer` must be a SiTTransformer2DModel, not a DiTTransformer2DModel"):
        VRPOPipeline(dit, other.scheduler)
    with pytest.raises(ValueError, match="`pipeline` must be a pipeline of diffusers, not a str"):
        VRPOPipeline.from_pipe("outputs/digits")


def test_opening_a_pipeline_warns_of_no_types(tmp_path, caplog):
    latent_pipeline().save_pretrained(tmp_path)
    VRPOPipeline.from_pretrained(tmp_path)
    assert "Expected types" not in caplog.text


def test_auto_model_opens_the_transformer(tmp_path, capfd):
    pixels, latents = make_pipeline(), latent_pipeline()
    pixels.save_pretrained(tmp_path / "pixels")
    latents.save_pretrained(tmp_path / "latents")
    for pipeline, *arguments in (
        (pixels, tmp_path / "pixels", "transformer"),
        (pixels, tmp_path / "pixels" / "transformer", None),
        (latents, tmp_path / "latents" / "transformer", None),
    ):
        model = AutoModel.from_pretrained(str(arguments[0]), subfolder=arguments[1], trust_remote_code=True)
        assert type(model).__name__ == "SiTTransformer2DModel" and type(model) is not SiTTransformer2DModel
        for name, weight in pipeline.transformer.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight)
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(str(arguments[0]), subfolder=arguments[1])
    # An autoencoder beside it still opens without any code.
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "latents"), subfolder="vae"), AutoencoderKL)
    # Neither the package nor diffusers complains about the entry.
    VRPOPipeline.from_pretrained(tmp_path / "pixels").save_pretrained(tmp_path / "again")
    DiffusionPipeline.from_pretrained(tmp_path / "pixels", trust_remote_code=True)
    own = SiTTransformer2DModel.from_pretrained(tmp_path / "pixels", subfolder="transformer")
    assert "auto_map" not in own.config and "auto_map" not in capfd.readouterr().err
    index = [(tmp_path / name / "model_index.json").read_text() for name in ("pixels", "again")]
    assert all('"AutoModel": "transformer_sit.SiTTransformer2DModel"' in text for text in index)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "40KB"}, {"safe_serialization": False}])
def test_save_options(tmp_path, options):
    pipeline = latent_pipeline()
    pipeline.save_pretrained(tmp_path, **options)
    opened = VRPOPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(sample(opened, output_type="pt"), sample(pipeline, output_type="pt"))


def test_a_pipeline_opened_without_its_transformer(tmp_path):
    latent_pipeline().save_pretrained(tmp_path)
    pipeline = VRPOPipeline.from_pretrained(tmp_path, transformer=None)
    assert isinstance(pipeline.vae, AutoencoderKL)
    with pytest.raises(ValueError, match="`transformer` is missing"):
        pipeline(0)


def test_slicing_and_tiling():
    pipeline = latent_pipeline()
    whole = sample(pipeline, output_type="pt")
    pipeline.enable_vae_slicing()
    pipeline.enable_vae_tiling()
    assert pipeline.vae.use_slicing and pipeline.vae.use_tiling
    torch.testing.assert_close(sample(pipeline, output_type="pt"), whole, atol=1e-5, rtol=1e-5)
    pipeline.disable_vae_slicing()
    pipeline.disable_vae_tiling()
    assert not pipeline.vae.use_slicing and not pipeline.vae.use_tiling
    for name in ("enable_vae_slicing", "disable_vae_tiling"):
        with pytest.raises(ValueError, match=f"`{name}`: this pipeline works on pixels"):
            getattr(make_pipeline(), name)()
    del pipeline.vae.use_tiling
    with pytest.raises(ValueError, match="`enable_vae_tiling`: a AutoencoderKL has no tiling"):
        pipeline.enable_vae_tiling()


def test_components_and_dtypes():
    pipeline = latent_pipeline()
    assert set(pipeline.components) == {"transformer", "scheduler", "vae"}
    assert isinstance(pipeline.components["vae"], AutoencoderKL)
    images = sample(pipeline, output_type="pt")
    half = sample(pipeline.to(torch.bfloat16), output_type="pt")
    assert half.dtype == torch.float32 and (half - images).abs().mean() < 0.1
    assert pipeline.to(dtype=torch.float32).dtype == torch.float32
    assert pipeline.model_cpu_offload_seq == "transformer->vae"


def test_offloaded_components():
    pytest.importorskip("accelerate")
    pipeline = latent_pipeline()
    images = [sample(pipeline, output_type="pt", height=height) for height in (None, 32)]
    pipeline.enable_model_cpu_offload(device="cpu")
    for expected, height in zip(images, (None, 32)):
        assert torch.equal(sample(pipeline, output_type="pt", height=height), expected)


def test_attention_processors_and_compiled_transformers():
    pipeline, calls = make_pipeline(), []
    expected = sample(pipeline)

    class Counting(SiTAttnProcessor):
        def __call__(self, attn, hidden_states):
            calls.append(1)
            return super().__call__(attn, hidden_states)

    pipeline.transformer.set_attn_processor(Counting())
    assert torch.equal(sample(pipeline), expected) and len(calls) == 3 * len(pipeline.transformer.transformer_blocks)
    with pytest.raises(ValueError, match="`processor` AttnProcessor2_0 is not for this attention; use a SiTAttnProc"):
        pipeline.transformer.set_attn_processor(AttnProcessor2_0())
    pipeline.transformer.set_attn_processor(SiTAttnProcessor())
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(sample(pipeline), expected)


def test_adapters_load_fuse_and_unload(tmp_path):
    pytest.importorskip("peft")
    pipeline = make_pipeline()
    plain = sample(pipeline)
    weights = {}
    for name in ("to_q", "to_v"):
        inner = getattr(pipeline.transformer.transformer_blocks[0].attn, name)
        weights[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] = torch.randn(2, inner.in_features)
        weights[f"transformer.transformer_blocks.0.attn.{name}.lora_B.weight"] = torch.randn(inner.out_features, 2)
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora_weights(str(tmp_path))
    adapted = sample(pipeline)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with pytest.raises(ValueError, match="`save_pretrained`: the transformer has LoRA adapters; call `fuse_lora"):
        pipeline.save_pretrained(tmp_path / "adapted")  # which nothing could open
    pipeline.fuse_lora()
    torch.testing.assert_close(sample(pipeline), adapted, atol=1e-4, rtol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(sample(pipeline), plain, atol=1e-5, rtol=1e-5)
    pipeline.load_lora_weights(str(tmp_path))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "merged")
    merged = VRPOPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(sample(merged), adapted, atol=1e-4, rtol=1e-4)


def test_a_pipeline_of_diffusers_loads_by_its_code_with_all_of_this(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again = type(pipeline).from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert sample(again, sigmas=[1.0, 0.5], height=16).shape == (2, 3, 16, 8)
    assert quiet_pipeline(again.transformer, again.scheduler)(0, num_inference_steps=1, return_dict=False)[0]
