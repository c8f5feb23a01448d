#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Trains every transformer of docs/models.md with and without alignment, and times the wrapper while it does not align.

    python benchmarks/attached_models.py
    python benchmarks/attached_models.py overhead

The first command trains the tiny configurations of `alignment/tiny_transformers.py` on the embedded digits by flow matching,
with VRPO's rewards and without, from the same weights, batches and noise. Classes are ids, or texts with random embeddings, one
text per class. The table says how much the semantic reward rises from the first step to the mean of the last 50, and how
alignment changes the flow-matching loss in those 50. Runs that have a line in `--results` are not repeated.

The second command takes training steps of a transformer alone and in an `AlignedTransformer` that does not align, in turn and
in random order. It also counts the torch operations of both, on which other work on the machine has no effect. Its `--results`
are overwritten.
"""

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_vrpo import VRPO, AlignedTransformer, digits_pixels, load_encoder
from diffusers_vrpo.alignment.tiny_transformers import TRANSFORMERS, TinyTransformer


FOLDER = Path(__file__).parent
RESULTS = {"training": "results-attached-models.jsonl", "overhead": "results-attached-overhead.jsonl"}
NUM_CLASSES = 10
BATCH_SIZE, LAYER, PROJECTOR_DIM = 16, 2, 256
REWARDS = ["fidelity", "semantic", "structural"]
PAPER = {
    "alignment_coeff": 0.5,
    "reward_weighting": "inverse_variance",
    "release": "gate",
}  # VRPO as arXiv 2606.00583 has it
LAST = 50  # the value at the end of a run is the mean over this many steps
LEAST_RISE, MOST_LOSS = 0.2, 1.02  # the aims: least rise of the semantic reward, largest ratio of the losses
VERSIONS = {"diffusers": diffusers.__version__, "torch": torch.__version__}
# Arguments that hold a text, and have random values for each class.
TEXTS = ("encoder_hidden_states", "encoder_hidden_states_t5", "pooled_projections")


# ----------------------------------------------------------------------------------------------------------------------
# Training with and without alignment


def latents_of(pixels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Converts grey digits `[B,3,8,8]` to a transformer's input: equal channels, folded or packed if the input is smaller."""
    grey = pixels[:, :1]
    if shape[1:] == (4, 8, 8):
        return grey.expand(-1, 4, -1, -1)
    if shape[1:] == (4, 4, 4):
        return F.pixel_unshuffle(grey, 2)
    return F.pixel_unshuffle(grey.expand(-1, 4, -1, -1), 2).flatten(2).mT


class Conditions:
    """The arguments of a transformer besides the noisy latents, for a batch of times and classes.

    Args:
        arguments: the arguments of the tiny transformer for a batch of two.
    """

    def __init__(self, arguments: dict, generator: torch.Generator):
        self.arguments = dict(arguments)
        self.input_name = next(name for name in ("hidden_states", "sample") if name in arguments)
        self.shape = self.arguments.pop(self.input_name).shape
        # Flow times in [0, 1], or thousandths of them.
        self.time_unit = 1000 if self.arguments.pop("timestep").max() > 1 else 1
        self.takes_classes = self.arguments.pop("class_labels", None) is not None
        self.texts = {
            name: torch.randn(NUM_CLASSES, *self.arguments.pop(name).shape[1:], generator=generator)
            for name in TEXTS
            if name in arguments
        }

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> dict:
        """All arguments of a call. Masks are those of the tiny transformer's first text, which has no padding."""

        def repeated(value):
            if isinstance(value, torch.Tensor) and len(value) == 2:
                return value[:1].expand(len(t), *value.shape[1:])
            return value[:1] * len(t) if isinstance(value, list) and len(value) == 2 else value

        arguments = {name: repeated(value) for name, value in self.arguments.items()}
        arguments |= {self.input_name: x_t, "timestep": self.time_unit * t}
        if self.takes_classes:
            arguments["class_labels"] = labels
        return arguments | {name: table[labels] for name, table in self.texts.items()}


