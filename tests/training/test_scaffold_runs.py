# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Runs with a scaffold: resumed across its end, divided among processes, and what they publish."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_vrpo import AlignedTransformer, VRPOConfig, VRPOPipeline, VRPOTrainer, load_encoder
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.metrics import read_metrics
from support.training import TINY_DIGITS, assert_same_files, losses, run


pytestmark = pytest.mark.usefixtures("one_core")

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
HALF = {"scaffold_fraction": 0.5, "scaffold_layer": 2}


def parts_of(objective: str) -> list[str]:
    names = ["scaffold"] if objective == "repi" else ["projectors", "scaffold"]
    return [WEIGHTS, *(f"{name}{suffix}.safetensors" for name in names for suffix in ("", "_ema"))]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["repi", "vrpo"])
def test_a_run_resumes_across_the_end_of_the_phase(command, tmp_path, objective):
    """Bit by bit, from a checkpoint in the phase of three steps, and with projectors also from one after it."""
    options = {"objective": objective, "max_train_steps": 5, "scaffold_layer": 2, "scaffold_fraction": 0.6}
    run(command(**options, checkpointing_steps=2))
    straight = tmp_path / "run" / "checkpoint-5"
    for step in (2, 4) if objective == "vrpo" else (2,):
        resumed = tmp_path / f"resumed-{step}"
        start = {"resume_from_checkpoint": tmp_path / "run" / f"checkpoint-{step}", "output_dir": resumed}
        run(command(**options, **start))
        assert_same_files(straight, resumed / "checkpoint-5", parts_of(objective))
        left, right = (
            torch.load(path / "optimizer.bin", weights_only=True)["state"]
            for path in (straight, resumed / "checkpoint-5")
        )
        for key, state in left.items():
            assert all(torch.equal(tensor, right[key][name]) for name, tensor in state.items())
    distances = [row["scaffold_distance"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert distances[:3] == [0] * 3 and distances[3] > 0
    # The maps learn in the phase (once the block's gate is open) and then rest; what is published has neither.
    maps = [load_file(tmp_path / "run" / f"checkpoint-{n}" / "scaffold.safetensors") for n in (2, 4, 5)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(maps, maps[1:])]
    assert same == [False, True]
    assert not any("scaffold" in name for name in load_file(tmp_path / "run" / WEIGHTS))
    state = json.loads((straight / "training_state.json").read_text())
    assert state["alignment"]["scaffold_steps"] == 3 and state["settings"]["scaffold_fraction"] == 0.6


def test_a_run_whose_pull_ends_can_become_longer(command, tmp_path):
    options = {"objective": "repi", "scaffold_fraction": 0.5, "alignment_stop_step": 3}
    run(command(**options, max_train_steps=4))
    run(command(**options, max_train_steps=6))  # a half of them would be all steps before the end of the pull
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("scaffold_distance", -1) > 0 for row in rows] == [False, False, True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("objective, hook", [("repi", None), ("vrpo", "fsdp")])
def test_two_processes_train_as_one(command, trainers, tmp_path, objective, hook):
    if hook and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("torch shards on GPUs only")
    options = {"objective": objective, "max_train_steps": 6, "learning_rate": 1e-4, **HALF}
    assert trainers(command(**options)).wait() == [0]
    two = command(**options, train_batch_size=8, output_dir=tmp_path / "two")
    trainers(two, hook=hook, processes=2).finish()
    for key in ("loss_fm", "scaffold_distance", "grad_norm"):
        one, other = (
            torch.tensor([row[key] for row in read_metrics(tmp_path / folder / "metrics.jsonl")])
            for folder in ("run", "two")
        )
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for name in parts_of(objective):
        one, other = (load_file(tmp_path / folder / "checkpoint-6" / name) for folder in ("run", "two"))
        assert max((one[key] - other[key]).abs().max() for key in one) < 1e-3
    if hook is None:
        run(command(**options, train_batch_size=8, gradient_accumulation_steps=2, output_dir=tmp_path / "twice"))
        assert losses(tmp_path / "twice") == pytest.approx(losses(tmp_path / "run"), abs=2e-5)


def trainer_of(tmp_path, **changes) -> VRPOTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "model.json").write_text(json.dumps(TINY_DIGITS))
    options = {
        "output_dir": str(tmp_path / "run"),
        "dataset_name": "embedded:digits",
        "vae": "none",
        "encoder": ["embedded:digits"],
        "model_config": str(tmp_path / "model.json"),
        "resolution": 8,
        "projector_dim": 16,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    return VRPOTrainer(args=VRPOConfig(**(options | changes)))


def test_the_other_weights_start_as_without_a_scaffold(tmp_path):
    """Arms of a comparison begin with the same weights."""
    starts = []
    for changes in ({"objective": "repa"}, {"objective": "repa", "scaffold_layer": 1}, {"objective": "repi"}):
        with trainer_of(tmp_path, overwrite_output_dir=True, **changes) as trainer:
            starts.append({name: p.detach().clone() for name, p in trainer.aligned.named_parameters()})
            layer, flops = trainer.aligned.scaffold_layer, trainer.flops_per_image
    assert layer == 1 and flops[1] > flops[0]  # the encoder and the maps
    assert all(torch.equal(starts[1][name], p) for name, p in starts[0].items())
    assert {name for name in starts[2] if not name.startswith("transformer.")} == {
        f"scaffold.{part}.{kind}" for part in ("keys", "values") for kind in ("weight", "bias")
    }


def test_a_block_that_the_model_does_not_have(tmp_path):
    with pytest.raises(InputError, match="`scaffold_layer` 3 must be at most 2, the blocks of the transformer"):
        trainer_of(tmp_path, scaffold_layer=3)


def test_an_oracle_draws_what_it_is_shown(tmp_path, caplog):
    """With the trainer's own pipeline; the averaged maps are those of the averaged weights."""
    from diffusers_vrpo.training.distributed import ema_weights

    with trainer_of(tmp_path, objective="repi", scaffold_fraction=1.0) as trainer:
        trainer.train()
        assert trainer.objective.scaffolding(10**6)
        images = torch.rand(2, 3, 8, 8) * 2 - 1
        draw = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
        pictures = []
        with ema_weights(trainer.ema, trainer.aligned):
            for shown in (images, -images):
                with trainer.aligned.oracle(shown):
                    generator = torch.Generator().manual_seed(0)
                    pictures.append(trainer.pipeline([1, 2], generator=generator, **draw).images)
        assert not torch.equal(*map(torch.as_tensor, pictures))
        trainer.save_model()
    assert "the scaffold phase has not ended at step 2" in caplog.text

    # The same from what is saved: the published pipeline, and the maps of its checkpoint.
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    encoder = load_encoder("embedded:digits", (4, 4))
    aligned = AlignedTransformer(pipeline.transformer, encoders=[encoder], scaffold_layer=1)
    aligned.scaffold.load_state_dict(load_file(tmp_path / "run" / "checkpoint-2" / "scaffold_ema.safetensors"))
    with aligned.oracle(images):
        again = pipeline([1, 2], generator=torch.Generator().manual_seed(0), **draw).images
    torch.testing.assert_close(torch.as_tensor(again), torch.as_tensor(pictures[0]))
