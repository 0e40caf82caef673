"""The error of an event that cannot be read or written, and how it is made from what parsers complain about."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

from pydantic import ValidationError

from perennial.storage.errors import PerennialError
from perennial.streams.events.fields import HIDDEN, Event

Reason = Literal[
    "tombstone", "oversize", "too-deep", "not-utf8", "not-json", "not-object",
    "too-many-headers", "bad-header", "bad-attribute", "missing-attribute", "unknown-type", "wrong-topic",
    "missing-field", "unknown-field", "bad-field", "expired", "not-a-dead-letter",
    "out-of-order", "implausible-origin", "internal-error", "bad-signature",
    "bad-approval", "other-tenant",
]  # fmt: skip

PURE_ERRORS: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""The exceptions that a value from outside can cause in a pure function, pydantic's among them; no error of the store."""

HIDDEN_CHARACTER = re.compile(f"[{HIDDEN}]")

_BYTE_ORDER_MARKS = {
    b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe\x00\x00": "UTF-32", b"\xfe\xff": "UTF-16", b"\xff\xfe": "UTF-16",
}  # fmt: skip
"""Byte order marks of encodings other than UTF-8, longest first."""

_REMEDIES: dict[str, str] = {
    "oversize": "split the text into several documents",
    "wrong-topic": "publish it to the topic of its type",
    "unknown-type": "use a type that docs/asyncapi.json lists",
    "not-utf8": "write the value in UTF-8",
    "out-of-order": "see with `perennial marks show` whether the high-water mark is wrong, or find out who changed the "
    "partitions of the topics between the roles; then publish the document again as it is",
    "implausible-origin": "find out who else writes to the topics between the roles; set PERENNIAL_INTERNAL_KEY",
    "internal-error": "report it with the dead letter: valid input must not cause it",
    "bad-approval": "approve a request that waits, as it is, by another person: `perennial forget status` lists them",
    "other-tenant": "publish it to the topic of the tenant whose adapter it addresses",
    "bad-signature": "find out who else writes to the topics between the roles, and give all roles the same "
    "PERENNIAL_INTERNAL_KEY",
}


class WireError(PerennialError):
    """An event cannot be read or written.

    Args:
        reason: Slug of the cause, for metrics and dead letters.
        message: What is wrong: usually the name of the field, header or attribute.
        got: The offending value; texts are shortened.
        allowed: Which values would be accepted.
    """

    def __init__(self, reason: Reason, message: str, *, got: object = None, allowed: object = None) -> None:
        self.reason: Reason = reason
        plain = got is None or isinstance(got, float) or (isinstance(got, int) and abs(got) < 2**64)
        shown = got if plain else shorten(got)
        super().__init__(
            message, got=shown, allowed=allowed, remedy=_REMEDIES.get(reason, "correct the event and publish it again")
        )

    @property
    def detail(self) -> str:
        """Return what is wrong, what came in and what is allowed, for the header of a dead letter."""
        parts = [self.message]
        if self.got is not None:
            parts.append(f"got: {self.got}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        return "; ".join(parts)


def not_json(value: bytes, message: str) -> WireError:
    """Return the error for a value that is not JSON; it names the encoding where that is not UTF-8."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if value.startswith(mark)), None)
    if encoding is None and 0 in value[:2]:  # JSON begins with an ASCII character, RFC 4627 section 3
        encoding = "UTF-16 or UTF-32"
    if encoding is not None:
        return WireError("not-utf8", "the value", got=encoding, allowed="JSON in UTF-8")
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return WireError("not-utf8", f"byte {error.start} of the value", got=value[error.start : error.start + 8].hex())
    return WireError("not-json", "the value", got=value[:120], allowed=f"a JSON object ({shorten(message)})")


def from_pydantic(error: ValidationError, value: bytes, model: type[Event]) -> WireError:
    """Return pydantic's most useful complaint as a WireError: missing fields first, then unknown ones, then the rest."""
    found = error.errors(include_url=False, include_context=False)
    first = min(found, key=lambda e: _COMPLAINT_ORDER.get(e["type"], 2))
    field = shorten(".".join(str(part) for part in first["loc"]))
    match first["type"]:
        case "json_invalid":
            return not_json(value, first["msg"])
        case "missing":
            return WireError("missing-field", field, got="nothing", allowed="a value: the field is required")
        case "extra_forbidden":
            nested = len(first["loc"]) > 1
            allowed = f"the fields that docs/schema/{model.type}.json lists" if nested else _fields(model.model_fields)
            return WireError("unknown-field", field, got=first["input"], allowed=allowed)
        case "model_type" | "model_attributes_type" if not first["loc"]:
            return WireError("not-object", "the value", got=type(first["input"]).__name__, allowed="a JSON object")
        case "string_pattern_mismatch" if hidden := HIDDEN_CHARACTER.search(first["input"]):
            return hidden_error(field, first["input"], hidden)
        case _:
            return WireError("bad-field", field, got=first["input"], allowed=first["msg"])


_COMPLAINT_ORDER = {"json_invalid": 0, "missing": 0, "extra_forbidden": 1}


def _fields(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def shorten(value: object, limit: int = 120) -> str:
    r"""Return a value as text of at most `limit` characters and a note that says where it was cut.

    The text is valid UTF-8, and hidden characters are written as escapes such as `\x1b`: the text may be printed.
    """
    if isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to write integers of over 4,300 digits
        value = f"an integer of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value)
    shown = HIDDEN_CHARACTER.sub(_escape, text[: limit + 1])
    cut = shown if len(shown) <= limit else f"{shown[:limit]}… ({len(text)} characters)"
    return cut.encode("utf-8", "replace").decode()


def _escape(hidden: re.Match[str]) -> str:
    return hidden[0].encode("unicode_escape").decode()


def hidden_error(field: str, text: str, hidden: re.Match[str]) -> WireError:
    """Return the error for a field that holds a hidden character, as HIDDEN_CHARACTER found it."""
    return WireError(
        "bad-field", field, got=text,
        allowed=f"text without control characters (it has U+{ord(hidden[0]):04X} at position {hidden.start()})",
    )  # fmt: skip
