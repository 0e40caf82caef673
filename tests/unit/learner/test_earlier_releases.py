"""Records that earlier releases wrote are read with what they meant; what a later one wrote is read, or refused as a whole.

Each file of data/earlier_records was written by the code of the commit that it is named after.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from perennial.learner.training.recipe import Recipe, UnknownFieldError
from perennial.storage.errors import IntegrityError
from perennial.storage.registry.manifest import SCHEMA_VERSION, Manifest
from perennial.storage.registry.records import AliasState, parse_record
from perennial.streams.events.cloudevents import binary_headers, decode
from perennial.streams.events.models import Batch
from perennial.streams.events.wire_error import WireError

FILES = sorted((Path(__file__).parent / "data/earlier_records").glob("*.json"))
NEXT: dict[str, Any] = {"next_field": {"a": 1}, "next_list": ["x", 2]}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def records(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text("utf-8"))


def test_there_are_records_of_several_releases() -> None:
    assert len(FILES) >= 4


def test_a_manifest_keeps_its_id(records: dict[str, Any]) -> None:
    data = records["manifest"].encode()
    read = Manifest.from_bytes(data)
    assert (read.to_bytes(), read.digest()) == (data, records["version"])
    assert read.learned[0].origin_offset == ("cluster/topic/documents/0", read.learned[0].epoch, 3)
    assert (read.gate.held_out_before, read.gate.held_out_after) == (3.25, 2.5)


def test_a_recipe_of_before_is_trained_as_it_was(records: dict[str, Any]) -> None:
    """What a recipe does not name has the value with which it changes nothing."""
    config = json.loads(records["manifest"])["config"]
    read = Recipe.recorded(config)
    assert {name: value for name, value in read.config().items() if name in config} == config
    later = read.config().keys() - config.keys()
    neutral = {
        "gentler_tries": 0, "correction_passes": 0, "slow_average": 0.0, "merge_share": 0.0, "max_noise_nats": 0.0,
        "correction_votes": "off", "correction_check_steps": 1, "rehearse_update": False, "shared_passes": False,
        "replay_places": "examples", "replay_bytes": 0,
    }  # fmt: skip
    assert {name: read.config()[name] for name in later & neutral.keys()} == {
        n: neutral[n] for n in later & neutral.keys()
    }
    with pytest.raises(UnknownFieldError, match="next_setting"):
        Recipe.recorded({**config, "next_setting": 0.5})


def test_an_alias_is_written_back_as_it_was(records: dict[str, Any]) -> None:
    data = records["alias"].encode()
    read = parse_record(AliasState, "aliases/acme/support/live", data)
    assert (read.to_bytes(), read.version) == (data, records["version"])


def test_events_and_micro_batches_are_read(records: dict[str, Any]) -> None:
    for topic, events in records["events"].items():
        for event_type, body in events:
            for more in ({}, NEXT):
                event = read_event(topic, event_type, {**body, **more})
                assert event.adapter == "acme/support"
    batch = Batch.model_validate(records["batch"])
    assert [example.text for example in batch.examples] == ["the blue parrot sings"]


def read_event(topic: str, event_type: str, body: dict[str, Any]) -> Any:
    from datetime import UTC, datetime

    headers = binary_headers(event_type, event_id="1", source="test", occurred_at=datetime(2026, 1, 2, tzinfo=UTC))
    return decode(json.dumps(body).encode(), headers, topic).event


def test_an_event_of_an_unknown_type_is_refused_with_its_reason(records: dict[str, Any]) -> None:
    """A job of a later release goes to the dead letters, from which it can be sent again; the other jobs go on."""
    (_, body), *_ = records["events"]["adapter-jobs"]
    with pytest.raises(WireError) as raised:
        read_event("adapter-jobs", "next.requested", body)
    assert raised.value.reason == "unknown-type"


def test_a_manifest_of_the_next_release_is_read_and_one_after_it_is_not(records: dict[str, Any]) -> None:
    content = json.loads(records["manifest"])
    newer = {**content, **NEXT, "schema_version": SCHEMA_VERSION + 1, "batch": {**content["batch"], "codec": "zstd"}}
    newer["learned"] = [{**content["learned"][0], "weight": 0.5}]
    data = orjson.dumps(newer, option=orjson.OPT_SORT_KEYS)
    assert Manifest.from_bytes(data).to_bytes() == data
    for unreadable in ({"schema_version": SCHEMA_VERSION + 2}, {"kind": "of the next release"}):
        with pytest.raises(IntegrityError, match="not a manifest of this version"):
            Manifest.from_bytes(orjson.dumps({**content, **unreadable}))
