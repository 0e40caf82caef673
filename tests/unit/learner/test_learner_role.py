"""What the learner role refuses before it runs a job, and what a role writes to its log."""

from __future__ import annotations

import logging
import threading

import pytest

from perennial.learner.roles import learner as learner_module
from perennial.learner.roles.learner import Learner
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.worker import OneLineFormatter
from perennial.streams.events.models import RollbackRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.topics import KafkaUnavailableError
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
