# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""An aligned transformer in a plain accelerate loop of two processes, with DDP and with FSDP2."""

import json

import pytest
import torch


# Writes the losses, the logged rewards, and in the end the norm of each weight; alignment ends after three steps.
LOOP = """
import json, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.objective import VRPO

kind, file = sys.argv[1:]
accelerator = Accelerator(cpu=True)
if kind == "fsdp":  # accelerate has it for GPUs only; on the CPU its parts work all the same
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT",
    )
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP

class Pixels:
    embed_dim = 12
    def __call__(self, images):
        return torch.nn.functional.unfold(images, 2, stride=2).mT[..., :12]

torch.manual_seed(0)
transformer = SiTTransformer2DModel(
    sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=16, num_classes=5, class_dropout_prob=0
)
aligned = AlignedTransformer(transformer, [1, 2], [Pixels(), Pixels()], projector_dim=16)
for parameter in aligned.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
if kind != "ddp":
    transformer.enable_gradient_checkpointing()
objective = VRPO(aligned, 100, alignment_stop_step=3)
optimizer = torch.optim.AdamW(aligned.parameters(), lr=1e-3, weight_decay=0.1)
model, optimizer = accelerator.prepare(aligned, optimizer)
if kind == "fsdp":
    blocks = [module for module in aligned.modules() if type(module).__name__.startswith("FSDP")]
    assert len(blocks) == 4, len(blocks)  # three blocks and the wrapper
whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
first = [whole(p).clone() for p in aligned.projectors.parameters()]
generator = torch.Generator().manual_seed(1)
rows, size = [], 4 // accelerator.num_processes
part = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
for _ in range(6):
    x = torch.randn(4, 4, 8, 8, generator=generator)[part]
    t, images = torch.rand(4, generator=generator)[part], torch.rand(4, 3, 8, 8, generator=generator)[part]
    step = objective.begin(t)
    prediction, projections = model(x, t, torch.arange(4)[part], fork=step.fork, align=step.active)
    loss_fm = (prediction - x).square().flatten(1).mean(1)
    loss_rep = objective(step, projections, images, loss_fm, subset=torch.arange(16).expand(size, -1))
    loss = loss_fm.mean() + 0.5 * loss_rep
    accelerator.backward(loss)
    objective.observe(step)
    assert step.active or all(p.grad is None for p in aligned.projectors.parameters())
    optimizer.step()
    optimizer.zero_grad()
    objective.update(accelerator.reduce if accelerator.num_processes > 1 else None)
    if step.active:
        moved = [whole(p).clone() for p in aligned.projectors.parameters()]
    values = torch.stack([loss_fm.mean(), step.logs.get("reward/semantic", torch.zeros(()))]).detach()
    rows.append(accelerator.reduce(values, "mean").tolist())
assert aligned.encoders == [] and objective.step_number == 6
last = [whole(p) for p in aligned.projectors.parameters()]
assert all(torch.equal(a, b) for a, b in zip(moved, last))  # they rest, momentum and weight decay included
assert not any(torch.equal(a, b) for a, b in zip(first, last))
norms = [whole(p).norm().item() for p in aligned.transformer.parameters()]
if accelerator.is_main_process:
    open(file, "w").write(json.dumps({"rows": rows, "norms": norms, "summary": objective.summary()}))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, trainers):
    (tmp_path / "loop.py").write_text(LOOP)
    results = {}
    kinds = ["one", "ddp"] + ["fsdp"] * hasattr(torch.cpu.Stream, "record_event")
    for kind in kinds:
        loop = trainers([kind, tmp_path / kind], program=str(tmp_path / "loop.py"), processes=1 + (kind != "one"))
        loop.finish()
        results[kind] = json.loads((tmp_path / kind).read_text())
    one = results.pop("one")
    assert [reward != 0 for _, reward in one["rows"]] == [True] * 3 + [False] * 3
    for kind, other in results.items():
        torch.testing.assert_close(torch.tensor(other["rows"]), torch.tensor(one["rows"]), atol=1e-5, rtol=0, msg=kind)
        torch.testing.assert_close(torch.tensor(other["norms"]), torch.tensor(one["norms"]), atol=1e-4, rtol=0)
        for name, value in one["summary"].items():
            assert other["summary"][name] == pytest.approx(value, abs=1e-4), (kind, name)
