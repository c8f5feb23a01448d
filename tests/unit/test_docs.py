# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The documentation: its code runs or says why not, its commands have the options they use, what it links to exists."""

import ast
import importlib
import re

import pytest

from diffusers_vrpo import VRPOPipeline, cli
from support.pages import PAGES, blocks, check_command, commands, indented, parse_python
from support.paths import ROOT


# What makes the Python of the pages short enough for a test.
SHORTER = {
    "max_train_steps=1400": "max_train_steps=2",
    '"max_train_steps": 20': '"max_train_steps": 12',
    "train_batch_size=64": "train_batch_size=8",
    '"train_batch_size": 64': '"train_batch_size": 8',
    "range(100)": "range(20)",
    "num_inference_steps=50": "num_inference_steps=2",
}
# And their commands: options that are added to them.
SHORT = {
    "train": "--max_train_steps 2 --train_batch_size 4 --lr_warmup_steps 0 --num_inference_steps 1 "
    "--dataloader_num_workers 0 --report_to none",
    "sample": "--num_images 100 --num_inference_steps 1",
    "evaluate": "--dataloader_num_workers 0 --kid_subsets 2 --kid_subset_size 50",
    "layers": "--num_train 32 --num_test 16 --timesteps 0.5 --dataloader_num_workers 0",
}
# Pages whose blocks are run, one after another in one folder.
ALONE = "docs/python.md"
TOGETHER = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
TOGETHER.remove(ALONE)
# Marks of the blocks of pages that do not mark them themselves.
UNMARKED = {
    "docs/models.md": "not run: its transformers and encoders are the reader's",
    "docs/your_images.md": "run by tests/training/test_your_images.py",
}

page_ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: str, language: str = "python") -> list:
    return [block for block in blocks(ROOT / page) if block.language == language]


@page_ids
def test_blocks_are_code_and_say_whether_they_run(page):
    for block in blocks(page):
        if block.language == "python":
            parse_python(block)
        if block.language in ("python", "bash"):
            mark = block.mark or UNMARKED.get(block.page)
            assert mark, f"{block} has no mark; see docs/contributing.md"
            if mark.startswith("run by "):
                assert (ROOT / mark.removeprefix("run by ")).is_file(), mark
            if block.mark == "run":
                assert block.page in (ALONE, *TOGETHER), f"{block} is run by no test"


@page_ids
def test_commands_have_the_options_that_they_use(page):
    shell = [block.text for block in blocks(page) if block.language == "bash"] + indented(page)
    for text in shell:
        if not re.match(r"\s*(\w+=\S+ )*(vrpo|accelerate|torchrun|python3?|for|hf|pip) ", text):
            assert text in indented(page)  # a message or a formula
            continue
        for words in commands(text):
            check_command(words)


def test_commands_are_read_as_a_shell_reads_them():
    text = "for x in a b; do\n  A=1 vrpo train \\\n    --objective $x > log  # why\ndone\nhf auth login && vrpo push 'a b'"
    expected = [["vrpo", "train", "--objective", "a"], ["log"], ["hf", "auth", "login"], ["vrpo", "push", "a b"]]
    assert commands(text) == expected
    check_command(["vrpo", "train", "--objective", "none", "..."])
    for wrong in ("vrpo trian", "vrpo train --objectiv none ...", "vrpo sample run --num_images many", "nothing -h"):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(wrong.split())


def test_readme_is_short_and_has_the_first_snippet_of_python():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    (trainer,) = code("README.md")
    assert ast.dump(ast.parse(trainer.text)) == ast.dump(ast.parse(code("docs/python.md")[0].text))
    assert len([line for line in trainer.text.splitlines() if line]) <= 8


@pytest.fixture
def run_blocks(tmp_path, monkeypatch):
    """`run_blocks(pages)` runs the blocks that are marked so, in a folder of their own; a command or block once only."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")  # no launcher is started
    monkeypatch.setattr("diffusers_vrpo.trainer.plot_metrics", lambda *arguments: None)
    draw, done = VRPOPipeline.__call__, []

    def draw_in_two_steps(self, *args, **kwargs):
        steps = {} if kwargs.keys() & {"num_inference_steps", "sigmas", "timesteps"} else {"num_inference_steps": 2}
        return draw(self, *args, **steps, **kwargs)

    monkeypatch.setattr(VRPOPipeline, "__call__", draw_in_two_steps)

    def run(block, names: dict):
        AcceleratorState._reset_state(reset_partial_state=True)
        for words in commands(block.text) if block.language == "bash" else []:
            if words not in done:
                cli.main([*words[1:], *SHORT.get(words[1], "").split()])
            done.append(words)
        if block.language == "python":
            source = block.text
            for whole, shorter in SHORTER.items():
                source = source.replace(whole, shorter)
            exec(compile(source, str(block), "exec"), names)

    def run_pages(pages: list[str]):
        for page in pages:
            names = {"__name__": "page"}
            for block in blocks(ROOT / page):
                if block.mark == "run":
                    run(block, names)

    return run_pages


@pytest.mark.slow
def test_the_blocks_of_python_run(run_blocks, tmp_path):
    source = "".join(block.text for block in code(ALONE))
    assert all(whole in source for whole in SHORTER if "inference" not in whole)
    run_blocks([ALONE])
    assert (tmp_path / "dit-digits" / "config.json").is_file()


@pytest.mark.slow
def test_the_blocks_of_other_pages_run(run_blocks, tmp_path):
    run_blocks(TOGETHER)
    assert (tmp_path / "three.png").is_file() and (tmp_path / "metrics.json").is_file()


@page_ids
def test_links_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)", text):
        if "://" in target:
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), f"{target}#{anchor}"
    for path in re.findall(r"\b(?:src|tests|benchmarks|configs|space|model_cards)/[\w./-]+\.(?:py|yaml|md)\b", text):
        assert any((folder / path).exists() for folder in (ROOT, page.parent)), path
    for name in re.findall(r"\bdiffusers_vrpo(?:\.\w+)+", text):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
