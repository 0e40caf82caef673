"""Update jobs as curate makes them: a micro-batch in the store, and the request that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.waiting_jobs import curate_state_key, put_job
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import Batch, BatchSkip, BlobRef, ExampleAccepted, UpdateRequested
from perennial.streams.settings import Settings
from tests import tiny


def update(
    store: ObjectStore,
    cut: int,
    examples: Sequence[ExampleAccepted],
    *,
    adapter: str = "acme/support",
    skipped: Sequence[int] = (),
    high_water_mark: int | None = None,
    system_prompt: str | None = None,
) -> UpdateRequested:
    """Store a micro-batch and return the job that learns it.

    Args:
        store: Where the micro-batch is stored.
        cut: The job's cut number.
        examples: What is to be learned.
        adapter: The adapter's name.
        skipped: Offsets that the micro-batch lists as duplicates.
        high_water_mark: The job's high-water mark of partition 0; by default the highest offset.
        system_prompt: The system prompt that the micro-batch records.
    """
    batch = Batch(
        adapter=adapter,
        cut=cut,
        examples=list(examples),
        skipped=[BatchSkip(example_id=f"{n:032x}", origin=tiny.origin(n), reason="duplicate") for n in skipped],
        system_prompt=system_prompt,
    )
    offsets = [example.origin.offset for example in examples] + list(skipped)
    high = max(offsets) if high_water_mark is None else high_water_mark
    times = [example.origin.timestamp_ms for example in examples]
    request = UpdateRequested(
        job_id=f"{adapter}-{cut}", adapter=adapter, cut=cut, batch=BlobRef(digest="sha256:" + "0" * 64, size_bytes=0),
        examples=len(examples), skipped=len(skipped), tokens=1, reason="size",
        marks={tiny.origin(0).partition_key(): high}, oldest_ms=min(times), newest_ms=max(times),
        cut_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    return with_batch(store, request, batch.model_dump_json().encode())


def with_batch(store: ObjectStore, request: UpdateRequested, body: bytes) -> UpdateRequested:
    """Return the same job with another micro-batch blob."""
    return request.model_copy(update={"batch": BlobRef(digest=put_blob(store, body), size_bytes=len(body))})


def waiting(store: ObjectStore, request: UpdateRequested) -> UpdateRequested:
    """Store the job and commit its cut, as curate does before it publishes it, and return it."""
    put_job(store, request.adapter, request.cut, request.model_dump_json(by_alias=True).encode())
    commit(store, request.adapter, request.cut)
    return request


def commit(store: ObjectStore, adapter: str, cut: int) -> None:
    """Let curate's state count the cut, and all before it."""
    policy = CutPolicy.of(Settings.of(env_file=None))
    try:
        found = store.get(curate_state_key(adapter))
    except NotFoundError:
        batcher, etag = MicroBatcher[int](adapter, policy), None
    else:
        batcher, etag = MicroBatcher[int].restore(adapter, policy, found.data), found.etag
    batcher.history = replace(batcher.history, cuts=max(batcher.history.cuts, cut + 1))
    store.compare_and_swap(curate_state_key(adapter), batcher.fence().state, etag)
