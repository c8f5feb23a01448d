# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Rewards for generated images: statistics of training images, and three rewards that compare samples with them.

A reward is a plain function `reward(images, features, labels) -> Tensor[B]`. `images` are uint8 `[B,3,H,W]`, `features` are
those of the frozen reward encoder (`pool` and `shallow`, float32 `[B,D]`), and `labels` are class ids, int64 `[B]`. Higher
is better, in any unit. Both the built-in rewards and those of `reward_function` have this form. Formulas: objective.py.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...alignment.custom_encoders import import_file
from ...errors import InputError, first_line
from ...evaluation.metrics import RunningMoments
from .objective import (
    class_directions,
    class_log_probability,
    frechet_influence,
    mmd_witness,
    oas_shrinkage,
    shrink,
    transport_map,
)


REWARDS = ("fidelity", "perceptual", "semantic")
FIDELITY_REWARDS = ("auto", "frechet", "mmd")
VECTORS = {"fidelity": "pool", "perceptual": "shallow"}  # the features of each distributional reward
ENOUGH_FOR_FRECHET = 10_000  # with fewer training images, `auto` uses the MMD
KEPT_FEATURES = 10_000  # real features in the statistics file, for the MMD, recall and the rewards of real images
REAL_VALUES = 1024  # real images from which the rewards' mean and spread over real images are computed
REFRESH_UPDATES = 10  # updates after which the covariance of the samples in the Fréchet influence is computed again
Reward = Callable[[torch.Tensor, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of training images


def class_statistics(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> dict[str, torch.Tensor]:
    """Computes the statistics of training images for the semantic reward.

    A prototype is the mean direction of a class. The temperature maximises the likelihood of the images, where each image is
    compared with prototypes that exclude it.

    Args:
        features: `[N,D]`.
        labels: int64 `[N]`.
        num_classes: the number of classes, which is above all labels.

    Returns:
        tensors by name: `centre [D]`; `prototypes [C,D]` and `class_ids [C]` of the classes with at least two images;
        `medians [C]` of `log p(c|f)` over the images of c; `temperature []`.

    Raises:
        InputError: if fewer than two classes have at least two images.
    """
    features = features.float()
    centre = features.mean(0)
    directions = class_directions(features, centre)
    counts = torch.bincount(labels, minlength=num_classes)
    class_ids = (counts >= 2).nonzero().flatten()
    if len(class_ids) < 2:
        raise InputError(
            "reward_reference_images",
            f"the semantic reward needs at least 2 classes with 2 training images each, and `reward_reference_images` "
            f"{len(labels)} has {len(class_ids)}; use more",
        )
    place = torch.full((num_classes,), -1, dtype=torch.long)
    place[class_ids] = torch.arange(len(class_ids))
    known = place[labels] >= 0
    directions, own = directions[known], place[labels[known]]
    sums = torch.zeros(len(class_ids), features.shape[1]).index_add_(0, own, directions)
    products = directions @ torch.nn.functional.normalize(sums, dim=1).T
    without = torch.nn.functional.normalize(sums[own] - directions, dim=1)
    products.scatter_(1, own[:, None], (without * directions).sum(1, keepdim=True))
    temperatures = torch.logspace(-3, 0, 61)
    likelihoods = [(products / t).log_softmax(1).gather(1, own[:, None]).mean() for t in temperatures]
    temperature = temperatures[torch.stack(likelihoods).argmax()]
    log_p = (products / temperature).log_softmax(1).gather(1, own[:, None]).squeeze(1)
    medians = torch.stack([log_p[own == c].median() for c in range(len(class_ids))])
    return {
        "centre": centre,
        "prototypes": torch.nn.functional.normalize(sums, dim=1),
        "class_ids": class_ids,
        "medians": medians,
        "temperature": temperature,
    }


def reference_statistics(
    features: dict[str, torch.Tensor], labels: torch.Tensor, num_classes: int
) -> dict[str, torch.Tensor]:
    """Computes the tensors of a statistics file from features of training images.

    `FeatureSet.from_tensors` accepts them, so that `vrpo evaluate --reference` can also read the file.

    Args:
        features: `pool` and `shallow` features, `[N,D]`, in random order.
        labels: int64 `[N]`.
        num_classes: the number of classes.
    """
    tensors = {"labels": labels[:KEPT_FEATURES].contiguous()}
    for name, values in features.items():
        moments = RunningMoments(values.shape[1])
        for part in values.split(4096):
            moments.update(part)
        tensors |= {f"{name}.mean": moments.mean, f"{name}.covariance": moments.covariance}
        kept = tensors[name] = values[:KEPT_FEATURES].float().contiguous()
        # The median distance between two real images, from at most 2,000 of them.
        distances = torch.nn.functional.pdist(kept[:2000])
        tensors[f"{name}.bandwidth"] = distances.median()
    return tensors | class_statistics(features["pool"], labels, num_classes)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def load_reward_functions(entries: Sequence[Callable | str]) -> dict[str, Reward]:
    """Loads user-defined rewards by name.

    Args:
        entries: functions, or their names as `"FILE.py:NAME"` or `"package.module:name"`.

    Raises:
        InputError: if a function does not exist, or its name is taken.
    """
    functions = {}
    for entry in entries:
        function = import_reward(entry) if isinstance(entry, str) else entry
        name = getattr(function, "__name__", type(function).__name__)
        if name in (*REWARDS, *functions):
            raise InputError(
                "reward_function",
                f"`reward_function` {entry}: another reward is already called {name!r}; give the function another name",
            )
        functions[name] = function
    return functions


def import_reward(entry: str) -> Reward:
    """Imports the function of `"FILE.py:NAME"` or `"package.module:name"`.

    Raises:
        InputError: if the function does not exist.
    """
    source, _, name = entry.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError("reward_function", f"`reward_function` {entry}: the file {source} does not exist")
    if not source or not name.isidentifier():
        raise InputError(
            "reward_function", f"`reward_function` {entry} is not FILE.py:NAME or package.module:name of a function"
        )
    try:
        module = import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the imported code can raise anything
        raise InputError(
            "reward_function", f"`reward_function` {entry}: {source} cannot be imported ({first_line(error)})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError("reward_function", f"`reward_function` {entry}: {source} has no function {name!r}")
    return function


def parse_reward_weights(text: str | None, names: list[str]) -> list[float]:
    """Parses `reward_weights`, one number per reward, and returns `s_k` with the sum 1; None means equal weights.

    Raises:
        InputError: if the text does not have one number >= 0 per reward, or all are 0.
    """
    try:
        numbers = [1.0] * len(names) if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise InputError(
            "reward_weights",
            f"`reward_weights` {text} must be {len(names)} numbers >= 0, separated by commas, with a sum above 0, for "
            f"{', '.join(names)}",
        )
    return [number / sum(numbers) for number in numbers]


class SampleRewards:
    """The rewards of a run, and the features of its latest samples, on which two of the rewards depend.

    Args:
        reference: the tensors of `reference_statistics`, on the device.
        queue_size: the number of latest samples that represent the model's distribution.
        fidelity_reward: `"frechet"` or `"mmd"`.
        functions: further rewards by name.
        device: the device of the statistics, which are float64 for Fréchet and therefore on the CPU for MPS.

    Attributes:
        names (`list[str]`): the names of the K rewards.
        real_mean, real_std (`torch.Tensor` of shape `(K,)`): mean and standard deviation of the rewards over real images at
            the last refresh.
    """

    def __init__(
        self,
        reference: dict[str, torch.Tensor],
        queue_size: int,
        fidelity_reward: str,
        functions: dict[str, Reward] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.reference, self.fidelity_reward = reference, fidelity_reward
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.rewards: dict[str, Reward] = {
            "fidelity": self.fidelity,
            "perceptual": self.perceptual,
            "semantic": self.semantic,
            **(functions or {}),
        }
        self.names = list(self.rewards)
        num_rewards = len(self.names)
        self.state = {
            f"queue.{name}": torch.zeros(queue_size, reference[name].shape[1], device=self.device)
            for name in VECTORS.values()
        }
        # The number of features that have been added to the queue, and the number of updates.
        self.count, self.updates = 0, 0
        if fidelity_reward == "frechet":
            for name in VECTORS.values():
                dim = reference[name].shape[1]
                self.state[f"transport.{name}"] = torch.zeros(dim, dim, device=self.device, dtype=torch.float64)
        self.state["real_mean"] = torch.zeros(num_rewards, device=self.device, dtype=torch.float64)
        self.state["real_std"] = torch.zeros(num_rewards, device=self.device, dtype=torch.float64)
        self.place = torch.full((int(reference["class_ids"].max()) + 1,), -1, dtype=torch.long, device=self.device)
        self.place[reference["class_ids"]] = torch.arange(len(reference["class_ids"]), device=self.device)

    @property
    def real_mean(self) -> torch.Tensor:
        return self.state["real_mean"]

    @property
    def real_std(self) -> torch.Tensor:
        return self.state["real_std"]

    def queue(self, name: str) -> torch.Tensor:
        """The latest features of samples, `[n,D]`."""
        return self.state[f"queue.{name}"][: self.count]

    def push(self, features: dict[str, torch.Tensor], real_images: torch.Tensor | None = None):
        """Adds the features of an update's samples to the queue, and calls `refresh` every `REFRESH_UPDATES` updates.

        Args:
            features: `pool` and `shallow` features `[n,D]` of all processes' samples, the same on each process.
            real_images: uint8 images of the first rows of the reference, for rewards that need images.
        """
        for name in VECTORS.values():
            queue = self.state[f"queue.{name}"]
            new = features[name].to(self.device).float()[-len(queue) :]
            at = (self.count + torch.arange(len(new), device=self.device)) % len(queue)
            queue[at] = new
        self.count += len(new)
        if self.updates % REFRESH_UPDATES == 0:
            self.refresh(real_images)
        self.updates += 1

    def refresh(self, real_images: torch.Tensor | None = None):
        """Updates the covariances from the queue, and the rewards' values on real images."""
        if self.fidelity_reward == "frechet":
            for name in VECTORS.values():
                rows = self.queue(name)
                moments = RunningMoments(rows.shape[1], self.device)
                moments.update(rows)
                # Both are shrunk by the same amount, so that T is the identity if they are equal.
                amount = oas_shrinkage(moments.covariance, len(rows))
                pair = (shrink(s, amount) for s in (moments.covariance, self.reference[f"{name}.covariance"]))
                self.state[f"transport.{name}"].copy_(transport_map(*pair))
        labels = self.reference["labels"][: REAL_VALUES if real_images is None else len(real_images)]
        known = self.has_prototype(labels)
        features = {name: self.reference[name][: len(labels)][known] for name in VECTORS.values()}
        images = None if real_images is None else real_images[known.to(real_images.device)]
        values = self(images, features, labels[known])
        self.state["real_mean"].copy_(values.mean(0))
        self.state["real_std"].copy_(values.std(0, correction=0))

    def has_prototype(self, labels: torch.Tensor) -> torch.Tensor:
        """Whether each label is of a class with a prototype, bool `[B]`."""
        labels = labels.to(self.device)
        return (labels < len(self.place)) & (self.place[labels.clamp(max=len(self.place) - 1)] >= 0)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor | None, features: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        """Computes all rewards, float64 `[B,K]`.

        Args:
            images: uint8 `[B,3,H,W]`; may be None if there are no user-defined rewards.
            features: `pool` and `shallow` features, `[B,D]`.
            labels: ids of classes with a prototype, `[B]`.

        Raises:
            InputError: if a function does not return one finite number per image.
        """
        columns = []
        for name, reward in self.rewards.items():
            values = reward(images, features, labels)
            if not isinstance(values, torch.Tensor) or tuple(values.shape) != (len(labels),):
                found = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise InputError(
                    None, f"the reward {name!r} must return a tensor of shape [{len(labels)}], not {found}"
                )
            columns.append(values.detach().to(self.device, torch.float64))
        rewards = torch.stack(columns, dim=1)
        if not rewards.isfinite().all():
            bad = self.names[int((~rewards.isfinite()).any(0).nonzero()[0])]
            raise InputError(None, f"the reward {bad!r} is not finite; it must return a finite number for every image")
        return rewards

    def fidelity(self, images, features, labels) -> torch.Tensor:
        """A sample's influence on the distance between samples and training images in the encoder's feature vectors."""
        return self._distributional(features, "pool")

    def perceptual(self, images, features, labels) -> torch.Tensor:
        """The same influence in the vectors of a shallow layer, which show colours, edges and textures."""
        return self._distributional(features, "shallow")

    def _distributional(self, features, name) -> torch.Tensor:
        rows, queue, reference = features[name].to(self.device), self.queue(name), self.reference
        if self.fidelity_reward == "mmd":
            return mmd_witness(rows, queue, reference[name], reference[f"{name}.bandwidth"])
        mu_g = queue.double().mean(0)
        return frechet_influence(rows, mu_g, reference[f"{name}.mean"], self.state[f"transport.{name}"])

    def semantic(self, images, features, labels) -> torch.Tensor:
        """`min(log p(c|f), its median over training images of c)`, so that a sample gains nothing beyond a typical image."""
        reference = self.reference
        log_p = class_log_probability(
            features["pool"].to(self.device), reference["centre"], reference["prototypes"], reference["temperature"]
        )
        place = self.place[labels.to(self.device)]
        return torch.minimum(log_p.gather(1, place[:, None]).squeeze(1), reference["medians"][place])

    def state_dict(self) -> dict[str, torch.Tensor]:
        counts = torch.tensor([self.count, self.updates])
        return {**self.state, "counts": counts}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        self.count, self.updates = state_dict["counts"].tolist()
        for name, tensor in self.state.items():
            tensor.copy_(state_dict[name])
