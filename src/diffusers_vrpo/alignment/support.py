# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Which transformers of the installed diffusers can be aligned, as a table in Markdown.

    python -m diffusers_vrpo.alignment.support
    python -m diffusers_vrpo.alignment.support --models FluxTransformer2DModel --columns tokens,unchanged,gradients

Each is built with a tiny configuration on the CPU, and aligned at its second and third block, which are of both kinds where a
model has two kinds. A cell says yes, or no and why in a note below the table.
"""

import argparse
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from torch import nn

from .attach import AlignedTransformer
from .gradient_fork import alignment_fork, measuring_probe
from .image_tokens import image_tokens_index, transformer_blocks
from .tiny_transformers import TRANSFORMERS, TinyTransformer, build


TAPS = (2, 3)
YES = "yes"
# Names of the modules behind the last block in diffusers.
AFTER_THE_BLOCKS = ("norm_out", "proj_out", "final_layer", "conv_norm_out", "conv_out")


def attach(tiny: TinyTransformer, layers=TAPS) -> AlignedTransformer:
    """Aligns a tiny transformer with an encoder of which only the width is needed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AlignedTransformer(
            tiny.model, list(layers), [SimpleNamespace(embed_dim=12)], projector_dim=24, **tiny.options
        )


def blocks_of(tiny: TinyTransformer) -> list[nn.Module]:
    """The blocks that `layers` counts."""
    return tiny.options.get("blocks") or transformer_blocks(tiny.model)


def predict(model: nn.Module, arguments: dict) -> torch.Tensor:
    """The prediction of a transformer without alignment, without gradients."""
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


def backward(
    model: nn.Module, arguments: dict, matching: float = 1.0, alignment: float = 1.0, fidelity_share: float = 0.0
) -> torch.Tensor:
    """One backward pass of both losses with weights, through a fork; returns the cosine of their gradients, `[B]`.

    Args:
        model: an `AlignedTransformer`, or what wraps one for several processes.
        arguments: of the transformer, a batch of samples.
    """
    samples = next(value for value in arguments.values() if isinstance(value, torch.Tensor)).shape[0]
    probe = measuring_probe(samples)
    model.zero_grad()
    prediction, projections = model(
        **arguments, fork=alignment_fork(torch.full((samples,), fidelity_share), probe, "none")
    )
    aligned_loss = sum(projection.sin().square().mean() for projection in projections)
    (matching * (prediction - 1).square().mean() + alignment * aligned_loss).backward()
    return probe.grad[0]


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a module's parameters by name, whole where they are sharded; without those that have none."""
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {
        name: (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        for name, gradient in found.items()
    }


def any_gradient(module: nn.Module) -> bool:
    """Whether a parameter of the module has a gradient other than zero."""
    return any(gradient.any() for gradient in gradients(module).values())


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str:
    """Whether two sets of gradients are equal up to rounding; a missing one counts as zero."""
    for name in found.keys() | wanted.keys():
        a, b = found.get(name), wanted.get(name)
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * b.abs().max().item()):
            return f"no: the gradient of {name} differs by {(a - b).abs().max():.1e} of {b.abs().max():.1e}"
    return YES


# ----------------------------------------------------------------------------------------------------------------------
# The columns on one process. Each gets a tiny transformer that it may change.


