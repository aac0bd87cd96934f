"""Text from a file or a command line, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey or could not show as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
