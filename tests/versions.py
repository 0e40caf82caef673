"""Small adapter versions for tests that need a line of them, and a backend in memory that records what it is asked."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

from perennial.storage.errors import PerennialError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import BlobRef, Manifest
from perennial.storage.registry.registry import AliasState, Registry

BASE = "sha256:" + "b" * 64
_serial = itertools.count()


def safetensors_of(seed: int, rank: int = 2) -> bytes:
    """A tiny safetensors file in PEFT's names; other bytes for another seed."""
    floats = [float(seed), 0.5] * rank
    data = struct.pack(f"<{len(floats)}f", *floats) * 2
    half = len(data) // 2
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    header = {
        f"{stem}.lora_A.weight": {"dtype": "F32", "shape": [rank, 2], "data_offsets": [0, half]},
        f"{stem}.lora_B.weight": {"dtype": "F32", "shape": [2, rank], "data_offsets": [half, 2 * half]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


class Line:
    """Publishes versions of one adapter the way a learner does."""

    def __init__(self, store: ObjectStore, adapter: str = "acme/support", base_sha256: str = BASE) -> None:
        self.store = store
        self.adapter = adapter
        self.base_sha256 = base_sha256
        self.registry = Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC))

    def manifest(self, weights: bytes, kind: str = "update", rank: int = 2, alpha: int = 4) -> Manifest:
        """The manifest of the next version."""
        head = self.registry.head(self.adapter)
        return Manifest(
            adapter=self.adapter,
            seq=head.seq + 1 if head else 1,
            kind=kind,
            outcome="promoted",
            parent=head.version if head else None,
            head=head.version if head else None,
            update_id=digest_of(f"{self.adapter} {next(_serial)}".encode()),
            job_id=f"job-{next(_serial)}",
            base_model="shipped",
            base_sha256=self.base_sha256,
            code="0+test",
            config={"alpha": alpha, "rank": rank},
            seed=0,
            threads=1,
            marks={},
            weights=BlobRef(digest=digest_of(weights), size_bytes=len(weights)),
            rank=rank,
        )

    def publish(self, weights: bytes | None = None, kind: str = "update", rank: int = 2, alpha: int = 4) -> AliasState:
        """Publish the next version; the alias as it then is."""
        weights = safetensors_of(next(_serial)) if weights is None else weights
        manifest = self.manifest(weights, kind, rank, alpha)
        state = self.registry.publish(manifest, [weights], lambda _: None).alias_state
        assert state is not None
        return state


class BackendDownError(PerennialError):
    """A backend that was told to fail."""


class MemoryBackend:
    """A backend without a model: holds names, counts requests, fails where `fails` says so."""

    def __init__(self, base_sha256: str | None = BASE) -> None:
        self.base_sha256 = base_sha256
        self.held: dict[str, bytes] = {}
        self.active: str | None = None
        self.calls: list[tuple[str, str]] = []
        self.busy: set[str] = set()
        self.fails: Callable[[str, str], bool] = lambda _call, _name: False

    def _called(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        if self.fails(call, name):
            raise BackendDownError(f"{call} failed")

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        self._called("load", name)
        self.held[name] = weights

    def warm(self, name: str) -> None:
        self._called("warm", name)

    def activate(self, name: str) -> None:
        self._called("activate", name)
        self.active = name

    def drain(self, name: str, timeout_s: float) -> bool:
        self._called("drain", name)
        return name not in self.busy

    def unload(self, name: str) -> None:
        self._called("unload", name)
        if self.active == name:
            self.active = None
        if name in self.busy:
            raise BackendDownError("requests still use it")
        self.held.pop(name, None)

    def list(self) -> list[str]:
        return sorted(self.held)
