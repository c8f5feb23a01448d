# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Rewards of projected tokens, and their gradients along the sphere.

The composite reward is `alpha R_f + beta R_se + gamma R_st` (arXiv 2606.00583). Fidelity, `R_f = -L_FM` of the sample, is
not a function of the tokens: its gradient meets those of the other rewards in gradient_fork.py. Semantic, structural and user-defined
rewards are `TokenReward`s. Notation of docs/method.md: `mu [B,N,E]` are the projected tokens of the transformer and
`y [B,N,E]` the patch embeddings of a frozen encoder, both unit vectors in float32.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError, first_line


FIDELITY = "fidelity"
DEFAULT_REWARDS = (FIDELITY, "semantic", "structural")


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Divides vectors by their length, in float32; half precision here is REPA's known source of NaN.

    Vectors shorter than 1e-6 become zero and get no gradient, which would be very large.
    """
    return _Normalize.apply(x.float())[0]


class _Normalize(torch.autograd.Function):
    """Unit vectors and the norms that they were divided by, in float32.

    The backward pass, `(g - <g, mu> mu) / norm`, gives the bits that autograd gives for a division by a norm, but computes
    nothing twice.
    """

    @staticmethod
    def forward(x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # Dividing by infinity makes a vector and its gradient zero, which is cheaper than a choice for each number.
        norm = F.threshold(norm, 1e-6, float("inf"))
        return x / norm, norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        if gradient is None:
            return None
        mu, norm = ctx.saved_tensors
        along = (gradient * (mu / norm)).sum(-1, keepdim=True)
        return gradient / norm - mu * along


def tangent(mu: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Projects a gradient on the tangent space of the sphere, `P_mu g = g - <g, mu> mu`."""
    return torch.addcmul(gradient, (gradient * mu).sum(-1, keepdim=True), mu, value=-1)


