"""curate's hold on the store and the clock, without a broker: what is kept out, and how long an example waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.quarantine import QuarantineEntry, load_quarantine, update_quarantine
from perennial.streams.curate import agent as curate
from perennial.streams.curate.agent import CurateAgent
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.models import ExampleAccepted, ExampleScored, Origin
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retention.quarantine_filter import text_hash
from perennial.streams.settings import Settings

ADAPTER = "acme/a"
DAY_S = 86_400


class App:
    """What curate asks of a Faust application: it notes what is sent."""

    consumer_generation_id = 1

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.producer = self

    async def send_and_wait(self, topic: str, *_: object) -> None:
        self.sent.append(topic)


def example(number: int) -> ExampleAccepted:
    return ExampleAccepted(
        adapter=ADAPTER, example_id=f"{number:032x}"[::-1], kind="document", document_id=f"d{number}", learn=True,
        text=f"text {number}",
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=number),
    )  # fmt: skip


def delivery(number: int) -> SimpleNamespace:
    event = ExampleScored(example=example(number), tokens=1, base_loss_nats=3.0, live_loss_nats=3.0)
    record = encode(event, event_id=str(number), source="test", occurred_at=curate._now())
    message = SimpleNamespace(
        generation_id=1, tp="scored-examples-0", offset=number, value=record.value, headers=record.headers
    )
    return SimpleNamespace(message=message, ack=lambda: None)


@pytest.fixture
def given(tmp_path):
    settings = Settings.of(max_age_s=0.05, env_file=None)
    store, app = DirectoryStore(tmp_path, fsync=False), App()
    return CurateAgent(app, settings, Metrics("curate"), store), app, store


def test_a_clock_that_is_set_back_keeps_no_example_waiting(given, monkeypatch):
    curation, app, _ = given
    real_ns = curate.time.time_ns

    async def scenario() -> None:
        await curation.receive(delivery(1))
        monkeypatch.setattr(curate.time, "time_ns", lambda: real_ns() - DAY_S * 1_000_000_000)
        await asyncio.sleep(0.1)
        await curation.tick()

    asyncio.run(scenario())
    assert app.sent == ["adapter-jobs"]


def test_a_text_is_kept_out_for_good_by_an_erasure_behind_an_expiry(given):
    curation, _, store = given
    entries = [
        QuarantineEntry(
            request_id=kind, job_id=kind, kind=kind, selector={"document_ids": ["d1"]}, until_ms=1000,
            suppress=kind == "erase",
        )
        for kind in ("expire", "erase")
    ]  # fmt: skip
    for entry in entries:
        update_quarantine(store, ADAPTER, lambda quarantine, entry=entry: quarantine.with_entry(entry))

    async def scenario() -> None:
        await curation.receive(delivery(1))
        await asyncio.sleep(0.1)
        await curation.tick()

    asyncio.run(scenario())
    assert load_quarantine(store, ADAPTER).suppressed == [text_hash(example(1))]
