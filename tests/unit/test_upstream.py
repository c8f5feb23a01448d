# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What docs/upstream.md says of diffusers is so in the version that it names."""

import re
import sys

import diffusers
import pytest

from support.paths import ROOT


PAGE = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
TESTED = re.search(r"diffusers (\d+\.\d+\.\d+)", PAGE)[1]
SLOW = "Saving the code of custom components"  # it starts a process


def test_every_section_has_a_reproduction_and_a_proposal():
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert headings == [*SECTIONS] and PAGE.count("**Proposal:**") == PAGE.count("*Here:*") == len(headings)


@pytest.mark.skipif(diffusers.__version__ != TESTED, reason=f"the page is about diffusers {TESTED}")
@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=pytest.mark.slow if title == SLOW else ()) for title in SECTIONS]
)
def test_the_reproduction_runs(title, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(compile(SECTIONS[title], title, "exec"), {"__name__": "reproduction"})
