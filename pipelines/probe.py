#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Linear probes and CKNNA of a transformer's blocks; `--help` says how (docs/evaluation.md)."""

from diffusers_vrpo.probing import main


if __name__ == "__main__":
    main()
