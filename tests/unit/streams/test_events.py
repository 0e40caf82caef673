"""Events: values that the models accept and refuse, and the topic and key of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from pydantic import ValidationError

from perennial.streams.events.fields import MAX_TEXT_BYTES, duration_s
from perennial.streams.events.input_events import DocumentObserved, InteractionObserved
from perennial.streams.events.models import DEFAULT_TYPES, EVENTS, Origin, RollbackRequested, Selector, UpdateRequested
from perennial.streams.kafka.topics import TOPICS
from tests.unit.streams.event_strategies import any_event

ORIGIN = {"cluster_id": "c", "topic": "documents", "topic_id": "t", "partition": 3, "offset": 7, "timestamp_ms": 1}


@given(any_event)
def test_every_event_survives_json_and_has_a_key(event):
    assert type(event).model_validate_json(event.model_dump_json(by_alias=True)) == event
    assert 0 < len(event.key().encode()) <= 200 + 1 + 4 * 512


def test_types_and_topics_agree():
    assert {model.topic for model in EVENTS.values()} == set(TOPICS) - {"dead-letters"}
    assert all(EVENTS[name].topic == topic for topic, name in DEFAULT_TYPES.items())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("P30D", 30 * 86400), ("PT12H", 43200), ("P1Y", 365 * 86400), ("P1W", 604800), ("P1DT1M", 86460), ("PT1S", 1)],
)
def test_durations(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "P", "PT", "P0D", "30D", "P1H", "P-1D", "P1.5D", "PT1M1H", "P1D ", "P1D\n", "P\u0663D", "p1d"]
)
def test_other_texts_are_no_duration(text):
    with pytest.raises(ValueError, match="P30D"):
        duration_s(text)


@pytest.mark.parametrize("adapter", ["acme", "acme/support", "a/b/c/d", "0-x.y_z"])
def test_adapter_names(adapter):
    assert DocumentObserved(adapter=adapter, document_id="1", text="x").adapter == adapter


@pytest.mark.parametrize("adapter", ["", "/", "a/", "/a", "a//b", "a/b/c/d/e", "A", "-a", "a b", "a\n", "é", "a" * 201])
def test_other_texts_are_no_adapter_name(adapter):
    with pytest.raises(ValidationError):
        DocumentObserved(adapter=adapter, document_id="1", text="x")


def test_text_is_limited_in_bytes_not_characters():
    DocumentObserved(adapter="a", document_id="1", text="é" * (MAX_TEXT_BYTES // 2))
    with pytest.raises(ValidationError, match="bytes"):
        DocumentObserved(adapter="a", document_id="1", text="é" * (MAX_TEXT_BYTES // 2) + "x")


@pytest.mark.parametrize("rating", [1.01, -1.01, float("nan"), float("inf")])
def test_ratings_are_finite_and_bounded(rating):
    with pytest.raises(ValidationError):
        InteractionObserved(adapter="a", interaction_id="1", prompt="p", response="r", rating=rating)


def test_a_misspelt_field_is_refused():
    with pytest.raises(ValidationError, match="retention_clas"):
        DocumentObserved(adapter="a", document_id="1", text="x", retention_clas="P30D")


def test_an_empty_selector_is_refused():
    with pytest.raises(ValidationError, match="at least one"):
        Selector()


def test_origin_partitions_of_other_clusters_and_topics_differ():
    key = Origin(**ORIGIN).partition_key()
    for field, other in {"cluster_id": "d", "topic_id": "u", "topic": "interactions", "partition": 4}.items():
        assert Origin(**{**ORIGIN, field: other}).partition_key() != key
    assert Origin(**{**ORIGIN, "offset": 8}).partition_key() == key


@pytest.mark.parametrize(
    "wrong",
    [{"cut": 2**63}, {"marks": {"p": -1}}, {"marks": {"p": 2**63}}, {"oldest_ms": 10**400}, {"newest_ms": 10**15}],
)
def test_a_job_that_no_manifest_can_record_is_refused(wrong):
    job = {
        "job_id": "j", "adapter": "a", "cut": 1, "batch": {"digest": f"sha256:{0:064}", "size_bytes": 1}, "examples": 1,
        "skipped": 0, "tokens": 1, "reason": "age", "marks": {"p": 1}, "oldest_ms": 1, "newest_ms": 1,
        "cut_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    assert UpdateRequested.model_validate(job).cut == 1
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        UpdateRequested.model_validate(job | wrong)


@pytest.mark.parametrize("alias", ["", "Live", "no/alias", "a b", "x" * 65])
def test_other_texts_are_no_alias(alias):
    with pytest.raises(ValidationError, match="alias"):
        RollbackRequested(job_id="j", adapter="a", alias=alias, requested_by="ann")
