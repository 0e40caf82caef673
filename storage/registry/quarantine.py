"""The examples that one adapter must not learn: an object that is replaced by compare-and-swap.

An entry names examples to forget. retain writes it before anything else is done about them. The learner that forgot
them marks it as done. retain removes it once nothing published before its `until_ms` can arrive any more. A hold
exempts the examples that it covers from all entries. `suppressed` lists, by hash, texts that must never be learned again.

retain writes entries and holds. The learner marks entries as done. retain, curate and the learner add suppressed texts.
curate, the learner and redrive read. Selectors are plain JSON here; streams/retention/quarantine_filter.py says which
examples they match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import check_adapter

MAX_QUARANTINE_BYTES = 64 << 20
TEXT_HASH_CHARS = 32
_Id = Annotated[str, Field(min_length=1, max_length=1024)]
TextHash = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{TEXT_HASH_CHARS}}}$")]


class _Part(BaseModel):
    # An unknown field could be an order to forget that a newer version wrote: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")


class RequestOutcome(_Part):
    """The end that the learner gave an entry.

    Attributes:
        at_ms: When, in milliseconds since 1970.
        examples: How many matching examples the adapter's versions had learned or the store held.
        version: The version that became live; None where nothing is live or nothing changed.
        generation: The alias's generation after the change; None where the alias was not moved, because no version
            had learned an example of the entry.
        failure: Why the entry could not be carried out; empty where it was.
    """

    at_ms: int
    examples: Annotated[int, Field(ge=0)] = 0
    version: Digest | None = None
    generation: Annotated[int, Field(ge=0)] | None = None
    failure: str = ""


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
        suppressed: Hashes of texts that must never be learned again.
    """

    schema_version: Literal[1] = 1
    adapter: AdapterName
    revision: Annotated[int, Field(ge=0)] = 0
    entries: list[QuarantineEntry] = []
    holds: list[LegalHold] = []
    suppressed: list[TextHash] = []

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

    def suppressing(self, text_hashes: Iterable[str]) -> Self:
        """Return a copy in which these texts are suppressed too."""
        wanted = sorted({*self.suppressed, *text_hashes})
        return self if wanted == self.suppressed else self.model_copy(update={"suppressed": wanted})

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
        return found if wanted == found else wanted.model_copy(update={"revision": found.revision + 1})

    return update_object(
        store, quarantine_key(adapter), lambda: _load(store, adapter), with_next_revision, _bounded_bytes
    )


def finish_entry(store: ObjectStore, adapter: str, request_id: str, done: RequestOutcome) -> Quarantine:
    """Record how a request ended for the adapter; the first record stays."""
    return update_quarantine(store, adapter, lambda quarantine: quarantine.finished(request_id, done))


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
    key = quarantine_key(adapter)
    try:
        stored = store.get(key, MAX_QUARANTINE_BYTES)
    except NotFoundError:
        return Quarantine(adapter=adapter), None
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
