"""`Subscriber` follows one alias and keeps a backend serving the version that the alias names.

This module decides when a version is fetched, checked, activated, retried and acknowledged; `subscriber_state` holds
the state machine. How a version is served is the backend's business. The alias in the object store is the truth. An
event on `adapter-updates` only says when to look at it, so a lost, late, repeated or forged event changes nothing but
the time of the next look.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Self
from uuid import uuid4

from perennial.storage.errors import IntegrityError, PerennialError, StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.client.backend import Backend, Current, Deactivates
from perennial.streams.client.subscriber_kafka import Acks, Updates
from perennial.streams.client.subscriber_state import Progress, RetryPolicy, State
from perennial.streams.events.adapter_events import AdapterActivated, AdapterFailed
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, load_settings

_log = logging.getLogger("perennial.subscriber")

MAX_WEIGHTS_BYTES = 2 * 1024**3
RETRY = RetryPolicy(max_attempts=5, first_s=0.2)
_TICK_S = 0.2
_MAX_ERROR_CHARS = 1000


class SubscriberError(PerennialError):
    """A version cannot be served here."""


OnActivate = Callable[[AliasState, Mapping[str, float]], None]


class Subscriber:
    """Follows the alias of one adapter and keeps a backend serving the version that the alias names.

    A subscriber hears of changes from the compacted topic `adapter-updates` and polls the alias too, every
    `settings.serving.poll_s` seconds. Without a broker it only polls, and acknowledges nothing. It applies only higher
    generations of the alias. Use it in a `with` block, or call `run` in a thread of your own. Thread-safe.

    >>> import tempfile
    >>> from perennial import MemoryBackend, Settings, Subscriber
    >>> from perennial.testing import publish_version
    >>> store, settings = tempfile.TemporaryDirectory(), Settings.of(poll_s=0.05, kafka="")
    >>> backend = MemoryBackend()
    >>> with Subscriber("acme/support", backend, store=store.name, settings=settings) as subscriber:
    ...     version = publish_version(store.name, "acme/support")  # a learner does this
    ...     subscriber.wait_for(generation=1, timeout_s=30)
    True
    >>> backend.active == subscriber.name_of(version)
    True
    >>> store.cleanup()

    Args:
        adapter: Name of the adapter, for example `acme/support`.
        backend: What serves the versions.
        kafka: Bootstrap servers, `host:port[,host:port]`. Default: PERENNIAL_KAFKA.
        store: The object store or its address. Default: PERENNIAL_STORE.
        settings: Settings to use instead of those of the environment.
        alias: The alias to follow. Default: `settings.serving.alias`.
        replica: Name of this subscriber in acknowledgements, up to 256 characters. Default: host name and process id.
        metrics: Where to count. Default: a registry of its own.
        on_activate: Called as `on_activate(state, stage_s)` after a version is served; `stage_s` has the seconds of
            each stage: fetch, verify, load, warm, activate, publish_to_served. What it raises is logged and ignored.
        drain_s: Longest time that one look at the alias waits for requests that still use the previous version, in
            seconds. The next look waits again.
        clock: Monotonic clock in seconds.
        now: The wall clock.

    Raises:
        SettingsError: No store is set.
        SubscriberError: `replica` is not a printable name.
    """

    def __init__(
        self,
        adapter: str,
        backend: Backend,
        *,
        kafka: str | None = None,
        store: str | ObjectStore | None = None,
        settings: Settings | None = None,
        alias: str | None = None,
        replica: str | None = None,
        metrics: Metrics | None = None,
        on_activate: OnActivate | None = None,
        drain_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.settings = settings or load_settings()
        self.adapter = adapter
        self.alias = alias or self.settings.serving.alias
        self.replica = replica or f"{socket.gethostname()}-{os.getpid()}"[:256]
        if not 0 < len(self.replica) <= 256 or not self.replica.isprintable():
            raise SubscriberError("not a replica's name", got=self.replica, allowed="1 to 256 printable characters")
        self._backend = backend
        self._metrics = metrics or Metrics("subscriber", self.settings)
        self._on_activate = on_activate
        self._drain_s = drain_s
        self._clock = clock
        self._now = now
        if store is None or isinstance(store, str):
            store = open_store(store or self.settings.store.require_uri(), self.settings.s3)
        self._store = store
        self._registry = Registry(store, nonce=lambda: uuid4().hex, now=now)
        bootstrap = kafka or self.settings.kafka.bootstrap
        owner = f"{adapter}#{self.alias}"
        self._prefix = f"{adapter if self.alias == 'live' else owner}@"
        self._updates = Updates(bootstrap, self.settings.kafka.topic("adapter-updates"), owner, self._metrics)
        self._acks = Acks(bootstrap, self.settings.kafka.topic, now)

        self._changed = threading.Condition()
        self._current: Current | None = None
        self._progress = Progress()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def current(self) -> Current | None:
        """The version that is served now. None before the first version and after the adapter was retired."""
        with self._changed:
            return self._current

    @property
    def generation(self) -> int:
        """The generation of the alias that was applied last. 0 before the first one."""
        with self._changed:
            return self._progress.served

    def wait_for(self, generation: int, timeout_s: float) -> bool:
        """Wait until a generation, or a later one, is applied.

        Args:
            generation: Generation of the alias.
            timeout_s: Longest wait in seconds.

        Returns:
            False if it was not applied in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._progress.served >= generation, timeout_s)

    def name_of(self, version: str) -> str:
        """Return the backend's name of a version.

        Args:
            version: Digest of the version's manifest, `sha256:<64 hex>`.

        Returns:
            `<adapter>@<64 hex>`, or `<adapter>#<alias>@<64 hex>` for another alias than `live`.
        """
        return f"{self._prefix}{version.removeprefix('sha256:')}"

    def run(self, stop: threading.Event | None = None) -> None:
        """Follow the alias in this thread.

        Args:
            stop: Ends the call when it is set. None: `close` ends the call.
        """
        stop = stop or self._stop
        try:
            while not stop.is_set():
                if self._clock() >= self._progress.due_s:
                    self._look()
                self._acks.tick(self._clock())
                wait_s = max(0.0, min(_TICK_S, self._progress.due_s - self._clock()))
                self._progress = self._progress.heard(self._updates.poll(wait_s, self._clock(), stop))
        finally:
            self._updates.close()
            self._acks.close()

    def start(self) -> Self:
        """Follow the alias in a new thread until `close`.

        Raises:
            SubscriberError: The subscriber was started before.
        """
        if self._thread is not None:
            raise SubscriberError("the subscriber was started before", remedy="make a new one")
        self._thread = threading.Thread(target=self._run_in_thread, name=f"subscriber {self.adapter}", daemon=True)
        self._thread.start()
        return self

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error
            _log.exception("the subscriber of %s ended", self.adapter)
            raise

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop following the alias. The backend goes on serving the version that it has.

        Args:
            timeout_s: Longest wait for the thread to end, in seconds.

        Raises:
            SubscriberError: An error had ended the thread, or the thread did not end in time.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive() or self._error is not None:
                raise SubscriberError(
                    f"the subscriber of {self.adapter} did not end well",
                    got=repr(self._error) if self._error else f"still busy after {timeout_s:g} s",
                    remedy="see its log",
                ) from self._error

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        """Read the alias, do what its state asks for, and set the time of the next look."""
        self._progress = self._progress.looking(self._clock() + self.settings.serving.poll_s)
        try:
            alias = self._registry.alias(self.adapter, self.alias)
        except StoreError as error:
            self._metrics.store_error("alias")
            self._progress = self._progress.unreadable()
            self._retry_look(error)
            return
        if self._progress.leftovers:
            self._unload_leftovers()
        self._progress = self._progress.saw(alias.generation if alias else 0)
        if alias is not None and self._progress.state is State.BEHIND:
            self._metrics.waiting(True)
            self._apply(alias)
        elif self._progress.state is State.EXPECTING:
            self._retry_look(None)
        elif self._progress.state is State.FOLLOWING:
            self._metrics.waiting(False)

    def _apply(self, alias: AliasState) -> None:
        """Serve the version that the alias names, or nothing if the adapter is retired, and acknowledge it."""
        stage_s: dict[str, float] = {}
        try:
            current = None if alias.kind == "retired" else self._serve(alias, stage_s)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything; it is reported as adapter.failed
            self._retry_version(alias, error, stage_s)
            return
        ack = AdapterActivated(
            adapter=self.adapter, alias=self.alias, replica=self.replica, generation=alias.generation,
            version=alias.version, stage_s=stage_s, published_at=alias.published_at, at=self._now(),
        )  # fmt: skip
        with self._changed:
            self._current = current
            self._progress = self._progress.applied(alias.generation, ack)
            self._changed.notify_all()
        self._metrics.generation(self.adapter, alias.generation)
        self._metrics.progress()
        self._metrics.waiting(False)
        if alias.kind not in {
            "revoked",
            "retired",
        }:  # those count as applied only when the previous version is unloaded
            self._acknowledge()
        if self._on_activate is not None and current is not None:
            try:
                self._on_activate(alias, stage_s)
            except Exception:  # noqa: BLE001 - the user's code may raise anything; the version is served all the same
                _log.exception("%s: on_activate failed; the version is served", self.adapter)
        self._unload_leftovers()

    def _serve(self, alias: AliasState, stage_s: dict[str, float]) -> Current:
        name = self.name_of(alias.version)
        with self._timed("fetch", stage_s):
            manifest = self._manifest(alias)
        if self._current is None or self._current.version != alias.version:
            with self._timed("fetch", stage_s):
                weights = self._fetch(manifest)
            with self._timed("verify", stage_s):
                self._verify(manifest, weights)
            try:
                with self._timed("load", stage_s):
                    self._backend.load(name, weights, manifest)
                with self._timed("warm", stage_s):
                    self._backend.warm(name)
                with self._timed("activate", stage_s):
                    self._backend.activate(name)
            except Exception:
                with suppress(Exception):  # the first error is reported; the previous version is still active
                    self._backend.unload(name)
                raise
        stage_s["publish_to_served"] = max(0.0, (self._now() - alias.published_at).total_seconds())
        return Current(alias.version, alias.generation, name, manifest)

    def _manifest(self, alias: AliasState) -> Manifest:
        manifest = self._registry.manifest(self.adapter, alias.version)
        if self._registry.is_revoked(self.adapter, manifest.seq):
            raise StoreError(
                f"{alias.version} is revoked and still live",
                remedy=f"make another version live: `perennial adapters rollback {self.adapter}`",
            )
        base_sha256 = self._backend.base_sha256
        if base_sha256 is not None and base_sha256 != manifest.base_sha256:
            raise SubscriberError(
                f"the version belongs to another base, {manifest.base_model}",
                got=manifest.base_sha256,
                allowed=base_sha256,
                remedy="serve it with the base that its manifest names",
            )
        return manifest

    def _fetch(self, manifest: Manifest) -> bytes:
        size_bytes = manifest.weights.size_bytes
        if size_bytes > MAX_WEIGHTS_BYTES:
            raise IntegrityError("the weights are too large", got=size_bytes, allowed=MAX_WEIGHTS_BYTES)
        return self._store.get(blob_key(manifest.weights.digest), MAX_WEIGHTS_BYTES).data

    def _verify(self, manifest: Manifest, weights: bytes) -> None:
        found = digest_of(weights)
        if found != manifest.weights.digest or len(weights) != manifest.weights.size_bytes:
            raise IntegrityError(
                "the weights are not those that the manifest names",
                got=f"{found} ({len(weights)} bytes)",
                allowed=f"{manifest.weights.digest} ({manifest.weights.size_bytes} bytes)",
                remedy=f"restore the object from a copy, or roll back: `perennial adapters rollback {self.adapter}`",
            )
        check_safetensors(weights)

    @contextmanager
    def _timed(self, stage: str, stage_s: dict[str, float]) -> Iterator[None]:
        begin_s = self._clock()
        try:
            yield
        finally:
            stage_s[stage] = stage_s.get(stage, 0.0) + self._clock() - begin_s
            self._metrics.stage_s(stage, stage_s[stage])

    def _retry_look(self, error: StoreError | None) -> None:
        """Look at the alias again soon: it could not be read, or does not show a generation that an event named."""
        endless = error is not None and not isinstance(error, IntegrityError)
        first_or_last = self._schedule_retry(self._progress.announced, endless=endless)
        if error is not None:
            self._log_attempt(error, first_or_last=first_or_last)
            if endless:
                self._metrics.store_error("fetch")

    def _retry_version(self, alias: AliasState, error: Exception, stage_s: Mapping[str, float]) -> None:
        """Try to serve the version again soon, or give it up; report the first and the last failure."""
        endless = isinstance(error, StoreError) and not isinstance(error, IntegrityError)
        first_or_last = self._schedule_retry(alias.generation, endless=endless)
        self._log_attempt(error, first_or_last=first_or_last)
        if endless:
            self._metrics.store_error("fetch")
        if first_or_last:
            self._send_failed(alias.generation, alias.version, alias.published_at, stage_s, error)

    def _schedule_retry(self, generation: int, *, endless: bool) -> bool:
        """Set the time of the next attempt, or give up. Return whether this was the first attempt or the last."""
        self._progress = self._progress.failed(generation)
        delay_s = RETRY.delay_s(self._progress.attempts, endless=endless)
        if delay_s is None:
            self._progress = self._progress.gave_up()
        else:
            self._progress = self._progress.retry_at(self._clock() + min(delay_s, self.settings.serving.poll_s))
        return delay_s is None or self._progress.attempts == 1

    def _log_attempt(self, error: Exception, *, first_or_last: bool) -> None:
        level = logging.ERROR if first_or_last else logging.DEBUG
        _log.log(level, "%s: attempt %d failed: %s", self.adapter, self._progress.attempts, error)

    def _send_failed(
        self, generation: int, version: str, published_at: datetime, stage_s: Mapping[str, float], error: Exception
    ) -> None:
        self._acks.send(
            AdapterFailed(
                adapter=self.adapter, alias=self.alias, replica=self.replica, generation=generation, version=version,
                stage_s=dict(stage_s), published_at=published_at, at=self._now(),
                error=f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS],
            )
        )  # fmt: skip

    def _acknowledge(self) -> None:
        """Send the acknowledgement that is owed, if there is one."""
        owed = self._progress.owed
        if owed is not None:
            self._acks.send(owed)
            self._metrics.ack(self.adapter, owed.stage_s)
            self._progress = self._progress.acknowledged()

    def _unload_leftovers(self) -> None:
        """Unload every version of this alias that is not served, and check that the backend holds none any more.

        What cannot be unloaded is tried again at the next look. An acknowledgement that is still owed is sent when
        nothing is left.
        """
        current = self.current
        if current is None and self._progress.served == 0:
            return  # a process before this one may have left a version in service: keep it until there is a newer one
        kept = current.name if current else None
        reason = "requests still use it"
        left: list[str] = []
        try:
            for name in self._held(kept):
                # A retired adapter has no other version for new requests: while this one is active they use it, and
                # waiting for them would never end.
                if kept is None and isinstance(self._backend, Deactivates):
                    self._backend.deactivate(name)
                if kept is None or self._backend.drain(name, self._drain_s):
                    self._backend.unload(name)
            left = self._held(kept)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything; it is reported as adapter.failed
            reason, left = str(error), ["?"]
        if not left:
            self._progress = self._progress.unloaded()
            self._acknowledge()
            return
        _log.warning("%s: an earlier version is still held (%s): %s", self.adapter, reason, left)
        owed, reported = self._progress.owed, self._progress.owed_reported
        retry_s = self._clock() + max(RETRY.first_s, self.settings.serving.poll_s / 10)
        self._progress = self._progress.still_held(retry_s)
        if owed is not None and not reported:
            held = SubscriberError("an earlier version is still held", got=reason, remedy="it is tried again")
            self._send_failed(owed.generation, owed.version, owed.published_at, owed.stage_s, held)

    def _held(self, kept: str | None) -> list[str]:
        return [name for name in self._backend.list() if name.startswith(self._prefix) and name != kept]
