# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Statistics of training images, and the rewards that compare samples with them."""

import math

import pytest
import torch

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.feature_statistics import (
    FeatureSet,
    known_statistics,
    read_statistics,
    save_statistics,
)
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder
from diffusers_vrpo.evaluation.metrics import mean_and_covariance
from diffusers_vrpo.experimental.generative import rewards as sample_rewards
from diffusers_vrpo.experimental.generative.objective import mmd_witness, oas_shrinkage, shrink, transport_map
from diffusers_vrpo.experimental.generative.rewards import (
    REFRESH_UPDATES,
    SampleRewards,
    class_statistics,
    import_reward,
    load_reward_functions,
    parse_reward_weights,
    reference_statistics,
)
from support.encoders import transformers_output


CLASSES = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]])


def features_of(labels, seed=0, shift=0.0, spread=1.0):
    """Three classes around points of their own; the shallow vectors have three channels and no classes."""
    generator = torch.Generator().manual_seed(seed)
    pool = CLASSES[labels] + spread * torch.randn(len(labels), 4, generator=generator) + shift
    return {"pool": pool, "shallow": spread * torch.randn(len(labels), 3, generator=generator) - shift}


LABELS = torch.arange(600) % 3


@pytest.fixture(scope="module")
def real():
    return reference_statistics(features_of(LABELS), LABELS, 5)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_class_statistics_by_hand():
    """Directions from the centre along both axes; the odd image alone in its class has no prototype."""
    features = torch.tensor([[2.0, 0], [4, 0], [0, 3], [0, 1], [-6, -4]])
    found = class_statistics(features, torch.tensor([1, 1, 3, 3, 4]), 6)
    torch.testing.assert_close(found["centre"], torch.zeros(2))
    assert found["class_ids"].tolist() == [1, 3]
    torch.testing.assert_close(found["prototypes"], torch.eye(2))
    # Cosines 1 and 0 to the classes, without an error: the lowest temperature is the likeliest.
    assert found["temperature"] == pytest.approx(1e-3)
    torch.testing.assert_close(found["medians"], torch.zeros(2))


def test_each_image_is_measured_against_prototypes_without_it():
    labels = LABELS[:60]
    features = features_of(labels, spread=2.0)["pool"]
    found = class_statistics(features, labels, 3)
    unit = torch.nn.functional.normalize(features - features.mean(0), dim=1).double()

    def log_p(temperature):
        values = []
        for i in range(60):
            others = torch.arange(60) != i
            prototypes = torch.stack([unit[others & (labels == c)].sum(0) for c in range(3)])
            cosines = torch.nn.functional.normalize(prototypes, dim=1) @ unit[i]
            values.append((cosines / temperature).log_softmax(0)[labels[i]])
        return torch.stack(values)

    temperature = found["temperature"].item()
    expected = torch.stack([log_p(temperature)[labels == c].median() for c in range(3)])
    torch.testing.assert_close(found["medians"], expected.float(), atol=1e-4, rtol=1e-4)
    best = log_p(temperature).mean()
    assert 1e-3 < temperature < 1
    assert best > log_p(temperature * 1.3).mean() and best > log_p(temperature / 1.3).mean()
    # It is no part of its own prototype: where labels mean nothing, nothing is found.
    noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(3))
    assert class_statistics(noise, labels, 3)["medians"].mean() < math.log(1 / 3) + 0.05


def test_too_few_images_for_classes():
    features = torch.randn(4, 3)
    with pytest.raises(InputError, match=r"`reward_reference_images` 4 has 1; use more"):
        class_statistics(features, torch.tensor([0, 0, 1, 2]), 3)


def test_reference_statistics(real, monkeypatch):
    features = features_of(LABELS)
    for name in ("pool", "shallow"):
        mean, covariance = mean_and_covariance(features[name])
        torch.testing.assert_close(real[f"{name}.mean"], mean)
        torch.testing.assert_close(real[f"{name}.covariance"], covariance)
        distances = torch.cdist(features[name], features[name])[torch.ones(600, 600).triu(1).bool()]
        assert real[f"{name}.bandwidth"].item() == pytest.approx(distances.median().item(), rel=1e-3)
    # Only some features are kept; the moments are of all.
    monkeypatch.setattr(sample_rewards, "KEPT_FEATURES", 100)
    fewer = reference_statistics(features, LABELS, 5)
    assert len(fewer["pool"]) == len(fewer["shallow"]) == len(fewer["labels"]) == 100
    torch.testing.assert_close(fewer["pool.covariance"], real["pool.covariance"])