def tokens(tiny: TinyTransformer) -> str:
    """Where the image tokens stand, and whether the last block's are those of the prediction's patches, in their order."""
    layers = [*TAPS, len(blocks_of(tiny))]
    shapes = {}
    for layer in layers:
        block = blocks_of(tiny)[layer - 1]

        def note(block, inputs, output, layer=layer):
            index = image_tokens_index(block, output)
            shapes[layer] = (index, (output if index is None else output[index]).shape[1])

        block.register_forward_hook(note)
    aligned = attach(tiny, layers)
    with torch.no_grad():
        plain, projections = aligned(**tiny.arguments)
    places = []
    for (index, length), projection in zip(shapes.values(), projections, strict=True):
        number = projection.shape[1]
        place = f"{number}" if number == length else f"{number} of {length}"
        places.append(place if index is None else f"{place} (output {index})")
    answer = ", then ".join(dict.fromkeys(places))
    if "blocks" in tiny.options:
        return answer
    # A change of one token behind the last block must show in its patch alone.
    for changed in range(number):

        def change(tokens, deepest, changed=changed):
            other = tokens.clone()
            other[:, changed] += 3 * torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(0))
            return (other if deepest else tokens), tokens

        with torch.no_grad():
            moved = (aligned(**tiny.arguments, fork=change)[0] - plain).abs()
        if moved.ndim == 4:
            side = moved.shape[3] // 4
            moved = nn.functional.avg_pool2d(moved.sum(1, keepdim=True), side).flatten(1)
        else:
            moved = moved.sum(2)
        if not torch.equal(moved > 0, (torch.arange(number) == changed).expand(len(moved), -1)):
            return f"no: token {changed} of those found is not patch {changed} of the prediction"
    return answer


def unchanged(tiny: TinyTransformer) -> str:
    """Whether the prediction is equal to the bit while aligned, with and without a fork, and after `detach`."""
    model, plain = tiny.model, predict(tiny.model, tiny.arguments)
    state = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    aligned = attach(tiny)
    split = alignment_fork(torch.full((2,), 0.3), measuring_probe(2), "project")
    with torch.no_grad():
        predictions = [aligned(**tiny.arguments)[0], predict(model, tiny.arguments)]
    predictions.append(aligned(**tiny.arguments, fork=split)[0])
    aligned.detach()
    predictions.append(predict(model, tiny.arguments))
    if not all(torch.equal(prediction, plain) for prediction in predictions):
        return "no: the prediction differs"
    after = model.state_dict()
    if list(after) != list(state) or not all(torch.equal(after[name], state[name]) for name in state):
        return "no: the weights differ"
    if hooks != [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]:
        return "no: hooks are left"
    return YES


def below_only(tiny: TinyTransformer) -> str:
    """Whether the gradient of alignment reaches every block up to the aligned one, and nothing behind it."""
    blocks = blocks_of(tiny)
    for tap in TAPS:
        aligned = attach(tiny, (tap,))
        backward(aligned, tiny.arguments, matching=0.0)
        reached = [any_gradient(block) for block in blocks]
        if not all(reached[:tap]):
            return f"no: alignment at block {tap} does not reach block {reached.index(False) + 1}"
        behind = [*blocks[tap:], *(getattr(tiny.model, name, None) for name in AFTER_THE_BLOCKS)]
        if any(any_gradient(module) for module in behind if module is not None):
            return f"no: alignment at block {tap} reaches a module behind it"
        aligned.detach()
        tiny.model.zero_grad()
    return YES


def cosine(tiny: TinyTransformer) -> str:
    """Whether the conflict is measured, and whether flow matching also reaches the lower blocks on paths around the fork."""
    aligned = attach(tiny, TAPS[:1])
    measured = backward(aligned, tiny.arguments)
    if not (measured.isfinite().all() and measured.any()):
        return f"no: the cosines are {measured.tolist()}"

    def stop(tokens, deepest):
        return tokens.detach(), tokens

    tiny.model.zero_grad()
    prediction, _ = aligned(**tiny.arguments, fork=stop)
    prediction.square().mean().backward()
    if any(any_gradient(block) for block in blocks_of(tiny)[: TAPS[0]]):
        return (
            "yes: the cosine is that of the image tokens after the aligned block; flow matching also reaches the blocks "
            "below through text tokens, long skips or layers that are shared, which it does not see"
        )
    return YES


def checkpointing(tiny: TinyTransformer) -> str:
    """Whether the gradients are the same with gradient checkpointing."""
    if not getattr(tiny.model, "_supports_gradient_checkpointing", False):
        return "no: diffusers has no gradient checkpointing for this model"
    aligned = attach(tiny)
    backward(aligned, tiny.arguments)
    exact = gradients(aligned)
    tiny.model.enable_gradient_checkpointing()
    backward(aligned, tiny.arguments)
    return compare(gradients(aligned), exact)


