# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image, resize_and_crop
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.samples import StreamBatchSampler, TrainingSamples
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_sets import open_images
from diffusers_vrpo.models.autoencoder import decoded_side, encode_images, latent_layout, latent_shape, load_vae
from support.data import png, write_parquet
from support.models import tiny_vae


def make_samples(tmp_path, rows=10, **changes):
    data, _, _ = load_image_dataset(write_parquet(tmp_path / "data", [i % 2 for i in range(rows)]))
    arguments = {"seed": 3, "resolution": 8, "latent_shape": (3, 8, 8), "null_class_id": 2, "num_tokens": 16}
    return TrainingSamples(data, **{**arguments, **changes})


# Data sets


def test_parquet_folder(tmp_path):
    data, id2label, num_classes = load_image_dataset(write_parquet(tmp_path / "data", [0, 1, 1]))
    assert id2label == {0: "cat", 1: "dog"} and num_classes == 2
    assert data.column_names == ["image", "label"] and len(data) == 3


def test_other_column_names_and_plain_integers(tmp_path):
    folder = write_parquet(tmp_path / "data", [0, 4, 2], names=None, column="picture")
    data, id2label, num_classes = load_image_dataset(folder, image_column="picture")
    assert id2label is None and num_classes == 5
    assert set(data.column_names) == {"image", "label"}


def test_imagefolder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(png(5))
    data, id2label, num_classes = load_image_dataset(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert id2label == {0: "ant", 1: "bee"} and num_classes == 2 and len(data) == 2
    samples = TrainingSamples(data, 0, 8, (3, 8, 8), 2)
    assert samples.__getitem__([0, 1])["pixels"][0, :, 0, 0].tolist() == [5, 10, 20]


def test_subset_is_random_and_fixed(tmp_path):
    folder = write_parquet(tmp_path / "data", [0] * 50 + [1] * 50)
    labels = load_image_dataset(folder, max_train_samples=20)[0]["label"]
    assert len(labels) == 20 and 0 < sum(labels) < 20
    assert labels == load_image_dataset(folder, max_train_samples=20)[0]["label"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "img"}, "`image_column` 'img'.*'image', 'label'"),
        ({"label_column": "class"}, "`label_column` 'class'.*'image', 'label'"),
        ({"label_column": "name"}, "`label_column` 'name'.*not integer class labels.*class_encode_column"),
        ({"image_column": "label"}, "`image_column` 'label'.*not images"),
        ({"split": "test"}, "`dataset_split` 'test'.*'train'"),
    ],
)
def test_wrong_columns_and_splits(tmp_path, arguments, message):
    features = Features({"image": Image(), "label": Value("int64"), "name": Value("float64")})
    rows = {"image": [{"bytes": png(1), "path": None}], "label": [0], "name": [0.5]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match=message):
        load_image_dataset(str(tmp_path / "data"), **arguments)


def test_labels_that_are_no_classes(tmp_path):
    folder = write_parquet(tmp_path / "ids", [3, 10**12], names=None)
    with pytest.raises(InputError, match="goes up to 1000000000000 with 2 images: these are not class labels"):
        load_image_dataset(folder)
    folder = write_parquet(tmp_path / "nulls", [0, None], names=None)
    with pytest.raises(InputError, match="is empty in 1 rows"):
        load_image_dataset(folder)


def test_unlabelled_split(tmp_path):
    folder = write_parquet(tmp_path / "data", [-1, -1], names=None)
    with pytest.raises(InputError, match="labels from -1 to -1"):
        load_image_dataset(folder)


def test_missing_folders():
    with pytest.raises(InputError, match="`dataset_name` ./nowhere is not a folder"):
        load_image_dataset("./nowhere")
    with pytest.raises(InputError, match="`train_data_dir` nowhere is not a folder"):
        load_image_dataset(train_data_dir="nowhere")


def test_a_folder_without_data(tmp_path):
    with pytest.raises(InputError, match="`dataset_name` .* "):
        load_image_dataset(str(tmp_path))


