#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Convert official checkpoints into pipelines and back; `--help` says how (docs/checkpoints.md)."""

from diffusers_vrpo.convert import main


if __name__ == "__main__":
    main()
