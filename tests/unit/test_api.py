# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The public API: its page is up to date, every name has a docstring and types, and examples of docstrings run."""

import ast
import importlib.util
import inspect
import json
import re

import pytest

import diffusers_vrpo
from support.pages import blocks
from support.paths import ROOT


spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)

NAMES = {name: module for names in make_api.public_names().values() for name, module in names.items()}


def untyped(function: ast.FunctionDef) -> list[str]:
    """The arguments of a function without a type."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in given if argument.annotation is None and argument.arg not in ("self", "cls")]


def test_the_page_is_up_to_date():
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.render(), "run python docs/make_api.py"


def test_the_typed_program_uses_every_public_name():
    text = (ROOT / "tests" / "support" / "typed_program.py").read_text(encoding="utf-8")
    (names,) = [node.names for node in ast.parse(text).body if getattr(node, "module", None) == "diffusers_vrpo"]
    assert sorted(alias.name for alias in names) == diffusers_vrpo.__all__


def test_the_page_has_what_the_package_offers():
    assert sorted(NAMES) == diffusers_vrpo.__all__
    for name in NAMES:
        assert getattr(diffusers_vrpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = diffusers_vrpo.nothing


def test_type_checkers_see_the_same_names():
    tree = ast.parse((make_api.PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert {alias.asname: statement.module for statement in block.body for alias in statement.names} == NAMES
    assert (make_api.PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_and_typed(name):
    node, comment = make_api.definition(NAMES[name], name)
    if isinstance(node, ast.Assign):
        assert comment
        return
    assert make_api.first_sentence(ast.get_docstring(node))
    if isinstance(node, ast.FunctionDef):
        assert not untyped(node) and node.returns is not None
        return
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            assert not untyped(part)
    for method in make_api.methods_of(node):
        assert not untyped(method) and method.returns is not None, method.name
        assert not make_api.first_sentence(ast.get_docstring(method)).startswith(("Args:", ".")), method.name


def examples(name: str) -> list[str]:
    """The blocks of Python in the docstring of a public name."""
    node, _ = make_api.definition(NAMES[name], name)
    docstring = "" if isinstance(node, ast.Assign) else ast.get_docstring(node) or ""
    return re.findall(r"^```python\n(.*?)^```$", docstring, re.MULTILINE | re.DOTALL)


def test_examples_of_docstrings_run(tmp_path, monkeypatch):
    """All of them, in one process; one that needs more than this machine says so in its first line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "digits").mkdir(parents=True)
    (tmp_path / "outputs" / "digits" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss_fm": 1.5}) + "\n")
    # The trainer's is the first snippet of docs/python.md, which test_docs.py runs.
    (trainer,) = examples("VRPOTrainer")
    assert ast.dump(ast.parse(trainer)) == ast.dump(ast.parse(blocks(ROOT / "docs" / "python.md")[0].text))
    found = [name for name in NAMES if name != "VRPOTrainer" and examples(name)]
    assert len(found) >= 20
    for name in found:
        for example in examples(name):
            assert name in example
            code = compile(example, f"<example of {name}>", "exec")
            if not example.startswith("# not run: "):
                exec(code, {"__name__": name})
        assert inspect.getdoc(getattr(diffusers_vrpo, name)).count("Example:") == 1
