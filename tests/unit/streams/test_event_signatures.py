"""Signatures of events: over the type and every field, as they are on the wire."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterRetired, BaseRef, Learned
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.kafka.event_signatures import check_event, signed_event
from tests.keys import Keys

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys")


def event(kind=AdapterPromoted):
    return kind(
        adapter="acme/support", generation=7, version=DIGEST, seq=3, manifest_uri="m", weights_uri="w",
        weights_sha256=DIGEST, weights_bytes=5, rank=4, base=BaseRef(model="b", sha256=DIGEST),
        learned=Learned(examples=1, tokens=2, from_=datetime(2026, 1, 1, tzinfo=UTC)), gate={"gain_nats": 0.1, "ok": True},
        reason="größer", published_at=datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    )  # fmt: skip


def record(made):
    return encode(made, event_id="e", source="test", occurred_at=datetime.now(UTC))


def refused(keys, made, value):
    with pytest.raises(SignatureError) as raised:
        check_event(made, value, keys.readers)
    return raised.value.reason


def test_a_signed_event_is_accepted_as_it_was_sent_and_by_nobody_else(keys):
    signed = signed_event(event(), keys.owner)
    sent = record(signed)
    read = decode(sent.value, sent.headers, "adapter-updates").event
    check_event(read, sent.value, keys.readers)
    assert read == signed
    assert signed_event(event(), keys.owner) == signed, "sent again it has the same bytes"
    assert refused(keys, event(), record(event()).value) == "unsigned"
    assert (
        refused(keys, signed_event(event(), keys.stranger), record(signed_event(event(), keys.stranger)).value)
        == "unknown-key"
    )
    assert signed_event(event(), Trust()) == event()
    check_event(event(), record(event()).value, Trust())


def test_any_other_field_and_the_type_are_covered(keys):
    value = orjson.loads(record(signed_event(event(), keys.owner)).value)
    for name, other in (
        ("generation", 8), ("adapter", "acme/other"), ("alias", "canary"), ("version", "sha256:" + "b" * 64), ("gate", {}),
        ("published_at", "2027-01-01T00:00:00Z"), ("reason", "x"), ("a_later_field", 1),
    ):  # fmt: skip
        changed = orjson.dumps({**value, name: other})
        assert refused(keys, AdapterPromoted.model_validate_json(changed), changed) == "forged"
    as_other_type = orjson.dumps(value)
    assert refused(keys, AdapterRetired.model_validate_json(as_other_type), as_other_type) == "forged"


def test_a_field_of_a_later_release_is_covered_and_accepted(keys):
    """A later writer signs fields that this reader does not know."""
    fields = {**orjson.loads(record(event()).value), "a_later_field": [1, 2]}
    fields.pop("signature")
    body = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    signature = keys.owner.sign("application/vnd.perennial.event.v1+json; type=adapter.promoted", body)
    value = orjson.dumps({**fields, "signature": signature})
    check_event(AdapterPromoted.model_validate_json(value), value, keys.readers)


def test_two_fields_of_one_name_cannot_be_read_in_two_ways(keys):
    """A reader that takes the first of them, and one that takes the last, must not differ."""
    value = record(signed_event(event(), keys.owner)).value
    twice = b'{"generation":9,' + value[1:]
    read = AdapterPromoted.model_validate_json(twice)
    assert read.generation == 7
    check_event(read, twice, keys.readers)
    assert refused(keys, read.model_copy(update={"generation": 9}), twice) == "forged"


@pytest.mark.parametrize("value", [b"", b"[]", b"null", b'{"adapter":1}', b"\xff"])
def test_a_value_in_another_form_is_refused(keys, value):
    assert refused(keys, signed_event(event(), keys.owner), value) == "forged"
