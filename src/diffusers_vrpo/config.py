# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The options of training: dataclasses in which one field defines everything about an option.

A field has a type, a default and a help text. Its annotation may also say which values are allowed (`Literal`, [`In`]),
on which other options it depends ([`Needs`], [`OneOf`]), and what happens to it when a run is resumed ([`Resume`]; an
option without such a mark must keep its value). The command line, the settings of checkpoints and the model card are
derived from the fields. Each check across several options is a function at the end of the file.

This module imports neither torch nor transformers nor diffusers.
"""

import dataclasses
import enum
import functools
import json
import math
import numbers
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import InputError


# If neither max_train_steps nor num_train_epochs is given, a run sees DEFAULT_IMAGES_SEEN images (400,000 steps of 256, or
# 80 epochs of ImageNet), but passes over the data at most MOST_EPOCHS times.
DEFAULT_IMAGES_SEEN = 102_400_000
MOST_EPOCHS = 200
# If checkpointing_steps or validation_steps is not given, the run is divided into DEFAULT_INTERVALS intervals of at least
# SHORTEST_INTERVAL steps. Sample grids are then also drawn after the steps in EARLY_GRIDS.
DEFAULT_INTERVALS = 20
SHORTEST_INTERVAL = 100
EARLY_GRIDS = (1, 100, 500)
CHECKPOINTS_TO_KEEP = 3
DIGITS = "digits"  # the data set and the encoder in the package, unless there is a folder of that name
EMBEDDED_DIGITS = "embedded:digits"  # the same, even if there is a folder called `digits`
EMBEDDED_GRIDS = "embedded:digit-grids"  # the data set of grids of four of these digits
DTYPES = ("float32", "bfloat16", "float16")  # precisions of a model that is not trained


# ----------------------------------------------------------------------------------------------------------------------
# Annotations


@dataclass(frozen=True)
class In:
    """The range of a number: at least `low` (above it if `exclusive`), below `high` and at most `most`; never NaN.

    Args:
        why (`str`): the reason for the lower limit, for the error message.
    """

    low: float = -math.inf
    high: float = math.inf
    exclusive: bool = False
    why: str = ""
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.exclusive else self.low <= value
        return above and value < self.high and value <= self.most

    def __str__(self) -> str:
        if self.most < math.inf:
            reason = f": {self.why};" if self.why else ""
            return f"be {'above' if self.exclusive else 'at least'} {self.low}{reason} and at most {self.most}"
        if (self.low, self.high) == (-math.inf, math.inf):
            text = "be finite"
        elif self.high < math.inf:
            text = f"lie in {'(' if self.exclusive else '['}{self.low}, {self.high})"
        else:
            text = f"be above {self.low}" if self.exclusive else f"be at least {self.low}"
        return f"{text}: {self.why}" if self.why else text


@dataclass(frozen=True)
class Needs:
    """The option has an effect only if the option `name` has one of `values`, or is set at all if none are given."""

    name: str
    values: tuple = ()

    def met_by(self, value) -> bool:
        return value in self.values if self.values else value is not None and value is not False

    def __str__(self) -> str:
        values = [str(value) for value in self.values]
        listed = f"{', '.join(values[:-1])} or {values[-1]}" if len(values) > 1 else "".join(values)
        return f"`{self.name}` {listed}".rstrip()


@dataclass(frozen=True)
class OneOf:
    """At most one of the options with the same `group` can be given."""

    group: str


class Repeated:
    """The option is a list whose flag accepts one value and may be given several times."""


@dataclass(frozen=True)
class Switch:
    """The option is False (off), True (on, replaced by the text `on`), or a text that selects a variant."""

    on: str


class Resume(enum.Enum):
    """What happens to an option when a run is resumed; one without this mark must keep its value."""

    FREE = "may change"
    WATCHED = "may change: it is about how a run is watched and saved, not about what is trained"
    MACHINE = "may change: it is about a machine or an account, and model cards omit it"
    NAME = "must keep the last part of its name, since folders may have moved"
    DATA = "must keep its value unless `allow_changed_data` is given"
    DATA_NAME = "must keep the last part of its name unless `allow_changed_data` is given"
    RESOLVED = "is not compared itself; `run_settings` compares the values derived from it"


class Changeable:
    """A resumed run may change this option if `allow_changed` names it; the new value applies from then on."""


T = TypeVar("T")
Free = Annotated[T, Resume.FREE]
Watched = Annotated[T, Resume.WATCHED]
Machine = Annotated[T, Resume.MACHINE]
Name = Annotated[T, Resume.NAME]
Data = Annotated[T, Resume.DATA]
DataName = Annotated[T, Resume.DATA_NAME]
Resolved = Annotated[T, Resume.RESOLVED]

# The upper limits are far above what anybody has trained with, and below values that exhaust the memory at once or overflow.
NUM_STEPS = In(1, most=10**9)
NUM_IMAGES = In(1, most=10**9)
NUM_SAMPLES = In(1, most=10**7)
BATCH = In(1, most=65_536)
NUM_WORKERS = In(0, most=256)
RESOLUTION = In(1, most=8192)
SOLVER_STEPS = In(1, most=10_000)
GUIDANCE = In(0, most=1000)
LAYER = In(-1000, most=1000)
SEED = In(0, 2**63)
FINITE = In(exclusive=True)

Steps = Annotated[int, NUM_STEPS]
Step = Annotated[int, In(0, most=10**9)]
Images = Annotated[int, NUM_IMAGES]
Samples = Annotated[int, NUM_SAMPLES]
Batch = Annotated[int, BATCH]
SolverSteps = Annotated[int, SOLVER_STEPS]
Layer = Annotated[int, LAYER]
Thousands = Annotated[int, In(1, most=10_000)]
Coefficient = Annotated[float, In(0, most=10**9)]
Ratio = Annotated[float, In(0, most=10**9, exclusive=True)]
LearningRate = Annotated[float, In(0, most=10, exclusive=True)]
Share = Annotated[float, In(0, 1)]
Fraction = Annotated[float, In(0, exclusive=True, most=1)]

# The options that an objective sets if they are not given. UNLESS_THE_OBJECTIVE_SETS_IT has the values for all others.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "none": {},
    "repa": {},
    "irepa": {"projector": "conv", "spatial_norm": 0.6},
    "rare": {"target_norm": "whiten:128", "token_weighting": "residual", "release": "plateau"},
    "repi": {},
    "vrpo": {"alignment_coeff": 4.0},
}
UNLESS_THE_OBJECTIVE_SETS_IT: dict[str, Any] = {
    "alignment_coeff": 0.5,
    "timestep_weighting": "uniform",
    "projector": "mlp",
    "spatial_norm": 0.0,
    "target_norm": "none",
    "token_weighting": "uniform",
    "release": None,
    "reward_weighting": "auto",
}
REPA_LOSS = ("repa", "irepa", "rare")

ALIGNED = Needs("objective", (*REPA_LOSS, "vrpo"))
ENCODED = Needs("objective", (*REPA_LOSS, "repi", "vrpo"))
VRPO = Needs("objective", ("vrpo",))
SAMPLED = Needs("estimator", ("sampled",))
GENERATIVE = Needs("generative_policy_start_step")
ADAPTED = Needs("lora_rank")
ADAMW = Needs("optimizer", ("adamw", "adamw8bit", "torchao:adamw8bit", "torchao:adamw4bit", "torchao:adamwfp8"))
LOGIT_NORMAL = Needs("timestep_sampling", ("logit_normal",))
PUBLISHED = Needs("push_to_hub")
MEASURED = Needs("fd_encoder")


def set_by_objective(objective: str) -> dict[str, Any]:
    """The values, by name, of the options that depend on the objective and are not given."""
    return UNLESS_THE_OBJECTIVE_SETS_IT | OBJECTIVES[objective]


def option(default, help: str, metavar: str | None = None):
    """Declares a field of a configuration: its default, its help text and the placeholder for its value in the usage."""
    return field(default=default, metadata={"help": help} | ({"metavar": metavar} if metavar else {}))


@dataclass(frozen=True)
class Option:
    """An option, read from a field.

    Attributes:
        name (`str`): the name of the field; the flag is this name after two dashes.
        kind (`type`): `bool`, `int`, `float` or `str`; the type of the items if the value is a list.
        many (`bool`): whether the value is a list.
        optional (`bool`): whether None is allowed.
        choices (`tuple`, *optional*): the allowed values; None if they are not listed.
        marks (`tuple`): what else the annotation says, such as `In(0)`.
        default (`Any`): the default of the field.
        help (`str`): the help text.
        metavar (`str`, *optional*): the placeholder for the value in the usage; None for one that follows from `kind`.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    choices: tuple | None
    marks: tuple
    default: Any
    help: str
    metavar: str | None

    def marked(self, kind: type[T]) -> list[T]:
        """The marks that are instances of `kind`."""
        return [mark for mark in self.marks if isinstance(mark, kind)]

    @property
    def resume(self) -> Resume | None:
        """What happens to the option when a run is resumed; None if it must keep its value."""
        return next(iter(self.marked(Resume)), None)


