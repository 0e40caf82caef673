"""Long histories and many adapters, written as objects in the real formats, for tests and benchmarks of scale."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from perennial.learner.versions.history import complete_index, index_version, load_history
from perennial.storage.objects.keys import digest_of, hex_of
from perennial.storage.objects.object_store import ObjectStore, put_blob
from perennial.storage.registry.manifest import BlobRef, LearnedExample, Manifest
from perennial.storage.registry.records import AliasState, Claim, alias_key, version_key
from perennial.storage.registry.registry import Registry
from perennial.streams.client.testing import BASE_SHA256
from perennial.streams.events.models import Batch
from tests import tiny


def registry_of(store: ObjectStore) -> Registry:
    """Return a registry as a process has it that has just started."""
    return Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC))


def extend_history(store: ObjectStore, adapter: str, count: int, **document: Any) -> None:
    """Add versions that each learned one document of their own; they take over the weights of the newest version.

    Args:
        store: The store; the adapter has at least one version.
        adapter: The adapter.
        count: How many versions.
        document: Further fields of the documents.
    """
    registry = registry_of(store)
    head = registry.head(adapter)
    assert head is not None
    manifest, version = head.manifest, head.version
    for _ in range(count):
        manifest = _next(store, manifest, version, document)
        version = registry.record(manifest)
        claim = Claim(version=version).to_bytes()
        store.put_if_absent(f"updates/{adapter}/{hex_of(manifest.update_id)}", claim)
        store.put_if_absent(version_key(adapter, manifest.seq), claim)
    registry.swap_alias(manifest, version)
    history = load_history(registry_of(store), adapter)
    assert history is not None
    complete_index(registry, adapter, history)


def write_adapter(store: ObjectStore, adapter: str, weights: BlobRef) -> None:
    """Write an adapter with one version that learned one document.

    Args:
        store: The store.
        adapter: The adapter.
        weights: Weights that are stored already.
    """
    example = tiny.document(0, f"text of {adapter}", adapter=adapter)
    body = Batch(adapter=adapter, cut=0, examples=[example], skipped=[]).model_dump_json(by_alias=True).encode()
    manifest = Manifest.model_construct(
        adapter=adapter, seq=1, kind="update", outcome="promoted", parent=None, head=None,
        update_id=digest_of(f"update {adapter}".encode()), job_id=f"{adapter}-0", base_model="tiny",
        base_sha256=BASE_SHA256, code="0+synthetic", config={"alpha": 8, "rank": 4}, seed=0, threads=1, cut=0,
        next_cut=1, batch=BlobRef.model_construct(digest=put_blob(store, body), size_bytes=len(body)),
        learned=[_learned(0, example.example_id)], marks={example.origin.partition_key(): 0}, weights=weights, rank=4,
    )  # fmt: skip
    version = digest_of(manifest.to_bytes())
    store.put_if_absent(f"manifests/{adapter}/{hex_of(version)}.json", manifest.to_bytes())
    claim = b'{"version":"' + version.encode() + b'"}'
    store.put_if_absent(version_key(adapter, 1), claim)
    store.put_if_absent(f"adapters/{adapter}", b"{}")
    alias = AliasState.model_construct(
        adapter=adapter, alias="live", generation=1, version=version, seq=1, kind="promoted", previous_version=None,
        reason="", published_at=datetime(2026, 1, 1, tzinfo=UTC), nonce="n",
    )  # fmt: skip
    store.put_if_absent(alias_key(adapter, "live"), alias.to_bytes())
    index_version(registry_of(store), version, manifest)


def _next(store: ObjectStore, before: Manifest, version: str, document: dict[str, Any]) -> Manifest:
    number = max(before.marks.values(), default=-1) + 1
    example = tiny.document(number, f"synthetic text {number}", adapter=before.adapter, **document)
    cut = (before.cut or 0) + 1
    body = (
        Batch(adapter=before.adapter, cut=cut, examples=[example], skipped=[]).model_dump_json(by_alias=True).encode()
    )
    at_ms = example.origin.timestamp_ms
    return before.model_copy(
        update={
            "seq": before.seq + 1, "parent": version, "head": version, "cut": cut, "next_cut": cut + 1,
            "update_id": digest_of(f"{before.adapter} {cut}".encode()), "job_id": f"{before.adapter}-{cut}",
            "batch": BlobRef(digest=put_blob(store, body), size_bytes=len(body)),
            "learned": [_learned(number, example.example_id)], "marks": {example.origin.partition_key(): number},
            "published_from_ms": at_ms, "published_to_ms": at_ms,
        }
    )  # fmt: skip


def _learned(number: int, example_id: str) -> LearnedExample:
    partition = tiny.origin(0).partition_key()
    return LearnedExample(example_id=example_id, partition=partition, offset=number, tokens=4)
