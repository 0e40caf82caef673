"""Values of internal records: what decodes survives curate, and what a broker cannot have reported is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.waiting_jobs import MAX_CUT
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import Batch, ExampleScored, Origin, UpdateRequested
from perennial.streams.kafka.installation import KEY, Installation, RecordedTopic
from perennial.streams.kafka.origin_check import BrokerLogs, LogEnd, OriginCheck
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.settings import Settings
from tests.unit.streams.event_strategies import event_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = CutPolicy(max_tokens=10**9, max_examples=4, min_examples=2, max_age_ms=1, cooldown_examples=1, window=16)
ORIGIN = {"cluster_id": "c", "topic": "documents", "topic_id": "t", "partition": 0, "offset": 7, "timestamp_ms": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cluster_id", "x" * 2000), ("cluster_id", ""), ("cluster_id", "a b"), ("topic", "x" * 250), ("topic", "a/b"),
        ("topic_id", "x" * 65), ("topic_id", "\x1b"), ("partition", 2**31), ("offset", 2**63), ("offset", -1),
        ("leader_epoch", 2**31), ("timestamp_ms", -1), ("timestamp_ms", 10**15), ("timestamp_ms", 2**63),
    ],
)  # fmt: skip
def test_attack_b_an_origin_that_no_job_can_carry_does_not_decode(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Origin.model_validate(ORIGIN | {field: value})


@pytest.mark.parametrize("field", ["cluster_id", "topic", "topic_id"])
def test_attack_b_the_longest_key_of_an_origin_partition_fits_a_job(field: str) -> None:
    longest = {"cluster_id": "c" * 128, "topic": "t" * 249, "topic_id": "i" * 64, "partition": 2**31 - 1}
    assert len(Origin.model_validate(ORIGIN | longest).partition_key()) <= 1024


@given(st.lists(event_of(ExampleScored), min_size=1, max_size=8), st.integers(0, 3))
def test_attack_b_every_value_that_decodes_survives_cut_flush_and_restore(
    scored: list[ExampleScored], blocked: int
) -> None:
    batcher: MicroBatcher[int] = MicroBatcher("a", POLICY)
    for token, each in enumerate(scored):
        read = ExampleScored.model_validate_json(each.model_dump_json())
        batcher.offer(read, token, 0)
        for cut in (batcher.flush(), batcher.cut(NOW, "age", {read.example.example_id} if blocked else ())):
            if cut.body is not None:
                Batch.model_validate_json(cut.body)
            MicroBatcher.restore("a", POLICY, cut.state)
        if token % 3 == blocked:
            batcher.apply(batcher.cut(NOW, "age"))


@pytest.mark.parametrize("loss", [1e6, -1.0, 0.0])
def test_attack_b_the_largest_losses_pass_all_detectors(loss: float) -> None:
    batcher: MicroBatcher[int] = MicroBatcher("a", CutPolicy(10**12, 10**9, 2, 1, 1, 512))
    for number in range(600):
        example = {
            "adapter": "a", "example_id": f"{number:032x}"[::-1], "kind": "document", "document_id": "d", "learn": True,
            "text": "one two three", "rating": -1, "origin": ORIGIN | {"offset": number},
        }  # fmt: skip
        value = loss if number % 2 else 1.0
        event = {"example": example, "tokens": 2**24, "base_loss_nats": value, "live_loss_nats": -value / 1e6}
        batcher.offer(ExampleScored.model_validate(event), number, 0)
    cut = batcher.cut(NOW, "age")
    assert cut.job is not None
    assert cut.job.tokens == 600 * 2**24
    MicroBatcher.restore("a", POLICY, cut.state)


class Logs:
    """A broker with two partitions; the topic was created again once."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ids = {"documents": ["before", "t"]}
        self.ends_now = {0: LogEnd(0, 10, 2), 1: LogEnd(5, 5, None)}

    def cluster_ids(self) -> set[str]:
        self.asked.append("clusters")
        return {"c"}

    def topic_ids(self, topic: str) -> list[str]:
        self.asked.append(topic)
        return self.ids.get(topic, [])

    def ends(self, topic: str) -> dict[int, LogEnd]:
        return self.ends_now

    def close(self) -> None:
        pass