def read_annotation(hint) -> tuple[type, bool, bool, tuple | None, tuple]:
    """`kind`, `many`, `optional`, `choices` and `marks` of an `Option`, from an annotation such as `Free[int | None]`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, many, optional, choices, marks = read_annotation(arguments[0])
        return kind, many, optional, choices, (*marks, *arguments[1:])
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 2 and bool in inner:  # a `Switch`, whose other value is text
            inner.remove(bool)
        kind, many, _, choices, marks = read_annotation(*inner)
        return kind, many, type(None) in arguments, choices, marks
    if origin is list:
        kind, _, _, choices, marks = read_annotation(arguments[0])
        return kind, True, False, choices, marks
    if origin is Literal:
        return type(arguments[0]), False, False, arguments, ()
    return hint, False, False, None, ()


@functools.cache
def options_of(config: type) -> dict[str, Option]:
    """The options of a configuration class by name, in order of declaration; for `VRPOConfig` group by group."""
    if config.__bases__ != (Options,):
        return {name: option for group in config.__bases__ for name, option in options_of(group).items()}
    hints = get_type_hints(config, include_extras=True)
    return {
        f.name: Option(
            f.name, *read_annotation(hints[f.name]), f.default, f.metadata["help"], f.metadata.get("metavar")
        )
        for f in dataclasses.fields(config)
    }


# ----------------------------------------------------------------------------------------------------------------------
# The options


@dataclass(kw_only=True)
class Options:
    """Base class of all configurations, which checks values on construction.

    Raises:
        InputError: if a value has the wrong type or is out of range.
    """

    def __post_init__(self):
        for each in options_of(type(self)).values():
            setattr(self, each.name, checked_value(each, getattr(self, each.name)))

    def to_dict(self) -> dict:
        """The options that are set, as plain values for JSON or YAML."""
        values = {name: getattr(self, name) for name in options_of(type(self)) if name != "config"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class RunConfig(Options):
    """Where a run writes, what it is seeded with, and in which precision it computes."""

    _argument_group_name: ClassVar[str] = "run"

    config: Machine[str | None] = option(
        None,
        "read options from a recipe of the package, such as `digits`, or from a YAML file with lines such as `seed: 0`; options "
        "on the command line override it",
        "NAME|FILE.yaml",
    )
    output_dir: Machine[str] = option(
        "vrpo-model",
        "write checkpoints, metrics, sample grids and the final pipeline to this folder; repeating the command resumes the run "
        "in it",
    )
    cache_dir: Machine[str | None] = option(None, "folder for downloads; the Hub's own cache if not given")
    seed: Annotated[int, SEED] = option(
        0,
        "seed of all random numbers: the starting weights, and the noise, crops and labels of each sample; change it to repeat a "
        "run with other random numbers",
    )
    random_streams: Resolved[Literal[1, 2] | None] = option(
        None,
        "version of the generator that draws the order, crops and noise of training samples: 2 is faster, above all with many images "
        "or tokens; 1 reproduces runs from before version 2 existed; if not given, 2 for a new run and the run's own version for "
        "a resumed one",
    )
    mixed_precision: Resolved[Literal["no", "fp16", "bf16"] | None] = option(
        None,
        "compute in bfloat16 (bf16: faster and with less memory, on recent GPUs), float16 (fp16: for older GPUs) or float32 (no); "
        "if not given, as set by `accelerate config`, or else in float32",
    )
    allow_tf32: Resolved[bool | None] = option(
        None,
        "compute float32 matrix products in TF32 on Ampere and later GPUs, which is several times as fast but keeps only three "
        "digits, as the official code of SiT and REPA does; if not given, on for a new run and unchanged for a resumed one",
    )
    report_to: Machine[str] = option(
        "tensorboard", "experiment trackers, separated by commas (tensorboard, wandb, ...), or none"
    )
    tracker_project_name: Machine[str] = option(
        "vrpo", "name of the project in the trackers (for TensorBoard, of the folder inside --logging_dir)"
    )
    tracker_run_name: Machine[str | None] = option(
        None,
        "name of the run in trackers that name runs (wandb, mlflow, ...); the name of the output folder if not given",
    )
    logging_dir: Machine[str] = option("logs", "folder for the trackers' files, inside the output folder")
    logging_steps: Watched[Steps] = option(50, "optimizer steps between two rows of metrics")
    dataloader_num_workers: Machine[Annotated[int, NUM_WORKERS]] = option(
        4, "processes (threads with --streaming) that decode images, for each training process"
    )


@dataclass(kw_only=True)
class DataConfig(Options):
    """The images and class labels to train on."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: Annotated[DataName[str | None], OneOf("data")] = option(
        None,
        "data set with the images: a name on the Hub, a folder that `datasets` can open, or `digits`, which is part of the package",
    )
    dataset_config_name: Data[str | None] = option(None, "configuration of the data set, if it has several")
    dataset_split: Data[str] = option("train", "split of the data set")
    train_data_dir: Annotated[Resolved[str | None], OneOf("data")] = option(
        None, "folder with the images, which has one folder per class, instead of --dataset_name"
    )
    latents_dir: Annotated[Resolved[str | None], OneOf("data")] = option(
        None,
        "folder with encoded images, which `vrpo prepare` has written, instead of --dataset_name; this saves the time of the "
        "autoencoder in every pass over the data",
    )
    streaming: Resolved[bool] = option(
        False,
        "read the parquet files of --dataset_name during training instead of copying the data set to the disk first",
    )
    image_column: Data[str] = option("image", "column with the images")
    label_column: Data[str] = option("label", "column with the class labels; `none` ignores all labels")
    max_train_samples: Data[Images | None] = option(None, "number of images to use, drawn at random; all if not given")
    allow_changed_data: Free[bool] = option(
        False, "resume a run although the images, labels or class names have changed"
    )
    resolution: Annotated[int, RESOLUTION] = option(
        256, "crop and scale the images to squares with sides of this many pixels"
    )
    jpeg_draft: bool = option(
        False,
        "decode JPEG images at a half, a quarter or an eighth of their size if the shorter side is still at least --resolution: "
        "this is faster for large images, but the pixels differ slightly from those of ADM's repeated halving",
    )
    center_crop: bool = option(True, "crop images in the centre, as ADM does, instead of at random")
    random_flip: bool = option(False, "mirror each image with a probability of one half")


@dataclass(kw_only=True)
class ModelConfig(Options):
    """The transformer, its starting weights and its autoencoder."""

    _argument_group_name: ClassVar[str] = "model"

    preset: Resolved[str | None] = option(
        None,
        "train a transformer of this size, {SiT,DiT}-{XS,S,B,L,XL}/{1,2,4,8}: XS to XL have 2 to 675 million parameters, and the "
        "number is the patch size (smaller patches cost more and give better images); SiT-B/2 if no option names a model",
    )
    model_config: Resolved[str | None] = option(
        None,
        "JSON file with the arguments of SiTTransformer2DModel; arguments that follow from the data are replaced",
        "FILE.json",
    )
    pretrained_model_name_or_path: Name[str | None] = option(
        None,
        "start from these weights instead of random ones: a pipeline or transformer (folder or Hub name), or an official "
        "checkpoint of SiT, REPA, iREPA or DiT",
        "NAME|FOLDER|FILE.pt",
    )
    keep_labels: bool = option(
        False, "keep the class embeddings of the starting weights, even if the names of the classes differ"
    )
    lora_rank: Thousands | None = option(
        None,
        "train only the projectors and LoRA adapters of this rank, and keep all other weights frozen; if not given, all weights "
        "are trained",
    )
    lora_alpha: Annotated[Ratio | None, ADAPTED] = option(
        None, "scale of the LoRA adapters: their output is multiplied by lora_alpha / lora_rank, or by 1 if not given"
    )
    lora_dropout: Annotated[Share, ADAPTED] = option(
        0.0, "probability with which each input of a LoRA adapter is set to 0 in training"
    )
    lora_target: Annotated[list[str] | None, ADAPTED] = option(
        None,
        "linear layers that get LoRA adapters: the ends of their names, such as to_q to_v modulation, or a regular expression "
        "that matches whole names; if not given, all linear layers of attention and feed-forward",
        "NAME|REGEX",
    )
    prediction_type: Resolved[Literal["velocity", "epsilon"] | None] = option(
        None,
        "what the model predicts: the velocity (velocity, as SiT) or the noise (epsilon, as DiT); if not given, it follows from the "
        "preset or the starting weights",
    )
    learn_sigma: Resolved[bool | None] = option(
        None,
        "also train the variance of models that predict noise; if not given, it follows from the preset or the starting weights",
    )
    qk_norm: Resolved[bool] = option(
        False,
        "normalise the queries and keys of each attention head (RMSNorm), which keeps attention stable in large models and long "
        "runs; a model that starts from given weights keeps its own setting",
    )
    vae: Resolved[str | None] = option(
        None,
        "encode the images with this autoencoder of diffusers (Hub name or folder), usually stabilityai/sd-vae-ft-ema; `none` "
        "trains on pixels, which suits images with sides of up to 64 pixels",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "precision in which the autoencoder encodes images; half precision takes half the time on a GPU but changes the third "
        "digit of the latents, and some autoencoders overflow in float16",
    )
    label_dropout: Resolved[Share | None] = option(
        None,
        "share of the samples that are trained without their class, which classifier-free guidance needs; if not given, the share "
        "of the starting weights, or 0.1",
    )


