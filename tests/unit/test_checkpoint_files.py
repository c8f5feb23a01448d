# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Checkpoint files in any container, files that are something else, and folders whose weights are not whole."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.official_checkpoints import convert_checkpoint, read_projector_file
from support.models import tiny_model
from support.official import official_state, saved


STATE = official_state()
ZEROS = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}


def under(prefix: str, state=STATE) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(wrapper: str) -> dict:
    return {name.replace("blocks.1.", f"blocks.1.{wrapper}"): tensor for name, tensor in STATE.items()}


CONTAINERS = {
    "model_state_dict": {"model_state_dict": STATE, "epoch": 3},
    "ema_model": {"ema_model": STATE, "model": ZEROS},
    "averaged under two names": {"ema": {"module": STATE}, "model": ZEROS},
    "empty ema": {"ema": {}, "model": STATE},
    "AveragedModel": {"n_averaged": torch.tensor(3), **under("module.")},
    "ema_pytorch": {"initted": torch.tensor(True), **under("ema_model."), **under("online_model.", ZEROS)},
    "Lightning": {"state_dict": {**under("model.net."), "vae.weight": torch.zeros(2)}, "global_step": 3},
    "compiled block": inside("_orig_mod."),
    "checkpointed block": inside("_checkpoint_wrapped_module."),
    "sharded block": inside("_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "all at once": under("_fsdp_wrapped_module._orig_mod.module.model.diffusion_model."),
    "net": under("net."),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_and_wrappers(tmp_path, case):
    expected = convert_checkpoint(saved(tmp_path, STATE), num_attention_heads=3).state_dict()
    found = convert_checkpoint(saved(tmp_path, CONTAINERS[case]), num_attention_heads=3).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


NAN = {**STATE, "x_embedder.proj.bias": STATE["x_embedder.proj.bias"] * float("nan")}
REFUSED = {
    "two models": ({"student": STATE, "teacher": STATE}, "several models"),
    "NaN": (NAN, "NaN or infinite in 1 of its weights .patch_embed.bias"),
    "integers": ({**STATE, "x_embedder.proj.bias": torch.zeros(24).int()}, "x_embedder.proj.bias is of type int32"),
    "a view": ({**STATE, "x_embedder.proj.bias": torch.zeros(1).expand(10**9)}, "larger than what the file holds"),
    "block missing": ({n: x for n, x in STATE.items() if "blocks.1." not in n}, "none with the number 1"),
    "a million": (STATE | {"blocks.999999.attn.proj.bias": torch.zeros(1)}, "none with the number 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_refused(tmp_path, case):
    content, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        convert_checkpoint(saved(tmp_path, content), num_attention_heads=3)


def old_file() -> bytes:
    """A file as PyTorch wrote it before version 1.6."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FILES = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 27\n",
        "Git LFS pointer of a file of 27",
    ),
    "page": (b"<!DOCTYPE html><html></html>", "web page"),
    "json": (b'{"a": 1}', "JSON file"),
    "text": (b"hello", "text file"),
    "zeros": (bytes(9000), "zeros only"),
    "empty": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08rest", "gzip"),
    "noise": (b"\xf0\x9f\x01\x02" * 90, "neither a PyTorch nor a safetensors file"),
    "cut zip": (b"PK\x03\x04" + bytes(100), "truncated"),
    "code": (pickle.dumps(Path("x")), "could run code"),
    "cut old file": (old_file()[:-2000], "truncated"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_that_hold_no_checkpoint(tmp_path, case, ending):
    content, message = FILES[case]
    (tmp_path / f"file.{ending}").write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(str(tmp_path / f"file.{ending}"))


def test_a_cut_safetensors_file_tells_its_size(tmp_path):
    save_file(STATE, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"it has {len(whole) - 1} of {len(whole)} bytes"):
        convert_checkpoint(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("name", ["old.pt", "old.safetensors"])
def test_the_content_decides_the_format(tmp_path, name):
    (tmp_path / name).write_bytes(old_file())
    assert convert_checkpoint(str(tmp_path / name), num_attention_heads=3).config.num_layers == 3
    save_file(STATE, tmp_path / "other.pt")
    assert convert_checkpoint(str(tmp_path / "other.pt"), num_attention_heads=3).config.num_layers == 3


@pytest.mark.parametrize("arguments", [{"max_shard_size": "50KB"}, {"variant": "fp16"}])
def test_shards_and_variants_open_by_their_own_path(tmp_path, arguments):
    model = tiny_model()
    model.save_pretrained(tmp_path / "alone", **arguments)
    VRPOPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "pipeline", **arguments)
    assert not (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").exists()
    for found in (
        convert_checkpoint(str(tmp_path / "alone")),
        SiTTransformer2DModel.from_pretrained(tmp_path / "alone"),
        convert_checkpoint(str(tmp_path / "pipeline")),
        VRPOPipeline.from_pretrained(tmp_path / "pipeline").transformer,
    ):
        assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


BIAS = "proj_out.bias"
FAULTS = {
    "missing": (lambda state: state.pop(BIAS), "1 missing: proj_out.bias"),
    "integer": (lambda state: state.update({BIAS: state[BIAS].int()}), "proj_out.bias I32"),
    "NaN": (lambda state: state[BIAS].fill_(float("nan")), "1 NaN or infinite: proj_out.bias"),
    "shape": (lambda state: state.update({BIAS: torch.zeros(3)}), r"proj_out.bias \(3,\) instead of \(16,\)"),
    "unknown": (lambda state: state.update({"other": torch.zeros(3)}), "1 unknown: other"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_folder_with_faulty_weights_does_not_open(tmp_path, case):
    change, message = FAULTS[case]
    model = tiny_model()
    VRPOPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        VRPOPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "size", [{"num_layers": 1_000_000}, {"sample_size": 65_536, "patch_size": 1}, {"attention_head_dim": "16"}]
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, size):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | size))
    with pytest.raises(InputError, match=next(iter(size))):
        convert_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["[1, 2]", "3", "", "[" * 100_000, "{"], ids=["list", "3", "empty", "deep", "cut"])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    VRPOPipeline(tiny_model(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text(text)
    for opened in (
        lambda: SiTTransformer2DModel.from_pretrained(tmp_path / "transformer"),
        lambda: VRPOPipeline.from_pretrained(tmp_path),
        lambda: convert_checkpoint(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"config\.json"):
            opened()


@pytest.mark.parametrize("text", ["[1, 2]", "3", "", "[" * 100_000], ids=["list", "3", "empty", "deep"])
def test_an_index_that_is_no_object_is_named(tmp_path, text):
    VRPOPipeline(tiny_model(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"model_index\.json"):
        VRPOPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("description", ["", "[1]", "[" * 100_000], ids=["empty", "list", "deep"])
def test_projectors_with_a_description_of_another_form_are_named(tmp_path, description):
    save_file({"projectors.0": torch.zeros(2)}, tmp_path / "projectors.safetensors", {"description": description})
    with pytest.raises(InputError, match="projectors.safetensors cannot be read"):
        read_projector_file(tmp_path / "projectors.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_weights_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        tiny_model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