@dataclass(frozen=True)
class TokenReward:
    """A reward of actions on tokens.

    Attributes:
        name (`str`): in logs, `reward/{name}`.
        function: `f(action, mu, y, subset) -> reward`. `action` are unit vectors `[B,N,E]`, or `[G,B,N,E]` for a group of G
            actions per token; `mu` the tokens that they were drawn around and `y` the encoder's, unit vectors `[B,N,E]`;
            `subset` the indices `[B,M]` of M tokens drawn for this step. The reward has the shape of `action` without its
            last dimension, float32. A token's reward may depend on its own action only; relations to other tokens go
            through `mu`.
        gradient (*optional*): `g(mu, y, subset) -> (reward [B,N], tangent gradient [B,N,E])` at `action = mu` in closed
            form, where the gradient is `P_mu dR/da`. Without it autograd computes that from `function`.

    Example:

    ```python
    from diffusers_vrpo import TokenReward

    angle = TokenReward("angle", lambda action, mu, y, subset: -(action * y).sum(-1).clamp(-0.999, 0.999).acos())
    ```
    """

    name: str
    function: Callable
    gradient: Callable | None = None

    def __post_init__(self):
        if not callable(self.function) or not (self.gradient is None or callable(self.gradient)):
            raise InputError("rewards", f"the reward {self.name!r} must have functions of (action, mu, y, subset)")

    def value_and_gradient(
        self, mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reward of the mean action `[B,N]`, and its tangent gradient `[B,N,E]`."""
        if self.gradient is not None:
            return self.gradient(mu, y, subset)
        with torch.enable_grad():
            action = mu.detach().requires_grad_()
            value = self.function(action, mu.detach(), y, subset)
            (gradient,) = torch.autograd.grad(value.sum(), action)
        return value.detach(), tangent(mu, gradient)


def semantic_reward(action: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`R_se(a_n) = <a_n, y_n>` of unit actions `[B,N,E]`, in [-1, 1], `[B,N]`.

    Example:

    ```python
    import torch

    from diffusers_vrpo import semantic_reward

    y = torch.nn.functional.normalize(torch.randn(2, 16, 64), dim=-1)
    assert torch.allclose(semantic_reward(y, y), torch.ones(2, 16))
    ```
    """
    return (action * y).sum(-1)


def semantic_gradient(mu: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The semantic reward at the mean action, and its tangent gradient; `tangent(mu, y)`, whose product is the reward."""
    reward = semantic_reward(mu, y)
    return reward, torch.addcmul(y, reward.unsqueeze(-1), mu, value=-1)


def take_tokens(x: torch.Tensor, subset: torch.Tensor) -> torch.Tensor:
    """Rows `subset [B,M]` of `x [B,N,E]`, `[B,M,E]`."""
    return x.gather(1, subset.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def structural_reward(action: torch.Tensor, mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor) -> torch.Tensor:
    """`R_st(a_n) = -(1/M) sum_{m in S} (<a_n, sg mu_m> - <y_n, y_m>)^2`, at most 0, `[B,N]`.

    The relations of a token to the tokens S (`subset [B,M]`, row indices) must match the encoder's.
    """
    relations = action @ take_tokens(mu.detach(), subset).mT
    return -(relations - y @ take_tokens(y, subset).mT).square().mean(-1)


def structural_gradient(mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The structural reward at the mean action, and its tangent gradient; both come from one difference of relations."""
    mu_s = take_tokens(mu, subset)
    difference = torch.baddbmm(mu @ mu_s.mT, y, take_tokens(y, subset).mT, alpha=-1)
    # With beta 0 the first argument is not read.
    gradient = torch.baddbmm(mu, difference, mu_s, beta=0, alpha=-2 / subset.shape[1])
    return -difference.square().mean(-1), tangent(mu, gradient)


BUILT_IN = {
    "semantic": TokenReward(
        "semantic",
        lambda action, mu, y, subset: semantic_reward(action, y),
        lambda mu, y, subset: semantic_gradient(mu, y),
    ),
    "structural": TokenReward("structural", structural_reward, structural_gradient),
}


@torch.no_grad()
def values_and_gradients(
    rewards: Sequence[TokenReward], mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rewards at the mean action, each `[B,N]`, and their tangent gradients `P_mu grad R_k`, each `[B,N,E]`."""
    # Under autocast the products would run in half precision, whose rounding is larger than the rewards' differences. TF32's is
    # small enough (docs/speed.md).
    with torch.autocast(mu.device.type, enabled=False):
        found = [reward.value_and_gradient(mu, y, subset) for reward in rewards]
    return [value for value, _ in found], [gradient for _, gradient in found]


def reward_gradients(
    rewards: Sequence[TokenReward], mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rewards at the mean action, `[B,N,K]`, and their tangent gradients, each `[B,N,E]`."""
    values, gradients = values_and_gradients(rewards, mu, y, subset)
    return torch.stack(values, dim=-1), gradients


def load_rewards(entries: Sequence[str | Callable | TokenReward]) -> tuple[bool, list[TokenReward]]:
    """Loads rewards; returns whether fidelity is among them, and the token rewards.

    Args:
        entries: `"fidelity"`, which must come first; `"semantic"`, `"structural"`; a `TokenReward`; a function as for
            `TokenReward`, whose name becomes the reward's; or `"package.module:name"` of either.

    Raises:
        InputError: if an entry is something else, a name appears twice, or there are no token rewards.
    """
    rewards, fidelity = [], False
    for number, entry in enumerate(entries):
        if entry == FIDELITY:
            fidelity = True
            if number > 0:
                raise InputError("rewards", f"`rewards` {entry} must come first")
            continue
        rewards.append(_load_reward(entry))
    names = [FIDELITY] * fidelity + [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError("rewards", f"`rewards` has {twice[0]} twice")
    if not rewards:
        raise InputError("rewards", "`rewards` needs at least one reward of tokens, such as semantic")
    return fidelity, rewards


def _load_reward(entry: str | Callable | TokenReward) -> TokenReward:
    if isinstance(entry, str) and entry in BUILT_IN:
        return BUILT_IN[entry]
    if isinstance(entry, str):
        entry = import_reward(entry, "rewards", (FIDELITY, *BUILT_IN))
    if isinstance(entry, TokenReward):
        return entry
    if not callable(entry):
        raise InputError("rewards", f"`rewards` {entry!r} is not a function of (action, mu, y, subset)")
    return TokenReward(getattr(entry, "__name__", type(entry).__name__), entry)


def import_reward(entry: str, option: str, built_in: Sequence[str]):
    """Imports the object `"package.module:name"`.

    Args:
        option: the option or argument that errors name.
        built_in: the other values that the option takes.

    Raises:
        InputError: if the text is something else, or the object cannot be imported.
    """
    module, _, name = entry.partition(":")
    if not module or not name:
        raise InputError(option, f"`{option}` {entry!r} is neither {', '.join(built_in)} nor package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever that module raises when it is imported
        raise InputError(option, f"`{option}` {entry} cannot be imported: {first_line(error)}") from error
