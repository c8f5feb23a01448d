# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Part of the site's build (mkdocs.yml): links out of docs/ lead into the repository."""

import re


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Makes links to files of the repository absolute; those within docs/ are left to mkdocs."""
    repository = f"{config['repo_url']}/blob/main"
    return re.sub(r"\]\(\.\./([^)\s]+)\)", lambda match: f"]({repository}/{match[1]})", markdown)
