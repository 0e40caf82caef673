"""The maintenance record: a command asks roles on any machine to pause, and they show that they do.

The object `installation/maintenance` names the topic that is being repartitioned and the roles that write it. Each
process of these roles ends its work, leaves its consumer group and waits; so the command sees by the group's members
that none of them writes any more. The command replaces the record every few seconds. A role that has seen the same
record for LEASE_S takes the command for dead, ends the record by compare-and-swap, and goes on; the command's next
compare-and-swap then fails, and it alters nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, PerennialError, StoreError
from perennial.storage.objects.object_store import ObjectStore

log = logging.getLogger("perennial.kafka")

KEY: Final = "installation/maintenance"
MAX_BYTES: Final = 64 * 1024
LEASE_S: Final = 60.0
POLL_S: Final = 2.0


class MaintenanceError(PerennialError):
    """A topic is being repartitioned."""


class Maintenance(BaseModel):
    """The object `installation/maintenance`.

    Attributes:
        id: Distinguishes one run of the command from another.
        topic: The topic that is being repartitioned, without the prefix.
        partitions: The partition count that it will have.
        roles: The roles that must pause: those that write the topic.
        beat: How often the command has renewed the record.
        ended: True where the command has finished, was given up, or was taken for dead.
        started_at: When the command began.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    topic: str
    partitions: int
    roles: tuple[str, ...]
    beat: int = 0
    ended: bool = False
    started_at: AwareDatetime


def load_maintenance(store: ObjectStore) -> tuple[Maintenance | None, str | None]:
    """Return the maintenance record and its etag; None and None where there never was one.

    Raises:
        IntegrityError: The object cannot be read as a maintenance record.
        StoreError: The store does not answer.
    """
    try:
        stored = store.get(KEY, MAX_BYTES)
    except NotFoundError:
        return None, None
    try:
        return Maintenance.model_validate_json(stored.data), stored.etag
    except ValidationError as error:
        raise IntegrityError(
            f"{KEY} is not readable", got=stored.data[:100], allowed="the record of `perennial topics repartition`",
            remedy="delete the object while no such command runs",
        ) from error  # fmt: skip


def allowed_counts(store: ObjectStore) -> dict[str, int]:
    """Return the partition count that a running command will record, by topic; empty where none runs."""
    found, _ = load_maintenance(store)
    return {} if found is None or found.ended else {found.topic: found.partitions}


class MaintenanceLease:
    """The side of the command: one run that roles wait for. A context manager that ends the record.

    Args:
        store: The object store.
        topic: The topic that is being repartitioned, without the prefix.
        partitions: The partition count that it will have.
        roles: The roles that must pause.

    Raises:
        MaintenanceError: Another run is under way.
        StoreError: The store does not answer.
    """

    def __init__(self, store: ObjectStore, topic: str, partitions: int, roles: tuple[str, ...]) -> None:
        self._store = store
        found, etag = load_maintenance(store)
        if found is not None and not found.ended:
            raise MaintenanceError(
                "another command repartitions a topic", got=f"{found.topic}, since {found.started_at:%Y-%m-%d %H:%M:%S %Z}",
                remedy=f"wait for it; if it died, roles that wait for it go on after {LEASE_S:g} s; where none of them "
                "runs, start one and run this command again",
            )  # fmt: skip
        self._record = Maintenance(
            id=uuid4().hex, topic=topic, partitions=partitions, roles=roles, started_at=datetime.now(UTC)
        )
        try:
            self._etag = store.compare_and_swap(KEY, self._record.model_dump_json().encode(), etag)
        except ConflictError as error:
            raise MaintenanceError("another command began at the same moment", remedy="wait for it") from error

    def renew(self) -> None:
        """Tell the roles that the command is alive.

        Raises:
            MaintenanceError: A role took the command for dead, so roles may be writing again.
            StoreError: The store does not answer.
        """
        self._replace(self._record.model_copy(update={"beat": self._record.beat + 1}))

    def end(self) -> None:
        """Let the roles go on. A record that a role has ended stays as it is."""
        try:
            self._replace(self._record.model_copy(update={"ended": True}))
        except MaintenanceError:
            log.warning("a role took this command for dead, and ended its maintenance record")

    def _replace(self, record: Maintenance) -> None:
        try:
            self._etag = self._store.compare_and_swap(KEY, record.model_dump_json().encode(), self._etag)
        except ConflictError as error:
            raise MaintenanceError(
                "the roles went on, because this command did not renew its record in time",
                allowed=f"a renewal every {LEASE_S:g} s", remedy="run the command again; nothing is lost",
            ) from error  # fmt: skip
        self._record = record


