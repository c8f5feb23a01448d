# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Ridge read-outs: how much of an encoder's features a linear map recovers from the tokens of a transformer block."""

import torch


class BlockReadouts:
    """One ridge regression per block, from its tokens to the features of all layers of an encoder, fitted in one pass.

    Like the projector of an alignment, a read-out is shared by all tokens and noise levels. The mean at each position
    is subtracted from the features and, separately for each noise level, from the tokens, so that a read-out predicts
    the differences between images and not the position of a token. Only sums are kept in memory.

    Args:
        num_blocks (`int`): the number of blocks.
        num_levels (`int`): the number of noise levels at which every image is seen.
        widths (`list[int]`): the channels of each layer; features are the layers joined, `[B,N,E]` with E their sum.
    """

    def __init__(self, num_blocks: int, num_levels: int, widths: list[int]):
        self.num_blocks, self.num_levels, self.widths = num_blocks, num_levels, list(widths)
        self.count = 0
        self.target: torch.Tensor | None = None  # sums of features, `[N,E]`
        self.tokens: dict[tuple[int, int], torch.Tensor] = {}  # sums by block and level, `[N,D]`
        self.shifts: dict = {}  # means of the first batch, subtracted from all values to keep the products small
        self.products: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # sums by block, `[D,D]` and `[D,E]`
        self.weights: dict[int, torch.Tensor] = {}
        self.left: torch.Tensor | None = None  # squared errors, `[blocks, levels, layers]`
        self.total: torch.Tensor | None = None  # squared deviations from the mean, `[layers]`

    def add(self, level: int, tokens: list[torch.Tensor], features: torch.Tensor):
        """Adds images to the fit.

        Args:
            level: the number of the noise level; every batch of images must be added at each level, 0 first.
            tokens: the tokens of each block, `[B,N,D]`.
            features: `[B,N,E]`, the same at every level.
        """
        y = self._shifted("features", features)
        if level == 0:
            self.count += len(features)
            sums = y.sum(0).to(accumulator(y))
            self.target = sums if self.target is None else self.target + sums
        for block, states in enumerate(tokens):
            x = self._shifted((block, level), states)
            sums = x.sum(0).to(accumulator(x))
            self.tokens[block, level] = self.tokens.get((block, level), 0) + sums
            flat = x.flatten(0, 1)
            new = (flat.T @ flat).to(sums.dtype), (flat.T @ y.flatten(0, 1)).to(sums.dtype)
            old = self.products.get(block, (0, 0))
            self.products[block] = (old[0] + new[0], old[1] + new[1])

    def fit(self, l2: float):
        """Solves for the read-outs; `l2` penalises weights of standardised tokens, relative to the error per token."""
        for block, (xx, xy) in self.products.items():
            for level in range(self.num_levels):
                sums = self.tokens[block, level]
                xx = xx - sums.T @ sums / self.count
                xy = xy - sums.T @ self.target / self.count
            number = self.count * len(self.target) * self.num_levels
            variance = xx.diagonal() / number
            scale = variance.clamp_min(1e-10 * variance.max().clamp_min(1e-30)).sqrt()
            matrix = xx / number / scale / scale.unsqueeze(1)
            matrix.diagonal().add_(l2)
            solution = torch.linalg.solve(matrix, xy / number / scale.unsqueeze(1))
            self.weights[block] = (solution / scale.unsqueeze(1)).float()
        self.products.clear()

    def score(self, level: int, tokens: list[torch.Tensor], features: torch.Tensor):
        """Adds the errors on other images; the arguments are those of `add`."""
        y = self._shifted("features", features) - (self.target / self.count).float()
        if self.left is None:
            self.left = torch.zeros(self.num_blocks, self.num_levels, len(self.widths), dtype=torch.float64)
            self.total = torch.zeros(len(self.widths), dtype=torch.float64)
        if level == 0:
            self.total += self._by_layer(y)
        for block, states in enumerate(tokens):
            x = self._shifted((block, level), states) - (self.tokens[block, level] / self.count).float()
            self.left[block, level] += self._by_layer(y - x @ self.weights[block])

    def recoverability(self) -> torch.Tensor:
        """R² on the images of `score`, `[blocks, levels, layers]`; 1 if a read-out recovers the features exactly."""
        return 1 - self.left / self.total.clamp_min(1e-30)

    def _shifted(self, key, values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        return values - self.shifts.setdefault(key, values.mean(0))

    def _by_layer(self, values: torch.Tensor) -> torch.Tensor:
        squares = values.square().sum((0, 1)).split(self.widths)
        return torch.stack([part.sum() for part in squares]).double().cpu()


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of sums: float64, except on MPS, which does not have it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def gaps(recoverability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over noise levels of the recoverability and its gap to the best block at each level, `[blocks, layers]`.

    Args:
        recoverability: `[blocks, levels, layers]`; values below 0 count as 0.
    """
    found = recoverability.clamp_min(0)
    return found.mean(1), (found.amax(0, keepdim=True) - found).mean(1)


def recommend(found: torch.Tensor, gap: torch.Tensor, least: float = 0.02) -> tuple[int, int] | None:
    """Recommends a block and the layer of the encoder to align it with, both counted from 0.

    It is the pair with the largest `(found / best) (gap / best)`, where `best = found + gap`. The product is largest
    if a block has half of the best block's recoverability: the layer is within reach of the block, and alignment can
    still add something. Only blocks before the best block of a layer, with a gap of at least `least`, are candidates.

    Args:
        found, gap: as `gaps` returns them, `[blocks, layers]`.
        least: the smallest gap.

    Returns:
        the block and the layer, or None if there are no candidates.
    """
    best = (found + gap).clamp_min(1e-12)
    before = torch.arange(len(found)).unsqueeze(1) < found.argmax(0)
    score = torch.where(before & (gap >= least), found * gap / best.square(), 0.0)
    if not score.any():
        return None
    return divmod(int(score.argmax()), found.shape[1])
