"""Fixtures for tests that need a real broker: one broker per test run, shared by all xdist workers."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perennial.streams.devstack.embedded_kafka.kafka_broker import BrokerError, EmbeddedBroker, fetch_jars
from perennial.streams.devstack.embedded_kafka.kafka_jars import java_path
from tests.failure_context import failure_context
from tests.scheduling import LongestFirst, longest_first
from tests.security.acts import Acts

_started: list[EmbeddedBroker] = []  # kept until the process ends: the other workers may still use the broker


def pytest_configure(config: pytest.Config) -> None:
    """Ignore one warning: kafka-python reads its schemas through a deprecated call when it is imported."""
    config.addinivalue_line("filterwarnings", "ignore:(read_text|open_text) is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first in a parallel run."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = longest_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of machine and brokers to a failure's line in the summary."""
    report = yield
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.failed and crash is not None:
        first, _, rest = crash.message.partition("\n")
        crash.message = f"{first} [{failure_context()}]\n{rest}".rstrip()
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Replace the scheduling of `--dist loadscope`."""
    if config.getoption("dist") != "loadscope":
        return None
    config.option.loadscopereorder = False  # it would put modules with many tests first, however short
    return LongestFirst(config, log)


@dataclass(frozen=True)
class TestBroker:
    """The tests' broker.

    Attributes:
        bootstrap: Its address (host:port).
    """

    __test__ = False

    bootstrap: str


@pytest.fixture(scope="session")
def broker_jars() -> None:
    """Skip if the broker's jars cannot be fetched; fail instead if PERENNIAL_REQUIRE_SERVICES=1."""
    try:
        java_path()
        fetch_jars()
    except BrokerError as error:
        if os.environ.get("PERENNIAL_REQUIRE_SERVICES") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestBroker]:
    """Return the broker that PERENNIAL_KAFKA names, else an embedded one. Use `topic_prefix` to keep topics apart."""
    outside = os.environ.get("PERENNIAL_KAFKA")
    if outside:
        yield TestBroker(outside)
        return
    request.getfixturevalue("broker_jars")
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if parallel else root) / "shared-broker"
    shared.mkdir(exist_ok=True)
    with _users(shared) as state:
        if not state.get("users"):
            # The controller process owns it: the worker that starts it may be the first to finish.
            embedded = EmbeddedBroker(shared / "data", owner_pid=os.getppid() if parallel else None).start()
            _started.append(embedded)
            state.update(bootstrap=embedded.bootstrap, supervisor_pid=embedded.supervisor_pid)
        state["users"] = int(state.get("users", 0)) + 1
        bootstrap = str(state["bootstrap"])
    yield TestBroker(bootstrap)
    with _users(shared) as state:
        state["users"] = int(state["users"]) - 1
        if not state["users"]:
            _stop(int(state["supervisor_pid"]))


@pytest.fixture
def topic_prefix() -> str:
    """Return a prefix for topics and groups that no other test uses."""
    return f"t{uuid.uuid4().hex[:10]}-"


@pytest.fixture
def acts(record_property: Callable[[str, object], None]) -> Iterator[Acts]:
    """Return a counter of the acts that a security test tries; `make test-security` prints the sums of all tests."""
    counted = Acts()
    yield counted
    record_property(*counted.as_property())


@contextmanager
def _users(folder: Path) -> Iterator[dict[str, object]]:
    """Read and write the state that the workers share, under a lock."""
    with (folder / "users.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        state = json.loads(file.read() or "{}")
        yield state
        file.truncate(0)
        file.write(json.dumps(state))


def _stop(supervisor_pid: int) -> None:
    for embedded in _started:
        if embedded.running and embedded.supervisor_pid == supervisor_pid:
            embedded.stop()
            return
    with suppress(ProcessLookupError):  # it is a child of another worker
        os.kill(supervisor_pid, signal.SIGTERM)
        for _ in range(200):
            os.kill(supervisor_pid, 0)
            time.sleep(0.1)