def origin(**changes: object) -> Origin:
    return Origin.model_validate(ORIGIN | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": 10}, "allowed: an offset below 10"),
        ({"offset": 2**63 - 1}, "allowed: an offset below 10"),
        ({"partition": 1, "offset": 5}, "allowed: an offset below 5"),
        ({"leader_epoch": 3}, "got: 3; allowed: at most 2"),
        ({"cluster_id": "d"}, "got: d; allowed: ['c']"),
        ({"topic_id": "u"}, "got: documents, id u"),
        ({"topic": "elsewhere"}, "got: elsewhere, id t"),
        ({"partition": 7}, "a partition that does not exist"),
    ],
)
def test_attack_a_an_origin_that_the_broker_cannot_have_given_is_refused(
    changes: dict[str, object], words: str
) -> None:
    error = OriginCheck(Logs()).error(origin(**changes))
    assert error is not None
    assert error.reason == "implausible-origin"
    assert words in error.detail


def test_what_the_broker_has_given_is_taken_and_asked_about_only_once_it_exceeds_the_cache() -> None:
    logs = Logs()
    check = OriginCheck(logs)
    assert not check.is_known(origin())
    assert [check.error(origin(offset=n, leader_epoch=2)) for n in range(10)] == [None] * 10
    assert logs.asked == ["clusters", "documents"]
    assert check.is_known(origin(partition=0, offset=9))
    logs.ends_now = {0: LogEnd(0, 12, 3)}
    assert check.errors([origin(offset=11, leader_epoch=3), origin(offset=2), origin(offset=10)]) == [None] * 3
    assert logs.asked == ["clusters", "documents"] * 2
    found = check.errors([origin(offset=2**63 - 1), origin(offset=2**62), origin(offset=3)])
    assert [error is None for error in found] == [False, False, True]
    assert logs.asked == [*["clusters", "documents"] * 3, "documents"], "the topic may have been deleted meanwhile"


@pytest.mark.parametrize("present", ["", "later"])
@pytest.mark.parametrize("ends", [{}, {0: LogEnd(0, 3, 0)}])
def test_an_origin_of_a_topic_that_is_deleted_while_it_is_asked_about_is_right(
    present: str, ends: dict[int, LogEnd]
) -> None:
    """The broker said which topic there is, then how long its logs are; the topic was deleted in between."""

    class Deleted(Logs):
        def ends(self, topic: str) -> dict[int, LogEnd]:
            self.ids[topic] = ["before", "t", present]
            return ends

    check = OriginCheck(Deleted())
    assert check.error(origin(offset=8)) is None
    assert check.errors([origin(offset=8), origin(offset=9)]) == [None, None]


def test_an_origin_in_a_partition_without_a_leader_is_neither_right_nor_wrong() -> None:
    logs = Logs()
    check = OriginCheck(logs)
    assert check.error(origin(offset=9)) is None
    logs.ends_now[0] = LogEnd(-1, -1, None)
    logs.ends_now[1] = LogEnd(5, 7, 2)
    assert check.error(origin(partition=1, offset=6)) is None
    for ask in (check.error, lambda each: check.errors([each])):
        with pytest.raises(KafkaUnavailableError, match="no leader"):
            ask(origin(offset=11))
    with pytest.raises(KafkaUnavailableError):
        check.errors([origin(partition=1, offset=2**40), origin(offset=11)])
    assert check.mark_problem("c/t/documents/0", (2, 2**40)) is None
    assert check.mark_problem("c/t/documents/1", (2, 2**40)) is not None
    logs.ends_now[0] = LogEnd(0, 12, 3)
    assert check.error(origin(offset=11)) is None


