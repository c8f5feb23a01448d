# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Where the repository and its programs lie."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
TRAINING_SCRIPT = ROOT / "train_vrpo.py"
SRC = ROOT / "src"
