"""What the stored micro-batches hold of examples that are to be forgotten: those on the line, and those of refused jobs."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from learner.batches import MAX_BATCH_BYTES
from learner.forget import Aim, History, Trace
from storage.blobs import ObjectStore, get_blob
from storage.errors import IntegrityError, NotFoundError
from storage.tombstones import tombstones
from streams.events import Batch

Traces = dict[str, list[Trace]]
"""Notes on the examples of micro-batches, by the micro-batch's digest."""


def traces_of(store: ObjectStore, adapter: str, history: History | None, aim: Aim) -> tuple[Traces, Traces]:
    """What the micro-batches of versions hold, and what those of jobs that were refused for good hold.

    Those erased before are not there. Raises StoreError, also where a version's micro-batch is none.
    """
    manifests = history.manifests.values() if history else ()
    line = {manifest.batch.digest for manifest in manifests if manifest.batch is not None}
    named = {ref.digest for manifest in manifests for ref in manifest.blobs()}
    left = {digest for tombstone in tombstones(store, adapter) if tombstone.refused for digest in tombstone.digests}
    return _look(store, adapter, line, aim), _look(store, adapter, left - named, aim, refused=True)


def stored_batch(store: ObjectStore, digest: str) -> Batch | None:
    """A micro-batch; None where it was erased. Raises ValidationError where the blob is none."""
    try:
        return Batch.model_validate_json(get_blob(store, digest, MAX_BATCH_BYTES))
    except NotFoundError:
        return None


def _look(store: ObjectStore, adapter: str, digests: Iterable[str], aim: Aim, *, refused: bool = False) -> Traces:
    found: Traces = {}
    for digest in sorted(digests):
        try:
            batch = stored_batch(store, digest)
        except ValidationError as error:
            if refused:  # such a job may name anything
                continue
            raise IntegrityError(
                "a version's micro-batch does not parse", got=digest, allowed="a micro-batch",
                remedy="restore the object from a copy: what it holds cannot be forgotten before",
            ) from error  # fmt: skip
        if batch is not None and batch.adapter == adapter:
            found[digest] = aim.look(batch.examples)
    return found
