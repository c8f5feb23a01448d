# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Part of the build: README.md as the description of a package, where relative links lead nowhere."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute_links(text: str, repository: str) -> str:
    """Makes the relative links and pictures of a Markdown page absolute; links within the page stay.

    Args:
        text: the page, which lies at the top of the repository.
        repository: the address of the repository on GitHub.
    """

    def absolute(match: re.Match) -> str:
        picture, words, target = match.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`, with links into the repository that `[project.urls]` names."""

    def update(self, metadata: dict):
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
