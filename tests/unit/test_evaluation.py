# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Metrics of feature sets, against direct definitions, SciPy and scikit-learn."""

import math
import warnings
from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation import metrics as evaluation


def gaussian_features(count, dim, seed=0, shift=0.0, decay=1.0):
    """Correlated features whose variances fall off by `decay` from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    scales = decay ** torch.arange(dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scales @ mixing.T + shift


def scipy_frechet(mu1, sigma1, mu2, sigma2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())
    return ((mu1 - mu2) ** 2).sum().item() + np.trace(sigma1.numpy() + sigma2.numpy() - 2 * root.real)


def newton_schulz_frechet(mu1, sigma1, mu2, sigma2, iterations=60):
    """The root of the product by the coupled Newton-Schulz iteration."""
    product = sigma1 @ sigma2
    norm = product.norm()
    y, z, identity = product / norm, torch.eye(len(mu1), dtype=product.dtype), torch.eye(len(mu1), dtype=product.dtype)
    for _ in range(iterations):
        t = (3 * identity - z @ y) / 2
        y, z = y @ t, t @ z
    return ((mu1 - mu2) ** 2).sum().item() + (sigma1 + sigma2).trace().item() - 2 * (y.trace() * norm.sqrt()).item()


@pytest.mark.parametrize("dim, decay", [(1, 1.0), (8, 0.9), (64, 0.97)])
def test_frechet_distance_is_that_of_scipy_and_of_newton_schulz(dim, decay):
    first = evaluation.mean_and_covariance(gaussian_features(500, dim, seed=0, decay=decay))
    second = evaluation.mean_and_covariance(gaussian_features(700, dim, seed=1, shift=0.3, decay=decay))
    distance = evaluation.frechet_distance(*first, *second)
    assert distance == pytest.approx(scipy_frechet(*first, *second), rel=1e-6)
    assert distance == pytest.approx(newton_schulz_frechet(*first, *second), rel=1e-6)
    assert distance == pytest.approx(evaluation.frechet_distance(*second, *first), rel=1e-12)


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: the squared differences of means and of standard deviations."""
    std1, std2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.5, 1e-4])
    mu1, mu2 = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, -1.0])
    distance = evaluation.frechet_distance(mu1, std1.square().diag(), mu2, std2.square().diag())
    assert distance == pytest.approx(5 + 4 + 2.25 + 1e-8, rel=1e-9)


@pytest.mark.parametrize("count, dim", [(500, 32), (30, 32), (20, 200), (2, 16)])
def test_a_set_has_no_distance_to_itself(count, dim):
    statistics = evaluation.mean_and_covariance(100 * gaussian_features(count, dim, decay=0.95))
    assert evaluation.frechet_distance(*statistics, *statistics) < 1e-6


@pytest.mark.parametrize("count, dim", [(20, 64), (64, 64)])
def test_fewer_images_than_channels(count, dim):
    """Against the nuclear norm of the product of the centred features, which needs no D x D root at all."""
    x, y = gaussian_features(count, dim), gaussian_features(2 * count, dim, seed=1, shift=0.1)
    (mu1, sigma1), (mu2, sigma2) = evaluation.mean_and_covariance(x), evaluation.mean_and_covariance(y)
    centred = (x - mu1) / math.sqrt(len(x) - 1), (y - mu2) / math.sqrt(len(y) - 1)
    root_trace = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    assert evaluation.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_takes_float32_and_a_large_mean():
    """A common offset cancels, as the covariance is taken around the mean."""
    x, y = gaussian_features(400, 16, decay=0.8), gaussian_features(400, 16, seed=1, decay=0.8)
    plain = evaluation.frechet_distance(*evaluation.mean_and_covariance(x), *evaluation.mean_and_covariance(y))
    x, y = (x + 1000).float(), (y + 1000).float()
    far = evaluation.frechet_distance(*evaluation.mean_and_covariance(x), *evaluation.mean_and_covariance(y))
    assert far == pytest.approx(plain, rel=1e-3)


