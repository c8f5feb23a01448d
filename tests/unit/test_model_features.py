# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What diffusers' models offer, on ours: attention backends, compilation, adapters, casting, caching."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from support.models import aligned_with, inputs, needs_compiler, tiny_model


@pytest.mark.parametrize("qk_norm", [False, True, "rms_norm"])
@torch.no_grad()
def test_fused_projections_give_the_same(qk_norm):
    model = tiny_model(qk_norm=qk_norm)
    before = model(*inputs()).sample
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(model(*inputs()).sample, before)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(model(*inputs()).sample, before)


@torch.no_grad()
def test_attention_backends_give_the_same():
    model = tiny_model()
    before = model(*inputs()).sample
    for backend in ("_native_math", "native"):
        model.set_attention_backend(backend)
        assert model.transformer_blocks[0].attn.processor._attention_backend == backend
        torch.testing.assert_close(model(*inputs()).sample, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_qk_norm_bounds_the_attention_logits():
    model = tiny_model(qk_norm=True)
    attention = model.transformer_blocks[0].attn
    torch.nn.init.ones_(attention.norm_q.weight)
    torch.nn.init.zeros_(attention.norm_q.bias)
    attention.to_q.weight *= 1000
    h = torch.randn(2, 16, 32)
    query = attention.norm_q(attention.to_q(h).unflatten(-1, (2, 16)))
    torch.testing.assert_close(query.square().mean(-1), torch.ones(2, 16, 2), atol=1e-3, rtol=0)
    # The model uses it: a scale of the queries does nothing, where without the norm it would.
    before = model(*inputs()).sample
    attention.to_q.weight *= 10
    attention.to_q.bias *= 10
    torch.testing.assert_close(model(*inputs()).sample, before, atol=1e-4, rtol=1e-4)
    plain = tiny_model()
    before = plain(*inputs()).sample
    plain.transformer_blocks[0].attn.to_q.weight *= 10
    assert (plain(*inputs()).sample - before).abs().max() > 1e-3


@needs_compiler
@pytest.mark.slow
def test_regional_compilation_gives_the_same_output_and_gradients():
    """The repeated blocks are compiled, whole, once for all of them; projections stay outside."""
    results = []
    for compiled in (False, True):
        model = tiny_model(num_layers=4).train()
        if compiled:
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("inductor")
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        aligned = aligned_with(model).train()
        sample, projections = aligned(*inputs())
        (sample.square().mean() + projections[0].square().mean()).backward()
        results.append([sample.detach(), *(p.grad for p in aligned.parameters())])
    assert counter.frame_count == 1
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@needs_compiler
def test_compiled_checkpointed_blocks_train():
    torch._dynamo.reset()
    gradients, saved = [], []
    for compiled in (False, True):
        model = tiny_model().train()
        aligned = aligned_with(model).train()
        if compiled:
            model.enable_gradient_checkpointing()
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        saved.append(0)

        def count(tensor):
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            sample, projections = aligned(*inputs())
            loss = sample.square().mean() + projections[0].square().mean()
        loss.backward()
        gradients.append([p.grad for p in aligned.parameters()])
    # Checkpointed blocks keep their inputs alone for the backward pass.
    assert saved[1] < 0.5 * saved[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_lora_adapters_are_added_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = model(*inputs()).sample
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()).sample, plain)  # B starts at zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
        adapted = model(*inputs()).sample
    assert (adapted - plain).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path / "adapter")
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "base")
    loaded.load_lora_adapter(str(tmp_path / "adapter"), prefix=None, use_safetensors=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs()).sample, adapted)
        loaded.disable_adapters()
        torch.testing.assert_close(loaded(*inputs()).sample, plain)


@torch.no_grad()
def test_layerwise_casting_stores_the_blocks_in_eight_bits():
    model, (x, t, labels) = tiny_model(), inputs()
    exact = model(x, t, labels).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == block.ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert model.patch_embed.weight.dtype == model.time_embedding.linear_1.weight.dtype == torch.float32
    cast = model(x, t, labels).sample
    error = (cast - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.1
    assert block.attn.to_q.weight.dtype == torch.float8_e4m3fn  # and not left in the computing type


@torch.no_grad()
def test_first_block_cache_skips_blocks_and_forgets_between_calls():
    torch.manual_seed(0)
    pipeline = VRPOPipeline(tiny_model(in_channels=3, num_layers=4), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    runs = []
    pipeline.transformer.transformer_blocks[2].attn.register_forward_hook(lambda *_: runs.append(1))

    def sample():
        runs.clear()
        # Guided and unguided steps have other batch sizes, and each its own cache.
        images = pipeline(
            [1, 2],
            num_inference_steps=8,
            guidance_interval=(0.2, 0.6),
            guidance_scale=2.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        return images, len(runs)

    exact, all_runs = sample()
    assert all_runs == 8
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    same, count = sample()
    assert count == 8 and torch.equal(same, exact)
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached, count = sample()
    assert count == 2  # once guided, once not
    assert 0 < (cached - exact).abs().mean() < exact.abs().mean()
    again, count = sample()
    assert count == 2 and torch.equal(again, cached)
    pipeline.transformer.disable_cache()
    assert torch.equal(sample()[0], exact)
