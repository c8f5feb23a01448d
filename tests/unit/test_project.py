# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What the package's page and a citation say: one version, one address, links that lead somewhere."""

import importlib.util
import re
import sys
import types

import yaml

import diffusers_vrpo
from support.paths import ROOT


def project_table() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def repository() -> str:
    (url,) = re.findall(r'^Repository = "(.+)"$', project_table(), re.M)
    return url


def test_one_version_and_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_vrpo.__version__
    assert citation["repository-code"] == repository()
    assert f"repo_url: {repository()}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"## {diffusers_vrpo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not re.search(r"^version =", project_table(), re.M)


def test_the_description_of_the_package_has_links_into_the_repository(monkeypatch):
    # hatchling is there when a wheel is built, and not when the tests run.
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)

    page = "![a](docs/a.png) [b](docs/b.md#c), [d](#e) and [f](https://g.org/h)"
    absolute = "![a](R/raw/main/docs/a.png) [b](R/blob/main/docs/b.md#c), [d](#e) and [f](https://g.org/h)"
    assert build.absolute_links(page, "R") == absolute
    hook = build.ReadmeHook()
    hook.root, metadata = ROOT, {"urls": {"Repository": repository()}}
    hook.update(metadata)
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata["readme"]["text"])
    assert targets and all(target.startswith(("https://", "#")) for target in targets)


def test_the_site_has_every_page():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ +- .*: (\w+\.md)$", site, re.M)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    page = "[a](../a/b.md#c) and [d](d.md)"
    assert links.on_page_markdown(page, None, {"repo_url": "R"}, None) == "[a](R/blob/main/a/b.md#c) and [d](d.md)"


def test_forms_and_workflows_are_yaml():
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) == 6 and all(yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["tests"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    pythons = [row["python"] for row in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]]
    assert all(f"Programming Language :: Python :: {python}" in project_table() for python in pythons)
