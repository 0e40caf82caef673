"""What must not be learned: one object per adapter, replaced by compare-and-swap.

An entry names examples that are to be forgotten; it is written before anything else is done about them, marked as
done by whoever forgot them, and removed once nothing published before its `until_ms` can arrive any more. A hold
exempts examples from entries. `suppressed` lists texts that must never be learned again, by hash. Retain writes
entries and holds, the learner `done` and `suppressed`; curate and the learner read. Selectors are plain JSON
here: what they mean is said in streams/quarantine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import check_adapter

MAX_QUARANTINE_BYTES = 64 << 20
TEXT_HASH_CHARS = 32
_ATTEMPTS = 64
_Id = Annotated[str, Field(min_length=1, max_length=1024)]
TextHash = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{TEXT_HASH_CHARS}}}$")]


class _Part(BaseModel):
    # What is not understood here could be an order to forget: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")


class RequestOutcome(_Part):
    """How an entry came to its end.

    examples: how many the line had. version: what is live since, None where nothing is or nothing changed.
    generation: of the alias after the swap; None where it was not moved, for the line had none of them. failure:
    why it could not be done, empty where it was.
    """

    at_ms: int
    examples: Annotated[int, Field(ge=0)] = 0
    version: Digest | None = None
    generation: Annotated[int, Field(ge=0)] | None = None
    failure: str = ""


class QuarantineEntry(_Part):
    """Examples to forget: those listed, and those the selector means, that were published up to `until_ms`."""

    request_id: _Id
    job_id: _Id
    kind: str
    selector: dict[str, Any] | None = None
    example_ids: list[str] = []
    until_ms: int
    suppress: bool = True
    done: RequestOutcome | None = None


class LegalHold(_Part):
    """Examples that nothing may erase while the hold stands. selector None: all. until_ms: for people to see.

    Whether a hold has ended is decided by retain's guarded clock, which then removes it; every hold here stands.
    """

    request_id: _Id
    selector: dict[str, Any] | None = None
    until_ms: int | None = None


class Quarantine(_Part):
    """The whole object. revision grows with every change, so that no two states have equal bytes."""

    schema_version: Literal[1] = 1
    adapter: AdapterName
    revision: Annotated[int, Field(ge=0)] = 0
    entries: list[QuarantineEntry] = []
    holds: list[LegalHold] = []
    suppressed: list[TextHash] = []

    def entry(self, request_id: str) -> QuarantineEntry | None:
        """The entry of that request."""
        return next((entry for entry in self.entries if entry.request_id == request_id), None)

    def with_entry(self, entry: QuarantineEntry) -> Self:
        """With the entry, unless its request has one already: an entry never changes but by being done."""
        if self.entry(entry.request_id) is not None:
            return self
        return self.model_copy(update={"entries": [*self.entries, entry]})

    def finished(self, request_id: str, done: RequestOutcome) -> Self:
        """With the entry marked as done; the first mark stands."""
        marked = [
            entry.model_copy(update={"done": done}) if entry.request_id == request_id and not entry.done else entry
            for entry in self.entries
        ]
        return self if marked == self.entries else self.model_copy(update={"entries": marked})

    def without(self, request_ids: Iterable[str]) -> Self:
        """Without these requests' entries."""
        gone = set(request_ids)
        kept = [entry for entry in self.entries if entry.request_id not in gone]
        return self if len(kept) == len(self.entries) else self.model_copy(update={"entries": kept})

    def with_holds(self, holds: Iterable[LegalHold]) -> Self:
        """With exactly these holds."""
        wanted = sorted(holds, key=lambda hold: hold.request_id)
        return self if wanted == self.holds else self.model_copy(update={"holds": wanted})

    def suppressing(self, text_hashes: Iterable[str]) -> Self:
        """With these texts suppressed too."""
        wanted = sorted({*self.suppressed, *text_hashes})
        return self if wanted == self.suppressed else self.model_copy(update={"suppressed": wanted})

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)


def quarantine_key(adapter: str) -> str:
    """Where an adapter's quarantine lies. Raises StoreError where the name is not usable."""
    return f"quarantine/{check_adapter(adapter)}"


def load_quarantine(store: ObjectStore, adapter: str) -> Quarantine:
    """The adapter's quarantine as it is now, an empty one where none was written. Raises IntegrityError."""
    return _load(store, adapter)[0]


def update_quarantine(store: ObjectStore, adapter: str, change: Callable[[Quarantine], Quarantine]) -> Quarantine:
    """Apply a change atomically; the quarantine as it then is. Nothing is written where nothing changed.

    change: a pure function of the current state, called again after a conflict. Raises ConflictError where other
    writers keep coming first, IntegrityError where the object is not readable or would grow too large.
    """
    for _ in range(_ATTEMPTS):
        found, etag = _load(store, adapter)
        wanted = change(found)
        if wanted == found:
            return found
        wanted = wanted.model_copy(update={"revision": found.revision + 1})
        data = wanted.to_bytes()
        if len(data) > MAX_QUARANTINE_BYTES:
            raise IntegrityError(
                f"the quarantine of {adapter} would grow too large",
                got=f"{len(data)} bytes",
                allowed=f"{MAX_QUARANTINE_BYTES} bytes",
                remedy="let the learner work off the open requests first: `perennial forget status`",
            )
        try:
            store.compare_and_swap(quarantine_key(adapter), data, etag)
        except ConflictError:
            continue
        return wanted
    raise ConflictError(f"too many writers change {quarantine_key(adapter)}", remedy="do it again")


def finish_entry(store: ObjectStore, adapter: str, request_id: str, done: RequestOutcome) -> Quarantine:
    """Record that a request was carried out for the adapter, or could not be; the first record stands."""
    return update_quarantine(store, adapter, lambda quarantine: quarantine.finished(request_id, done))


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
            remedy="restore it from a copy, or upgrade: without it nobody knows what must not be learned",
        ) from error
    if found.adapter != adapter:
        raise IntegrityError(f"{key} is another adapter's quarantine", got=found.adapter, allowed=adapter)
    return found, stored.etag