def build(name: str, seed: int) -> TinyTransformer:
    """Builds a tiny transformer with diffusers' initial weights, drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, arguments, *options = TRANSFORMERS[name]()
    return TinyTransformer(model.train(), arguments, options[0] if options else {})


def train(
    name: str, seed: int, steps: int, rewards: list[str], learning_rate: float, heads: int | None
) -> tuple[list[float], list[float]]:
    """Trains a transformer on digits, with these rewards of VRPO, or alone if there are none.

    Args:
        heads: attention heads of a block, instead of those of the tiny configuration.

    Returns:
        the flow-matching loss in each step, and the semantic reward in each aligned step.
    """
    tiny, generator = build(name, seed), torch.Generator().manual_seed(seed)
    if heads is not None:
        torch.manual_seed(seed)
        wider = type(tiny.model).from_config({**tiny.model.config, "num_attention_heads": heads}).train()
        tiny = tiny._replace(model=wider)
    conditions = Conditions(tiny.arguments, generator)
    pixels, labels = digits_pixels("train")
    latents = latents_of(pixels, conditions.shape)

    model, objective = tiny.model, None
    if rewards:
        torch.manual_seed(seed)  # of the projector
        encoder = load_encoder("embedded:digits", grid_size=(4, 4))
        options = {"grid_size": (4, 4), **tiny.options}
        model = AlignedTransformer(tiny.model, [LAYER], [encoder], projector_dim=PROJECTOR_DIM, **options)
        objective = VRPO(model, max_train_steps=steps, rewards=rewards, **PAPER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)

    losses, semantic = [], []
    for number in range(steps):
        rows = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        x0, t = latents[rows], torch.rand(BATCH_SIZE, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, t.view(-1, *[1] * (x0.ndim - 1)))
        arguments = conditions(x_t, t, labels[rows])
        torch.manual_seed(steps * seed + number)  # what a transformer drops is the same with and without alignment
        if objective is None:
            prediction = model(**arguments, return_dict=False)[0]
        else:
            step = objective.begin(t)
            prediction, projections = model(**arguments, fork=step.fork, align=step.active)
        # Some transformers also predict a variance, which is not trained.
        prediction = prediction[:, : x0.shape[1]]
        loss_fm = (prediction - (noise - x0)).square().flatten(1).mean(1)
        loss = loss_fm.mean()
        losses.append(loss.item())
        if objective is not None:
            loss = loss + objective.alignment_coeff * objective(step, projections, pixels[rows], loss_fm)
        optimizer.zero_grad()
        loss.backward()
        if objective is not None:
            objective.observe(step)
            if step.active:
                semantic.append(step.logs["reward/semantic"].item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if objective is not None:
            objective.update()
    return losses, semantic


def compare(
    model: str, seed: int, steps: int, rewards: list[str], learning_rate: float, heads: int | None = None
) -> dict:
    """Trains with and without alignment, and returns the line of the results."""
    start = time.process_time()
    aligned, semantic = train(model, seed, steps, rewards, learning_rate, heads)
    alone, _ = train(model, seed, steps, [], learning_rate, heads)
    loss_aligned, loss_alone = (statistics.fmean(losses[-LAST:]) for losses in (aligned, alone))
    reward_end = statistics.fmean(semantic[-LAST:])
    return {
        "model": model,
        "rewards": rewards,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": steps,
        "heads": heads,
        "aligned_steps": len(semantic),
        "reward_start": semantic[0],
        "reward_end": reward_end,
        "rise": reward_end - semantic[0],
        "loss_alone": loss_alone,
        "loss_aligned": loss_aligned,
        "loss_ratio": loss_aligned / loss_alone,
        "cpu_seconds": time.process_time() - start,
        **VERSIONS,
    }


def read_lines(path: Path) -> list[dict]:
    """Reads the lines of a results file; empty if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_line(path: Path, line: dict) -> dict:
    """Appends a line to a results file, with numbers rounded to six decimals, and returns it."""
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")
    return rounded