@dataclass(kw_only=True)
class AlignmentConfig(Options):
    """How hidden states of the transformer are aligned with a frozen vision encoder."""

    _argument_group_name: ClassVar[str] = "alignment"

    objective: Literal["none", "repa", "irepa", "rare", "repi", "vrpo"] = option(
        "vrpo",
        "add this to the flow-matching loss: nothing (none); REPA's cosine loss as it was published (repa), with iREPA's projector "
        "and targets (irepa), or with RARE's targets, token weights and release (rare); REPI's scaffold of encoder features "
        "(repi); or VRPO's rewards (vrpo). The objective also sets the options of alignment that are not given (docs/method.md)",
    )
    encoder: Name[list[str] | None] = option(
        None,
        "align with these frozen vision encoders: transformers models (Hub names or folders), usually facebook/dinov2-base, `digits`, "
        "which is in the package, or code of your own as package.module:name or FILE.py:name (docs/inputs.md); every objective but "
        "none needs one",
    )
    encoder_layer: list[Layer] | None = option(
        None,
        "index of the encoder's hidden state to align with: one for all encoders, or one for each; if not given, the output (for "
        "conv nets, the stage of stride 16)",
    )
    layer_scope: Annotated[str, ALIGNED] = option(
        "early", "transformer blocks to align: early (2/7 of the depth), mid, all, or a list such as 4,8"
    )
    alignment_coeff: Annotated[Coefficient | None, ALIGNED] = option(
        None, "weight of the alignment loss; if not given, 4 for vrpo and 0.5 for others"
    )
    alignment_stop_step: Annotated[Step | None, ENCODED] = option(
        None, "optimizer step at which alignment ends at the latest; if not given, only --release can end it"
    )
    release: Annotated[Resolved[Literal["none", "stop", "gate", "plateau"] | None], ALIGNED] = option(
        None,
        "what ends alignment: nothing (none), --alignment_stop_step (stop), gradients that oppose those of flow matching, judged for "
        "each range of noise levels by itself (gate), or a distance to the targets that no longer falls (plateau); if neither this "
        "nor --conflict is given, plateau for rare, and for others stop with --alignment_stop_step and none without it",
    )
    timestep_weighting: Annotated[Literal["uniform", "low_noise"] | None, ALIGNED] = option(
        None,
        "weight of the alignment loss at noise level t: 1 (uniform), or sigmoid(20 (0.7 - t)) (low_noise); uniform if not given",
    )
    projector: Annotated[Literal["mlp", "conv"] | None, ALIGNED] = option(
        None,
        "network that maps hidden states to encoder features: REPA's three layers (mlp) or iREPA's 3x3 convolution (conv); if not given, "
        "conv for irepa and mlp for others",
    )
    projector_dim: Resolved[Annotated[int, In(1, most=65_536)]] = option(2048, "hidden width of the mlp projectors")
    spatial_norm: Annotated[Coefficient | None, ALIGNED] = option(
        None,
        "factor a of the normalisation (f - a mean) / std of the encoder features over the tokens of an image; 0 turns it off; if not "
        "given, 0.6 for irepa and 0 for others",
    )
    target_norm: Annotated[str | None, ALIGNED] = option(
        None,
        "normalisation of the encoder features by statistics of the data, before --spatial_norm: none, or whiten:K, which keeps K "
        "principal components and scales each to variance 1; if not given, whiten:128 for rare and none for others",
    )
    token_weighting: Annotated[Literal["uniform", "residual"] | None, ALIGNED] = option(
        None,
        "weight of each token in the alignment loss: equal (uniform), or larger for tokens farther from their target (residual); if not "
        "given, residual for rare and uniform for others",
    )
    conflict: Annotated[Resolved[Literal["none", "gate", "project"] | None], ALIGNED] = option(
        None,
        "what happens at noise levels where alignment's gradient opposes that of flow matching: gate (as --release gate) ends "
        "alignment there, project removes the opposing part of the gradient, none changes nothing; if not given, it follows from "
        "--release",
    )
    log_gradients: Annotated[Free[bool], Needs("objective", REPA_LOSS)] = option(
        False,
        "log the cosine between alignment's and flow matching's gradients and the ratio of their norms even without the gate; "
        "vrpo always logs them",
    )
    scaffold_layer: Annotated[Annotated[int, In(1, most=1000)] | None, ENCODED] = option(
        None,
        "scaffold this block, counted from 1: it first attends to the encoder's features and later learns to work without them (REPI); "
        "if not given, the block of --layer_scope early for repi and no block for others",
    )
    scaffold_fraction: Annotated[float, In(0, most=1, exclusive=True), ENCODED] = option(
        0.05,
        "share of the training steps, from the first on, in which the scaffolded block attends to the encoder's features; with 1 it "
        "always does, which serves as a control (docs/method.md)",
    )
    scaffold_coeff: Annotated[Coefficient, ENCODED] = option(
        2.0,
        "weight of the loss that, after those steps, pulls the scaffolded block's own keys and values towards those made from the "
        "encoder's features",
    )

    def __post_init__(self):
        super().__post_init__()
        # In a `VRPOConfig`, this also sets options of other groups, such as `reward_weighting`.
        for name, value in set_by_objective(self.objective).items():
            if getattr(self, name, value) is None:
                setattr(self, name, value)


@dataclass(kw_only=True)
class PolicyConfig(Options):
    """The rewards and the policy of `objective="vrpo"`."""

    _argument_group_name: ClassVar[str] = "policy (vrpo)"

    reward_weighting: Annotated[str | None, VRPO] = option(
        None,
        "weights of the rewards: the paper's inverse_variance; equal shares (equal, or inverse_std, which computes the same); "
        "shares in proportion to the rewards' standard deviations (raw); fixed shares of the fidelity, semantic and structural "
        "reward, such as 0.2,0.5,0.3; or auto, which means 0,2,1, or equal for rewards passed from Python; auto if not given",
    )
    estimator: Annotated[Literal["expected", "sampled"], VRPO] = option(
        "expected",
        "compute the policy gradient in closed form, as its limit for small noise (expected), or from sampled actions (sampled)",
    )
    policy_noise: Annotated[Ratio, VRPO] = option(
        0.1, "standard deviation of the policy's actions, relative to the unit length of a token"
    )
    group_size: Annotated[int, In(2, why="advantages are relative to the group", most=65_536), VRPO, SAMPLED] = option(
        8, "actions sampled for each token"
    )
    policy_epochs: Annotated[Thousands, VRPO, SAMPLED] = option(1, "optimizer steps on the same sampled actions")
    clip_range: Annotated[Ratio, VRPO, SAMPLED] = option(
        0.2, "largest deviation of the probability ratio from 1, with --policy_epochs above 1"
    )
    kl_coeff: Annotated[Coefficient, VRPO] = option(
        0.0,
        "weight of the KL divergence from the policy of the starting weights; above 0 it costs a second forward pass",
    )


