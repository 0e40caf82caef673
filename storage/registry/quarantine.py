"""The examples that one adapter must not learn: an object that is replaced by compare-and-swap.

An entry names examples to forget. retain writes it before anything else is done about them. The learner that forgot
them marks it as done. retain removes it once nothing published before its `until_ms` can arrive any more. A hold
exempts the examples that it covers from all entries. Texts that must never be learned again are listed by hash: the
first `MAX_INLINE_HASHES` in this object, the rest in pages that it names (see `suppressed_texts`).

retain writes entries and holds. The learner marks entries as done. retain, curate and the learner add suppressed texts.
curate, the learner and redrive read. Selectors are plain JSON here; streams/retention/quarantine_filter.py says which
examples they match.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import digest_of, hex_of
from perennial.storage.objects.object_store import ObjectStore, StoredObject
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter
from perennial.storage.registry.suppressed_texts import (
    TextHash,
    add_to_pages,
    create_text_key,
    delete_replaced_pages,
    keyed_text_hash,
    load_suppressed_page,
    load_text_key,
    missing_key_error,
    page_of,
    remove_from_pages,
    unkeyed_text_hash,
)

MAX_QUARANTINE_BYTES = 64 << 20
MAX_INLINE_HASHES = 1024
"""Keyed hashes in the quarantine object itself, about 36 kB. With one more, all of them move to pages."""
_MAX_STALE_READS = 8
_Id = Annotated[str, Field(min_length=1, max_length=1024)]


class _Part(BaseModel):
    # An unknown field could be an order to forget that a newer version wrote: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")


NOTHING_MATCHED = "nothing matched"
"""The detail of an outcome where the store held no example that the request selects."""
OTHER_ENGINE = "exact in content, other engine"
"""How the detail of an end begins where updates were rebuilt by another engine than the one that had trained them."""


class RequestOutcome(_Part):
    """The end that the learner gave an entry.

    Attributes:
        at_ms: When, in milliseconds since 1970.
        examples: How many matching examples the adapter's versions had learned or the store held.
        version: The version that became live; None where nothing is live or nothing changed.
        generation: The alias's generation after the change; None where the alias was not moved, because no version
            had learned an example of the entry.
        failure: Why the entry could not be carried out; empty where it was.
        detail: What is remarkable about the end, for people; `NOTHING_MATCHED` where no example matched;
            it begins with `OTHER_ENGINE` where the rebuild has other bits for that reason.
    """

    at_ms: int
    examples: Annotated[int, Field(ge=0)] = 0
    version: Digest | None = None
    generation: Annotated[int, Field(ge=0)] | None = None
    failure: str = ""
    detail: str = ""


class QuarantineEntry(_Part):
    """Examples to forget: those listed, and those that the selector matches, published up to `until_ms`.

    Attributes:
        request_id: The retention request that asked for it.
        job_id: The job that carries it out.
        kind: The kind of the request.
        selector: A `Selector` as JSON; None: only the listed examples.
        example_ids: Examples that are named one by one.
        until_ms: The latest publication time, in milliseconds since 1970.
        suppress: The texts must never be learned again.
        done: How the entry ended; None while it is open.
    """

    request_id: _Id
    job_id: _Id
    kind: str
    selector: dict[str, Any] | None = None
    example_ids: list[str] = []
    until_ms: int
    suppress: bool = True
    done: RequestOutcome | None = None


class LegalHold(_Part):
    """Examples that nothing may erase. Every hold in the object is in force: retain removes those that ended.

    Attributes:
        request_id: The retention request that asked for it.
        selector: A `Selector` as JSON; None: all examples of the adapter.
        until_ms: When the hold will end by itself, for people to see. Readers must not judge by it: only retain's
            guarded clock does.
    """

    request_id: _Id
    selector: dict[str, Any] | None = None
    until_ms: int | None = None


class Quarantine(_Part):
    """The whole object of one adapter.

    Attributes:
        schema_version: The version of this format.
        adapter: The adapter.
        revision: Grows with every change, so that no two states have equal bytes.
        entries: Examples to forget.
        holds: Examples to keep.
        suppressed: Hashes without a key of texts that must never be learned again; only older releases wrote them.
        keyed: Keyed hashes of such texts that are in no page yet.
        pages: The pages of keyed hashes, by the prefix of their hashes.
    """

    schema_version: Literal[1] = 1
    adapter: AdapterName
    revision: Annotated[int, Field(ge=0)] = 0
    entries: list[QuarantineEntry] = []
    holds: list[LegalHold] = []
    suppressed: list[TextHash] = []
    keyed: list[TextHash] = []
    pages: dict[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=200)]] = {}

    def entry(self, request_id: str) -> QuarantineEntry | None:
        """Return the entry of a request, or None."""
        return next((entry for entry in self.entries if entry.request_id == request_id), None)

    def with_entry(self, entry: QuarantineEntry) -> Self:
        """Return a copy with the entry, or this object if its request has one already: only `finished` changes an entry."""
        if self.entry(entry.request_id) is not None:
            return self
        return self.model_copy(update={"entries": [*self.entries, entry]})

    def finished(self, request_id: str, done: RequestOutcome) -> Self:
        """Return a copy with the request's entry marked as done; the first outcome stays."""
        marked = [
            entry.model_copy(update={"done": done}) if entry.request_id == request_id and not entry.done else entry
            for entry in self.entries
        ]
        return self if marked == self.entries else self.model_copy(update={"entries": marked})

    def without(self, request_ids: Iterable[str]) -> Self:
        """Return a copy without the entries of these requests."""
        dropped = set(request_ids)
        kept = [entry for entry in self.entries if entry.request_id not in dropped]
        return self if len(kept) == len(self.entries) else self.model_copy(update={"entries": kept})

    def with_holds(self, holds: Iterable[LegalHold]) -> Self:
        """Return a copy with exactly these holds."""
        wanted = sorted(holds, key=lambda hold: hold.request_id)
        return self if wanted == self.holds else self.model_copy(update={"holds": wanted})

    def suppressing(self, text_hashes: Iterable[str], replaced: Iterable[str] = ()) -> Self:
        """Return a copy in which these texts are suppressed too.

        Args:
            text_hashes: Keyed hashes of the texts.
            replaced: Hashes without a key that the keyed ones take the place of.
        """
        keyed = sorted({*self.keyed, *text_hashes})
        old = set(replaced)
        unkeyed = [text_hash for text_hash in self.suppressed if text_hash not in old]
        if (keyed, unkeyed) == (self.keyed, self.suppressed):
            return self
        return self.model_copy(update={"keyed": keyed, "suppressed": unkeyed})

    @property
    def suppresses_texts(self) -> bool:
        """True if any text is on the list."""
        return bool(self.suppressed or self.keyed or self.pages)

    def to_bytes(self) -> bytes:
        """Return canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)


def quarantine_key(adapter: str) -> str:
    """Return the key of an adapter's quarantine.

    Raises:
        StoreError: The name is not an adapter's.
    """
    return f"quarantine/{check_adapter(adapter)}"


def load_quarantine(store: ObjectStore, adapter: str) -> Quarantine:
    """Return the adapter's quarantine as it is now; an empty one where none was written.

    Raises:
        IntegrityError: The object is not readable.
    """
    return _load(store, adapter)[0]


def load_changed_quarantine(
    store: ObjectStore, adapter: str, known: str | None
) -> tuple[Quarantine, str | None] | None:
    """Return the adapter's quarantine and its etag; None where the etag is `known`, so that it is not parsed again.

    Args:
        store: The store that holds the quarantine.
        adapter: The adapter.
        known: The etag of a quarantine that was loaded before; None where none was.

    Raises:
        IntegrityError: The object is not readable.
    """
    stored = _read(store, adapter)
    if stored is not None and known and stored.etag == known:
        return None
    return _parse(adapter, stored)


def update_quarantine(store: ObjectStore, adapter: str, change: Callable[[Quarantine], Quarantine]) -> Quarantine:
    """Apply a change atomically and return the quarantine as it then is. Nothing is written where nothing changed.

    Args:
        store: The store that holds the quarantine.
        adapter: The adapter.
        change: A pure function of the current quarantine. It is called again after a conflict.

    Raises:
        ConflictError: Other writers were first at every attempt.
        IntegrityError: The object is not readable or would grow too large.
    """

    def with_next_revision(found: Quarantine) -> Quarantine:
        wanted = change(found)
        if wanted == found:
            return found
        revision = found.revision + 1
        if len(wanted.keyed) > MAX_INLINE_HASHES:
            pages = add_to_pages(store, adapter, revision, wanted.pages, wanted.keyed)
            wanted = wanted.model_copy(update={"keyed": [], "pages": pages})
        return wanted.model_copy(update={"revision": revision})

    return _replace(store, adapter, with_next_revision)


def _replace(store: ObjectStore, adapter: str, change: Callable[[Quarantine], Quarantine]) -> Quarantine:
    """Apply a change that may have written pages, and delete the pages that it replaced."""
    before: list[Quarantine] = []

    def load() -> tuple[Quarantine, str | None]:
        found, etag = _load(store, adapter)
        before[:] = [found]
        return found, etag

    for attempt in range(_MAX_STALE_READS):
        try:
            wanted = update_object(store, quarantine_key(adapter), load, change, _bounded_bytes)
        except NotFoundError:  # another writer replaced a page after the quarantine was loaded
            if attempt == _MAX_STALE_READS - 1:
                raise
            continue
        break
    if wanted.pages != before[0].pages:
        delete_replaced_pages(store, adapter, wanted.revision, wanted.pages)
    return wanted


def finish_entry(store: ObjectStore, adapter: str, request_id: str, done: RequestOutcome) -> Quarantine:
    """Record how a request ended for the adapter; the first record stays."""
    return update_quarantine(store, adapter, lambda quarantine: quarantine.finished(request_id, done))


def ensure_text_key(store: ObjectStore, adapter: str) -> bytes:
    """Return the adapter's text key; create it where there is none.

    Raises:
        IntegrityError: The key was lost. Under a new one, no text on the list would be recognised any more.
    """
    found = load_text_key(store, adapter)
    if found is not None:
        return found
    quarantine = load_quarantine(store, adapter)
    if quarantine.keyed or quarantine.pages:
        raise missing_key_error(adapter)
    return create_text_key(store, adapter)


class SuppressedTexts:
    """The list of an adapter's suppressed texts, for look-ups. Loads the text key and pages when they are needed.

    Args:
        store: The store.
        quarantine: The adapter's quarantine as it was loaded.
    """

    def __init__(self, store: ObjectStore, quarantine: Quarantine) -> None:
        self._store = store
        self._adapter = quarantine.adapter
        self._key: bytes | None = None
        self._take(quarantine)

    def _take(self, quarantine: Quarantine) -> None:
        self._unkeyed = frozenset(quarantine.suppressed)
        self._keyed = frozenset(quarantine.keyed)
        self._pages = quarantine.pages

    def unkeyed_hash(self, text: str, answer: str | None = None) -> str | None:
        """Return the text's hash without a key if it is on the list, else None. See `keyed_text_hash` for the text."""
        if not self._unkeyed:
            return None
        text_hash = unkeyed_text_hash(text, answer)
        return text_hash if text_hash in self._unkeyed else None

    def holds(self, text: str, answer: str | None = None) -> bool:
        """Return whether the text is on the list. See `keyed_text_hash` for the text.

        Raises:
            IntegrityError: The adapter's text key is missing.
        """
        if self.unkeyed_hash(text, answer) is not None:
            return True
        return bool(self._keyed or self._pages) and self.holds_hash(keyed_text_hash(self._text_key(), text, answer))

    def holds_hash(self, text_hash: str) -> bool:
        """Return whether a keyed hash is on the list."""
        for _ in range(_MAX_STALE_READS):
            if text_hash in self._keyed:
                return True
            name = page_of(self._pages, text_hash)
            if name is None:
                return False
            try:
                return text_hash in load_suppressed_page(self._store, self._adapter, name)
            except NotFoundError:  # another writer replaced the page since the quarantine was loaded
                self._take(load_quarantine(self._store, self._adapter))
        raise IntegrityError(
            f"a page of the suppressed texts of {self._adapter} is missing",
            remedy="restore the objects under suppressed/ from a copy: without them, erased texts could be learned",
        )

    def _text_key(self) -> bytes:
        if self._key is None:
            self._key = load_text_key(self._store, self._adapter)
        if self._key is None:
            raise missing_key_error(self._adapter)
        return self._key