def test_examples_of_a_topic_that_was_deleted_since_are_taken_whatever_their_offset() -> None:
    assert OriginCheck(Logs()).error(origin(topic_id="before", offset=2**40, partition=9)) is None


def test_a_topic_that_is_created_again_is_known_once_its_id_is_recorded() -> None:
    logs = Logs()
    check = OriginCheck(logs)
    assert check.error(origin()) is None
    assert check.error(origin(topic_id="next", offset=0)) is not None
    logs.ids["documents"].append("next")
    logs.ends_now = {0: LogEnd(0, 1, 0)}
    assert check.error(origin(topic_id="next", offset=0)) is None
    assert check.error(origin(topic_id="t", offset=9)) is None


@pytest.mark.parametrize(
    "key", ["", "x", "c/t/documents", "c/t/documents/x", "c/t/documents/-1", "/" * 1024, "é/t/d/0"]
)
def test_attack_b_a_mark_of_no_origin_partition_is_a_problem_and_breaks_nothing(key: str) -> None:
    check = OriginCheck(Logs())
    assert "not a position" in (check.mark_problem(key, (0, 1)) or "")
    assert not check.is_foreign(key)


def test_a_mark_is_judged_by_its_log_and_foreign_ones_do_no_harm() -> None:
    logs = Logs()
    check = OriginCheck(logs)
    assert check.mark_problem("c/t/documents/0", (2, 9)) is None
    assert check.mark_problem("c/t/documents/0", (1, 12)) is None  # the tail was lost: epoch 2 gives 10 again
    assert "below 10" in (check.mark_problem("c/t/documents/0", (2, 10)) or "")
    assert "not a position" in (check.mark_problem("c/t/documents/0", (2**62, 1)) or "")
    for foreign in ("d/t/documents/0", "c/u/documents/0", "c/t/elsewhere/0"):
        assert check.is_foreign(foreign)
        asked = len(logs.asked)
        assert check.mark_problem(foreign, (9, 2**63 - 1)) is None
        assert len(logs.asked) == asked


def test_while_the_store_is_away_the_record_counts_as_it_was_read_last(tmp_path: Path, monkeypatch) -> None:
    store = DirectoryStore(tmp_path, fsync=False)
    logs = BrokerLogs(Settings.of(kafka="broker:1", env_file=None), store)
    monkeypatch.setattr(logs, "_ask", lambda question: question(Admin()))
    away = DirectoryStore(tmp_path, fsync=False)
    monkeypatch.setattr(away, "get", lambda *_: (_ for _ in ()).throw(StoreUnavailableError("away")))
    logs._store = away
    with pytest.raises(StoreUnavailableError):
        logs.cluster_ids()
    topic = RecordedTopic(topic_id="00000000-0000-0000-0000-000000000002", partitions=1, seen=("before",))
    store.put_if_absent(KEY, Installation(cluster_id="c", topics={"documents": topic}).model_dump_json().encode())
    logs._store = store
    assert logs.cluster_ids() == {"c"}
    logs._store = away
    assert logs.topic_ids("documents") == ["before", "00000000-0000-0000-0000-000000000001"]
    assert logs.topic_ids("retention") == logs.topic_ids("examples") == []


class Admin:
    """The parts of a KafkaAdminClient that are asked."""

    def describe_cluster(self) -> dict[str, str]:
        return {"cluster_id": "c"}

    def describe_topics(self, names: list[str]) -> list[dict[str, object]]:
        return [{"name": name, "topic_id": UUID(int=1), "error_code": 0, "partitions": []} for name in names]


@pytest.mark.parametrize("model", [Batch, UpdateRequested])
def test_a_cut_number_that_no_key_can_have_does_not_decode(model: type[Batch | UpdateRequested]) -> None:
    """A forged job of cut 2^63 - 1 ended the learner at each start."""
    value = TypeAdapter(Annotated[int, *model.model_fields["cut"].metadata])
    assert value.validate_python(MAX_CUT) == MAX_CUT
    with pytest.raises(ValidationError):
        value.validate_python(MAX_CUT + 1)
