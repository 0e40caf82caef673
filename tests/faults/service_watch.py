"""Observe what is served: the alias as the store has it, and subscribers that follow it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from perennial.storage.errors import NotFoundError, StoreError
from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.settings import Settings
from perennial.testing import MemoryBackend

LOOK_S = 0.3
_HEARS_WITHIN_S = 10.0
"""A subscriber may hear of the retirement so much later."""
_NEXT_VERSIONS = 3
"""So many versions after the retirement, a rebuilt one shows that there was something to serve."""


class ServiceWatch(threading.Thread):
    """A thread that looks a few times a second whether each adapter that was once served still is. A context manager.

    While the store does not answer, nobody can tell, and no gap is counted; a subscriber then keeps what it serves. An
    adapter whose every example was forgotten has nothing to serve until it learns the next one: no gap either.

    Args:
        registry: The adapters' versions.
        adapters: The adapters to watch.
        settings: Settings of a subscriber for each adapter; None: only the aliases are watched.

    Attributes:
        gap_s: Seconds in which an alias named nothing that can be served, or a subscriber served nothing.
        gaps: What was wrong, once for each gap, as text.
        looks: How often the thread has looked at an adapter that is served.
    """

    def __init__(self, registry: Registry, adapters: Iterable[str], settings: Settings | None = None) -> None:
        super().__init__(name="service watch", daemon=True)
        self.gap_s = 0.0
        self.gaps: list[str] = []
        self.looks = 0
        self._registry = registry
        self._adapters = tuple(adapters)
        self._settings = settings
        self._subscribers: dict[str, Subscriber] = {}
        self._ended = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._settings is not None:
            for adapter in self._adapters:
                subscriber = Subscriber(
                    adapter, MemoryBackend(None), settings=self._settings, store=self._registry.store, replica="watch"
                )
                self._subscribers[adapter] = self._stack.enter_context(subscriber)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and say the subscribers' goodbyes. Calling it again does nothing."""
        self._ended.set()
        if self.is_alive():
            self.join()
        self._stack.close()

    def run(self) -> None:
        began: dict[str, tuple[float, str]] = {}  # since when something is wrong, and what
        retired: dict[str, AliasState] = {}
        live: set[str] = set()
        while not self._ended.wait(LOOK_S):
            for adapter in self._adapters:
                self._note_retired(adapter, retired)
                for name, wrong in (
                    (adapter, self._alias_problem(adapter, live)),
                    (f"{adapter} at its subscriber", self._subscriber_problem(adapter, live)),
                ):
                    if wrong is not None:
                        began.setdefault(name, (time.monotonic(), wrong))
                    elif name in began:
                        self._count(name, *began.pop(name), retired.get(adapter))
        for name, (since_s, wrong) in began.items():
            self._count(name, since_s, wrong, retired.get(name.partition(" ")[0]))

    def _note_retired(self, adapter: str, retired: dict[str, AliasState]) -> None:
        """Remember the last state in which the adapter's alias was retired."""
        with suppress(StoreError):
            state = self._registry.alias(adapter)
            if state is not None and state.kind == "retired":
                retired[adapter] = state

    def _had_nothing_to_serve(self, retired: AliasState) -> bool:
        """Return whether no update was rebuilt after the alias was retired: then nothing was left to serve."""
        try:
            later = [
                self._registry.manifest(retired.adapter, version)
                for seq, version in self._registry.versions(retired.adapter)
                if retired.seq < seq <= retired.seq + _NEXT_VERSIONS
            ]
        except StoreError:
            return False
        return not any(manifest.kind in {"forget", "replayed"} and manifest.outcome == "promoted" for manifest in later)

    def _count(self, name: str, since_s: float, wrong: str, retired: AliasState | None) -> None:
        """Count a gap that ends now, unless the adapter had nothing to serve in it."""
        gap_s = time.monotonic() - since_s
        began_s = time.time() - gap_s - _HEARS_WITHIN_S
        if retired is not None and retired.published_at.timestamp() >= began_s and self._had_nothing_to_serve(retired):
            return
        self.gap_s += gap_s
        self.gaps.append(f"{name}: {wrong}, for {gap_s:.1f} s until {time.strftime('%H:%M:%S')}")

    def _alias_problem(self, adapter: str, live: set[str]) -> str | None:
        """Return why the adapter cannot be served now; None if it can, or if it never was."""
        try:
            state = self._registry.alias(adapter)
            if state is None:
                return f"the alias is gone: {adapter}" if adapter in live else None
            live.add(adapter)
            self.looks += 1
            if state.kind == "retired":
                return f"retired at generation {state.generation}"
            manifest = self._registry.manifest(adapter, state.version)
            problem = None
            if manifest.outcome != "promoted":
                problem = f"{state.version} is {manifest.outcome}"
            elif self._registry.is_revoked(adapter, manifest.seq):
                problem = f"{state.version} is revoked"
            elif not self._registry.store.exists(blob_key(manifest.weights.digest)):
                problem = f"{state.version} has no weights"
            if problem is not None and self._registry.alias(adapter) == state:
                return problem
        except NotFoundError as error:
            return str(error)
        except StoreError:
            return None
        return None

    def _subscriber_problem(self, adapter: str, live: set[str]) -> str | None:
        subscriber = self._subscribers.get(adapter)
        if subscriber is None:
            return None
        if subscriber.current is not None:
            live.add(f"{adapter} at its subscriber")
            return None
        return "it serves nothing" if f"{adapter} at its subscriber" in live else None


_REPLICA = """
import sys
from perennial import MemoryBackend, Settings, Subscriber
settings = Settings.model_validate_json(sys.argv[1])
Subscriber(sys.argv[2], MemoryBackend(None), settings=settings, replica=sys.argv[3]).run()
"""


def start_replica(settings: Settings, adapter: str, replica: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a subscriber as a process: SIGTERM lets it say goodbye, SIGKILL does not.

    Args:
        settings: Name the broker and the store.
        adapter: The adapter to follow.
        replica: Its name in acknowledgements.
        folder: For its log.
    """
    with (folder / f"{replica}.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", _REPLICA, settings.model_dump_json(), adapter, replica],
            cwd=Path(__file__).parents[2], env=os.environ.copy(), stdout=output, stderr=output,
        )  # fmt: skip
