"""`EngineBackend` serves versions through an engine that runs as a server of its own. Needs no torch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.finite_weights import check_finite
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend, adapter_config
from perennial.streams.client.engines.engine_api import EngineApi, NonFiniteAnswerError
from perennial.streams.client.engines.engine_probe import TOLERANCE_NATS, compare
from perennial.streams.client.engines.zero_adapter import smallest_zero_weights, zero_weights
from perennial.streams.client.personal.served_parts import version_of
from perennial.streams.probe_texts import PROBE_TEXTS

_log = logging.getLogger("perennial.backend")

ZERO_FOLDER = ".zero"
"""Folder of the zero adapters. Its dot keeps it out of `DirectoryBackend.list`."""
_POLL_S = 0.05
_SETTLE_S = 0.5
"""Wait after a name was unloaded, for requests that had looked it up and were not yet in the engine's queue."""
_DRAINED_S = 1.0
"""How long a drained version counts as unused: the engine's metrics are many, and reading them takes time."""
_OVERWRITES = 8


class EngineBackend:
    """Serves versions through an engine: a folder per version, loaded by the engine under the version's own name.

    Neither a name nor a path is ever used for other bytes, because engines keep cached prefixes by them. A version is
    activated only after the engine lists it and predicts what the learner recorded. Clients name the version in their
    requests: `model_for` returns it, and so does the file that `DirectoryBackend` writes. An answer names the version
    that made it.

    A thread loads what is active again when the engine was started anew; until then requests for it are refused, and
    never answered by the base. Thread-safe: the subscribers of several adapters may share one backend.

    Args:
        api: The engine.
        folders: Writes the folders; the engine must be able to read them.
        server_path: The path of that folder as the engine sees it. None: as this process sees it.
        tolerance_nats: Largest mean difference from the learner's log-probabilities, in nats.
        max_rank: Largest rank that the engine takes; None: the engine says so itself.
        check_s: Seconds between two looks whether the engine still serves what is active; None: never look.
        sleep: Waits so many seconds.
        clock: Monotonic clock in seconds.
    """

    has_room = True

    def __init__(
        self,
        api: EngineApi,
        folders: DirectoryBackend,
        *,
        server_path: str | None = None,
        tolerance_nats: float = TOLERANCE_NATS,
        max_rank: int | None = None,
        check_s: float | None = 2.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.api = api
        self.base_sha256 = folders.base_sha256
        self._folders = folders
        self._server_path = PurePosixPath(server_path or str(folders.path.absolute()))
        self._tolerance_nats = tolerance_nats
        self._max_rank = max_rank
        self._check_s = check_s
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.RLock()
        self._zero: str | None = None
        self._spare: str | None = None
        self._loaded: set[str] = set()
        self._drained_s: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- what clients ask

    def active_name(self, adapter: str, alias: str = "live") -> str | None:
        """Return the name of the version to ask for now; None if the adapter has no version in service."""
        return self._folders.current(adapter, alias)

    def model_for(self, adapter: str, alias: str = "live") -> str:
        """Return what to put into the field `model` of a request: the active version, or else the base."""
        name = self.active_name(adapter, alias)
        return self.api.model_of(name) if name else self.base_name

    @property
    def base_name(self) -> str:
        """Name under which the base answers: the engine's own, or a zero adapter on vLLM once there was a version.

        On vLLM's CPU build, requests without an adapter that share a batch with others are answered by the adapter in
        the last slot (pull request 48421), so they need an adapter of their own.
        """
        return self._zero or self.api.base_name()

    # ---- the protocol `Backend`

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Write the version's folder, let the engine load it, and compare what it predicts with the learner.

        Raises:
            BackendError: The engine does not answer, or refused for a reason that may pass.
            UnfitVersionError: The engine can never serve the version, or predicts something else with it.
            IntegrityError: The weights are no safetensors, or not finite.
            OSError: The folder cannot be written.
        """
        check_finite(weights)
        if self._max_rank is not None and manifest.rank > self._max_rank:
            raise too_large(manifest.rank, self._max_rank)
        with self._lock:
            self._folders.load(name, weights, manifest)
            try:
                self._load_checked(name, weights, manifest, self.api.served())
            except Exception as error:
                # What is in service already stays there, unless it can never be served rightly.
                if isinstance(error, UnfitVersionError) or not self._folders.is_active(name):
                    with suppress(Exception):  # the first error is reported; a subscriber unloads what is left
                        self._remove(name)
                raise

    def warm(self, name: str) -> None:
        """Do nothing: the comparison of `load` was the first request.

        Raises:
            BackendError: The version is not held.
        """
        with self._lock:
            self._require(name)

    def activate(self, name: str) -> None:
        """Point clients at the version. Requests that name another version are answered by that one.

        Raises:
            BackendError: The version is not held.
        """
        with self._lock:
            self._require(name)
            self._folders.activate(name)
            if self._thread is None and self._check_s is not None:
                self._thread = threading.Thread(target=self._watch, name="engine watch", daemon=True)
                self._thread.start()

    def deactivate(self, name: str) -> None:
        """Point clients at the base, if the version is the active one."""
        with self._lock:
            self._folders.deactivate(name)

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses the version. It does not wait for the end of the grace time.

        Args:
            name: Name of the version.
            timeout_s: Longest wait in seconds.

        Returns:
            False if the engine still runs requests on it after the wait, or the grace time is not over.
        """
        if not self._folders.drain(name, 0):
            return False
        end_s = self._clock() + timeout_s
        while self.api.in_use(name):
            if self._clock() >= end_s:
                return False
            self._sleep(min(_POLL_S, max(0.0, end_s - self._clock())))
        self._drained_s[name] = self._clock()
        return True

    def unload(self, name: str) -> None:
        """Remove the version from the engine's list, from its memory, and from the disk; then check the list.

        Raises:
            BackendError: Requests still use the version, or the engine does not answer. The folder is left then, so
                that `list` still names the version and a subscriber tries again.
        """
        with self._lock:
            if not self._folders.folder_of(name).exists() and name not in self.api.served():
                self._folders.unload(name)  # also what a process left that was killed during the deletion
                return
            if self._clock() - self._drained_s.pop(name, -_DRAINED_S) >= _DRAINED_S and self.api.in_use(name):
                raise _still_used(name)
            self._folders.deactivate(name)
            self._loaded.discard(name)
        self._remove(name)  # without the lock: versions of other adapters are loaded meanwhile

    def manifest_of(self, name: str) -> Manifest | None:
        """Return the manifest of a version that has a folder; None where there is none that can be read."""
        return self._folders.manifest_of(name)

    def list(self) -> list[str]:
        """Return the names that the engine serves from the folder, and those that have a folder there."""
        held = set(self._folders.list())
        expected = {name: path for name, path in self.api.served().items() if "@" in name}
        for name, path in expected.items():
            with suppress(BackendError):  # not a version's name: somebody else's adapter
                if path == self._path(name):
                    held.add(name)
        return sorted(held)

    # ---- an engine that was started anew

    def heal(self) -> tuple[str, ...]:
        """Load what is active and the engine does not serve, from the folders; return the names.

        Raises:
            BackendError: The engine does not answer.
            IntegrityError: A folder is damaged.
        """
        healed = []
        with self._lock:
            served = self.api.served()
            if self._zero is not None:
                self._load_in_engine(self._zero, self._zero_path(self._zero), served)
            for name in self._active_names():
                if name not in served:
                    weights, manifest = self._read(name)
                    self._load_checked(name, weights, manifest, served)
                    healed.append(name)
        return tuple(healed)

    def close(self) -> None:
        """Stop looking after the engine. It goes on serving what it has."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(60)

    def _watch(self) -> None:
        assert self._check_s is not None
        failing = False
        while not self._stop.wait(self._check_s):
            try:
                for name in self.heal():
                    _log.warning("the engine had lost %s; it is loaded again", name)
                failing = False
            except Exception as error:  # noqa: BLE001 - the next look tries again
                _log.log(logging.DEBUG if failing else logging.ERROR, "the engine cannot be looked after: %s", error)
                failing = True

    # ---- parts of the calls

    def _path(self, name: str) -> str:
        return str(self._server_path / self._folders.folder_of(name).relative_to(self._folders.path).as_posix())

    def _require(self, name: str) -> None:
        if name not in self._loaded or not self._folders.folder_of(name).exists():
            raise BackendError(f"{name} is not held", remedy="load it first")

    def _zero_path(self, zero: str) -> str:
        return str(self._server_path / ZERO_FOLDER / zero)

    def _load_checked(self, name: str, weights: bytes, manifest: Manifest, served: dict[str, str]) -> None:
        """Load a version whose folder is written, and compare what the engine predicts with the learner."""
        self._load_zero(weights, manifest, served)
        self._load_in_engine(name, self._path(name), served)
        self._compare(name, manifest)
        self._loaded.add(name)

    def _load_in_engine(self, name: str, path: str, served: dict[str, str]) -> None:
        """Load an adapter unless the engine lists it, and check the list afterwards.

        Args:
            name: The engine's name of the adapter.
            path: Its folder as the engine sees it.
            served: What the engine listed a moment ago.
        """
        if served.get(name) == path:
            return
        if name in served:  # from another path
            self.api.unload(name)
        self.api.load(name, path)
        found = self.api.served().get(name)
        if found != path:
            raise BackendError(
                "the engine does not serve what it loaded", got=found, allowed=path, remedy="it is tried again"
            )

    def _compare(self, name: str, manifest: Manifest) -> None:
        try:
            difference = compare(name, manifest, self.api, self._tolerance_nats)
        except NonFiniteAnswerError:
            self._overwrite_blocks()
            raise
        _log.debug("%s: the engine differs from the learner by %.4f nats", name, difference)

    def _overwrite_blocks(self) -> None:
        """Compute the probes with the zero adapter until nothing of a NaN is left in the recycled blocks of the cache.

        vLLM hands a block with NaN to the next request of the same length, whose masked attention computes 0 x NaN
        (pull request 50283). Measured: the second request after it at the latest is right again.
        """
        good = 0
        for _ in range(_OVERWRITES):
            try:
                self.api.next_tokens(self.base_name, list(PROBE_TEXTS.values()))
                good += 1
            except BackendError:
                good = 0
            if good == 2:
                return

    def _remove(self, name: str) -> None:
        """Unload a version, wait for requests that had looked its name up, evict it, and delete its folder."""
        self._loaded.discard(name)
        self.api.unload(name)
        end_s = self._clock() + _SETTLE_S
        while self.api.in_use(name):
            if self._clock() >= end_s:
                raise _still_used(name)  # their weights must stay readable: the engine may read them again
            self._sleep(_POLL_S)
        if self._zero is not None and self._spare is not None:
            self.api.evict(self._zero_path(self._spare), (self._zero, *self._active_names()))
        if name in self.api.served():
            raise BackendError("the engine still serves what it unloaded", got=name, remedy="it is tried again")
        self._folders.unload(name)

    def _load_zero(self, weights: bytes, manifest: Manifest, served: dict[str, str]) -> None:
        """Hold an adapter that changes nothing, of the first version's shapes, and lay down a small one to displace with."""
        if not self.api.needs_zero:
            return
        zero = self._zero
        if zero is None:
            self._spare = self._write_zero("spare", smallest_zero_weights(weights), manifest)
            zero = self._write_zero("zero", zero_weights(weights), manifest)
        self._load_in_engine(zero, self._zero_path(zero), served)
        self._zero = zero

    def _write_zero(self, kind: str, zeros: bytes, manifest: Manifest) -> str:
        """Write the folder of an adapter that changes nothing; return its name."""
        config = adapter_config(zeros, manifest, self._folders.base_model_name)
        name = f"{kind}-{digest_of(zeros + config)[7:23]}"
        files = {"adapter_model.safetensors": zeros, "adapter_config.json": config}
        self._folders.write_folder(Path(ZERO_FOLDER) / name, files)
        return name

    def _active_names(self) -> tuple[str, ...]:
        return tuple(name for name in self._folders.list() if self._folders.is_active(name))

    def _read(self, name: str) -> tuple[bytes, Manifest]:
        """Return weights and manifest of a folder, checked by their digests."""
        folder = self._folders.folder_of(name)
        stored = (folder / "manifest.json").read_bytes()
        manifest = Manifest.from_bytes(stored)
        weights = (folder / "adapter_model.safetensors").read_bytes()
        if version_of(stored, manifest)[7:] != name[-64:] or digest_of(weights) != manifest.weights.digest:
            raise IntegrityError(
                "the folder of a version is damaged", got=str(folder), remedy="delete it and start the subscriber again"
            )
        return weights, manifest


def _still_used(name: str) -> BackendError:
    return BackendError(f"requests still use {name}", remedy="deactivate it if it is active, and drain it")


def too_large(rank: int, allowed: object) -> BackendError:
    """Return the error of a version whose rank the engine does not take."""
    return UnfitVersionError(
        "the engine takes no adapter of this rank", got=rank, allowed=allowed,
        remedy="start the engine with a larger --max-lora-rank",
    )  # fmt: skip