def test_reference_file(real, tmp_path):
    """It is a file of statistics as `vrpo evaluate` reads them, with all that the rewards need."""
    file, description = tmp_path / "new" / "reference.safetensors", {"encoder": "x", "images": {"size": [8, 8]}}
    assert known_statistics(file, description) is None
    save_statistics(FeatureSet.from_tensors(600, real), description, file)
    found, about = read_statistics(file)
    assert found.count == 600 and about == description and torch.equal(found.pool, real["pool"])
    assert torch.equal(found.moments["pool"][0], real["pool.mean"])
    assert torch.equal(found.moments["pool"][1], real["pool.covariance"])
    loaded = known_statistics(file, description).tensors()
    assert loaded.keys() == real.keys()
    for name, tensor in real.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert known_statistics(file, {**description, "encoder": "y"}) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    content = file.read_bytes()
    for torn in (content[:-100], content[:50], b""):
        file.write_bytes(torn)
        assert known_statistics(file, description) is None
    (tmp_path / "occupied").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_statistics(found, description, tmp_path / "occupied" / "reference.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def test_the_semantic_reward_is_capped_at_real_images(real):
    rewards = SampleRewards(real, 64, "mmd")
    values = rewards.semantic(None, features_of(LABELS, seed=1), LABELS)
    labels, caps = LABELS, real["medians"][LABELS]
    assert (values <= caps).all()
    for c in range(3):
        # Half of the real images of a class are at least typical.
        at_cap = (values == caps)[labels == c].float().mean()
        assert 0.35 < at_cap < 0.65
        assert values[labels == c].median() == pytest.approx(real["medians"][c].item(), abs=0.1)
    # Being more typical than that is worth nothing; another class is worth less.
    typical = {"pool": 10 * CLASSES, "shallow": torch.zeros(3, 3)}
    ids = torch.arange(3)
    torch.testing.assert_close(rewards.semantic(None, typical, ids), real["medians"])
    assert (rewards.semantic(None, typical, (ids + 1) % 3) < real["medians"] - 1).all()


def test_classes_by_id():
    labels = torch.tensor([2, 2, 7, 7, 4] * 20)
    labels[(labels == 4).nonzero()[1:]] = 7
    reference = reference_statistics({"pool": torch.randn(100, 4), "shallow": torch.randn(100, 2)}, labels, 9)
    assert reference["class_ids"].tolist() == [2, 7]
    rewards = SampleRewards(reference, 16, "mmd")
    assert rewards.has_prototype(torch.tensor([0, 2, 4, 7, 8])).tolist() == [False, True, False, True, False]
    features = {"pool": torch.randn(2, 4)}
    both = [rewards.semantic(None, features, torch.tensor([c, c])) for c in (2, 7)]
    log_p = sample_rewards.class_log_probability(
        features["pool"], reference["centre"], reference["prototypes"], reference["temperature"]
    )
    for column, values in enumerate(both):
        torch.testing.assert_close(values, log_p[:, column].clamp(max=reference["medians"][column]))
    # Real images without a prototype are left out where the rewards look at real ones.
    rewards.push({"pool": torch.randn(8, 4), "shallow": torch.randn(8, 2)})
    assert rewards.real_std.isfinite().all()


@pytest.mark.parametrize("kind", ["frechet", "mmd"])
def test_better_samples_get_higher_rewards(real, kind):
    """The model is off; samples as real images are get more than its own, those beyond get less."""
    rewards = SampleRewards(real, 300, kind)
    ids = torch.arange(300) % 3
    rewards.push(features_of(ids, seed=1, shift=0.7))
    values = [rewards(None, features_of(ids, seed=2, shift=shift), ids).mean(0) for shift in (0.0, 0.7, 1.4)]
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    # Too narrow or too wide at the right place: what is missing is worth more.
    for spread, better in ((0.6, 1.2), (1.6, 0.8)):
        rewards = SampleRewards(real, 300, kind)
        rewards.push(features_of(ids, seed=1, spread=spread))
        values = [rewards(None, features_of(ids, seed=2, spread=s), ids).mean(0) for s in (spread, better)]
        assert (values[1] > values[0])[:2].all()


@pytest.mark.parametrize("kind", ["frechet", "mmd"])
def test_what_the_rewards_look_at(real, kind):
    rewards, ids = SampleRewards(real, 200, kind), LABELS[:200]
    samples, features = features_of(ids, seed=1, shift=0.3), features_of(LABELS[:30], seed=2)
    rewards.push(samples)
    values = rewards(None, features, LABELS[:30])
    assert values.dtype == torch.float64 and values.shape == (30, 3)
    assert rewards.names == ["fidelity", "perceptual", "semantic"]
    for column, name in enumerate(("pool", "shallow")):
        if kind == "mmd":
            expected = mmd_witness(features[name], samples[name], real[name], real[f"{name}.bandwidth"]).double()
        else:
            mu, sigma = mean_and_covariance(samples[name])
            amount = oas_shrinkage(sigma, 200)
            transport = transport_map(shrink(sigma, amount), shrink(real[f"{name}.covariance"], amount))
            delta = features[name].double() - mu
            quadratic = torch.einsum("bi,ij,bj->b", delta, torch.eye(len(mu)).double() - transport, delta)
            expected = -(2 * delta @ (mu - real[f"{name}.mean"]) + quadratic)
        torch.testing.assert_close(values[:, column], expected, atol=1e-5, rtol=1e-5)
    # Their mean and spread over real images, against which a batch's spread is held.
    on_real = rewards(None, {name: real[name] for name in ("pool", "shallow")}, LABELS)
    torch.testing.assert_close(rewards.real_mean, on_real.mean(0))
    torch.testing.assert_close(rewards.real_std, on_real.std(0, correction=0))


def numbered(first, count):
    rows = torch.arange(first, first + count).float()
    return {"pool": rows[:, None].expand(-1, 4), "shallow": -rows[:, None].expand(-1, 3)}


def test_the_queue_is_a_ring(real):
    rewards, size = SampleRewards(real, 10, "mmd"), 10
    latest, first = [], 0
    for count in (4, 4, 4, 1, 10, 23, 7):
        rewards.push(numbered(first, count))
        latest = (latest + list(range(first, first + count)))[-size:]
        first += count
        assert sorted(rewards.queue("pool")[:, 0].tolist()) == latest
        assert sorted(rewards.queue("shallow")[:, 2].tolist()) == [-row for row in reversed(latest)]


def test_covariances_are_looked_at_every_ten_updates(real):
    rewards = SampleRewards(real, 600, "frechet")
    seen = []
    for update in range(2 * REFRESH_UPDATES + 2):
        rewards.push(features_of(LABELS[:60], seed=update, shift=0.1 * update))
        seen.append(
            (
                rewards.state["transport.pool"].clone(),
                rewards.state["transport.shallow"].clone(),
                rewards.real_std.clone(),
            )
        )
    for update in range(1, len(seen)):
        same = [torch.equal(a, b) for a, b in zip(seen[update - 1], seen[update])]
        assert same == [update % REFRESH_UPDATES > 0] * 3, update


@pytest.mark.parametrize("kind", ["frechet", "mmd"])
def test_a_saved_state_gives_the_same_rewards(real, kind):
    rewards = SampleRewards(real, 100, kind)
    for update in range(12):
        rewards.push(features_of(LABELS[:30], seed=update))
    state = {name: tensor.clone() for name, tensor in rewards.state_dict().items()}
    restored = SampleRewards(real, 100, kind)
    restored.load_state_dict(state)
    features = features_of(LABELS[:40], seed=99)
    for update in range(12, 25):  # past a refresh
        values = [r(None, features, LABELS[:40]) for r in (rewards, restored)]
        assert torch.equal(*values) and values[0].isfinite().all()
        assert torch.equal(rewards.real_std, restored.real_std) and torch.equal(rewards.real_mean, restored.real_mean)
        for r in (rewards, restored):
            r.push(features_of(LABELS[:30], seed=update))


# ----------------------------------------------------------------------------------------------------------------------
# Options


def test_reward_weights():
    names = ["fidelity", "perceptual", "semantic"]
    assert parse_reward_weights(None, names) == [1 / 3] * 3
    assert parse_reward_weights("2, 1,1", names) == [0.5, 0.25, 0.25]
    assert parse_reward_weights("0,0,3", names) == [0, 0, 1]
    for wrong in ("1,1", "1,1,1,1", "1,1,-1", "0,0,0", "1,x,1", "", "1,1,nan", "nan,1,1", "1,inf,1"):
        with pytest.raises(InputError, match="must be 3 numbers >= 0.*fidelity, perceptual, semantic"):
            parse_reward_weights(wrong, names)


def test_reward_functions(tmp_path, real):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Scale:\n"
        "    value: float = 255.0\n"
        "number = 3\n"
        "def bright(images, features, labels):\n"
        "    return images.float().mean((1, 2, 3)) / Scale().value\n"
        "def semantic(images, features, labels):\n"
        "    return labels\n"
        "def wide(images, features, labels):\n"
        "    return features['pool']\n"
        "def listed(images, features, labels):\n"
        "    return [1.0] * len(labels)\n"
        "def lost(images, features, labels):\n"
        "    return labels * float('nan')\n"
    )
    function = import_reward(f"{file}:bright")
    images = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 51, 255)])
    torch.testing.assert_close(function(images, {}, None), torch.tensor([0.0, 0.2, 1.0]))

    rewards = SampleRewards(real, 64, "mmd", load_reward_functions([f"{file}:bright"]))
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)
    rewards.push(features_of(LABELS[:30], seed=1), some)
    assert rewards.names[3:] == ["bright"]
    torch.testing.assert_close(rewards.real_mean[3], some.float().mean().double() / 255)
    values = rewards(images, features_of(LABELS[:3], seed=2), LABELS[:3])
    torch.testing.assert_close(values[:, 3].float(), torch.tensor([0.0, 0.2, 1.0]))

    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    for argument, message in (
        (f"{tmp_path}/nowhere.py:f", "does not exist"),
        (str(file), "is not FILE.py:NAME"),
        ("no_such_package:bright", "cannot be imported .*no_such_package"),
        (f"{file}:dark", "has no function 'dark'"),
        (f"{file}:number", "has no function 'number'"),
        (f"{broken}:f", "cannot be imported .*nothing_of_that_name"),
    ):
        with pytest.raises(InputError, match=message):
            import_reward(argument)
    for arguments in ([f"{file}:semantic"], [f"{file}:bright", f"{file}:bright"]):
        with pytest.raises(InputError, match="is already called"):
            load_reward_functions(arguments)
    for name, message in (
        ("wide", r"'wide' must return a tensor of shape \[3\], not \[3, 4\]"),
        ("listed", "'listed' must return a tensor .*not list"),
        ("lost", "'lost' is not finite"),
    ):
        rewards = SampleRewards(real, 64, "mmd", load_reward_functions([f"{file}:{name}"]))
        rewards.state["queue.pool"].zero_()
        rewards.count = 64
        with pytest.raises(InputError, match=message):
            rewards(images, features_of(LABELS[:3], seed=2), LABELS[:3])