@dataclass(kw_only=True)
class ImageRewardConfig(Options):
    """Rewards of the image that a prediction implies, with any objective; `check_image_rewards` checks them together."""

    _argument_group_name: ClassVar[str] = "image rewards"

    image_rewards: list[str] | None = option(
        None,
        "rewards for the clean image that each prediction implies: perceptual, image_semantic, or package.module:name of a "
        "function `reward(x0_hat, x0)`; none if not given",
    )
    image_reward_share: list[Ratio] | None = option(
        None,
        "norm of the image rewards' gradient with respect to the prediction, relative to that of flow matching: one number for all "
        "rewards or one for each; 0.5 if not given",
    )
    image_reward_max_t: Fraction = option(0.7, "largest noise level t at which images are rewarded")
    image_reward_every: Steps = option(1, "optimizer steps from one step with image rewards to the next")
    image_reward_fraction: Fraction = option(1.0, "share of the samples whose images are rewarded")
    image_reward_start_step: Step = option(0, "first optimizer step with image rewards")
    image_reward_encoder: Name[str | None] = option(
        None, "frozen vision encoder of transformers that judges these images; the first --encoder if not given"
    )
    image_reward_resolution: Annotated[int, RESOLUTION] | None = option(
        None,
        "side in pixels of the squares to which images are resized for that encoder; if not given, the same as for alignment",
    )
    perceptual_layer: list[Layer] | None = option(
        None,
        "indices of that encoder's hidden states for the perceptual reward; if not given, three in the first half of its depth (for "
        "conv nets, the last of each resolution in that half)",
    )
    image_semantic_layer: Layer | None = option(
        None,
        "index of that encoder's hidden state for the image_semantic reward; if not given, its output (for conv nets, the stage of "
        "stride 16)",
    )
    reward_vae: Name[str | None] = option(
        None,
        "autoencoder of diffusers that decodes the images for their rewards, such as a small AutoencoderTiny for the same latents; "
        "--vae if not given",
    )
    image_reward_batch_size: Free[Batch | None] = option(
        None,
        "images that are decoded and rewarded at a time, which bounds the memory; if not given, 64 without an autoencoder and 8 "
        "with one; with AutoencoderTiny on a GPU, 64 at up to 256 pixels and fewer at more, but at least 8",
    )


@dataclass(kw_only=True)
class OptimizationConfig(Options):
    """Batch size, length of the run, optimizer and averaged weights."""

    _argument_group_name: ClassVar[str] = "optimization"

    train_batch_size: Annotated[Free[Batch], Changeable()] = option(
        256,
        "samples in a micro-step of each process (an optimizer step has --gradient_accumulation_steps micro-steps); lower it if the "
        "GPU runs out of memory",
    )
    gradient_accumulation_steps: Annotated[Free[Batch], Changeable()] = option(1, "micro-steps in an optimizer step")
    gradient_checkpointing: Annotated[Free[bool | str], Switch("full")] = option(
        False,
        "recompute activations in the backward pass instead of keeping them, which saves memory: those of whole blocks (full, or "
        "the flag alone), of the attention or the mlp of each block, or of every K-th block (every:K)",
        "full|attention|mlp|every:K",
    )
    max_train_steps: Annotated[Free[Steps | None], OneOf("steps")] = option(
        None,
        f"train for this many optimizer steps; if --num_train_epochs is not given either, for {MOST_EPOCHS} epochs or "
        f"{DEFAULT_IMAGES_SEEN:,} images, whichever is shorter, but for at least one epoch",
    )
    num_train_epochs: Annotated[Free[Steps | None], OneOf("steps")] = option(
        None, "train for this many passes over the data, instead of --max_train_steps"
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform",
        "distribution of the noise levels in training: uniform, or logit_normal (Stable Diffusion 3), which favours medium noise",
    )
    logit_mean: Annotated[Annotated[float, In(-10, most=10)], LOGIT_NORMAL] = option(
        0.0, "mean of log(t / (1 - t)) of the noise level t; above 0 favours high noise, below 0 low noise"
    )
    logit_std: Annotated[Annotated[float, In(0, most=10, exclusive=True)], LOGIT_NORMAL] = option(
        1.0, "standard deviation of log(t / (1 - t))"
    )
    optimizer: str = option(
        "adamw",
        "optimizer: adamw, adamw8bit (from bitsandbytes), a class of torch.optim such as SGD, NAdam or Adafactor, or a class of "
        "torchao.optim such as torchao:AdamW8bit",
    )
    optimizer_args: str | None = option(
        None,
        "further arguments of the optimizer as JSON, such as '{\"momentum\": 0.9}'; the class's own defaults if not given",
        "JSON",
    )
    learning_rate: Annotated[LearningRate, Changeable()] = option(
        1e-4,
        "learning rate of the optimizer after --lr_warmup_steps; 1e-4 is usual with 256 samples per step, up to 1e-3 for small models",
    )
    lr_scheduler: Annotated[
        Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        Changeable(),
    ] = option("constant_with_warmup", "schedule of the learning rate")
    lr_warmup_steps: Annotated[Step, Changeable()] = option(
        0, "optimizer steps over which the learning rate rises from 0"
    )
    adam_beta1: Annotated[Share, ADAMW, Changeable()] = option(0.9, "decay per step of AdamW's average of gradients")
    adam_beta2: Annotated[Share, ADAMW, Changeable()] = option(
        0.999, "decay per step of AdamW's average of squared gradients"
    )
    adam_weight_decay: Annotated[Coefficient, ADAMW, Changeable()] = option(0.0, "weight decay of AdamW")
    adam_epsilon: Annotated[Ratio, ADAMW, Changeable()] = option(1e-8, "constant in the denominator of AdamW's update")
    max_grad_norm: Annotated[Ratio, Changeable()] = option(
        1.0, "largest norm of the gradient; a larger gradient is scaled down to this norm"
    )
    use_ema: bool = option(True, "average the weights; sample grids and the result use the average")
    ema_decay: Share = option(0.9999, "decay per step of the averaged weights")
    ema_warmup: Free[bool] = option(
        True,
        "lower the decay in the first steps, to (1 + n) / (10 + n) after n steps, so that the average of a short run does not "
        "consist mainly of its starting weights; a resumed run continues as it began",
    )
    ema_every: Steps = option(
        1,
        "update the averaged weights once in this many steps, with --ema_decay to the power of that number, which saves memory "
        "traffic; the weights of the steps in between do not enter the average",
    )

    def __post_init__(self):
        # Python callers may pass a dictionary. The same arguments are always spelled alike, so that a run can be resumed.
        if isinstance(self.optimizer_args, Mapping):
            self.optimizer_args = json.dumps(dict(self.optimizer_args))
        super().__post_init__()
        if self.optimizer.lower() in ADAMW.values:
            self.optimizer = self.optimizer.lower()
        if self.optimizer_args is not None:
            self.optimizer_args = json.dumps(optimizer_arguments(self), sort_keys=True)


