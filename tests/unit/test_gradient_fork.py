# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import itertools
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_vrpo.alignment.gradient_fork import CONFLICTS, fork, measuring_probe, mix_gradients


B, N, D = 4, 3, 6
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


class Tiny(nn.Module):
    """A block, the fork, a block; `forward` gives the flow-matching prediction and the projection."""

    def __init__(self, conflict="none", checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above, self.projector = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 5)
        self.conflict, self.checkpointed = conflict, checkpointed

    def block(self, linear, x):
        def run(x):
            return x + torch.tanh(linear(x))

        return checkpoint(run, x, use_reentrant=False) if self.checkpointed else run(x)

    def hidden(self, x):
        return self.block(self.below, x)

    def forward(self, x, share, probe):
        h_main, h_align = fork(self.hidden(x), share, probe, self.conflict)
        return self.block(self.above, h_main), self.projector(h_align)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(B, N, D, generator=generator) for _ in range(2))
    features = torch.randn(B, N, 5, generator=generator)
    share = torch.tensor([0.0, 0.3, 0.5, 1.0])
    return x, target, features, share


def losses(prediction, projection, target, features):
    """Per sample, `[B]`."""
    loss_align = -(nn.functional.normalize(projection, dim=-1) * nn.functional.normalize(features, dim=-1)).sum(-1)
    return (prediction - target).square().mean((1, 2)), loss_align.mean(1)


def reference(conflict):
    """Gradients of all parameters, cosines and ratios of norms, from two backward passes and the formula, per sample."""
    model = Tiny()
    x, target, features, share = data()
    h = model.hidden(x)
    h_leaf = h.detach().requires_grad_()
    loss_main, loss_align = losses(model.block(model.above, h_leaf), model.projector(h_leaf), target, features)
    (g_main,) = torch.autograd.grad(loss_main.mean(), h_leaf, retain_graph=True)
    (g_align,) = torch.autograd.grad(0.5 * loss_align.mean(), h_leaf, retain_graph=True)
    mixed, cosines, ratios = torch.zeros_like(g_main), torch.zeros(B), torch.zeros(B)
    for i in range(B):
        main, align = g_main[i].double(), g_align[i].double()
        cosines[i] = (main * align).sum() / main.norm() / align.norm()
        ratios[i] = align.norm() / main.norm()
        if conflict == "project" and cosines[i] < 0:
            align = align - (align * main).sum() / (main * main).sum() * main
        mixed[i] = main + (1 - share[i]) * align + share[i] * align.norm() / main.norm() * main
    h.backward(mixed)
    (loss_main.mean() + 0.5 * loss_align.mean()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, torch.stack([cosines, ratios])


def assert_near(actual, expected):
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "mode, conflict",
    [
        *itertools.product(["eager", "checkpointed", "accumulated", "scaled", "aot_eager"], CONFLICTS),
        pytest.param("inductor", "project", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_one_backward_gives_what_two_give(mode, conflict):
    expected, expected_measures = reference(conflict)
    assert expected_measures[0].min() < 0 < expected_measures[0].max()
    model = Tiny(conflict, checkpointed=mode == "checkpointed")
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend=mode) if mode in ("aot_eager", "inductor") else model
    x, target, features, share = data()
    micro_steps, scale = (2 if mode == "accumulated" else 1), (1024.0 if mode == "scaled" else 1.0)
    measures = []
    for part in torch.arange(B).chunk(micro_steps):
        probe = measuring_probe(len(part))
        prediction, projection = run(x[part], share[part], probe)
        loss_main, loss_align = losses(prediction, projection, target[part], features[part])
        loss = (loss_main.mean() + 0.5 * loss_align.mean()) / micro_steps
        (scale * loss).backward()
        measures.append(probe.grad)
    for actual, wanted in zip(torch.cat(measures, dim=1), expected_measures, strict=True):
        assert_near(actual, wanted)
    for name, p in model.named_parameters():
        assert_near(p.grad / scale, expected[name])


def test_mixed_gradient_by_hand():
    # Norms 5 and 2, cosine 0.6; then -0.6; then gradients that are zero.
    g_main = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])[:, None]
    g_align = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])[:, None]
    share = torch.full((4,), 0.25)
    mixed, (cosine, ratio) = mix_gradients(g_main, g_align, share)
    # 0.25 * 2/5 = 0.1 of g_main and 0.75 of g_align are added.
    expected = torch.tensor([[3.3 + 1.5, 4.4], [3.3 - 1.5, 4.4], [1.5, 0.0], [3.0, 4.0]])[:, None]
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(cosine, torch.tensor([0.6, -0.6, 0.0, 0.0]))
    torch.testing.assert_close(ratio, torch.tensor([0.4, 0.4, 0.0, 0.0]))
    mixed, (cosine, ratio) = mix_gradients(g_main, g_align, share, "project")
    # In the second, (-2, 0) loses -0.6 * 2 of (0.6, 0.8): (-1.28, 0.96), of norm 1.6.
    expected[1, 0] = torch.tensor([3 * 1.08 - 0.75 * 1.28, 4 * 1.08 + 0.75 * 0.96])
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(cosine, torch.tensor([0.6, -0.6, 0.0, 0.0]))
    torch.testing.assert_close(ratio, torch.tensor([0.4, 0.4, 0.0, 0.0]))


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_forward_is_the_identity_and_the_share_gets_no_gradient(conflict):
    h = torch.randn(B, N, D, requires_grad=True)
    share = torch.full((B,), 0.5, requires_grad=True)
    probe = measuring_probe(B)
    h_main, h_align = fork(h, share, probe, conflict)
    assert torch.equal(h_main, h) and torch.equal(h_align, h)
    (h_main.square().sum() - h_align.sin().sum()).backward()
    assert share.grad is None and probe.grad.abs().min() > 0