def compiled(tiny: TinyTransformer, backend: str = "aot_eager") -> str:
    """Whether the gradients are the same when all blocks are compiled, the aligned ones too."""
    aligned = attach(tiny)
    backward(aligned, tiny.arguments)
    exact = gradients(aligned)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks_of(tiny):
        block.compile(backend=backend)
    try:
        backward(aligned, tiny.arguments)
        if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            return "no: torch has compiled nothing"
        return compare(gradients(aligned), exact)
    finally:
        torch._dynamo.reset()


def lora(tiny: TinyTransformer) -> str:
    """Whether alignment trains LoRA layers of the blocks up to the aligned one, and leaves the transformer's weights alone."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return "no: peft is not installed"
    model, plain, chosen = tiny.model, predict(tiny.model, tiny.arguments), set(blocks_of(tiny))
    linear = [
        f"{name}.{inner}"
        for name, block in model.named_modules()
        if block in chosen
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=linear), model)
    aligned = attach(tiny, TAPS[:1])
    with torch.no_grad():
        if not torch.equal(aligned(**tiny.arguments)[0], plain):
            return "no: the prediction differs"
    backward(aligned, tiny.arguments, matching=0.0)
    if any("lora_" not in name for name in gradients(model)):
        return "no: weights of the base have gradients"
    if [any_gradient(block) for block in blocks_of(tiny)] != [i < TAPS[0] for i in range(len(blocks_of(tiny)))]:
        return "no: the LoRA layers of other blocks have gradients"
    return YES


# ----------------------------------------------------------------------------------------------------------------------
# The columns on two processes, each with one of the two samples


def _one_sample(value, rank: int):
    if isinstance(value, torch.Tensor):
        return value[rank : rank + 1] if len(value) == 2 else value
    return value[rank : rank + 1] if isinstance(value, list) and len(value) == 2 else value


def _whole_batch(name: str) -> dict[str, torch.Tensor]:
    """The gradients on one process."""
    tiny = build(name)
    aligned = attach(tiny)
    backward(aligned, tiny.arguments)
    return gradients(aligned)


def ddp(name: str, rank: int) -> str:
    """Whether the gradients under DDP are those of the whole batch on one process."""
    wanted = _whole_batch(name)
    tiny = build(name)
    arguments = {key: _one_sample(value, rank) for key, value in tiny.arguments.items()}
    aligned = attach(tiny)
    unused = [key for key, _ in aligned.named_parameters() if key not in wanted]
    model = nn.parallel.DistributedDataParallel(aligned, find_unused_parameters=bool(unused))
    backward(model, arguments)
    answer = compare(gradients(aligned), wanted)
    if answer == YES and unused:
        return (
            "yes: with `find_unused_parameters=True`, because the transformer has parameters that its prediction does not "
            "depend on"
        )
    return answer


def fsdp2(name: str, rank: int) -> str:
    """Whether the gradients with sharded blocks are those of the whole batch on one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not hasattr(torch.cpu.Stream, "record_event"):
        return "no: this version of torch shards on GPUs only"
    wanted, mesh = _whole_batch(name), init_device_mesh("cpu", (2,))

    def sharded(**first_block) -> str:
        tiny = build(name)
        arguments = {key: _one_sample(value, rank) for key, value in tiny.arguments.items()}
        aligned = attach(tiny)
        for number, block in enumerate(blocks_of(tiny)):
            fully_shard(block, mesh=mesh, **({} if number else first_block))
        fully_shard(aligned, mesh=mesh)
        backward(aligned, arguments)
        return compare(gradients(aligned), wanted)

    try:
        return sharded()
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
    answer = sharded(reshard_after_forward=False)
    if answer == YES:
        return (
            "yes: with `reshard_after_forward=False` for the first block, since the transformer calls one of its layers again "
            "behind the last block"
        )
    return answer


