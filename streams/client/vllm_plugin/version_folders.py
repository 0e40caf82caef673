"""Lay versions of the object store down as PEFT folders that vLLM can load. Blocking; for threads.

vLLM reads a folder again, without asking, whenever it has dropped the adapter from its own cache. A folder that it
cannot read then ends the engine. So each process has a folder of its own, in which nothing is deleted but by itself, and
a folder under a version's name never holds anything else.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cachetools import TTLCache

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.finite_weights import check_finite
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import MAX_RECORD_BYTES, AliasState, Claim, parse_record, version_key
from perennial.storage.registry.registry import Registry
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.trust.untrusted import UntrustedVersionError
from perennial.streams.client.trust.version_guard import VersionGuard
from perennial.streams.client.version_source import VersionSource
from perennial.streams.client.vllm_plugin.found_versions import (
    FoundVersion,
    RevokedSharedError,
    RevokedVersionError,
    SharedVersions,
)
from perennial.streams.client.vllm_plugin.requested_names import RequestedName
from perennial.streams.settings.signing_group import SigningSettings

_UNFIT_S = 60.0
"""How long a damaged or unfit version is refused without reading its weights again."""
_LOCK = ".lock"


class VersionFolders:
    """The versions that a vLLM server has loaded by name, as folders. Thread-safe.

    Args:
        open_registry: Opens the registry, at the first request for it.
        root: Folder in which each process makes a folder of its own. Folders of processes that ended are deleted.
        alias: The alias that a name without one follows.
        served_base: Digest or name of the base that the server has. Empty: the name that vLLM gives.
        max_bytes: Most bytes of weights in this process's folder.
        signing: The trusted keys.
        require_own: Raises OtherTenantError for a shared adapter that the server must not serve. By default none.
    """

    def __init__(
        self,
        open_registry: Callable[[], Registry],
        root: Path,
        *,
        alias: str,
        served_base: str,
        max_bytes: int,
        signing: SigningSettings,
        require_own: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._open_registry = open_registry
        self._root = root
        self._alias = alias
        self._served_base = served_base
        self._max_bytes = max_bytes
        self._signing = signing
        self._require_own = require_own
        self._registry: Registry | None = None
        self._guard: VersionGuard | None = None
        self._backend: DirectoryBackend | None = None
        self._bytes: dict[str, int] = {}
        self._composed: dict[str, Manifest] = {}
        self._unfit: TTLCache[str, Exception] = TTLCache(1024, _UNFIT_S)
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    @property
    def total_bytes(self) -> int:
        """Bytes of weights in the folders."""
        with self._lock:
            return sum(self._bytes.values())

    def find(
        self, name: RequestedName, served_model: str, shared_versions: SharedVersions | None = None
    ) -> FoundVersion | None:
        """Return the version that a name stands for now. None if there is none, or if the adapter is retired.

        A version that extends a shared adapter comes with that adapter's live version, if there is one, or with the one
        that the name has.

        Args:
            name: The name.
            served_model: Name of the model that the server has, as vLLM gives it.
            shared_versions: What was read of shared adapters before. None: nothing.

        Raises:
            StoreError: The store does not answer, or the alias or the manifest is damaged.
            UnfitVersionError: The version is revoked, was never promoted, or belongs to another base.
            RevokedSharedError: The live version of the shared adapter is revoked.
            UntrustedVersionError: No trusted key signed the alias or the version, or the alias is an older one.
            OtherTenantError: The shared adapter is none of the tenant's.
        """
        registry, guard = self._opened(), self._opened_guard()
        version, alias, published_s, state = name.version, None, None, None
        # An alias next to a version must exist too: otherwise one version would have any number of names.
        if version is None or name.alias:
            alias = name.alias or self._alias
            state = guard.alias(name.adapter, alias)
            if state is None or state.kind == "retired":
                return None
            if version is None:
                version, published_s = state.version, state.published_at.timestamp()
        if name.version is not None:
            alias = None
            if not self._is_promoted(registry, name.adapter, version):
                return None
        manifest = self._manifest(name.adapter, version, served_model, None if name.version else state)
        if state is not None:
            guard.note(state)
        found = FoundVersion(version, manifest, alias, published_s)
        if name.shared_version is not None:
            return self._with_shared_version(found, name.shared_version, served_model)
        if manifest.extends is not None:
            return self._with_live_shared(found, name.alias or self._alias, served_model, shared_versions)
        return found

    def _manifest(self, adapter: str, version: str, served_model: str, state: AliasState | None) -> Manifest:
        """Return the manifest of a version that may be served; `state` is the alias that names it, if one does."""
        digest = self._served_base if self._served_base.startswith("sha256:") else None
        manifest = VersionSource(self._opened(), adapter, self._opened_guard()).manifest(version, digest, state)
        expected = self._served_base or served_model
        if digest is None and manifest.base_model != expected:
            raise UnfitVersionError(
                f"{version} of {adapter} belongs to another base than the server has", got=manifest.base_model,
                allowed=expected,
                remedy=f"if it is the same model, set PERENNIAL_SERVED_BASE={manifest.base_sha256} for the server",
            )  # fmt: skip
        return manifest

    def _with_shared_version(self, own: FoundVersion, version: str, served_model: str) -> FoundVersion | None:
        """Return a personal version together with a version of its shared adapter; None if there is no such version."""
        adapter = own.manifest.extends
        if adapter is None:
            return None
        self._require_own(adapter)
        if not self._is_promoted(self._opened(), adapter, version):
            return None
        shared = FoundVersion(version, self._manifest(adapter, version, served_model, None), None, None)
        return replace(own, shared=shared)

    def _with_live_shared(
        self, own: FoundVersion, alias: str, served_model: str, shared_versions: SharedVersions | None
    ) -> FoundVersion:
        """Return a personal version together with the live version of its shared adapter; alone if there is none."""
        adapter = own.manifest.extends
        if adapter is None:
            return own
        self._require_own(adapter)
        known = SharedVersions() if shared_versions is None else shared_versions
        try:
            shared = known.get(adapter, alias, lambda: self._live_shared(adapter, alias, served_model))
        except RevokedVersionError as error:
            raise RevokedSharedError(error, own) from error
        return replace(own, shared=shared)

    def _live_shared(self, adapter: str, alias: str, served_model: str) -> FoundVersion | None:
        guard = self._opened_guard()
        state = guard.alias(adapter, alias)
        if state is None or state.kind == "retired":
            return None
        try:
            manifest = self._manifest(adapter, state.version, served_model, state)
        except UntrustedVersionError:
            raise
        except UnfitVersionError as error:
            if not self._opened().is_revoked(adapter, state.seq):
                raise
            raise RevokedVersionError(
                error.message, got=error.got, allowed=error.allowed, remedy=error.remedy
            ) from error
        guard.note(state)
        return FoundVersion(state.version, manifest, alias, state.published_at.timestamp())

    def _is_promoted(self, registry: Registry, adapter: str, version: str) -> bool:
        """Return whether there is such a version. Raise UnfitVersionError where it must not be served."""
        try:
            manifest = registry.manifest(adapter, version)
            claim = parse_record(
                Claim, version_key(adapter, manifest.seq),
                registry.store.get(version_key(adapter, manifest.seq), MAX_RECORD_BYTES).data,
            )  # fmt: skip
        except NotFoundError:
            return False
        if claim.version != version:  # a rebuilt update, or a publish that was interrupted
            return False
        remedy = f"ask for the version that is live: {adapter}"
        if registry.is_revoked(adapter, manifest.seq):
            raise UnfitVersionError(f"{version} of {adapter} is revoked", allowed="other versions", remedy=remedy)
        if manifest.outcome != "promoted":
            raise UnfitVersionError(
                f"{version} of {adapter} was never promoted", got=manifest.outcome, allowed="promoted", remedy=remedy
            )
        return True

    def is_revoked(self, found: FoundVersion) -> bool:
        """Return whether a version was revoked, or the shared one that it is served with.

        Raises:
            StoreError: The store does not answer.
        """
        parts = [found] if found.shared is None else [found, found.shared]
        return any(self._opened().is_revoked(part.manifest.adapter, part.manifest.seq) for part in parts)

    def prepare(self, found: FoundVersion, served_model: str) -> Path:
        """Return the folder of a version. Fetch, check and write the version first, if there is no folder yet.

        Args:
            found: The version.
            served_model: Name of the model that the server has, for `adapter_config.json`.

        Raises:
            StoreError: The store does not answer, or lacks the weights.
            IntegrityError: The weights are not those that the manifest names, or hold NaN or infinite numbers.
            UnfitVersionError: The version cannot be written as a PEFT adapter, or not be put together with its shared
                part.
            BackendError: There is no room under `max_bytes`.
            OSError: The folder cannot be written.
        """
        with self._lock:
            unfit = self._unfit.get(found.digest)
        if unfit is not None:
            raise unfit.with_traceback(None)
        is_new = self._reserve(found.name, found.size_bytes)
        try:
            manifest, weights = self._served_weights(found)
            self._reserve(found.name, len(weights))  # those of two versions may be larger together
            with self._writing:
                backend = self._opened_backend(served_model)
                backend.load(found.name, weights, manifest)
                with self._lock:  # another thread that failed may have taken the count back
                    self._bytes[found.name] = len(weights)
        except BaseException as error:
            with self._lock:
                if is_new:
                    self._bytes.pop(found.name, None)
                    self._composed.pop(found.name, None)
                if isinstance(error, IntegrityError | UnfitVersionError):
                    traceback.clear_frames(error.__traceback__)  # they hold the weights
                    self._unfit[found.digest] = error
            raise
        return backend.folder_of(found.name)

    def held(self) -> list[str]:
        """Return the names, `<adapter>@<64 hex>`, of the versions that have a folder or are being fetched."""
        with self._lock:
            return list(self._bytes)

    def remove(self, name: str) -> None:
        """Delete the folder of a version that vLLM does not know any more.

        Args:
            name: `<adapter>@<64 hex>`.

        Raises:
            OSError: The folder cannot be deleted.
        """
        with self._writing:
            if self._backend is not None:
                self._backend.unload(name)
            with self._lock:
                self._bytes.pop(name, None)
                self._composed.pop(name, None)

    def delete_leftovers(self) -> None:
        """Delete the folders of processes that ended without doing so.

        Raises:
            OSError: The root cannot be read or made.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for lock in self._root.glob(f"*{_LOCK}"):
            try:
                file = lock.open("rb")
            except OSError:  # another process deletes it at the same time
                continue
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _opened(self) -> Registry:
        with self._lock:
            if self._registry is None:
                self._registry = self._open_registry()
            return self._registry

    def _opened_guard(self) -> VersionGuard:
        registry = self._opened()
        with self._lock:
            if self._guard is None:
                self._guard = VersionGuard.of(registry, self._signing)
            return self._guard

    def _opened_backend(self, served_model: str) -> DirectoryBackend:
        """Return the backend that writes into this process's folder; make the folder at the first call."""
        if self._backend is None:
            self.delete_leftovers()
            own = self._root / f"{os.getpid()}-{secrets.token_hex(8)}"
            _locked(own.with_name(f"{own.name}{_LOCK}"))
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            own.mkdir(mode=0o700)
            self._backend = DirectoryBackend(own, base_model_name=served_model)
        return self._backend

    def _reserve(self, name: str, size_bytes: int) -> bool:
        """Count the bytes of a folder, if they are more than were counted for it; return whether none were."""
        with self._lock:
            counted_bytes = self._bytes.get(name)
            if counted_bytes is not None and size_bytes <= counted_bytes:
                return False
            total_bytes = sum(self._bytes.values()) - (counted_bytes or 0) + size_bytes
            if total_bytes > self._max_bytes:
                raise BackendError(
                    "no room for another version in the folder of this server", got=f"{total_bytes} bytes",
                    allowed=f"{self._max_bytes} bytes",
                    remedy="raise PERENNIAL_RESOLVER_MAX_GIB, or set VLLM_PLUGINS=perennial so that versions which are "
                    "not used are deleted",
                )  # fmt: skip
            self._bytes[name] = size_bytes
            return counted_bytes is None

    def _served_weights(self, found: FoundVersion) -> tuple[Manifest, bytes]:
        """Return what the folder of a version gets: its manifest and weights, or those of both parts together."""
        if found.shared is None:
            return found.manifest, self._weights(found)
        from perennial.streams.client.personal.composition import Part, compose  # it needs numpy

        with self._lock:
            manifest = self._composed.get(found.name)
        held = None if manifest is None else self._held_weights(found.name, manifest)
        if manifest is not None and held is not None:
            return manifest, held
        parts = (replace(found, shared=None), found.shared)
        own, shared = (Part(part.version, part.manifest, self._weights(part)) for part in parts)
        composed = compose(own, shared)
        check_finite(composed.weights)
        with self._lock:
            self._composed[found.name] = composed.manifest
        return composed.manifest, composed.weights

    def _held_weights(self, name: str, manifest: Manifest) -> bytes | None:
        """Return the weights in a folder; None where there are none, or others than the manifest names."""
        backend = self._backend
        if backend is None:
            return None
        try:
            held = (backend.folder_of(name) / "adapter_model.safetensors").read_bytes()
        except FileNotFoundError:
            return None
        return held if digest_of(held) == manifest.weights.digest else None

    def _weights(self, found: FoundVersion) -> bytes:
        """Return the checked weights of a version alone, from its folder if there is one."""
        held = self._held_weights(found.name, found.manifest)
        if held is not None:
            return held
        source = VersionSource(self._opened(), found.manifest.adapter, self._opened_guard())
        weights = source.fetch(found.manifest)
        source.verify(found.manifest, weights)
        check_finite(weights)
        return weights


def _locked(path: Path) -> int:
    """Return the descriptor of a new lock file, locked until the process ends.

    Another process may take a lock file that is not locked yet for one of a process that ended, and delete it.
    """
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
