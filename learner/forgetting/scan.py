"""Find examples that are to be forgotten in every stored micro-batch of an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from perennial.learner.forgetting.rebuild_plan import BatchMatches, ExampleMatch, ForgetTarget
from perennial.learner.forgetting.rebuild_progress import list_steps
from perennial.learner.forgetting.waiting_batches import waiting_digests
from perennial.learner.versions.history import History
from perennial.learner.versions.micro_batches import load_batch
from perennial.storage.errors import IntegrityError, StoreError, StoreUnavailableError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.pending_deletes import list_pending_deletes

_log = logging.getLogger("perennial.learner")


@dataclass(frozen=True)
class FoundExamples:
    """The examples in an adapter's stored micro-batches.

    Attributes:
        learned: in micro-batches of versions.
        refused: in micro-batches of jobs that will never be done.
        unfinished: in micro-batches that interrupted jobs left behind, and in those that a rebuild has made so far.
        waiting: in micro-batches of jobs that wait in the store.
    """

    learned: BatchMatches
    refused: BatchMatches
    unfinished: BatchMatches
    waiting: BatchMatches

    def by_batch(self) -> BatchMatches:
        """Return all matches, by micro-batch."""
        return {**self.learned, **self.refused, **self.unfinished, **self.waiting}

    def all(self) -> list[ExampleMatch]:
        """Return all matches in one list."""
        return [match for group in self.by_batch().values() for match in group]


def find_examples(store: ObjectStore, adapter: str, history: History | None, target: ForgetTarget) -> FoundExamples:
    """Return the matches in every stored micro-batch of the adapter; erased micro-batches have none.

    Raises:
        StoreError: the store failed.
        IntegrityError: a version's micro-batch or a waiting job does not parse.
    """
    manifests = history.manifests.values() if history else ()
    learned = {manifest.batch.digest for manifest in manifests if manifest.batch is not None}
    referenced = {ref.digest for manifest in manifests for ref in manifest.blobs()}
    refused: set[str] = set()
    unfinished: set[str] = set()
    for pending in list_pending_deletes(store, adapter):
        (refused if pending.refused else unfinished).update(pending.digests)
    unfinished.update(step.batch for _, step in list_steps(store, adapter) if step.batch is not None)
    waiting = waiting_digests(store, adapter) - referenced
    refused -= referenced | waiting
    unfinished -= referenced | waiting | refused
    return FoundExamples(
        _match_batches(store, adapter, learned, target, published=True),
        _match_batches(store, adapter, refused, target),
        _match_batches(store, adapter, unfinished, target),
        _match_batches(store, adapter, waiting, target),
    )


def _match_batches(
    store: ObjectStore, adapter: str, digests: Iterable[str], target: ForgetTarget, *, published: bool = False
) -> BatchMatches:
    found: BatchMatches = {}
    for digest in sorted(digests):
        try:
            batch = load_batch(store, digest)
        except StoreUnavailableError:
            raise
        except (StoreError, ValidationError) as error:
            if published:
                raise IntegrityError(
                    "a version's micro-batch does not parse", got=digest, allowed="a micro-batch",
                    remedy="restore the object from a copy: until then, what it holds cannot be forgotten",
                ) from error  # fmt: skip
            # The blob holds weights, or whatever a refused job named. It must not keep everything else from being erased.
            if isinstance(error, StoreError):
                _log.error("%s: cannot search a blob that a job left behind: %s", adapter, error)
            continue
        if batch is not None and batch.adapter == adapter:
            found[digest] = target.match(batch.examples)
    return found
