"""Whether an example may be learned: what the entries, holds and suppressed texts of a quarantine mean. Pure.

curate asks at every cut, so that quarantined text does not reach a batch; the learner asks at every update, with
the object read afresh, and its word is final.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from perennial.storage.registry.quarantine import TEXT_HASH_CHARS, LegalHold, Quarantine, QuarantineEntry
from perennial.streams.events.models import ExampleAccepted, Selector


def text_hash(example: ExampleAccepted) -> str | None:
    """What a text is suppressed by: the same for the same text under any id; None where there is no text.

    First 32 hex digits of SHA-256 over the document's text, or over prompt, NUL and answer.
    """
    if example.text is not None:
        material = example.text
    elif example.prompt is not None and example.answer is not None:
        material = f"{example.prompt}\0{example.answer}"
    else:
        return None
    return sha256(material.encode("utf-8", "surrogatepass")).hexdigest()[:TEXT_HASH_CHARS]


class QuarantineFilter:
    """A quarantine, ready to be asked about many examples."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._suppressed = frozenset(quarantine.suppressed)
        self._entries = [(entry, _meaning_of_entry(entry)) for entry in quarantine.entries]
        self._holds = [(hold, _meaning_of_hold(hold)) for hold in quarantine.holds]

    def held_by(self, example: ExampleAccepted) -> str | None:
        """The request id of a hold on the example: while it stands, the example must not be erased."""
        return next((hold.request_id for hold, means in self._holds if means(example)), None)

    def entry_of(self, example: ExampleAccepted) -> QuarantineEntry | None:
        """The first entry that means the example; None where there is none or a hold exempts it.

        A hold does not undo what was carried out before it: an entry that is done goes on blocking what comes late.
        """
        found = self._entries_of(example)
        return found[0] if found else None

    def erases(self, example: ExampleAccepted) -> bool:
        """Whether its text is to be kept out for good: by any entry that means it, be another one the first."""
        return any(entry.suppress for entry in self._entries_of(example))

    def _entries_of(self, example: ExampleAccepted) -> list[QuarantineEntry]:
        found = [entry for entry, means in self._entries if means(example)]
        if found and self.held_by(example) is not None:
            found = [entry for entry in found if entry.done is not None]
        return found

    def suppresses(self, example: ExampleAccepted) -> bool:
        """Whether the same text was erased before."""
        return bool(self._suppressed) and text_hash(example) in self._suppressed

    def blocks(self, example: ExampleAccepted) -> bool:
        """Whether the example must not be learned."""
        return self.suppresses(example) or self.entry_of(example) is not None


def blocks(quarantine: Quarantine, example: ExampleAccepted) -> bool:
    """Whether the example must not be learned; use a Screen for many examples."""
    return QuarantineFilter(quarantine).blocks(example)


def _meaning_of_entry(entry: QuarantineEntry) -> Callable[[ExampleAccepted], bool]:
    selector = None if entry.selector is None else Selector.model_validate(entry.selector)
    ids = frozenset(entry.example_ids)
    return lambda example: (
        example.origin.timestamp_ms <= entry.until_ms
        and (example.example_id in ids or (selector is not None and selector.matches(example)))
    )


def _meaning_of_hold(hold: LegalHold) -> Callable[[ExampleAccepted], bool]:
    if hold.selector is None:
        return lambda _: True
    return Selector.model_validate(hold.selector).matches
