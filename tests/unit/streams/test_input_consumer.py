"""Intake's consumer without a broker: topic ids, lost tails and commits, on a log that the test holds in memory."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from perennial.streams.intake import input_consumer, librdkafka
from perennial.streams.intake.input_consumer import InputConsumer
from perennial.streams.intake.librdkafka import RefusalWatch
from perennial.streams.intake.positions import commit_metadata
from perennial.streams.kafka.topics import ClusterIds, TopicError
from perennial.streams.settings import Settings

TOPICS = {"documents": "documents", "interactions": "interactions"}


@dataclass
class Kafka:
    """What the broker knows."""

    ids: dict[str, str] = field(default_factory=lambda: {"documents": "id-d", "interactions": "id-i"})
    bounds: tuple[int, int] = (0, 100)
    committed: tuple[int, str] = (-1001, "")
    assigned: list[TopicPartition] = field(default_factory=list)
    assignment: list[tuple[str, int]] = field(default_factory=lambda: [("documents", 0)])
    commits: list[TopicPartition] = field(default_factory=list)
    consumers: int = 0
    records: list[object] = field(default_factory=list)


@pytest.fixture
def kafka(monkeypatch):
    kafka = Kafka()

    class FakeConsumer:
        def __init__(self, *_: object, **__: object) -> None:
            kafka.consumers += 1

        def subscribe(self, _, on_assign, on_revoke):
            on_assign(self, [TopicPartition(*each) for each in kafka.assignment])

        def assign(self, partitions):
            kafka.assigned = partitions

        def consume(self, n, _):
            read, kafka.records = kafka.records[:n], kafka.records[n:]
            return read

        def close(self):
            pass

    def cluster_ids(_, names):
        missing = [name for name in names if name not in kafka.ids]
        if missing:
            raise TopicError("missing", got=missing)
        return ClusterIds("cluster", dict(kafka.ids), {})

    def committed_offsets(_, partitions):
        return [TopicPartition(each.topic, each.partition, *kafka.committed) for each in partitions]

    monkeypatch.setattr(input_consumer, "Consumer", FakeConsumer)
    monkeypatch.setattr(input_consumer, "make_admin", lambda _: None)
    monkeypatch.setattr(input_consumer, "cluster_ids", cluster_ids)
    monkeypatch.setattr(input_consumer, "committed_offsets", committed_offsets)
    monkeypatch.setattr(input_consumer, "log_bounds", lambda *_: kafka.bounds)
    monkeypatch.setattr(input_consumer, "commit_offsets", lambda _, offsets: kafka.commits.extend(offsets))
    monkeypatch.setattr(input_consumer, "_TOPIC_WAIT_S", 0.3)
    monkeypatch.setattr(input_consumer, "_IDLE_S", 0.01)
    return kafka


class RecordedMetrics:
    """What the consumer reports of the logs."""

    def __init__(self) -> None:
        self.counts = Counter()

    def topic_recreated(self, topic):
        self.counts["recreated", topic] += 1

    def offsets_lost(self, topic, kind, n):
        self.counts["lost", topic, kind] += n


@pytest.fixture
def metrics():
    return RecordedMetrics()


def consumer(metrics, known=None, window=20, batch=5_000):
    settings = Settings.of(kafka="127.0.0.1:9", dedupe_window=window, intake_batch=batch, env_file=None)
    known = known or {"documents": "id-d", "interactions": "id-i"}
    return InputConsumer(settings, metrics, TOPICS, known, None, {}, "intake", RefusalWatch(settings))


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Answer questions for topic ids from a list of answers: ids, None for a missing topic, errors, futures."""
    answers = []

    def ask_topic_ids(_, names):
        found = {}
        for name, answer in answers.pop(0).items():
            if name in names:
                found[name] = answer if isinstance(answer, Future) else Future()
                if isinstance(answer, int):
                    found[name].set_exception(KafkaException(KafkaError(answer)))
                elif not isinstance(answer, Future):
                    found[name].set_result(SimpleNamespace(topic_id=answer))
        return found

    monkeypatch.setattr(input_consumer, "ask_topic_ids", ask_topic_ids)
    monkeypatch.setattr(librdkafka, "_topic_id_of", lambda raw: raw)
    return answers


def record(offset, topic="documents", partition=0):
    return SimpleNamespace(offset=lambda: offset, topic=lambda: topic, partition=lambda: partition)


GOING_ON = threading.Event()


