"""Read the input topics: assignment, positions, commits, and whether the logs are still those that were read.

Where a log is another one (the topic was deleted and created again, its tail was lost, records were deleted before they
were read), a new consumer begins where `positions.start_position` says. It is a new consumer because librdkafka ignores
metadata with a lower leader epoch than it has seen under a topic's name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.events.tenants import split_topic
from perennial.streams.intake.intake_metrics import IntakeMetrics
from perennial.streams.intake.librdkafka import (
    CONSUMER_CONFIG,
    LOST_GROUP,
    REPOSITION,
    RefusalWatch,
    ask_topic_ids,
    client_log,
    cluster_ids,
    commit_offsets,
    committed_offsets,
    is_temporary,
    log,
    log_bounds,
    make_admin,
    raise_unless_recovering,
    topic_ids,
)
from perennial.streams.intake.positions import (
    UNKNOWN_EPOCH,
    LossKind,
    StartPosition,
    commit_metadata,
    committed_position,
    start_position,
)
from perennial.streams.intake.refused import RefusedExamplesLookup
from perennial.streams.intake.validation import Acceptor, OriginPartition
from perennial.streams.kafka.installation import add_input_topic_id
from perennial.streams.kafka.topics import ClusterIds, TopicError
from perennial.streams.settings import Settings

_IDLE_S = 0.25
_GATHER_S = 0.005
_OBSERVE_S = 1.0
_TOPIC_WAIT_S = 10.0
_NOTHING = 2**63 - 1
"""An offset below which every record counts as handled."""


@dataclass(slots=True)
class InputPartition:
    """The state of an assigned partition.

    Attributes:
        topic: The topic's name without the prefix.
        topic_id: The topic's id.
        acceptor: Decides about the partition's records.
        resume_at: The committed offset. Records below it were handled before; they are read again only to rebuild the
            window of duplicates.
        resume_epoch: The leader epoch of the last record that was handled. A record below `resume_at` under a higher
            epoch is new: it took the place of one that the log lost.
        next_offset: The offset behind the last record that was read.
        end_offset: The end of the log when the consumer last reached it. It counts transaction markers too, which have
            offsets but are never delivered, so that they do not count as lag.
        last_epoch: The leader epoch of the last record that was read.
        last_ms: The time of the last record that was read, in ms since the epoch.
        has_history: Whether a record was read that had been handled before.
        tail_reported: Whether a record that took the place of a lost one was reported.
    """

    topic: str
    topic_id: str
    acceptor: Acceptor
    resume_at: int
    resume_epoch: int
    next_offset: int
    end_offset: int = 0
    last_epoch: int = 0
    last_ms: int = 0
    has_history: bool = False
    tail_reported: bool = False


class InputConsumer:
    """The consumer of the intake group. Not thread-safe.

    Args:
        settings: The installation's settings.
        metrics: Where lag and lost offsets are reported.
        topics: The input topics' names without the prefix, by their names with it.
        known_ids: The id by which each topic is known, by its name with the prefix. An input topic that has another id
            now counts as created again.
        store: The object store; None: new topic ids are not recorded, and nothing is known of refused examples.
        client: The configuration of every client.
        group: The consumer group, with the prefix.
        refusals: Finds out whether an error means that the broker refuses TLS or SASL.

    Attributes:
        partitions: The assigned partitions, by topic with the prefix and number.
        reposition: Why the positions must be found anew; None while they are right.
    """

    def __init__(
        self, settings: Settings, metrics: IntakeMetrics, topics: Mapping[str, str], known_ids: Mapping[str, str],
        store: ObjectStore | None, client: Mapping[str, Any], group: str, refusals: RefusalWatch,
    ) -> None:  # fmt: skip
        self.partitions: dict[tuple[str, int], InputPartition] = {}
        self.reposition: str | None = None
        self._settings = settings
        self._refusals = refusals
        self._metrics = metrics
        self._topics = topics
        self._known_ids = dict(known_ids)
        self._store = store
        self._refused_at = None if store is None else RefusedExamplesLookup(store)
        self._look_back: dict[tuple[str, int], int] = {}
        self._observed_s = 0.0
        self._batch_was_full = False
        self._admin = make_admin(client)
        self._config = {**client, **CONSUMER_CONFIG, "group.id": group}
        self._committer = ThreadPoolExecutor(1, "intake-commit")
        self._commit_under_way: Future[None] | None = None
        self._consumer = self._subscribed()

    def _subscribed(self) -> Consumer:
        consumer = Consumer(self._config, logger=client_log)
        consumer.subscribe(list(self._topics), on_assign=self._on_assign, on_revoke=self._on_revoke)
        return consumer

    def close(self) -> None:
        """Leave the group as soon as no commit is under way."""
        with suppress(KafkaException):  # what is not committed is read again
            self.finish_commit()
        self._committer.shutdown()
        self._consumer.close()

    def consume(self) -> list[Message]:
        """Read one batch. A single record is returned at once: a batch does not wait until it is full.

        Raises:
            KafkaException: The offsets of the batch before cannot be committed.
        """
        size = self._settings.intake.intake_batch
        if self._batch_was_full:
            messages = self._consumer.consume(size, _GATHER_S)
        else:
            messages = self._consumer.consume(1, _IDLE_S)
            if messages and size > 1:
                messages += self._consumer.consume(size - 1, _GATHER_S)
        self._batch_was_full = len(messages) == size
        if not messages:
            self.finish_commit()
        return list(messages)

    def handle_error(self, error: KafkaError, message: Message) -> None:
        """Handle a message that is no record.

        Raises:
            ConsumeError: Records cannot be read.
            KafkaSecurityError: The broker refuses the settings of TLS and SASL.
        """
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
            state = self.partitions.get((message.topic(), message.partition()))
            if state is not None:
                state.end_offset = message.offset()
        elif error.code() in REPOSITION:
            self.reposition = f"{error.name()}: {error.str()}"
        else:
            raise_unless_recovering(error, self._refusals)

    def was_handled(self, state: InputPartition, message: Message, epoch: int) -> bool:
        """Return whether a record below `resume_at` was handled before; report records that replaced such ones."""
        if epoch <= state.resume_epoch:
            state.has_history = True
            return True
        if not state.tail_reported:
            state.tail_reported = True
            key = (message.topic(), message.partition())
            look_back = self._look_back.get(key, self._settings.intake.dedupe_window)
            if not state.has_history and look_back < state.resume_at:
                # The history that the commit and the log share ends before the first record that was read.
                self._look_back[key] = max(look_back, 1) * 10
                self.reposition = f"the end of the common history of {key[0]}/{key[1]} is sought"
                state.resume_at = _NOTHING  # until then nothing of this partition is written or committed
                state.resume_epoch = UNKNOWN_EPOCH
                return True
            self._report_loss(key, "tail", state.resume_at - message.offset())
        return False

    def _report_loss(self, key: tuple[str, int], kind: LossKind, n: int) -> None:
        if kind == "tail":
            log.error(
                "%s/%d lost the last %d offsets that had been read: the broker stopped uncleanly, or a replica that was "
                "behind became leader. What was read of them counts; what is published in their place is read too",
                *key, n,
            )  # fmt: skip
        else:
            log.error(
                "%s/%d lost %d offsets that were never read: they were deleted before intake came to them. Publish "
                "these records again; give the topic a longer retention.ms or retention.bytes",
                *key, n,
            )  # fmt: skip
        self._metrics.offsets_lost(self._topics[key[0]], kind, n)

    def check_topics(self, stop: threading.Event) -> bool:
        """Set `reposition` where an input topic is not the one that was assigned, however long Kafka takes to answer.

        Call it after a batch was read: an id changes only once, so a batch that was read before an answer with the known
        id is of that topic.

        Hazard: a broker that is behind may still name the old id. Then the batch is written under the old id, and so is
        the commit. The next batch or the next assignment sees the new id and begins at the start of the new topic, so
        that what was written under the old id comes again under the right origin, as a duplicate for curate.

        Args:
            stop: Ends the wait.

        Returns:
            False where `stop` was set before Kafka answered.

        Raises:
            KafkaException: Kafka refuses to answer.
            KafkaSecurityError: The broker refuses the settings of TLS and SASL.
        """
        names = sorted({topic for topic, _ in self.partitions})  # others are compared when this member gets a partition
        answers = ask_topic_ids(self._admin, names) if names else {}
        while not stop.is_set():
            try:
                found = topic_ids(answers, _IDLE_S)
            except TimeoutError:
                continue
            except KafkaException as error:
                if not is_temporary(error):
                    raise
                log.warning("the topics' ids cannot be read, asking again: %s", error)
                self._refusals.suspect()
                self._refusals.raise_if_refused()
                answers = ask_topic_ids(self._admin, names)
                continue
            for topic in names:
                if found.get(topic) != self._known_ids[topic]:
                    self.reposition = f"the topic {topic} was deleted or created again"
            return True
        return False

    def start_again(self) -> None:
        """Read on with a new consumer from where the logs and the commits say.

        Raises:
            TopicError: A topic does not exist, and was not created again within ten seconds.
            KafkaException: The offsets cannot be committed.
        """
        log.warning("reading on with a new consumer: %s", self.reposition)
        self.reposition = None
        self._batch_was_full = False
        self.finish_commit()
        self._consumer.close()
        self.partitions = {}
        deadline_s = time.monotonic() + _TOPIC_WAIT_S
        while True:
            try:
                cluster_ids(self._admin, list(self._topics))
                break
            except TopicError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_IDLE_S)
        self._consumer = self._subscribed()

    def commit(self) -> None:
        """Commit what was read, with the topics' ids and the leader epochs.

        After a full batch, more records wait. Then the commit is only begun, and the next call waits until it is stored.
        At most one commit is under way, so commits keep their order.

        Raises:
            KafkaException: These offsets, or those of the batch before, cannot be committed.
        """
        self.finish_commit()
        moved = {key: state for key, state in self.partitions.items() if state.next_offset > state.resume_at}
        if not moved:
            return
        offsets = [
            TopicPartition(*key, state.next_offset, commit_metadata(state.topic_id, state.last_epoch))
            for key, state in moved.items()
        ]
        self._commit_under_way = self._committer.submit(commit_offsets, self._consumer, offsets)
        for state in moved.values():
            state.resume_at, state.resume_epoch = state.next_offset, UNKNOWN_EPOCH
        if not self._batch_was_full:
            self.finish_commit()

    def finish_commit(self) -> None:
        """Wait until the commit that is under way, if any, is stored.

        Raises:
            KafkaException: The offsets cannot be committed.
        """
        commit, self._commit_under_way = self._commit_under_way, None
        try:
            if commit is not None:
                commit.result()
        except KafkaException as error:
            if error.args[0].code() not in LOST_GROUP:
                raise
            # The member that gets the partitions writes the same results again; downstream roles drop them.
            log.warning("offsets are not committed, the group is rebalancing: %s", error)

    def observe(self) -> None:
        """Report how many records wait, at most once a second."""
        now_s = time.time()
        if now_s - self._observed_s < _OBSERVE_S:
            return
        self._observed_s = now_s
        self._admin.poll(0)  # see make_admin
        waiting = dict.fromkeys(self._topics.values(), 0)
        oldest_ms = now_s * 1000
        for (topic, number), state in self.partitions.items():
            _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            lag = max(0, high - max(state.next_offset, state.end_offset))  # high is negative until the first fetch
            waiting[state.topic] += lag
            if lag and state.last_ms > 0:
                oldest_ms = min(oldest_ms, state.last_ms)
        for name, lag in waiting.items():
            self._metrics.lag(name, lag)
        self._metrics.oldest_age_s(max(0.0, now_s - oldest_ms / 1000) if any(waiting.values()) else 0.0)

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        """Start each partition one window before its committed offset, so that the window is rebuilt from the log."""
        self.partitions = {}
        if assigned:
            ids = cluster_ids(self._admin, sorted({each.topic for each in assigned}))
            recreated = {topic for topic, found in ids.topic_ids.items() if found != self._known_ids[topic]}
            assigned = committed_offsets(consumer, assigned)
            for each in assigned:
                key = (each.topic, each.partition)
                low, high = log_bounds(consumer, each)
                look_back = self._look_back.get(key, self._settings.intake.dedupe_window)
                committed = committed_position(each.offset, each.metadata)
                start = start_position(committed, ids.topic_ids[each.topic], low, high, look_back)
                if start.recreated:
                    recreated.add(each.topic)
                if start.lost is not None:
                    self._report_loss(key, start.lost, start.lost_offsets)
                each.offset = start.read_from
                self.partitions[key] = self._partition(each, ids, start)
            for topic in sorted(recreated):
                self._report_recreated(topic, ids.topic_ids[topic])
        # Without the commits' metadata, which librdkafka would keep.
        consumer.assign([TopicPartition(each.topic, each.partition, each.offset) for each in assigned])
        self._observed_s = 0.0
        log.info("assigned %d partitions", len(assigned))

    def _report_recreated(self, topic: str, topic_id: str) -> None:
        """Report a topic that was created again, and record its id, which must be known before examples name it."""
        log.error(
            "the topic %s was deleted and created again (its id is %s, and was %s): records of the old topic that were "
            "not read are gone, the new topic is read from its beginning",
            topic, topic_id, self._known_ids[topic],
        )  # fmt: skip
        if self._store is not None:
            add_input_topic_id(self._store, self._topics[topic], topic_id)
        self._known_ids[topic] = topic_id
        self._metrics.topic_recreated(self._topics[topic])

    def _partition(self, position: TopicPartition, ids: ClusterIds, start: StartPosition) -> InputPartition:
        topic, topic_id = self._topics[position.topic], ids.topic_ids[position.topic]
        base, tenant = split_topic(topic)
        origin = OriginPartition(ids.cluster_id, position.topic, topic_id, position.partition, base, tenant)
        settings = self._settings
        acceptor = Acceptor(origin, settings.intake.dedupe_window, settings.curate.learn_turns, self._refused_at)
        return InputPartition(topic, topic_id, acceptor, start.resume_at, start.resume_epoch, start.read_from)

    def _on_revoke(self, _: Consumer, __: list[TopicPartition]) -> None:
        """Forget the partitions, once what was read of them is committed.

        This runs inside `consume`: what the batch before wrote is acknowledged, and its commit may be under way.
        """
        self.finish_commit()
        self.partitions = {}
