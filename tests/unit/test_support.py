# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Alignment of every transformer in the table of docs/models.md, and that table."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_vrpo.alignment import support
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.image_tokens import image_token_places, put_back, take
from diffusers_vrpo.alignment.objective import REPA
from diffusers_vrpo.alignment.policy import normalize
from diffusers_vrpo.alignment.tiny_transformers import TRANSFORMERS, build
from support.models import tiny_model


WITHOUT_CHECKPOINTING = ("LuminaNextDiT2DModel", "HunyuanDiT2DModel")
COLUMNS = ["tokens", "unchanged", "gradients", "cosine", "checkpointing"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_row_of_the_table(name):
    """Nothing is refused but gradient checkpointing, where diffusers has none; detaching restores weights, hooks and forward."""
    answers = support.check_all([name], COLUMNS)
    refused = {column: answer for (_, column), answer in answers.items() if answer.startswith("no")}
    assert list(refused) == (["checkpointing"] if name in WITHOUT_CHECKPOINTING else []), refused
    assert answers[name, "tokens"].startswith("16")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_lora_on_the_base(name):
    pytest.importorskip("peft")
    assert support.lora(build(name)) == "yes"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_finite_differences_of_the_reward(name):
    """The reward's gradient through the hook is its slope along a random direction of the weights of the blocks below."""
    tiny = build(name)
    aligned = support.attach(tiny, (2, 3))
    generator = torch.Generator().manual_seed(2)
    below = [p for block in support.blocks_of(tiny)[:3] for p in block.parameters()]
    direction = [torch.randn(p.shape, generator=generator) * p.square().mean().sqrt() for p in below]
    weights = torch.randn(2, 16, 12, generator=generator)

    def reward() -> torch.Tensor:
        return sum((weights * normalize(projection)).mean() for projection in aligned(**tiny.arguments)[1])

    reward().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(below, direction, strict=True) if p.grad is not None)
    assert slope.abs() > 0
    values, step = [], 3e-3
    with torch.no_grad():
        for sign in (-step, 2 * step):
            for p, d in zip(below, direction, strict=True):
                p.add_(d, alpha=sign)
            values.append(reward())
    torch.testing.assert_close((values[1] - values[0]) / (2 * step), slope, atol=1e-4, rtol=2e-2)


def test_the_checks_can_say_no():
    tiny = build("AuraFlowTransformer2DModel")
    tiny.options["image_tokens"] = "first"  # where the registers are
    assert support.answer_of(support.tokens, tiny).startswith("no: token 0 of those found is not patch 0")
    tiny = build("SiTTransformer2DModel")
    tiny.model.register_forward_hook(lambda model, args, output: (output[0] + torch.rand(()),))
    assert support.unchanged(tiny) == "no: the prediction differs"
    assert support.answer_of(support.cosine, tiny._replace(options={"hidden_dim": 7})).startswith("no: RuntimeError, ")
    zeros, ones = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    assert support.compare(zeros, {}) == "yes" and support.compare(zeros, ones).startswith("no: the gradient of a")


