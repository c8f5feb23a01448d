# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Shows names, options and facts that other people chose as plain text in a page, where they are never markup."""

import json
import re


# The characters that markdown or HTML could read as markup; an underscore only at the edge of a word.
MARKUP = re.compile(r"[\\`*\[\]<>&|~#!{}$]|(?<![^\W_])_|_(?![^\W_])")
SECRET = re.compile(r"\bhf_\w{8,}")  # an access token of the Hub
LONGEST = 200  # longer values are cut to this many characters


def printable(value) -> str:
    """A value as one line of text, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def one_line(value) -> str:
    """A value as one line of at most `LONGEST` characters, without control characters or access tokens of the Hub."""
    text = SECRET.sub("hf_…", printable(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def shown(value) -> str:
    """A value as text for a sentence or table cell in markdown, with every character that could be markup escaped."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


def code(value) -> str:
    """A value as a code span in markdown, which also works inside a table."""
    return "`" + one_line(value).replace("`", "'").replace("|", "\\|") + "`"


def quoted(value) -> str:
    """A value as a Python string literal, for an example that readers copy."""
    return json.dumps(one_line(value))
