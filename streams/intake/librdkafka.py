"""The use that intake makes of librdkafka: client configurations, calls that need care, and which errors are fatal."""

from __future__ import annotations

import logging
import operator
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias, TypeVar

import kafka.errors
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from perennial.storage.errors import PerennialError
from perennial.streams.events.dead_letter import MAX_DEAD_LETTER_BYTES
from perennial.streams.kafka.connect import check_access
from perennial.streams.kafka.security.access_errors import KafkaSecurityError, KafkaUnavailableError
from perennial.streams.kafka.topics import ClusterIds, missing_topics_error, topic_id
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.intake")
client_log = log.getChild("librdkafka")
client_log.addFilter(lambda record: "gapless.guarantee is experimental" not in record.getMessage())

CALL_TIMEOUT_S = 10.0
_RETRY_FOR_S = 30.0
_RETRY_WAIT_S = 0.2
_TRY_EVERY_S = 1.0

PRODUCER_CONFIG: Mapping[str, Any] = {
    "enable.idempotence": True,
    "enable.gapless.guarantee": True,
    "message.timeout.ms": 0,
    "acks": "all",
    "partitioner": "murmur2_random",  # the same partition for a key as Java's and kafka-python's default partitioners
    "compression.type": "none",  # kafka-python and aiokafka cannot read lz4 or zstd without further packages
    "linger.ms": 10,  # with 5, five requests were often under way, and librdkafka polls without a wait until one ends
    "message.max.bytes": MAX_DEAD_LETTER_BYTES,
    "queue.buffering.max.kbytes": 131_072,
    "delivery.report.only.error": True,
}
"""The producer: acknowledged by all in-sync replicas, in order, without gaps."""

CONSUMER_CONFIG: Mapping[str, Any] = {
    "enable.partition.eof": True,
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # whoever resets in silence skips records in silence; see REPOSITION
    "partition.assignment.strategy": "range",
    "session.timeout.ms": 10_000,
    "heartbeat.interval.ms": 2_000,
    "queued.max.messages.kbytes": 65_536,
    "fetch.queue.backoff.ms": 50,
    "topic.metadata.refresh.interval.ms": 30_000,  # the longest that partitions added to an input topic wait
}
"""The consumer: offsets are committed by the service alone."""

# librdkafka's own error codes begin with an underscore and have no public name.
LOST_GROUP = frozenset({
    KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError._ASSIGNMENT_LOST, KafkaError._STATE,  # noqa: SLF001
})  # fmt: skip
"""Codes of a commit that fails because the group is rebalancing, or has given the partitions to another member."""
REPOSITION = frozenset({
    KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION, KafkaError.OFFSET_OUT_OF_RANGE,  # noqa: SLF001
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    KafkaError.UNKNOWN_TOPIC_ID,
})  # fmt: skip
"""Codes of a consumer error after which the position must be found anew: the log is not the one that was read."""
_RECOVERING = frozenset({
    KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError._MAX_POLL_EXCEEDED,  # noqa: SLF001  # the rebalance that follows assigns the partitions anew
})  # fmt: skip
"""Codes of a consumer error from which librdkafka recovers by itself."""
MAY_BE_REFUSED = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL})  # noqa: SLF001
"""Codes of an error that may mean that the broker refuses the settings of TLS and SASL."""
_TEMPORARY = frozenset({
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.REQUEST_TIMED_OUT,
    KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._WAIT_COORD, KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
})  # fmt: skip
"""Codes of a call that may succeed when it is repeated: a leader or a coordinator is being elected."""

Answer = TypeVar("Answer")
TopicAnswers: TypeAlias = Mapping[str, Future[Any]]
"""Answers to come, by topic name with the prefix."""


class DeliveryError(PerennialError):
    """Kafka did not accept a record."""


class ConsumeError(PerennialError):
    """Records cannot be read from Kafka."""


message_headers = operator.methodcaller("headers")
"""Return the headers of a Message; raise UnicodeDecodeError or SystemError where a header's name is not UTF-8.

Hazard: for such a name confluent-kafka 2.12 returns tuples with a null pointer and leaves its exception pending.
CPython's specialised method call does not check for a pending exception, so `message.headers()` would crash the process
or raise at some later line. `methodcaller` uses the checked call, which raises SystemError at once.
"""


def make_admin(config: Mapping[str, Any]) -> AdminClient:
    """Return an AdminClient of this configuration.

    Hazard: librdkafka asks for a token (OAUTHBEARER) by a callback that an AdminClient runs only in `poll`. Until the
    first one is there it opens no connection, and it asks again before a token expires: call `poll` from time to time.
    """
    admin = AdminClient(dict(config), logger=client_log)
    if "oauth_cb" in config:
        admin.poll(CALL_TIMEOUT_S)
    return admin


def cluster_ids(admin: AdminClient, names: Sequence[str]) -> ClusterIds:
    """Return the ids of the cluster and of topics.

    Args:
        admin: A client of the cluster.
        names: Topic names with the prefix.

    Returns:
        The ids.

    Raises:
        TopicError: A topic does not exist.
        KafkaException: Kafka does not answer within CALL_TIMEOUT_S.
    """
    cluster = admin.describe_cluster(request_timeout=CALL_TIMEOUT_S).result()
    ids = topic_ids(ask_topic_ids(admin, names))
    if len(ids) < len(names):
        raise missing_topics_error(sorted(set(names) - set(ids)))
    return ClusterIds(str(cluster.cluster_id), ids)


def ask_topic_ids(admin: AdminClient, names: Sequence[str]) -> TopicAnswers:
    """Ask for the ids of topics without waiting for the answer; see `topic_ids`."""
    answers: TopicAnswers = admin.describe_topics(TopicCollection(list(names)), request_timeout=CALL_TIMEOUT_S)
    return answers