class Unsuppression(RegistryRecord):
    """The audit record of texts that were taken off the list of suppressed texts.

    Attributes:
        action: The name of the action.
        adapter: The adapter.
        hashes: The hashes that were taken off.
        requested_by: Who asked for it.
        reason: Why.
        at: When.
    """

    action: Literal["unsuppress"] = "unsuppress"
    adapter: AdapterName
    hashes: list[TextHash]
    requested_by: str
    reason: str = ""
    at: AwareDatetime


def unsuppress(
    store: ObjectStore,
    adapter: str,
    *,
    hashes: Iterable[str] = (),
    texts: Iterable[str] = (),
    requested_by: str,
    reason: str = "",
    now: datetime,
) -> Unsuppression:
    """Allow erased texts to be learned again; write an audit record `audit/<adapter>/…` first.

    Args:
        store: The store.
        adapter: The adapter.
        hashes: Hashes of texts, as earlier audit records name them.
        texts: Texts of documents, in any form that `normalised_text` makes equal.
        requested_by: Who asks for it.
        reason: Why.
        now: The time of the record.

    Returns:
        The audit record. Its list of hashes is empty where none of the texts is suppressed; then nothing is written.

    Raises:
        ConflictError: Other writers were first at every attempt.
    """
    given = list(texts)
    wanted = {*hashes, *(unkeyed_text_hash(text) for text in given)}
    key = load_text_key(store, adapter)
    if key is not None:
        wanted |= {keyed_text_hash(key, text) for text in given}
    found = load_quarantine(store, adapter)
    listed = SuppressedTexts(store, found)
    removed = {text_hash for text_hash in wanted if text_hash in found.suppressed or listed.holds_hash(text_hash)}
    record = Unsuppression(
        adapter=adapter, hashes=sorted(removed), requested_by=requested_by, reason=reason, at=now
    )  # fmt: skip
    if not removed:
        return record
    data = record.to_bytes()
    digest = hex_of(digest_of(data))
    store.put_if_absent(f"audit/{adapter}/{int(now.timestamp() * 1000):013d}-unsuppress-{digest[:16]}", data)
    _replace(store, adapter, lambda quarantine: _without_hashes(store, quarantine, removed))
    return record


