"""Begin a user's adapter with the mean of the adapters of siblings.

The siblings are those that began with the same A and B zero, so that their factors can be averaged one by one, and that
began with nobody's weights but their own: what one of them forgets reaches those who began with it, and stops there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Final

import torch

from perennial.learner.model.lora import AdapterError, Tensors, from_safetensors, is_finite, to_safetensors
from perennial.learner.training.replay_buffer import index_from_bytes
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.dependants import record_dependant
from perennial.storage.registry.manifest import BlobRef, Manifest, OtherVersion, Start
from perennial.storage.registry.registry import Registry

_log = logging.getLogger("perennial.learner")

MIN_FOUNDERS: Final = 4
"""A mean over fewer siblings shows too much of each."""
MAX_FOUNDERS: Final = 16
MAX_LOOKED_AT: Final = 64
"""Most siblings that are looked at for one new adapter; each costs up to three reads."""
MAX_KEYS: Final = 1024
"""Most names that are read for one new adapter: some may be those of adapters further below."""
MIN_EXAMPLES: Final = 8
"""A sibling that has learned fewer examples says little about the forms that people want."""
_ADAPTERS: Final = "adapters/"
_SIBLING: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")


class LearnedStarts:
    """Makes the starts of users' adapters. Thread-safe.

    Args:
        registry: The versions of all adapters.
        shapes: Shape of each LoRA tensor by PEFT name.
        fits: Whether a version has the base, rank, alpha and seed of an adapter that begins now.
    """

    def __init__(
        self, registry: Registry, shapes: Mapping[str, tuple[int, ...]], fits: Callable[[Manifest], bool]
    ) -> None:
        self._registry = registry
        self._shapes = shapes
        self._fits = fits

    def start_of(self, adapter: str, shared: str, alias: str) -> tuple[Start, bytes | None]:
        """Return what a new adapter begins with.

        Args:
            adapter: The new adapter.
            shared: The shared adapter that it extends.
            alias: The alias whose versions of the siblings count.

        Returns:
            The start, and the bytes of its weights; None where too few siblings can be learned from.

        Raises:
            StoreError: The store failed.
        """
        bare = Start(shared=shared)
        able = (sibling for sibling in self._siblings(adapter, shared) if self._live(sibling, bare, alias))
        chosen = list(islice(able, MAX_FOUNDERS))
        found: list[tuple[OtherVersion, Tensors]] = []
        if len(chosen) >= MIN_FOUNDERS:
            for sibling in chosen:
                # Hazard: recorded first. A forgetting revokes versions and then looks who is recorded, so either it finds
                # this adapter, or the version that is read here is one without what was forgotten.
                record_dependant(self._registry.store, sibling, adapter)
                live = self._live(sibling, bare, alias)
                weights = self._weights(live) if live else None
                if live and weights is not None:
                    found.append((_named(live), weights))
        if len(found) < MIN_FOUNDERS:
            return bare, None
        mean = mean_of([weights for _, weights in found])
        if not is_finite(mean):
            _log.warning("%s begins with nothing learned: the mean of %s is not finite", adapter, ", ".join(chosen))
            return bare, None
        body = to_safetensors(mean, adapter)
        ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
        return Start(shared=shared, founders=[founder for founder, _ in found], weights=ref), body

    def _siblings(self, adapter: str, shared: str) -> Iterator[str]:
        """Yield other adapters below the shared one, from the adapter's own name on, and then those before it."""
        folder, own = f"{_ADAPTERS}{shared}/", f"{_ADAPTERS}{adapter}"
        store = self._registry.store
        keys = islice(chain(store.list(folder, own), store.list(folder)), MAX_KEYS)
        names = dict.fromkeys(key.removeprefix(_ADAPTERS) for key in keys)
        siblings = (n for n in names if n != adapter and _SIBLING.fullmatch(n[len(shared) + 1 :]))
        return islice(siblings, MAX_LOOKED_AT)

    def _live(self, sibling: str, bare: Start, alias: str) -> Manifest | None:
        """Return a sibling's live version; None where it cannot be learned from."""
        try:
            state = self._registry.alias(sibling, alias)
            if state is None or state.kind == "retired" or self._registry.is_revoked(sibling, state.seq):
                return None
            manifest = self._registry.manifest(sibling, state.version)
            if manifest.outcome != "promoted" or manifest.start != bare or not self._fits(manifest):
                return None
            learned = 0 if manifest.replay is None else len(index_from_bytes(self._read(manifest.replay)))
        except (NotFoundError, IntegrityError) as error:  # a new adapter does not wait for a repair of another one
            _log.warning("%s is not learned from: %s", sibling, error)
            return None
        return manifest if learned >= MIN_EXAMPLES else None

    def _weights(self, manifest: Manifest) -> Tensors | None:
        try:
            return from_safetensors(self._read(manifest.weights), self._shapes)
        except (NotFoundError, IntegrityError, AdapterError) as error:
            _log.warning("%s is not learned from: %s", manifest.adapter, error)
            return None

    def _read(self, ref: BlobRef) -> bytes:
        return get_blob(self._registry.store, ref.digest)


def _named(manifest: Manifest) -> OtherVersion:
    return OtherVersion(adapter=manifest.adapter, version=manifest.digest(), seq=manifest.seq)


def mean_of(parts: Sequence[Tensors]) -> Tensors:
    """Return the mean of adapters that began with one A, factor by factor.

    Args:
        parts: Weights by PEFT name, at least one.
    """
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
