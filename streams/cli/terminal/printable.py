"""Make text that came from outside safe to print.

Ids, texts and error messages may hold anything that a producer wrote. A terminal obeys escape sequences in them, and
bidirectional controls or line ends can forge what a table seems to say.
"""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return the text with control characters escaped: C0 and C1, line ends, bidirectional controls, surrogates.

    >>> printable("\x1b]0;x\x07 a\u202eb")
    '\\x1b]0;x\\x07 a\\u202eb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return the text with control characters escaped; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
