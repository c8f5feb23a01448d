# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Values that somebody else chose, as text in a page: names, options and facts from files are never markup there."""

import json
import re


# What markdown or HTML would take for markup; an underscore counts at the edge of a word only.
MARKUP = re.compile(r"[\\`*\[\]<>&|~#!{}$]|(?<![^\W_])_|_(?![^\W_])")
SECRET = re.compile(r"\bhf_\w{8,}")  # a token of the Hub
LONGEST = 200  # characters of a value that a page shows


def printable(value) -> str:
    """A value as text in one line, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def one_line(value) -> str:
    """A value as text in one line of at most `LONGEST` characters, without control characters and tokens of the Hub."""
    text = SECRET.sub("hf_…", printable(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def shown(value) -> str:
    """A value as text for a sentence or table cell in markdown, with every character that could be markup escaped."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


def code(value) -> str:
    """A value as a code span in markdown, also inside a table."""
    return "`" + one_line(value).replace("`", "'").replace("|", "\\|") + "`"


def quoted(value) -> str:
    """A value as a string of Python, for an example that readers copy."""
    return json.dumps(one_line(value))