@dataclass(kw_only=True)
class SpeedConfig(Options):
    """Options that change how fast a run is but, except for `fp8`, not what it computes."""

    _argument_group_name: ClassVar[str] = "speed"

    compile: Free[bool] = option(False, "compile the transformer blocks, the encoders and the objective")
    compile_mode: Annotated[
        Free[Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead"]], Needs("compile")
    ] = option(
        "default",
        "mode of torch.compile: default; max-autotune-no-cudagraphs, which tries kernels for minutes at the start; or "
        "reduce-overhead, which records CUDA graphs, for small models that wait for kernel launches",
    )
    fp8: bool = option(
        False,
        "compute the linear layers of attention and feed-forward in 8 bits (torchao, on Ada, Hopper and later GPUs), which changes "
        "the results; needs --mixed_precision bf16",
    )
    attention_backend: Free[str | None] = option(
        None,
        "attention backend of diffusers: native, flash, _flash_3, _native_cudnn, sage, ...; diffusers' default if not given",
    )
    profile: Machine[Steps | None] = option(None, "time the parts of this many steps and print a table", "STEPS")
    peak_tflops: Watched[Ratio | None] = option(
        None,
        "peak speed of one device in TFLOP/s, of which the log shows the share in use (MFU); if not given, known for common GPUs",
    )


@dataclass(kw_only=True)
class CheckpointConfig(Options):
    """Checkpoints, and the samples that are drawn during training."""

    _argument_group_name: ClassVar[str] = "checkpoints and samples"

    checkpointing_steps: Watched[Steps | None] = option(
        None,
        f"optimizer steps between two checkpoints; if not given, 1/{DEFAULT_INTERVALS} of the run, but at least {SHORTEST_INTERVAL}",
    )
    checkpoints_total_limit: Watched[Step | None] = option(
        None,
        f"keep this many of the newest checkpoints, or all with 0; {CHECKPOINTS_TO_KEEP} if not given",
    )
    resume_from_checkpoint: Machine[str] = option(
        "latest",
        "checkpoint to continue from: latest, the newest in the output folder (a new run starts if there is none); none, to start a "
        "new run; hub, the one on the Hub; or the folder of a checkpoint",
        "latest|none|hub|DIR",
    )
    allow_changed: Free[list[str] | None] = option(
        None,
        "options that may differ from those of the checkpoint to continue from, separated by commas, such as "
        "learning_rate,lr_scheduler; the new values apply from there on, and starts.jsonl records the change",
        "NAME,...",
    )
    overwrite_output_dir: Machine[bool] = option(
        False,
        "start a run in an output folder that is not empty and has no checkpoint to continue from: files that training wrote there "
        "are removed and others stay; with --resume_from_checkpoint none, checkpoints are removed, too",
    )
    stop_on_failed_checkpoint: Machine[bool] = option(
        False, "stop if a checkpoint cannot be written, instead of training on and trying again at the next one"
    )
    skip_nonfinite: Free[bool] = option(
        False, "skip steps whose loss or gradient is NaN or infinite, instead of stopping there"
    )
    validation_steps: Watched[Steps | None] = option(
        None,
        f"optimizer steps between two grids of samples; if not given, 1/{DEFAULT_INTERVALS} of the run, but at least {SHORTEST_INTERVAL}, and "
        f"further grids after steps {', '.join(map(str, EARLY_GRIDS))}",
    )
    validation_labels: Watched[list[str] | None] = option(
        None, "draw these classes, by name or id, as columns of the grid; ten classes if not given"
    )
    num_validation_images: Watched[Thousands] = option(4, "rows of the grid: images of each class")
    num_inference_steps: Free[SolverSteps] = option(
        50, "solver steps for the samples in the grid and for --fd_encoder"
    )
    guidance_scale: Free[Annotated[float, GUIDANCE]] = option(
        1.5, "strength of classifier-free guidance in the grid; 1 turns it off"
    )
    fd_encoder: Free[str | None] = option(
        None,
        "log the Fréchet distance between samples and training images in the features of this vision encoder, with every grid "
        "but the early ones",
    )
    num_fd_samples: Annotated[Free[Samples | None], MEASURED] = option(
        None, "number of unguided samples for that distance; 2048 if not given"
    )


@dataclass(kw_only=True)
class GenerativeConfig(Options):
    """Rewards on images that the model generates (docs/generative.md)."""

    _argument_group_name: ClassVar[str] = "generative policy (docs/generative.md)"

    generative_policy_start_step: Step | None = option(
        None, "also train on rewards of generated images, from this step on; never if not given"
    )
    rollout_classes: Annotated[Annotated[int, In(1, most=65_536)], GENERATIVE] = option(
        32, "classes in a rollout (a set of samples that are drawn together and rewarded)"
    )
    rollout_group_size: Annotated[int, In(2, why="advantages are relative to the group", most=65_536), GENERATIVE] = (
        option(16, "samples drawn for each class of a rollout")
    )
    rollout_steps: Annotated[SolverSteps, GENERATIVE] = option(25, "solver steps of a sample, without guidance")
    rollout_every: Annotated[Steps, GENERATIVE] = option(2, "optimizer steps between two rollouts")
    rollout_epochs: Annotated[Thousands, GENERATIVE] = option(1, "optimizer steps that use the samples of a rollout")
    mc_samples: Annotated[Thousands, GENERATIVE] = option(
        4, "noise levels from which the likelihood of a sample is estimated"
    )
    generative_coeff: Annotated[Coefficient, GENERATIVE] = option(1.0, "weight of these rewards' loss")
    max_gradient_ratio: Annotated[Ratio, GENERATIVE] = option(
        0.5,
        "largest norm of these rewards' gradient, relative to the gradient on real images; a larger one is scaled down",
    )
    rollout_clip_range: Annotated[Ratio, GENERATIVE] = option(
        8e-3, "largest deviation of the likelihood ratio from 1, with --rollout_epochs above 1"
    )
    anchor_coeff: Annotated[Coefficient | None, GENERATIVE] = option(
        None,
        "weight of the distance to the model that drew the samples; if not given, 0, or 0.3 with --rollout_epochs above 1",
    )
    generative_learning_rate: Annotated[LearningRate, GENERATIVE] = option(
        1e-5, "learning rate from --generative_policy_start_step on"
    )
    reward_encoder: Annotated[Resolved[str | None], GENERATIVE] = option(
        None, "frozen vision encoder of transformers that judges samples; the first --encoder if not given"
    )
    reward_shallow_layer: Annotated[Layer | None, GENERATIVE] = option(
        None,
        "index of that encoder's hidden state for the perceptual reward; the one at a quarter of the depth if not given",
    )
    fidelity_reward: Annotated[Literal["auto", "frechet", "mmd"], GENERATIVE] = option(
        "auto",
        "distance from which the fidelity and perceptual rewards are derived: Fréchet distance or MMD (maximum mean discrepancy); "
        "auto uses the MMD with fewer than 10000 training images",
    )
    reward_function: Annotated[Resolved[list[str] | None], Repeated(), GENERATIVE] = option(
        None, "user-defined reward `reward(images, features, labels)`; the flag may be repeated", "FILE.py:NAME"
    )
    reward_weights: Annotated[str | None, GENERATIVE] = option(
        None, "shares of fidelity, perceptual, semantic and user-defined rewards, such as 2,1,1; equal if not given"
    )
    reward_queue_size: Annotated[Samples, GENERATIVE] = option(
        10240, "estimate the distribution of the model from this many of the latest samples"
    )
    reward_reference: Annotated[Free[str | None], GENERATIVE] = option(
        None,
        "file for the statistics of the training images; inside the output folder if not given",
        "FILE.safetensors",
    )
    reward_reference_images: Annotated[Images, GENERATIVE] = option(
        50_000, "largest number of training images from which these statistics are computed"
    )
    guard_every: Annotated[Steps, GENERATIVE] = option(
        25, "rollouts between two checks by the guards, which stop a run that gets worse (docs/generative.md)"
    )
    guard_samples: Annotated[int, In(4, why="recall looks at a sample's third neighbour", most=10**7), GENERATIVE] = (
        option(1024, "samples drawn for each check by the guards")
    )
    guard_loss_rise: Annotated[Free[Coefficient], GENERATIVE] = option(
        0.02, "relative rise of the flow-matching loss at which training stops"
    )
    guard_recall_fall: Annotated[Free[Coefficient], GENERATIVE] = option(
        0.03, "fall of the samples' recall, a number between 0 and 1, at which training stops"
    )
    guard_distance_rise: Annotated[Free[Coefficient], GENERATIVE, MEASURED] = option(
        0.02, "relative rise of the distance in --fd_encoder at which training stops, if the reward rises, too"
    )


@dataclass(kw_only=True)
class HubConfig(Options):
    """What is published on the Hugging Face Hub (docs/publishing.md)."""

    _argument_group_name: ClassVar[str] = "Hub"

    push_to_hub: Machine[bool] = option(
        False,
        "publish the result on the Hub, with a model card; log in with `hf auth login` first (docs/publishing.md)",
    )
    hub_model_id: Annotated[Machine[str | None], PUBLISHED] = option(
        None,
        "repository to publish in; if not given, one of your own with the name of the output folder",
        "OWNER/NAME",
    )
    hub_private_repo: Annotated[Machine[bool], PUBLISHED] = option(
        False, "make the repository private if it does not exist yet"
    )
    hub_license: Annotated[Machine[str | None], PUBLISHED] = option(
        None, "license of the weights; if not given, apache-2.0, or `other` if the run started from other weights"
    )
    hub_push_checkpoints: Annotated[Machine[bool], PUBLISHED] = option(
        False, "also publish the averaged pipeline of each checkpoint, as a commit with the tag step-N"
    )
    push_training_state: Annotated[Machine[bool], PUBLISHED] = option(
        False,
        "also upload whole checkpoints to the private repository NAME-state, for --resume_from_checkpoint hub",
    )


@dataclass(kw_only=True)
class VRPOConfig(
    RunConfig,
    DataConfig,
    ModelConfig,
    AlignmentConfig,
    PolicyConfig,
    ImageRewardConfig,
    OptimizationConfig,
    SpeedConfig,
    CheckpointConfig,
    GenerativeConfig,
    HubConfig,
):
    """All options of training, checked on construction. `vrpo train --help-all` explains each.

    The attributes are those of the groups above and have the names of the flags of `vrpo train`. Data set, autoencoder and
    encoders may be missing, because [`VRPOTrainer`] also accepts them as objects. Options that depend on the objective
    (`OBJECTIVES`) and are not given are filled in on construction; `dataclasses.replace` keeps these values even if it
    changes the objective.

    Example:

    ```python
    from dataclasses import replace

    from diffusers_vrpo import VRPOConfig

    args = VRPOConfig(output_dir="sit-b", objective="repa", max_train_steps=100_000)
    longer = replace(args, max_train_steps=400_000)
    ```

    Raises:
        InputError: if a value has the wrong type or is out of range, or options contradict each other.
    """

    def __post_init__(self):
        super().__post_init__()
        for check in CHECKS:
            check(self)


# ----------------------------------------------------------------------------------------------------------------------
# What is derived from the options


def checked_value(option: Option, value):
    """Returns the value of an option with paths as text and tuples as lists.

    Raises:
        InputError: if the value has the wrong type or is out of range.
    """
    name = option.name
    if isinstance(value, bool) and (switch := option.marked(Switch)):
        return switch[0].on if value else False
    if value is None:
        if not option.optional:
            raise InputError(name, f"`{name}` cannot be None; its default is {option.default}")
        return None
    if option.many:
        if not isinstance(value, list | tuple):
            raise InputError(name, f"`{name}` must be a list, not {value!r}")
        return [checked_item(option, item) for item in value]
    return checked_item(option, value)


def expanded(value):
    """Replaces `~` at the beginning of a text, or of each text in a list, by the home folder; returns others unchanged."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    is_path = isinstance(value, (str, Path)) and str(value).startswith("~")
    return type(value)(os.path.expanduser(value)) if is_path else value


def is_embedded_digits(name: str | None) -> bool:
    """Whether the name of a data set or an encoder means the embedded one.

    That is `embedded:digits`, or `digits` if there is no folder of that name.
    """
    return name == EMBEDDED_DIGITS or (name == DIGITS and not os.path.isdir(DIGITS))


def is_embedded_dataset(name: str | None) -> bool:
    """Whether the name of a data set means one in the package: the digits, or the grids of them."""
    return name == EMBEDDED_GRIDS or is_embedded_digits(name)


def names_code(name: str) -> bool:
    """Whether the name of an encoder is `package.module:name` or `FILE.py:name`, whose code runs when it is loaded."""
    return ":" in name and name not in (EMBEDDED_DIGITS, EMBEDDED_GRIDS) and not os.path.exists(name)


def checked_item(option: Option, value):
    """`checked_value` for a value that is not a list, or for one item of a list."""
    name = option.name
    if option.kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if option.kind is str and isinstance(value, str):
        value = expanded(value)
    is_bool = isinstance(value, bool)
    fits, wanted = {
        bool: (is_bool, "True or False"),
        int: (isinstance(value, numbers.Integral) and not is_bool, "a whole number"),
        float: (isinstance(value, numbers.Real) and not is_bool, "a number"),
        str: (isinstance(value, str), "text"),
    }[option.kind]
    if not fits:
        raise InputError(name, f"`{name}` must be {wanted}, not {value!r}")
    if option.kind is str and not value.strip():
        raise InputError(name, f"`{name}` is empty; give a value, or remove it")
    if option.choices is not None and value not in option.choices:
        raise InputError(name, f"`{name}` must be one of {', '.join(option.choices)}, not {value!r}")
    for limits in option.marked(In):
        if value not in limits:
            raise InputError(name, f"`{name}` {value} must {limits}")
    return value


def alternatives(config: type) -> list[list[str]]:
    """The names of options of which at most one can be given, group by group."""
    groups: dict[str, list[str]] = {}
    for each in options_of(config).values():
        for mark in each.marked(OneOf):
            groups.setdefault(mark.group, []).append(each.name)
    return list(groups.values())


def last_part(name: str) -> str:
    """The last part of a name or path, by which a run or a cache records it; `embedded:digits` is recorded as `digits`."""
    return DIGITS if name == EMBEDDED_DIGITS else Path(name).name


def kept_value(option: Option, value):
    """The value of an option in a checkpoint: the last part of names and paths, or `none` if no name is given."""
    if option.resume not in (Resume.NAME, Resume.DATA_NAME):
        return value
    return [last_part(item) for item in value or []] if option.many else last_part(value or "none")


def settings_to_keep(config: Options, group: type) -> dict[str, Any]:
    """The options of a group that a resumed run must keep, as JSON values by name.

    They include neither the options of the data (`data_settings_to_keep`) nor those from which `run_settings` derives other
    values. Options without effect are omitted, too, such as the weights of rewards in a run without rewards, because their
    defaults may differ between versions.
    """
    options = [each for each in options_of(group).values() if each.resume in (None, Resume.NAME)]
    return {each.name: kept_value(each, getattr(config, each.name)) for each in options if has_effect(config, each)}


def has_effect(config: Options, of: Option) -> bool:
    """Whether the options that the option `of` needs have the values that it needs."""
    return all(need.met_by(getattr(config, need.name)) for need in of.marked(Needs))


def data_settings_to_keep(config: DataConfig) -> dict[str, Any]:
    """The options that name the data, which a resumed run must keep unless `allow_changed_data` is given."""
    options = options_of(DataConfig).values()
    of_data = (Resume.DATA, Resume.DATA_NAME)
    return {o.name: kept_value(o, getattr(config, o.name)) for o in options if o.resume in of_data}


def names_marked(*kinds: Resume) -> set[str]:
    """The names of the options of training with one of these marks."""
    return {each.name for each in options_of(VRPOConfig).values() if each.resume in kinds}


# ----------------------------------------------------------------------------------------------------------------------
# Options that contradict each other


def is_default(config: Options, name: str) -> bool:
    """Whether an option has the value that it would have if it were not given."""
    of_objective = set_by_objective(config.objective) if isinstance(config, AlignmentConfig) else {}
    return getattr(config, name) == of_objective.get(name, options_of(type(config))[name].default)


def optimizer_arguments(config: OptimizationConfig) -> dict[str, Any]:
    """The further arguments of the optimizer by name.

    Raises:
        InputError: if `optimizer_args` is not a JSON object.
    """
    text = config.optimizer_args or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError("optimizer_args", f"`optimizer_args` {text} is not JSON: {reason}") from error
    if not isinstance(arguments, dict):
        raise InputError(
            "optimizer_args",
            f'`optimizer_args` {text} must map names of arguments to values, such as {{"momentum": 0.9}}',
        )
    return arguments


def check_alternatives(config: "VRPOConfig"):
    """Checks that at most one of the options that exclude each other is given."""
    for names in alternatives(type(config)):
        given = [name for name in names if getattr(config, name) is not None]
        if len(given) > 1:
            listed = " or ".join(f"`{name}`" for name in names)
            raise InputError(given[1], f"give either {listed}, not several of them")


def check_unused(config: "VRPOConfig"):
    """Checks that no option is given whose effect needs another option that is not set."""
    for each in options_of(type(config)).values():
        for need in each.marked(Needs):
            if not need.met_by(getattr(config, need.name)) and not is_default(config, each.name):
                value = getattr(config, each.name)
                given = f"`{each.name}`" if value is True else f"`{each.name}` {value}"
                raise InputError(each.name, f"{given} has no effect without {need}; remove it")


def check_streaming(config: DataConfig):
    """Checks that streaming reads all parquet files of a data set."""
    if not config.streaming:
        return
    for name, why in (
        ("latents_dir", "a latent cache is read from the disk as it is"),
        ("train_data_dir", "it reads parquet files; name a data set that has them with `dataset_name`"),
        (
            "max_train_samples",
            "a subset would be spread over all row groups; use a `dataset_split` such as validation",
        ),
    ):
        if (value := getattr(config, name)) is not None:
            raise InputError("streaming", f"`streaming` cannot be combined with `{name}` {value}: {why}")
    if is_embedded_dataset(config.dataset_name):
        raise InputError(
            "streaming",
            f"`streaming` cannot be combined with `dataset_name` {config.dataset_name}, which is in the package; remove it",
        )


def check_model_config(config: ModelConfig):
    """Checks that no other option names a model if a file of arguments describes it."""
    if config.model_config and (config.preset or config.pretrained_model_name_or_path):
        raise InputError(
            "model_config",
            "`model_config` cannot be combined with `preset` or `pretrained_model_name_or_path`; give only one of them",
        )


def check_vae_dtype(config: "VRPOConfig"):
    """Checks that a precision of the encoding is given only if an autoencoder encodes images in training."""
    if is_default(config, "vae_dtype"):
        return
    for name, value in (("latents_dir", config.latents_dir), ("vae", config.vae if config.vae == "none" else None)):
        if value is not None:
            raise InputError(
                "vae_dtype",
                f"`vae_dtype` {config.vae_dtype} has no effect with `{name}` {value}, where no image is encoded in training; "
                "remove it",
            )


def check_jpeg_draft(config: DataConfig):
    """Checks that JPEG draft mode is not combined with a latent cache, whose images are already decoded."""
    if config.jpeg_draft and config.latents_dir is not None:
        raise InputError(
            "jpeg_draft",
            f"`jpeg_draft` has no effect with `latents_dir` {config.latents_dir}, whose images are decoded; remove it",
        )


def check_encoder_layers(config: AlignmentConfig):
    """Checks that one layer is given for all encoders, or one for each."""
    encoders, layers = config.encoder or [], config.encoder_layer or []
    if len(layers) > 1 and len(layers) != len(encoders):
        raise InputError(
            "encoder_layer",
            f"`encoder_layer` has {len(layers)} numbers for {len(encoders)} encoders; give one, or one for each",
        )


def whitened_dims(target_norm: str) -> int | None:
    """K of a `target_norm` such as `whiten:128`; None for `none`.

    Raises:
        InputError: if it is neither.
    """
    if target_norm == "none":
        return None
    kind, _, number = target_norm.partition(":")
    if kind != "whiten" or not (number.isascii() and number.isdigit()) or int(number) < 2:
        raise InputError(
            "target_norm",
            f"`target_norm` {target_norm!r} is neither none nor whiten:K with a number K of at least 2 dimensions, such as "
            "whiten:128",
        )
    return int(number)


def end_of_alignment(conflict: str | None, release: str | None, alignment_stop_step: int | None) -> tuple[str, str]:
    """Resolves `conflict` and `release`, each of which may be None. The gate is a value of both.

    Returns:
        the treatment of opposing gradients (`"none"`, `"gate"` or `"project"`), and what ends alignment (`"none"`, `"stop"`,
        `"gate"` or `"plateau"`). With the last two, `alignment_stop_step` may end it sooner.

    Raises:
        InputError: if the options contradict each other.
    """
    if release is None:
        conflict = conflict or "none"
        by_step = "none" if alignment_stop_step is None else "stop"
        return conflict, "gate" if conflict == "gate" else by_step
    if release == "none" and alignment_stop_step is not None:
        raise InputError(
            "release",
            f"`release` none cannot be combined with `alignment_stop_step` {alignment_stop_step}, which ends alignment; remove "
            "one of the two",
        )
    if release == "stop" and alignment_stop_step is None:
        raise InputError("release", "`release` stop needs `alignment_stop_step`, the step at which alignment ends")
    if conflict is not None and (conflict == "gate") != (release == "gate"):
        raise InputError(
            "conflict",
            f"`conflict` {conflict} cannot be combined with `release` {release}: the gate acts with `release` gate and "
            "`conflict` gate, or without either; remove `conflict`, or give another `release`",
        )
    return conflict or ("gate" if release == "gate" else "none"), release


def alignment_end_of(config: AlignmentConfig) -> tuple[str, str]:
    """`end_of_alignment` of the options of a run."""
    return end_of_alignment(config.conflict, config.release, config.alignment_stop_step)


def objective_in_full(config: "VRPOConfig") -> str:
    """One line for the log: the objective and the values of the options that it may set or that define it."""
    conflict, release = alignment_end_of(config)
    values = {name: getattr(config, name) for name in UNLESS_THE_OBJECTIVE_SETS_IT} | {"release": release}
    values |= {"conflict": conflict, "layer_scope": config.layer_scope}
    if config.objective != "vrpo":
        del values["reward_weighting"]
    if config.objective == "repi":
        values = {"release": release}
    if has_scaffold(config):
        values["scaffold_layer"] = "early" if config.scaffold_layer is None else config.scaffold_layer
        values |= {name: getattr(config, name) for name in ("scaffold_fraction", "scaffold_coeff")}
    return f"objective {config.objective}: " + ", ".join(f"{name} {value}" for name, value in values.items())


def options_without_effect(config: "VRPOConfig") -> list[str]:
    """Sentences for the log about options that have no effect but are not refused, because runs to compare often share them."""
    objective, found = f"`objective` {config.objective}", []
    if config.objective == "none":
        if config.encoder and (config.image_reward_encoder or not config.image_rewards):
            found.append(f"{objective} trains without the `encoder` {', '.join(config.encoder)}")
        if config.encoder_layer:
            found.append(f"`encoder_layer` {', '.join(map(str, config.encoder_layer))} has no effect with {objective}")
    if not is_default(config, "projector_dim"):
        unused = objective if config.objective in ("none", "repi") else "`projector` conv"
        if config.objective in ("none", "repi") or config.projector == "conv":
            found.append(f"`projector_dim` {config.projector_dim} has no effect with {unused}")
    return found


def check_release(config: AlignmentConfig):
    """Checks that the options agree on what ends alignment."""
    alignment_end_of(config)


def check_target_norm(config: AlignmentConfig):
    """Checks that the normalisation of targets is a known one."""
    whitened_dims(config.target_norm)


def check_policy_noise(config: "VRPOConfig"):
    """Checks that the size of the policy's noise has an effect, as it does on sampled actions and the divergence."""
    if config.estimator == "expected" and not config.kl_coeff and not is_default(config, "policy_noise"):
        raise InputError(
            "policy_noise",
            f"`policy_noise` {config.policy_noise} has no effect without `estimator` sampled or `kl_coeff`, because "
            "`estimator` expected is the limit for small noise; remove it",
        )


def check_clip_ranges(config: "VRPOConfig"):
    """Checks that a clip range is given only with several steps per draw, because the first step is never clipped."""
    for epochs, clip_range in (("policy_epochs", "clip_range"), ("rollout_epochs", "rollout_clip_range")):
        if getattr(config, epochs) == 1 and not is_default(config, clip_range):
            raise InputError(
                clip_range,
                f"`{clip_range}` {getattr(config, clip_range)} has no effect without `{epochs}` above 1; remove it",
            )


def check_policy_epochs(config: "VRPOConfig"):
    """Checks that no checkpoint separates steps that share sampled actions."""
    steps = {"checkpointing_steps": config.checkpointing_steps, "max_train_steps": config.max_train_steps}
    for name, value in steps.items():
        if (value or 0) % config.policy_epochs:
            raise InputError(
                name,
                f"`{name}` {value} must be a multiple of `policy_epochs` {config.policy_epochs}, whose steps share one draw",
            )


def check_warmup(config: OptimizationConfig):
    """Checks that the constant schedule of diffusers, which ignores the warm-up, is given without one."""
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        raise InputError(
            "lr_scheduler", "`lr_scheduler` constant has no warm-up; use constant_with_warmup, or `lr_warmup_steps` 0"
        )


def recomputed_part(gradient_checkpointing: str) -> tuple[str, int]:
    """Reads `gradient_checkpointing`.

    Returns:
        the recomputed part, `"attention"`, `"mlp"` or `"block"`, and k if it is recomputed in every k-th block.

    Raises:
        InputError: if the value is not an allowed one.
    """
    if gradient_checkpointing in ("attention", "mlp"):
        return gradient_checkpointing, 1
    if gradient_checkpointing == "full":
        return "block", 1
    kind, _, number = gradient_checkpointing.partition(":")
    if kind != "every" or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise InputError(
            "gradient_checkpointing",
            f"`gradient_checkpointing` {gradient_checkpointing!r} is neither full, attention, mlp nor every:K with a whole "
            "number K of at least 1, such as every:2",
        )
    return "block", int(number)


def check_gradient_checkpointing(config: OptimizationConfig):
    """Checks that the recomputed part is a known one."""
    if config.gradient_checkpointing:
        recomputed_part(config.gradient_checkpointing)


def check_fp8(config: "VRPOConfig"):
    """Checks that 8-bit products have bfloat16 inputs and layers without adapters."""
    if not config.fp8:
        return
    if config.mixed_precision not in (None, "bf16"):  # None is what accelerate is configured for
        raise InputError("fp8", f"`fp8` needs `mixed_precision` bf16, not {config.mixed_precision}")
    if config.lora_rank:
        raise InputError(
            "fp8",
            f"`fp8` cannot be combined with `lora_rank` {config.lora_rank}, which adds adapters to the layers; remove one",
        )


def check_ema_every(config: OptimizationConfig):
    """Checks that there are averaged weights, and that they are updated at least once in the run."""
    if is_default(config, "ema_every"):
        return
    if not config.use_ema:
        raise InputError("ema_every", f"`ema_every` {config.ema_every} has no effect without `use_ema`; remove it")
    if config.max_train_steps is not None and config.ema_every > config.max_train_steps:
        raise InputError(
            "ema_every",
            f"`ema_every` {config.ema_every} would never update the averaged weights, because `max_train_steps` is "
            f"{config.max_train_steps}; give a lower number",
        )


def check_generative_start(config: "VRPOConfig"):
    """Checks that the generative policy starts before the run ends."""
    start, steps = config.generative_policy_start_step, config.max_train_steps
    if start is not None and steps is not None and start >= steps:
        raise InputError(
            "generative_policy_start_step",
            f"`generative_policy_start_step` {start} is never reached; it must be below `max_train_steps` {steps}",
        )


def check_rollouts(config: "VRPOConfig"):
    """Checks that samples are used before the next rollout replaces them, and that no checkpoint separates their steps."""
    every, epochs = config.rollout_every, config.rollout_epochs
    if config.generative_policy_start_step is None:
        return
    if epochs > every:
        raise InputError(
            "rollout_epochs",
            f"`rollout_epochs` {epochs} must be at most `rollout_every` {every}, after which the next rollout replaces the "
            "samples",
        )
    if config.reward_queue_size < config.rollout_classes * config.rollout_group_size:
        raise InputError(
            "reward_queue_size",
            f"`reward_queue_size` {config.reward_queue_size} must be at least "
            f"{config.rollout_classes * config.rollout_group_size}: the queue holds a whole rollout",
        )
    steps = {
        "generative_policy_start_step": config.generative_policy_start_step,
        "checkpointing_steps": config.checkpointing_steps,
        "max_train_steps": config.max_train_steps,
    }
    for name, value in steps.items():
        if epochs > 1 and (value or 0) % every:
            raise InputError(
                name,
                f"`{name}` {value} must be a multiple of `rollout_every` {every} when `rollout_epochs` is above 1: steps "
                "that share samples are saved together",
            )


def check_reward_encoder(config: GenerativeConfig):
    """Checks that the encoder that judges results does not also give rewards."""
    if config.reward_encoder == "inception":
        raise InputError(
            "reward_encoder",
            "`reward_encoder` inception judges results (FID) and must not give rewards; use another encoder",
        )


def has_scaffold(config: AlignmentConfig) -> bool:
    """Whether a block gets its keys and values from the encoders' features at first."""
    return config.objective == "repi" or config.scaffold_layer is not None


def check_scaffold(config: "VRPOConfig"):
    """Checks that options of the scaffold have a block, and that no option needs the block's own keys and values."""
    if not has_scaffold(config):
        for name in ("scaffold_fraction", "scaffold_coeff"):
            if not is_default(config, name):
                raise InputError(
                    name,
                    f"`{name}` {getattr(config, name)} has no effect without `scaffold_layer`; give it, or remove it",
                )
        return
    given = "`objective` repi" if config.scaffold_layer is None else f"`scaffold_layer` {config.scaffold_layer}"
    for name, why in (
        ("lora_rank", "adapters change keys and values that the scaffold replaces"),
        ("kl_coeff", "its reference, the model of the starting weights, has no scaffold"),
    ):
        if getattr(config, name):
            raise InputError(
                name, f"`{name}` {getattr(config, name)} cannot be combined with {given}: {why}; remove one"
            )
    if config.objective != "repi" and not config.alignment_coeff:
        raise InputError(
            "alignment_coeff", f"`alignment_coeff` 0 ends alignment, and with it {given}; use `objective` repi"
        )
    if config.scaffold_fraction == 1:
        for name in ("release", "conflict"):
            if getattr(config, name) in ("gate", "plateau") and not is_default(config, name):
                raise InputError(
                    name,
                    f"`{name}` {getattr(config, name)} has no effect with `scaffold_fraction` 1, because it acts only after the "
                    "scaffold phase, which then never ends; remove it",
                )
    if config.max_train_steps is not None:
        check_scaffold_ends(config, config.max_train_steps)


def check_scaffold_ends(config: "VRPOConfig", steps: int):
    """Checks that in a run of `steps` optimizer steps the scaffold phase ends before the first rollout.

    Raises:
        InputError: if the scaffold phase ends later.
    """
    start = config.generative_policy_start_step
    if start is None or not has_scaffold(config):
        return
    end = steps if config.scaffold_fraction == 1 else config.scaffold_fraction * steps
    if start < end:
        raise InputError(
            "generative_policy_start_step",
            f"`generative_policy_start_step` {start} must be at least {math.ceil(end)}, the end of the scaffold phase, before "
            "which no samples can be drawn",
        )


def changeable_options() -> list[str]:
    """The names of the options that `allow_changed` can name."""
    return [each.name for each in options_of(VRPOConfig).values() if each.marked(Changeable)]


def allowed_changes(config: CheckpointConfig) -> set[str]:
    """The names in `allow_changed`, whose entries may each have several names separated by commas."""
    return {name.strip() for entry in config.allow_changed or [] for name in entry.split(",") if name.strip()}


def check_allowed_changes(config: CheckpointConfig):
    """Checks that `allow_changed` names only options that may change within a run."""
    for name in sorted(allowed_changes(config).difference(changeable_options())):
        raise InputError(
            "allow_changed",
            f"`allow_changed` {name} names an option that cannot change within a run; those that can are "
            f"{', '.join(changeable_options())}",
        )


def check_resume_from_hub(config: "VRPOConfig"):
    """Checks that a run that resumes from the Hub also uploads its training state there."""
    if config.resume_from_checkpoint == "hub" and not config.push_training_state:
        raise InputError(
            "resume_from_checkpoint",
            "`resume_from_checkpoint` hub continues from a training state on the Hub and needs `push_to_hub` and "
            "`push_training_state`, which keep that state up to date; also give the `hub_model_id` that the run had",
        )


def image_reward_names(config: ImageRewardConfig) -> list[str]:
    """The names in `image_rewards`, whose entries may each have several names separated by commas."""
    return [name for entry in config.image_rewards or [] for name in entry.split(",") if name]


def check_image_rewards(config: "VRPOConfig"):
    """Checks the options of image rewards together.

    Only complete configurations are checked, because Python callers may pass the rewards to the trainer instead.

    Raises:
        InputError: if an option has no effect, or one that is needed is missing.
    """
    names = image_reward_names(config)
    for name in options_of(ImageRewardConfig):
        if not names and name != "image_rewards" and not is_default(config, name):
            raise InputError(
                name, f"`{name}` {getattr(config, name)} has no effect without `image_rewards`; remove it"
            )
    if not names:
        return
    for reward, name in (("perceptual", "perceptual_layer"), ("image_semantic", "image_semantic_layer")):
        if reward not in names and getattr(config, name) is not None:
            raise InputError(
                name, f"`{name}` {getattr(config, name)} has no effect without `image_rewards` {reward}; remove it"
            )
        if reward in names and not (config.image_reward_encoder or config.encoder):
            raise InputError(
                "image_reward_encoder",
                f"`image_rewards` {reward} needs `image_reward_encoder`, a frozen encoder such as facebook/dinov2-base",
            )
    shares = len(config.image_reward_share or [0.5])
    if shares not in (1, len(names)):
        raise InputError(
            "image_reward_share",
            f"`image_reward_share` has {shares} numbers for {len(names)} rewards; give one, or one for each",
        )
    check_image_rewards_begin(config, config.max_train_steps)


def check_image_rewards_begin(config: ImageRewardConfig, steps: int | None):
    """Checks that image rewards start before a run of `steps` optimizer steps ends; None is a run of unknown length.

    Raises:
        InputError: if they would never start.
    """
    start = config.image_reward_start_step
    if config.image_rewards and steps is not None and start >= steps:
        raise InputError(
            "image_reward_start_step",
            f"`image_reward_start_step` {start} is never reached, because the run has {steps} steps; give a lower one",
        )


CHECKS = (
    check_alternatives,
    check_unused,
    check_streaming,
    check_model_config,
    check_vae_dtype,
    check_jpeg_draft,
    check_encoder_layers,
    check_release,
    check_target_norm,
    check_policy_noise,
    check_clip_ranges,
    check_policy_epochs,
    check_warmup,
    check_gradient_checkpointing,
    check_ema_every,
    check_fp8,
    check_generative_start,
    check_rollouts,
    check_reward_encoder,
    check_scaffold,
    check_allowed_changes,
    check_resume_from_hub,
)


def check_complete(config: VRPOConfig):
    """Checks that the options are given which the command line needs, because it cannot pass objects.

    Raises:
        InputError: if the data set, autoencoder or encoder is missing, or `check_image_rewards` finds an error.
    """
    if [config.dataset_name, config.train_data_dir, config.latents_dir].count(None) == 3:
        raise InputError(
            "dataset_name",
            "give either `dataset_name` or `train_data_dir` or `latents_dir` (or, for a first run, `config` digits)",
        )
    if config.vae is None and config.latents_dir is None:
        raise InputError("vae", "give `vae`, such as stabilityai/sd-vae-ft-ema, or `vae` none to train on pixels")
    if config.objective != "none" and config.encoder is None:
        raise InputError("encoder", f"`objective` {config.objective} needs `encoder`, such as facebook/dinov2-base")
    check_image_rewards(config)
    if config.generative_policy_start_step is not None and not (config.reward_encoder or config.encoder):
        raise InputError(
            "reward_encoder",
            "`generative_policy_start_step` needs `reward_encoder`, a frozen encoder that judges samples, such as "
            "facebook/dinov2-base",
        )
