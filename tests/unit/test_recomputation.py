# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`gradient_checkpointing`: the same gradients to the bit, less memory, and values that cannot work."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.command_line import file_to_argv, given_options, training_parser
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.training.memory import training_timeline
from diffusers_vrpo.training.recomputation import recompute
from diffusers_vrpo.training.throughput import forward_flops, recomputed_flops


VALUES = ["full", "attention", "mlp", "every:2"]
TINY = {"patch_size": 2, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}


def tiny() -> SiTTransformer2DModel:
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**TINY, qk_norm="rms_norm").train()
    for block in model.transformer_blocks:  # whose gates start at zero
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


@pytest.mark.parametrize("value", VALUES)
def test_gradients_are_the_same_to_the_bit(value):
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 7])
    gradients, models = [], [plain := tiny(), copy.deepcopy(plain)]
    recompute(models[1], value)
    for model in [*models, copy.deepcopy(models[1])]:
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs, return_dict=False)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    # In sampling nothing is kept, so nothing is computed again.
    with torch.no_grad():
        assert torch.equal(models[0](*inputs).sample, models[1](*inputs).sample)


@pytest.mark.slow
def test_compiled_blocks_recompute_their_parts():
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 7])
    plain, compiled = tiny(), tiny()
    recompute(compiled, "mlp")
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for model in (plain, compiled):
        model(*inputs, return_dict=False)[0].square().mean().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_what_is_saved_and_what_is_computed_again():
    saved, config = {}, dict(TINY)
    for value in (False, *VALUES, "every:1"):
        aligned = AlignedTransformer(tiny())
        recompute(aligned.transformer, value)
        args = VRPOConfig(objective="none", resolution=8, mixed_precision="bf16")
        saved[value] = training_timeline(args, aligned, (4, 8, 8), with_pixels=False).saved[1]
    assert all(saved["full"] < saved[value] < saved[False] for value in ("attention", "mlp", "every:2"))
    assert saved["every:1"] == saved["full"]
    flops = {value: recomputed_flops(config, value) for value in (False, *VALUES)}
    assert flops[False] == 0 and flops["every:2"] * 3 == flops["full"]  # one of three blocks
    modulation = 3 * 2 * 6 * 32**2
    assert flops["attention"] + flops["mlp"] + modulation == flops["full"] < forward_flops(config)
    # Two thirds of a block's products are the feed-forward's, and its activations are the larger part, too.
    large = {value: recomputed_flops(sit_preset("SiT-XL/2"), value) for value in VALUES}
    assert large["attention"] < large["mlp"] < large["full"] < forward_flops(sit_preset("SiT-XL/2"))


def test_a_given_transformer():
    """Whole blocks of any transformer of diffusers can be computed again; parts of its blocks are not known."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "in_channels": 4}
    plain = DiTTransformer2DModel(**sizes, out_channels=4, num_embeds_ada_norm=10, norm_num_groups=4).train()
    other = copy.deepcopy(plain)
    recompute(other, "every:2")
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.tensor([1, 2])
    for model in (plain, other):
        torch.manual_seed(1)  # of its label dropout
        model(x, t, labels, return_dict=False)[0].square().mean().backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), other.parameters()) if a.grad is not None
    )
    with pytest.raises(
        InputError, match="`gradient_checkpointing` mlp works with the SiT and DiT of this package only"
    ):
        recompute(other, "mlp")
    with pytest.raises(
        InputError, match="every:3 would recompute nothing, because DiTTransformer2DModel has 2 blocks"
    ):
        recompute(other, "every:3")


def given(*argv) -> dict:
    return given_options(training_parser(), list(argv))


def test_the_flag_alone_its_negation_and_its_values(tmp_path, capsys):
    name = "gradient_checkpointing"
    assert given() == {}
    for argv, value in (
        ([f"--{name}"], "full"),
        ([f"--{name}", "--seed", "3"], "full"),
        ([f"--{name}", "attention"], "attention"),
        ([f"--{name}=every:4"], "every:4"),
        ([f"--no-{name}"], False),
        ([f"--{name}", f"--no-{name}"], False),
    ):
        assert getattr(VRPOConfig(**given(*argv)), name) == value
    with pytest.raises(SystemExit):
        given(f"--no-{name}", "mlp")
    assert "--no-gradient_checkpointing takes no value, but is followed by mlp" in capsys.readouterr().err

    # In Python and in files, also in those that an older version wrote, it is true or false, too.
    assert VRPOConfig(gradient_checkpointing=True).gradient_checkpointing == "full"
    file = tmp_path / "run.yaml"
    for text, argv in (("true", "--%s"), ("false", "--no-%s"), ("mlp", "--%s=mlp"), ("every:2", "--%s=every:2")):
        file.write_text(f"{name}: {text}\n")
        assert file_to_argv(training_parser(), str(file)) == [argv % name]


@pytest.mark.parametrize("value", ["some", "every", "every:0", "every:-1", "every:x", "mlp:2"])
def test_values_that_cannot_work(value):
    with pytest.raises(InputError, match="is neither full, attention, mlp nor every:K with a whole number K"):
        VRPOConfig(gradient_checkpointing=value)
    with pytest.raises(InputError, match="`gradient_checkpointing` must be text, not 3"):
        VRPOConfig(gradient_checkpointing=3)
