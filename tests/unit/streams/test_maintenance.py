"""Roles pause for a command, and go on when it ends, dies or is too slow."""

from __future__ import annotations

import threading
import time

import pytest

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.kafka import maintenance
from perennial.streams.kafka.installation import InstallationError
from perennial.streams.kafka.maintenance import (
    LEASE_S,
    MaintenanceError,
    MaintenanceLease,
    MaintenanceWatch,
    allowed_counts,
    run_pausable,
)
from perennial.streams.observe.metrics import Metrics


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance, "POLL_S", 0.05)
    return DirectoryStore(tmp_path)


class Checks:
    def __init__(self, error=None) -> None:
        self.error, self.closed = error, False

    def verify(self):
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed = True


def test_a_role_pauses_only_for_its_own_topics_and_goes_on_at_the_end(store):
    watch, other = MaintenanceWatch(store, "intake"), MaintenanceWatch(store, "learner")
    assert not watch.paused()
    lease = MaintenanceLease(store, "examples", 8, ("intake",))
    assert (watch.paused(), other.paused()) == (True, False)
    assert allowed_counts(store) == {"examples": 8}
    lease.end()
    assert not watch.paused()
    assert allowed_counts(store) == {}
    MaintenanceLease(store, "drift", 8, ("streams",))  # another command may follow


def test_a_dead_command_stops_nobody_and_a_stalled_one_alters_nothing(store):
    now_s = 0.0
    watch = MaintenanceWatch(store, "intake", clock=lambda: now_s)
    lease = MaintenanceLease(store, "examples", 8, ("intake",))
    assert watch.paused()
    now_s = LEASE_S - 1
    assert watch.paused()
    lease.renew()
    now_s = 2 * LEASE_S - 2
    assert watch.paused()  # the renewed record was seen only now
    now_s = 3 * LEASE_S
    assert not watch.paused()
    with pytest.raises(MaintenanceError, match="went on"):
        lease.renew()
    lease.end()


def test_a_role_ends_its_work_while_a_command_runs_and_starts_again(store):
    metrics, stop, runs = Metrics("intake"), threading.Event(), []

    def body(inner):
        runs.append("start")
        inner.wait(30)
        runs.append("end")

    role = threading.Thread(target=run_pausable, args=("intake", store, stop, metrics, body, Checks))
    role.start()
    until(lambda: runs == ["start"])
    lease = MaintenanceLease(store, "examples", 8, ("intake",))
    until(lambda: metrics.health.report().status == "maintenance")
    assert runs == ["start", "end"]
    lease.end()
    until(lambda: runs == ["start", "end", "start"])
    assert metrics.health.report().status != "maintenance"
    stop.set()
    role.join(30)
    assert runs == ["start", "end", "start", "end"]


def until(holds, within_s=30):
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_case_14_a_role_that_runs_stops_when_its_topics_change(store):
    """Case 14: counts and ids were compared at no time; now a running role compares them and ends with the remedy."""
    error = InstallationError("other count", remedy="repartition")
    checks = Checks(error)
    with pytest.raises(InstallationError, match="other count"):
        run_pausable(
            "intake", store, threading.Event(), Metrics("intake"), lambda inner: inner.wait(30), lambda: checks, 0.05
        )
    assert checks.closed


def test_a_store_that_is_away_ends_no_role(store):
    stop, checks = threading.Event(), Checks(StoreUnavailableError("away"))
    threading.Timer(0.5, stop.set).start()
    run_pausable("intake", store, stop, Metrics("intake"), lambda inner: inner.wait(30), lambda: checks, 0.05)


def test_the_error_of_a_role_is_the_role_s_own(store):
    def body(_):
        raise InstallationError("the role's own")

    with pytest.raises(InstallationError, match="the role's own"):
        run_pausable("intake", store, threading.Event(), Metrics("intake"), body, Checks)
