#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare our FID network and metrics with torch-fidelity's, and the network with pytorch-fid's if it is installed.

    pip install torch-fidelity pytorch-fid
    python benchmarks/metric_parity.py
    python benchmarks/metric_parity.py --weights weights-inception-2015-12-05-6726825d.pth

The networks have the same weights: random ones, with activations of order one in every block, unless --weights is given.
Images are random and of several sizes. For each feature the largest difference divided by the largest value is printed. The
metrics are computed from the same random features, and both values are printed.
"""

import tempfile
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusers_vrpo.command_line import OneLineErrorParser
from diffusers_vrpo.evaluation import metrics as evaluation
from diffusers_vrpo.evaluation.inception import FIDInception, inception_from_state, load_inception, resize_bilinear


SIZES = ((64, 64), (256, 256), (299, 299), (512, 300))


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = FIDInception().state_dict()
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            value.copy_(noise.sigmoid() + 0.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(0.3 * noise)
        elif name.startswith("fc."):
            value.copy_(0.03 * noise)
    return state


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def torch_fidelity_features(model, images: torch.Tensor) -> dict[str, torch.Tensor]:
    spatial = []
    handle = model.Mixed_6d.branch1x1.register_forward_hook(lambda _, arguments, output: spatial.append(output))
    pool, logits = model(images)
    handle.remove()
    return {"pool": pool, "spatial": spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1), "logits": logits}


def pytorch_fid_features(state, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features of pytorch-fid's network on our resized input, because its own resize is not TensorFlow's."""
    from pytorch_fid import inception

    load = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *arguments, **options: state
    try:
        model = inception.InceptionV3([3], resize_input=False, normalize_input=False)
    finally:
        inception.load_state_dict_from_url = load
    with torch.no_grad():
        return {"pool": model.eval()((resize_bilinear(images.float()) - 128) / 128)[0].flatten(1)}


def compare_metrics():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 64, generator=generator).relu()
    y = (1.1 * torch.randn(600, 64, generator=generator) + 0.1).relu()
    logits = 2 * torch.randn(600, 10, generator=generator)
    quiet = {"verbose": False}
    moments = [*evaluation.mean_and_covariance(x), *evaluation.mean_and_covariance(y)]
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), **quiet)
    print("FID:", evaluation.frechet_distance(*moments), theirs)
    # One subset with all images is used, because the content of smaller ones depends on the random numbers.
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=600, **quiet)
    print("KID:", evaluation.kernel_distance(x, y, 1, 600), theirs)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    print("Inception Score:", evaluation.inception_score(logits, 10), theirs)
    # Samples come first there.
    theirs = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=100, **quiet)
    print("precision, recall:", evaluation.precision_recall(x, y), theirs)


def main():
    parser = OneLineErrorParser(prog="metric_parity.py", description=__doc__)
    parser.add_argument("--weights", help="file of the published weights; random weights if not given")
    args = parser.parse_args()
    state = load_inception(args.weights).state_dict() if args.weights else random_weights()
    ours = inception_from_state(state)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        weights = {"feature_extractor_weights_path": str(Path(folder) / "weights.pth")}
        theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], **weights)
    others = {"torch-fidelity": lambda images: torch_fidelity_features(theirs, images)}
    try:
        import pytorch_fid  # noqa: F401

        others["pytorch-fid"] = lambda images: pytorch_fid_features(state, images)
    except ImportError:
        print("pytorch-fid is not installed")
    for height, width in SIZES:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
        found = ours(images)
        for name, features in others.items():
            numbers = [f"{key} {difference(found[key], value):.1e}" for key, value in features(images).items()]
            print(f"{height}x{width}, {name}: {', '.join(numbers)}")
    compare_metrics()


if __name__ == "__main__":
    main()