def test_case_10_the_id_is_compared_for_every_batch(kafka, metrics, asked):
    """Identity is not assumed to hold after the assignment."""
    reader = consumer(metrics)
    asked.extend([{"documents": "id-d"}, {"documents": "id-new"}, {"documents": KafkaError.UNKNOWN_TOPIC_OR_PART}])
    assert reader.check_topics(GOING_ON)
    assert reader.reposition is None
    for _ in range(2):
        reader.reposition = None
        assert reader.check_topics(GOING_ON)
        assert "documents" in reader.reposition


def test_case_10_a_new_topic_is_read_from_its_beginning_by_a_new_consumer(kafka, metrics, asked, caplog):
    kafka.committed = (40, commit_metadata("id-d", 0))
    reader = consumer(metrics)
    assert reader.partitions["documents", 0].resume_at == 40
    kafka.ids["documents"] = "id-new"
    asked.append({"documents": "id-new"})
    reader.check_topics(GOING_ON)
    reader.start_again()
    state = reader.partitions["documents", 0]
    assert (kafka.consumers, kafka.assigned[0].offset) == (2, 0)
    assert (state.topic_id, state.resume_at, state.next_offset) == ("id-new", 0, 0)
    assert metrics.counts["recreated", "documents"] == 1
    assert "was deleted and created again" in caplog.text
    asked.append({"documents": "id-new"})
    assert reader.check_topics(GOING_ON)
    assert reader.reposition is None


def test_case_10_an_answer_of_a_broker_that_is_behind_does_no_lasting_harm(kafka, metrics, asked):
    """The commit made under the old id is not taken for one of the new topic."""
    reader = consumer(metrics)
    kafka.ids["documents"] = "id-new"
    asked.append({"documents": "id-d"})
    assert reader.check_topics(GOING_ON)
    reader.partitions["documents", 0].next_offset = 30  # records of the new topic, read under the old id
    reader.commit()
    kafka.committed = (kafka.commits[-1].offset, kafka.commits[-1].metadata)
    assert kafka.committed == (30, commit_metadata("id-d", 0))
    asked.append({"documents": "id-new"})
    reader.check_topics(GOING_ON)
    reader.start_again()
    assert kafka.assigned[0].offset == 0


def test_case_10_a_topic_of_another_member_is_none_of_ours(kafka, metrics, asked):
    """A member without a partition of the new topic must not begin again and again."""
    reader = consumer(metrics)
    asked.append({"documents": "id-d", "interactions": "id-new"})
    assert reader.check_topics(GOING_ON)
    assert reader.reposition is None
    kafka.ids["interactions"] = "id-new"
    kafka.assignment.append(("interactions", 0))
    reader.start_again()
    assert metrics.counts["recreated", "interactions"] == 1


def test_case_10_a_topic_that_stays_away_ends_the_role(kafka, metrics):
    reader = consumer(metrics)
    del kafka.ids["interactions"]
    with pytest.raises(TopicError):
        reader.start_again()


def test_the_check_waits_for_kafka_and_ends_with_the_role(kafka, metrics, asked):
    reader, late, stop = consumer(metrics), Future(), threading.Event()
    asked.extend([{"documents": KafkaError._TIMED_OUT}, {"documents": late}])
    threading.Timer(0.1, late.set_result, [SimpleNamespace(topic_id="id-d")]).start()
    assert reader.check_topics(stop)
    assert reader.reposition is None
    stop.set()
    asked.append({"documents": Future()})
    assert not reader.check_topics(stop)
    asked.append({"documents": KafkaError.TOPIC_AUTHORIZATION_FAILED})
    with pytest.raises(KafkaException):
        reader.check_topics(GOING_ON)


def test_attack_k_a_record_in_the_place_of_a_lost_one_is_new(kafka, metrics):
    """Committed 50 under epoch 3; the log was cut at 45 and has grown to 100 under epoch 5."""
    kafka.committed = (50, commit_metadata("id-d", 3))
    reader = consumer(metrics)
    state = reader.partitions["documents", 0]
    assert kafka.assigned[0].offset == 30
    handled = [reader.was_handled(state, record(offset), 3 if offset < 45 else 5) for offset in range(30, 50)]
    assert handled == [True] * 15 + [False] * 5
    assert metrics.counts["lost", "documents", "tail"] == 5
    state.next_offset, state.last_epoch = 60, 5
    reader.commit()
    assert kafka.commits[-1].metadata == commit_metadata("id-d", 5)
    assert reader.was_handled(state, record(59), 7)  # below a commit of this run, nothing is new