def topic_ids(answers: TopicAnswers, wait_s: float | None = None) -> dict[str, str]:
    """Return the ids of the topics that exist.

    Args:
        answers: What `ask_topic_ids` returned.
        wait_s: How long to wait for each answer in seconds; None for as long as the request may take.

    Raises:
        TimeoutError: There is no answer within `wait_s`; ask again for the same answers.
        KafkaException: Kafka does not answer.
    """
    found: dict[str, str] = {}
    for name, answer in answers.items():
        try:
            found[name] = _topic_id_of(answer.result(wait_s).topic_id)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise
    return found


def _topic_id_of(raw: Any) -> str:
    high, low = raw.get_most_significant_bits(), raw.get_least_significant_bits()
    return topic_id(uuid.UUID(int=((high % 2**64) << 64) | (low % 2**64)))


def committed_offsets(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """Return the partitions with the group's committed offsets; negative where none is committed.

    Raises:
        KafkaException: An offset cannot be read within half a minute.
    """
    committed: list[TopicPartition] = _retry(lambda: consumer.committed(partitions, timeout=CALL_TIMEOUT_S))
    for each in committed:
        if each.error is not None:
            raise KafkaException(each.error)
    return committed


def log_bounds(consumer: Consumer, partition: TopicPartition) -> tuple[int, int]:
    """Return the first offset of a partition's log, and the offset behind its last record.

    Raises:
        KafkaException: The offsets cannot be read within half a minute.
    """
    bounds: tuple[int, int] = _retry(partial(consumer.get_watermark_offsets, partition, timeout=CALL_TIMEOUT_S))
    return bounds


def is_temporary(error: KafkaException) -> bool:
    """Return whether a call that failed with this error may succeed when it is repeated."""
    return error.args[0].code() in _TEMPORARY


def commit_offsets(consumer: Consumer, offsets: list[TopicPartition]) -> None:
    """Commit offsets and wait until the broker has stored them.

    Raises:
        KafkaException: They cannot be committed within half a minute; its code is in LOST_GROUP where the group is
            rebalancing.
    """
    _retry(lambda: consumer.commit(offsets=offsets, asynchronous=False))


def _retry(call: Callable[[], Answer]) -> Answer:
    """Repeat a call while it fails with a code of _TEMPORARY, for _RETRY_FOR_S at most."""
    # tenacity or stamina would need about as many lines for this one loop with a fixed wait, and be one more dependency.
    deadline_s = time.monotonic() + _RETRY_FOR_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if not is_temporary(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(_RETRY_WAIT_S)


class RefusalWatch:
    """Finds out whether the broker refuses the settings of TLS and SASL, once librdkafka reported an error that may mean it.

    librdkafka reports the same refusal of the same broker only once. So what it may mean is tried until the broker gives
    an answer. Not thread-safe.

    Args:
        settings: Names the brokers, TLS and SASL.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._suspected = False
        self._tried_s = 0.0

    def suspects(self, error: KafkaError) -> bool:
        """Note an error; return whether it may mean a refusal. Made for librdkafka's `error_cb`."""
        found = error.code() in MAY_BE_REFUSED
        if found:
            self.suspect()
        return found

    def suspect(self) -> None:
        """Note that a refusal may be why the broker does not answer."""
        self._suspected = True

    def raise_if_refused(self) -> None:
        """Try TLS and SASL while an error is unexplained, at most once in _TRY_EVERY_S.

        Raises:
            KafkaSecurityError: The broker refuses the settings of TLS and SASL.
        """
        if self._suspected and time.monotonic() - self._tried_s >= _TRY_EVERY_S:
            self._suspected = not raise_if_refused(self._settings)
            self._tried_s = time.monotonic()


def raise_unless_recovering(error: KafkaError, refusals: RefusalWatch) -> None:
    """Log a consumer error from which librdkafka recovers by itself, and raise any other.

    Raises:
        KafkaSecurityError: The broker refuses the settings of TLS and SASL.
        ConsumeError: Any other error.
    """
    if refusals.suspects(error):
        refusals.raise_if_refused()
        log.warning("reading from Kafka: %s", error)
        return
    if error.code() in _RECOVERING or error.retriable():
        log.warning("reading from Kafka: %s", error)
        return
    raise ConsumeError(
        got=f"{error.name()}: {error.str()}", allowed="records", remedy="see the broker's log; restart intake"
    )


def delivery_error(error: KafkaError) -> DeliveryError:
    """Return the error that reports a record that Kafka did not accept."""
    return DeliveryError(
        got=f"{error.name()}: {error.str()}",
        allowed="an acknowledgement by all replicas",
        remedy="repair the broker or the topic (see `perennial topics create`), then restart intake: nothing is lost",
    )


def raise_if_refused(settings: Settings) -> bool:
    """Raise KafkaSecurityError where the broker refuses the settings of TLS and SASL.

    librdkafka reports the code of a refused authentication also where the broker ended in the middle of one. So the
    refusal is confirmed by kafka-python, which also gives it the text that all other roles give it.

    Returns:
        Whether a broker answered.
    """
    try:
        check_access(settings, CALL_TIMEOUT_S)
    except kafka.errors.KafkaError as error:
        log.warning("TLS and SASL cannot be tried: %s", error)
        return False
    return True


def unavailable_error(settings: Settings, error: KafkaException) -> KafkaUnavailableError:
    """Return the error that reports a broker that does not answer, or that refuses TLS or SASL as set."""
    try:
        raise_if_refused(settings)
    except KafkaSecurityError as refused:
        return refused
    return KafkaUnavailableError(
        got=str(error), allowed=f"a broker at {settings.kafka.bootstrap}", remedy="check that the broker runs"
    )
