"""Cache of the live versions' weights, refreshed on a thread of its own so that a slow store does not delay scoring."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from perennial.learner.model.lora import AdapterError, LoraConfig, Tensors, from_safetensors
from perennial.learner.training.personal.shared_versions import VersionsBeneath
from perennial.learner.training.personal.stacking import compose, stacked_config
from perennial.storage.errors import StoreError
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.manifest import OtherVersion
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.observe.metrics import Metrics

_log = logging.getLogger("perennial.scorer")

MAX_CACHED_BYTES = 512 * 1024**2
MAX_CACHED_ADAPTERS = 10_000


@dataclass(frozen=True)
class LiveAdapter:
    """The version that an alias pointed at when it was last read.

    Attributes:
        version: the version; None if there is none or it could not be read.
        generation: the alias's generation; 0 without a version.
        state: the LoRA weights that clients serve; None if there is no version.
        extends: the shared adapter that clients serve it with; None: none.
        wanted_beneath: the version of that one that was live; it is in the weights, unless it did not fit.
        config: rank and alpha of these weights; None: those of the adapter alone.
    """

    version: str | None
    generation: int
    state: Tensors | None
    extends: str | None = None
    wanted_beneath: str | None = None
    config: LoraConfig | None = None

    @property
    def size_bytes(self) -> int:
        """Memory that the weights take, in bytes."""
        return sum(tensor.nbytes for tensor in self.state.values()) if self.state else 0


NO_ADAPTER = LiveAdapter(None, 0, None)


class AdapterCache:
    """Live weights by adapter.

    The cache is bounded both in bytes and in number of adapters. A cachetools cache has one bound only, so this class
    evicts by itself: the least recently used adapter first.

    Args:
        registry: versions and aliases.
        alias: the alias to follow.
        base_sha256: digest of the scorer's base; versions of another base count as missing.
        own: rank and alpha of adapters.
        shapes: shape of each LoRA tensor.
        poll_s: each adapter is read at most once in so many seconds.
        clock: monotonic clock, in seconds.
        metrics: where failed reads are counted.
    """

    def __init__(
        self,
        registry: Registry,
        alias: str,
        base_sha256: str,
        own: LoraConfig,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        poll_s: float,
        clock: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._alias = alias
        self._base_sha256 = base_sha256
        self._own = own
        self._shapes = shapes
        self._shared = VersionsBeneath(registry, base_sha256, own, shapes)
        self._poll_s = poll_s
        self._clock = clock
        self._metrics = metrics
        self._entries: OrderedDict[str, tuple[LiveAdapter, float]] = OrderedDict()
        self._bytes = 0
        self._wanted: dict[str, None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="live-weights", daemon=True)

    def get(self, adapters: Iterable[str], wait_s: float) -> dict[str, LiveAdapter]:
        """Return the live version of each adapter as last read.

        Args:
            adapters: the adapters.
            wait_s: how long to wait, in seconds, for adapters that were never read.

        Returns:
            One entry per adapter; `NO_ADAPTER` if it was not read in time.
        """
        names = list(dict.fromkeys(adapters))
        now = self._clock()
        with self._changed:
            for name in names:
                entry = self._entries.get(name)
                if entry is None or now - entry[1] >= self._poll_s:
                    self._wanted[name] = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: all(name in self._entries for name in names), wait_s)
            for name in names:
                if name in self._entries:
                    self._entries.move_to_end(name)
            return {name: self._entries[name][0] if name in self._entries else NO_ADAPTER for name in names}

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                name = next(iter(self._wanted))
                entry = self._entries.get(name)
            live = self._read(name, entry[0] if entry else NO_ADAPTER)
            with self._changed:
                self._wanted.pop(name, None)
                self._keep(name, live)
                self._changed.notify_all()

    def _read(self, adapter: str, known: LiveAdapter) -> LiveAdapter:
        """Return the alias's version; `NO_ADAPTER` if the read failed: a loss under old weights would look like drift."""
        try:
            state = self._registry.alias(adapter, self._alias)
            if state is None or state.kind == "retired":
                return NO_ADAPTER
            extends = known.extends if state.version == known.version else None
            manifest = None
            if state.version != known.version or known.state is None:
                manifest = self._registry.manifest(adapter, state.version)
                extends = manifest.extends
            shared = self._live_shared(extends) if extends is not None else None
            if manifest is None and (shared.version if shared else None) == known.wanted_beneath:
                return replace(known, generation=state.generation)
            manifest = manifest or self._registry.manifest(adapter, state.version)
            if manifest.base_sha256 != self._base_sha256:
                _log.warning("%s was trained on base %s, not on this scorer's", adapter, manifest.base_sha256)
                return NO_ADAPTER
            data = get_blob(self._registry.store, manifest.weights.digest)
            return self._composed(state, from_safetensors(data, self._shapes), extends, shared)
        except (StoreError, AdapterError) as error:
            self._metrics.store_error("live-weights")
            _log.warning("the live version of %s cannot be loaded: %s", adapter, error)
            return NO_ADAPTER

    def _live_shared(self, extends: str) -> OtherVersion | None:
        """Return the live version of the shared adapter; None where it has none, or it cannot be read."""
        ref = self._shared.live_ref(extends, self._alias)
        return None if ref is None or self._registry.is_revoked(extends, ref.seq) else ref

    def _composed(
        self, state: AliasState, weights: Tensors, extends: str | None, shared: OtherVersion | None
    ) -> LiveAdapter:
        """Return a version as clients serve it: with the shared version, where that fits."""
        wanted = shared.version if shared else None
        beneath = self._shared.recorded(shared) if shared else None
        if beneath is None:
            return LiveAdapter(state.version, state.generation, weights, extends, wanted)
        config = stacked_config(beneath.part.config, self._own)
        composed = compose(beneath.part, weights, self._own)
        return LiveAdapter(state.version, state.generation, composed, extends, wanted, config)

    def _keep(self, name: str, live: LiveAdapter) -> None:
        old = self._entries.pop(name, None)
        self._bytes += live.size_bytes - (old[0].size_bytes if old else 0)
        self._entries[name] = live, self._clock()
        while len(self._entries) > 1 and (self._bytes > MAX_CACHED_BYTES or len(self._entries) > MAX_CACHED_ADAPTERS):
            _, (dropped, _) = self._entries.popitem(last=False)
            self._bytes -= dropped.size_bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)