def test_wrong_statistics_are_refused():
    mu, sigma = evaluation.mean_and_covariance(gaussian_features(50, 8))
    with pytest.raises(InputError, match=r"shapes \[8\], \[8, 8\], \[4\], \[4, 4\]"):
        evaluation.frechet_distance(mu, sigma, mu[:4], sigma[:4, :4])
    with pytest.raises(InputError, match="not finite"):
        evaluation.frechet_distance(mu * math.nan, sigma, mu, sigma)
    with pytest.raises(InputError, match="not a covariance: it has the eigenvalue -"):
        evaluation.frechet_distance(mu, sigma - torch.eye(8), mu, sigma)
    with pytest.raises(InputError, match="1 images are too few"):
        evaluation.mean_and_covariance(torch.ones(1, 8))
    with pytest.raises(InputError, match="1 of 50 images are not finite"):
        evaluation.mean_and_covariance(gaussian_features(50, 8).index_fill(0, torch.tensor(3), math.inf))


def test_merged_moments_are_those_of_all():
    features = 50 + gaussian_features(1000, 24, decay=0.8)
    mean, covariance = features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)
    parts = [evaluation.RunningMoments(24) for _ in range(3)]
    for i, batch in enumerate(features.float().double().split(77)):
        parts[i % 3].update(batch)
    parts[0].update(features[:0])
    merged = evaluation.RunningMoments(24)
    for part in parts:
        merged.merge(part)
    merged.merge(evaluation.RunningMoments(24))
    assert merged.count == 1000
    assert torch.allclose(merged.mean, torch.from_numpy(mean), rtol=1e-6)
    assert np.abs(merged.covariance.numpy() - covariance).max() < 1e-6 * np.abs(covariance).max()
    with pytest.raises(InputError, match="at least 2 images, not 1"):
        one = evaluation.RunningMoments(24)
        one.update(features[:1])
        one.covariance  # noqa: B018


def direct_mmd(x, y):
    """Double sums, as the definition has them."""

    def kernel(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kernel_distance():
    x, y = gaussian_features(12, 5), gaussian_features(15, 5, seed=1, shift=0.5)
    assert evaluation.polynomial_mmd(x, y) == pytest.approx(direct_mmd(x.numpy(), y.numpy()), rel=1e-12)
    # Subsets that are the whole sets.
    mean, std = evaluation.kernel_distance(x, y[:12], subsets=3, subset_size=12)
    assert mean == pytest.approx(direct_mmd(x.numpy(), y[:12].numpy()), rel=1e-12)
    assert std < 1e-12
    # Unbiased: the mean over many small subsets is the estimate from all.
    mean, std = evaluation.kernel_distance(x, y, subsets=4000, subset_size=4)
    assert abs(mean - direct_mmd(x.numpy(), y.numpy())) < 4 * std / math.sqrt(4000)
    assert std > 0
    again = evaluation.kernel_distance(x, y, subsets=20, subset_size=4, seed=3)
    assert again == evaluation.kernel_distance(x, y, subsets=20, subset_size=4, seed=3)
    assert again != evaluation.kernel_distance(x, y, subsets=20, subset_size=4, seed=4)
    with pytest.raises(InputError, match="KID, reference: 12 images are too few, at least 13"):
        evaluation.kernel_distance(x, y, subset_size=13)


def test_inception_score():
    logits = 2 * torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1).numpy()
    scores = []
    for i in range(3):
        part = p[10 * i : 10 * i + 10]
        divergence = [sum(q * (math.log(q) - math.log(part.mean(0)[c])) for c, q in enumerate(row)) for row in part]
        scores.append(math.exp(np.mean(divergence)))
    assert evaluation.inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    # Certain and evenly spread over the classes: as many as there are; all alike: 1.
    assert evaluation.inception_score(1e4 * torch.eye(7).repeat(4, 1), splits=2)[0] == pytest.approx(7)
    assert evaluation.inception_score(logits[:1].expand(30, 7), splits=1)[0] == pytest.approx(1)
    # Sorted by class, consecutive parts see one class each.
    by_class = 1e4 * torch.eye(7).repeat_interleave(20, dim=0)
    assert evaluation.inception_score(by_class, splits=7)[0] == pytest.approx(1)
    assert evaluation.inception_score(by_class, splits=7, seed=0)[0] > 5
    with pytest.raises(InputError, match="30 images are too few, at least 31"):
        evaluation.inception_score(logits, splits=31)