def test_attack_k_a_history_that_ended_before_the_window_is_looked_for(kafka, metrics):
    """The lost tail is longer than the window of duplicates: what replaced its beginning must be read as well."""
    kafka.bounds, kafka.committed = (0, 900), (800, commit_metadata("id-d", 3))
    reader = consumer(metrics)
    assert kafka.assigned[0].offset == 780
    state = reader.partitions["documents", 0]
    assert reader.was_handled(state, record(780), 4)  # not yet: what is before it has to be read first
    assert reader.reposition is not None
    state.next_offset = 900
    reader.commit()
    assert kafka.commits == []
    assert metrics.counts["lost", "documents", "tail"] == 0
    reader.start_again()
    assert kafka.assigned[0].offset == 600
    state = reader.partitions["documents", 0]
    assert reader.was_handled(state, record(600), 3)
    assert not reader.was_handled(state, record(650), 4)
    assert (reader.reposition, metrics.counts["lost", "documents", "tail"]) == (None, 150)


def test_attack_k_no_error_resets_a_position_in_silence(kafka, metrics, caplog):
    """Out of range: the consumer is made again where the log begins, and the gap is counted."""
    kafka.committed = (50, commit_metadata("id-d", 3))
    reader = consumer(metrics)
    for code in (KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION, KafkaError.OFFSET_OUT_OF_RANGE):
        reader.reposition = None
        reader.handle_error(KafkaError(code), record(50))
        assert reader.reposition
    kafka.bounds = (80, 100)
    reader.start_again()
    assert kafka.assigned[0].offset == 80
    assert metrics.counts["lost", "documents", "deleted"] == 30
    assert "30 offsets that were never read" in caplog.text


@pytest.fixture
def slow_commits(kafka, monkeypatch):
    """Make commits take until `answered` is set; they raise `error` then, where there is one."""
    broker = SimpleNamespace(answered=threading.Event(), error=None)

    def commit_offsets(_, offsets):
        assert broker.answered.wait(20)
        if broker.error is not None:
            raise KafkaException(KafkaError(broker.error))
        kafka.commits.extend(offsets)

    monkeypatch.setattr(input_consumer, "commit_offsets", commit_offsets)
    yield broker
    broker.answered.set()


def read_batch(kafka, reader, first, size=2):
    kafka.records = [record(offset) for offset in range(first, first + size)]
    assert len(reader.consume()) == size
    reader.partitions["documents", 0].next_offset = first + size


def offsets_of(kafka):
    return [each.offset for each in kafka.commits]


def test_the_commit_of_a_full_batch_is_stored_during_the_next_one(kafka, metrics, slow_commits):
    """`commit` waits for the commit before, so that offsets never go back; a batch that is not full is waited for."""
    reader = consumer(metrics, batch=2)
    read_batch(kafka, reader, 0)
    reader.commit()
    read_batch(kafka, reader, 2)
    assert kafka.commits == []
    threading.Timer(0.1, slow_commits.answered.set).start()
    reader.commit()
    assert offsets_of(kafka)[0] == 2
    read_batch(kafka, reader, 4, size=1)
    reader.commit()
    assert offsets_of(kafka) == [2, 4, 5]


@pytest.mark.parametrize("end", ["idle", "revoked", "started again", "closed"])
def test_a_commit_under_way_is_waited_for(kafka, metrics, slow_commits, end):
    reader = consumer(metrics, batch=2)
    read_batch(kafka, reader, 0)
    reader.commit()
    threading.Timer(0.1, slow_commits.answered.set).start()
    if end == "idle":
        assert reader.consume() == []
    elif end == "revoked":
        reader._on_revoke(reader._consumer, [])
    elif end == "started again":
        reader.start_again()
    else:
        reader.close()
    assert offsets_of(kafka) == [2]


def test_a_failed_commit_under_way_ends_the_role(kafka, metrics, slow_commits, caplog):
    """It is raised at the next call; one of a group that is rebalancing is only logged, as the records come again."""
    reader = consumer(metrics, batch=2)
    slow_commits.answered.set()
    slow_commits.error = KafkaError.ILLEGAL_GENERATION
    read_batch(kafka, reader, 0)
    reader.commit()
    assert reader.consume() == []
    assert "the group is rebalancing" in caplog.text
    slow_commits.error = KafkaError.TOPIC_AUTHORIZATION_FAILED
    read_batch(kafka, reader, 2)
    reader.commit()
    with pytest.raises(KafkaException):
        reader.consume()
    read_batch(kafka, reader, 4)
    reader.commit()
    reader.close()
    assert kafka.commits == []
