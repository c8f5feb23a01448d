# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What the page's buttons do, without the page: opening a pipeline, and samples from it that can be stopped."""

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
# Runs that are computed or wait, of all clients and of one; the longest that one may wait, and take, in seconds.
MAX_RUNS, MAX_RUNS_PER_CLIENT, MAX_WAIT, MAX_RUN = 32, 4, 600, 600


class Stopped(Exception):
    """Raised between two steps of a run that nobody waits for any more."""


def open_pipeline(name: str, dtype: str | None = None) -> VRPOPipeline:
    """The pipeline of a folder or Hub repository, on the GPU where there is one.

    Args:
        dtype: of the transformer, such as `"bfloat16"`; when not given, that on a GPU and `"float32"` on a CPU.

    Raises:
        InputError: when it cannot be opened, or makes no images.
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
    """`(text, id)` of every trained class; the text has the name, where there is one, and the id: it is found by both."""
    names = pipeline.config.id2label
    return [(f"{names[str(i)]} ({i})" if str(i) in names else f"class {i}", i) for i in pipeline.trained_labels]


def class_name(pipeline: VRPOPipeline, class_id: int) -> str:
    """The first of a class's synonyms."""
    return pipeline.config.id2label.get(str(class_id), f"class {class_id}").split(",")[0].strip()


def check_number(name: str, value, low: int, high: int, is_whole: bool = True):
    """An InputError if `value` is not a number in `low ... high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not is_number or not low <= value <= high or (is_whole and value != int(value)):
        raise InputError(
            None, f"{name} must be a {'whole ' if is_whole else ''}number from {low} to {high}, not {value}"
        )


class Turns:
    """The order of the runs: one is computed at a time, in the order of their arrival.

    Args:
        most: runs that may be computed or wait at once.
        most_per_client: those of one client.
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
            client: who asks, such as an address.

        Raises:
            InputError: if this client, or all together, have too many runs already.
        """
        place = (client, object())
        with self.changed:
            if sum(each == client for each, _ in self.places) >= self.most_per_client:
                raise InputError(
                    None, f"You have {self.most_per_client} runs here already; wait until one of them has ended"
                )
            if len(self.places) >= self.most:
                raise InputError(None, f"{self.most} runs are waiting here already; try again in some minutes")
            self.places.append(place)
        try:
            yield place
        finally:
            with self.changed:
                self.places.remove(place)
                self.changed.notify_all()

    def wait(self, place: tuple[str, object]) -> Iterator[int]:
        """Yields the number of runs before a place, every second, until its turn.

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
    """Yields `(steps done, steps)` while the pipeline runs, then its images; closed, it ends the run after a step.

    The pipeline runs in a thread of its own, so that closing never waits for it.

    Args:
        turn: held while the pipeline runs, so that a run waits for one that is about to end.

    Raises:
        InputError: when latents are not finite. What else the pipeline raises is raised too.
    """
    news, unwanted = queue.SimpleQueue(), threading.Event()

    def after_step(pipeline, step, timestep, tensors):
        if unwanted.is_set():
            raise Stopped
        if not tensors["latents"].isfinite().all():
            raise InputError(
                None, f"Step {step + 1} gave numbers that are not finite; is the guidance scale too high?"
            )
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
            while not news.empty():  # steps that are over need not be shown
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
    """Checks what somebody has chosen, before it waits for its turn.

    Raises:
        InputError: for the first choice that cannot work.
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
            f"{len(classes)} classes with {images_per_class} images each are more than {MAX_IMAGES} images; take fewer",
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
    """As `run`; at the end a list of `(image, class id, seed)`. Image k of every class has the seed `seed + k`.

    Args:
        sampler: one of `sample.SAMPLERS` for what the model predicts, or `"default"`.

    Raises:
        InputError: for what the pipeline does not take, in a sentence.
    """
    check_choices(classes, images_per_class, steps, guidance_scale, guided_from, guided_to, seed)
    count = int(images_per_class)

    # Weights are shared by all users, schedulers are not: what one chose must not stay for the next.
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
        # In the words of the page, not of the library.
        words = {"`num_inference_steps`": "Steps", "`sampler`": "Sampler", "`guidance_scale`": "Guidance scale"}
        field = error.field if isinstance(error, InputError) else None
        raise InputError(field, re.sub("|".join(words), lambda found: words[found[0]], str(error))) from error
    except torch.OutOfMemoryError as error:
        raise InputError(None, f"There is not enough memory for {len(labels)} images at once; take fewer") from error
