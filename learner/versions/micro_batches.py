"""Micro-batches: read and check them, select what is new, leave examples out, and cache their rows for replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cachetools import LRUCache
from pydantic import ValidationError

from perennial.learner.model.tokenization import ExampleError, TokenRow
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.versions.job_result import JobError
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.registry.manifest import LearnedExample, SkippedExample
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import Batch, ExampleAccepted, Origin, UpdateRequested
from perennial.streams.retention.quarantine_filter import QuarantineFilter

MAX_BATCH_BYTES = 256 * 1024**2
BATCH_CACHE_TOKENS = 8_000_000
_Prepared = tuple[ExampleAccepted, list[TokenRow]]

OriginOffset = tuple[str, int, int]
"""Origin partition key, leader epoch and offset: identifies one published record."""


def read_batch(store: ObjectStore, job: UpdateRequested) -> Batch:
    """Return the job's micro-batch.

    Raises:
        JobError: it is not stored, does not parse, or belongs to another job or adapter.
    """
    try:
        batch = Batch.model_validate_json(get_blob(store, job.batch.digest, MAX_BATCH_BYTES))
    except NotFoundError as error:
        raise JobError("missing-batch", "the job's micro-batch is not stored", got=job.batch.digest) from error
    except ValidationError as error:
        raise JobError("bad-batch", "the micro-batch does not parse", got=str(error)[:200]) from error
    if (batch.adapter, batch.cut) != (job.adapter, job.cut):
        raise JobError(
            "wrong-adapter",
            "the micro-batch belongs to another job",
            got=f"{batch.adapter} cut {batch.cut}",
            allowed=f"{job.adapter} cut {job.cut}",
        )
    foreign = next((example for example in batch.examples if example.adapter != job.adapter), None)
    if foreign is not None:
        raise JobError(
            "wrong-adapter",
            "the micro-batch holds another adapter's example",
            got=foreign.adapter,
            allowed=job.adapter,
        )
    return batch


def load_batch(store: ObjectStore, digest: str) -> Batch | None:
    """Return a micro-batch; None if it was erased.

    Raises:
        ValidationError: the blob is not a micro-batch.
    """
    try:
        return Batch.model_validate_json(get_blob(store, digest, MAX_BATCH_BYTES))
    except NotFoundError:
        return None


def batch_to_bytes(batch: Batch) -> bytes:
    """Return a micro-batch as the curate role writes it."""
    return batch.model_dump_json(by_alias=True).encode()


def without_examples(batch: Batch, offsets: Collection[OriginOffset]) -> Batch:
    """Return the micro-batch without the examples at these offsets; whatever else it lists as skipped stays listed.

    A duplicate of a removed example stays listed, too: it is another record, and it must be accounted for.
    """
    return Batch(
        adapter=batch.adapter,
        cut=batch.cut,
        examples=[example for example in batch.examples if origin_offset(example) not in offsets],
        skipped=[skip for skip in batch.skipped if _offset_of(skip.origin) not in offsets],
        system_prompt=batch.system_prompt,
    )


def origin_offset(example: ExampleAccepted) -> OriginOffset:
    """Return where the example was first published."""
    return _offset_of(example.origin)


def _offset_of(origin: Origin) -> OriginOffset:
    return origin.partition_key(), origin.leader_epoch, origin.offset


def batch_origins(batch: Batch) -> list[Origin]:
    """Return the origin of every record that a micro-batch covers, skipped ones included."""
    return [example.origin for example in batch.examples] + [skipped.origin for skipped in batch.skipped]


def example_ids_of(batch: Batch | None, recorded: Iterable[LearnedExample | SkippedExample]) -> list[str]:
    """Return the ids of recorded examples as their micro-batch has them: a manifest's own may be keyed.

    Args:
        batch: the micro-batch; None if it was erased, which gives no ids.
        recorded: what the manifest says of the examples. Those that the micro-batch does not hold are left out.
    """
    wanted = {item.origin_offset for item in recorded}
    if batch is None or not wanted:
        return []
    return [example.example_id for example in batch.examples if origin_offset(example) in wanted]


@dataclass(frozen=True)
class ExampleSelection:
    """A micro-batch split by what is to be done with each example.

    Attributes:
        new: to be learned, at least one training row each.
        skipped: recorded in the manifest with a reason.
        redelivered: count of examples at or below the high-water marks, which an earlier version covers.
    """

    new: list[ExampleAccepted]
    skipped: list[SkippedExample]
    redelivered: int


def select_new_examples(
    batch: Batch, high_water_marks: HighWaterMarks, rows_of: Callable[[ExampleAccepted], list[TokenRow]]
) -> ExampleSelection:
    """Split a micro-batch into new, skipped and redelivered examples.

    Args:
        batch: the micro-batch.
        high_water_marks: the positions that the adapter has seen.
        rows_of: returns an example's training rows or raises ExampleError.
    """
    new: dict[str, ExampleAccepted] = {}
    skipped = [_skipped(skip.example_id, skip.origin, skip.reason) for skip in batch.skipped]
    redelivered = 0
    for example in batch.examples:
        if high_water_marks.covers(example.origin):
            redelivered += 1
        elif not example.learn:
            skipped.append(skipped_example(example, "signal"))
        elif example.returned and example.example_id in new:
            # Another text of its document came in between: the later occurrence is the one to learn.
            skipped.append(skipped_example(new.pop(example.example_id), "duplicate"))
            new[example.example_id] = example
        elif example.example_id in new:
            skipped.append(skipped_example(example, "duplicate"))
        else:
            try:
                rows_of(example)
            except ExampleError:
                skipped.append(skipped_example(example, "no-text"))
            else:
                new[example.example_id] = example
    return ExampleSelection(list(new.values()), skipped, redelivered)


def skipped_example(example: ExampleAccepted, reason: str) -> SkippedExample:
    """Return the manifest's record of an example that is not learned, with an id that is not keyed yet."""
    return _skipped(example.example_id, example.origin, reason)