def direct_neighbours(reference, samples, k):
    """Radii and memberships by plain loops."""
    reference, samples = reference.numpy(), samples.numpy()

    def radii(x):
        return [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    inside_reference = [
        [np.linalg.norm(s - r) <= radius for r, radius in zip(reference, radii(reference))] for s in samples
    ]
    inside_samples = [
        [np.linalg.norm(s - r) <= radius for s, radius in zip(samples, radii(samples))] for r in reference
    ]
    return np.array(inside_reference), np.array(inside_samples)


@pytest.mark.parametrize("block_elements", [1, 100, 2**26])
@pytest.mark.parametrize("k, shift", [(1, 0.5), (3, 1.0), (5, 0.0)])
def test_neighbour_metrics_are_those_of_plain_loops(k, shift, block_elements):
    reference, samples = gaussian_features(25, 3), gaussian_features(31, 3, seed=1, shift=shift)
    inside_reference, inside_samples = direct_neighbours(reference, samples, k)
    found = evaluation.precision_recall(reference, samples, k, block_elements)
    assert found == pytest.approx((inside_reference.any(1).mean(), inside_samples.any(1).mean()), abs=1e-12)
    found = evaluation.density_coverage(reference, samples, k, block_elements)
    expected = inside_reference.sum() / (k * len(samples)), inside_reference.any(0).mean()
    assert found == pytest.approx(expected, abs=1e-12)


def test_neighbour_metrics_at_the_ends():
    x = gaussian_features(40, 4)
    assert evaluation.precision_recall(x, x) == (1, 1)
    assert evaluation.density_coverage(x, x)[1] == 1
    assert evaluation.precision_recall(x, x + 100) == (0, 0)
    assert evaluation.density_coverage(x, x + 100) == (0, 0)
    # One mode of two: all of it is real, half of the reference is found.
    two_modes = torch.cat([x, x + 100])
    precision, recall = evaluation.precision_recall(two_modes, x + 100)
    assert (precision, recall) == (1, 0.5)
    assert evaluation.nearest_distances(x, two_modes).max() == 0
    # Copies of one image are within each other's balls of radius 0.
    copies = torch.cat([x, x[:1].expand(5, 4)])
    assert evaluation.precision_recall(copies, x[:1].expand(7, 4))[0] == 1
    with pytest.raises(InputError, match="k = 3 must be a torch.Tensor, not a ndarray"):
        evaluation.precision_recall(np.ones((9, 4)), np.ones((9, 4)))
    with pytest.raises(InputError, match="k = 3: 3 images are too few, at least 4"):
        evaluation.precision_recall(x[:3], x)
    with pytest.raises(InputError, match="not finite"):
        evaluation.density_coverage(x, x / 0)


def test_coverage_of_equal_distributions():
    """1 - 2^-k in expectation (arXiv 2002.09797), for any distribution."""
    covered = [
        evaluation.density_coverage(gaussian_features(800, 2, 2 * i), gaussian_features(800, 2, 2 * i + 1), k=2)[1]
        for i in range(3)
    ]
    # gaussian_features draws another rotation for each seed; without decay it changes nothing.
    assert np.mean(covered) == pytest.approx(1 - 2**-2, abs=0.03)


def direct_hsic(a, b):
    """The unbiased estimator as sums over distinct indices (Song et al. 2012)."""
    n = len(a)
    pairs = list(permutations(range(n), 2))
    first = sum(a[i][j] * b[i][j] for i, j in pairs) / len(pairs)
    second = sum(a[i][j] * b[q][r] for i, j, q, r in permutations(range(n), 4)) / math.perm(n, 4)
    third = sum(a[i][j] * b[i][q] for i, j, q in permutations(range(n), 3)) / math.perm(n, 3)
    return first + second - 2 * third


def test_unbiased_hsic_and_cka():
    x, y = gaussian_features(7, 3), gaussian_features(7, 4, seed=1)
    a, b = x @ x.T, y @ y.T
    assert evaluation.hsic(a, b).item() == pytest.approx(direct_hsic(a.tolist(), b.tolist()), rel=1e-10)
    x = gaussian_features(200, 6)
    rotation = torch.linalg.qr(gaussian_features(6, 6, seed=2))[0]
    assert evaluation.cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-9)
    assert abs(evaluation.cka(x, gaussian_features(200, 6, seed=5))) < 0.05
    with pytest.raises(InputError, match="same images, not of 200 and 100"):
        evaluation.cka(x, x[:100])
    with pytest.raises(InputError, match="the features of all images are equal"):
        evaluation.cka(x, torch.ones(200, 2))


