# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Rewards of the clean image that a prediction implies, `x0_hat = x_t - t v`: a separate term of the loss, with any objective.

    image_rewards = ImageRewards(["perceptual"], encoder, share=0.5)
    ...
    loss = loss_fm.mean() + image_rewards(prediction, target, x0, x_t, t)
    loss.backward()
    optimizer.step()
    image_rewards.update()

A reward compares `x0_hat` with the clean image `x0`, both decoded; larger is better, in any unit. Its gradient at the
prediction is scaled to a length relative to that of flow matching, `||d(w R)/dv|| = share * ||dL_FM/dv||`, with running averages
per timestep bin. Formulas: docs/method.md.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..config import image_reward_names, names_code
from ..errors import InputError, first_line
from ..models import ddpm
from ..models.autoencoder import decode_latents, load_vae
from ..models.flow import flow_matching_gradient, x0_estimate
from .encoders import PatchEncoder, default_layer, load_encoder, map_sizes
from .reward_statistics import NUM_BINS, timestep_bins
from .rewards import import_reward, normalize


BUILT_IN = ("perceptual", "image_semantic")
DECAY = 0.98  # of the squared norms, per optimizer step in which the bin has samples
MIN_SAMPLES = 8  # the norms of a bin with fewer are not used yet: its rewards wait
LOSS_SCALE = 1024.0  # keeps gradients inside an fp16 encoder above its smallest number; exact in other precisions
VELOCITY = SimpleNamespace(prediction_type="velocity", time_direction="data_to_noise")


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


@dataclass(frozen=True)
class ImageReward:
    """A reward of estimated images.

    Example:

    ```python
    from diffusers_vrpo import ImageReward


    def colour(x0_hat, x0):
        return -(x0_hat.mean((2, 3)) - x0.mean((2, 3))).square().sum(1)


    reward = ImageReward("colour", colour)  # for VRPOTrainer(image_rewards=["perceptual", reward], ...)
    ```

    Attributes:
        name (`str`): in logs, `reward/{name}`.
        function: `f(x0_hat, x0) -> reward [B]`. Both are images `[B,3,H,W]`, about [-1, 1]; `x0_hat` is not clamped. An
            image's reward must not depend on the other images. Its gradient is autograd's. With `layers`, the arguments
            are lists of maps `[B,E,h,w]` of the frozen encoder instead, one for each layer.
        layers (`tuple`, *optional*): hidden states of the encoder; None in it is the encoder's output.
    """

    name: str
    function: Callable
    layers: tuple[int | None, ...] = ()


def unit_channels(x: torch.Tensor) -> torch.Tensor:
    """Divides maps `[B,E,h,w]` by the length of their channels, `sqrt(sum_c x_c^2 + 1e-4)`, as LPIPS does."""
    return x * (x.square().sum(1, keepdim=True) + 1e-4).rsqrt()


