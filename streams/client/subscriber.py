"""Subscribers: follow one alias and keep a backend serving the version that it points at.

Owns when something is fetched, checked, activated, retried and acknowledged. What "serving" means is a Backend's
business. The alias in the object store is the truth; an event on adapter-updates only says when to look, so a lost,
late, repeated or forged event changes nothing but the time of the next look.
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
from perennial.streams.client.backend import Backend, Current
from perennial.streams.client.subscriber_kafka import Acks, Updates
from perennial.streams.events.models import AdapterActivated, AdapterFailed
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, load_settings

_log = logging.getLogger("perennial.subscriber")

MAX_WEIGHTS_BYTES = 2 * 1024**3
MAX_ATTEMPTS = 5
_FIRST_RETRY_S = 0.2
_TICK_S = 0.2
_MAX_ERROR_CHARS = 1000


class SubscriberError(PerennialError):
    """A version cannot be served here."""


OnActivate = Callable[[AliasState, Mapping[str, float]], None]


class Subscriber:
    """Follows `adapter`'s alias with a backend, from the compacted topic and by polling the alias itself.

    kafka, store: addresses, by default PERENNIAL_KAFKA and PERENNIAL_STORE; without a broker it polls every
    `settings.serving.poll_s` and acknowledges nothing. replica: the name in acknowledgements. on_activate(update, stage_s)
    runs after a version is served; stage_s has seconds per stage: fetch, verify, load, warm, activate,
    publish_to_served. drain_s: the longest that one look waits for requests on the version before, which is tried
    again at the next. Only higher generations are applied. Thread-safe. Raises SettingsError where no store is set.
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
        self._generation = 0
        self._wanted = 0
        self._attempts = 0
        self._failing = 0
        self._given_up = 0
        self._due_s = 0.0
        self._owed: AdapterActivated | None = None
        self._untidy = True  # what a process before this one left in the backend
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def current(self) -> Current | None:
        """What is served now; None before the first version and after the adapter was retired."""
        with self._changed:
            return self._current

    @property
    def generation(self) -> int:
        """The alias generation that was applied last; 0: none."""
        with self._changed:
            return self._generation

    def wait_for(self, generation: int, timeout_s: float) -> bool:
        """Wait until that generation or a later one was applied. False where the time ends."""
        with self._changed:
            return self._changed.wait_for(lambda: self._generation >= generation, timeout_s)

    def name_of(self, version: str) -> str:
        """The backend's name of a version: `adapter@<64 hex>`, with `#alias` before the `@` for another than live."""
        return f"{self._prefix}{version.removeprefix('sha256:')}"

    def run(self, stop: threading.Event | None = None) -> None:
        """Follow the alias until `stop` is set (None: until close() is called, or for ever)."""
        stop = stop or self._stop
        try:
            while not stop.is_set():
                if self._clock() >= self._due_s:
                    self._look()
                self._acks.tick(self._clock())
                wait_s = max(0.0, min(_TICK_S, self._due_s - self._clock()))
                heard = self._updates.poll(wait_s, self._clock(), stop)
                if heard > max(self._generation, self._wanted):
                    self._wanted = heard
                    self._due_s = 0.0
        finally:
            self._updates.close()
            self._acks.close()

    def start(self) -> Self:
        """Follow the alias in a thread; close() ends it."""
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
        """Stop following; the backend goes on serving what it has. Raises SubscriberError if an error had ended it."""
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
        """Read the alias and do what it asks; sets when to look again."""
        self._due_s = self._clock() + self.settings.serving.poll_s
        try:
            state = self._registry.alias(self.adapter, self.alias)
        except StoreError as error:
            self._metrics.store_error("alias")
            self._fail(None, error, {})
            return
        if self._untidy:
            self._tidy()
        found = state.generation if state else 0
        if state and found > self._generation and found != self._given_up:
            self._metrics.waiting(True)
            self._take(state)
        elif found < self._wanted and self._wanted > self._generation:  # the event came before the alias is seen
            self._fail(None, None, {})
        elif found <= self._generation:
            self._metrics.waiting(False)

    def _take(self, state: AliasState) -> None:
        stage_s: dict[str, float] = {}
        try:
            current = None if state.kind == "retired" else self._serve(state, stage_s)
        except Exception as error:  # noqa: BLE001 - backends are anybody's code: it ends in adapter.failed
            self._fail(state, error, stage_s)
            return
        with self._changed:
            self._current = current
            self._generation = state.generation
            self._changed.notify_all()
        self._attempts = self._failing = self._given_up = 0
        self._metrics.generation(self.adapter, state.generation)
        self._metrics.progress()
        self._metrics.waiting(False)
        self._owed = AdapterActivated(
            adapter=self.adapter, alias=self.alias, replica=self.replica, generation=state.generation,
            version=state.version, stage_s=stage_s, published_at=state.published_at, at=self._now(),
        )  # fmt: skip
        if state.kind not in {"revoked", "retired"}:  # those are done only when the version before is gone
            self._settle()
        if self._on_activate is not None and current is not None:
            try:
                self._on_activate(state, stage_s)
            except Exception:  # noqa: BLE001 - anybody's code, and no reason to stop serving
                _log.exception("%s: on_activate failed; the version is served", self.adapter)
        self._untidy = True
        self._tidy()

    def _serve(self, state: AliasState, stage_s: dict[str, float]) -> Current:
        name = self.name_of(state.version)
        with self._timed("fetch", stage_s):
            manifest = self._manifest(state)
        if self._current is None or self._current.version != state.version:
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
                with suppress(Exception):  # what failed is told; the version before is still active
                    self._backend.unload(name)
                raise
        stage_s["publish_to_served"] = max(0.0, (self._now() - state.published_at).total_seconds())
        return Current(state.version, state.generation, name, manifest)

    def _manifest(self, state: AliasState) -> Manifest:
        manifest = self._registry.manifest(self.adapter, state.version)
        if self._registry.is_revoked(self.adapter, manifest.seq):
            raise StoreError(
                f"{state.version} is revoked and still live", remedy="forget it or roll back: `perennial rollback`"
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
                remedy="restore the object from a copy, or roll back: `perennial rollback`",
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

    def _fail(self, state: AliasState | None, error: Exception | None, stage_s: Mapping[str, float]) -> None:
        """Look again soon, and say what failed: at first, and when a version is given up."""
        asked = state.generation if state else self._wanted
        self._attempts = self._attempts + 1 if asked == self._failing else 1
        self._failing = asked
        waits_for_store = isinstance(error, StoreError) and not isinstance(error, IntegrityError)
        last = self._attempts >= MAX_ATTEMPTS and not waits_for_store
        if not last:
            retry_s = _FIRST_RETRY_S * 2.0 ** min(self._attempts - 1, 20)
            self._due_s = self._clock() + min(retry_s, self.settings.serving.poll_s)
        elif state is not None:
            self._given_up = state.generation
        else:
            self._wanted = 0  # the event was ahead of any alias: polling goes on
        if error is None:
            return
        level = logging.ERROR if last or self._attempts == 1 else logging.DEBUG
        _log.log(level, "%s: attempt %d failed: %s", self.adapter, self._attempts, error)
        if waits_for_store:
            self._metrics.store_error("fetch")
        if state is not None and (last or self._attempts == 1):
            self._send_failed(state.generation, state.version, state.published_at, stage_s, error)

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

    def _settle(self) -> None:
        """Send the acknowledgement that is owed."""
        if self._owed is not None:
            self._acks.send(self._owed)
            self._metrics.ack(self.adapter, self._owed.stage_s)
            self._owed = None

    def _tidy(self) -> None:
        """Unload every version of this alias that is not current, and look that it is gone; else again at next look."""
        current = self.current
        if current is None and self._generation == 0:
            return  # a process before this one may have left a version in service: keep it until there is a better one
        kept = current.name if current else None
        reason = "requests still use it"
        left: list[str] = []
        try:
            for name in self._held(kept):
                # Nothing is current when it was retired: then requests come until it is unloaded.
                if kept is None or self._backend.drain(name, self._drain_s):
                    self._backend.unload(name)
            left = self._held(kept)
        except Exception as error:  # noqa: BLE001 - backends are anybody's code: it ends in adapter.failed
            reason, left = str(error), ["?"]
        self._untidy = bool(left)
        if not left:
            self._settle()
            return
        _log.warning("%s: a version before is still held (%s): %s", self.adapter, reason, left)
        self._due_s = min(self._due_s, self._clock() + max(_FIRST_RETRY_S, self.settings.serving.poll_s / 10))
        if self._owed is not None and self._attempts == 0:
            self._attempts = 1
            held = SubscriberError("the version before is still held", got=reason, remedy="it is tried again")
            owed = self._owed
            self._send_failed(owed.generation, owed.version, owed.published_at, owed.stage_s, held)

    def _held(self, kept: str | None) -> list[str]:
        return [name for name in self._backend.list() if name.startswith(self._prefix) and name != kept]
