"""The leases of replicas: who is waited for, and until when, by the records of `adapter-acks` alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed, ReplicaLeft
from perennial.streams.events.cloudevents import encode
from perennial.streams.kafka.event_signatures import signed_event
from perennial.streams.replicas.replica_status import KEPT_S, UNLEASED_S, ReplicaTable
from perennial.streams.retain.rules.replica_report import report_of
from tests.keys import Keys

ADAPTER = "acme/support"
AT = datetime(2026, 1, 1, tzinfo=UTC)
START_MS = int(AT.timestamp() * 1000)
V1, V2 = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def activated(replica: str = "r1", generation: int = 1, version: str = V1, **fields: Any) -> AdapterActivated:
    given = {"lease_s": 60.0, **fields}
    return AdapterActivated(
        adapter=ADAPTER, replica=replica, generation=generation, version=version, published_at=AT, at=AT, **given
    )


def failed(replica: str = "r1", generation: int = 2) -> AdapterFailed:
    return AdapterFailed(
        adapter=ADAPTER, replica=replica, generation=generation, version=V2, published_at=AT, at=AT, lease_s=60.0,
        error="OSError: [Errno 28]",
    )  # fmt: skip


def left(replica: str = "r1", generation: int = 1) -> ReplicaLeft:
    return ReplicaLeft(adapter=ADAPTER, replica=replica, generation=generation, version=V1, at=AT)


def record(event: Any, stored_ms: int = START_MS, *, broker_time: bool = True, partition: int = 0) -> Any:
    """A record of `adapter-acks` as kafka-python returns it."""
    encoded = encode(event, event_id="e", source="test", occurred_at=AT)
    return SimpleNamespace(
        key=encoded.key, value=encoded.value, headers=encoded.headers, timestamp=stored_ms, partition=partition,
        timestamp_type=1 if broker_time else 0,
    )  # fmt: skip


def table_of(*records: Any, now_ms: int = START_MS, following: bool = False) -> ReplicaTable:
    table = ReplicaTable()
    for each in records:
        table.apply(each, now_ms, following=following)
    return table


@pytest.mark.parametrize(
    ("event", "after_s", "state"),
    [
        (activated(), 0, "serving"),
        (activated(), 59.9, "serving"),
        (activated(), 60, "expired"),
        (failed(), 0, "failing"),
        (failed(), 60, "expired"),
        (left(), 0, "left"),
        (left(), 1e6, "left"),
        (activated(lease_s=None), UNLEASED_S - 1, "serving"),
        (activated(lease_s=None), UNLEASED_S, "expired"),
    ],
)
def test_attack_l_a_lease_ends_the_wait_for_a_replica(event: Any, after_s: float, state: str):
    """A subscriber that was scaled down kept erasures open for ever."""
    (status,) = table_of(record(event)).of(ADAPTER, "live")
    assert status.state(START_MS + int(after_s * 1000)) == state


def test_attack_l_fifty_restarts_leave_no_replica_that_is_waited_for():
    """The default name is host name and process id, so each restart of a pod left a replica that blocked erasures."""
    table, now_ms = ReplicaTable(), START_MS
    for pod in range(50):
        now_ms += 3_600_000
        table.apply(record(activated(f"pod-{pod}"), now_ms), now_ms, following=True)
    report = report_of(table.of(ADAPTER, "live"), 2, {V1}, now_ms)
    assert report.behind == ("pod-49",)
    assert len(report.expired) == 49
    kept = [pod for pod in range(50) if (49 - pod) * 3600 < KEPT_S + 60]
    outdated = table.outdated(now_ms)
    assert [key for key, _ in outdated] == sorted(
        f"{ADAPTER}#pod-{pod}".encode() for pod in range(50) if pod not in kept
    )
    for key, partition in outdated:
        tombstone = SimpleNamespace(key=key, value=None, headers=[], timestamp=now_ms, partition=partition)
        table.apply(tombstone, now_ms, following=True)
    assert len(table.of(ADAPTER, "live")) == len(kept)
    assert table.outdated(now_ms) == []


def test_a_heartbeat_begins_the_lease_again_and_a_goodbye_ends_it():
    beats = [record(activated(), START_MS + beat * 20_000) for beat in range(10)]
    (status,) = table_of(*beats, now_ms=START_MS + 200_000).of(ADAPTER, "live")
    assert status.lease_expires_ms == START_MS + 240_000
    (status,) = table_of(*beats, record(left(), START_MS + 200_000), now_ms=START_MS + 200_000).of(ADAPTER, "live")
    assert (status.left, status.lease_expires_ms, status.version) == (True, None, V1)
    assert report_of([status], 2, {V1}, START_MS).left == ("r1",)


@pytest.mark.parametrize(
    ("stored_s", "broker_time", "following", "begins_s"),
    [
        (100, True, True, 100),
        (100, False, False, 100),
        (100, False, True, 1000),  # the clock of the subscriber is behind: its lease begins when its record arrives
        (9000, False, True, 1000),  # the clock of the subscriber is ahead: no lease begins in the future
        (9000, False, False, 1000),
        (1001, True, True, 1000),
    ],
)
def test_the_clock_of_a_subscriber_ends_and_prolongs_no_lease(
    stored_s: int, broker_time: bool, following: bool, begins_s: int
):
    found = record(activated(), stored_s * 1000, broker_time=broker_time)
    (status,) = table_of(found, now_ms=1_000_000, following=following).of(ADAPTER, "live")
    assert status.lease_expires_ms == (begins_s + 60) * 1000


def test_after_an_outage_of_the_broker_every_lease_gets_the_time_for_one_more_heartbeat():
    """While the broker is down nobody can renew a lease: all replicas would seem to have ended."""
    (status,) = table_of(record(activated())).of(ADAPTER, "live")
    back_ms = START_MS + 600_000
    assert status.state(back_ms) == "expired"
    assert status.with_grace(back_ms).state(back_ms + 59_000) == "serving"
    assert status.with_grace(back_ms).state(back_ms + 60_000) == "expired"
    assert status.with_grace(START_MS - 1).lease_expires_ms == START_MS + 60_000
    (old,) = table_of(record(activated(lease_s=None))).of(ADAPTER, "live")
    later_ms = START_MS + 2 * UNLEASED_S * 1000
    assert old.with_grace(later_ms).lease_expires_ms == later_ms + 300_000
    (gone,) = table_of(record(left())).of(ADAPTER, "live")
    assert gone.with_grace(back_ms) == gone


def test_after_partitions_were_added_the_record_that_was_stored_last_counts():
    newer, older = record(activated(generation=2, version=V2), START_MS + 5, partition=3), record(activated())
    for order in ((newer, older), (older, newer)):
        (status,) = table_of(*order, now_ms=START_MS + 10).of(ADAPTER, "live")
        assert status.generation == 2
    table = table_of(newer, older, now_ms=START_MS + 10)
    assert table.locations(ADAPTER, "r1") == [(newer.key, 0), (newer.key, 3)]


def test_replicas_of_other_adapters_and_aliases_are_not_reported():
    canary = activated("r2", alias="canary")
    table = table_of(record(activated()), record(canary), record(activated("r3").model_copy(update={"adapter": "b"})))
    assert [status.replica for status in table.of(ADAPTER, "live")] == ["r1"]
    assert [status.replica for status in table.of(ADAPTER, None)] == ["r1", "r2"]
    assert [status.replica for status in table.of(None, None)] == ["r1", "r2", "r3"]


def test_a_record_of_another_program_says_nothing():
    strange = record(activated())
    strange.value = b"no event"
    assert table_of(strange).of(None, None) == []


# ---- signed acknowledgements


def signed(keys: Keys, event: Any, at_s: float = 0.0, trust: Trust | None = None) -> Any:
    moved = event.model_copy(update={"at": AT + timedelta(seconds=at_s)})
    return record(signed_event(moved, trust or keys.owner), START_MS + int(at_s * 1000))


def signed_table(keys: Keys, *records: Any, now_s: float = 0.0) -> ReplicaTable:
    table = ReplicaTable(keys.readers)
    for each in records:
        table.apply(each, START_MS + int(now_s * 1000), following=True)
    return table


def test_attack_l_forged_acknowledgements_change_nothing_where_replicas_have_keys(tmp_path: Path, caplog: Any):
    """Anybody could say that a replica had dropped a version, had left, or that there was one which blocks an erasure."""
    keys = Keys(tmp_path / "keys")
    genuine = signed(keys, activated(generation=1), 10)
    moved = genuine.value.replace(b'"generation":1', b'"generation":9')
    attacks = [
        record(activated(generation=9)),
        record(left()),
        signed(keys, left(), 20, keys.stranger),
        signed(keys, failed("nobody"), 20, keys.stranger),
        record(failed("nobody")),
        SimpleNamespace(**{**vars(genuine), "value": moved}),
        SimpleNamespace(**{**vars(signed(keys, left("r2"), 20)), "key": genuine.key}),
        signed(keys, left(), 5),  # of an earlier process with that name, sent once more
        SimpleNamespace(key=genuine.key, value=None, headers=[], timestamp=START_MS, partition=0),
    ]
    table = signed_table(keys, genuine, *attacks, now_s=20)
    (status,) = table.of(ADAPTER, "live")
    assert (status.replica, status.generation, status.left, status.failed) == ("r1", 1, False, False)
    assert report_of([status], 2, {V1}, START_MS + 20_000).behind == ("r1",)
    assert len(caplog.messages) == len(attacks)
    unchecked = table_of(genuine, *attacks[:2], now_ms=START_MS + 20_000)
    assert unchecked.of(ADAPTER, "live")[0].left, "without trusted keys they all count"


def test_signed_heartbeats_goodbyes_and_deletions_count(tmp_path: Path):
    keys = Keys(tmp_path / "keys")
    beats = [signed(keys, activated(), 20 * beat) for beat in range(3)]
    table = signed_table(keys, *beats, beats[-1], now_s=40)
    assert table.of(ADAPTER, "live")[0].lease_expires_ms == START_MS + 100_000
    tombstone = SimpleNamespace(key=beats[0].key, value=None, headers=[], timestamp=START_MS, partition=0)
    table.apply(tombstone, START_MS + 100_000, following=True)
    assert table.of(ADAPTER, "live") == []
    table = signed_table(keys, *beats, signed(keys, left(), 41), now_s=41)
    assert table.of(ADAPTER, "live")[0].left