def perceptual_reward(maps_hat: Sequence[torch.Tensor], maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """`R_pe = -(1/L) sum_l mean_hw sum_c (u_l(x0_hat) - u_l(x0))^2` of L maps with unit channels u, at most 0, `[B]`."""
    distances = [
        (unit_channels(a) - unit_channels(b)).square().sum(1).mean((1, 2)) for a, b in zip(maps_hat, maps, strict=True)
    ]
    return -torch.stack(distances).mean(0)


def image_semantic_reward(maps_hat: Sequence[torch.Tensor], maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """`R_im = mean_n cos(f_n(x0_hat), f_n(x0))` of patch embeddings, averaged over the maps, in [-1, 1], `[B]`."""
    cosines = [
        (normalize(a.flatten(2).mT) * normalize(b.flatten(2).mT)).sum(-1).mean(1)
        for a, b in zip(maps_hat, maps, strict=True)
    ]
    return torch.stack(cosines).mean(0)


def shallow_layers(sizes: Sequence[tuple[int, int] | None]) -> tuple[int, ...]:
    """Chooses the hidden states of the perceptual reward in the first half of the depth.

    They are the last ones of each resolution (the stages of conv nets), or three at equal distances where no stage ends in
    that half, as in ViTs.

    Args:
        sizes: the result of `map_sizes`.
    """
    last = len(sizes) - 1
    usable = [index for index in range(min(1, last), min(max(1, last // 2), last) + 1) if sizes[index] is not None]
    ends = [index for index in usable if sizes[index] not in sizes[index + 1 :]]
    thirds = {max(1, round(last // 2 * k / 3)) for k in (1, 2, 3)}
    return tuple(ends or [index for index in usable if index in thirds] or usable)


def needs_encoder(reward: ImageReward) -> bool:
    """Whether a reward compares hidden states of the frozen encoder."""
    return bool(reward.layers) or reward.function is perceptual_reward


def load_image_rewards(
    entries: Sequence[str | Callable | ImageReward],
    perceptual_layers: Sequence[int | None] = (),
    semantic_layer: int | None = None,
) -> list[ImageReward]:
    """Loads rewards of estimated images.

    Args:
        entries: `"perceptual"`, `"image_semantic"`; an `ImageReward`; a function `f(x0_hat, x0)`, whose name becomes the
            reward's; or `"package.module:name"` of either.
        perceptual_layers, semantic_layer: hidden states of the built-in rewards.

    Raises:
        InputError: if an entry is something else, or a name appears twice.
    """
    built_in = {
        "perceptual": ImageReward("perceptual", perceptual_reward, tuple(perceptual_layers)),
        "image_semantic": ImageReward("image_semantic", image_semantic_reward, (semantic_layer,)),
    }
    rewards = []
    for entry in entries:
        if isinstance(entry, str):
            entry = built_in.get(entry) or import_reward(entry, "image_rewards", BUILT_IN)
        if not isinstance(entry, ImageReward):
            if not callable(entry):
                raise InputError("image_rewards", f"`image_rewards` {entry!r} is not a function of (x0_hat, x0)")
            entry = ImageReward(getattr(entry, "__name__", type(entry).__name__), entry)
        rewards.append(entry)
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError("image_rewards", f"`image_rewards` has {twice[0]} twice")
    return rewards


# ----------------------------------------------------------------------------------------------------------------------
# The length of their gradients


class GradientNorms:
    """Running averages of squared gradient norms at the prediction, of flow matching and of each reward, per timestep bin.

    Both are summed over the same samples, so that their ratio needs no counts. Step k uses the averages through step k-1;
    the sums of all micro-batches and processes enter once per optimizer step, as in `RewardStatistics`.

    Args:
        num_rewards (`int`): K.
        device: where the averages live, float64 (float32 on MPS).
    """

    def __init__(self, num_rewards: int, device="cpu"):
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # Rows: number of samples, gradient of flow matching, gradients of the rewards.
        self.pending = torch.zeros(2 + num_rewards, NUM_BINS, device=device, dtype=dtype)
        self.state = {
            "count": torch.zeros(NUM_BINS, device=device, dtype=dtype),
            "flow": torch.zeros(NUM_BINS, device=device, dtype=dtype),
            "reward": torch.zeros(num_rewards, NUM_BINS, device=device, dtype=dtype),
        }

    def observe(self, t: torch.Tensor, flow: torch.Tensor, rewards: torch.Tensor):
        """Adds samples: `t [B]`, squared norms of flow matching's gradient `[B]` and of the rewards' `[B,K]`."""
        squares = torch.cat([flow.unsqueeze(1), rewards], dim=1).detach()
        # A single sample that is not finite would permanently spoil its bin.
        finite = squares.isfinite().all(1, keepdim=True)
        rows = torch.cat([finite, torch.where(finite, squares, 0)], dim=1).to(self.pending.dtype)
        self.pending.index_add_(1, timestep_bins(t), rows.mT)

    def update(self, all_reduce: Callable | None = None):
        """Moves the averages after an optimizer step; `all_reduce(tensor)` sums over processes."""
        count, flow, *rewards = self.pending if all_reduce is None else all_reduce(self.pending)
        rate = (1 - DECAY) * (count > 0).to(count.dtype)
        self.state["flow"].lerp_(flow, rate)
        self.state["reward"].lerp_(torch.stack(rewards), rate)
        self.state["count"] += count
        self.pending.zero_()

    def ratio(self) -> torch.Tensor:
        """`||dL_FM/dv|| / ||dR_k/dv||` `[K,bins]`, roots of mean squares; 0 without enough samples or gradient."""
        flow, reward = self.state["flow"], self.state["reward"]
        known = (self.state["count"] >= MIN_SAMPLES) & (reward > 0)
        return torch.where(known, flow / reward.clamp_min(1e-300), 0).sqrt()

    def lookup(self, t: torch.Tensor) -> torch.Tensor:
        """The ratio for timesteps `t [B]`, float32 `[B,K]`."""
        return self.ratio()[:, timestep_bins(t)].mT.float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        for name, tensor in self.state.items():
            tensor.copy_(state_dict[name])


# ----------------------------------------------------------------------------------------------------------------------
# The term of the loss


def images_at_a_time(vae: torch.nn.Module | None, resolution: int, device: torch.device | str) -> int:
    """How many images are decoded and rewarded together by default.

    On a GPU, 64 images of 256 pixels with `AutoencoderTiny` need about as much memory as eight with the autoencoder of Stable
    Diffusion: 6 GiB (docs/speed.md). Larger images are fewer, and never less than eight. A CPU takes eight, since memory that
    is allocated and freed again costs it more than calls do.
    """
    if vae is None:
        return 64
    if torch.device(device).type == "cpu" or type(vae).__name__ != "AutoencoderTiny":
        return 8
    return max(8, min(64, 64 * 256**2 // resolution**2))


class ImageRewards:
    """The loss of image rewards: scaled gradients at the prediction, in one backward pass with everything else.

    The rewards' gradients are computed on a detached copy of the prediction, a few images at a time. So memory is bounded, and
    the transformer runs once. The gradient of an example does not depend on how the batch is divided.

    Example:

    ```python
    import torch

    from diffusers_vrpo import ImageRewards


    def brightness(x0_hat, x0):
        return -(x0_hat.mean((1, 2, 3)) - x0.mean((1, 2, 3))).square()


    image_rewards = ImageRewards([brightness], share=0.5)
    x0, noise, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.full((4,), 0.3)
    x_t = 0.7 * x0 + 0.3 * noise
    prediction = (noise - x0 + 0.1 * torch.randn_like(x0)).requires_grad_()
    loss_fm = (prediction - (noise - x0)).square().mean((1, 2, 3))
    loss = loss_fm.mean() + image_rewards(prediction, noise - x0, x0, x_t, t)
    loss.backward()
    image_rewards.update()
    ```

    Args:
        rewards (`list`): as for `load_image_rewards`; without any the term is never active.
        encoder (`PatchEncoder`, *optional*): the frozen network of rewards that have `layers`.
        share (`float` or a list of them): length of the scaled gradients, in units of flow matching's; one for all rewards or
            one for each.
        max_t (`float`): samples with a larger flow time are not rewarded.
        every (`int`): steps between two with rewards.
        fraction (`float`): share of the samples that are rewarded.
        start_step (`int`): the first step with rewards.
        config (*optional*): `prediction_type` and `time_direction` of the transformer; by default it predicts `noise - x0`.
        vae (*optional*): the diffusers autoencoder that decodes latents; without one, they are pixels.
        batch_size (`int`, *optional*): images at a time; 8 with an autoencoder and 64 without if not given.
        resolution (`int`, *optional*): side in pixels of what the encoder sees; its `input_size` if not given.
        perceptual_layers (`list[int]`, *optional*): hidden states of `"perceptual"`; `shallow_layers` if not given.
        semantic_layer (`int`, *optional*): hidden state of `"image_semantic"`; the encoder's output, or the stage of stride 16
            of a conv net, if not given.
        device (*optional*): of the statistics, which must be that of the predictions; by default the encoder's or the
            autoencoder's.
        autocast: returns the context in which the autoencoder decodes.

    Attributes:
        names (`tuple[str, ...]`): of the rewards.
        logs (`dict`): device scalars of the last call, by name, NaN if no sample was rewarded; `image_share/{name}` is the
            measured length of the scaled gradient, in units of flow matching's. Empty in steps without rewards.

    Raises:
        InputError: if rewards, layers or shares are not valid.
    """

    def __init__(
        self,
        rewards: Sequence[str | Callable | ImageReward] = (),
        encoder: PatchEncoder | None = None,
        *,
        share: float | Sequence[float] = 0.5,
        max_t: float = 0.7,
        every: int = 1,
        fraction: float = 1.0,
        start_step: int = 0,
        config: object | None = None,
        vae: torch.nn.Module | None = None,
        batch_size: int | None = None,
        resolution: int | None = None,
        perceptual_layers: Sequence[int] | None = None,
        semantic_layer: int | None = None,
        device: torch.device | str | None = None,
        autocast: Callable = contextlib.nullcontext,
    ):
        self.encoder, self.vae, self.autocast = encoder, vae, autocast
        self.size = None if resolution is None else (resolution, resolution)
        if encoder is not None:
            perceptual_layers, semantic_layer = self._choose_layers(perceptual_layers, semantic_layer)
        self.rewards = load_image_rewards(rewards, perceptual_layers or (), semantic_layer)
        self.names = tuple(reward.name for reward in self.rewards)
        # One pass gives the hidden states of all rewards.
        self.layers = list(dict.fromkeys(layer for reward in self.rewards for layer in reward.layers))
        if encoder is None and any(map(needs_encoder, self.rewards)):
            raise InputError("image_rewards", f"`image_rewards` {', '.join(self.names)} need an encoder")
        shares = list(share) if isinstance(share, Sequence) else [share]
        if len(shares) not in (1, max(1, len(self.rewards))):
            raise InputError(
                "image_reward_share",
                f"`image_reward_share` has {len(shares)} numbers for {len(self.rewards)} rewards; give one, or one for each",
            )
        device = device or getattr(vae if encoder is None else encoder.mean, "device", "cpu")
        self.shares = torch.tensor(shares, device=device).expand(len(self.rewards))
        self.max_t, self.every, self.fraction, self.start_step = max_t, every, fraction, start_step
        self.config = config or VELOCITY
        self.batch_size = batch_size or (64 if vae is None else 8)
        self.norms = GradientNorms(len(self.rewards), device)
        self.step_number = 0
        self.logs: dict[str, torch.Tensor] = {}

    def _choose_layers(self, perceptual_layers, semantic_layer) -> tuple[list[int], int | None]:
        """Resolves negative indices and defaults of the built-in rewards' hidden states."""
        size = self.size or self.encoder.input_size
        try:
            sizes = map_sizes(self.encoder, size)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "image_reward_resolution",
                f"`image_reward_resolution` {size[0]}: the encoder does not take such images ({first_line(error)}); give "
                f"{self.encoder.input_size[0]}",
            ) from error
        usable = [index for index, each in enumerate(sizes) if each is not None]

        def resolved(option: str, layer: int) -> int:
            index = layer + len(sizes) if layer < 0 else layer
            if index not in usable:
                raise InputError(
                    option,
                    f"`{option}` {layer} is not a hidden state with rows and columns; choose from "
                    f"{', '.join(map(str, usable))}",
                )
            return index

        shallow = [resolved("perceptual_layer", layer) for layer in perceptual_layers or shallow_layers(sizes)]
        if semantic_layer is None:
            return shallow, default_layer(self.encoder)
        return shallow, resolved("image_semantic_layer", semantic_layer)

    # ------------------------------------------------------------------------------------------------------------------
    # Which samples are rewarded

    def active(self, step_number: int | None = None) -> bool:
        """Whether an optimizer step, from 0, has rewards; by default the current one."""
        since = (self.step_number if step_number is None else step_number) - self.start_step
        return bool(self.rewards) and since >= 0 and since % self.every == 0

    def rows(self, t: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """The rows to reward of a micro-batch, int64: `fraction` of the samples, without those whose t is above `max_t`.

        Args:
            t: flow time `[B]`. On a GPU this waits for the device; on the CPU it does not.
            index: global sample indices `[B]` on the CPU, of which the choice is a function; the place in the batch when
                not given.
        """
        if index is None:
            index = torch.arange(len(t))
        index = index.double()
        chosen = ((index + 1) * self.fraction).floor() > (index * self.fraction).floor()
        return (chosen.to(t.device) & (t <= self.max_t)).nonzero().flatten()

    # ------------------------------------------------------------------------------------------------------------------
    # The loss

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        x0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        timestep: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the loss of a micro-batch, whose value is always 0: only its gradient counts. Sets `logs`.

        Args:
            prediction, target, x0, x_t: `[B,C,h,w]`, as for `flow_matching_loss` and `x0_estimate`.
            t: flow time `[B]`, 1 being noise.
            timestep: as the transformer takes it; needed for models that predict noise.
            rows: the samples to reward, on the same device; chosen by `rows(t, index)` when not given.
        """
        self.logs = {}
        zero = torch.zeros((), device=prediction.device)
        if not self.active():
            return zero
        rows = self.rows(t, index) if rows is None else rows
        if not len(rows):
            # Logs of all processes have the same names.
            kinds = ("reward", "image_share")
            self.logs = {f"{kind}/{name}": zero + math.nan for kind in kinds for name in self.names}
            return zero
        v, t, timestep = prediction[rows], t[rows], None if timestep is None else timestep[rows]
        values, gradients = self.values_and_gradients(v.detach().float(), x0[rows], x_t[rows], t, timestep)

        # Each reward's gradient at v, in units of flow matching's.
        flow_square = flow_matching_gradient(v.detach(), target[rows]).flatten(1).square().sum(1)
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients], dim=1)
        scale = self.shares.to(t.device) * self.norms.lookup(t)
        self.norms.observe(t, flow_square, squares)
        total = sum(scale[:, k].reshape(-1, *[1] * (v.ndim - 1)) * gradient for k, gradient in enumerate(gradients))

        self.logs = {f"reward/{name}": values[:, k].mean() for k, name in enumerate(self.names)}
        measured = ((scale.square() * squares).sum(0) / flow_square.sum().clamp_min(1e-30)).sqrt()
        self.logs |= {f"image_share/{name}": measured[k] for k, name in enumerate(self.names)}
        v = v.float()
        return -(total * (v - v.detach())).sum() / len(prediction)

    def values_and_gradients(
        self, v: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, timestep: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Computes the rewards `[B,K]` of predictions `v [B,C,h,w]`, and their gradients at v, each `[B,C,h,w]`."""
        timestep = t if timestep is None else timestep
        values, gradients = [], []
        for part in zip(*(tensor.split(self.batch_size) for tensor in (v, x0, x_t, t, timestep))):
            value, gradient = self._of_a_part(*part)
            values.append(value)
            gradients.append(gradient)
        return torch.cat(values), [torch.cat(parts) for parts in zip(*gradients)]

    def _of_a_part(self, v, x0, x_t, t, timestep):
        # Rewards' differences are smaller than the rounding of half precision; only the decoder runs in it.
        with torch.autocast(v.device.type, enabled=False):
            with torch.no_grad():
                image = self._decode(x0.float())
                maps = self._maps(image)
            with torch.enable_grad():
                v = v.detach().requires_grad_()
                image_hat = self._decode(x0_estimate(v, x_t, timestep, t, self.config))
                maps_hat = self._maps(image_hat)
                values = [self._value(reward, (image_hat, maps_hat), (image, maps)) for reward in self.rewards]
            gradients = [
                torch.autograd.grad(LOSS_SCALE * value.sum(), v, retain_graph=k + 1 < len(values))[0] / LOSS_SCALE
                for k, value in enumerate(values)
            ]
        return torch.stack([value.detach().float() for value in values], dim=1), gradients

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        with self.autocast() if self.vae is not None else contextlib.nullcontext():
            return decode_latents(self.vae, latents)

    def _maps(self, images: torch.Tensor) -> dict[int | None, torch.Tensor]:
        if not self.layers:
            return {}
        return dict(zip(self.layers, self.encoder.hidden_maps(images, self.layers, self.size)))

    @staticmethod
    def _value(reward: ImageReward, estimated: tuple, clean: tuple) -> torch.Tensor:
        arguments = [
            [maps[layer] for layer in reward.layers] if reward.layers else image for image, maps in (estimated, clean)
        ]
        value = reward.function(*arguments)
        if not isinstance(value, torch.Tensor) or value.shape != estimated[0].shape[:1]:
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                "image_rewards",
                f"`image_rewards` {reward.name} returns {shape} for {len(estimated[0])} images; it must return a number for "
                "each, [B]",
            )
        return value

    # ------------------------------------------------------------------------------------------------------------------
    # Steps, checks, and what a checkpoint holds

    def update(self, all_reduce: Callable | None = None) -> None:
        """Updates the norms after an optimizer step; `all_reduce(tensor)` sums over processes."""
        if self.active():
            self.norms.update(all_reduce)
        self.step_number += 1

    def resume(self, step_number: int) -> None:
        """Continues at an optimizer step, after the state was loaded."""
        self.step_number = step_number

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.norms.state_dict()

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.norms.load_state_dict(state_dict)

    def check(self, latent_shape: tuple[int, int, int], resolution: int) -> None:
        """Tries the rewards on noise, so that those that cannot work fail before the training.

        Args:
            latent_shape: `(C, h, w)` of the predictions.
            resolution: side of the images in pixels.

        Raises:
            InputError: if the autoencoder does not decode such latents, or a reward has no gradient.
        """
        device = self.shares.device
        noise = torch.randn(2, 2, *latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
        timestep = torch.zeros(2, dtype=torch.long, device=device)
        try:
            with torch.no_grad():
                shape = list(self._decode(noise[0]).shape[1:])
        except Exception as error:  # an error with one latent would also occur in training
            shape = first_line(error)
        if shape != [3, resolution, resolution]:
            raise InputError(
                "reward_vae",
                f"the autoencoder of the image rewards does not decode latents of {list(latent_shape)} to images of "
                f"{[3, resolution, resolution]} ({shape}); give a `reward_vae` for the latents of `vae`",
            )
        try:
            self.values_and_gradients(noise[0], noise[1], noise[1], timestep + 0.5, timestep)
        except InputError:
            raise
        except Exception as error:  # a user-defined function can raise anything
            raise InputError(
                "image_rewards",
                f"`image_rewards` {', '.join(self.names)}: two images cannot be rewarded ({first_line(error)})",
            ) from error

    def flops_per_sample(self, latent_shape: tuple[int, int, int], flow_times: torch.Tensor | None = None) -> float:
        """Mean FLOPs that a step with rewards adds for a sample of the batch; call it before anything is compiled.

        Args:
            flow_times: times that stand for those of the training, of any shape; by default those of `timestep_sampling` uniform.
        """
        device = self.shares.device
        blank = torch.zeros(1, *latent_shape, device=device)
        timestep = torch.zeros(1, dtype=torch.long, device=device)
        arguments = (blank, blank, blank, timestep + 0.5, timestep)
        self.values_and_gradients(*arguments)  # a first pass looks for the modules of the hidden states
        # The counter does not know the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.values_and_gradients(*arguments)
        share = self.max_t
        if flow_times is None and self.config.prediction_type == "epsilon":
            flow_times = ddpm.flow_time(torch.arange(ddpm.NUM_TIMESTEPS))
        if flow_times is not None:
            share = (flow_times <= self.max_t).float().mean().item()
        return counter.get_total_flops() * share * self.fraction


# ----------------------------------------------------------------------------------------------------------------------
# From options


@contextlib.contextmanager
def renamed(option: str, name: str):
    """Gives errors about `option` the name of another option that has the same kind of value."""
    try:
        yield
    except InputError as error:
        field = name if error.field == option else error.field
        raise InputError(field, str(error).replace(f"`{option}`", f"`{name}`")) from error


def image_rewards_from_config(
    args,
    transformer_config,
    encoders: Sequence,
    vae,
    latent_shape: tuple[int, int, int],
    grid_size: tuple[int, int],
    device,
    rewards: Sequence | None = None,
    autocast: Callable = contextlib.nullcontext,
    dtype: torch.dtype = torch.float32,
) -> ImageRewards:
    """Builds the image rewards for the options, with the networks that they need, and tries them.

    Args:
        args (`VRPOConfig`): the options.
        transformer_config: the transformer's config, or its adapter: `prediction_type` and `time_direction`.
        encoders: the encoders to align with, or their names where they are not loaded. The first is used unless
            `image_reward_encoder` names another.
        vae: the run's autoencoder, or None.
        latent_shape, grid_size: shape of the latents, and rows and columns of the transformer's tokens.
        rewards: used instead of `image_rewards`, if they are Python objects.
        autocast: as for `ImageRewards`.
        dtype: of an encoder that is loaded.

    Raises:
        InputError: if the options cannot work, or one has no effect.
    """
    entries = image_reward_names(args) if rewards is None else list(rewards)
    if not entries:
        return ImageRewards(device=device)
    with torch.random.fork_rng(devices=[]):  # loading must not advance the generator of the training
        if args.reward_vae is not None:
            if vae is None:
                raise InputError(
                    "reward_vae",
                    f"`reward_vae` {args.reward_vae} has no effect with `vae` none: pixels are not decoded; remove it",
                )
            with renamed("vae", "reward_vae"):
                vae = load_vae(args.reward_vae, args.cache_dir).to(device)
        encoder = None
        if any(map(needs_encoder, load_image_rewards(entries))):
            encoder = _reward_encoder(args, encoders, grid_size, device, dtype)
        for name in ("image_reward_encoder", "image_reward_resolution"):
            if encoder is None and getattr(args, name) is not None:
                raise InputError(
                    name,
                    f"`{name}` {getattr(args, name)} has no effect without a reward in its features, such as "
                    "`image_rewards` perceptual; remove it",
                )
        image_rewards = ImageRewards(
            entries,
            encoder,
            share=args.image_reward_share or 0.5,
            max_t=args.image_reward_max_t,
            every=args.image_reward_every,
            fraction=args.image_reward_fraction,
            start_step=args.image_reward_start_step,
            config=transformer_config,
            vae=vae,
            batch_size=args.image_reward_batch_size or images_at_a_time(vae, args.resolution, device),
            resolution=args.image_reward_resolution,
            perceptual_layers=args.perceptual_layer,
            semantic_layer=args.image_semantic_layer,
            device=device,
            autocast=autocast,
        )
        image_rewards.check(latent_shape, args.resolution)
    return image_rewards


def _reward_encoder(args, encoders, grid_size, device, dtype) -> PatchEncoder:
    """The first encoder to align with, if its hidden states are known, or a loaded one."""
    first = args.encoder[0] if args.encoder else None
    name = args.image_reward_encoder or first
    if name == first and encoders:
        if isinstance(encoders[0], PatchEncoder):
            return encoders[0]
        if args.image_reward_encoder is None and (not isinstance(encoders[0], str) or names_code(encoders[0])):
            raise InputError(
                "image_reward_encoder",
                f"`image_rewards` need hidden states, which the encoder {name} does not give; name a model of transformers "
                "as `image_reward_encoder`",
            )
    with renamed("encoder", "image_reward_encoder"):
        return load_encoder(name, grid_size, None, dtype, device, args.cache_dir)