def training_table(lines: list[dict]) -> str:
    """The means over seeds as a Markdown table, followed by the models that miss an aim."""
    rows = [
        "| model | semantic reward | rise | loss alone | loss aligned | ratio | of each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name in dict.fromkeys(line["model"] for line in lines):
        of_model = [line for line in lines if line["model"] == name]
        mean = {
            key: statistics.fmean(line[key] for line in of_model)
            for key in ("reward_start", "reward_end", "rise", "loss_aligned", "loss_alone")
        }
        ratio, seeds = (
            mean["loss_aligned"] / mean["loss_alone"],
            ", ".join(f"{line['loss_ratio']:.3f}" for line in of_model),
        )
        rows.append(
            f"| `{name}` | {mean['reward_start']:.2f} to {mean['reward_end']:.2f} | {mean['rise']:.2f} "
            f"| {mean['loss_alone']:.3f} | {mean['loss_aligned']:.3f} | {ratio:.3f} | {seeds} |"
        )
        if mean["rise"] <= LEAST_RISE:
            missed.append(f"{name}: the reward rises by {mean['rise']:.3f}, which is not above {LEAST_RISE}")
        if ratio > MOST_LOSS:
            missed.append(f"{name}: the loss is {ratio:.3f} of that without alignment, which is above {MOST_LOSS}")
    return "\n".join([*rows, "", *(missed or ["All aims are met."])])


def reward_without_image() -> tuple[float, float]:
    """The mean semantic reward of the best single token, and of the best tokens that depend only on their place."""
    pixels, _ = digits_pixels("train")
    with torch.no_grad():
        y = F.normalize(load_encoder("embedded:digits", grid_size=(4, 4))(pixels), dim=-1)
    of_all, of_places = (F.normalize(y.mean(dims), dim=-1) for dims in ((0, 1), 0))
    return (y * of_all).sum(-1).mean().item(), (y * of_places).sum(-1).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Overhead of the wrapper


# The transformers have width 128 and six blocks. At this size a step takes about 0.1 s of one core.
WIDER = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6}
OVERHEAD_MODELS = {
    "SiTTransformer2DModel": {},
    "DiTTransformer2DModel": {},
    "FluxTransformer2DModel": {"num_layers": 3, "num_single_layers": 3, "axes_dims_rope": (8, 12, 12)},
    "PixArtTransformer2DModel": {"cross_attention_dim": 128},
}
OVERHEAD_BATCH_SIZE = 32
# A second transformer alone shows how much the ratio varies by chance.
ARMS = ("alone", "alone again", "align=False", "ended")


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def arm_of_overhead(name: str, arm: str, seed: int) -> Callable[[], None]:
    """Returns a function that takes a training step of an arm on a fixed batch, after a first step and two without alignment."""
    tiny, generator = build(name, seed), torch.Generator().manual_seed(seed)
    conditions = Conditions(tiny.arguments, generator)
    torch.manual_seed(seed)
    transformer = type(tiny.model).from_config({**tiny.model.config, **WIDER, **OVERHEAD_MODELS[name]}).train()
    shape = (OVERHEAD_BATCH_SIZE, *conditions.shape[1:])
    x_t, target = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = torch.rand(OVERHEAD_BATCH_SIZE, generator=generator)
    labels = torch.randint(NUM_CLASSES, (OVERHEAD_BATCH_SIZE,), generator=generator)
    arguments, pixels = conditions(x_t, t, labels), torch.rand(OVERHEAD_BATCH_SIZE, 3, 8, 8, generator=generator)

    model, objective = transformer, None
    if not arm.startswith("alone"):
        encoder = load_encoder("embedded:digits", grid_size=(4, 4))
        model = AlignedTransformer(
            transformer, [LAYER], [encoder], projector_dim=PROJECTOR_DIM, grid_size=(4, 4), **tiny.options
        ).train()
    if arm == "ended":
        objective = VRPO(model, max_train_steps=1000, rewards=REWARDS, alignment_stop_step=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step_of_training():
        if objective is not None:
            step = objective.begin(t)
            prediction, projections = model(**arguments, fork=step.fork, align=step.active)
        elif model is transformer:
            prediction = model(**arguments, return_dict=False)[0]
        else:
            prediction, _ = model(**arguments, align=False)
        loss_fm = (prediction[:, : shape[1]] - target).square().flatten(1).mean(1)
        loss = loss_fm.mean()
        if objective is not None:
            loss = loss + objective.alignment_coeff * objective(step, projections, pixels, loss_fm)
        loss.backward()
        if objective is not None:
            objective.observe(step)
        optimizer.step()
        optimizer.zero_grad()
        if objective is not None:
            objective.update()

    for _ in range(3):
        step_of_training()
    return step_of_training


def measure_overhead(name: str, rounds: int, seed: int) -> dict:
    """Measures the line of the results for one class: processor time and operations of a step of each arm."""
    steps = {arm: arm_of_overhead(name, arm, seed) for arm in ARMS}
    operations = {}
    for arm, step in steps.items():
        with CountOperations() as counter:
            step()
        operations[arm] = counter.count

    order, seconds = random.Random(seed), {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in order.sample(ARMS, len(ARMS)):
            start = time.process_time()
            steps[arm]()
            seconds[arm].append(time.process_time() - start)
    alone = np.array(seconds["alone"])
    ratios = {arm: np.percentile(np.array(seconds[arm]) / alone, [25, 50, 75]).round(4).tolist() for arm in ARMS[1:]}
    return {
        "model": name,
        "rounds": rounds,
        "seconds": float(np.median(alone)),
        "ratios": ratios,
        "operations": operations,
        **VERSIONS,
    }


def overhead_table(lines: list[dict]) -> str:
    """The ratios, as medians with first and third quartile, and the operations, as a Markdown table."""
    rows = [
        "| model | a step alone | alone again | `align=False` | alignment ended | operations |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in line["ratios"].values()]
        counts = line["operations"]
        more = ", ".join(f"+{counts[arm] - counts['alone']}" for arm in ARMS[2:])
        rows.append(
            f"| `{line['model']}` | {1000 * line['seconds']:.0f} ms | {' | '.join(cells)} | {counts['alone']}, {more} |"
        )
    return "\n".join(rows)


# ----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=RESULTS, default="training")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=TRANSFORMERS,
        help="models to measure (default: all; for overhead, four of them)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of weights and batches (default: 0 1 2)"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: 200)")
    parser.add_argument(
        "--rewards",
        nargs="+",
        choices=("fidelity", "semantic", "structural"),
        default=REWARDS,
        help="rewards of VRPO, which must include semantic (default: all)",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="learning rate of AdamW (default: 0.001)")
    parser.add_argument(
        "--heads",
        type=int,
        help="attention heads in a block, each with 16 channels (default: 2, as in the tiny configuration)",
    )
    parser.add_argument("--rounds", type=int, default=60, help="for overhead, steps of each arm (default: 60)")
    parser.add_argument(
        "--results", type=Path, help="file for the results, as lines of JSON (default: next to this file)"
    )
    return parser


def main(args: argparse.Namespace):
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = args.results or FOLDER / RESULTS[args.part]
    if args.part == "overhead":
        models = args.models or list(OVERHEAD_MODELS)
        if without := set(models) - set(OVERHEAD_MODELS):
            sys.exit(f"attached_models.py: error: overhead is not measured for {', '.join(sorted(without))}")
        lines = [measure_overhead(name, args.rounds, args.seeds[0]) for name in models]
        path.unlink(missing_ok=True)
        print(overhead_table([write_line(path, line) for line in lines]))
        return

    shared = {name: getattr(args, name) for name in ("rewards", "learning_rate", "steps", "heads")}
    wanted = [{"model": name, "seed": seed, **shared} for seed in args.seeds for name in args.models or TRANSFORMERS]
    found = read_lines(path)
    lines = []
    for key in wanted:
        line = next((line for line in found if key.items() <= line.items()), None)
        if line is None:
            line = write_line(path, compare(**key))
            print(
                f"{key['model']}, seed {key['seed']}: rise {line['rise']:.3f}, ratio {line['loss_ratio']:.3f}",
                flush=True,
            )
        lines.append(line)
    print(training_table(lines))
    one, by_place = reward_without_image()
    print(
        f"Without seeing an image, one token for all has a semantic reward of {one:.2f}, one for each place {by_place:.2f}."
    )


if __name__ == "__main__":
    main(build_parser().parse_args())
