"""What stored micro-batches hold of examples that are to be forgotten: versions', refused jobs', and half-made ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from perennial.learner.versions.history import ExampleMatch, ForgetTarget, History
from perennial.learner.versions.micro_batches import load_batch
from perennial.storage.errors import IntegrityError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.pending_deletes import list_pending_deletes

_log = logging.getLogger("perennial.learner")

Traces = dict[str, list[ExampleMatch]]
"""Notes on the examples of micro-batches, by the micro-batch's digest."""


@dataclass(frozen=True)
class Found:
    """learned: in the micro-batches of versions. refused: of jobs refused for good. left: in what jobs half made."""

    learned: Traces
    refused: Traces
    left: Traces

    def all(self) -> Traces:
        """All of them."""
        return {**self.learned, **self.refused, **self.left}


def find_examples(store: ObjectStore, adapter: str, history: History | None, aim: ForgetTarget) -> Found:
    """What the stored micro-batches hold; those erased before are not there.

    Raises StoreError, also where a version's micro-batch is none.
    """
    manifests = history.manifests.values() if history else ()
    line = {manifest.batch.digest for manifest in manifests if manifest.batch is not None}
    named = {ref.digest for manifest in manifests for ref in manifest.blobs()}
    refused: set[str] = set()
    left: set[str] = set()
    for tombstone in list_pending_deletes(store, adapter):
        (refused if tombstone.refused else left).update(tombstone.digests)
    return Found(
        _look(store, adapter, line, aim, published=True),
        _look(store, adapter, refused - named, aim),
        _look(store, adapter, left - refused - named, aim),
    )


def _look(
    store: ObjectStore, adapter: str, digests: Iterable[str], aim: ForgetTarget, *, published: bool = False
) -> Traces:
    found: Traces = {}
    for digest in sorted(digests):
        try:
            batch = load_batch(store, digest)
        except (IntegrityError, ValidationError) as error:
            if not published:  # weights, or whatever a refused job named; it must not keep all else from being erased
                if isinstance(error, IntegrityError):
                    _log.error("%s: cannot look into what a job left: %s", adapter, error)
                continue
            raise IntegrityError(
                "a version's micro-batch does not parse", got=digest, allowed="a micro-batch",
                remedy="restore the object from a copy: what it holds cannot be forgotten before",
            ) from error  # fmt: skip
        if batch is not None and batch.adapter == adapter:
            found[digest] = aim.look(batch.examples)
    return found
