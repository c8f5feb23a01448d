# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Flow matching at another gradient scale, as a control for rewards that change how strongly a noise level is trained."""

import torch

from diffusers_vrpo.training.callbacks import TrainerCallback


class GradientScale(TrainerCallback):
    """Multiplies the gradient at the prediction, or at the output of a block, by a factor that depends on the noise level.

    The logged loss does not change. At the prediction this is equivalent to weighting the loss, `factor(t_i) L_FM,i`. At the
    output of a block, the blocks up to that one get the longer gradient, as they do from the fidelity reward's share at the
    fork.

    Args:
        factor (`float` or `list[float]`): one factor, or one for each of as many timestep bins of equal width.
        t_below (`float`): only samples with a flow time below it (1 is noise) are scaled.
        block (`int`, *optional*): counted from 1; the prediction if not given.
    """

    def __init__(self, factor: float | list[float], t_below: float = 1.0, block: int | None = None):
        self.factors = torch.tensor([factor] if isinstance(factor, int | float) else factor, dtype=torch.float32)
        self.t_below = t_below
        self.block = block

    def factor(self, t: torch.Tensor) -> torch.Tensor:
        """The factor of each sample, for flow times `[B]`."""
        bins = (t * len(self.factors)).long().clamp(max=len(self.factors) - 1)
        return torch.where(t < self.t_below, self.factors.to(t.device)[bins], 1.0)

    def on_train_begin(self, trainer):
        transformer = trainer.transformer
        module = transformer if self.block is None else transformer.transformer_blocks[self.block - 1]

        def scale(module, inputs, output):
            found = output if isinstance(output, torch.Tensor) else output[0]
            if found.requires_grad:
                factor = self.factor(trainer.alignment.t).view(-1, *[1] * (found.ndim - 1))
                found.register_hook(lambda gradient: gradient * factor)

        module.register_forward_hook(scale)
