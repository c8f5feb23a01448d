# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The SDE sampler of SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940) as a diffusers scheduler.

This file imports torch, numpy and diffusers only, so that it can be published beside the weights.
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class SiTSDEScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama for the reverse SDE of a flow `x_t = (1 - t) x0 + t noise` with velocity `v = noise - x0`.

    The diffusion is `w = 2 t`, the score is `s = -(x + (1 - t) v) / t`, and so the drift is `v - w s / 2 = x + (2 - t) v`
    (arXiv 2401.08740). Time runs over `linspace(1, last_step_size, num_inference_steps)` and then to 0. The last step
    has the same drift but no noise, as in REPA's official sampler. The drift is linear in v, so guidance can be
    applied to v.

    Until `set_timesteps` is called, the grid has `num_train_timesteps` steps.

    Args:
        num_train_timesteps (`int`): the timestep at t = 1, at least 2; `timesteps = num_train_timesteps * t`.
        last_step_size (`float`): t at the start of the last step, in (0, 1).

    Raises:
        ValueError: if `last_step_size` is outside (0, 1), or `num_train_timesteps` is below 2 or not an integer.

    Example:

    ```python
    from diffusers_vrpo import SiTSDEScheduler

    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(250)
    assert scheduler.timesteps[0] == 1000 and len(scheduler.timesteps) == 250
    ```
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, last_step_size: float = 0.04):
        if not isinstance(last_step_size, float | int) or not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` must lie between 0 and 1, not {last_step_size!r}")
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
            raise ValueError(f"`num_train_timesteps` must be an integer and at least 2, not {num_train_timesteps!r}")
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets `sigmas` (t and a final 0, float32 on the CPU) and `timesteps` (on `device`), before sampling.

        Args:
            num_inference_steps (`int`): the number of steps, which is that of the model's evaluations; at least 2.
            device (`str` or `torch.device`, *optional*): the device of `timesteps`; the CPU by default.

        Raises:
            ValueError: if `num_inference_steps` is not an integer of at least 2.
        """
        if not isinstance(num_inference_steps, int | np.integer) or num_inference_steps < 2:
            raise ValueError(
                f"`num_inference_steps` must be an integer and at least 2 for the SDE, not {num_inference_steps!r}: a single "
                "step would apply the drift without its noise"
            )
        self.num_inference_steps = num_inference_steps
        t = np.append(np.linspace(1.0, self.config.last_step_size, num_inference_steps), 0.0)
        self.sigmas = torch.from_numpy(t).float()
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """The index of the next step; `None` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step to start at, if `set_begin_index` has set it; else `None`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the step to start at, instead of looking up the first `timestep`."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The index of `timestep` in `timesteps`; raises ValueError if it is not one of them."""
        found = (self.timesteps == timestep).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep {timestep} is not one of `scheduler.timesteps`; pass these, not their indices")
        return found[0].item()

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` unchanged: this scheduler does not scale inputs."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """Takes one step towards the data.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`): the velocity `noise - x0` at `sample` and t.
            timestep (`float` or `torch.Tensor` of shape `()`): one of `timesteps`. Only the first step uses it; later
                steps follow in order.
            sample (`torch.Tensor` of shape `(batch, ...)`): x_t.
            generator (`torch.Generator` or a list, one per sample): draws the noise.
            noise (`torch.Tensor` of shape `(batch, ...)`, *optional*): standard normal noise to use instead.
            return_dict (`bool`): return a [`SchedulerOutput`] instead of a tuple.

        Returns:
            The sample at the next t, in float32 or, if it is more precise, the dtype of `sample`, since rounding
            errors add up.

        Raises:
            ValueError: if the first `timestep` is not one of `timesteps`, or `noise` has another shape.
        """
        if noise is not None and noise.shape != sample.shape:
            raise ValueError(f"`noise` has shape {tuple(noise.shape)}; {tuple(sample.shape)} is expected")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index

        t, t_next = self.sigmas[self._step_index : self._step_index + 2].tolist()
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        v = model_output.to(x.dtype)
        drift = x + (2 - t) * v
        prev_sample = x + (t_next - t) * drift
        if t_next > 0:
            if noise is None:
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
            prev_sample = prev_sample + (2 * t * (t - t_next)) ** 0.5 * noise.to(x)

        self._step_index += 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns `(1 - t) x0 + t noise`, where `t = timesteps / num_train_timesteps`.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): x0.
            noise (`torch.Tensor` of shape `(batch, ...)`): standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch,)` or `()`): timesteps in [0, `num_train_timesteps`].
        """
        t = (timesteps / self.config.num_train_timesteps).to(original_samples)
        t = t.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (1 - t) * original_samples + t * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Calls `add_noise`, with the name and argument order of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