def removed_examples(job: UpdateRequested) -> list[SkippedExample]:
    """Return the manifest's records of the examples that a forgetting removed while the job waited."""
    return [_skipped(item.example_id, item.origin, item.reason) for item in job.removed]


def _skipped(example_id: str, origin: Origin, reason: str) -> SkippedExample:
    return SkippedExample(
        example_id=example_id,
        partition=origin.partition_key(),
        offset=origin.offset,
        epoch=origin.leader_epoch,
        reason=reason,
    )


class BatchRows:
    """Training rows of earlier micro-batches, read from their blobs and cached up to `BATCH_CACHE_TOKENS` tokens.

    Thread-safe.

    Args:
        store: where the micro-batches are stored.
        rows_of: returns an example's training rows or raises ExampleError.
    """

    def __init__(self, store: ObjectStore, rows_of: Callable[[ExampleAccepted], list[TokenRow]]) -> None:
        self._store = store
        self._rows_of = rows_of
        self._cache: LRUCache[str, dict[str, _Prepared]] = LRUCache(BATCH_CACHE_TOKENS, _cache_tokens)
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def __call__(self, entry: ReplayEntry) -> Sequence[TokenRow] | None:
        """Return the rows of an example; None if its micro-batch was erased or no longer holds it."""
        found = self._find(entry)
        return found[1] if found else None

    def example(self, entry: ReplayEntry) -> ExampleAccepted | None:
        """Return an example; None if its micro-batch was erased or no longer holds it."""
        found = self._find(entry)
        return found[0] if found else None

    def example_allowed_by(
        self, quarantine: QuarantineFilter, used: dict[str, ExampleAccepted]
    ) -> Callable[[ReplayEntry], ExampleAccepted | None]:
        """Return `example`, which gives None for quarantined examples as well and adds those it returns to `used`, by id."""
        find = self._allowed_by(quarantine, used)

        def example(entry: ReplayEntry) -> ExampleAccepted | None:
            found = find(entry)
            return found[0] if found else None

        return example

    def allowed_by(
        self, quarantine: QuarantineFilter, drawn: dict[str, ExampleAccepted]
    ) -> Callable[[ReplayEntry], Sequence[TokenRow] | None]:
        """Return a look-up that also gives None for quarantined examples.

        Args:
            quarantine: decides which examples must not be trained on.
            drawn: the look-up adds every example whose rows it returns, by example id.
        """
        find = self._allowed_by(quarantine, drawn)

        def rows(entry: ReplayEntry) -> Sequence[TokenRow] | None:
            found = find(entry)
            return found[1] if found else None

        return rows

    def _allowed_by(
        self, quarantine: QuarantineFilter, used: dict[str, ExampleAccepted]
    ) -> Callable[[ReplayEntry], _Prepared | None]:
        def find(entry: ReplayEntry) -> _Prepared | None:
            found = self._find(entry)
            if found is None or quarantine.blocks(found[0]):
                return None
            used[entry.example_id] = found[0]
            return found

        return find

    def _find(self, entry: ReplayEntry) -> _Prepared | None:
        with self._lock:
            group = self._cache.get(entry.batch)
        if group is None:
            batch = load_batch(self._store, entry.batch)
            if batch is None:
                return None
            group = self._prepare(entry.batch, batch.examples)
        return group.get(entry.example_id)

    def drop(self, digests: Iterable[str]) -> None:
        """Remove these micro-batches from the cache."""
        with self._lock:
            for digest in digests:
                self._cache.pop(digest, None)

    def put(self, digest: str, examples: Iterable[ExampleAccepted]) -> None:
        """Add a micro-batch that is in memory already to the cache."""
        with self._lock:
            cached = digest in self._cache
        if not cached:
            self._prepare(digest, examples)

    def _prepare(self, digest: str, examples: Iterable[ExampleAccepted]) -> dict[str, _Prepared]:
        group: dict[str, _Prepared] = {}
        for example in examples:
            try:
                group[example.example_id] = example, self._rows_of(example)
            except ExampleError:
                continue  # it was skipped when the batch was learned, too
        with self._lock:
            self._cache[digest] = group
        return group


def _cache_tokens(group: Mapping[str, _Prepared]) -> int:
    # A micro-batch larger than the whole cache counts as all of it, so that it is still cached, alone.
    return min(BATCH_CACHE_TOKENS, sum(len(row.ids) for _, rows in group.values() for row in rows))
