# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The work behind the page: opening a pipeline, the order of runs, and sampling that can be stopped."""

import copy
import math
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands.sample import load_pipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.start import cast_weights
from diffusers_vrpo.pipelines.sampling import check_steps, set_sampler


MAX_STEPS, MAX_IMAGES_PER_CLASS, MAX_IMAGES, MAX_GUIDANCE_SCALE, MAX_SEED = 250, 16, 64, 8, 2**32 - 1
# The largest number of runs that compute or wait, of all clients and of one client; the seconds that a run may wait, and take.
MAX_RUNS, MAX_RUNS_PER_CLIENT, MAX_WAIT, MAX_RUN = 32, 4, 600, 600


class Stopped(Exception):
    """Raised between two steps of a run whose result is not wanted any more."""


def open_pipeline(name: str, dtype: str | None = None) -> VRPOPipeline:
    """Opens the pipeline of a folder or Hub repository, on the GPU if there is one.

    Args:
        dtype: precision of the transformer, such as `"bfloat16"`; by default `"bfloat16"` on a GPU and `"float32"` on a CPU.

    Raises:
        InputError: if the pipeline cannot be opened, or cannot make images.
    """
    pipeline = load_pipeline(name, revision=None, variant=None, cache_dir=None)
    try:
        pipeline.check_inputs(1, 1, 1.0, (0.0, 1.0), 1, output_type="pil", tensor_inputs=())
    except ValueError as error:
        raise InputError(None, f"PIPELINE {name}: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.to(device)
    cast_weights(pipeline.transformer, dtype or ("bfloat16" if device == "cuda" else "float32"))
    return pipeline


def class_choices(pipeline: VRPOPipeline) -> list[tuple[str, int]]:
    """`(text, id)` of every trained class. The text has the id and, if there is one, the name, so that both can be searched."""
    names = pipeline.config.id2label
    return [(f"{names[str(i)]} ({i})" if str(i) in names else f"class {i}", i) for i in pipeline.trained_labels]


def class_name(pipeline: VRPOPipeline, class_id: int) -> str:
    """The first of the synonyms in the name of a class, or `class ID` if it has no name."""
    return pipeline.config.id2label.get(str(class_id), f"class {class_id}").split(",")[0].strip()


def check_number(name: str, value, low: int, high: int, is_whole: bool = True):
    """Checks that `value` is a number from `low` to `high`, both included.

    Raises:
        InputError: if it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not is_number or not low <= value <= high or (is_whole and value != int(value)):
        raise InputError(
            None, f"{name} must be a {'whole ' if is_whole else ''}number from {low} to {high}, not {value}"
        )


class Turns:
    """The order of the runs: one run computes at a time, in the order of their arrival.

    Args:
        most: largest number of runs that compute or wait at the same time.
        most_per_client: largest number of these runs for one client.
        longest_wait: seconds after which a run that still waits is refused.
    """

    def __init__(
        self, most: int = MAX_RUNS, most_per_client: int = MAX_RUNS_PER_CLIENT, longest_wait: float = MAX_WAIT
    ):
        self.most, self.most_per_client, self.longest_wait = most, most_per_client, longest_wait
        self.places: list[tuple[str, object]] = []
        self.changed = threading.Condition()

    @contextmanager
    def place(self, client: str):
        """Holds a place in the order, for `wait`, until the context ends.

        Args:
            client: identifies who asks, such as an address.

        Raises:
            InputError: if this client, or all clients together, already have too many runs.
        """
        place = (client, object())
        with self.changed:
            if sum(each == client for each, _ in self.places) >= self.most_per_client:
                raise InputError(
                    None, f"You already have {self.most_per_client} runs here; wait until one of them has ended"
                )
            if len(self.places) >= self.most:
                raise InputError(None, f"{self.most} runs are already waiting here; try again in a few minutes")
            self.places.append(place)
        try:
            yield place
        finally:
            with self.changed:
                self.places.remove(place)
                self.changed.notify_all()

    def wait(self, place: tuple[str, object]) -> Iterator[int]:
        """Yields the number of runs before a place, about every second, until it is the place's turn.

        Raises:
            InputError: after `longest_wait` seconds.
        """
        end = time.monotonic() + self.longest_wait
        while True:
            with self.changed:
                before = self.places.index(place)
            if not before:
                return
            if time.monotonic() > end:
                raise InputError(None, "There are too many runs before this one; try again later")
            yield before
            with self.changed:
                if self.places.index(place) == before:
                    self.changed.wait(timeout=1)


def run(pipeline: VRPOPipeline, turn: threading.Lock, **arguments) -> Iterator[tuple[int, int] | list]:
    """Yields `(completed steps, steps)` while the pipeline runs, and then its images.

    The pipeline runs in a thread of its own. Closing the generator never waits for it; the pipeline then stops after a step.

    Args:
        turn: a lock that is held while the pipeline runs, so that a run waits for a closed one that is about to end.
        arguments: arguments of the pipeline.

    Raises:
        InputError: if latents are not finite. Any other exception of the pipeline is raised, too.
    """
    news, unwanted = queue.SimpleQueue(), threading.Event()

    def after_step(pipeline, step, timestep, tensors):
        if unwanted.is_set():
            raise Stopped
        if not tensors["latents"].isfinite().all():
            raise InputError(None, f"The numbers of step {step + 1} are not finite; try a lower guidance scale")
        news.put((step + 1, pipeline.num_timesteps))
        return tensors

    def work():
        try:
            with turn:
                news.put(pipeline(callback_on_step_end=after_step, **arguments).images)
        except Exception as error:
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        item = None
        while not isinstance(item, list):
            item = news.get()
            while not news.empty():  # only the newest step is shown
                item = news.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        unwanted.set()


def check_choices(
    classes: list[int],
    images_per_class: int,
    steps: int,
    guidance_scale: float,
    guided_from: float,
    guided_to: float,
    seed: int,
):
    """Checks the choices for a run, before it waits for its turn.

    Raises:
        InputError: about the first choice that cannot work.
    """
    if not isinstance(classes, list) or not classes:
        raise InputError(None, "Choose at least one class.")
    check_number("Images per class", images_per_class, 1, MAX_IMAGES_PER_CLASS)
    check_number("Steps", steps, 1, MAX_STEPS)
    check_number("Guidance scale", guidance_scale, 1, MAX_GUIDANCE_SCALE, is_whole=False)
    check_number("Guided from t", guided_from, 0, 1, is_whole=False)
    check_number("Guided to t", guided_to, guided_from, 1, is_whole=False)
    check_number("Seed", seed, 0, MAX_SEED)
    if len(classes) * images_per_class > MAX_IMAGES:
        raise InputError(
            None,
            f"{len(classes)} classes with {images_per_class} images each are more than {MAX_IMAGES} images; choose fewer",
        )


def generate(
    pipeline: VRPOPipeline,
    turn: threading.Lock,
    classes: list[int],
    images_per_class: int,
    steps: int,
    guidance_scale: float,
    guided_from: float,
    guided_to: float,
    sampler: str,
    seed: int,
) -> Iterator[tuple[int, int] | list]:
    """Yields as `run` does, and at the end a list of `(image, class id, seed)`. Image k of each class has the seed `seed + k`.

    Args:
        turn: the lock of `run`.
        sampler: one of the `SAMPLERS` for what the model predicts, or `"default"`.

    Raises:
        InputError: if the pipeline does not accept a choice.
    """
    check_choices(classes, images_per_class, steps, guidance_scale, guided_from, guided_to, seed)
    count = int(images_per_class)

    # All users share the weights but not the scheduler, so that one user's choice has no effect on the next user.
    scheduler = copy.deepcopy(pipeline.scheduler)
    names, trained_labels = pipeline.config.id2label, pipeline.trained_labels
    pipeline = VRPOPipeline(pipeline.transformer, scheduler, pipeline.vae, names, trained_labels)
    pipeline.set_progress_bar_config(disable=True)
    labels = [c for c in classes for _ in range(count)]
    seeds = [(int(seed) + k) % (MAX_SEED + 1) for _ in classes for k in range(count)]
    try:
        set_sampler(pipeline, sampler, "of this page")
        check_steps(pipeline, int(steps))
        for item in run(
            pipeline,
            turn,
            class_labels=labels,
            num_inference_steps=int(steps),
            guidance_scale=guidance_scale,
            guidance_interval=(guided_from, guided_to),
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ):
            yield item if isinstance(item, tuple) else list(zip(item, labels, seeds))
    except ValueError as error:
        # Names of options are replaced by the labels of the page.
        words = {"`num_inference_steps`": "Steps", "`sampler`": "Sampler", "`guidance_scale`": "Guidance scale"}
        field = error.field if isinstance(error, InputError) else None
        raise InputError(field, re.sub("|".join(words), lambda found: words[found[0]], str(error))) from error
    except torch.OutOfMemoryError as error:
        raise InputError(None, f"There is not enough memory for {len(labels)} images at once; choose fewer") from error
