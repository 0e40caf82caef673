"""The filter that says whether an example may be learned, by a quarantine's entries, holds and suppressed texts.

curate asks at every cut, so that quarantined text does not reach a micro-batch. The learner reads the quarantine again
and asks at every update, and its answer is the final one.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache
from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import (
    LegalHold,
    Quarantine,
    QuarantineEntry,
    SuppressedTexts,
    ensure_text_key,
    load_changed_quarantine,
)
from perennial.storage.registry.suppressed_texts import conversation_text, keyed_text_hash
from perennial.streams.events.models import ExampleAccepted, Selector, nfc

MAX_KEPT_ENTRIES: Final = 20_000
"""Entries in the filters that one `QuarantineFilters` keeps, all adapters together: about 70 MB."""


def text_hash(example: ExampleAccepted, key: bytes) -> str | None:
    """Return the hash that a text is suppressed by; None where the example has no text.

    Texts that are equal once they are normalised have equal hashes under any document id. The hash of an interaction
    covers prompt and answer, and the turns before them where there are any.

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

    Attributes:
        size: How many entries and inline hashes the quarantine has.

    Raises:
        IntegrityError: A selector in the quarantine cannot be read.
    """

    def __init__(self, quarantine: Quarantine, store: ObjectStore) -> None:
        self._adapter = quarantine.adapter
        self._store = store
        self._key: bytes | None = None
        self._suppressed = SuppressedTexts(store, quarantine) if quarantine.suppresses_texts else None
        self.size = len(quarantine.entries) + len(quarantine.keyed) + len(quarantine.suppressed)
        try:
            self._entries = _EntryIndex(quarantine.entries)
            self._holds = [(hold, _hold_matcher(hold)) for hold in quarantine.holds]
        except ValidationError as error:
            raise IntegrityError(
                f"the quarantine of {quarantine.adapter} has a selector that cannot be read", got=str(error)[:300],
                allowed="a selector of this version",
                remedy="restore the object from a copy, or upgrade; without it, forgotten examples would be learned again",
            ) from error  # fmt: skip

    @property
    def is_empty(self) -> bool:
        """True if no example is blocked."""
        return self._suppressed is None and not self._entries

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
        found = self._entries.matching(example)
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
                self._key = self._key or ensure_text_key(self._store, self._adapter)
                hashes.add(keyed_text_hash(self._key, *text))
        return lambda quarantine: quarantine.suppressing(hashes, replaced)


def blocks(quarantine: Quarantine, example: ExampleAccepted, store: ObjectStore) -> bool:
    """Return whether the example must not be learned; for many examples use one `QuarantineFilter`."""
    return QuarantineFilter(quarantine, store).blocks(example)


def _text_of(example: ExampleAccepted) -> tuple[str, str | None] | None:
    """Return the arguments of `keyed_text_hash` for an example; None where it has no text."""
    if example.text is not None:
        return example.text, None
    if example.prompt is not None and example.answer is not None:
        asked = [(turn.role, turn.content) for turn in example.history or ()]
        return conversation_text(asked, example.prompt), example.answer
    return None


class QuarantineFilters:
    """The filters of adapters' quarantines. Each is kept as long as its quarantine is unchanged in the store.

    An entry stays for weeks, so an adapter with many erasures has many of them; they are not parsed at every question.
    Thread-safe. Do not use one filter in two threads at once.

    Args:
        store: The store.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept: LRUCache[str, _KeptFilter] = LRUCache(MAX_KEPT_ENTRIES, getsizeof=_KeptFilter.size)
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def of(self, adapter: str) -> QuarantineFilter:
        """Return the filter of the adapter's quarantine as it is in the store now, after one read of the store.

        Raises:
            IntegrityError: The quarantine is not readable.
        """
        with self._lock:
            kept = self._kept.get(adapter)
        changed = load_changed_quarantine(self._store, adapter, kept.etag if kept else None)
        if changed is None and kept is not None:
            return kept.filter
        quarantine, etag = changed or (Quarantine(adapter=adapter), None)
        kept = _KeptFilter(etag, QuarantineFilter(quarantine, self._store))
        with self._lock:
            self._kept[adapter] = kept
        return kept.filter


@dataclass(frozen=True)
class _KeptFilter:
    etag: str | None
    filter: QuarantineFilter

    def size(self) -> int:
        return min(1 + self.filter.size, MAX_KEPT_ENTRIES)


class _EntryIndex:
    """The entries of a quarantine by what they select, so that an example is compared with few of them."""

    def __init__(self, entries: Sequence[QuarantineEntry]) -> None:
        self._entries: list[tuple[QuarantineEntry, Selector | None]] = []
        self._by_example: dict[str, list[int]] = defaultdict(list)
        self._by_document: dict[str | None, list[int]] = defaultdict(list)
        self._by_subject: dict[str | None, list[int]] = defaultdict(list)
        self._by_source: dict[str | None, list[int]] = defaultdict(list)
        self._others: list[int] = []
        for number, entry in enumerate(entries):
            selector = None if entry.selector is None else Selector.model_validate(entry.selector)
            self._entries.append((entry, selector))
            for example_id in entry.example_ids:
                self._by_example[example_id].append(number)
            if selector is not None:
                self._add(number, selector)

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, number: int, selector: Selector) -> None:
        """Index an entry by one field that an example must match; the matching itself looks at every field."""
        fields = (
            (self._by_document, selector.document_ids),
            (self._by_subject, selector.subjects),
            (self._by_source, selector.sources),
        )
        found = next(((index, names) for index, names in fields if names is not None), None)
        if found is None:
            self._others.append(number)
            return
        index, names = found
        for name in {nfc(name) for name in names}:
            index[name].append(number)

    def matching(self, example: ExampleAccepted) -> list[QuarantineEntry]:
        """Return the entries that select the example, in their order."""
        numbers = set(self._others)
        numbers.update(self._by_example.get(example.example_id, ()))
        numbers.update(self._by_document.get(nfc(example.document_id), ()))
        numbers.update(self._by_source.get(nfc(example.source), ()))
        for subject in example.subjects:
            numbers.update(self._by_subject.get(nfc(subject), ()))
        return [self._entries[number][0] for number in sorted(numbers) if self._selects(number, example)]

    def _selects(self, number: int, example: ExampleAccepted) -> bool:
        entry, selector = self._entries[number]
        return example.origin.timestamp_ms <= entry.until_ms and (
            example.example_id in entry.example_ids or (selector is not None and selector.matches(example))
        )


def _hold_matcher(hold: LegalHold) -> Callable[[ExampleAccepted], bool]:
    if hold.selector is None:
        return lambda _: True
    return Selector.model_validate(hold.selector).matches
