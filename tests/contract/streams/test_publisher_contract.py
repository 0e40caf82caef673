"""One suite for every publisher: the in-memory double, and the real one on a real broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from perennial.streams.client.base_publisher import BasePublisher, Delivery, PublishError
from perennial.streams.client.publisher import Publisher
from perennial.streams.events.fields import Event
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from perennial.testing import MemoryPublisher
from tests.faults.parts import envelopes

ADAPTER = "acme/support"
PREFIX = "of-memory-"


@dataclass
class Case:
    """A publisher, the prefix of its topics, and a look from outside at what was published to a topic."""

    publisher: BasePublisher
    prefix: str
    published: Callable[[str], list[Event]]


@pytest.fixture(params=["memory", "kafka"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param == "memory":
        memory = MemoryPublisher(topic_prefix=PREFIX)
        yield Case(memory, PREFIX, lambda topic: [event for event in memory.events if event.topic == topic])
        memory.close()
        return
    broker, prefix = request.getfixturevalue("broker"), request.getfixturevalue("topic_prefix")
    settings = Settings.of(kafka=broker.bootstrap, topic_prefix=prefix, partitions=1, env_file=None)
    provision(settings)
    publisher = Publisher(settings=settings)
    yield Case(publisher, prefix, lambda topic: [envelope.event for envelope in envelopes(settings, topic)])
    publisher.close()


def test_events_arrive_in_order_in_the_topic_of_their_type(case: Case):
    publisher = case.publisher
    receipts = [
        publisher.document(adapter=ADAPTER, document_id="d1", text="Grüße 👋", subjects=["ada"]),
        publisher.document(adapter=ADAPTER, document_id="d2", text="x"),
        publisher.interaction(adapter=ADAPTER, interaction_id="i1", prompt="When?", response="Never.", rating=-1),
        publisher.retention(
            request_id="r1", kind="erase", adapter=ADAPTER, requested_by="ada", selector={"document_ids": ["d1"]}
        ),
        publisher.publish(DocumentObserved(adapter=ADAPTER, document_id="d3", text="y")),
    ]
    publisher.flush(30)
    assert [receipt.result(120) for receipt in receipts] == [
        Delivery(f"{case.prefix}{topic}", 0, offset)
        for topic, offset in (
            ("documents", 0),
            ("documents", 1),
            ("interactions", 0),
            ("retention", 0),
            ("documents", 2),
        )
    ]
    assert all(receipt.done for receipt in receipts)
    assert case.published("documents") == [
        DocumentObserved(adapter=ADAPTER, document_id="d1", text="Grüße 👋", subjects=["ada"]),
        DocumentObserved(adapter=ADAPTER, document_id="d2", text="x"),
        DocumentObserved(adapter=ADAPTER, document_id="d3", text="y"),
    ]
    assert case.published("interactions") == [
        InteractionObserved(adapter=ADAPTER, interaction_id="i1", prompt="When?", response="Never.", rating=-1)
    ]
    assert case.published("retention") == [
        RetentionRequested(
            request_id="r1", kind="erase", adapter=ADAPTER, requested_by="ada", selector=Selector(document_ids=["d1"])
        )
    ]


def test_the_same_content_has_the_same_id(case: Case):
    def publish(document_id: str) -> str:
        return case.publisher.document(adapter=ADAPTER, document_id=document_id, text="x").event_id

    assert publish("d1") == publish("d1") != publish("d2")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapter": "Acme Support"}, "adapter"),
        ({"text": ""}, "text"),
        ({"text": "\x00" * 200_000}, "size of the value"),
        ({"txet": "misspelt"}, "txet"),
        ({"document_id": "\x1b]0;PWNED"}, r"document_id.*\\x1b.*U\+001B"),
    ],
)
def test_an_event_that_is_not_valid_is_refused_and_nothing_is_sent(case: Case, fields: dict[str, Any], named: str):
    with pytest.raises(PublishError, match=named) as caught:
        case.publisher.document(**{"adapter": ADAPTER, "document_id": "d1", "text": "x", **fields})
    assert caught.value.allowed
    assert "nothing was sent" in caught.value.remedy
    assert case.published("documents") == []


def test_a_closed_publisher_takes_nothing(case: Case):
    with case.publisher as publisher:
        receipt = publisher.document(adapter=ADAPTER, document_id="d1", text="x")
    assert receipt.done
    publisher.close()
    with pytest.raises(PublishError, match="closed"):
        publisher.document(adapter=ADAPTER, document_id="d2", text="x")


def test_the_error_that_ends_the_block_is_the_one_that_is_raised(case: Case):
    with pytest.raises(ZeroDivisionError), case.publisher:
        _ = 1 // 0


def test_deliveries_that_a_test_lets_fail_are_reported_by_the_receipt_and_by_close():
    publisher = MemoryPublisher()
    publisher.fails = lambda event: isinstance(event, DocumentObserved) and event.document_id == "d2"
    receipts = [publisher.document(adapter=ADAPTER, document_id=f"d{n}", text="x") for n in (1, 2, 3)]
    assert receipts[2].result().offset == 1
    with pytest.raises(PublishError, match="not acknowledged"):
        receipts[1].result()
    with pytest.raises(PublishError, match="1 of 3"):
        publisher.close()
