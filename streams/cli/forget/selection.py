"""Turn command-line options into a selector, and a request's selector back into words."""

from __future__ import annotations

import unicodedata

from pydantic import TypeAdapter, ValidationError

from perennial.streams.events.fields import AdapterPattern
from perennial.streams.events.models import Selector
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import SettingsError

_MAX_NAMED = 5


def selector_of(adapter: str, documents: list[str], subjects: list[str], sources: list[str]) -> Selector:
    """Return the selector that the options describe, in Unicode normalisation form C, as it is compared.

    Raises:
        SettingsError: The adapter is no adapter or pattern, or the options select nothing.
    """
    given = {"document_ids": documents, "subjects": subjects, "sources": sources}
    named = {name: [unicodedata.normalize("NFC", value) for value in values] for name, values in given.items()}
    check_pattern(adapter)
    if not any(named.values()):
        raise _unusable("the selection", "", "at least one of --document, --subject, --source")
    try:
        return Selector.model_validate({name: values for name, values in named.items() if values})
    except ValidationError as error:
        first = error.errors()[0]
        shown = ", ".join(f"{name} {values}" for name, values in named.items() if values)
        raise _unusable("the selection", shown, first["msg"].removeprefix("Value error, ")) from None


def check_pattern(adapter: str) -> None:
    """Raise SettingsError where the text is neither an adapter's name nor a pattern."""
    try:
        TypeAdapter(AdapterPattern).validate_python(adapter)
    except ValidationError:
        raise _unusable("--adapter", adapter, "one adapter (acme/support), a pattern (acme/*), or * for all") from None


def describe_selection(record: RequestRecord) -> str:
    """Return which examples a request selects, in the words of the command line."""
    selector = record.request.selector
    if record.example_ids:
        return count_of(len(record.example_ids), "example")
    if selector is None:
        return "everything" if KINDS[record.request.kind].selector == "optional" else "-"
    named = (("document", selector.document_ids), ("subject", selector.subjects), ("source", selector.sources))
    words = [f"{name} {value or '-'}" for name, values in named for value in values or ()]
    if selector.retention_class is not None:
        words.append(f"class {selector.retention_class}")
    if selector.before is not None:
        words.append(f"before {selector.before:%Y-%m-%d %H:%M}")
    more = len(words) - _MAX_NAMED
    return ", ".join(words[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def count_of(number: int, thing: str) -> str:
    """Return a number with its noun, for example `1 example` or `3 examples`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _unusable(what: str, got: str, allowed: str) -> SettingsError:
    return SettingsError(
        f"{what} is not usable", got=got or "nothing", allowed=allowed,
        remedy="for example: perennial forget --adapter acme/support --document ID (or --subject, --source)",
    )  # fmt: skip