# ----------------------------------------------------------------------------------------------------------------------
# Shallow features of the encoder


@pytest.mark.parametrize(
    "name, layer, prefix", [("dinov2", 1, 1), ("dinov2", 0, 1), ("dinov2-registers", 1, 4), ("siglip", 2, 0)]
)
def test_shallow_features_of_a_vit(encoder_checkpoint, name, layer, prefix):
    encoder = load_image_encoder(str(encoder_checkpoint(name)))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, *encoder.input_size), generator=generator, dtype=torch.uint8)
    plain = encoder(images)
    assert plain.keys() == {"pool"}
    encoder.take_shallow(layer)
    found = encoder(images)
    states = transformers_output(
        encoder_checkpoint(name), name, encoder.preprocess(images), output_hidden_states=True
    ).hidden_states
    assert found["shallow"].shape == (3, 32) and found["shallow"].dtype == torch.float32
    torch.testing.assert_close(found["shallow"], states[layer][:, prefix:].mean(1), atol=1e-5, rtol=1e-5)
    assert (found["shallow"] - states[layer].mean(1)).abs().max() > 1e-4 or prefix == 0
    assert torch.equal(found["pool"], plain["pool"])


@pytest.mark.parametrize("name", ["resnet", "convnext", "dinov3-convnext", "swin"])
def test_shallow_features_of_a_conv_net(encoder_checkpoint, name):
    encoder = load_image_encoder(str(encoder_checkpoint(name)))
    encoder.take_shallow(1)
    images = torch.randint(0, 256, (2, 3, *encoder.input_size), dtype=torch.uint8)
    output = transformers_output(encoder_checkpoint(name), name, encoder.preprocess(images), output_hidden_states=True)
    state = (getattr(output, "reshaped_hidden_states", None) or output.hidden_states)[1]
    assert state.ndim == 4
    torch.testing.assert_close(encoder(images)["shallow"], state.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_which_shallow_layer(encoder_checkpoint):
    encoder = load_image_encoder(str(encoder_checkpoint("dinov2")))  # three hidden states
    encoder.take_shallow()
    assert encoder.shallow_layer == 1
    for layer in (3, -1):
        with pytest.raises(InputError, match=rf"`reward_shallow_layer` {layer}: .*hidden states 0 to 2"):
            encoder.take_shallow(layer)
    assert encoder.shallow_layer == 1
    deep = load_image_encoder(str(encoder_checkpoint("deep-resnet")))
    deep.take_shallow()
    assert deep.shallow_layer == 2
