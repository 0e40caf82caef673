"""What the learner role refuses before it runs a job, and what a role writes to its log."""

from __future__ import annotations

import logging
import threading
from unittest.mock import MagicMock

import pytest

from perennial.learner.roles import learner as learner_module
from perennial.learner.roles.learner import Learner
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.worker import OneLineFormatter
from perennial.streams.events.cloudevents import Envelope
from perennial.streams.events.models import RollbackRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.group import ConsumedRecord
from perennial.streams.kafka.topics import KafkaUnavailableError
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
