# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
