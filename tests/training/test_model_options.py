# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Options of models and their training that users bring: what they change, what is refused, and resuming with them."""

import pytest
import torch

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.errors import InputError
from support.models import digits_model
from support.trainers import assert_same_end
from support.training import run


def train_twice(command, tmp_path, *flags: str, **options):
    """Trains four steps at once, and two and two in another folder, which must end with the same bits."""
    options = {"logging_steps": 2, **options}
    run([*command(**options), *flags])
    halves = tmp_path / "halves"
    for steps in (2, 4):
        run([*command(**options, output_dir=halves, max_train_steps=steps), *flags])
    assert_same_end(tmp_path / "run", halves, 4)


# Queries and keys


def test_qk_norm_trains_resumes_and_opens(command, tmp_path):
    train_twice(command, tmp_path, "--qk_norm")
    transformer = VRPOPipeline.from_pretrained(tmp_path / "run").transformer
    assert transformer.config.qk_norm == "rms_norm"
    norm = transformer.transformer_blocks[0].attn.norm_q
    # It began at 1, as the scale of a norm does, and has been trained.
    assert 0 < (norm.weight - 1).abs().max() < 0.2
    with pytest.raises(InputError, match="the model's qk_norm is False, but .* was trained with rms_norm"):
        run(command())
    # Weights keep the norm that they have, and get none that they were not trained with.
    start = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "run", "max_train_steps": 1}
    run(command(**start, output_dir=tmp_path / "next"))
    assert VRPOPipeline.from_pretrained(tmp_path / "next").transformer.config.qk_norm == "rms_norm"
    for found, message in ((False, "without a norm of"), (True, "with a LayerNorm on")):
        digits_model(qk_norm=found).save_pretrained(tmp_path / "other")
        start["pretrained_model_name_or_path"] = tmp_path / "other"
        with pytest.raises(InputError, match=f"`qk_norm`: .*other was trained {message} queries and keys; remove it"):
            run([*command(**start, output_dir=tmp_path / "third"), "--qk_norm"])


@torch.no_grad()
def test_rms_norm_of_queries_and_keys(tmp_path):
    model = digits_model(qk_norm="rms_norm")
    x = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(model(*x).sample, loaded(*x).sample)
    # As LightningDiT has it: x / rms(x), times a scale of each channel, without a bias; float32 under autocast.
    norm, query = model.transformer_blocks[0].attn.norm_k, torch.randn(2, 16, 2, 16)
    expected = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(query), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(query.bfloat16()).dtype == torch.float32
        assert model(*x).sample.isfinite().all()
    with pytest.raises(ValueError, match="qk_norm 'layer' must be one of False, True, rms_norm"):
        digits_model(qk_norm="layer")
