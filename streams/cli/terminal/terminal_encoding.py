"""Write every character to an output that cannot encode it: the one place that sets up stdout and stderr.

A terminal may be Latin-1 or ASCII (LANG=de_DE.ISO-8859-1, PYTHONIOENCODING, LC_ALL=C without Python's UTF-8 mode).
Python raises UnicodeEncodeError for an arrow there, in the middle of a table.
"""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper
from typing import Final

_HANDLER: Final = "perennial.fallback"
_FALLBACKS: Final = {
    "→": "->", "…": "...", "−": "-", "–": "-", "—": "-", "•": "*", "±": "+-", "×": "x", "≤": "<=", "≥": ">=",
    "‘": "'", "’": "'", "“": '"', "”": '"', "│": "|", "┃": "|", "║": "|",
}  # fmt: skip
_BLOCKS: Final = ((0x2500, 0x2550, "-"), (0x2550, 0x2580, "+"), (0x2580, 0x25A0, "#"), (0x2800, 0x2900, "*"))
"""Lines, corners, bars and the frames of spinners."""


def write_any_character() -> None:
    r"""Let stdout and stderr write a fallback in ASCII for each character that their encoding lacks.

    Arrows, dots and lines become similar characters. Others become their escape, such as \u90f5, so that two ids stay
    two.
    """
    codecs.register_error(_HANDLER, _fallback)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None where the descriptor is closed
            stream.reconfigure(errors=_HANDLER)


def _fallback(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if character in _FALLBACKS:
        return _FALLBACKS[character]
    for first, end, similar in _BLOCKS:
        if first <= ord(character) < end:
            return similar
    return character.encode("ascii", "backslashreplace").decode()
