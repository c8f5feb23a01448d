# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A transformer of diffusers in the trainer, on two processes."""

import pytest
import torch

from support.training import losses


needs_sharding = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch shards on GPUs only")

PROGRAM = """
import os, sys
import torch
from diffusers import DiTTransformer2DModel
from diffusers_vrpo import ModelAdapter, VRPOConfig, VRPOTrainer

class FlowDiT(ModelAdapter):
    null_class_id = 10

    def prepare(self, transformer):
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def call(self, model, x_t, timestep, batch):
        return model(x_t, timestep=1000 * timestep, class_labels=batch["class_labels"])

# Each process has built other weights: those of the first one count.
torch.manual_seed(int(os.environ.get("RANK", 0)))
sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_embeds_ada_norm": 10}
transformer = DiTTransformer2DModel(**sizes, sample_size=8, in_channels=3, out_channels=3)
args = VRPOConfig(
    output_dir=sys.argv[1], dataset_name="embedded:digits", resolution=8, projector_dim=16, train_batch_size=int(sys.argv[2]),
    max_train_steps=3, learning_rate=0.001, logging_steps=1, dataloader_num_workers=0, report_to="none",
)
with VRPOTrainer(transformer=transformer, adapter=FlowDiT(), encoders="embedded:digits", vae="none", args=args) as trainer:
    trainer.train()
    trainer.save_model()
"""


@pytest.mark.slow
@pytest.mark.parametrize("hook", [None, pytest.param("fsdp of a DiT", marks=needs_sharding)])
def test_two_processes_train_the_first_ones_weights(trainers, tmp_path, hook):
    (tmp_path / "train.py").write_text(PROGRAM)
    program = {"program": str(tmp_path / "train.py")}
    trainers([tmp_path / "one", 32], **program).finish()
    trainers([tmp_path / "two", 16], hook=hook, processes=2, **program).finish()
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 3 and (one - two).abs().max() <= 1e-5
    assert (tmp_path / "two" / "transformer" / "config.json").is_file()
