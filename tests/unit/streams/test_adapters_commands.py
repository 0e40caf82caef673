"""`perennial adapters park`, `unpark`, `rollback`, and what `ls` and `show` say of parked adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest

from perennial.learner.versions.alias_events import alias_event_id
from perennial.storage.errors import IntegrityError, NotFoundError, StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.recovery.rollback import RollbackError
from perennial.storage.registry.manifest import LearnedExample, SkippedExample
from perennial.storage.registry.parked import ParkedAdapter, load_parked, park_adapter, unpark_adapter
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.storage.registry.records import manifest_key
from perennial.storage.registry.waiting_jobs import delete_job, job_key, load_given_up, load_job, put_job
from perennial.streams.cli import adapters, doctor, status
from perennial.streams.cli.flow import FlowSnapshot
from perennial.streams.client.base_publisher import Delivery, PublishError
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import BlobRef, ForgetRequested, RollbackRequested, UpdateRequested
from perennial.streams.kafka.topics import TOPICS
from perennial.streams.recovery import waiting_work
from perennial.testing import small_weights
from tests import jobs
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Kafka:
    """Stands in for the publisher; runs a reaction to each event, as a learner would."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.ids: list[str | None] = []
        self.react: Callable[[Any], None] = lambda _: None

    def __call__(self, *_: object, **__: object) -> Kafka:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def publish(self, event: Any, *, event_id: str | None = None) -> Kafka:
        self.sent.append(event)
        self.ids.append(event_id)
        self.react(event)
        return self

    def result(self, _: float) -> Delivery:
        return Delivery("adapter-jobs", 0, 0)


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    kafka = Kafka()
    monkeypatch.setattr(adapters, "Publisher", kafka)
    return kafka


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return DirectoryStore(tmp_path / "store", fsync=False)


def waiting(store: DirectoryStore, *cuts: int, committed: bool = True) -> None:
    for cut in cuts:
        job = UpdateRequested(
            job_id=f"job {cut}", adapter=ADAPTER, cut=cut, batch=BlobRef(digest="sha256:" + "0" * 64, size_bytes=1),
            examples=1, skipped=0, tokens=1, reason="age", marks={"p": cut}, oldest_ms=1, newest_ms=1, cut_at=NOW,
        )  # fmt: skip
        put_job(store, ADAPTER, cut, job.model_dump_json().encode())
        if committed:
            jobs.commit(store, ADAPTER, cut)


def parked(store: DirectoryStore, reason: str = "unreadable-object") -> None:
    park_adapter(
        store,
        ParkedAdapter(
            adapter=ADAPTER, reason=reason, detail="blob 12 is damaged; remedy: restore it", job_id="job 1", cut=1,
            since=NOW, worker="host:1",
        ),
    )  # fmt: skip


def unpark(**more: Any) -> int:
    return adapters.unpark(ADAPTER, **{"without_missing": False, "wait_s": 5, "as_json": True, **more})


