"""Find examples that are to be forgotten in every stored micro-batch of an adapter."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from perennial.learner.forgetting.rebuild_plan import BatchMatches, ExampleMatch, ForgetTarget
from perennial.learner.forgetting.waiting_batches import waiting_digests
from perennial.learner.versions.history import History
from perennial.learner.versions.micro_batches import load_batch
from perennial.storage.errors import IntegrityError, StoreError, StoreUnavailableError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.rebuilt_steps import list_steps
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
    """Return the matches in the stored micro-batches of the adapter; erased ones have none.

    The matches of a micro-batch are those of all its examples, also of those that stay. Of versions' micro-batches only
    those are read that may hold an example to forget.

    Raises:
        StoreError: the store failed.
        IntegrityError: a version's micro-batch or a waiting job does not parse.
    """
    referenced = history.all_blobs() if history else set()
    refused: set[str] = set()
    unfinished: set[str] = set()
    for pending in list_pending_deletes(store, adapter):
        (refused if pending.refused else unfinished).update(pending.digests)
    unfinished.update(step.batch for _, step in list_steps(store, adapter) if step.batch is not None)
    waiting = waiting_digests(store, adapter) - referenced
    refused -= referenced | waiting
    unfinished -= referenced | waiting | refused
    found = FoundExamples(
        _match_learned(store, adapter, history, target),
        _match_batches(store, adapter, refused, target),
        _match_batches(store, adapter, unfinished, target),
        _match_batches(store, adapter, waiting, target),
    )
    if history is not None:  # equal texts under other ids are suppressed, too
        hashes = target.hashes_to_suppress(found.all())
        found.learned.update(_match_equal_texts(store, adapter, history, target, hashes, found.learned))
    return found


def _learned_batches(history: History) -> set[str]:
    return {node.batch for node in history.versions.values() if node.batch is not None}


def _match_learned(store: ObjectStore, adapter: str, history: History | None, target: ForgetTarget) -> BatchMatches:
    """Return the matches in versions' micro-batches.

    A micro-batch is read only where the history index says that it may hold an example to forget, or where the index
    cannot say. The others have no matches.
    """
    wanted: list[str] = []
    for digest in _learned_batches(history) if history else ():
        rows = history.rows(digest, target.key_check) if history and not target.needs_texts else None
        if rows is None or any(map(target.may_match, rows)):
            wanted.append(digest)
    return _match_batches(store, adapter, wanted, target, published=True)


def _match_equal_texts(
    store: ObjectStore,
    adapter: str,
    history: History,
    target: ForgetTarget,
    hashes: Collection[str],
    known: Collection[str],
) -> BatchMatches:
    """Return the matches in further micro-batches that hold a text with one of these hashes."""
    if not hashes:
        return {}
    wanted = [
        digest
        for digest in _learned_batches(history).difference(known)
        if any(row["text_hash"] in hashes for row in history.rows(digest) or ())
    ]
    return _match_batches(store, adapter, wanted, target, published=True)


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
