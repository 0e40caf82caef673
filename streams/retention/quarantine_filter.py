"""The filter that says whether an example may be learned, by a quarantine's entries, holds and suppressed texts.

curate asks at every cut, so that quarantined text does not reach a micro-batch. The learner reads the quarantine again
and asks at every update, and its answer is the final one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import (
    LegalHold,
    Quarantine,
    QuarantineEntry,
    SuppressedTexts,
    ensure_text_key,
)
from perennial.storage.registry.suppressed_texts import keyed_text_hash
from perennial.streams.events.models import ExampleAccepted, Selector


def text_hash(example: ExampleAccepted, key: bytes) -> str | None:
    """Return the hash that a text is suppressed by; None where the example has no text.

    Texts that are equal once they are normalised have equal hashes under any document id. The hash of an interaction
    covers prompt and answer.

    Args:
        example: The example.
        key: The adapter's text key, see `ensure_text_key`.
    """
    text = _text_of(example)
    return None if text is None else keyed_text_hash(key, *text)


class QuarantineFilter:
    """A quarantine, prepared for many questions.

    Args:
        quarantine: The quarantine as it was loaded.
        store: The store, for suppressed texts that the quarantine object itself does not hold, and for their key. It is
            read only where the quarantine suppresses any text.
    """

    def __init__(self, quarantine: Quarantine, store: ObjectStore) -> None:
        self._adapter = quarantine.adapter
        self._store = store
        self._suppressed = SuppressedTexts(store, quarantine) if quarantine.suppresses_texts else None
        self._entries = [(entry, _entry_matcher(entry)) for entry in quarantine.entries]
        self._holds = [(hold, _hold_matcher(hold)) for hold in quarantine.holds]

    def held_by(self, example: ExampleAccepted) -> str | None:
        """Return the request id of a hold on the example; while there is one, the example must not be erased."""
        return next((hold.request_id for hold, matches in self._holds if matches(example)), None)

    def entry_of(self, example: ExampleAccepted) -> QuarantineEntry | None:
        """Return the first entry that blocks the example; None where there is none.

        While a hold covers the example, open entries do not block it. A hold does not undo what was carried out before it: an
        entry that is done still blocks examples that arrive late.
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
        """Return whether an equal text was erased before.

        Raises:
            StoreError: The list of suppressed texts cannot be read.
        """
        text = _text_of(example) if self._suppressed is not None else None
        return self._suppressed is not None and text is not None and self._suppressed.holds(*text)

    def blocks(self, example: ExampleAccepted) -> bool:
        """Return whether the example must not be learned."""
        return self.suppresses(example) or self.entry_of(example) is not None

    def suppression_of(self, examples: Iterable[ExampleAccepted]) -> Callable[[Quarantine], Quarantine]:
        """Return the change of the quarantine that suppresses the texts of blocked examples that are to be erased.

        A text that is suppressed by a hash without a key, of an older release, gets a keyed hash instead.

        Args:
            examples: Examples that the filter blocks, or any others: those add nothing.

        Raises:
            StoreError: The adapter's text key cannot be read or created.
        """
        hashes: set[str] = set()
        replaced: set[str] = set()
        for example in examples:
            text = _text_of(example)
            if text is None:
                continue
            unkeyed = self._suppressed.unkeyed_hash(*text) if self._suppressed is not None else None
            if unkeyed is not None:
                replaced.add(unkeyed)
            if unkeyed is not None or self.erases(example):
                hashes.add(keyed_text_hash(ensure_text_key(self._store, self._adapter), *text))
        return lambda quarantine: quarantine.suppressing(hashes, replaced)


def blocks(quarantine: Quarantine, example: ExampleAccepted, store: ObjectStore) -> bool:
    """Return whether the example must not be learned; for many examples use one `QuarantineFilter`."""
    return QuarantineFilter(quarantine, store).blocks(example)


def _text_of(example: ExampleAccepted) -> tuple[str, str | None] | None:
    """Return the arguments of `keyed_text_hash` for an example; None where it has no text."""
    if example.text is not None:
        return example.text, None
    if example.prompt is not None and example.answer is not None:
        return example.prompt, example.answer
    return None


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