def test_the_table(capsys):
    support.main(["--models", "SiTTransformer2DModel,HunyuanDiT2DModel", "--columns", "unchanged,checkpointing"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[:6] == [
        "| model | prediction unchanged | gradient checkpointing |",
        "|---|---|---|",
        "| `SiTTransformer2DModel` | yes | yes |",
        "| `HunyuanDiT2DModel` | yes | no (1) |",
        "",
        "(1) Diffusers has no gradient checkpointing for this model.",
    ]
    with pytest.raises(SystemExit):
        support.main(["--columns", "speed"])


def test_the_documented_table_has_every_model_and_column():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    page = page.partition("\n## ")[0]  # behind it are tables of measurements
    assert re.findall(r"^\| `(\w+Model)` \|", page, re.MULTILINE) == list(TRANSFORMERS)
    assert f"| model | {' | '.join(title for title, _ in support.COLUMNS.values())} |" in page


# Token grids


def test_captions_of_several_lengths():
    """Lumina2's image follows each caption without its padding; the rest of the sequence passes the fork by."""
    tiny = build("Lumina2Transformer2DModel")
    seen = {}
    tiny.model.layers[1].register_forward_hook(lambda block, args, output: seen.update(sequence=output))
    aligned = support.attach(tiny, (2,))
    with torch.no_grad():
        (projection,) = aligned(**tiny.arguments)[1]
    sequence = seen["sequence"]
    image = torch.stack([sequence[0, 5:21], sequence[1, 3:19]])
    assert torch.equal(projection, aligned.projectors[0](image))


@pytest.mark.parametrize("places", [None, slice(2, 5), torch.tensor([[0, 1, 2], [2, 3, 4]])])
def test_taking_and_putting_back(places):
    sequence = torch.randn(2, 6, 3, requires_grad=True)
    image = take(sequence, places)
    assert torch.equal(put_back(sequence, places, image), sequence)
    changed = put_back(sequence, places, 2 * image)
    assert torch.equal(take(changed, places), 2 * image)
    # The rest keeps its gradient of 1, and the image's are doubled.
    changed.sum().backward()
    assert sequence.grad.sum() == sequence.numel() + image.numel()


def test_places_by_hand():
    """`image_tokens` names the image's place in the sequence of a block that nobody knows."""
    block, sequence = nn.Linear(1, 1), torch.zeros(2, 21, 8)
    assert image_token_places(block, sequence, 21, {}) is image_token_places(block, sequence, 16, {}, "all") is None
    assert image_token_places(block, sequence, 16, {}, "last") == slice(5, 21)
    assert image_token_places(block, sequence, 16, {}, "first") == slice(0, 16)
    for number in (16, 30):
        with pytest.raises(ValueError, match="Linear returns 21 tokens, .* give `image_tokens`"):
            image_token_places(block, sequence, number, {})
    with pytest.raises(ValueError, match="an unknown number"):
        image_token_places(block, sequence, None, {}, "last")
    with pytest.raises(ValueError, match="`image_tokens` 'middle' must be first, last, all or a function"):
        AlignedTransformer(tiny_model(), image_tokens="middle")

    # The same places as AuraFlow's own, from a function that sees the arguments.
    tiny = build("AuraFlowTransformer2DModel")
    with torch.no_grad():
        own = support.attach(tiny)(**tiny.arguments)[1]
    asked = []

    def behind_text(tokens, arguments):
        asked.append(tokens.shape[1])
        registers = 8
        return slice(registers + arguments["encoder_hidden_states"].shape[1], None) if tokens.shape[1] > 16 else None

    tiny = build("AuraFlowTransformer2DModel")
    tiny.options["image_tokens"] = behind_text
    aligned = support.attach(tiny)
    with torch.no_grad():
        x, text, t = (tiny.arguments[name] for name in ("hidden_states", "encoder_hidden_states", "timestep"))
        given = aligned(x, text, timestep=t)[1]
    assert asked == [16, 29] and all(torch.equal(a, b) for a, b in zip(own, given, strict=True))


class Rows:
    """An encoder whose embeddings tell the place: row and column of each token, in [0, 1], of a grid of 4 x 8."""

    embed_dim, grid_size = 3, (4, 8)

    def __call__(self, images):
        rows, columns = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(8) + 0.5) / 8, indexing="ij")
        tokens = torch.stack([rows, columns, torch.ones(4, 8)], dim=-1).flatten(0, 1)
        return tokens.expand(len(images), -1, -1)


@pytest.mark.parametrize("height, width", [(16, 32), (8, 64), (8, 16), (32, 32)])
def test_batches_of_several_resolutions(height, width):
    """The encoder's map is interpolated to the grid of each batch, also where it has as many tokens in other rows."""
    aligned = AlignedTransformer(tiny_model(), [2], [Rows()], "conv")
    objective = REPA(aligned, 10)
    rows, columns = height // 2, width // 2
    for _ in range(2):  # the second resolution is the trained one
        step = objective.begin(torch.tensor([0.5]))
        x = torch.randn(1, 4, 2 * rows, 2 * columns)
        prediction, projections = aligned(x, torch.tensor([0.5]), torch.tensor([1]), fork=step.fork)
        assert prediction.shape == x.shape and aligned.last_grid == (rows, columns)
        (y,) = objective.targets(torch.zeros(1, 3, 8, 8), math.prod(aligned.last_grid))
        place = (y / y[..., 2:])[0].unflatten(0, (rows, columns))
        # Linear maps stay linear away from the border.
        inner = place[rows // 4 : -(rows // 4), columns // 4 : -(columns // 4)]
        wanted = torch.stack(
            torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"),
            -1,
        )[rows // 4 : -(rows // 4), columns // 4 : -(columns // 4)]
        torch.testing.assert_close(inner[..., :2], wanted, atol=0.02, rtol=0)
        assert objective(step, projections, torch.zeros(1, 3, 8, 8), prediction.flatten(1).mean(1)).isfinite()
        rows, columns = 4, 4


def test_the_grid_of_packed_latents_changes_between_calls():
    tiny = build("FluxTransformer2DModel")
    tiny.options["grid_size"] = (4, 4)
    aligned = support.attach(tiny)
    aligned.encoders = [Rows()]
    objective = REPA(aligned, 10)
    targets = []
    with torch.no_grad():
        for grid in ((4, 4), (2, 8)):
            aligned.grid_size = grid
            aligned(**tiny.arguments)
            assert aligned.last_grid == grid
            targets.append(objective.targets(torch.zeros(2, 3, 8, 8), 16)[0])
    assert not torch.equal(*targets)