class MaintenanceWatch:
    """The side of a role: says whether the role must pause.

    Args:
        store: The object store.
        role: The role's name.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, store: ObjectStore, role: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._role = role
        self._clock = clock
        self._seen: tuple[str, float] | None = None  # etag of the record, and when it was seen first

    def paused(self) -> bool:
        """Return whether the role must not write now.

        Raises:
            StoreError: The store does not answer.
        """
        found, etag = load_maintenance(self._store)
        if found is None or etag is None or found.ended or self._role not in found.roles:
            self._seen = None
            return False
        if self._seen is None or self._seen[0] != etag:
            self._seen = (etag, self._clock())
        if self._clock() - self._seen[1] < LEASE_S:
            return True
        log.warning("the command that repartitions %s has not renewed its record: going on", found.topic)
        try:
            self._store.compare_and_swap(KEY, found.model_copy(update={"ended": True}).model_dump_json().encode(), etag)
        except ConflictError:
            return True  # it is alive after all
        return False


class Verifier(Protocol):
    """The check that runs every `verify_s` while a role runs; `topic_guard.TopicGuard` has it."""

    def verify(self) -> None:
        """Raise where a topic is not the recorded one."""

    def close(self) -> None:
        """Close the connection."""


class MaintenanceMetrics(Protocol):
    """What the role's health is notified of; `observe.metrics.Metrics` has it."""

    def maintenance(self, paused: bool) -> None:
        """Note whether the role pauses for a command."""


def run_pausable(
    role: str,
    store: ObjectStore,
    stop: threading.Event,
    metrics: MaintenanceMetrics,
    body: Callable[[threading.Event], None],
    make_verifier: Callable[[], Verifier],
    verify_s: float = 30.0,
) -> None:
    """Run a role; end it while a command asks it to pause, and when its topics are no longer the recorded ones.

    Args:
        role: The role's name.
        store: The object store.
        stop: Ends the role.
        metrics: Is notified when the role pauses.
        body: Runs the role until the event that it is given is set. It is called again after a pause.
        make_verifier: Returns the check of the role's topics.
        verify_s: Seconds between two checks.

    Raises:
        PerennialError: The body failed, or a topic is not the recorded one any more.
        StoreError: The store does not answer at the start.
    """
    watch = MaintenanceWatch(store, role)
    while not stop.is_set():
        if watch.paused():
            log.info("%s pauses: a topic is being repartitioned", role)
            metrics.maintenance(True)
            while not stop.wait(POLL_S / 2) and _paused(watch, unknown=True):
                pass
            metrics.maintenance(False)
            log.info("%s goes on", role)
            continue
        supervision = _Supervision(watch, stop, make_verifier, verify_s)
        supervision.start()
        try:
            body(supervision.inner)
        finally:
            supervision.finish()
        if supervision.failure is not None:
            raise supervision.failure
        if not supervision.pausing:
            return


def _paused(watch: MaintenanceWatch, *, unknown: bool) -> bool:
    """Return whether the role must pause; `unknown` where the store does not answer.

    A role that goes on meanwhile stays a member of its group, so the command waits for it.
    """
    try:
        return watch.paused()
    except StoreError as error:
        log.debug("the maintenance record cannot be read now: %s", error)
        return unknown


class _Supervision:
    """A thread that sets `inner` when the role is to end: stopped, to pause, or reading a topic that was replaced."""

    def __init__(
        self, watch: MaintenanceWatch, stop: threading.Event, make_verifier: Callable[[], Verifier], verify_s: float
    ) -> None:
        self.inner = threading.Event()
        self.failure: PerennialError | None = None
        self.pausing = False
        self._watch = watch
        self._stop = stop
        self._make_verifier = make_verifier
        self._verify_s = verify_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervision", daemon=True)
        self._ticker = threading.Thread(target=self._pass_stop_on, name="stop", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ticker.start()

    def finish(self) -> None:
        self._done.set()
        self._ticker.join()
        self._thread.join(5)

    def _pass_stop_on(self) -> None:
        while not self._done.is_set():
            if self._stop.wait(0.1):
                self.inner.set()
                return

    def _run(self) -> None:
        verifier: Verifier | None = None
        due = time.monotonic() + self._verify_s
        try:
            while not self._done.wait(POLL_S):
                if _paused(self._watch, unknown=False):
                    self.pausing = True
                    self.inner.set()
                    return
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + self._verify_s
                try:
                    verifier = verifier or self._make_verifier()
                    verifier.verify()
                except PerennialError as error:
                    if error.exit_code == 3 or isinstance(error, StoreError):  # a service is away: the role notices
                        continue
                    self.failure = error
                    self.inner.set()
                    return
        finally:
            if verifier is not None:
                verifier.close()
