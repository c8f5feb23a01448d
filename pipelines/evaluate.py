#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""FID and other distances between generated images and a reference; `--help` says how (docs/evaluation.md)."""

from diffusers_vrpo.evaluate import main


if __name__ == "__main__":
    main()