@pytest.mark.parametrize("used", ["main", "align"])
@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_a_branch_may_stay_unused(used, backend):
    torch._dynamo.reset()
    run = fork if backend == "none" else torch.compile(fork, fullgraph=True, backend=backend)
    h, probe = torch.randn(B, N, D, requires_grad=True), measuring_probe(B)
    share = torch.full((B,), 0.25)
    h_main, h_align = run(h, share, probe)
    (h_main if used == "main" else h_align).sum().backward()
    assert torch.equal(h.grad, torch.full_like(h, 1.0 if used == "main" else 0.75))
    assert torch.equal(probe.grad, torch.zeros(2, B))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_a_compiled_graph_may_end_at_the_fork(backend):
    """Compilers replace outputs that are views or copies of each other, and the gradients then go past the fork."""

    def block_and_fork(x, share, probe):
        return fork(x * 2, share, probe)

    def gradients(run):
        x, target, _, share = data()
        x.requires_grad_()
        probe = measuring_probe(B)
        h_main, h_align = run(x, share, probe)
        ((h_main - target).square().sum() + h_align.sin().sum()).backward()
        return probe.grad, x.grad

    torch._dynamo.reset()
    compiled = torch.compile(block_and_fork, fullgraph=True, backend=backend)
    for actual, expected in zip(gradients(compiled), gradients(block_and_fork)):
        torch.testing.assert_close(actual, expected)


