"""The jobs of an adapter that wait in the store, to be published again where Kafka no longer has them."""

from __future__ import annotations

from typing import cast

from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.waiting_jobs import committed_cuts, job_key, list_jobs, load_job
from perennial.streams.events.models import ForgetRequested, RetentionKind, Selector, UpdateRequested


def cuts_in_store(store: ObjectStore, adapter: str) -> tuple[list[int], list[int]]:
    """Return the cuts whose jobs are in the store: those that curate committed, and the others."""
    cuts = list(list_jobs(store, adapter))
    committed = committed_cuts(store, adapter)
    return [cut for cut in cuts if cut < committed], [cut for cut in cuts if cut >= committed]


def waiting_updates(store: ObjectStore, adapter: str, cuts: list[int]) -> list[UpdateRequested]:
    """Return the update jobs that wait in the store.

    Args:
        store: The store.
        adapter: The adapter.
        cuts: The cuts to look at; those that are settled meanwhile are left out.

    Raises:
        IntegrityError: A job cannot be read.
    """
    jobs = []
    for cut in cuts:
        stored = load_job(store, adapter, cut)
        if stored is None:  # it was settled in the meantime
            continue
        try:
            jobs.append(UpdateRequested.model_validate_json(stored.data))
        except ValidationError as error:
            raise IntegrityError(
                f"{job_key(adapter, cut)} does not hold a job", got=f"{len(stored.data)} bytes",
                allowed="an update job", remedy="restore the object from a copy, then run the command again",
            ) from error  # fmt: skip
    return jobs


def open_forget_jobs(store: ObjectStore, adapter: str, reason: str) -> list[ForgetRequested]:
    """Return the jobs of the requests to forget that were accepted and are not carried out.

    Args:
        store: The store.
        adapter: The adapter.
        reason: Why they are sent again, for people.
    """
    return [
        ForgetRequested(
            job_id=entry.job_id, request_id=entry.request_id, kind=cast("RetentionKind", entry.kind), adapter=adapter,
            selector=None if entry.selector is None else Selector.model_validate(entry.selector),
            example_ids=entry.example_ids, until_ms=entry.until_ms, suppress=entry.suppress,
            reason=reason,
        )
        for entry in load_quarantine(store, adapter).entries
        if entry.done is None
    ]  # fmt: skip
