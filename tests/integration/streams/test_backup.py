"""Backups, restores and reconciliation against a real broker, without the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from perennial.learner.versions.alias_events import alias_event, alias_event_id
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.recovery.backup_copy import create_backup
from perennial.storage.recovery.restored_store import load_restored, restore_backup
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import AliasState
from perennial.streams.cli.backup.backup_commands import create_at, list_at, prune_at, verify_at
from perennial.streams.cli.backup.restore_commands import reconcile_store, restore_from
from perennial.streams.cli.doctor import CHECKS
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ForgetRequested, RetentionRequested, Selector, UpdateRequested
from perennial.streams.kafka.group import ConfirmingProducer
from perennial.streams.kafka.group_offsets import group_offsets
from perennial.streams.kafka.installation import InstallationError, check_installation, provision_recorded
from perennial.streams.kafka.topics import admin_client
from perennial.streams.observe.metrics import Metrics
from perennial.streams.recovery.announced import read_announced
from perennial.streams.recovery.kafka_positions import read_positions
from perennial.streams.recovery.reconcile import EventMaker, ReconcileError, reconcile
from perennial.streams.retain.request_store import load_requests
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend
from tests import jobs, retention_world
from tests.integration.learner.learner_kit import read
from tests.keys import Keys
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
MAKER = EventMaker(alias_event, alias_event_id)


@dataclass
class Installation:
    """Topics on a real broker, a store in a folder, and a place of backups."""

    settings: Settings
    root: Path

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.root / "store", fsync=False)

    @property
    def place(self) -> DirectoryStore:
        return DirectoryStore(self.root / "place", fsync=False)

    def send(self, *events: Event | tuple[Event, str]) -> None:
        producer = ConfirmingProducer(self.settings, "test", Metrics("test"), now)
        try:
            for number, each in enumerate(events):
                event, event_id = each if isinstance(each, tuple) else (each, f"test-{number}")
                producer.send(event, event_id=event_id, occurred_at=now())
                producer.flush()
        finally:
            producer.close()

    def learn(self, versions: int, adapter: str = ADAPTER) -> AliasState:
        """Publish versions and announce them, as a learner does."""
        publisher = VersionPublisher(self.store, adapter)
        for _ in range(versions):
            state = publisher.publish()
            event = alias_event(publisher.registry, state)
            self.send((event, alias_event_id(event)))
        return state

    def commit(self, group: str, topic: str, offset: int) -> None:
        partition = TopicPartition(self.settings.kafka.topic(topic), 0)
        with admin_client(self.settings) as admin:
            admin.alter_group_offsets(self.settings.kafka.topic(group), {partition: OffsetAndMetadata(offset, "", -1)})

    def committed(self, group: str, topic: str) -> int | None:
        with admin_client(self.settings) as admin:
            found = group_offsets(admin, self.settings.kafka.topic(group))
        return found.get(TopicPartition(self.settings.kafka.topic(topic), 0))

    def truncate(self, topic: str, offset: int) -> None:
        """Delete the records before an offset, as the broker does after `retention.ms`."""
        with admin_client(self.settings) as admin:
            admin.delete_records({TopicPartition(self.settings.kafka.topic(topic), 0): offset})

    def back_up(self) -> None:
        positions = read_positions(self.settings, read_announced(self.settings).by_name())
        create_backup(self.store, self.place, now, positions.model_dump(mode="json"))

    def lose_and_restore(self) -> None:
        from perennial.storage.recovery.backup_list import load_header

        shutil.rmtree(self.root / "store")
        restore_backup(self.place, load_header(self.place), self.store)


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch) -> Installation:
    settings = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, store=str(tmp_path / "store"), partitions=1, poll_s=0.1
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    made = Installation(settings, tmp_path)
    provision_recorded(settings, made.store)
    return made


def erase(request_id: str, *, adapter: str = ADAPTER, kind: str = "erase") -> RetentionRequested:
    selector = None if kind == "revoke" else Selector(document_ids=["d1"])
    return RetentionRequested(request_id=request_id, kind=kind, adapter=adapter, selector=selector, requested_by="ann")


def reconciled(given: Installation, **options: bool):
    return reconcile(given.settings, given.store, MAKER, **options)


def test_a_bucket_that_was_set_back_is_found_and_reconciled(given, tmp_path):
    given.learn(2)
    shutil.copytree(tmp_path / "store", tmp_path / "yesterday")
    assert CHECKS["age of the store"](given.settings).ok
    assert reconciled(given).evidence == []
    seen = given.learn(3)
    made_since = given.learn(4, "made/since")
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(tmp_path / "yesterday", tmp_path / "store")
    finding = CHECKS["age of the store"](given.settings)
    assert not finding.ok
    assert "acme/support#live has generation 2, and 5 was announced" in finding.found
    with Subscriber(ADAPTER, MemoryBackend(None), settings=given.settings, store=given.store) as subscriber:
        assert subscriber.wait_for(2, 180)
        report = reconciled(given)
        assert report.resumed == {f"{ADAPTER}#live": seen.generation + 1}
        assert report.floors == {"made/since#live": made_since.generation}
        assert subscriber.wait_for(seen.generation + 1, 180)
        assert subscriber.current.manifest.seq == 2
    assert CHECKS["age of the store"](given.settings).ok
    assert given.learn(1, "made/since").generation == made_since.generation + 1
    assert CHECKS["age of the store"](given.settings).ok
    assert load_restored(given.store) is None
    generations = [decode(r.value, r.headers, "adapter-updates").event.generation
                   for r in read(given.settings, "adapter-updates", 11) if r.key == b"acme/support#live"]  # fmt: skip
    assert generations == [1, 2, 3, 4, 5, 6]


def test_groups_read_on_from_the_backup_and_waiting_jobs_come_again(given):
    world = [retention_world.example(number) for number in range(3)]
    for cut in range(2):
        jobs.waiting(given.store, jobs.update(given.store, cut, world[cut : cut + 1]))
    given.send(*[jobs.update(given.store, cut, world[:1], adapter="other") for cut in range(5)])
    given.commit("learner", "adapter-jobs", 1)
    for topic, group in (("documents", "intake"), ("examples", "scorer"), ("scored-examples", "curate")):
        given.commit(group, topic, 0)
    given.back_up()
    for group, topic in (("curate", "scored-examples"), ("learner", "adapter-jobs")):
        given.commit(group, topic, 5 if group == "learner" else 0)
    given.lose_and_restore()
    with pytest.raises(InstallationError, match="not reconciled"):
        check_installation(given.settings, given.store, ["adapter-jobs"])
    report = reconciled(given)
    assert (report.jobs, report.forget_jobs) == (2, 0)
    assert given.committed("learner", "adapter-jobs") == 5
    assert given.committed("curate", "scored-examples") == 0
    again = [decode(r.value, r.headers, "adapter-jobs").event for r in read(given.settings, "adapter-jobs", 7)[5:]]
    assert [(job.adapter, job.cut) for job in again if isinstance(job, UpdateRequested)] == [(ADAPTER, 0), (ADAPTER, 1)]
    check_installation(given.settings, given.store, ["adapter-jobs"])


def test_requests_since_the_backup_are_in_quarantine_before_a_role_starts(given):
    """Also those over a pattern, which retain brings to its adapters bit by bit; and a release after its hold."""
    given.learn(1)
    given.learn(1, "acme/other")
    given.send(erase("before"))
    given.back_up()  # retain never ran, so the request is not in the store and its offset is not committed
    hold = RetentionRequested(
        request_id="hold", kind="hold", adapter=ADAPTER, selector=Selector(document_ids=["d9"]), requested_by="ann"
    )
    release = hold.model_copy(update={"request_id": "release", "kind": "release"})
    given.send(erase("since"), erase("all", adapter="acme/*"), erase("revoked", kind="revoke"), hold, release)
    given.send(erase("all", adapter="acme/*").model_copy(update={"approved_by": "bob"}))
    given.send((erase("since").model_copy(update={"reason": "the id is taken"}), "twice"))
    given.lose_and_restore()
    report = reconciled(given)
    assert report.requests.accepted == ["before", "since", "all", "hold", "release"]
    assert (report.requests.revocations, report.requests.refused) == (["revoked"], 1)
    for adapter, wanted in ((ADAPTER, {"before", "since", "all"}), ("acme/other", {"all"})):
        found = load_quarantine(given.store, adapter)
        assert {entry.request_id for entry in found.entries} == wanted
        assert found.holds == []
    assert {name: record.state for name, record in load_requests(given.store).items()} == {
        "before": "quarantined", "since": "quarantined", "all": "quarantined", "hold": "closed", "release": "closed",
    }  # fmt: skip
    assert given.committed("curate", "retention") == 8
    start = given.committed("learner", "adapter-jobs")
    sent = [decode(r.value, r.headers, "adapter-jobs").event for r in read(given.settings, "adapter-jobs", 8)[start:]]
    assert {(job.adapter, job.request_id) for job in sent if isinstance(job, ForgetRequested)} == {
        (ADAPTER, "before"), (ADAPTER, "since"), (ADAPTER, "all"), ("acme/other", "all"),
    }  # fmt: skip
    assert report.forget_jobs == 4


def test_a_reconciliation_and_a_role_without_a_tenants_name_are_refused(given):
    """They would leave the tenant's logs out: documents would be missing, and erased texts live again."""
    mine = Installation(given.settings.replace(tenants="acme"), given.root)
    provision_recorded(mine.settings, mine.store)
    given.learn(1)
    request = erase("r1")
    made = encode(request, event_id="e", source="test", occurred_at=now())
    with closing(KafkaProducer(bootstrap_servers=given.settings.kafka.bootstrap)) as producer:
        topic = given.settings.kafka.topic("retention.acme")
        producer.send(topic, key=made.key, value=made.value, headers=list(made.headers)).get(timeout=60)
    mine.back_up()
    given.lose_and_restore()
    with pytest.raises(InstallationError, match="are not set: acme"):
        reconciled(given)
    given.store.delete("installation/topics")  # the positions in the backup say it, too
    with pytest.raises(InstallationError, match="are not set: acme"):
        reconciled(given)
    assert load_restored(given.store) is not None
    assert reconciled(mine).requests.accepted == ["acme:r1"]
    provision_recorded(mine.settings, mine.store)
    with pytest.raises(InstallationError, match="are not set: acme"):
        check_installation(given.settings, given.store, ["retention"])
    check_installation(mine.settings, mine.store, ["retention"])
    finding = CHECKS["recorded topics"](given.settings)
    assert not finding.ok
    assert "are not set: acme" in finding.found
    assert CHECKS["recorded topics"](mine.settings).ok
    given.store.delete("installation/topics")  # and what curate has committed
    with pytest.raises(InstallationError, match="are not set: acme"):
        reconciled(given, anyway=True)


