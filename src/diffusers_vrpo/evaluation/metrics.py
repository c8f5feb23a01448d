# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Distances between generated images and a reference set, as pure functions of their features, in float64.

Features are `[N, D]` tensors of any floating-point dtype on any device. Distances are computed on the same device,
except for MPS, which has no float64, where the CPU is used. What the numbers mean depends on the encoder and the
number of images (docs/evaluation.md).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError


# Elements of a block of distances: 2**24 in float64 are 128 MB, whatever the size of the sets. Finding the k-th
# smallest distance of each row takes a copy of the block and as many indices.
BLOCK_ELEMENTS = 2**24


def as_float64(features: torch.Tensor) -> torch.Tensor:
    return (features.cpu() if features.device.type == "mps" else features).double()


def check_features(features: torch.Tensor, name: str = "features", at_least: int = 1):
    """Checks that `features` is a finite `[N, D]` with N >= `at_least`.

    Raises:
        InputError: if it is not; the message calls the set `name`.
    """
    if not isinstance(features, torch.Tensor):
        raise InputError(None, f"{name} must be a torch.Tensor, not a {type(features).__name__}")
    if features.ndim != 2:
        raise InputError(None, f"{name} must have the shape [images, channels], not {list(features.shape)}")
    if len(features) < at_least:
        raise InputError(None, f"{name}: {len(features)} images are too few, at least {at_least} are needed")
    # Parts stay in the processor's cache; temporary copies of a large set would cost more than the check itself.
    rows = max(1, 2**20 // max(1, features.shape[1]))
    if not all(part.isfinite().all() for part in features.split(rows)):
        bad = (~features.isfinite().all(1)).sum().item()
        raise InputError(None, f"{name}: the features of {bad} of {len(features)} images are not finite")


def check_widths(x: torch.Tensor, y: torch.Tensor, name: str):
    """Checks that two sets of features have the same number of channels.

    Raises:
        InputError: if they differ; the message calls the metric `name`.
    """
    if x.shape[1] != y.shape[1]:
        raise InputError(
            None, f"{name}: the sets have {x.shape[1]} and {y.shape[1]} channels; they must come from the same encoder"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Mean and covariance, Fréchet distance


class RunningMoments:
    """Mean and covariance of features that arrive in batches, also from several processes (Chan et al. 1979).

    Attributes:
        count (`int`): the number of features.
        mean (`torch.Tensor` of shape `(D,)`): float64.
        scatter (`torch.Tensor` of shape `(D, D)`): the sum of `(f - mean)(f - mean)^T`, float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor):
        """Adds features `[B, D]`."""
        if len(features) == 0:
            return
        features = as_float64(features).to(self.mean.device)
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: "RunningMoments"):
        """Adds all features of another `RunningMoments`."""
        if other.count:
            self._add(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _add(self, count, mean, scatter):
        total, delta = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance `scatter / (count - 1)`, `[D, D]`, float64.

        Raises:
            InputError: if there are fewer than two features.
        """
        if self.count < 2:
            raise InputError(None, f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)


def mean_and_covariance(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[D]` and unbiased covariance `[D, D]` of features `[N, D]`, float64.

    Example:

    ```python
    import torch

    from diffusers_vrpo import mean_and_covariance

    mean, covariance = mean_and_covariance(torch.randn(100, 8))  # [8], [8, 8]
    ```

    Raises:
        InputError: if there are fewer than two features, or some are not finite.
    """
    check_features(features, at_least=2)
    features = as_float64(features)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def covariance_factor(covariance: torch.Tensor) -> torch.Tensor:
    """Returns F `[D, r]` with `F F^T = covariance [D, D]`, float64; r is the rank, which is below N for N images.

    Raises:
        InputError: if `covariance` is not a covariance (it has a clearly negative eigenvalue).
    """
    eigenvalues, vectors = torch.linalg.eigh(as_float64(covariance))
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -1e-6 * largest:
        raise InputError(None, f"the matrix is not a covariance: it has the eigenvalue {eigenvalues[0].item():.3g}")
    # Drop rounding errors: their square roots would not be small (1e-16 of the largest eigenvalue becomes 1e-8).
    kept = eigenvalues > largest * len(eigenvalues) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor) -> float:
    r"""The squared Fréchet distance of two Gaussians, `|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)`.

    With features of the Inception network, this is the FID (arXiv 1706.08500). The trace of the root is computed as
    the sum of the singular values of `F1^T F2`, where `S = F F^T`. These are the square roots of the eigenvalues of
    `S1^1/2 S2 S1^1/2`, but no root is taken of a rounding error, so singular covariances (N <= D) do not need an
    offset on the diagonal.

    Example:

    ```python
    import torch

    from diffusers_vrpo import frechet_distance, mean_and_covariance

    real, generated = torch.randn(2, 100, 8)
    distance = frechet_distance(*mean_and_covariance(generated), *mean_and_covariance(real))
    ```

    Args:
        mu1, mu2: means, `[D]`.
        sigma1, sigma2: covariances, `[D, D]`; all tensors on one device.

    Raises:
        InputError: if shapes differ or are wrong, numbers are not finite, or a matrix is not a covariance.
    """
    tensors = [as_float64(torch.as_tensor(x)) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = tensors
    dim = len(mu1)
    if [list(x.shape) for x in tensors] != [[dim], [dim, dim]] * 2:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise InputError(
            None, f"the statistics cannot be compared: they have the shapes {shapes}; are they of different encoders?"
        )
    if not all(x.isfinite().all() for x in tensors):
        raise InputError(None, "the statistics are not finite; check that the features of all images are finite")
    root_trace = torch.linalg.svdvals(covariance_factor(sigma1).T @ covariance_factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return distance.clamp(min=0).item()  # rounding may make it negative


# ----------------------------------------------------------------------------------------------------------------------
# Kernel distance, Inception Score


def polynomial_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased squared MMD of `x [M, D]` and `y [N, D]` with the kernel `(x . y / D + 1)^3`; it can be below 0."""
    x, y = as_float64(x), as_float64(y)
    m, n, dim = len(x), len(y), x.shape[1]

    def kernel(a, b):
        return (a @ b.T / dim + 1) ** 3

    k_xx, k_yy = kernel(x, x), kernel(y, y)
    within_x = (k_xx.sum() - k_xx.trace()) / (m * (m - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    return (within_x + within_y - 2 * kernel(x, y).mean()).item()


def kernel_distance(
    reference: torch.Tensor, samples: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): mean and standard deviation of `polynomial_mmd` over random subsets of both sets.

    Example:

    ```python
    import torch

    from diffusers_vrpo import kernel_distance

    mean, deviation = kernel_distance(torch.randn(100, 8), torch.randn(100, 8), subsets=10, subset_size=50)
    ```

    Args:
        reference, samples: features `[N, D]`, each with at least `subset_size` rows.
        subsets: the number of subsets.
        subset_size: the images in a subset, at least 2, drawn without replacement.
        seed: seed of the subsets.

    Raises:
        InputError: if a set is too small or not finite.
    """
    if subset_size < 2:
        raise InputError(None, f"KID: a subset of {subset_size} images is too small, at least 2 are needed")
    check_features(reference, "KID, reference", at_least=subset_size)
    check_features(samples, "KID, samples", at_least=subset_size)
    check_widths(reference, samples, "KID")
    random = np.random.default_rng(seed)
    distances = []
    for _ in range(subsets):
        rows = [random.choice(len(x), subset_size, replace=False) for x in (reference, samples)]
        x, y = (x[torch.from_numpy(r).to(x.device)] for x, r in zip((reference, samples), rows))
        distances.append(polynomial_mmd(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int | None = None) -> tuple[float, float]:
    """The Inception Score `exp(mean_x KL(p(c|x) || p(c)))` (arXiv 1606.03498): mean and deviation over the splits.

    Example:

    ```python
    import torch

    from diffusers_vrpo import inception_score

    mean, deviation = inception_score(torch.randn(100, 10), seed=0)
    ```

    Args:
        logits: `[N, classes]`, before the softmax.
        splits: the number of parts, of nearly equal size, each with its own p(c).
        seed: seed of a shuffle before the split; None, the default, splits the images in order, which is wrong if they
            are sorted by class.

    Raises:
        InputError: if there are fewer images than splits, or logits are not finite.
    """
    check_features(logits, "Inception Score", at_least=splits)
    log_p = as_float64(logits).log_softmax(1)
    if seed is not None:
        log_p = log_p[torch.from_numpy(np.random.default_rng(seed).permutation(len(log_p))).to(log_p.device)]
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(0) - math.log(len(part))
        # If p is 0, the term is 0 and not 0 times infinity.
        divergence = torch.where(part.exp() > 0, part.exp() * (part - log_marginal), 0).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ----------------------------------------------------------------------------------------------------------------------
# Manifolds of nearest neighbours


def distance_blocks(x: torch.Tensor, y: torch.Tensor, block_elements: int = BLOCK_ELEMENTS):
    """Squared distances between all rows of `x [M, D]` and `y [N, D]`, in blocks of rows of x.

    Besides one block, only y is kept in float64; x is converted block by block.

    Yields:
        the slice of the rows, and the squared distances, float64 `[rows, N]`.
    """
    y = as_float64(y)
    # Centred features have small products, so that little precision is lost to cancellation.
    centre = y.mean(0)
    y = y - centre
    norms = torch.cat([part.square().sum(1) for part in y.split(4096)])
    # The computed distance of equal features is a rounding error, which must not decide whether they are neighbours.
    rounding = 16 * torch.finfo(torch.float64).eps * norms.max()
    rows = max(1, block_elements // len(y))
    for start in range(0, len(x), rows):
        part = as_float64(x[start : start + rows]) - centre
        squares = torch.addmm(part.square().sum(1, keepdim=True) + norms, part, y.T, alpha=-2)
        yield slice(start, start + len(part)), squares.masked_fill_(squares < rounding, 0)


def neighbour_radii(features: torch.Tensor, k: int, block_elements: int = BLOCK_ELEMENTS) -> torch.Tensor:
    """The squared distance of each feature to its k-th nearest neighbour, float64 `[N]`.

    Raises:
        InputError: if N <= k, or features are not finite.
    """
    check_features(features, f"nearest neighbours with k = {k}", at_least=k + 1)
    radii = [
        # The nearest feature is the feature itself.
        distances.kthvalue(k + 1, dim=1).values
        for _, distances in distance_blocks(features, features, block_elements)
    ]
    return torch.cat(radii)


def precision_recall(
    reference: torch.Tensor, samples: torch.Tensor, k: int = 3, block_elements: int = BLOCK_ELEMENTS
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991), as ADM computes them.

    The ball of an image has the distance to its k-th nearest neighbour in its own set as radius. Precision is the
    share of samples that lie in the ball of some reference image; recall is the share of reference images that lie in
    the ball of some sample.

    Example:

    ```python
    import torch

    from diffusers_vrpo import precision_recall

    precision, recall = precision_recall(torch.randn(100, 8), torch.randn(100, 8))
    ```

    Args:
        reference, samples: features `[N, D]` and `[M, D]`.
        k: the number of the neighbour.
        block_elements: distances computed at a time, which limits the memory.

    Raises:
        InputError: if a set has at most k features, or some are not finite.
    """
    reference_radii = neighbour_radii(reference, k, block_elements)
    check_features(samples, f"nearest neighbours with k = {k}", at_least=k + 1)
    check_widths(reference, samples, "precision and recall")
    sample_radii = neighbour_radii(samples, k, block_elements)
    covered_samples = torch.zeros(len(samples), dtype=torch.bool, device=reference_radii.device)
    covered_references = []
    for rows, distances in distance_blocks(reference, samples, block_elements):
        covered_samples |= (distances <= reference_radii[rows, None]).any(0)
        covered_references.append((distances <= sample_radii).any(1))
    return covered_samples.double().mean().item(), torch.cat(covered_references).double().mean().item()


def density_coverage(
    reference: torch.Tensor, samples: torch.Tensor, k: int = 5, block_elements: int = BLOCK_ELEMENTS
) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797), which outliers disturb less than precision and recall.

    Density is the mean number of reference balls (as in `precision_recall`) that contain a sample, divided by k; it
    can exceed 1. Coverage is the share of reference balls that contain a sample; its expected value is 1 - 2**-k for
    two large sets of the same size and distribution.

    Example:

    ```python
    import torch

    from diffusers_vrpo import density_coverage

    density, coverage = density_coverage(torch.randn(100, 8), torch.randn(100, 8))
    ```

    Args:
        reference, samples: features `[N, D]` and `[M, D]`.
        k: the number of the neighbour that sets the radius of a ball.
        block_elements: distances computed at a time, which limits the memory.

    Raises:
        InputError: if the reference has at most k features, a set is empty, or some features are not finite.
    """
    check_features(samples, "density and coverage, samples")
    radii = neighbour_radii(reference, k, block_elements)
    check_widths(reference, samples, "density and coverage")
    hits, covered = 0, 0
    for rows, distances in distance_blocks(reference, samples, block_elements):
        inside = distances <= radii[rows, None]
        hits += inside.sum().item()
        covered += inside.any(1).sum().item()
    return hits / (k * len(samples)), covered / len(reference)


def nearest_distances(x: torch.Tensor, y: torch.Tensor, block_elements: int = BLOCK_ELEMENTS) -> torch.Tensor:
    """The distance of each row of `x [M, D]` to the nearest row of `y [N, D]`, float64 `[M]`."""
    return torch.cat([distances.min(1).values for _, distances in distance_blocks(x, y, block_elements)]).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Alignment of two representations of the same images


def hsic(kernel1: torch.Tensor, kernel2: torch.Tensor) -> torch.Tensor:
    """The unbiased Hilbert-Schmidt independence criterion of two kernel matrices `[N, N]` (Song et al. 2012)."""
    n = len(kernel1)
    a, b = kernel1.clone().fill_diagonal_(0), kernel2.clone().fill_diagonal_(0)
    crossed = (a.sum(0) * b.sum(1)).sum()  # 1^T A B 1
    return ((a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * crossed / (n - 2)) / (n * (n - 3))


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414), from unbiased HSIC (arXiv 2010.15327); 1 is perfect.

    Example:

    ```python
    import torch

    from diffusers_vrpo import cka

    x = torch.randn(100, 8)
    similarity = cka(x, x @ torch.randn(8, 16))
    ```

    Args:
        x, y: features of the same images, `[N, D1]` and `[N, D2]`, N >= 4.

    Raises:
        InputError: for sets of different or too small size, or features that are constant or not finite.
    """
    x, y = _paired(x, y, "CKA", 4)
    a, b = x @ x.T, y @ y.T
    return _aligned(hsic(a, b), hsic(a, a), hsic(b, b), "CKA")


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment (arXiv 2405.07987): CKA over pairs that are neighbours in both.

    As in the authors' code, the kernels are inner products of normalised features, HSIC is unbiased, and a pair (i, j)
    counts if j is among the k nearest neighbours of i in both kernels. The value depends on N and k.

    Example:

    ```python
    import torch

    from diffusers_vrpo import cknna

    x = torch.randn(100, 8)
    similarity = cknna(x, x @ torch.randn(8, 16), k=10)
    ```

    Args:
        x, y: features of the same images, `[N, D1]` and `[N, D2]`, N > k.
        k: the number of neighbours, at least 2.

    Raises:
        InputError: for sets of different or too small size, or features that are constant or not finite.
    """
    if k < 2:
        raise InputError(None, f"CKNNA: k = {k} must be at least 2")
    x, y = _paired(x, y, f"CKNNA with k = {k}", max(4, k + 1))
    kernel_x, kernel_y = (F.normalize(f, dim=1) @ F.normalize(f, dim=1).T for f in (x, y))

    def neighbours(kernel):
        nearest = kernel.clone().fill_diagonal_(-math.inf).topk(k, dim=1).indices
        return torch.zeros_like(kernel).scatter_(1, nearest, 1)

    near_x, near_y = neighbours(kernel_x), neighbours(kernel_y)
    both = near_x * near_y
    within_x, within_y = hsic(near_x * kernel_x, near_x * kernel_x), hsic(near_y * kernel_y, near_y * kernel_y)
    return _aligned(hsic(both * kernel_x, both * kernel_y), within_x, within_y, "CKNNA")


def _paired(x, y, name, at_least):
    for features in (x, y):
        check_features(features, name, at_least)
        if (features - features.mean(0)).norm() <= 1e-6 * features.norm():
            raise InputError(None, f"{name}: the features of all images are equal")
    if len(x) != len(y):
        raise InputError(None, f"{name} compares features of the same images, not of {len(x)} and {len(y)}")
    return as_float64(x), as_float64(y)


def _aligned(between, within_x, within_y, name):
    if within_x <= 0 or within_y <= 0:
        raise InputError(
            None, f"{name}: one of the two representations hardly tells these images apart; use more images"
        )
    return (between / (within_x * within_y).sqrt()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Linear probe


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    l2: float = 1e-3,
    max_iterations: int = 200,
) -> tuple[float, float]:
    """Accuracy of a multinomial logistic regression on held-out and on its training features, both in [0, 1].

    Features are standardised with the mean and deviation of the training features. The loss is the mean cross-entropy
    plus `l2 / 2` times the sum of the squared weights, without the bias. It is convex, and L-BFGS minimises it over
    all features at once, so there is neither a learning rate nor a random order.

    Args:
        train_features, test_features: `[N, D]` and `[M, D]`.
        train_labels, test_labels: class ids, int64 `[N]` and `[M]`.
        l2: the weight of the penalty.
        max_iterations: the most iterations of L-BFGS.

    Raises:
        InputError: if features are not finite, the number of labels differs, or there is a single class.
    """
    for name, features, labels in (
        ("training images of the probe", train_features, train_labels),
        ("test images of the probe", test_features, test_labels),
    ):
        check_features(features, name)
        if len(features) != len(labels):
            raise InputError(None, f"{name}: {len(features)} features for {len(labels)} labels")
    check_widths(train_features, test_features, "the probe")
    x, z = as_float64(train_features), as_float64(test_features)
    labels, test_labels = train_labels.to(x.device), test_labels.to(x.device)
    if labels.min() == labels.max():
        raise InputError(None, "a probe needs training images of at least 2 classes")
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12 * std.max(), std, 1)  # a constant channel stays constant
    x, z = (x - mean) / std, (z - mean) / std

    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)

    def accuracy(features, wanted):
        return ((features @ weight.T + bias).argmax(1) == wanted).double().mean().item()

    with torch.no_grad():
        return accuracy(z, test_labels), accuracy(x, labels)
