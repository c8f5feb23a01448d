# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The exact judge of digit grids: do the four digits of a sample obey the rule of the training images?

It sees pixels only. A support vector machine that is fitted to the training digits classifies every cell. Distances are
measured in principal components of the training digits' pixels. It shares nothing with an encoder or a reward.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from diffusers_vrpo.assets.digit_grids import PARTNERS, digit_images, grid_images, images_to_cells
from diffusers_vrpo.evaluation.metrics import frechet_distance, mean_and_covariance


COMPONENTS = 20  # principal components of a cell's 64 pixels


class GridJudge:
    """Compares grids with the held-out ones; `grid_judge()` returns the judge of this process.

    Attributes:
        accuracy (`float`): accuracy of the classifier on held-out digits, in [0, 1].
    """

    def __init__(self):
        (train, labels), (held_out, held_out_labels) = digit_images("train"), digit_images("validation")
        train, held_out = (
            digits.reshape(len(digits), 64).astype(np.float32) / 127.5 - 1 for digits in (train, held_out)
        )
        self.classifier = SVC(C=10, gamma=0.02).fit(train, labels)
        self.accuracy = self.classifier.score(held_out, held_out_labels)
        self.train = torch.from_numpy(train)
        self.mean = self.train.mean(0)
        _, _, directions = torch.linalg.svd(self.train - self.mean, full_matrices=False)
        self.components = directions[:COMPONENTS].T
        grids = torch.from_numpy(grid_images("validation"))[:, None].float() / 127.5 - 1
        cells = self.cells(grids)
        self.reference_cell, self.reference_joint = self.moments(cells.flatten(0, 1)), self.moments(cells.flatten(1))

    @staticmethod
    def cells(images: torch.Tensor) -> torch.Tensor:
        """The pixels of each cell, `[B, 4, 64]`, of images `[B, 1, 16, 16]`, clamped to [-1, 1]."""
        return images_to_cells(images.float().clamp(-1, 1)).flatten(2)

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of the principal components of cells, `[B, 64]`, or of all cells of a grid, `[B, 4 * 64]`."""
        components = (pixels.unflatten(1, (-1, 64)) - self.mean) @ self.components
        return mean_and_covariance(components.flatten(1))

    def latent_classes(self, cells: torch.Tensor) -> torch.Tensor:
        """The class c of the grid that each cell `[B, 4, 64]` implies: its own class, or pi's inverse of it; int64 `[B, 4]`."""
        classes = self.classifier.predict(cells.flatten(0, 1).numpy()).reshape(-1, 4)
        inverse = np.argsort(PARTNERS)
        classes[:, 1:3] = inverse[classes[:, 1:3]]
        return torch.from_numpy(classes).long()

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        """Measures grids `[B, 1, 16, 16]` with pixels in [-1, 1].

        Returns:
            `pairs`: share of the six pairs of cells that obey the rule (chance 0.10, real held-out grids 0.96);
            `rule`: share of grids in which all four cells obey it (chance 0.001, real 0.93); `entropy`: entropy of the most
            frequent class c of each grid, relative to that of ten equally frequent classes; `nn`: mean distance of a cell to
            the nearest training digit; `fd_cell`, `fd_joint`: Fréchet distances to held-out cells, and to held-out grids as a
            whole.
        """
        cells = self.cells(images)
        votes = F.one_hot(self.latent_classes(cells), 10).sum(1)
        share = F.one_hot(votes.argmax(1), 10).double().mean(0)
        return {
            "pairs": ((votes * (votes - 1)).sum(1) / 12).mean().item(),
            "rule": (votes.amax(1) == 4).double().mean().item(),
            "entropy": torch.special.entr(share).sum().item() / math.log(10),
            "nn": torch.cdist(cells.flatten(0, 1), self.train).amin(1).mean().item(),
            "fd_cell": frechet_distance(*self.reference_cell, *self.moments(cells.flatten(0, 1))),
            "fd_joint": frechet_distance(*self.reference_joint, *self.moments(cells.flatten(1))),
        }


@cache
def grid_judge() -> GridJudge:
    return GridJudge()