def test_a_restore_says_which_requests_count_for_nothing_now(given, tmp_path, monkeypatch, capsys):
    given.learn(1)
    given.back_up()
    given.send(erase("all", adapter="acme/*"), erase("all", adapter="acme/*").model_copy(update={"approved_by": "bob"}))
    given.lose_and_restore()
    monkeypatch.setenv("PERENNIAL_TRUSTED_REQUEST_KEYS", str(Keys(tmp_path / "keys").public))
    assert reconcile_store(accept_lost=False, anyway=True, as_json=False) == 1
    said = capsys.readouterr().out
    assert "NOT carried out, because no approval of these requests over patterns counts now" in said
    assert "all" in said.partition("have changed): ")[2].splitlines()[0]
    assert "`perennial forget approve`" in said


def test_running_roles_stop_the_reconciliation_before_it_changes_anything(given):
    given.learn(1)
    given.back_up()
    given.lose_and_restore()
    topic = given.settings.kafka.topic("adapter-jobs")
    with closing(
        KafkaConsumer(
            topic, bootstrap_servers=given.settings.kafka.bootstrap, group_id=given.settings.kafka.topic("learner")
        )
    ) as learner:
        while not learner.assignment():
            learner.poll(timeout_ms=200)
        with pytest.raises(ReconcileError, match="roles are running") as raised:
            reconciled(given)
    assert "1 processes in the group" in str(raised.value.got)
    assert load_restored(given.store) is not None
    assert list(given.store.list("aliases/")) == []


