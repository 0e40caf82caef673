"""A learner in memory: the version writer with its jobs as methods, and the end that the role gives to a job."""

from __future__ import annotations

from typing import Any

import pytest

from perennial.learner.training.update import Updater
from perennial.learner.versions.job_result import JobResult
from perennial.learner.versions.rollback_job import RollbackExecutor
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.suppressed_texts import TextKey, text_key_key
from perennial.streams.events.models import RollbackRequested, UpdateRequested


class LocalLearner(VersionWriter):
    """Runs update and rollback jobs without Kafka."""

    def update(self, job: UpdateRequested, alias: str) -> JobResult:
        return UpdateExecutor(self).update(job, alias)

    def rollback(self, job: RollbackRequested) -> JobResult:
        return RollbackExecutor(self).rollback(job)

    def refused(self, job: UpdateRequested) -> None:
        UpdateExecutor(self).record_refused(job)


def same_text_key(*stores: ObjectStore, adapter: str = "acme/support") -> None:
    """Give an adapter of each store the same text key, so that the same jobs make the same manifests there."""
    key = TextKey(adapter=adapter, key="0f" * 32).to_bytes()
    for store in stores:
        store.put_if_absent(text_key_key(adapter), key)


def trained_cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which the cut of every update that is trained from now on is added."""
    cuts: list[int] = []
    update = Updater.update

    def counted(self: Updater, *arguments: Any, **more: Any) -> Any:
        cuts.append(more["cut"])
        return update(self, *arguments, **more)

    monkeypatch.setattr(Updater, "update", counted)
    return cuts


def complete(store: ObjectStore, result: JobResult) -> None:
    """Record a job's completion, as the learner does once everything that it sent was confirmed."""
    if result.completion is not None:
        result.completion.record(store)
