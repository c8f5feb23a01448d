# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The blocks of code and the commands of the documentation (docs/contributing.md says how they are marked)."""

import argparse
import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusers_vrpo import cli
from diffusers_vrpo.command_line import OneLineErrorParser, recipes
from diffusers_vrpo.commands import train
from support.paths import ROOT


FOLDERS = [*sorted(ROOT.glob("*/*/README.md")), ROOT / "examples" / "README.md"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *FOLDERS]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (test command|run|run by \S+|not run: .+?) -->\n$")
WHOLE_PAGE = re.compile(r"^<!-- every block: (run|run by \S+|not run: .+?) -->$", re.MULTILINE)
# Programs of others, whose options are not looked at.
OTHERS = {"pip", "python3", "hf", "bash", "cd", "ruff", "mkdocs", "evaluator.py", "pytest"}


@dataclass
class Block:
    """A fenced block: its page relative to the repository, language, text, and how it is marked (None if it is not)."""

    page: str
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    whole = WHOLE_PAGE.search(text)
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        mark = mark[1] if mark else whole and whole[1]
        found.append(Block(str(page.relative_to(ROOT)), match[1], match[2], mark))
    return found


def indented(page: Path) -> list[str]:
    """The blocks of a page that are marked as code by four spaces."""
    outside = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"(?<=\n\n)(?:    .*\n)+", outside)


def commands(text: str) -> list[list[str]]:
    """The commands of a block for a shell, as lists of words.

    A variable of a loop has its first value; assignments before a command, redirections and pipes are dropped.
    """
    one_line = re.sub(r"(?m)(?:^|\s)#.*$", "", text).replace("\\\n", " ").replace("\n", " ; ")
    lexer = shlex.shlex(one_line, posix=True, punctuation_chars=";&|()<>")
    lexer.commenters, lexer.whitespace_split = "", True
    words, found, values = [], [], {}
    for word in [*lexer, ";"]:
        if not set(word) <= set(";&|()<>"):
            words.append(re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), word))
            continue
        while words and (words[0] in ("do", "done", "then", "fi", "+") or re.fullmatch(r"\w+=.*", words[0])):
            words = words[1:]
        if words and words[0] == "for":
            values[words[1]] = words[3]
        elif words:
            found.append(words)
        words = []
    return found


class _Parsed(Exception):
    """Raised in the place of a command's work, when its options have been read."""


def check_command(words: list[str]):
    """Checks that a command of ours exists, and its options, and that their values are of the right kind.

    Raises:
        AssertionError: if they do not.
    """
    program, *argv = words
    program = Path(program).name
    if program in ("accelerate", "torchrun") or (program == "python" and argv[:1] == ["train_vrpo.py"]):
        if "train_vrpo.py" in argv:
            name, argv = "train", argv[argv.index("train_vrpo.py") + 1 :]
        elif "-m" in argv:
            at = argv.index("-m") + 1
            name, argv = argv[at].rpartition(".")[2], argv[at + 1 :]
        else:
            return
    elif program == "vrpo":
        name, *argv = argv
        if name.startswith("-"):
            return
        if "--" in argv:
            argv = argv[argv.index("--") + 1 :]
    elif program == "python":
        return check_program(argv)
    else:
        assert program in OTHERS, f"unknown program {program}"
        return
    assert name in cli.COMMANDS, f"vrpo {name}"

    # An ellipsis stands for options of the reader.
    part, argv = any(word in ("...", "…") for word in argv), [word for word in argv if word not in ("...", "…")]
    parse = OneLineErrorParser.parse_known_args

    def stop(self, args=None, namespace=None):
        _, unknown = parse(self, args, namespace)
        assert not unknown, f"{self.prog} {' '.join(unknown)}"
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parsed):
        if part:
            patch.setattr(OneLineErrorParser, "error", _tolerate_what_is_missing)
        patch.setattr(OneLineErrorParser, "parse_known_args", stop)
        cli.main([name, *argv])
    of_reader = "--config" in argv and argv[argv.index("--config") + 1] not in recipes()
    if name == "train" and not part and not of_reader and "--help" not in argv:
        train.parse_args(argv)


def _tolerate_what_is_missing(self: argparse.ArgumentParser, message: str):
    raise _Parsed if "required" in str(message) else AssertionError(message)


def check_program(argv: list[str]):
    """Checks that a program of the repository is there and that its text has the options that it is given."""
    if argv[0] in ("-m", "-W", "-c"):
        module = argv[argv.index("-m") + 1] if "-m" in argv else "pytest"
        if not module.startswith("diffusers_vrpo"):
            return
        file = ROOT / "src" / f"{module.replace('.', '/')}.py"
    elif Path(argv[0]).name in OTHERS:
        return
    else:
        file = ROOT / argv[0]
    assert file.is_file(), argv[0]
    text = file.read_text(encoding="utf-8")
    for word in argv:
        if word.startswith("--"):
            name = word.split("=")[0].removeprefix("--").removeprefix("no-")
            assert name in text, f"{argv[0]} {word}"


def parse_python(block: Block) -> ast.Module:
    """Parses a block; those of docs/api.md are signatures."""
    return ast.parse(f"def {block.text.strip()}: ..." if block.page == "docs/api.md" else block.text)