def send_examples(given: Installation, topic: str, count: int) -> None:
    """Write records that nobody reads here: only how many there are counts."""
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=given.settings.kafka.bootstrap, acks="all")
    try:
        for number in range(count):
            producer.send(given.settings.kafka.topic(topic), key=b"k", value=b"%d" % number).get(60)
    finally:
        producer.close()


def test_records_that_kafka_no_longer_holds_are_counted_and_need_a_word(given):
    given.learn(1)
    for topic, group in (("documents", "intake"), ("examples", "scorer"), ("scored-examples", "curate")):
        send_examples(given, topic, 10)
        given.commit(group, topic, 4)
    given.back_up()
    for topic, first in (("documents", 8), ("examples", 7), ("scored-examples", 9)):
        given.truncate(topic, first)
    given.lose_and_restore()
    with pytest.raises(ReconcileError, match="no longer holds") as raised:
        reconciled(given)
    assert raised.value.got == "3 records of examples were deleted since"
    assert "--accept-lost" in raised.value.remedy
    assert load_restored(given.store) is not None
    assert given.committed("curate", "scored-examples") == 4
    report = reconciled(given, accept_lost=True)
    assert report.lost == {"examples": 3}
    assert given.committed("curate", "scored-examples") == 9
    assert given.committed("scorer", "examples") == 7
    assert given.committed("intake", "documents") == 8


