"""What fault tests share: children that can be stopped and resumed, the updates topic held against the alias."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import Envelope, decode
from perennial.streams.events.models import AdapterUpdate
from perennial.streams.settings import Settings
from tests.oracle import wait_until
from tests.services import missing_service

ROOT = Path(__file__).parents[2]
SESSION_S = 6.0
"""The shortest session that a broker grants by default: what a test of a stopped process has to wait for."""

FEW_TEXTS = (
    "from perennial.learner.versions import version_writer\n"
    "from tests.faults.parts import few_texts\n"
    "version_writer.general_texts = few_texts"
)
"""For `child`: reading the standard library's texts takes seconds, and what is learned is not the point here."""

_ROLES = {
    "learner": "from perennial.streams.kafka import group as home\nfrom perennial.learner.roles.learner import run_learner as run\n"
    "home.SESSION_TIMEOUT_MS = {session_ms}\n",
    "intake": "from perennial.streams.intake import service as home\nfrom perennial.streams.intake.service import run_intake as run\n"
    "home.CONSUMER_CONFIG = {{**home.CONSUMER_CONFIG, 'session.timeout.ms': {session_ms}}}\n",
    "streams": "from perennial.streams.faust_app import run_streams as run\n",
}


def few_texts(split: str) -> list[str]:
    """General texts that cost nothing."""
    return [f"plain {split} words {number}" for number in range(8)]


@contextmanager
def child(
    role: str, settings: Settings, failpoint: str = "", more: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A role as a process of its own with a short session, killed at the end. more: code that runs before the role."""
    code = (
        "import sys, threading\n"
        "from perennial.streams.observe.metrics import Metrics\n"
        "from perennial.streams.settings import Settings\n"
        + _ROLES[role].format(session_ms=int(SESSION_S * 1000))
        + more
        + f"\nrun(Settings.model_validate_json(sys.argv[1]), threading.Event(), Metrics('{role}'))\n"
    )
    env = {**os.environ, **(environment or {}), "PERENNIAL_FAILPOINT": failpoint}
    process = subprocess.Popen([sys.executable, "-c", code, settings.model_dump_json()], cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_stopped(process: subprocess.Popen[bytes], timeout_s: float = 90) -> None:
    """Wait until the process stopped itself at its failpoint."""
    wait_until(lambda: is_stopped(process), timeout_s, f"process {process.pid} stops at its failpoint")


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process is stopped. Fails where it ended."""
    assert process.poll() is None, f"it ended with status {process.returncode}"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def read_to_end(settings: Settings, topic: str) -> list[Any]:
    """Every record of a topic, in order per partition."""
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
    """What a topic says, all of it."""
    return [decode(record.value, record.headers, topic) for record in read_to_end(settings, topic)]


def stale_publishes(settings: Settings, registry: Registry, within_s: float = 30) -> list[str]:
    """What adapter-updates says that was not true any more when it was said, or that is not what the store says.

    An event behind a later one; one generation told as two versions or under two ids; a last word that is behind
    the alias still after `within_s`: the alias moves first, by design.
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
        said = envelope.id, event.version
        if known.setdefault((*key, event.generation), said) != said:
            wrong.append(f"{event.key()}: generation {event.generation} is {said} and {known[*key, event.generation]}")
        last[key] = event
    for (adapter, alias), event in last.items():
        state = registry.alias(adapter, alias)
        if state is None or (state.generation, state.version) != (event.generation, event.version):
            wrong.append(f"{event.key()}: the last word is {event.generation}, the alias is at {state}")
    return wrong


def seconds_until(condition: Callable[[], bool], timeout_s: float, what: str, tend: Callable[[], None]) -> float:
    """How long it takes until the condition holds, with somebody to tend the processes meanwhile."""
    began = time.monotonic()

    def looked() -> bool:
        tend()
        return condition()

    wait_until(looked, timeout_s, what)
    return time.monotonic() - began


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """A file system of its own, in memory. Skips where this user may mount none."""
    folder.mkdir(parents=True)
    options = f"size={size_mib}m"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        missing_service(f"a small disk cannot be mounted: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left_bytes: int) -> Path:
    """Fill the disk up, but for so many bytes; the file that fills it."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - left_bytes))
    return ballast
