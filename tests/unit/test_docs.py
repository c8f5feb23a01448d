# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The documentation: its Python runs, and what it links to and names exists."""

import importlib
import re

import pytest

from support.paths import ROOT


FOLDERS = [*sorted(ROOT.glob("*/*/README.md")), ROOT / "examples" / "README.md"]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *FOLDERS,
]
# What makes the snippets of docs/python.md short enough for a test.
SHORTER = {
    "max_train_steps=1400": "max_train_steps=2",
    '"max_train_steps": 20': '"max_train_steps": 12',
    "train_batch_size=64": "train_batch_size=8",
    '"train_batch_size": 64': '"train_batch_size": 8',
    "(100)": "(20)",
}


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_the_first_snippet_of_the_page():
    (trainer,) = [block for block in python_blocks("README.md") if "VRPOTrainer" in block]
    assert trainer == python_blocks("docs/python.md")[0]
    assert len([line for line in trainer.splitlines() if line]) <= 15


@pytest.mark.slow
def test_the_snippets_run(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    source = "\n".join(python_blocks("docs/python.md"))
    for whole, shorter in SHORTER.items():
        assert whole in source
        source = source.replace(whole, shorter)
    # README's snippets sample from the run of the command line, which is equal to that of the first snippet.
    blocks = [block for block in python_blocks("README.md") if "VRPOTrainer" not in block]
    readme = "\n".join(blocks).replace("outputs/digits", "digits-vrpo")

    exec(compile(source, "docs/python.md", "exec"), {"__name__": "snippets"})
    assert (tmp_path / "dit-digits" / "config.json").is_file()
    exec(compile(readme, "README.md", "exec"), {"__name__": "snippets"})
    assert (tmp_path / "three.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
