"""The filter that says whether an example may be learned, by a quarantine's entries, holds and suppressed texts. Pure.

curate asks at every cut, so that quarantined text does not reach a micro-batch. The learner reads the quarantine again
and asks at every update, and its answer is the final one.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from perennial.storage.registry.quarantine import TEXT_HASH_CHARS, LegalHold, Quarantine, QuarantineEntry
from perennial.streams.events.models import ExampleAccepted, Selector


def text_hash(example: ExampleAccepted) -> str | None:
    """Return the hash that a text is suppressed by; None where the example has no text.

    Equal texts have equal hashes under any document id: the first 32 hex digits of SHA-256 over the document's text,
    or over prompt, NUL and answer.
    """
    if example.text is not None:
        material = example.text
    elif example.prompt is not None and example.answer is not None:
        material = f"{example.prompt}\0{example.answer}"
    else:
        return None
    return sha256(material.encode("utf-8", "surrogatepass")).hexdigest()[:TEXT_HASH_CHARS]


class QuarantineFilter:
    """A quarantine, prepared for many questions.

    Args:
        quarantine: The quarantine as it was loaded.
    """

    def __init__(self, quarantine: Quarantine) -> None:
        self._suppressed = frozenset(quarantine.suppressed)
        self._entries = [(entry, _entry_matcher(entry)) for entry in quarantine.entries]
        self._holds = [(hold, _hold_matcher(hold)) for hold in quarantine.holds]

    def held_by(self, example: ExampleAccepted) -> str | None:
        """Return the request id of a hold on the example; while there is one, the example must not be erased."""
        return next((hold.request_id for hold, matches in self._holds if matches(example)), None)

    def entry_of(self, example: ExampleAccepted) -> QuarantineEntry | None:
        """Return the first entry that blocks the example; None where there is none.

        A hold on the example lifts the entries that are open. It does not undo what was carried out before it: an entry
        that is done still blocks examples that arrive late.
        """
        found = self._entries_of(example)
        return found[0] if found else None

    def erases(self, example: ExampleAccepted) -> bool:
        """Return whether any matching entry, not only the first one, wants the text suppressed for good."""
        return any(entry.suppress for entry in self._entries_of(example))

    def _entries_of(self, example: ExampleAccepted) -> list[QuarantineEntry]:
        found = [entry for entry, matches in self._entries if matches(example)]
        if found and self.held_by(example) is not None:
            found = [entry for entry in found if entry.done is not None]
        return found

    def suppresses(self, example: ExampleAccepted) -> bool:
        """Return whether an equal text was erased before."""
        return bool(self._suppressed) and text_hash(example) in self._suppressed

    def blocks(self, example: ExampleAccepted) -> bool:
        """Return whether the example must not be learned."""
        return self.suppresses(example) or self.entry_of(example) is not None


def blocks(quarantine: Quarantine, example: ExampleAccepted) -> bool:
    """Return whether the example must not be learned; for many examples use one `QuarantineFilter`."""
    return QuarantineFilter(quarantine).blocks(example)


def _entry_matcher(entry: QuarantineEntry) -> Callable[[ExampleAccepted], bool]:
    selector = None if entry.selector is None else Selector.model_validate(entry.selector)
    ids = frozenset(entry.example_ids)
    return lambda example: (
        example.origin.timestamp_ms <= entry.until_ms
        and (example.example_id in ids or (selector is not None and selector.matches(example)))
    )


def _hold_matcher(hold: LegalHold) -> Callable[[ExampleAccepted], bool]:
    if hold.selector is None:
        return lambda _: True
    return Selector.model_validate(hold.selector).matches
