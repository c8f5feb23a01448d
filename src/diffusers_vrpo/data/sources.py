# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The training data that the options name, and the batches that a run draws from it."""

from pathlib import Path

import torch

from ..errors import InputError
from ..models.vision import layers_of_encoders
from .image_datasets import load_image_dataset
from .latent_cache import CachedSamples, LatentCache
from .parquet import ParquetRows, StreamedBatches, StreamedSamples, stream_image_dataset
from .samples import SampleStreams, TrainingSamples, as_is, ignore_signals


# ----------------------------------------------------------------------------------------------------------------------
# For the trainer


class CachedEncoder:
    """Stands for a frozen encoder whose features are in the cache: called with a batch, it reads them out of it.

    Attributes:
        embed_dim (`int`): E.
        array (`int`): number of the feature array in the cache.
    """

    def __init__(self, number: int, array: int, embed_dim: int):
        self.number, self.array, self.embed_dim = number, array, embed_dim

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Patch embeddings `[B,N,E]`, float32."""
        return batch[f"features_{self.number}"].float()


def load_images(args):
    """`load_image_dataset` of the data options that `train_vrpo.py` and `prepare` share."""
    return load_image_dataset(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        args.dataset_split,
        args.image_column,
        args.label_column,
        args.max_train_samples,
        args.cache_dir,
    )


def load_training_data(args):
    """What the data options of `train_vrpo.py` name, class names, number of classes.

    It is a `Dataset`, a `LatentCache` or, with `streaming`, `ParquetRows`.

    With a cache, `args.vae` becomes the one that it was made with.

    Raises:
        InputError: when it cannot be had, or the options contradict the cache.
    """
    if args.streaming:
        columns = (args.image_column, args.label_column)
        return stream_image_dataset(
            args.dataset_name, args.dataset_config_name, args.dataset_split, *columns, args.cache_dir
        )
    if args.latents_dir is None:
        return load_images(args)
    cache, there = LatentCache(args.latents_dir), f"`latents_dir` {args.latents_dir}"
    made_with, resolution = cache.about["vae"], cache.config["resolution"]
    if args.resolution != resolution:
        raise InputError(
            "resolution",
            f"`resolution` {args.resolution}: {there} was prepared with `resolution` {resolution}; give that",
        )
    if args.vae is not None and Path(args.vae).name != Path(made_with).name:
        raise InputError(
            "vae", f"`vae` {args.vae}: {there} was prepared with {made_with}; give that, or leave `vae` out"
        )
    if not args.center_crop:
        raise InputError("center_crop", f"`center_crop` is off, but {there} has centre crops only; turn it on")
    if args.max_train_samples is not None:
        raise InputError(
            "max_train_samples",
            f"`max_train_samples` goes with images; {there} has {len(cache)}, prepare one with fewer",
        )
    args.vae = args.vae or made_with
    return cache, cache.id2label, cache.num_classes


def cached_encoders(data, args, grid_size: tuple[int, int]) -> list[CachedEncoder]:
    """The encoders of `args` whose features the cache has; empty where they are to be computed from the images.

    Raises:
        InputError: when the cache has neither the features nor the images.
    """
    if not isinstance(data, LatentCache) or args.objective == "none":
        return []
    found = data.find_features(args.encoder, layers_of_encoders(args.encoder, args.encoder_layer), grid_size)
    return [CachedEncoder(number, i, data.config["features"][i]["dim"]) for number, i in enumerate(found)]


def training_samples(
    data,
    args,
    transformer,
    latent_shape: tuple[int, int, int],
    num_tokens: int,
    encoders: list,
    global_batch_size: int,
):
    """The samples of a run for what `load_training_data` gave: `TrainingSamples`, `CachedSamples` or `StreamedSamples`.

    Args:
        transformer: it knows the null class and the share of dropped labels.
        num_tokens: N of the transformer.
        encoders: with `CachedEncoder`s their features take the place of the images.
        global_batch_size: samples of an optimizer step on all processes.

    Raises:
        InputError: when the options contradict the cache, or the processes stream different files.
    """
    null_class_id, dropout = transformer.null_class_id, transformer.config.class_dropout_prob
    num_tokens = num_tokens if args.objective == "vrpo" else None
    if not isinstance(data, LatentCache):
        options = (args.seed, args.resolution, latent_shape, null_class_id, dropout)
        options += (args.center_crop, args.random_flip, args.vae != "none", num_tokens)
        if isinstance(data, ParquetRows):
            return StreamedSamples(data, global_batch_size, *options)
        return TrainingSamples(data, *options)
    if list(latent_shape) != data.config["latent_shape"]:
        raise InputError(
            "vae",
            f"`vae` {args.vae} makes latents of {list(latent_shape)}, but `latents_dir` {args.latents_dir} holds "
            f"{data.config['latent_shape']}; give the autoencoder that made them",
        )
    features = [encoder.array for encoder in encoders if isinstance(encoder, CachedEncoder)]
    images = bool(encoders) and not features
    return CachedSamples(data, args.seed, null_class_id, dropout, args.random_flip, num_tokens, images, features)


def training_batches(samples: SampleStreams, batch_sampler, num_workers: int, pin_memory: bool):
    """The batches of a process in order: by worker processes, or by threads for what is streamed.

    Args:
        batch_sampler: a `StreamBatchSampler`.
        num_workers: processes or threads; with 0 everything happens when a batch is asked for.
        pin_memory: for copies to a GPU.
    """
    if isinstance(samples, StreamedSamples):
        return StreamedBatches(samples, batch_sampler, num_workers, pin_memory)
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=as_is,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )
