# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Models of other code: the official layouts with their forward pass, and diffusers' DiT."""

import math

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel


def sincos(dim: int, side: int) -> torch.Tensor:
    """The official position table: half of the width for the column, half for the row, sines before cosines."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = [f(p.reshape(-1, 1) * frequencies) for p in (columns, rows) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


def official_state(dim=24, depth=3, patch=2, channels=4, side=4, rows=8, sigma=True, qk_norm=0, z=(), mlp=4, seed=0):
    """Random weights in the official key layout."""
    generator = torch.Generator().manual_seed(seed)

    def linear(name, out_features, in_features):
        return {
            f"{name}.weight": 0.2 * torch.randn(out_features, in_features, generator=generator),
            f"{name}.bias": 0.2 * torch.randn(out_features, generator=generator),
        }

    state = {"pos_embed": sincos(dim, side)}
    state |= {"x_embedder.proj.weight": 0.3 * torch.randn(dim, channels, patch, patch, generator=generator)}
    state |= {"x_embedder.proj.bias": torch.randn(dim, generator=generator)}
    state |= linear("t_embedder.mlp.0", dim, 256) | linear("t_embedder.mlp.2", dim, dim)
    state |= {"y_embedder.embedding_table.weight": torch.randn(rows, dim, generator=generator)}
    for i in range(depth):
        state |= linear(f"blocks.{i}.attn.qkv", 3 * dim, dim) | linear(f"blocks.{i}.attn.proj", dim, dim)
        state |= linear(f"blocks.{i}.mlp.fc1", mlp * dim, dim) | linear(f"blocks.{i}.mlp.fc2", dim, mlp * dim)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * dim, dim)
        if qk_norm:
            for letter in "qk":
                state[f"blocks.{i}.attn.{letter}_norm.weight"] = 1 + torch.rand(qk_norm, generator=generator)
                state[f"blocks.{i}.attn.{letter}_norm.bias"] = torch.rand(qk_norm, generator=generator)
    state |= linear("final_layer.linear", patch**2 * channels * (2 if sigma else 1), dim)
    state |= linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    for i, width in enumerate(z):
        state |= linear(f"projectors.{i}.0", 20, dim) | linear(f"projectors.{i}.2", 20, 20)
        state |= linear(f"projectors.{i}.4", width, 20)
    return state


def official_forward(state, x, t, labels, heads, aligned=None):
    """The official models' forward pass, from their state dict alone; also the projections after block `aligned`."""

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    def modulated(value, shift, scale):
        return norm(value) * (1 + scale[:, None]) + shift[:, None]

    patches = state["x_embedder.proj.weight"]
    dim, channels, p = patches.shape[:3]
    h = F.conv2d(x, patches, state["x_embedder.proj.bias"], stride=p)
    side = h.shape[-1]
    h = h.flatten(2).mT + state["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t.float()[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][labels])
    depth = sum(name.endswith("mlp.fc1.weight") for name in state)
    projections = []
    for i in range(depth):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(h, m[0], m[1])).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if f"blocks.{i}.attn.q_norm.weight" in state:
            q, k = (
                F.layer_norm(
                    a,
                    a.shape[-1:],
                    state[f"blocks.{i}.attn.{n}_norm.weight"],
                    state[f"blocks.{i}.attn.{n}_norm.bias"],
                )
                for n, a in (("q", q), ("k", k))
            )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + m[2][:, None] * linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulated(h, m[3], m[4])), approximate="tanh")
        h = h + m[5][:, None] * linear(f"blocks.{i}.mlp.fc2", inner)
        if i + 1 == aligned:
            j = 0
            while f"projectors.{j}.4.weight" in state:
                hidden = F.silu(linear(f"projectors.{j}.2", F.silu(linear(f"projectors.{j}.0", h))))
                projections.append(linear(f"projectors.{j}.4", hidden))
                j += 1
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale)).unflatten(-1, (p, p, -1))
    out = out.unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return out, projections


def saved(tmp_path, content, name="checkpoint.pt") -> str:
    """Saves a checkpoint as the official scripts do, and returns its path."""
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def tiny_dit(**changes) -> DiTTransformer2DModel:
    """Diffusers' DiT with random weights and tied embedders."""
    torch.manual_seed(0)
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    model = DiTTransformer2DModel(**{**arguments, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()