def test_cknna():
    x, y = gaussian_features(60, 5), gaussian_features(60, 8, seed=1)
    rotation = torch.linalg.qr(gaussian_features(5, 5, seed=2))[0]
    assert evaluation.cknna(x, 2 * x @ rotation) == pytest.approx(1, abs=1e-9)
    assert evaluation.cknna(x, y) < 0.3
    mixed = [evaluation.cknna(x, x + noise * gaussian_features(60, 5, seed=3)) for noise in (0.1, 0.5, 2.0)]
    assert 1 > mixed[0] > mixed[1] > mixed[2] > 0
    # With all others as neighbours it is CKA of the normalised features.
    unit = F.normalize(x, dim=1), F.normalize(y, dim=1)
    assert evaluation.cknna(x, y, k=59) == pytest.approx(evaluation.cka(*unit), abs=1e-9)
    # Plain loops.
    kernels = [(u @ u.T).numpy() for u in unit]
    near = [[set(np.argsort(-np.where(np.eye(60), -np.inf, k)[i])[:4]) for i in range(60)] for k in kernels]

    def masked(which, kernel):
        rows = range(60)
        return torch.tensor([[kernel[i][j] if all(j in near[w][i] for w in which) else 0 for j in rows] for i in rows])

    between = evaluation.hsic(masked([0, 1], kernels[0]), masked([0, 1], kernels[1]))
    within = [evaluation.hsic(masked([w], kernels[w]), masked([w], kernels[w])) for w in (0, 1)]
    assert evaluation.cknna(x, y, k=4) == pytest.approx((between / (within[0] * within[1]).sqrt()).item(), rel=1e-9)


def test_linear_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (600,), generator=generator)
    centres = torch.randn(4, 10, generator=generator)
    features = centres[labels] + 1.2 * torch.randn(600, 10, generator=generator)
    features[:, 7] = 3.0  # a channel that says nothing
    train, test = slice(0, 400), slice(400, 600)
    held_out, training = evaluation.linear_probe(features[train], labels[train], features[test], labels[test], l2=0.01)

    mean, std = features[train].double().mean(0), features[train].double().std(0, correction=0)
    std[7] = 1
    scaled = ((features.double() - mean) / std).numpy()
    reference = LogisticRegression(C=1 / (0.01 * 400), tol=1e-8, max_iter=1000).fit(scaled[:400], labels[train])
    assert held_out == pytest.approx(reference.score(scaled[400:], labels[test]), abs=1e-9)
    assert training == pytest.approx(reference.score(scaled[:400], labels[train]), abs=1e-9)
    assert 0.5 < held_out < 1

    with pytest.raises(InputError, match="at least 2 classes"):
        evaluation.linear_probe(features[train], labels[train] * 0, features[test], labels[test])
    with pytest.raises(InputError, match="200 features for 400 labels"):
        evaluation.linear_probe(features[train], labels[train], features[test], labels[train])


def test_sets_of_other_encoders_are_refused():
    x, y, labels = torch.rand(9, 3), torch.rand(9, 4), torch.arange(9) % 2
    for measured in (
        lambda: evaluation.kernel_distance(x, y, 2, 3),
        lambda: evaluation.precision_recall(x, y, 2),
        lambda: evaluation.density_coverage(x, y, 2),
        lambda: evaluation.linear_probe(x, labels, y, labels, 0.1),
    ):
        with pytest.raises(InputError, match="have 3 and 4 channels; they must come from the same encoder"):
            measured()
