"""What the learner role refuses before it runs a job, and what a role writes to its log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from perennial.learner.roles import learner as learner_module
from perennial.learner.roles.learner import Learner
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.worker import OneLineFormatter
from perennial.streams.events.cloudevents import Envelope
from perennial.streams.events.models import RollbackRequested, UpdateRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.group import ConsumedRecord
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.settings import Settings
from tests import jobs, tiny


def test_an_id_from_outside_forges_no_line_of_the_log_and_a_traceback_keeps_its_lines():
    record = logging.makeLogRecord({
        "name": "perennial.retain", "levelname": "INFO", "msg": "%s: closed",
        "args": ("r1\n2026-01-31 E perennial: all is lost\x1b[2K\r\u2028",),
    })  # fmt: skip
    said = OneLineFormatter("%(levelname).1s %(name)s: %(message)s").format(record)
    assert said == ("I perennial.retain: r1\\n2026-01-31 E perennial: all is lost\\x1b[2K\\r\\u2028: closed")
    record.exc_text = "Traceback\n  line"
    assert OneLineFormatter("%(message)s").format(record).endswith("\nTraceback\n  line")


class Marks:
    """Finds a mark wrong from offset 100 on; the broker does not answer the first question."""

    def __init__(self) -> None:
        self.asked = 0

    def mark_problem(self, _partition: str, position: tuple[int, int]) -> str | None:
        self.asked += 1
        if self.asked == 1:
            raise KafkaUnavailableError
        return "beyond the log's end" if position[1] >= 100 else None


def test_attack_a_a_job_with_a_mark_that_no_log_can_have_given_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "IDLE_POLL_S", 0.01)
    role = Learner.__new__(Learner)
    role._stop, role._origins = threading.Event(), Marks()
    store = DirectoryStore(tmp_path, fsync=False)
    role._require_plausible(jobs.update(store, 0, [tiny.document(0, "x")]))
    assert role._origins.asked == 2
    with pytest.raises(WireError, match="beyond the log's end") as raised:
        role._require_plausible(jobs.update(store, 1, [tiny.document(1, "x")], high_water_mark=2**63 - 1))
    assert raised.value.reason == "implausible-origin"
    role._require_plausible(RollbackRequested(job_id="r", adapter="a", requested_by="ann"))


def a_role(monkeypatch: pytest.MonkeyPatch, consumer: MagicMock) -> Learner:
    """Return a learner without lanes, over stand-ins for Kafka."""
    role = Learner(
        Settings.of(env_file=None), MagicMock(), consumer, MagicMock(), MagicMock(), threading.Event(), Marks()
    )
    monkeypatch.setattr(role, "_start_next", lambda: False)
    monkeypatch.setattr(role, "_report", lambda: None)
    return role


def test_case_26_a_record_that_breaks_decoding_goes_to_the_dead_letters(monkeypatch):
    consumer = MagicMock()
    role = a_role(monkeypatch, consumer)

    def breaks(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(learner_module, "decode", breaks)
    record = ConsumedRecord("adapter-jobs", 0, 5, b"a", b"{}", [], 0)
    role._take(record)
    (refused,) = role._producer.send_dead_letter.call_args_list
    assert refused.args[:2] == (record, "internal-error")
    consumer.commit.assert_called_once_with([record])


def test_case_27_a_learner_keeps_nothing_that_it_read_of_a_lost_partition(monkeypatch):
    consumer = MagicMock()
    role = a_role(monkeypatch, consumer)
    monkeypatch.setattr(learner_module, "IDLE_POLL_S", 0.01)
    monkeypatch.setattr(learner_module, "decode", lambda *_: Envelope("", "", "", None, jobs_event(), None))
    epochs = iter(range(5))

    def poll(_: float) -> list[ConsumedRecord]:
        epoch = next(epochs, None)
        if epoch is None:
            role._stop.set()
            return []
        consumer.owns.side_effect = lambda record: record.epoch == epoch
        return [ConsumedRecord("adapter-jobs", 0, 5, b"a", b"{}", [], epoch)]

    consumer.poll.side_effect = poll
    role.run()
    assert len(role._order) == 1, "only what was read since the last rebalance"


def jobs_event() -> RollbackRequested:
    return RollbackRequested(job_id="r", adapter="a", requested_by="ann")


def updates_of(*adapters: str) -> Iterator[Envelope]:
    """Yield an update of each adapter; each is published later than the one before."""
    for number, adapter in enumerate(adapters):
        job = UpdateRequested.model_construct(
            adapter=adapter, cut=0, tokens=700, oldest_ms=number, drift=None, marks={}, epochs={}
        )
        yield Envelope("", "", "", None, job, None)


def role_with(monkeypatch: pytest.MonkeyPatch, consumer: MagicMock, *adapters: str) -> tuple[Learner, list[str]]:
    """Return a learner that has read an update of each adapter, and the list of what it starts."""
    role = Learner(
        Settings.of(env_file=None, pass_adapters=3), MagicMock(), consumer, MagicMock(), MagicMock(), threading.Event(),
        Marks(),
    )  # fmt: skip
    started: list[str] = []

    def start(envelope: Envelope, _: object) -> Future[None]:
        started.append(envelope.event.adapter)  # type: ignore[attr-defined]
        return Future()

    envelopes = updates_of(*adapters)
    monkeypatch.setattr(learner_module, "decode", lambda *_: next(envelopes))
    monkeypatch.setattr(role, "_free_lane", lambda: SimpleNamespace(start=start))
    for number in range(len(adapters)):
        role._take(ConsumedRecord("adapter-jobs", number % 2, number, b"a", b"{}", [], 0))
    return role, started


def test_a_learner_fills_its_places_in_turns_of_tenants(monkeypatch):
    """One tenant's flood was read first; the small batch of another is in the same pass."""
    role, started = role_with(monkeypatch, MagicMock(), *(f"flood/{n}" for n in range(9)), "small/a")
    while role._start_next():
        pass
    assert started == ["flood/0", "small/a", "flood/1"]
    assert len(role._waiting) == 7


def test_a_job_of_a_lost_partition_is_not_started(monkeypatch):
    consumer = MagicMock()
    role, started = role_with(monkeypatch, consumer, "a/0", "b/1", "a/2", "b/3")
    consumer.owns.side_effect = lambda record: record.partition == 1
    while role._start_next():
        pass
    assert started == ["b/1", "b/3"]
    assert len(role._waiting) == 0
