"""`python -m tests.faults.soak [--minutes 10] [--seed N] [--only 'rolling*']`: random faults under load, then the equation.

Runs a real Apache Kafka, a real MinIO, every role as a process, and a second learner, which takes over while the first
is stopped past its session. Texts are erased meanwhile. Operators roll back, add partitions, park and unpark, and restart all
roles one after another; subscribers come, leave and are killed.
After the last fault it waits for the pending work. Then every acknowledged record must have exactly one term: learned
once, skipped, refused by the gate, dead-lettered, expired or erased, rolled back, pending. A watch counts the seconds in
which an adapter could not be served. The last line is JSON; the exit code is 1 if the equation or another of the figures
does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from perennial.storage.errors import PerennialError
from perennial.streams.cli.adapters import open_registry
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.devstack.minio_server import STORE_URI, MinioServer, MinioServerError
from perennial.streams.devstack.supervisor import ROLES, Role, Supervisor, health
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from tests.faults.service_watch import ServiceWatch
from tests.faults.soak_load import ADAPTERS, Load
from tests.faults.soak_operator import Operator
from tests.faults.soak_verdict import Verdict, judge
from tests.integration.learner.learner_kit import base_folder
from tests.integration.test_exactly_once import small_settings

QUIET_S = 150.0
"""Seconds to wait for pending work after the last fault, from its last step forward on."""
MAX_WAIT_S = 900.0
"""Seconds after which the wait is not prolonged any more."""
STALL_S = 60.0
"""Pending work that takes longer is worth a look at the logs: they are then kept even if all is well."""
DRAIN_S = 120.0
"""Seconds that a role has to end after SIGTERM, and to be healthy after its start."""
_PAST_SESSION_S = 34.0
_REPORT_EVERY_S = 5.0


class Stack:
    """Broker, store, roles and a second learner.

    The thread that makes it supervises all of them.

    Args:
        folder: For data and logs.

    Attributes:
        rolling_restarts: How often all roles were restarted one after another.
    """

    def __init__(self, folder: Path) -> None:
        self.rolling_restarts = 0
        self.broker = EmbeddedBroker(folder / "kafka")
        self.minio = MinioServer(folder / "minio")
        self.supervisors: list[Supervisor] = []
        self._folder = folder
        self.settings = Settings.of()
        self.operator = Operator(self.settings, folder, self.wait)

    def start(self) -> None:
        self.broker.start()
        self.minio.start()
        os.environ.update(self.minio.environment())  # the oracle's clients read it too
        small = small_settings(self.broker.bootstrap, "soak-", STORE_URI)
        self.settings = small.replace(
            base=str(base_folder(self._folder)),
            min_gain_nats=1.5e-3,
            learning_rate=1e-3,
            poll_s=1.0,
            device="cpu",
            clock_settle_s=5.0,
            expiry_lead_s=8.0,
            replica_lease_s=9.0,
        )
        self.operator = Operator(self.settings, self._folder, self.wait)
        open_registry(self.settings).store.probe()
        provision(self.settings)
        for name, roles in (("first", ROLES), ("second", ("learner",))):
            self.supervisors.append(Supervisor(self.settings, self._folder / "logs" / name, roles))
        for supervisor in self.supervisors:
            supervisor.start()
        for supervisor in self.supervisors:
            supervisor.wait_healthy()

    def tend(self) -> None:
        for supervisor in self.supervisors:
            supervisor.tend()

    def wait(self, seconds: float) -> None:
        """Let time pass and restart the roles that end meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tend()
            time.sleep(min(0.2, max(0.0, until - time.monotonic())))

    def stop(self) -> None:
        for supervisor in self.supervisors:
            supervisor.stop()
        self.minio.stop()
        self.broker.stop()

    # ---- faults

    def kill(self, name: str, which: int = 0) -> None:
        """Kill a role with SIGKILL; `tend` restarts it."""
        role = self.supervisors[which].children[name]
        role.signal(signal.SIGKILL)
        if role.process is not None:
            role.process.wait()

    def freeze(self, name: str, seconds: float) -> None:
        """Stop a role's process and resume it later; by then another may have taken its partitions."""
        role = self.supervisors[0].children[name]
        role.signal(signal.SIGSTOP)
        try:
            self.wait(seconds)
        finally:
            role.signal(signal.SIGCONT)

    def rolling_restart(self) -> None:
        """Let each role finish what it has in hand (SIGTERM) and start it again, one after another, as an upgrade does."""
        for supervisor in self.supervisors:
            for name, role in supervisor.children.items():
                process = role.process
                if process is None:
                    continue
                role.signal(signal.SIGTERM)
                deadline = time.monotonic() + DRAIN_S
                while process.poll() is None and time.monotonic() < deadline:
                    self.wait(0.2)
                if process.poll() is None:
                    self.operator.failed.append(f"{name} did not end within {DRAIN_S:.0f} s after SIGTERM")
                    process.kill()
                    process.wait()
                if role.process is process:  # `tend` has not started it yet
                    supervisor.restart(name)
                self._wait_ready(role)
        self.rolling_restarts += 1

    def _wait_ready(self, role: Role) -> None:
        """Wait until a role answers that it is healthy; the next one is drained only then."""
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            answer = health(role.port)
            if answer and answer["ok"] and answer.get("status") != "starting":
                return
            self.wait(0.2)
        self.operator.failed.append(f"{role.name} was not healthy within {DRAIN_S:.0f} s after its restart")

    def kill_all(self) -> None:
        """Kill every role at once with SIGKILL."""
        for supervisor in self.supervisors:
            for role in supervisor.children.values():
                role.signal(signal.SIGKILL)

    def kill_broker(self, seconds: float) -> None:
        """Kill the broker with SIGKILL and start it again later on the same data and port."""
        port = self.broker.bootstrap
        self.broker.kill()
        self.wait(seconds)
        self.broker.start()
        if self.broker.bootstrap != port:
            raise RuntimeError(f"the broker came back at {self.broker.bootstrap}, not at {port}")

    def kill_minio(self, seconds: float) -> None:
        """Kill the store with SIGKILL and start it again later on the same data and port."""
        process = self.minio._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.wait(seconds)
        while not self.minio.running:
            with suppress(MinioServerError):  # the killed process may still hold the port
                self.minio.tend()
            self.wait(0.5)