def _without_hashes(store: ObjectStore, quarantine: Quarantine, hashes: Collection[str]) -> Quarantine:
    revision = quarantine.revision + 1
    wanted = quarantine.model_copy(
        update={
            "suppressed": [text_hash for text_hash in quarantine.suppressed if text_hash not in hashes],
            "keyed": [text_hash for text_hash in quarantine.keyed if text_hash not in hashes],
            "pages": remove_from_pages(store, quarantine.adapter, revision, quarantine.pages, hashes),
        }
    )
    return quarantine if wanted == quarantine else wanted.model_copy(update={"revision": revision})


def _bounded_bytes(quarantine: Quarantine) -> bytes:
    data = quarantine.to_bytes()
    if len(data) > MAX_QUARANTINE_BYTES:
        raise IntegrityError(
            f"the quarantine of {quarantine.adapter} would grow too large",
            got=f"{len(data)} bytes",
            allowed=f"{MAX_QUARANTINE_BYTES} bytes",
            remedy="let the learner work off the open requests first: `perennial forget status`",
        )
    return data


def _load(store: ObjectStore, adapter: str) -> tuple[Quarantine, str | None]:
    return _parse(adapter, _read(store, adapter))


def _read(store: ObjectStore, adapter: str) -> StoredObject | None:
    try:
        return store.get(quarantine_key(adapter), MAX_QUARANTINE_BYTES)
    except NotFoundError:
        return None


def _parse(adapter: str, stored: StoredObject | None) -> tuple[Quarantine, str | None]:
    if stored is None:
        return Quarantine(adapter=adapter), None
    key = quarantine_key(adapter)
    try:
        found = Quarantine.model_validate_json(stored.data)
    except ValidationError as error:
        raise IntegrityError(
            f"{key} does not hold a quarantine of this version",
            got=stored.data[:100],
            allowed="schema_version 1",
            remedy="restore it from a copy, or upgrade; without it, forgotten examples would be learned again",
        ) from error
    if found.adapter != adapter:
        raise IntegrityError(f"{key} is another adapter's quarantine", got=found.adapter, allowed=adapter)
    return found, stored.etag
