# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import pytest

from support.paths import ROOT


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