def faults(stack: Stack, seed: int, only: str = "*") -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield faults without end in an order that the seed determines; every kind comes once before any comes again.

    Partitions are added once in the first and once in the second round.

    Args:
        stack: What the faults befall.
        seed: Determines the order.
        only: Pattern of the names of the faults to make.

    Raises:
        ValueError: No fault has such a name.
    """
    rng = random.Random(f"faults {seed}")
    topics = rng.sample(["adapter-jobs", "examples", "scored-examples"], 2)
    while True:
        made: list[tuple[str, Callable[[], None]]] = []
        for name in ROLES:
            made.append((f"kill {name}", lambda name=name: stack.kill(name)))  # type: ignore[misc]
            seconds = _PAST_SESSION_S if name == "learner" and rng.random() < 0.5 else rng.uniform(2, 14)
            made.append((f"stop {name} {seconds:.0f} s", lambda n=name, s=seconds: stack.freeze(n, s)))  # type: ignore[misc]
        made.append(("kill second learner", lambda: stack.kill("learner", 1)))
        made.append(("kill all roles", stack.kill_all))
        made.append(("rolling restart", stack.rolling_restart))
        for _ in range(2):
            seconds = rng.uniform(0, 10)
            made.append((f"kill broker {seconds:.0f} s", lambda s=seconds: stack.kill_broker(s)))  # type: ignore[misc]
            seconds = rng.uniform(2, 12)
            made.append((f"kill minio {seconds:.0f} s", lambda s=seconds: stack.kill_minio(s)))  # type: ignore[misc]
        made += stack.operator.acts(rng, ADAPTERS)
        if topics:
            topic = topics.pop()
            made.append((f"repartition {topic}", lambda topic=topic: stack.operator.repartition(topic)))  # type: ignore[misc]
        rng.shuffle(made)
        made = [(name, fault) for name, fault in made if fnmatch(name, only)]
        if not made:
            raise ValueError(f"no fault is called {only!r}")
        yield from made


class Watch(threading.Thread):
    """A thread that reports progress every few seconds: a bar at a terminal, else lines. Counts published versions."""

    def __init__(self, settings: Settings, load: Load, total_s: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.fault = "-"
        self.stop = threading.Event()
        self._registry = open_registry(settings)
        self._load = load
        self._total_s = total_s
        self._last: dict[str, int] = {}
        self._learned = self._seen = 0

    def run(self) -> None:
        console = Console(stderr=True)
        began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("soak", total=self._total_s)
            while not self.stop.wait(_REPORT_EVERY_S):
                with suppress(PerennialError):  # the store is down: keep the last figures
                    self._count()
                elapsed_s = time.monotonic() - began
                acknowledged = len(self._load.acked)
                line = (
                    f"acknowledged {acknowledged}, learned {self._learned}, "
                    f"pending about {max(0, self._load.expected_open() - self._seen)}, fault: {self.fault}"
                )
                progress.update(task, completed=min(elapsed_s, self._total_s), description=line)
                if not console.is_terminal:
                    print(f"{elapsed_s:5.0f} s  {line}", flush=True)

    def _count(self) -> None:
        for adapter in ADAPTERS:
            head = self._registry.head(adapter)
            before = self._last.get(adapter, 0)
            if head is None or head.seq == before:
                continue
            for _, version in self._registry.versions(adapter, limit=head.seq - before):
                manifest = self._registry.manifest(adapter, version)
                if manifest.kind == "update":
                    self._learned += len(manifest.learned)
                    self._seen += len(manifest.learned) + sum(s.reason != "duplicate" for s in manifest.skipped)
            self._last[adapter] = head.seq


def soak(minutes: float, seed: int, folder: Path, only: str = "*") -> Verdict:
    """Run the soak in a folder.

    Args:
        minutes: Minutes of faults.
        seed: Determines the order of faults and load.
        folder: For data and logs.
        only: Pattern of the names of the faults to make.

    Raises:
        RuntimeError: The soak itself cannot go on.
    """
    stack = Stack(folder)
    made: list[str] = []
    cleanup = ExitStack()
    try:
        stack.start()
        load = Load(stack.settings, seed, folder)
        watch = Watch(stack.settings, load, minutes * 60)
        service = cleanup.enter_context(ServiceWatch(open_registry(stack.settings), ADAPTERS, stack.settings))
        load.start()
        watch.start()
        rng = random.Random(f"pauses {seed}")
        until = time.monotonic() + minutes * 60
        stack.wait(min(5.0, minutes * 6))
        for name, fault in faults(stack, seed, only):
            if time.monotonic() > until or load.failure:
                break
            watch.fault = name
            fault()
            made.append(name)
            watch.fault = f"- (last: {name})"
            stack.wait(rng.uniform(0.5, 8))
        watch.fault = f"none any more, after {len(made)}"
        load.stop.set()
        while load.is_alive():
            stack.wait(0.5)
        if load.failure:
            raise RuntimeError("the load ended") from load.failure
        verdict = _when_quiet(stack, load, service)
        watch.stop.set()
        watch.join()
    finally:
        for supervisor in stack.supervisors:
            for role in supervisor.children.values():
                role.signal(signal.SIGCONT)
        cleanup.close()
        stack.stop()
    for line in stack.operator.done:
        print(f"operator: {line}", flush=True)
    verdict.figures |= {
        "seed": seed, "minutes": minutes, "faults": len(made), "rolling_restarts": stack.rolling_restarts,
    }  # fmt: skip
    return verdict


def _rebuilt_steps(settings: Settings) -> int:
    """Return how many updates the rebuilds that are under way have trained."""
    return sum(1 for _ in open_registry(settings).store.list("rebuilds/"))


def _when_quiet(stack: Stack, load: Load, service: ServiceWatch) -> Verdict:
    """Judge when all work is done, and once more a little later, when a second learning would show.

    On a machine that other programs keep busy the work takes longer: the wait ends QUIET_S after the last step forward.
    """
    began = moved = time.monotonic()
    last: tuple[dict[str, int], int] | None = None
    settled = False
    while True:
        verdict = None
        failure: Exception | None = None
        try:
            verdict = judge(stack.settings, load, service, stack.operator.failed)
        except PerennialError as error:  # the adapter changed while it was read
            failure = error
        if verdict is not None and not verdict.unsettled:
            if settled:
                break
            settled = True
        else:
            settled = False
            # A rebuild of hundreds of updates shows in the store alone until it is published.
            seen = None if verdict is None else (verdict.terms, _rebuilt_steps(stack.settings))
            if seen is not None and seen != last:
                moved, last = time.monotonic(), seen
            if time.monotonic() - min(moved, began + MAX_WAIT_S) > QUIET_S:
                if verdict is None:
                    raise RuntimeError("the store cannot be read") from failure
                break
        stack.wait(3)
    verdict.figures["quiet_s"] = round(time.monotonic() - began, 1)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of faults")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**6), help="determines the order of faults and load"
    )
    parser.add_argument("--only", default="*", help="pattern of the faults to make, for example 'rolling*'")
    parser.add_argument("--keep", action="store_true", help="keep logs and data even if all is well")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left over
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with SIGINT ignored
    folder = Path(tempfile.mkdtemp(prefix="perennial-soak-"))
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes, logs and data in {folder}", flush=True)
    try:
        verdict = soak(arguments.minutes, arguments.seed, folder, arguments.only)
    except PerennialError as error:  # no MinIO, no Java: there is nothing to judge
        print(f"the soak could not run: {error}", file=sys.stderr)
        return error.exit_code
    for line in verdict.lines():
        print(line)
    stalled = verdict.figures["quiet_s"] > STALL_S
    if verdict.holds and not arguments.keep and not stalled:
        shutil.rmtree(folder, ignore_errors=True)
    elif verdict.holds and stalled:
        print(
            f"pending work took {verdict.figures['quiet_s']:.0f} s after the last fault; logs and data are kept in {folder}"
        )
    elif not verdict.holds:
        print(f"the verdict does not hold; logs and data are kept in {folder}")
    print(json.dumps(verdict.figures))
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