def test_the_fidelity_share_lowers_the_samples_flow_matching_loss():
    model = Tiny()
    x, target, features, _ = data()
    h = model.hidden(x).detach()

    def gradient(share):
        leaf, probe = h.clone().requires_grad_(), measuring_probe(B)
        h_main, h_align = fork(leaf, torch.full((B,), share), probe)
        loss_main, loss_align = losses(model.block(model.above, h_main), model.projector(h_align), target, features)
        (loss_main.sum() + loss_align.sum()).backward()
        return leaf.grad

    def loss_main(h):
        with torch.no_grad():
            return losses(model.block(model.above, h), model.projector(h), target, features)[0]

    g_main = torch.autograd.functional.jacobian(
        lambda h: losses(model.block(model.above, h), model.projector(h), target, features)[0].sum(), h
    )
    g_align = gradient(0.0) - g_main
    step, share = 1e-2, 0.4
    fidelity_part = gradient(share) - g_main - (1 - share) * g_align
    norm_main, norm_align = (g.flatten(1).norm(dim=1) for g in (g_main, g_align))
    torch.testing.assert_close(fidelity_part.flatten(1).norm(dim=1), share * norm_align)
    change = loss_main(h - step * fidelity_part) - loss_main(h + step * fidelity_part)
    assert (change < 0).all()
    torch.testing.assert_close(change, -2 * step * share * norm_align * norm_main, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_finite(dtype, conflict, autocast):
    model = Tiny(conflict)
    x, target, features, share = data()
    if not autocast:
        model, x, target, features = model.to(dtype), x.to(dtype), target.to(dtype), features.to(dtype)
    probe = measuring_probe(B)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        prediction, projection = model(x, share, probe)
    loss_main, loss_align = losses(prediction.float(), projection.float(), target.float(), features.float())
    (64 * (loss_main.mean() + 0.5 * loss_align.mean())).backward()
    _, expected = reference(conflict)
    torch.testing.assert_close(probe.grad[0], expected[0], atol=0.1, rtol=0)
    torch.testing.assert_close(probe.grad[1], expected[1], atol=0, rtol=0.1)
    for p in model.parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_without_a_share_the_gradients_are_added(conflict):
    """None gives, to the bit, what a share of 0 gives."""
    torch.manual_seed(0)
    g_main, g_align = torch.randn(2, 4, 3, 5)
    for a, b in zip(
        mix_gradients(g_main, g_align, None, conflict), mix_gradients(g_main, g_align, 0 * g_main[:, 0, 0], conflict)
    ):
        assert torch.equal(a, b)
    if conflict != "project":
        assert torch.equal(mix_gradients(g_main, g_align, None)[0], g_main + g_align)


def test_norms_of_half_precision_gradients_do_not_overflow():
    # The squares of 300 and of 1e-4 lie outside of float16.
    g_main, g_align = torch.full((1, 64, 64), 300.0).half(), torch.full((1, 64, 64), -1e-4).half()
    for conflict in CONFLICTS:
        mixed, (cosine, ratio) = mix_gradients(g_main, g_align, torch.tensor([0.5]), conflict)
        assert ratio.item() == pytest.approx(1e-4 / 300, rel=1e-2)
        assert cosine.item() == pytest.approx(-1, abs=1e-5) and mixed.dtype == torch.float16
        torch.testing.assert_close(mixed, g_main)
        mixed, _ = mix_gradients(g_align, g_main, torch.tensor([0.5]), conflict)
        # Half of 300 in each direction cancel; projected, nothing of 300 is left.
        assert mixed.abs().max() < 1e-3


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_zero_and_opposite_gradients_give_no_nan(conflict):
    g = torch.randn(4, N, D)
    for g_main, g_align in ((g, g * 0), (g * 0, g), (g * 0, g * 0), (g, -g), (g * 1e-18, g)):
        mixed, (cosine, ratio) = mix_gradients(g_main, g_align, torch.tensor([0.0, 0.3, 0.6, 1.0]), conflict)
        assert ratio.isfinite().all() and (ratio >= 0).all()
        assert mixed.isfinite().all() and cosine.isfinite().all() and cosine.abs().max() <= 1 + 1e-6
        if not g_align.any():
            assert torch.equal(mixed, g_main) and not cosine.any()


def test_unknown_conflict():
    with pytest.raises(ValueError, match="conflict 'stop'"):
        fork(torch.zeros(1, 1, 1), torch.zeros(1), measuring_probe(1), "stop")
