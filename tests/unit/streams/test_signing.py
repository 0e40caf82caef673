"""Records between the roles: with a key, only what a role signed is read."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from perennial.streams.events.cloudevents import Encoded, decode, encode
from perennial.streams.events.models import RollbackRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.signing import MAC_HEADER, SIGNED_TOPICS, RecordSigner
from perennial.streams.settings import Settings

KEY, OTHER = "k" * 32, "o" * 32
TOPIC = "adapter-jobs"


def signer(**values: object) -> RecordSigner:
    return RecordSigner(Settings.of(env_file=None, **values))


def record() -> Encoded:
    event = RollbackRequested(job_id="j", adapter="acme/a", requested_by="ann")
    return encode(event, event_id="j", source="test", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))


def refused(by: RecordSigner, topic: str, key: bytes | None, value: bytes | None, headers: object) -> bool:
    try:
        by.verify(topic, key, value, headers)  # type: ignore[arg-type]
    except WireError as error:
        return error.reason == "bad-signature" and KEY not in str(error)
    return False


def test_a_signed_record_is_read_and_every_change_of_it_is_refused() -> None:
    made, sent = signer(internal_key=KEY), record()
    headers = made.sign(TOPIC, sent.key, sent.value, sent.headers)
    assert not refused(made, TOPIC, sent.key, sent.value, headers)
    assert decode(sent.value, headers, TOPIC).event == decode(sent.value, sent.headers, TOPIC).event
    unsigned = [(name, raw) for name, raw in headers if name != MAC_HEADER]
    other_type = [(name, b"forget.requested" if name == "ce_type" else raw) for name, raw in headers]
    for topic, key, value, given in (
        (TOPIC, sent.key, sent.value, unsigned),
        (TOPIC, sent.key, sent.value, None),
        (TOPIC, sent.key, sent.value, [*unsigned, (MAC_HEADER, b"0" * 64)]),
        (TOPIC, sent.key, sent.value, [*unsigned, (MAC_HEADER, None)]),
        (TOPIC, sent.key, sent.value, [*headers, (MAC_HEADER, b"0" * 64)]),
        (TOPIC, sent.key, sent.value, [*headers, ("ce_type", b"x")]),
        (TOPIC, sent.key, sent.value, other_type),
        (TOPIC, sent.key + sent.value[:1], sent.value[1:], headers),
        (TOPIC, None, sent.value, headers),
        (TOPIC, sent.key, sent.value + b" ", headers),
        (TOPIC, sent.key, None, headers),
        ("examples", sent.key, sent.value, headers),
    ):
        assert refused(made, topic, key, value, given)
    assert refused(signer(internal_key=KEY, topic_prefix="other-"), TOPIC, sent.key, sent.value, headers)


def test_a_key_is_replaced_while_records_of_the_one_before_are_read() -> None:
    old, new = signer(internal_key=OTHER), signer(internal_key=KEY, internal_key_previous=OTHER)
    sent = record()
    assert not refused(new, TOPIC, sent.key, sent.value, old.sign(TOPIC, sent.key, sent.value, sent.headers))
    assert refused(old, TOPIC, sent.key, sent.value, new.sign(TOPIC, sent.key, sent.value, sent.headers))


def test_without_a_key_nothing_is_signed_and_nothing_refused() -> None:
    off, sent = signer(), record()
    assert not off.enabled
    assert off.sign(TOPIC, sent.key, sent.value, sent.headers) == sent.headers
    assert not refused(off, TOPIC, sent.key, sent.value, [(MAC_HEADER, b"anything")])


@pytest.mark.parametrize("topic", ["documents", "interactions", "retention", "adapter-updates", "dead-letters"])
def test_topics_that_others_read_or_write_carry_no_signature(topic: str) -> None:
    made, sent = signer(internal_key=KEY), record()
    assert topic not in SIGNED_TOPICS
    assert made.sign(topic, sent.key, sent.value, sent.headers) == sent.headers
    assert not refused(made, topic, sent.key, sent.value, sent.headers)


def test_a_message_of_faust_has_what_is_verified() -> None:
    made, sent = signer(internal_key=KEY), record()
    message = SimpleNamespace(key=sent.key, value=sent.value, headers=made.sign(TOPIC, *sent))
    assert not refused(made, TOPIC, message.key, message.value, message.headers)
