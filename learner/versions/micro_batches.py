"""Micro-batches as jobs name them: read and checked, sorted by what is new, and kept as rows for replay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from pydantic import ValidationError

from perennial.learner.model.tokenization import ExampleError, TokenRow
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.storage.errors import NotFoundError, PerennialError
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.registry.manifest import SkippedExample
from perennial.streams.events.models import Batch, ExampleAccepted, Origin, UpdateRequested
from perennial.streams.retention.quarantine_filter import QuarantineFilter

MAX_BATCH_BYTES = 256 * 1024**2
BATCH_CACHE_TOKENS = 8_000_000
_Prepared = tuple[ExampleAccepted, list[TokenRow]]

JobErrorReason = Literal[
    "missing-batch", "bad-batch", "wrong-adapter", "base-mismatch", "rank-mismatch", "unknown-version",
    "revoked-version", "not-promoted", "nothing-to-roll-back-to", "recipe-mismatch", "unsupported",
]  # fmt: skip


class JobError(PerennialError):
    """A job cannot be done and never will be; it goes to the dead letters and the next one is taken."""

    def __init__(self, reason: JobErrorReason, message: str, *, got: object = None, allowed: object = None) -> None:
        self.reason: JobErrorReason = reason
        super().__init__(message, got=got, allowed=allowed, remedy="mend what the job names and request it again")


def read_batch(store: ObjectStore, job: UpdateRequested) -> Batch:
    """The job's micro-batch, checked against the job. Raises JobError."""
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
    strange = next((example for example in batch.examples if example.adapter != job.adapter), None)
    if strange is not None:
        raise JobError(
            "wrong-adapter", "the micro-batch holds another adapter's example",
            got=strange.adapter, allowed=job.adapter,
        )  # fmt: skip
    return batch


def load_batch(store: ObjectStore, digest: str) -> Batch | None:
    """A micro-batch; None where it was erased. Raises ValidationError where the blob is none."""
    try:
        return Batch.model_validate_json(get_blob(store, digest, MAX_BATCH_BYTES))
    except NotFoundError:
        return None


def select_new_examples(
    batch: Batch, marks: Mapping[str, int], rows_of: Callable[[ExampleAccepted], list[TokenRow]]
) -> tuple[list[ExampleAccepted], list[SkippedExample], int]:
    """Split a micro-batch into what is to be learned, what is recorded as skipped, and what came again."""
    fresh: dict[str, ExampleAccepted] = {}
    skipped = [
        SkippedExample(
            example_id=skipped_example.example_id, partition=skipped_example.origin.partition_key(),
            offset=skipped_example.origin.offset, reason=skipped_example.reason,
        )
        for skipped_example in batch.skipped
    ]  # fmt: skip
    dropped = 0
    for example in batch.examples:
        if example.origin.offset <= marks.get(example.origin.partition_key(), -1):
            dropped += 1
        elif not example.learn:
            skipped.append(skipped_example(example, "signal"))
        elif example.example_id in fresh:
            skipped.append(skipped_example(example, "duplicate"))
        else:
            try:
                rows_of(example)
            except ExampleError:
                skipped.append(skipped_example(example, "no-text"))
            else:
                fresh[example.example_id] = example
    return list(fresh.values()), skipped, dropped


def skipped_example(example: ExampleAccepted, reason: str) -> SkippedExample:
    """The record of an example that is not learned."""
    return SkippedExample(
        example_id=example.example_id,
        partition=example.origin.partition_key(),
        offset=example.origin.offset,
        reason=reason,
    )


def batch_origins(batch: Batch) -> list[Origin]:
    """Where everything that a micro-batch covers came from."""
    return [example.origin for example in batch.examples] + [
        skipped_example.origin for skipped_example in batch.skipped
    ]


class BatchRows:
    """Training rows of earlier micro-batches, read from their blobs; the last used ones stay, bounded by tokens."""

    def __init__(self, store: ObjectStore, rows_of: Callable[[ExampleAccepted], list[TokenRow]]) -> None:
        self._store = store
        self._rows_of = rows_of
        self._cache: OrderedDict[str, dict[str, _Prepared]] = OrderedDict()
        self._tokens = 0

    def __call__(self, kept: ReplayEntry) -> Sequence[TokenRow] | None:
        """Rows of the example; None where its micro-batch was erased or no longer holds it."""
        found = self._find(kept)
        return found[1] if found else None

    def allowed_by(
        self, screen: QuarantineFilter, drawn: dict[str, ExampleAccepted]
    ) -> Callable[[ReplayEntry], Sequence[TokenRow] | None]:
        """The same, with None also where the screen blocks the example. drawn: gets the others that were asked for."""

        def rows(kept: ReplayEntry) -> Sequence[TokenRow] | None:
            found = self._find(kept)
            if found is None or screen.blocks(found[0]):
                return None
            drawn[kept.example_id] = found[0]
            return found[1]

        return rows

    def _find(self, kept: ReplayEntry) -> _Prepared | None:
        group = self._cache.get(kept.batch)
        if group is None:
            batch = load_batch(self._store, kept.batch)
            if batch is None:
                return None
            self.put(kept.batch, batch.examples)
            group = self._cache[kept.batch]
        self._cache.move_to_end(kept.batch)
        return group.get(kept.example_id)

    def drop(self, digests: Iterable[str]) -> None:
        """Forget these micro-batches."""
        for digest in digests:
            self._tokens -= _tokens(self._cache.pop(digest, {}))

    def put(self, digest: str, examples: Iterable[ExampleAccepted]) -> None:
        """Remember a micro-batch that is in hand."""
        if digest in self._cache:
            return
        group: dict[str, _Prepared] = {}
        for example in examples:
            try:
                group[example.example_id] = example, self._rows_of(example)
            except ExampleError:
                continue  # it was skipped when the batch was learned, too
        self._cache[digest] = group
        self._tokens += _tokens(group)
        while self._tokens > BATCH_CACHE_TOKENS and len(self._cache) > 1:
            self._tokens -= _tokens(self._cache.popitem(last=False)[1])


def _tokens(group: Mapping[str, _Prepared]) -> int:
    return sum(len(row.ids) for _, rows in group.values() for row in rows)