def test_a_reconciliation_that_was_cut_off_is_done_again(given, monkeypatch):
    given.learn(2)
    jobs.waiting(given.store, jobs.update(given.store, 0, [retention_world.example(0)]))
    given.back_up()
    seen = given.learn(3)
    given.send(erase("since"))
    given.lose_and_restore()

    def stop(phase: str) -> Callable[[str], None]:
        def stopped(line: str) -> None:
            if line.startswith(phase):
                raise KeyboardInterrupt

        return stopped

    for phase in ("accepting", "aliases", "jobs"):
        with pytest.raises(KeyboardInterrupt):
            reconcile(given.settings, given.store, MAKER, on_progress=stop(phase))
        assert load_restored(given.store) is not None
    report = reconciled(given)
    assert report.resumed == {f"{ADAPTER}#live": seen.generation + 1}
    start = given.committed("learner", "adapter-jobs")
    rest = [decode(r.value, r.headers, "adapter-jobs").event for r in read(given.settings, "adapter-jobs", 99, 5)]
    assert [type(job).__name__ for job in rest[start:]] == ["ForgetRequested", "UpdateRequested"]
    assert [entry.request_id for entry in load_quarantine(given.store, ADAPTER).entries] == ["since"]


def test_signed_aliases_need_the_key_and_a_forged_one_is_left_out(given, tmp_path, monkeypatch, capsys):
    keys = Keys(tmp_path / "keys")
    for adapter in (ADAPTER, "forged"):
        VersionPublisher(given.store, adapter, trust=keys.owner).publish()
    given.back_up()
    given.lose_and_restore()
    before = {key: given.store.get(key).data for key in given.store.list("")}
    with pytest.raises(ReconcileError, match="aliases of this store are signed"):
        reconciled(given)
    assert {key: given.store.get(key).data for key in given.store.list("")} == before
    staged = "restored/aliases/forged/live"
    given.store.delete(staged)
    given.store.put_if_absent(staged, before[staged].replace(b'"generation":1', b'"generation":7'))
    monkeypatch.setenv("PERENNIAL_SIGNING_KEY_FILE", str(keys.private))
    monkeypatch.setenv("PERENNIAL_TRUSTED_KEYS", str(keys.public))
    assert reconcile_store(accept_lost=False, anyway=False, as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert (list(report["refused"]), list(report["resumed"])) == ([staged], [f"{ADAPTER}#live"])
    assert load_restored(given.store) is None
    assert VersionPublisher(given.store, trust=keys.readers).registry.alias(ADAPTER) is not None


def test_the_commands_do_all_of_it(given, capsys):
    """Create, list, check, refuse, restore, delete."""
    place = str(given.root / "place")
    given.learn(2)
    assert create_at(place, without_kafka=False, as_json=True) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["positions"]["generations"] == {f"{ADAPTER}#live": 2}
    assert create_at(place, without_kafka=True, as_json=False) == 0
    assert "0.0 MB were copied" in capsys.readouterr().out
    assert list_at(place, as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [bool(each["positions"]) for each in listed] == [False, True]
    assert verify_at(place, made["backup_id"], as_json=False) == 0
    assert "byte for byte" in capsys.readouterr().out
    options = {"replace": True, "accept_lost": False, "reconciles": True, "yes": True}
    assert restore_from(place, made["backup_id"], **options, as_json=False) == 0
    assert "the roles may be started" in capsys.readouterr().out
    assert reconcile_store(accept_lost=False, anyway=False, as_json=False) == 0
    assert "nothing to do" in capsys.readouterr().out
    given.place.delete(next(given.place.list("blobs/")))
    assert verify_at(place, None, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["problems"] != []
    assert prune_at(place, keep_days=0, keep=0, dry_run=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == sorted(each["backup_id"] for each in listed)
    assert list(given.place.list("")) == []
