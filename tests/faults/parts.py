"""Parts that fault tests share: roles as child processes with failpoints, and checks of published events."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.storage.registry.registry import Registry
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import Envelope, decode
from perennial.streams.settings import Settings
from tests.oracle import wait_until
from tests.services import missing_service

ROOT = Path(__file__).parents[2]
SESSION_S = 6.0
"""Session of consumer groups, in seconds: the shortest that a broker allows by default. Tests wait for its end."""

FEW_TEXTS = (
    "from perennial.learner.versions import version_writer\n"
    "from tests.faults.parts import few_texts\n"
    "version_writer.general_texts = few_texts"
)
"""For `child`: replaces the general texts, which take seconds to read and do not matter here."""

_COUNT_TRAINED = """
from perennial.learner.training.update import Updater as _Updater
_update = _Updater.update
def _counted(self, *arguments, **more):
    with open({path!r}, "a") as _file:
        _file.write(str(more["cut"]) + "\\n")
    return _update(self, *arguments, **more)
_Updater.update = _counted
"""

_ROLES = {
    "learner": "from perennial.streams.kafka import group as home\nfrom perennial.learner.roles.learner import run_learner as run\n"
    "home.SESSION_TIMEOUT_MS = {session_ms}\n",
    "intake": "from perennial.streams.intake import input_consumer as home\nfrom perennial.streams.intake.service import run_intake as run\n"
    "home.CONSUMER_CONFIG = {{**home.CONSUMER_CONFIG, 'session.timeout.ms': {session_ms}}}\n",
    "streams": "from perennial.streams.faust_app import run_streams as run\n",
    "scorer": "from perennial.streams.kafka import group as home\nfrom perennial.learner.roles.scorer import run_scorer as run\n"
    "home.SESSION_TIMEOUT_MS = {session_ms}\n",
}


def few_texts(split: str) -> list[str]:
    """Return a few general texts, in place of those that take seconds to read."""
    return [f"plain {split} words {number}" for number in range(8)]


def count_trained(path: Path) -> str:
    """Return code for `child` that appends the cut of every update that is trained to a file, a line each."""
    return _COUNT_TRAINED.format(path=str(path))


@contextmanager
def child(
    role: str, settings: Settings, failpoint: str = "", more: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a role as a child process with a short session; it is killed at the end.

    Args:
        role: `learner`, `scorer`, `intake` or `streams`. SIGTERM lets it finish what it has begun.
        settings: Its settings.
        failpoint: Where it is killed or stopped, as in PERENNIAL_FAILPOINT.
        more: Python code to run before the role.
        environment: More environment variables.
    """
    code = (
        "import faulthandler, logging, signal, sys\n"
        "faulthandler.register(signal.SIGUSR2)\n"
        "logging.basicConfig(level=logging.INFO, format='%(asctime)s %(name)s %(message)s')\n"
        "from perennial.streams.observe.metrics import Metrics\n"
        "from perennial.streams.settings import Settings\n"
        + _ROLES[role].format(session_ms=int(SESSION_S * 1000))
        + more
        + "\nfrom perennial.streams.devstack.signals import event_on_stop_signals\n"
        + "with event_on_stop_signals() as stop:\n"
        + f"    run(Settings.model_validate_json(sys.argv[1]), stop, Metrics('{role}'))\n"
    )
    env = {**os.environ, **(environment or {}), "PERENNIAL_FAILPOINT": failpoint}
    process = subprocess.Popen([sys.executable, "-c", code, settings.model_dump_json()], cwd=ROOT, env=env)
    try:
        yield process
    except BaseException:
        if process.poll() is None:  # print where it stands, for the report of the failed test
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGUSR2)
            time.sleep(1)
        raise
    finally:
        process.kill()
        process.wait()


def wait_stopped(process: subprocess.Popen[bytes], timeout_s: float = 180) -> None:
    """Wait until the process has stopped itself at its failpoint."""
    wait_until(lambda: is_stopped(process), timeout_s, f"process {process.pid} stops at its failpoint")


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the process is stopped; fail if it has ended."""
    assert process.poll() is None, f"it ended with status {process.returncode}"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def read_to_end(settings: Settings, topic: str) -> list[Any]:
    """Return every record of a topic, in order within each partition."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka.bootstrap, enable_auto_commit=False)
    try:
        name = settings.kafka.topic(topic)
        partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        found: list[Any] = []
        while any(consumer.position(each) < ends[each] for each in partitions):
            for batch in consumer.poll(timeout_ms=200).values():
                found += batch
        return found
    finally:
        consumer.close()


def envelopes(settings: Settings, topic: str) -> list[Envelope]:
    """Return every event of a topic."""
    return [decode(record.value, record.headers, topic) for record in read_to_end(settings, topic)]


def stale_publishes(settings: Settings, registry: Registry, within_s: float = 60) -> list[str]:
    """Return what is wrong in adapter-updates, as text.

    Wrong is an event that follows one of a later generation; a generation that was published with two versions or under
    two ids; and a last event that differs from the alias. The alias moves first, so the last event gets some time.

    Args:
        settings: Names the broker.
        registry: The adapters' aliases.
        within_s: Seconds until the last event must agree with the alias.
    """
    deadline = time.monotonic() + within_s
    while (wrong := _stale_now(settings, registry)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return wrong


def _stale_now(settings: Settings, registry: Registry) -> list[str]:
    wrong: list[str] = []
    last: dict[tuple[str, str], AdapterUpdate] = {}
    known: dict[tuple[str, str, int], tuple[str, str]] = {}
    for envelope in envelopes(settings, "adapter-updates"):
        event = envelope.event
        assert isinstance(event, AdapterUpdate)
        key = event.adapter, event.alias
        if key in last and event.generation < last[key].generation:
            wrong.append(f"{event.key()}: generation {event.generation} after {last[key].generation}")
        published = envelope.id, event.version
        first = known.setdefault((*key, event.generation), published)
        if first != published:
            wrong.append(f"{event.key()}: generation {event.generation} is {published} and {first}")
        last[key] = event
    for (adapter, alias), event in last.items():
        state = registry.alias(adapter, alias)
        if state is None or (state.generation, state.version) != (event.generation, event.version):
            wrong.append(f"{event.key()}: the last event is {event.generation}, the alias is at {state}")
    return wrong


def seconds_until(condition: Callable[[], bool], timeout_s: float, what: str, tend: Callable[[], None]) -> float:
    """Wait until the condition holds and return the seconds it took.

    Args:
        condition: Called every now and then.
        timeout_s: Seconds to wait.
        what: Names the condition in the error.
        tend: Called before the condition, to restart processes that ended.

    Raises:
        TimeoutError: The condition does not hold in time.
    """
    began = time.monotonic()

    def tended() -> bool:
        tend()
        return condition()

    wait_until(tended, timeout_s, what)
    return time.monotonic() - began


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """Mount a small file system in memory. Skips the test if this user may not mount."""
    folder.mkdir(parents=True)
    options = f"size={size_mib}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        missing_service(f"a small disk cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left_bytes: int) -> Path:
    """Fill a disk up to so many free bytes and return the file that fills it."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - left_bytes))
    return ballast
