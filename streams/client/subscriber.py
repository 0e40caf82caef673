"""`Subscriber` follows one alias and keeps a backend serving the version that the alias names.

This module decides when a version is fetched, checked, activated, retried and acknowledged; `subscriber_state` holds
the state machine. How a version is served is the backend's business. The alias in the object store is the truth. An
event on `adapter-updates` only says when to look at it, so a lost, late, repeated or forged event changes nothing but
the time of the next look.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from perennial.storage.errors import StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.client.acknowledgements import Acks, ReplicaReports, own_replica_name
from perennial.streams.client.backend import Backend, Current, Deactivates, HasRoom
from perennial.streams.client.failure_kinds import FailureKind, RetryPolicy, failure_kind
from perennial.streams.client.following_thread import FollowingThread, SubscriberError
from perennial.streams.client.personal.left_versions import drop_if_revoked, left_extending
from perennial.streams.client.personal.served_parts import follower_name
from perennial.streams.client.personal.shared_following import SharedFollowing
from perennial.streams.client.subscriber_kafka import Updates
from perennial.streams.client.subscriber_state import Progress, State
from perennial.streams.client.termination import sigterm_deferred
from perennial.streams.client.trust.untrusted import UntrustedVersionError
from perennial.streams.client.trust.version_guard import VersionGuard
from perennial.streams.client.version_source import VersionSource
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, load_settings

_log = logging.getLogger("perennial.subscriber")

RETRY = RetryPolicy()
_TICK_S = 0.2


OnActivate = Callable[[AliasState, Mapping[str, float]], None]


class Subscriber(FollowingThread):
    """Follows the alias of one adapter and keeps a backend serving the version that the alias names.

    A subscriber hears of changes from the compacted topic `adapter-updates` and polls the alias too, every
    `settings.serving.poll_s` seconds. It applies only higher generations of the alias. At each poll it also asks whether
    the version that it serves was revoked, and takes such a version out of service at once. A version that cannot be
    served is tried again without an end. Where the backend names no base, it keeps to the base of the first version that
    it served until it ends. Use it in a `with` block, or call `run` in the main thread or in one of your own. Thread-safe.

    A version that extends a shared adapter (`acme/support/user-42` extends `acme/support`) is served together with the live
    version of that one, as one LoRA. The subscriber then follows both aliases; for the shared one it has a second replica's
    name, `<replica>:<last segment of the adapter>`, under which it acknowledges that adapter's versions and revocations.

    Without a broker it acknowledges nothing, so no request to forget waits for it; it only polls, and logs a warning.
    With one it holds a lease of `settings.serving.replica_lease_s` seconds, which a heartbeat renews. Requests wait for
    it until the lease ends or `close` announces that the replica leaves. After a kill, requests wait until the lease ends.

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
        replica: Name of this subscriber in acknowledgements, up to 256 characters, unique among the subscribers of the
            adapter. Default: host name and process id, with a number from the second subscriber of a process on.
        metrics: Where to count. Default: a registry of its own.
        on_activate: Called as `on_activate(state, stage_s)` after a version is served; `stage_s` has the seconds of
            each stage: fetch, verify, load, warm, activate, publish_to_served. What it raises is logged and ignored.
            Where a shared adapter is served with this one, it is also called, in another thread, after a version of the
            shared one is served; `state.adapter` tells which one it is.
        drain_s: Longest time that one look at the alias waits for requests that still use the previous version, in
            seconds. The next look waits again.
        clock: Monotonic clock in seconds.
        now: The wall clock.

    Raises:
        SettingsError: No store is set.
        OtherTenantError: PERENNIAL_TENANT is set, and the adapter is none of that tenant.
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
        self.settings.tenants.require_own(adapter)
        super().__init__(adapter)
        self.alias = alias or self.settings.serving.alias
        self.replica = replica or own_replica_name()
        if not 0 < len(self.replica) <= 256 or not self.replica.isprintable():
            raise SubscriberError("not a replica's name", got=self.replica, allowed="1 to 256 printable characters")
        self._backend = self._server = backend
        self._has_room = isinstance(backend, HasRoom) and backend.has_room
        self._metrics = metrics or Metrics("subscriber", self.settings)
        self._on_activate = on_activate
        self._drain_s = drain_s
        self._clock, self._now = clock, now
        if store is None or isinstance(store, str):
            store = open_store(store or self.settings.store.require_uri(), self.settings.s3)
        self._registry = Registry(store, now=now)
        self._guard = VersionGuard.of(self._registry, self.settings.signing)
        self._source = VersionSource(self._registry, adapter, self._guard)
        self._bootstrap = bootstrap = kafka or self.settings.kafka.bootstrap
        owner = f"{adapter}#{self.alias}"
        self._prefix = self._prefix_of(adapter)
        security, topic, keys = self.settings.kafka_security, self.settings.kafka.topic, self.settings.signing
        self._updates = Updates(bootstrap, security, topic("adapter-updates"), owner, self._metrics, self._guard.trust)
        self._acks = Acks(bootstrap, security, topic, now, self.settings.serving.replica_lease_s, clock, keys)
        self._reports = ReplicaReports(adapter, self.alias, self.replica, now)

        self._changed = threading.Condition()
        self._current: Current | None = None
        self._base_sha256: str | None = None  # of what was served: the server has it, also while it serves no version
        self._progress = Progress()
        self._following: SharedFollowing | None = None  # once a version extended a shared adapter

    @property
    def current(self) -> Current | None:
        """The version that is served now. None before the first version and after the adapter was retired."""
        with self._changed:
            return self._current

    @property
    def served_name(self) -> str | None:
        """The backend's name of what it serves, which requests must name; None where nothing is served.

        It is `current.name`. Where a shared adapter is served with the version, the name has the same beginning, and its 64
        hex digits stand for both versions.
        """
        current = self.current
        if self._following is not None:
            return self._following.composing.served
        return current.name if current else None

    @property
    def served_with(self) -> str | None:
        """Name of the shared adapter's version that is served with this one's, `<adapter>@<64 hex>`; None: none is."""
        return self._following.composing.served_with if self._following is not None else None

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

    def _prefix_of(self, adapter: str) -> str:
        return f"{adapter}@" if self.alias == "live" else f"{adapter}#{self.alias}@"

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

        In the main thread of a program that does not handle SIGTERM itself, SIGTERM ends the call, announces
        that the replica leaves, and then ends the program.

        Args:
            stop: Ends the call when it is set. None: `close` ends the call.
        """
        stop = stop or self._stop
        if not self._bootstrap:
            _log.warning(
                "%s: no broker is set, so this subscriber acknowledges nothing and no request to forget waits for it; "
                "it reads the alias and the revocations every %g s", self.adapter, self.settings.serving.poll_s,
            )  # fmt: skip
        with sigterm_deferred() as termination:
            try:
                self._acks.start(self._announce_end)
                while not (stop.is_set() or termination.requested):
                    if self._clock() >= self._progress.due_s:
                        self._follow_left()
                        self._look()
                        self._drop_revoked()
                        if self._progress.state is not State.UNREADABLE:
                            self._looked.set()
                        if self._following is not None:
                            self._following.tend()
                    wait_s = max(0.0, min(_TICK_S, self._progress.due_s - self._clock()))
                    self._progress = self._progress.heard(self._updates.poll(wait_s, self._clock(), stop))
            finally:
                if self._following is not None:
                    self._following.close()
                self._updates.close()
                self._announce_end()

    def _announce_end(self) -> None:
        """Send `replica.left`, unless it was sent."""
        current = self.current
        self._acks.close(self._reports.left(self._progress.served, current.version if current else None))

    def _look(self) -> None:
        """Read the alias, do what its state asks for, and set the time of the next look."""
        self._progress = self._progress.looking(self._clock() + self.settings.serving.poll_s)
        try:
            alias = self._guard.alias(self.adapter, self.alias, self._progress.newest)
        except Exception as error:  # noqa: BLE001 - nothing that the store raises may end the subscriber
            if isinstance(error, UntrustedVersionError) and error.state is not None:
                self._refuse_alias(error.state, error)
                return
            self._metrics.store_error("alias")
            self._progress = self._progress.unreadable()
            level = logging.ERROR if self._progress.fruitless == 1 else logging.DEBUG
            _log.log(level, "%s: the alias cannot be read, it is tried again: %s", self.adapter, error)
            self._look_soon(failure_kind(error))
            return
        self._progress = self._progress.saw(alias.generation if alias else 0, self._clock())
        if not (self._has_room and self._progress.state is State.BEHIND):
            self._unload_leftovers()
        if alias is not None and self._progress.state is State.BEHIND:
            self._metrics.waiting(True)
            self._apply(alias)
        elif self._progress.state is State.EXPECTING:
            self._look_soon(FailureKind.OTHER)
            self._progress = self._progress.missed()
        elif self._progress.state is State.FOLLOWING:
            self._metrics.waiting(False)
            self._metrics.serving_stale(self.adapter, None)
            if self._progress.reported is not None:  # what was refused is gone, and the version is served as before
                self._progress = self._progress.recovered()
                if self._current is not None:
                    self._acks.send_activated_again(self._progress.served)

    def _refuse_alias(self, alias: AliasState, error: UntrustedVersionError) -> None:
        """Go on with what is served, and report an alias that is not trusted."""
        self._unload_leftovers()
        self._progress = self._progress.refusing()
        self._report_failure(alias, error, {}, "the alias is refused")

    def _look_soon(self, kind: FailureKind) -> None:
        delay_s = RETRY.delay_s(max(1, self._progress.fruitless), kind, random.random())  # noqa: S311 - no secret
        self._progress = self._progress.look_again(self._clock() + delay_s)

    def _drop_revoked(self) -> None:
        """Take a revoked version out of service, whatever the alias names: the one served, or what a process left."""
        current = self.current
        try:
            if current is not None:
                if self._registry.is_revoked(self.adapter, current.manifest.seq):
                    self._replace_or_drop(current)
            elif self._progress.served == 0:
                for name in self._held(None):
                    drop_if_revoked(self._source, self._registry, self._server, self._backend, name)
        except StoreError as error:
            self._metrics.store_error("revocations")
            _log.debug("%s: the revocations cannot be read: %s", self.adapter, error)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything; the next look tries again
            _log.warning("%s: a revoked version cannot be taken out of service: %s", self.adapter, error)

    def _replace_or_drop(self, current: Current) -> None:
        """Serve the version that replaces a revoked one, or serve nothing where there is none or it failed.

        The alias is changed before a version is revoked: where it was changed after the last look, the next version
        replaces this one without a pause.
        """
        if self._progress.state is State.FOLLOWING:
            alias = self._registry.alias(self.adapter, self.alias)
            if alias is not None and alias.generation > self._progress.served:
                self._progress = self._progress.look_again(self._clock())
                return
        _log.warning("%s: %s was revoked and is taken out of service", self.adapter, current.version)
        with self._changed:
            self._current = None
            self._progress = self._progress.dropped()
            self._changed.notify_all()
        error = SubscriberError("the version was revoked and is taken out of service", got=current.version)
        self._acks.send(self._reports.failed(current.generation, current.version, self._now(), {}, error))
        self._unload_leftovers()

    def _apply(self, alias: AliasState) -> None:
        """Serve the version that the alias names, or nothing if the adapter is retired, and acknowledge it."""
        stage_s: dict[str, float] = {}
        try:
            current = None if alias.kind == "retired" else self._serve(alias, stage_s)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything; it is reported as adapter.failed
            self._retry_version(alias, error, stage_s)
            return
        ack = self._reports.activated(alias, stage_s)
        self._guard.note(alias)
        with self._changed:
            self._current = current
            self._progress = self._progress.applied(alias.generation, ack)
            self._changed.notify_all()
        self._metrics.generation(self.adapter, alias.generation)
        self._metrics.progress()
        self._metrics.waiting(False)
        self._metrics.serving_stale(self.adapter, None)
        # Revoked and retired count as applied only when the previous version is unloaded. So does what came after them,
        # while a revoked version is still held: an update may follow before the look at the alias, or during the drain.
        if alias.kind not in {"revoked", "retired"} and not self._holds_revoked(current):
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
            manifest = self._source.manifest(alias.version, self._backend.base_sha256 or self._base_sha256, alias)
        if self._current is None or self._current.version != alias.version:
            self._follow_shared(manifest)
            with self._timed("fetch", stage_s):
                weights = self._source.fetch(manifest)
            with self._timed("verify", stage_s):
                self._source.verify(manifest, weights)
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
        self._base_sha256 = manifest.base_sha256
        stage_s["publish_to_served"] = max(0.0, (self._now() - alias.published_at).total_seconds())
        return Current(alias.version, alias.generation, name, manifest)

    def _follow_left(self) -> None:
        """Follow the shared adapter of what a process before this one left in service, so that a request waits for it."""
        if self._following is not None or self._progress.served:
            return
        with suppress(Exception):  # the looks at the alias report what is wrong with the backend
            if (left := left_extending(self._server, self._held(None))) is not None:
                self._follow_shared(left)

    def _follow_shared(self, manifest: Manifest) -> None:
        """Serve the version together with the shared adapter that it extends, if it extends one."""
        if (shared := manifest.extends) is not None and self._following is None:
            self._following = SharedFollowing(
                self._backend, self._prefix, self._prefix_of(shared), lambda side: self._follower(shared, side)
            )
            self._backend = self._following.composing.own
        if self._following is not None:
            self._following.prepare(manifest)

    def _follower(self, shared: str, side: Backend) -> Subscriber:
        def report(alias: AliasState, stage_s: Mapping[str, float]) -> None:
            if self._on_activate is not None and self.served_name is not None:
                self._on_activate(alias, stage_s)

        return Subscriber(
            shared, side, kafka=self._bootstrap, store=self._registry.store, settings=self.settings, alias=self.alias,
            replica=follower_name(self.replica, self.adapter), metrics=self._metrics, on_activate=report,
            drain_s=self._drain_s, clock=self._clock, now=self._now,
        )  # fmt: skip

    @contextmanager
    def _timed(self, stage: str, stage_s: dict[str, float]) -> Iterator[None]:
        begin_s = self._clock()
        try:
            yield
        finally:
            stage_s[stage] = stage_s.get(stage, 0.0) + self._clock() - begin_s
            self._metrics.stage_s(stage, stage_s[stage])

    def _retry_version(self, alias: AliasState, error: Exception, stage_s: Mapping[str, float]) -> None:
        """Try to serve the version again later, and report the failure where it is another one than the last."""
        kind = failure_kind(error)
        progress = self._progress.failed(alias.generation)
        delay_s = RETRY.delay_s(progress.attempts, kind, random.random())  # noqa: S311 - no secret
        self._progress = progress.retry_at(self._clock() + delay_s)
        if isinstance(error, StoreError):
            self._metrics.store_error("fetch")
        what = f"attempt {progress.attempts} failed ({kind.value}), it is tried again in {delay_s:.1f} s"
        self._report_failure(alias, error, stage_s, what)

    def _report_failure(self, alias: AliasState, error: Exception, stage_s: Mapping[str, float], what: str) -> None:
        """Count a failure, and log and acknowledge it where it is another one than the last."""
        before, kind = self._progress.reported, failure_kind(error)
        self._progress = self._progress.reporting(alias.generation, kind, error)
        self._metrics.subscriber_failure(error.reason if isinstance(error, UntrustedVersionError) else kind.value)
        self._metrics.serving_stale(self.adapter, alias.published_at.timestamp())
        is_news = self._progress.reported != before
        level = logging.ERROR if is_news else logging.DEBUG
        _log.log(level, "%s: generation %d: %s: %s", self.adapter, alias.generation, what, error)
        if is_news:
            self._acks.send(self._reports.failed(alias.generation, alias.version, alias.published_at, stage_s, error))

    def _acknowledge(self) -> None:
        """Send the acknowledgement that is owed, if there is one."""
        if (owed := self._progress.owed) is not None:
            self._acks.send(owed)
            self._metrics.ack(self.adapter, owed.stage_s)
            self._progress = self._progress.acknowledged()

    def _holds_revoked(self, current: Current | None) -> bool:
        """Return whether the backend holds a revoked version besides the current one, or nobody can say."""
        try:
            return any(self._source.is_revoked(f"sha256:{name[-64:]}") for name in self._held(current))
        except Exception as error:  # noqa: BLE001 - a store or a backend may raise anything; unloading reports it then
            _log.debug("%s: it is not known whether a revoked version is held: %s", self.adapter, error)
            return True

    def _unload_leftovers(self) -> None:
        """Unload the versions of this alias that are not served, and check that the backend holds none any more.

        What cannot be unloaded is tried again at the next look. An acknowledgement that is still owed is sent when
        nothing is left. A backend that has room unloads one version per look, so that a newer one waits for no other.
        """
        current = self.current
        if not self._progress.leftovers or (current is None and self._progress.served == 0):
            return  # a process before this one may have left a version in service: keep it until there is a newer one
        reason, unloaded = "requests still use it", 0
        try:
            left = self._held(current)
            if current is None and isinstance(self._backend, Deactivates):
                for name in left:
                    self._backend.deactivate(name)  # a retired adapter has no other version for new requests
            for name in left:
                if current is None or self._backend.drain(name, self._drain_s):
                    self._backend.unload(name)
                    unloaded += 1
                    if self._has_room:
                        break
            left = self._held(current) if unloaded else left
        except Exception as error:  # noqa: BLE001 - a backend may raise anything; it is reported as adapter.failed
            reason, left, unloaded = str(error), ["?"], 0
        if not left:
            self._progress = self._progress.unloaded()
            self._acknowledge()
            return
        if self._has_room and unloaded:
            self._progress = self._progress.look_again(self._clock())
            return
        level = logging.WARNING if left == ["?"] else logging.DEBUG  # what drains is in order
        _log.log(level, "%s: an earlier version is still held (%s): %s", self.adapter, reason, left)
        owed = None if self._progress.owed_reported else self._progress.owed
        retry_s = self._clock() + max(RETRY.first_s, self.settings.serving.poll_s / 10)
        self._progress = self._progress.still_held(retry_s)
        if owed is not None:
            held = SubscriberError("an earlier version is still held", got=reason, remedy="it is tried again")
            self._acks.send(self._reports.failed(owed.generation, owed.version, owed.published_at, owed.stage_s, held))

    def _held(self, current: Current | None) -> list[str]:
        return [n for n in self._backend.list() if n.startswith(self._prefix) and not (current and n == current.name)]
