# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The structure of the package: imports run in one direction, without circles, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "src" / "diffusers_vrpo"

# From left to right: a wing imports only from wings to its left, and from itself.
WINGS = (
    ("errors", "files", "arrays", "markup", "random_streams", "reach", "assets"),
    ("schemas",),
    ("config",),
    ("command_line",),
    ("models",),
    ("alignment", "data", "pipelines"),
    ("evaluation",),
    ("training",),
    ("hub", "reporting"),
    ("trainer",),
    ("experimental",),
    ("commands",),
    ("cli",),
)
# These are published beside the weights, and therefore use nothing of this package.
PUBLISHED = ("models.transformer_sit", "pipelines.pipeline_vrpo", "pipelines.scheduling_sit_sde")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of this package that a module imports, by their names without the package's."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    # What only type checkers read is never imported.
    for_types = {
        id(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        if node.level:
            parents = package.split(".") if package else []
            parents = parents[: len(parents) - (node.level - 1)]
            source = ".".join([*parents, *filter(None, [node.module])])
        elif node.module and node.module.split(".")[0] == "diffusers_vrpo":
            source = node.module.partition(".")[2]
        else:
            continue
        for alias in node.names:
            full = f"{source}.{alias.name}".lstrip(".")
            found.add(full if full in MODULES else source)
    return found - {name, ""}


def wing_of(name: str) -> str:
    return name.split(".")[0]


def test_every_module_is_in_a_wing():
    wings = {wing for group in WINGS for wing in group}
    assert {wing_of(name) for name in MODULES if name} <= wings


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_run_in_one_direction(name):
    rank = {wing: i for i, group in enumerate(WINGS) for wing in group}
    wing = wing_of(name)
    upward = [target for target in imports(name) if wing_of(target) != wing and rank[wing_of(target)] >= rank[wing]]
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which is not to its left"


def test_no_circles():
    done, path = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in sorted(imports(name)):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_stand_alone(name):
    assert not imports(name)


@pytest.mark.parametrize("argv", [None, ["--help"], ["train", "--help"], ["sample", "--help"], ["sample", "--labels"]])
def test_what_a_first_look_imports(argv):
    """Neither the package nor a call that ends with its options takes the seconds that torch takes to import."""
    statement = "import diffusers_vrpo"
    if argv is not None:
        statement = f"from contextlib import suppress; from diffusers_vrpo.cli import main\nwith suppress(SystemExit): main({argv})\n"
    code = f"import sys; {statement}\nprint(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there():
    import diffusers_vrpo

    assert {"SiTTransformer2DModel", "VRPOPipeline", "SiTSDEScheduler"} <= set(diffusers_vrpo.__all__)
    for name in diffusers_vrpo.__all__:
        assert getattr(diffusers_vrpo, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        diffusers_vrpo.no_such_name  # noqa: B018