def test_park_is_recorded_and_shown(store, capsys):
    VersionPublisher(store, ADAPTER).publish()
    waiting(store, 1, 2)
    assert adapters.park(ADAPTER, reason="a bad source", as_json=False) == 0
    assert "is parked" in capsys.readouterr().out
    assert adapters.park(ADAPTER, reason="another", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["parked"]["detail"] == "a bad source"
    adapters.list_adapters(as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["parked"], row["jobs_waiting"], row["versions"]) == ("operator", 2, 1)
    adapters.list_adapters(as_json=False)
    assert "operator" in capsys.readouterr().out
    adapters.show_adapter(ADAPTER, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["parked"]["reason"], shown["jobs_waiting"]) == ("operator", 2)
    adapters.show_adapter(ADAPTER, as_json=False)
    out = capsys.readouterr().out
    assert "a bad source" in out
    assert "perennial adapters unpark acme/support" in out


def test_what_became_of_every_example_is_counted(store, capsys):
    """An example counts by its newest version; a repeat says nothing about what became of the first one."""
    publisher = VersionPublisher(store, ADAPTER)
    fates: list[tuple[list[str], dict[str, str]]] = [
        (["a", "b"], {"c": "general-rise", "d": "no-gain", "e": "no-text"}),
        (["c"], {"a": "duplicate", "d": "quarantined"}),
    ]
    for learned, skipped in fates:
        found = publisher.manifest(weights := small_weights(len(learned)))
        position = {"partition": "documents:0", "offset": 0}
        manifest = found.model_copy(
            update={
                "learned": [
                    LearnedExample(example_id=name, tokens=5, merged_into="a" if name == "b" else None, **position)
                    for name in learned
                ],
                "skipped": [SkippedExample(example_id=name, reason=why, **position) for name, why in skipped.items()],
            }
        )
        publisher.registry.publish(manifest, [weights], lambda _: None)
    adapters.show_adapter(ADAPTER, as_json=True)
    counted = json.loads(capsys.readouterr().out)["examples"]
    assert counted == {
        "learned": 3, "forgotten": 0, "skipped": {"quarantined": 1, "no-text": 1}, "versions": 2, "earlier_versions": 0,
        "merged": 1,
    }  # fmt: skip
    adapters.show_adapter(ADAPTER, as_json=False)
    assert "3 learned, 1 of them merged; not learned: 1 no-text, 1 quarantined" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_parked_adapter_without_a_version_is_shown(store, capsys):
    parked(store)
    assert adapters.list_adapters(as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["parked"] == "unreadable-object"
    assert adapters.show_adapter(ADAPTER, as_json=False) == 0
    assert "blob 12 is damaged" in capsys.readouterr().out


def test_an_adapter_whose_newest_version_is_damaged_hides_no_other(store, capsys):
    VersionPublisher(store, "acme/other").publish()
    version = VersionPublisher(store, ADAPTER).publish().version
    (store.root / (manifest_key(ADAPTER, version) + "+")).write_bytes(b"{}")
    assert adapters.list_adapters(as_json=True) == 0
    rows = {row["adapter"]: row["last_outcome"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"acme/other": "promoted", ADAPTER: "unreadable"}
    with pytest.raises(IntegrityError):
        adapters.show_adapter(ADAPTER, as_json=True)
    parked(store)
    assert adapters.show_adapter(ADAPTER, as_json=False) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "blob 12 is damaged" in out
    assert "unreadable" in out


def test_unpark_publishes_the_waiting_jobs_in_order_and_open_requests_to_forget(store, kafka, capsys):
    parked(store)
    waiting(store, 3, 1, 12)
    entry = QuarantineEntry(
        request_id="r1", job_id="f1", kind="erase", selector={"document_ids": ["d1"]}, until_ms=5, suppress=True
    )
    update_quarantine(store, ADAPTER, lambda quarantine: quarantine.with_entry(entry))
    kafka.react = lambda event: delete_job(store, ADAPTER, event.cut) if isinstance(event, UpdateRequested) else None
    assert unpark() == 0
    assert [getattr(event, "cut", event.job_id) for event in kafka.sent] == ["f1", 1, 3, 12]
    assert isinstance(kafka.sent[0], ForgetRequested)
    said = json.loads(capsys.readouterr().out)
    assert (said["published"], said["forget_requests"], said["parked"], said["tried"]) == (3, 1, None, True)
    assert load_parked(store, ADAPTER) is None


def test_unpark_says_that_the_cause_persists(store, kafka, capsys):
    parked(store)
    waiting(store, 1, 2)
    kafka.react = lambda event: parked(store) if event.cut == 1 else None
    assert unpark(as_json=False) == 1
    captured = capsys.readouterr()
    assert "2 updates" in captured.out
    assert "parked again (unreadable-object), the cause persists: blob 12 is damaged" in captured.err


def test_unpark_says_that_nobody_tried(store, kafka, capsys):
    parked(store)
    waiting(store, 1)
    assert unpark(as_json=False, wait_s=0.3) == 1
    assert "is a learner running?" in capsys.readouterr().err
    assert unpark(wait_s=0) == 0, "an adapter that is not parked has its waiting jobs published again, too"
    assert [event.cut for event in kafka.sent] == [1, 1]


def test_unpark_changes_nothing_where_a_waiting_job_is_damaged(store, kafka):
    parked(store)
    store.put_if_absent(job_key(ADAPTER, 4), b"{")
    jobs.commit(store, ADAPTER, 4)
    with pytest.raises(IntegrityError, match="000000000004"):
        unpark()
    assert load_parked(store, ADAPTER) is not None
    assert kafka.sent == []


def test_unpark_publishes_also_a_job_that_was_committed_while_it_looked(store, kafka, capsys, monkeypatch):
    """A learner read the job's record before the adapter went on, and left the job in the store: nothing else runs it."""
    parked(store)
    waiting(store, 1)

    def cut_meanwhile(*given: Any) -> bool:
        waiting(store, 2)
        return unpark_adapter(*given)

    monkeypatch.setattr(adapters, "unpark_adapter", cut_meanwhile)
    assert unpark(wait_s=0) == 0
    assert [event.cut for event in kafka.sent] == [1, 2]
    assert json.loads(capsys.readouterr().out)["published"] == 2


def test_case_23_unpark_leaves_a_job_that_curate_never_committed_to_curate(store, kafka, capsys):
    """Curate ended between the job of cut 3 and its state; its examples will be cut again under that number."""
    parked(store)
    waiting(store, 1, 2)
    waiting(store, 3, committed=False)
    assert unpark(wait_s=0) == 0
    assert [event.cut for event in kafka.sent] == [1, 2]
    assert json.loads(capsys.readouterr().out)["uncommitted"] == [3]
    assert unpark(wait_s=0, as_json=False) == 0
    assert "cut 3 is in the store, but curate has not committed it" in capsys.readouterr().err
    assert load_job(store, ADAPTER, 3) is not None


def test_case_23_unpark_gives_up_no_cut_that_curate_is_still_to_make(store, kafka, capsys):
    line = VersionPublisher(store, ADAPTER)
    _published(line, line.manifest(b"").model_copy(update={"next_cut": 3}))
    parked(store, "missing-cut")
    waiting(store, 4)
    waiting(store, 6, committed=False)
    assert unpark(without_missing=True, wait_s=0) == 0
    assert json.loads(capsys.readouterr().out)["given_up"] == [3]


def test_case_23_unpark_passes_over_a_job_that_is_settled_meanwhile(store, kafka, capsys, monkeypatch):
    waiting(store, 1, 2)
    real = waiting_work.committed_cuts

    def settled_meanwhile(*given: Any) -> int:
        delete_job(store, ADAPTER, 1)
        return real(*given)

    monkeypatch.setattr(waiting_work, "committed_cuts", settled_meanwhile)
    assert unpark(wait_s=0) == 0
    assert [event.cut for event in kafka.sent] == [2]


def test_unpark_gives_up_missing_cuts_when_told_to(store, kafka, capsys):
    line = VersionPublisher(store, ADAPTER)
    manifest = line.manifest(b"").model_copy(update={"next_cut": 3})
    weights = _published(line, manifest)
    assert weights
    parked(store, "missing-cut")
    waiting(store, 5, 7)
    assert unpark(without_missing=True, wait_s=0) == 0
    assert json.loads(capsys.readouterr().out)["given_up"] == [3, 4, 6]
    assert set(load_given_up(store, ADAPTER)) == {3, 4, 6}


def _published(line: VersionPublisher, manifest: Any) -> str:
    from perennial.storage.objects.keys import digest_of
    from perennial.storage.registry.manifest import BlobRef as StoredRef
    from perennial.streams.client.testing import small_weights

    weights = small_weights(1)
    ref = StoredRef(digest=digest_of(weights), size_bytes=len(weights))
    version: str = line.registry.publish(
        manifest.model_copy(update={"weights": ref}), [weights], lambda _: None
    ).version
    return version


def test_unpark_needs_an_adapter(store, kafka):
    with pytest.raises(NotFoundError):
        unpark()


def roll_back(**more: Any) -> int:
    return adapters.roll_back(ADAPTER, **{"to": None, "reason": "bad answers", "wait_s": 0.5, "as_json": True, **more})


def test_case_19_a_rollback_is_live_at_once_without_a_learner(store, kafka, capsys):
    """Case 19: the command names the version before the one that is live and moves the alias itself."""
    line = VersionPublisher(store, ADAPTER)
    made = [line.publish() for _ in range(4)]
    assert roll_back() == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["moved"], said["version"]) == (True, made[2].version)
    state = line.registry.alias(ADAPTER)
    manifest = line.registry.manifest(ADAPTER, state.version)
    assert (state.kind, state.generation, manifest.parent) == ("rolled_back", 5, made[2].version)
    assert manifest.weights == line.registry.manifest(ADAPTER, made[2].version).weights
    event, job = kafka.sent
    assert (event.type, event.generation) == ("adapter.rolled_back", 5)
    assert kafka.ids[0] == alias_event_id(event), "one state has one id, whoever sends it"
    assert isinstance(job, RollbackRequested)
    assert (job.version, job.live) == (made[2].version, made[3].version)
    assert roll_back(to=made[0].version, as_json=False) == 0
    assert "again, generation 6" in capsys.readouterr().out


def test_case_19_a_rollback_is_live_where_kafka_is_away(store, kafka, capsys):
    line = VersionPublisher(store, ADAPTER)
    made = [line.publish() for _ in range(2)]

    def away(_: Any) -> None:
        raise PublishError("no broker answers")

    kafka.react = away
    assert roll_back(as_json=False) == 0
    assert "Kafka did not take the event" in capsys.readouterr().err
    manifest = line.registry.manifest(ADAPTER, line.registry.alias(ADAPTER).version)
    assert manifest.parent == made[0].version


def test_case_19_who_may_not_write_to_the_store_leaves_the_rollback_to_a_learner(store, kafka, capsys, monkeypatch):
    line = VersionPublisher(store, ADAPTER)
    made = [line.publish() for _ in range(2)]

    def denied(*_: object) -> None:
        raise StoreError("s3://bucket refused the object", got="403 AccessDenied")

    monkeypatch.setattr(adapters, "roll_back_now", denied)
    assert roll_back(as_json=False) == 1
    assert "403 AccessDenied" in capsys.readouterr().err
    (job,) = kafka.sent
    assert (job.version, job.live) == (made[0].version, made[1].version)


def test_a_rollback_without_a_version_before_is_refused(store, kafka):
    VersionPublisher(store, ADAPTER).publish()
    with pytest.raises(RollbackError, match="no version was live before"):
        roll_back()
    assert kafka.sent == []


def test_doctor_lists_parked_adapters_and_what_waits(store):
    settings = connected_settings()
    assert doctor._parked(settings).ok
    waiting(store, 3, 4)
    assert "2 updates of other adapters wait" in doctor._parked(settings).found
    parked(store)
    finding = doctor._parked(settings)
    assert not finding.ok
    assert "acme/support is parked" in finding.found
    assert "2 updates wait from jobs/acme/support/000000000003 on: blob 12 is damaged" in finding.found
    assert "perennial adapters unpark" in finding.remedy


def test_status_names_parked_adapters():
    flow = FlowSnapshot(1.0, dict.fromkeys(TOPICS, 0), dict.fromkeys(status.GROUPS, 0), parked={ADAPTER: "no-space"})
    assert "acme/support is parked: no-space; `perennial adapters show acme/support`" in status.as_text(flow, None)


def test_a_personal_adapter_is_shown_with_the_shared_one_that_it_extends(store, capsys):
    personal = f"{ADAPTER}/user-42"
    VersionPublisher(store, personal, extends=ADAPTER).publish()

    def shown() -> str:
        adapters.show_adapter(personal, as_json=False)
        return " ".join(capsys.readouterr().out.split())

    assert f"extends {ADAPTER}, which has no live version: served alone" in shown()
    shared = VersionPublisher(store, ADAPTER).publish().version
    assert f"extends {ADAPTER}, served together with its version {shared}" in shown()
    VersionPublisher(store, ADAPTER).registry.revoke(ADAPTER, shared, "wrong")
    assert f"extends {ADAPTER}, whose live version {shared} is revoked: served alone" in shown()
    adapters.show_adapter(personal, as_json=True)
    assert json.loads(capsys.readouterr().out)["manifest"]["extends"] == ADAPTER
    adapters.show_adapter(ADAPTER, as_json=False)
    assert "extends" not in capsys.readouterr().out
