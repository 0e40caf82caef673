"""In-memory doubles for your own tests: a publisher and a backend that need no broker, no model and no disk.

They pass the same contract tests as the real ones. `publish_version` puts a small version into a store, for tests that
run a `Subscriber`. Users import all of them from `perennial.testing`.
"""

from __future__ import annotations

import itertools
import json
import struct
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import BlobRef, Manifest
from perennial.storage.registry.registry import LIVE, Registry
from perennial.streams.client.backend import BackendError
from perennial.streams.client.base_publisher import BasePublisher, Delivery, PublishError, Receipt
from perennial.streams.events.cloudevents import Encoded
from perennial.streams.events.fields import Event

BASE_SHA256 = "sha256:" + "b" * 64
"""Digest of the base that the versions of `publish_version` name; no model has it."""

_serial = itertools.count()


class MemoryBackend:
    """A `Backend` that holds versions in memory and serves nothing.

    It keeps the rules of a real backend: only weights that are safetensors are taken, only a version that is held can
    be activated, and a version in use is not unloaded.

    >>> from perennial.testing import MemoryBackend, small_weights
    >>> backend = MemoryBackend()
    >>> name = f"acme/support@{'0' * 64}"
    >>> backend.load(name, small_weights(), manifest=None)
    >>> backend.activate(name)
    >>> backend.active == name, backend.list() == [name], [call for call, _ in backend.calls]
    (True, True, ['load', 'activate'])

    Args:
        base_sha256: Digest of the base that the backend claims to serve. None: it accepts versions of every base.

    Attributes:
        held: Weights of the versions held, by name.
        active: Name of the version activated last, or None.
        calls: Name of each call and of its version, in order. Failed calls are in it, `list` is not.
        busy: Names that requests use, for you to fill: `drain` returns False for them and `unload` raises.
        fails: Called with the name of each call and of its version; return True to make the call raise BackendError.
    """

    def __init__(self, base_sha256: str | None = None) -> None:
        self.base_sha256 = base_sha256
        self.held: dict[str, bytes] = {}
        self.active: str | None = None
        self.calls: list[tuple[str, str]] = []
        self.busy: set[str] = set()
        self.fails: Callable[[str, str], bool] = lambda _call, _name: False

    def load(self, name: str, weights: bytes, manifest: Manifest | None) -> None:  # noqa: ARG002 - of the protocol
        """Keep the weights. Raises IntegrityError if they are not safetensors."""
        self._record("load", name)
        check_safetensors(weights)
        self.held[name] = weights

    def warm(self, name: str) -> None:
        """Do nothing. Raises BackendError if the version is not held."""
        self._record("warm", name)
        self._require(name)

    def activate(self, name: str) -> None:
        """Make the version the active one. Raises BackendError if it is not held."""
        self._record("activate", name)
        self._require(name)
        self.active = name

    def deactivate(self, name: str) -> None:
        """Make no version the active one, if this one is."""
        self._record("deactivate", name)
        if self.active == name:
            self.active = None

    def drain(self, name: str, timeout_s: float) -> bool:  # noqa: ARG002 - it does not wait
        """Return whether the version is not in `busy`; the double does not wait."""
        self._record("drain", name)
        return name not in self.busy

    def unload(self, name: str) -> None:
        """Drop the version. Raises BackendError while it is in `busy`, and changes nothing then."""
        self._record("unload", name)
        if name in self.busy:
            raise BackendError(f"requests still use {name}", remedy="drain it first")
        if self.active == name:
            self.active = None
        self.held.pop(name, None)

    def list(self) -> list[str]:
        """Return the names held."""
        return sorted(self.held)

    def _record(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        if self.fails(call, name):
            raise BackendError(f"{call} failed, as the test asked")

    def _require(self, name: str) -> None:
        if name not in self.held:
            raise BackendError(f"{name} is not held", remedy="load it first")


class MemoryPublisher(BasePublisher):
    """A publisher with the methods of `Publisher` that checks and encodes events alike, and keeps them in a list.

    >>> from perennial.testing import MemoryPublisher
    >>> with MemoryPublisher() as publisher:
    ...     receipt = publisher.document(adapter="acme/support", document_id="faq-7", text="Refunds take two days.")
    >>> publisher.events[0].text
    'Refunds take two days.'
    >>> receipt.result()
    Delivery(topic='documents', partition=0, offset=0)

    Thread-safe.

    Args:
        topic_prefix: Put before every topic's name, as PERENNIAL_TOPIC_PREFIX is.
        source: The CloudEvents `source` of every event.
        now: The wall clock.

    Attributes:
        events: The events that were taken, in order.
        fails: Called with each event; return True to make its delivery fail.
    """

    def __init__(
        self,
        *,
        topic_prefix: str = "",
        source: str = "perennial-sdk",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(source, now)
        self.events: list[Event] = []
        self.fails: Callable[[Event], bool] = lambda _event: False
        self._topic_prefix = topic_prefix
        self._ends: dict[str, int] = {}
        self._failed = 0
        self._closed = False
        self._lock = threading.Lock()

    def _send(self, event: Event, encoded: Encoded, event_id: str) -> Receipt:  # noqa: ARG002 - nothing is sent
        topic = f"{self._topic_prefix}{event.topic}"
        with self._lock:
            if self._closed:
                raise PublishError("the publisher is closed", remedy="publish before close() or the end of `with`")
            self.events.append(event)
            if self.fails(event):
                self._failed += 1
                return _MemoryReceipt(event_id, None)
            offset = self._ends.get(topic, 0)
            self._ends[topic] = offset + 1
        return _MemoryReceipt(event_id, Delivery(topic, 0, offset))

    def flush(self, timeout_s: float | None = None) -> None:
        """Return at once: every event was delivered or has failed when it was published."""

    def close(self) -> None:
        """Close. Raises PublishError if the delivery of an event failed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._failed:
            raise PublishError(
                f"{self._failed} of {len(self.events)} events were not delivered",
                got="deliveries that the test let fail",
                remedy="publish them again: a repeat is dropped by its content",
            )


class _MemoryReceipt(Receipt):
    def __init__(self, event_id: str, delivery: Delivery | None) -> None:
        super().__init__(event_id)
        self._delivery = delivery

    @property
    def done(self) -> bool:
        return True

    def result(self, timeout_s: float = 30.0) -> Delivery:  # noqa: ARG002 - it does not wait
        if self._delivery is None:
            raise PublishError("the event was not acknowledged", got="a delivery that the test let fail")
        return self._delivery


def publish_version(
    store: str | ObjectStore,
    adapter: str,
    *,
    weights: bytes | None = None,
    alias: str = LIVE,
    base_sha256: str = BASE_SHA256,
) -> str:
    """Publish the next version of an adapter in the steps of a learner, and point the alias at it.

    Args:
        store: The object store or its address.
        adapter: Name of the adapter.
        weights: The LoRA weights as a safetensors file. Default: `small_weights`, others at each call.
        alias: The alias to move.
        base_sha256: Digest of the base that the version names.

    Returns:
        Digest of the version's manifest, `sha256:<64 hex>`.
    """
    opened = open_store(store) if isinstance(store, str) else store
    registry = Registry(opened)
    weights = small_weights(next(_serial)) if weights is None else weights
    manifest = next_manifest(registry, adapter, weights, base_sha256=base_sha256)
    registry.publish(manifest, [weights], lambda _: None, alias)
    return manifest.digest()


def small_weights(seed: int = 0, rank: int = 2) -> bytes:
    """Return a safetensors file with one LoRA module, named as in a PEFT adapter file.

    Args:
        seed: Another seed gives other bytes.
        rank: Rank of the LoRA matrices A (rank, 2) and B (2, rank).
    """
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


def next_manifest(
    registry: Registry,
    adapter: str,
    weights: bytes,
    *,
    kind: str = "update",
    rank: int = 2,
    alpha: int = 4,
    base_sha256: str = BASE_SHA256,
) -> Manifest:
    """Return a manifest for weights that follow the adapter's newest version and learned nothing.

    Args:
        registry: The registry that holds the adapter's versions.
        adapter: Name of the adapter.
        weights: The LoRA weights as a safetensors file.
        kind: How the version came about, for example `update`, `forget` or `rollback`.
        rank: LoRA rank that the manifest names.
        alpha: LoRA alpha that the manifest names.
        base_sha256: Digest of the base that the manifest names.
    """
    head = registry.head(adapter)
    number = next(_serial)
    return Manifest.model_validate(
        {
            "adapter": adapter, "seq": head.seq + 1 if head else 1, "kind": kind, "outcome": "promoted",
            "parent": head.version if head else None, "head": head.version if head else None,
            "update_id": digest_of(f"{adapter} {number} {uuid4()}".encode()), "job_id": f"job-{number}",
            "base_model": "shipped", "base_sha256": base_sha256, "code": "0+test",
            "config": {"alpha": alpha, "rank": rank}, "seed": 0, "threads": 1, "marks": {},
            "weights": BlobRef(digest=digest_of(weights), size_bytes=len(weights)), "rank": rank,
        }
    )  # fmt: skip