def test_a_configuration_of_data_that_have_none(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(png(1))
    where = {"dataset_config_name": "small"}
    for given in ({"dataset_name": "digits"}, {"dataset_name": str(tmp_path / "images")}):
        with pytest.raises(
            InputError, match="`dataset_config_name` small has no effect, since `dataset_name` .*; remove"
        ):
            load_image_dataset(**given, **where)
    with pytest.raises(InputError, match="since `train_data_dir` .* has no configurations"):
        load_image_dataset(train_data_dir=str(tmp_path / "images"), **where)
    with pytest.raises(InputError, match="since `reference` digits has no configurations"):
        open_images("`reference`", "digits", config_name="small", dataset_resolution=8)


def test_digits_are_embedded():
    data, id2label, num_classes = load_image_dataset("digits")
    assert len(data) == 1437 and num_classes == 10 and id2label[3] == "three"
    assert len(load_image_dataset("digits", split="validation")[0]) == 360
    assert isinstance(load_image_dataset("digits")[0], Dataset)


def test_imagenet_sized_names_travel(shared):
    data, id2label, num_classes = load_image_dataset(str(shared / "data" / "imagenet-1k-one-per-class"))
    assert num_classes == len(id2label) == len(data) == 1000
    assert id2label[1] == "goldfish"


# Images


def adm_center_crop(image, size):
    """The crop as ADM defines it, written from its description."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=PILImage.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=PILImage.Resampling.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (31, 50), (513, 512), (129, 64)])
@pytest.mark.parametrize("resolution", [32, 64])
def test_center_crop_is_adms(size, resolution):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels)
    np.testing.assert_array_equal(resize_and_crop(image, resolution), adm_center_crop(image, resolution))


def test_crop_positions_reach_both_ends():
    image = PILImage.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (8, 1, 3)))
    assert resize_and_crop(image, 8, (0.0, 0.0))[0, 0, 0] == 0
    assert resize_and_crop(image, 8, (0.999, 0.999))[0, -1, 0] == 19


def test_samples_are_functions_of_seed_and_index(tmp_path):
    samples = make_samples(tmp_path, random_flip=True, sample_posterior=True)
    batch = samples.__getitem__([5, 12, 7])
    again = make_samples(tmp_path, random_flip=True, sample_posterior=True).__getitem__([12])
    for name in ("pixels", "class_labels", "timestep", "noise", "posterior_noise", "tokens"):
        assert torch.equal(batch[name][1], again[name][0]), name
    assert not torch.equal(batch["noise"][0], batch["noise"][1])
    assert not torch.equal(batch["noise"], batch["posterior_noise"])
    other = make_samples(tmp_path, seed=4).__getitem__([12])
    assert not torch.equal(other["noise"][0], again["noise"][0])
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (3, 3, 8, 8)
    assert batch["noise"].dtype == batch["timestep"].dtype == torch.float32


def test_options_do_not_shift_the_streams(tmp_path):
    plain = make_samples(tmp_path, num_tokens=None).__getitem__([0, 1, 2])
    full = make_samples(tmp_path, random_flip=True, sample_posterior=True, center_crop=False).__getitem__([0, 1, 2])
    for name in ("class_labels", "timestep", "noise"):
        assert torch.equal(plain[name], full[name]), name


def test_each_epoch_sees_every_row_once_in_another_order(tmp_path):
    samples = make_samples(tmp_path)
    epochs = [samples.rows_of(list(range(e * 10, e * 10 + 10))).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_distributions_of_the_streams(tmp_path):
    samples = make_samples(tmp_path, rows=10)
    batch = samples.__getitem__(list(range(4000)))
    assert abs((batch["class_labels"] == 2).float().mean() - 0.1) < 0.015
    t = batch["timestep"]
    assert abs(t.mean() - 0.5) < 0.015 and abs(t.std() - 12**-0.5) < 0.01 and t.min() >= 0 and t.max() < 1
    assert abs(batch["noise"].mean()) < 0.005 and abs(batch["noise"].std() - 1) < 0.005
    # Neighbouring indices are independent.
    flat = batch["noise"].flatten(1)
    assert abs((flat[1:] * flat[:-1]).mean()) < 0.005
    assert abs(torch.corrcoef(torch.stack([t[1:], t[:-1]]))[0, 1]) < 0.05


def test_flip_mirrors_half_of_the_samples(tmp_path):
    row = np.zeros((8, 8, 3), dtype=np.uint8)
    row[:, 0] = 255
    buffer = io.BytesIO()
    PILImage.fromarray(row).save(buffer, "png")
    folder = write_parquet(tmp_path / "d", [0], images=[buffer.getvalue()])
    data, _, _ = load_image_dataset(folder)
    samples = TrainingSamples(data, 0, 8, (3, 8, 8), 2, random_flip=True)
    pixels = samples.__getitem__(list(range(1000)))["pixels"]
    flipped = pixels[:, 0, 0, -1] == 255
    assert abs(flipped.float().mean() - 0.5) < 0.06
    assert torch.equal(pixels[:, 0, 0, 0] == 255, ~flipped)


def test_corrupt_images_are_replaced_and_reported(tmp_path):
    images = [png(i) for i in range(10)]
    images[4] = b"not an image"
    images[5] = images[5][:40]
    folder = write_parquet(tmp_path / "d", [0] * 10, images=images)
    data, _, _ = load_image_dataset(folder)
    samples = TrainingSamples(data, 0, 8, (3, 8, 8), 2)
    batch = samples.__getitem__(list(range(10)))
    assert sorted(set(batch["corrupt_rows"].tolist())) == [4, 5]
    # The row after the two stands in for them.
    assert (batch["pixels"][:, 0, 0, 0] == 6).sum() == 3


def test_images_are_read_as_people_see_them():
    def encoded(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, **options)
        return {"bytes": buffer.getvalue(), "path": None}

    turned = PILImage.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[274] = 6
    assert decode_image(encoded(turned, format="jpeg", exif=exif)).size == (20, 40)
    deep = PILImage.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert decode_image(encoded(deep, format="png")).getpixel((0, 0)) == (128, 128, 128)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image = decode_image(encoded(PILImage.new(mode, (4, 4)), format="tiff"))
        assert image.mode == "RGB" and image.size == (4, 4)


def test_images_are_tried_before_training(tmp_path):
    images = [png(i) for i in range(200)]
    images[3] = b"broken"
    ImageDataset(*load_image_dataset(write_parquet(tmp_path / "one", [0] * 200, images=images))).check()
    images[5] = images[7] = b"broken"
    data = ImageDataset(*load_image_dataset(write_parquet(tmp_path / "three", [0] * 200, images=images)))
    with pytest.raises(InputError, match=r"3 of 200 images tried cannot be decoded.*rows \[3, 5, 7\]"):
        data.check()


def test_batches_divide_the_same_indices(tmp_path):
    def steps(batch_size, processes, accumulation):
        samplers = [StreamBatchSampler(32, 3, batch_size, r, processes, accumulation) for r in range(processes)]
        batches = [list(sampler) for sampler in samplers]
        return [
            sorted(i for rank in batches for micro in rank[k * accumulation : (k + 1) * accumulation] for i in micro)
            for k in range(3)
        ]

    expected = [list(range(32 + 16 * k, 48 + 16 * k)) for k in range(3)]
    assert steps(16, 1, 1) == steps(8, 2, 1) == steps(8, 1, 2) == steps(4, 2, 2) == expected


# Autoencoders


@pytest.mark.parametrize("kind, shape", [("kl", (4, 16, 16)), ("tiny", (4, 8, 8)), ("dc", (4, 8, 8))])
def test_autoencoders_load_encode_and_report_their_shape(tmp_path, kind, shape):
    tiny_vae(kind).save_pretrained(tmp_path / "model" / "vae")
    vae = load_vae(str(tmp_path / "model" / "vae"))
    assert type(load_vae(str(tmp_path / "model"))) is type(vae)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert latent_shape(vae, 32, 2) == shape
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encode_images(vae, x)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    scale = getattr(vae.config, "scaling_factor", 1.0)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    raw = vae.encode(x)
    raw = raw.latent_dist.mean if kind == "kl" else raw.latents if kind == "tiny" else raw.latent
    torch.testing.assert_close(latents, (raw - shift) * scale)
    noise = torch.randn(2, *shape)
    drawn = encode_images(vae, x, noise)
    if kind == "kl":
        torch.testing.assert_close(drawn - latents, vae.encode(x).latent_dist.std * noise * scale)
    else:
        torch.testing.assert_close(drawn, latents)


@pytest.mark.parametrize("kind, shape", [("kl", (4, 256, 256)), ("tiny", (4, 128, 128)), ("dc", (4, 128, 128))])
def test_shapes_are_measured_at_the_resolution_without_computing(kind, shape, monkeypatch):
    vae, encode, devices = tiny_vae(kind), type(tiny_vae(kind)).encode, []
    monkeypatch.setattr(
        type(vae), "encode", lambda vae, x: devices.append((x.device.type, x.shape[-1])) or encode(vae, x)
    )
    assert latent_layout(vae, 512, 2) == (shape, kind == "kl")
    assert set(devices) == {("meta", 512)} and vae.device.type == "cpu"
    assert decoded_side(vae, 4, shape[-1]) == 512


class OneSize(torch.nn.Module):
    """Takes images of 24 pixels only, with values that the meta device does not have; two rows of padding."""

    dtype, device = torch.float32, torch.device("cpu")

    def encode(self, pixels):
        if pixels.shape[-1] != 24 or pixels.flatten()[0].item() != 0:
            raise ValueError("24 pixels")
        return SimpleNamespace(latent=torch.zeros(len(pixels), 6, 14, 14))


def test_an_autoencoder_of_one_resolution_is_measured_there():
    assert latent_layout(OneSize(), 24, 2) == ((6, 14, 14), False)
    with pytest.raises(InputError, match=r"a OneSize does not encode RGB images of 32 pixels \(24 pixels\)"):
        latent_shape(OneSize(), 32, 2)
    with pytest.raises(InputError, match=r"`resolution` 24 to \[6, 14, 14\], not to rows and columns in patches of 4"):
        latent_shape(OneSize(), 24, 4)


def test_pixels_without_an_autoencoder():
    x = torch.randn(1, 3, 8, 8)
    assert encode_images(None, x) is x
    assert latent_shape(None, 64, 4) == (3, 64, 64)


def test_resolution_must_fit(tmp_path):
    with pytest.raises(InputError, match=r"`resolution` 30 is not divisible by 8 .*24 or 32"):
        latent_shape(tiny_vae("tiny"), 30, 2)
    with pytest.raises(InputError, match="`resolution` 3 .*; 4 would do"):
        latent_shape(None, 3, 4)


def test_wrong_autoencoders(tmp_path):
    with pytest.raises(InputError, match="`vae` ./nowhere is not a folder"):
        load_vae("./nowhere")
    with pytest.raises(InputError, match="diffusers cannot load it .*; give a folder or Hub name"):
        load_vae(str(tmp_path))
    from diffusers_vrpo import SiTTransformer2DModel

    model = SiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    model.save_pretrained(tmp_path / "sit")
    with pytest.raises(InputError, match="`vae` .*sit"):
        load_vae(str(tmp_path / "sit"))
