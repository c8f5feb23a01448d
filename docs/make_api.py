# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Writes docs/api.md from the signatures and docstrings of all public names. It imports nothing of the package.

python docs/make_api.py
"""

import ast
import re
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "src" / "diffusers_vrpo"
PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# The public API

<!-- made by docs/make_api.py from the docstrings; change those -->
<!-- every block: not run: signatures -->

Everything on this page is imported as `from diffusers_vrpo import NAME`. These names, their arguments and methods are stable: what must
change is first deprecated for one version. Everything else, that is every module, every name that is not listed here, and
every name that begins with an underscore, is private and may change without notice. So may `diffusers_vrpo.experimental`.

The docstrings have shapes, units, defaults and errors (`help(diffusers_vrpo.REPA)`); [python.md](python.md) shows how the names are used.
"""
FEW_FIELDS = 20  # a dataclass with more is shown as `Name(**options)`


def public_names() -> dict[str, dict[str, str]]:
    """Reads the groups of public names in the package's `__init__.py`: for each name its module."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "_PUBLIC":
            return ast.literal_eval(statement.value)
    raise LookupError("_PUBLIC is not assigned")


def definition(module: str, name: str) -> tuple[ast.AST, str]:
    """Finds a function, class or constant; returns it with the comment right above it."""
    text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if name in names:
            comment, lines = [], text.splitlines()[: node.lineno - 1]
            while lines and lines[-1].startswith("# "):
                comment.insert(0, lines.pop()[2:])
            return node, " ".join(comment)
    raise LookupError(f"{module} does not define {name}")


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9`)\]])\. (?=[A-Z`])", paragraph)[0].rstrip(".:") + "." if paragraph else ""


def arguments_of(function: ast.FunctionDef) -> list[str]:
    """The arguments of a function with their types and defaults, without `self` and `cls`."""
    arguments, parts = function.args, []
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        if argument.arg not in ("self", "cls"):
            parts.append(written(argument, default))
    if arguments.vararg:
        parts.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [written(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append(f"**{ast.unparse(arguments.kwarg)}")
    return parts


def written(argument: ast.arg, default: ast.expr | None) -> str:
    """An argument with its type and default."""
    text = source(argument)
    if default is None:
        return text
    return f"{text} = {source(default)}" if argument.annotation else f"{text}={source(default)}"


def source(node: ast.AST) -> str:
    """The code of an expression, with double quotes."""
    return ast.unparse(node).replace("'", '"')


def returned(function: ast.FunctionDef) -> str:
    """The type that a function returns, after an arrow."""
    none = isinstance(function.returns, ast.Constant) and function.returns.value is None
    return "" if function.returns is None or none else f" -> {source(function.returns)}"


def is_marked(node: ast.AST, *names: str) -> bool:
    """Whether a function or class has one of these decorators."""
    return any(any(name in ast.unparse(decorator) for name in names) for decorator in node.decorator_list)


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The public methods and properties that a class defines; without those that only repeat a base class's."""
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)]
    return [part for part in functions if not part.name.startswith("_") or part.name == "__call__"]


def constructor(node: ast.ClassDef) -> list[str]:
    """The arguments of a class with their types and defaults."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return arguments_of(part)
    if not is_marked(node, "dataclass"):
        return []
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and "ClassVar" not in source(part)]
    if len(fields) > FEW_FIELDS or not fields:
        return ["**options"]
    return [source(part) for part in fields]


def signature(name: str, arguments: list[str], result: str = "") -> str:
    """A signature as a block of code, with one argument per line if it is long."""
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) > 100:
        line = "\n    ".join([f"{name}(", *(f"{argument}," for argument in arguments)]) + f"\n){result}"
    return f"```python\n{line}\n```"


def section(name: str, module: str) -> str:
    """What the page says of a public name."""
    node, comment = definition(module, name)
    if isinstance(node, ast.Assign):
        return f"### {name}\n\n{first_sentence(comment)}\n"
    sentence = first_sentence(ast.get_docstring(node))
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n{signature(name, arguments_of(node), returned(node))}\n\n{sentence}\n"
    bases = [ast.unparse(base) for base in node.bases]
    known = {public for names in public_names().values() for public in names}
    derives = "".join(f" Derives from `{base}`." for base in bases if base in known)
    text = f"### {name}\n\n{signature(name, constructor(node))}\n\n{sentence}{derives}\n"
    rows = []
    for method in methods_of(node):
        shown = method.name
        if not is_marked(method, "property"):
            shown += f"({', '.join(arguments_of(method))})"
        result = returned(method)
        rows.append(f"- `{shown}{result}`: {first_sentence(ast.get_docstring(method))}\n")
    return text + ("\n" + "".join(rows) if rows else "")


def render() -> str:
    """Renders the page."""
    parts = [INTRODUCTION]
    for heading, names in public_names().items():
        parts.append(f"## {heading}\n")
        parts += [section(name, module) for name, module in names.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
