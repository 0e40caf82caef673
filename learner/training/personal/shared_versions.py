"""The versions of shared adapters that users' adapters are trained over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache

from perennial.learner.model.lora import AdapterError, LoraConfig, from_safetensors
from perennial.learner.training.personal.layered_lora import shapes_of_rank
from perennial.learner.training.personal.stacking import SharedPart, stacked_config
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.dependants import record_dependant
from perennial.storage.registry.manifest import OtherVersion
from perennial.storage.registry.registry import Registry

_log = logging.getLogger("perennial.learner")
_CACHED: Final = 8
"""Shared versions that stay in memory: those of the tenants that learn at the time."""


@dataclass(frozen=True)
class VersionBeneath:
    """A version of a shared adapter, with its weights.

    Attributes:
        ref: Names it.
        part: Rank, alpha and weights.
    """

    ref: OtherVersion
    part: SharedPart


class VersionsBeneath:
    """Reads shared versions that fit beneath the adapters of a learner. Thread-safe.

    Args:
        registry: The versions of all adapters.
        base_sha256: Digest of the learner's base.
        own: Rank and alpha of the adapters that lie over them.
        shapes: Shape of each tensor of such an adapter by PEFT name.
    """

    def __init__(
        self, registry: Registry, base_sha256: str, own: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._registry = registry
        self._base_sha256 = base_sha256
        self._own = own
        self._shapes = shapes
        self._parts: LRUCache[str, SharedPart] = LRUCache(_CACHED)
        self._lock = threading.Lock()

    def live(self, adapter: str, shared: str, alias: str) -> VersionBeneath | None:
        """Return the live version of the shared adapter; None where none can lie beneath.

        Args:
            adapter: The adapter that is to be trained over it.
            shared: The shared adapter.
            alias: The alias that says which version is live.

        Raises:
            StoreError: The store failed.
        """
        # Hazard: recorded first. A forgetting revokes versions and then looks who is recorded, so either it finds this
        # adapter, or the version that is read here is one without what was forgotten.
        record_dependant(self._registry.store, shared, adapter)
        ref = self.live_ref(shared, alias)
        return None if ref is None else self._usable(ref)

    def live_ref(self, shared: str, alias: str) -> OtherVersion | None:
        """Return the name of the live version of a shared adapter; None where it has none, or the alias is damaged.

        Args:
            shared: The shared adapter.
            alias: The alias that says which version is live.

        Raises:
            StoreError: The store failed.
        """
        try:
            state = self._registry.alias(shared, alias)
        except IntegrityError as error:
            _log.warning("%s is left out beneath its users' adapters: %s", shared, error)
            return None
        if state is None or state.kind == "retired":
            return None
        return OtherVersion(adapter=shared, version=state.version, seq=state.seq)

    def recorded(self, ref: OtherVersion) -> VersionBeneath | None:
        """Return a shared version that an earlier update was trained over; None where it is revoked or collected.

        Raises:
            StoreError: The store failed.
        """
        return self._usable(ref)

    def _usable(self, ref: OtherVersion) -> VersionBeneath | None:
        with self._lock:
            part = self._parts.get(ref.version)
        try:
            # Also where it is in memory: what is trained follows from the store alone, and nothing from what was forgotten.
            gone = self._registry.is_revoked(ref.adapter, ref.seq) or not self._is_stored(ref)
        except (NotFoundError, IntegrityError):
            gone = True
        if gone:
            with self._lock:
                self._parts.pop(ref.version, None)
            return None
        if part is None:
            try:
                part = self._read(ref)
            except NotFoundError:  # its weights were collected since
                return None
            except (AdapterError, IntegrityError) as error:  # users do not wait for the repair of the shared adapter
                _log.warning("%s of %s cannot lie beneath another adapter: %s", ref.version, ref.adapter, error)
                return None
            if part is None:
                return None
            with self._lock:
                self._parts[ref.version] = part
        return VersionBeneath(ref, part)

    def _is_stored(self, ref: OtherVersion) -> bool:
        manifest = self._registry.manifest(ref.adapter, ref.version)
        return self._registry.store.exists(blob_key(manifest.weights.digest))

    def _read(self, ref: OtherVersion) -> SharedPart | None:
        manifest = self._registry.manifest(ref.adapter, ref.version)
        if manifest.base_sha256 != self._base_sha256 or manifest.outcome != "promoted":
            return None
        alpha = manifest.config.get("alpha")
        config = LoraConfig(manifest.rank, alpha if isinstance(alpha, int) else self._own.alpha)
        stacked_config(config, self._own)  # raises where no whole alpha gives the scale of both
        body = get_blob(self._registry.store, manifest.weights.digest)
        return SharedPart(config, from_safetensors(body, shapes_of_rank(self._shapes, config.rank)))