ON_ONE: dict[str, tuple[str, Callable]] = {
    "tokens": ("image tokens", tokens),
    "unchanged": ("prediction unchanged", unchanged),
    "gradients": ("gradients below only", below_only),
    "cosine": ("conflict cosine", cosine),
    "checkpointing": ("gradient checkpointing", checkpointing),
    "compile": ("compiled blocks", compiled),
    "lora": ("LoRA on the base", lora),
}
ON_TWO: dict[str, tuple[str, Callable]] = {"ddp": ("DDP", ddp), "fsdp2": ("FSDP2", fsdp2)}
COLUMNS = {**ON_ONE, **ON_TWO}


def answer_of(check: Callable[..., str], *arguments) -> str:
    """What a check returns; an error is a no, with its first line."""
    try:
        return check(*arguments)
    except Exception as error:
        return f"no: {type(error).__name__}, {(str(error).strip() or 'without a message').splitlines()[0]}"


def run_process(rank: int, models: list[str], columns: list[str], folder: str):
    """One of the two processes. The first writes the answers to `folder`; where they differ, it is the one that says no."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    answers = {}
    for model in models:
        for column in columns:
            both = [None, None]
            torch.distributed.all_gather_object(both, answer_of(ON_TWO[column][1], model, rank))
            answers[model, column] = max(both, key=lambda answer: answer.startswith("no"))
    if rank == 0:
        torch.save(answers, Path(folder) / "answers.pt")
    torch.distributed.destroy_process_group()


def on_two_processes(models: list[str], columns: list[str]) -> dict[tuple[str, str], str]:
    """The answers of the columns `ddp` and `fsdp2` by model and column, from two processes on this machine (gloo)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_process, (models, columns, folder), nprocs=2)
        return torch.load(Path(folder) / "answers.pt", weights_only=True)


def check_all(models: list[str], columns: list[str], backend: str = "aot_eager") -> dict[tuple[str, str], str]:
    """The answers by model and column: text that starts with `yes` or `no`, or what was found in the column `tokens`."""
    answers = {}
    for model in models:
        for column in columns:
            if column in ON_ONE:
                extra = (backend,) if column == "compile" else ()
                answers[model, column] = answer_of(ON_ONE[column][1], build(model), *extra)
    if both := [column for column in columns if column in ON_TWO]:
        answers |= on_two_processes(models, both)
    return answers


def table(models: list[str], columns: list[str], answers: dict[tuple[str, str], str]) -> str:
    """The answers in Markdown, with the reasons as numbered notes below."""
    notes, text = [], io.StringIO()
    print("|", " | ".join(["model", *(COLUMNS[column][0] for column in columns)]), "|", file=text)
    print("|" + "---|" * (len(columns) + 1), file=text)
    for model in models:
        cells = [f"`{model}`"]
        for column in columns:
            answer, _, reason = answers[model, column].partition(": ")
            if reason and reason not in notes:
                notes.append(reason)
            cells.append(f"{answer} ({notes.index(reason) + 1})" if reason else answer)
        print("|", " | ".join(cells), "|", file=text)
    for number, reason in enumerate(notes, start=1):
        print(f"\n({number}) {reason[0].upper() + reason[1:]}.", file=text)
    return text.getvalue()


def main(argv: list[str] | None = None):
    """Prints the table."""

    def names(known):
        def parse(value: str) -> list[str]:
            chosen = value.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} must be among {', '.join(known)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(
        prog="python -m diffusers_vrpo.alignment.support",
        description="Prints which transformers of the installed diffusers can be aligned, as a table in Markdown.",
    )
    parser.add_argument(
        "--models", type=names(TRANSFORMERS), default=list(TRANSFORMERS), help="with commas between them"
    )
    parser.add_argument("--columns", type=names(COLUMNS), default=list(COLUMNS), help=f"some of {','.join(COLUMNS)}")
    parser.add_argument(
        "--backend", default="aot_eager", help="of torch.compile; inductor takes minutes (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    print(table(args.models, args.columns, check_all(args.models, args.columns, args.backend)), end="")
    print(f"\nWith diffusers {diffusers.__version__} and torch {torch.__version__}.")


if __name__ == "__main__":
    main()
