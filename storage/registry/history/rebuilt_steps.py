"""The updates that rebuilds have trained again so far: one object `rebuilds/<adapter>/<key>` each.

What the keys stand for, and when the objects are removed, is in `learner/forgetting/rebuild_progress.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from pydantic import AwareDatetime, Field

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName, Digest
from perennial.storage.registry.records import RegistryRecord, check_adapter, parse_record

REBASE_JOB_PREFIX = "rebase-"
"""What the ids of jobs begin with that learn an adapter anew on another base."""
_PREFIX = "rebuilds/"
_MAX_STEP_BYTES = 64 << 10
_KEY_CHARS = 64
_MAX_LOOKS = 8
"""Records of an adapter that are read to find one of a rebase: others are of a forgetting that is prepared."""


class RebuiltStep(RegistryRecord):
    """One update that a rebuild trained again.

    Attributes:
        adapter: the adapter.
        job_id: the job that trained it.
        recorded: the version of the recorded update.
        rebuilt: the version that the rebuild made of it; it has no sequence number.
        batch: the micro-batch that the step stored; None if the recorded one had nothing to leave out.
        blobs: every blob that the step stored.
        made_at: when it was made.
        total: updates that the rebuild has to train; None in records of releases that did not say it.
    """

    adapter: AdapterName
    job_id: Annotated[str, Field(min_length=1, max_length=1024)]
    recorded: Digest
    rebuilt: Digest
    batch: Digest | None = None
    blobs: list[Digest] = Field(default_factory=list)
    made_at: AwareDatetime
    total: Annotated[int, Field(ge=0)] | None = None


class RebaseProgress(NamedTuple):
    """How far a rebase has come.

    Attributes:
        job_id: its job.
        made: updates that were learned anew.
        total: updates that it has to learn.
    """

    job_id: str
    made: int
    total: int


def list_steps(store: ObjectStore, adapter: str) -> Iterator[tuple[str, RebuiltStep]]:
    """Yield the key and the content of each step of the adapter.

    Raises:
        IntegrityError: an object is not readable.
    """
    folder = rebuilds_folder(adapter)
    for key in store.list(folder):
        name = key[len(folder) :]
        if len(name) == _KEY_CHARS and "/" not in name:  # else it is of an adapter below this one
            found, _ = load_step(store, key)
            if found is not None:
                yield key, found


def rebases_under_way(store: ObjectStore, adapter: str | None = None) -> dict[str, RebaseProgress]:
    """Return the progress of rebases by adapter, also of those that wait for a learner or an operator.

    Args:
        store: the store.
        adapter: only this adapter; None: all.

    Raises:
        IntegrityError: a record is not readable.
    """
    keys: dict[str, list[str]] = {}
    for key in store.list(_PREFIX if adapter is None else rebuilds_folder(adapter)):
        name, _, step = key[len(_PREFIX) :].rpartition("/")
        if len(step) == _KEY_CHARS and adapter in {None, name}:
            keys.setdefault(name, []).append(key)
    found: dict[str, RebaseProgress] = {}
    for name, of_adapter in keys.items():
        for key in of_adapter[:_MAX_LOOKS]:
            step_made, _ = load_step(store, key)
            if step_made is not None and step_made.job_id.startswith(REBASE_JOB_PREFIX):
                made = len(of_adapter)
                found[name] = RebaseProgress(step_made.job_id, made, max(made, step_made.total or 0))
                break
    return found


def rebuilds_folder(adapter: str) -> str:
    """Return the beginning of the keys of an adapter's rebuilt updates."""
    return f"{_PREFIX}{check_adapter(adapter)}/"


def load_step(store: ObjectStore, key: str) -> tuple[RebuiltStep | None, str | None]:
    """Return a record and its etag; None where there is none.

    Raises:
        IntegrityError: the record is not readable.
    """
    try:
        stored = store.get(key, _MAX_STEP_BYTES)
    except NotFoundError:
        return None, None
    return parse_record(RebuiltStep, key, stored.data), stored.etag
