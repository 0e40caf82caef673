"""What operators do while the soak runs, by the commands that they use: roll back, repartition, park, mend, unpark."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from perennial.learner.versions.job_order import waiting_jobs
from perennial.storage.errors import StoreError
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.parked import load_parked
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.kafka.installation import load_installation
from perennial.streams.settings import Settings
from tests.faults.service_watch import start_replica

ROOT = Path(__file__).parents[2]
COMMAND_S = 240.0
_LEGITIMATE = ("no version was live before", "the version was revoked", "the version was never live")
"""Refusals that say something true about an adapter whose versions are forgotten at the same time."""


class Operator:
    """Runs commands on a stack under load.

    Args:
        settings: Name the broker and the store.
        folder: For logs.
        wait: Lets so many seconds pass and restarts the roles that end meanwhile.

    Attributes:
        failed: The commands that failed, with what they said.
        done: What was done, as text.
    """

    def __init__(self, settings: Settings, folder: Path, wait: Callable[[float], None]) -> None:
        self.failed: list[str] = []
        self.done: list[str] = []
        self._settings = settings
        self._folder = folder
        self._wait = wait
        self._replicas = 0

    def command(self, *arguments: str, allowed: tuple[str, ...] = (), attempts: int = 1) -> str:
        """Run `perennial ...` while the roles go on, and return what it printed.

        Args:
            arguments: The command's arguments.
            allowed: A failure that says one of these is none.
            attempts: How often it is tried: an operator runs a command again that says so.
        """
        text = ""
        for attempt in range(attempts):
            process = subprocess.Popen(
                [sys.executable, "-m", "perennial.streams.cli", *arguments], cwd=ROOT, text=True,
                env={**os.environ, **self._settings.environment()}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            deadline = time.monotonic() + COMMAND_S
            while process.poll() is None and time.monotonic() < deadline:
                self._wait(0.2)
            if process.poll() is None:
                process.kill()
            text, _ = process.communicate()
            told = f"{' '.join(arguments)}: status {process.returncode}: {' '.join(text.split())[-600:]}"
            self.done.append(told)
            if process.returncode == 0 or any(each in text for each in allowed):
                return text
            if attempt == attempts - 1:
                self.failed.append(told)
        return text

    def roll_back(self, adapter: str) -> None:
        """Make the version live that was live before."""
        if self._registry().alias(adapter) is not None:
            self.command("adapters", "rollback", adapter, "--reason", "soak", allowed=_LEGITIMATE, attempts=2)

    def repartition(self, topic: str) -> None:
        """Add a partition to an internal topic under load."""
        record = load_installation(self._registry().store)
        if record is not None:
            wanted = str(record.topics[topic].partitions + 1)
            self.command("topics", "repartition", topic, "--partitions", wanted, "--yes", "--wait-s", "150", attempts=2)

    def damage_and_mend(self, adapter: str) -> None:
        """Park an adapter, flip a bit in a micro-batch that waits, unpark, and mend it where that parks the adapter again."""
        store = self._registry().store
        self.command("adapters", "park", adapter)
        deadline = time.monotonic() + 15
        while not (waiting := list(waiting_jobs(store, adapter))) and time.monotonic() < deadline:
            self._wait(0.5)
        if waiting:
            key = blob_key(waiting[0].batch.digest)
            try:
                good = store.get(key)
                broken = store.compare_and_swap(key, bytes([good.data[0] ^ 1]) + good.data[1:], good.etag)
            except StoreError:  # an erasure has rewritten the micro-batch
                waiting = []
        self.command(
            "adapters", "unpark", adapter, "--wait-s", "20", allowed=("parked again", "none of them was tried")
        )
        if waiting:
            deadline = time.monotonic() + 20
            while load_parked(store, adapter) is None and store.exists(key) and time.monotonic() < deadline:
                self._wait(0.5)
            with suppress(StoreError):  # an erasure has deleted it meanwhile
                store.compare_and_swap(key, good.data, broken)
            self.command("adapters", "unpark", adapter, "--wait-s", "30", allowed=("none of them was tried",))

    def replica(self, adapter: str, number: int) -> None:
        """Let a subscriber come, serve for a while, and end by a signal: by SIGKILL it never says goodbye."""
        self._replicas += 1
        process = start_replica(self._settings, adapter, f"replica-{self._replicas}", self._folder)
        self._wait(10)
        if process.poll() is not None:
            self.failed.append(f"replica-{self._replicas} ended by itself with status {process.returncode}")
        process.send_signal(number)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            self._wait(0.2)
        if process.poll() is None:
            self.failed.append(f"replica-{self._replicas} did not end by signal {number}")
            process.kill()
        process.wait()

    def acts(self, rng: random.Random, adapters: tuple[str, ...]) -> list[tuple[str, Callable[[], None]]]:
        """Return the acts of one round by name."""
        chosen = [rng.choice(adapters) for _ in range(4)]
        return [
            (f"rollback {chosen[0]}", lambda: self.roll_back(chosen[0])),
            (f"rollback {chosen[1]}", lambda: self.roll_back(chosen[1])),
            (f"park and mend {chosen[2]}", lambda: self.damage_and_mend(chosen[2])),
            (f"subscriber of {chosen[3]} gone", lambda: self.replica(chosen[3], signal.SIGKILL)),
            (f"subscriber of {chosen[0]} leaves", lambda: self.replica(chosen[0], signal.SIGTERM)),
        ]

    def _registry(self) -> Registry:
        return open_registry(self._settings)
