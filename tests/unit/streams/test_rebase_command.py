"""`perennial adapters rebase`: what it publishes, what it waits for, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.history.rebuilt_steps import RebuiltStep, rebases_under_way, rebuilds_folder
from perennial.storage.registry.parked import ParkedAdapter, park_adapter
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.storage.registry.waiting_jobs import record_job_version
from perennial.streams.cli import status
from perennial.streams.cli.flow import FlowSnapshot
from perennial.streams.cli.rebase import rebase_adapter as command
from perennial.streams.events.models import ForgetRequested, RebaseRequested
from perennial.streams.kafka.topics import TOPICS
from perennial.testing import small_weights
from tests.unit.streams.test_adapters_commands import ADAPTER, Kafka, store
from tests.versions import VersionPublisher

__all__ = ["store"]
NOW = datetime(2026, 1, 2, tzinfo=UTC)
NEW = "sha256:" + "b" * 64


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    kafka = Kafka()
    monkeypatch.setattr(command, "Publisher", kafka)
    return kafka


def rebase(capsys: pytest.CaptureFixture[str], wait_s: float = 120, **more: Any) -> tuple[int, dict[str, Any]]:
    code = command.rebase_adapter(
        ADAPTER, min_learned_share=0.9, reason="new base", wait_s=wait_s, as_json=True, **more
    )  # fmt: skip
    return code, json.loads(capsys.readouterr().out)


def rebased(store: DirectoryStore) -> Callable[[Any], None]:
    """Return what a learner on the new base does with the job: it publishes a version of that base."""

    def react(event: Any) -> None:
        if isinstance(event, RebaseRequested):
            publisher = VersionPublisher(store, ADAPTER, NEW)
            weights = small_weights(7)
            made = publisher.manifest(weights).model_copy(
                update={"kind": "rebase", "job_id": event.job_id, "base_model": "bigger", "parent": None}
            )
            publisher.registry.publish(made, [weights], lambda _: None)

    return react


def test_the_job_comes_before_the_open_requests_to_forget(store, kafka, capsys):
    old = VersionPublisher(store, ADAPTER).publish()
    entry = QuarantineEntry(
        request_id="r1", job_id="job-r1", kind="erase", selector={"document_ids": ["doc-1"]}, until_ms=1, suppress=True
    )  # fmt: skip
    update_quarantine(store, ADAPTER, lambda found: found.with_entry(entry))
    kafka.react = rebased(store)
    code, said = rebase(capsys)
    job, forget = kafka.sent
    assert isinstance(job, RebaseRequested)
    assert isinstance(forget, ForgetRequested)
    assert (job.adapter, job.min_learned_share, job.reason, forget.request_id) == (ADAPTER, 0.9, "new base", "r1")
    assert code == 0
    assert (said["rebased"], said["rebase_of"], said["outcome"]) == (True, old.version, "promoted")
    assert said["base"] == {"model": "bigger", "sha256": NEW}


def test_what_came_of_it_is_said(store, kafka, capsys):
    VersionPublisher(store, ADAPTER).publish()
    kafka.react = rebased(store)
    assert command.rebase_adapter(ADAPTER, min_learned_share=0.9, reason="", wait_s=120, as_json=False) == 0
    assert f"{ADAPTER} is on bigger: " in capsys.readouterr().out


def test_a_refused_rebase_ends_the_wait(store, kafka, capsys):
    VersionPublisher(store, ADAPTER).publish()

    def park(event: Any) -> None:
        record = ParkedAdapter(
            adapter=ADAPTER, reason="rebase-refused", detail="0 of 9 examples", job_id=event.job_id, since=NOW
        )  # fmt: skip
        park_adapter(store, record)

    kafka.react = park
    code, said = rebase(capsys)
    assert (code, said["rebased"], said["parked"]["reason"]) == (1, False, "rebase-refused")
    kafka.react = lambda _: None
    assert command.rebase_adapter(ADAPTER, min_learned_share=0.9, reason="", wait_s=0.1, as_json=False) == 1
    assert "has not ended within 0 s" in capsys.readouterr().err


def test_an_adapter_that_an_operator_parked_is_said_to_stay_so(store, kafka, capsys):
    VersionPublisher(store, ADAPTER).publish()
    park_adapter(store, ParkedAdapter(adapter=ADAPTER, reason="operator", since=NOW))
    assert command.rebase_adapter(ADAPTER, min_learned_share=0.9, reason="", wait_s=0.1, as_json=False) == 1
    said = capsys.readouterr().err
    assert f"{ADAPTER} is parked (operator)" in said
    assert "the log of the learner" in said


def test_an_adapter_on_the_learners_base_is_reported_as_such(store, kafka, capsys):
    version = VersionPublisher(store, ADAPTER).publish().version
    kafka.react = lambda event: record_job_version(store, ADAPTER, event.job_id, version)
    code, said = rebase(capsys)
    assert (code, said["rebased"], said["version"]) == (0, False, version)


def test_without_a_wait_the_job_is_only_requested(store, kafka, capsys):
    VersionPublisher(store, ADAPTER).publish()
    code, said = rebase(capsys, wait_s=0)
    assert (code, said["version"], len(kafka.sent)) == (0, None, 1)


def test_an_adapter_without_a_version_is_refused(store, kafka):
    with pytest.raises(NotFoundError):
        command.rebase_adapter(ADAPTER, min_learned_share=0.9, reason="", wait_s=0, as_json=True)
    assert kafka.sent == []


def test_progress_counts_what_a_rebase_made_and_no_prepared_forgetting(store):
    digest = "sha256:" + "1" * 64

    def step(adapter: str, key: str, job_id: str, total: int | None) -> None:
        made = RebuiltStep(
            adapter=adapter, job_id=job_id, recorded=digest, rebuilt=digest, made_at=NOW, total=total
        )  # fmt: skip
        store.put_if_absent(f"{rebuilds_folder(adapter)}{key * 64}", made.to_bytes())

    for key in "abc":
        step("acme/support", key, "rebase-1", 40)
    step("acme/support/de", "d", "rebase-2", 7)
    step("acme/other", "e", "forget-1", 9)
    found = {adapter: tuple(progress) for adapter, progress in rebases_under_way(store).items()}
    assert found == {"acme/support": ("rebase-1", 3, 40), "acme/support/de": ("rebase-2", 1, 7)}
    assert set(rebases_under_way(store, "acme/support")) == {"acme/support"}
    flow = FlowSnapshot(
        1.0, dict.fromkeys(TOPICS, 0), dict.fromkeys(status.GROUPS, 0), rebases={"acme/support": (3, 40)}
    )  # fmt: skip
    assert "acme/support is learned anew on another base: 3 of 40 updates" in status.as_text(flow, None)
