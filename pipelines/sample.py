#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sample many images from a pipeline into a folder; `--help` says how. The work is done in diffusers_vrpo/sample.py."""

from diffusers_vrpo.sample import main


if __name__ == "__main__":
    main()
