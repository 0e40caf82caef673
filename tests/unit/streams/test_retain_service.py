"""The retain role on a real store, without a broker: what one adapter or one request does to all the others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key, digest_of, stored_name
from perennial.storage.registry.manifest import BlobRef, LearnedExample
from perennial.streams.events.models import Batch, ExampleAccepted, Origin, RetentionRequested, Selector
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain.service import RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.settings import Settings
from perennial.testing import small_weights
from tests.versions import VersionPublisher


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path, fsync=False)


@pytest.fixture
def given(store):
    sent = []

    async def send(event: object, _: str) -> None:
        sent.append(event)

    acks = SimpleNamespace(lagging=lambda *_: [])
    settings = Settings.of(clock_settle_s=0.001, env_file=None)
    return RetainService(settings, Metrics("retain"), StoreFacts(settings, store, acks), send), sent


def learn(store, adapter: str) -> str:
    """A version that learned one example whose life is over; the digest of its micro-batch."""
    example = ExampleAccepted(
        adapter=adapter, example_id="0" * 32, kind="document", document_id="d", learn=True, text="secret",
        retention_class="PT1S",
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=0, timestamp_ms=1),
    )  # fmt: skip
    versions, weights = VersionPublisher(store, adapter), small_weights(1)
    body = Batch(adapter=adapter, cut=0, examples=[example], skipped=[]).model_dump_json(by_alias=True).encode()
    learned = LearnedExample(example_id=example.example_id, partition="p", offset=0, tokens=1)
    ref = BlobRef(digest=digest_of(body), size_bytes=len(body))
    manifest = versions.manifest(weights).model_copy(update={"batch": ref, "learned": [learned]})
    versions.registry.publish(manifest, [weights, body], lambda _: None)
    return ref.digest


def erase(request_id: str) -> RetentionRequested:
    return RetentionRequested(
        request_id=request_id,
        kind="erase",
        adapter="acme/a",
        selector=Selector(subjects=[request_id]),
        requested_by="ann",
    )


def test_a_damaged_micro_batch_stops_the_calendar_of_no_other_adapter(store, given, caplog):
    retention, sent = given
    digest = learn(store, "acme/a")
    learn(store, "acme/b")
    (store.root / stored_name(blob_key(digest))).write_bytes(b"secret, but damaged")
    asyncio.run(retention.tick())
    assert [event.adapter for event in sent if event.type == "forget.requested"] == ["acme/b"]
    (message,) = caplog.messages
    assert "acme/a" in message
    assert digest in message
    assert "secret" not in message
