"""The retain agent: take deliveries of `retention` and of tenants' such topics from Faust, acknowledge them, and run the calendar in one process.

The agent performs the step of one request completely, acknowledges its record, and only then takes the next request. So
the acknowledged offsets have no gaps. The process that has partition 0 of `retention` runs the calendar and goes on with
open requests. For a moment two processes may both believe that they have it. Each request is stored by
compare-and-swap, which accepts the step of one of them; the other has only sent the same jobs under the same ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types

from perennial.storage.failpoints import failpoint
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.events.cloudevents import decode, encode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.events.fields import Event
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.tenants import split_topic
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topic_guard import KeyRouting, TopicGuard
from perennial.streams.kafka.topics import topic_names
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.replicas.replica_watch import ReplicaWatch
from perennial.streams.retain.service import SOURCE, RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.retain")

TOPIC: Final = RetentionRequested.topic
TICK_S: Final = 1.0


class RetainAgent:
    """The retain agent in one process of the role `streams`.

    Args:
        app: The Faust application.
        settings: Topics, alias and clock.
        metrics: Where figures go.
        store: The object store.
        topics: Checks that the topics are the recorded ones, before each request; None: nothing is checked.
    """

    def __init__(
        self, app: Any, settings: Settings, metrics: Metrics, store: ObjectStore, topics: TopicGuard | None = None
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._topics_read = {settings.kafka.topic(name): name for name in topic_names(settings, [TOPIC])}
        self._topics = topics
        self._routing = topics.routing if topics else KeyRouting({})
        self._signer = RecordSigner(settings)
        facts = StoreFacts(settings, store, AckReader(settings, grace=True))
        self._service = RetainService(settings, metrics, facts, self._send)
        self._replicas = ReplicaWatch(AckReader(settings), facts.registry, metrics)
        self._revoked: int | None = None
        self._assigned = False

    def assign(self) -> None:
        """Note that partitions were assigned."""
        self._assigned = True

    def revoke(self) -> None:
        """Note that all partitions were revoked."""
        self._assigned = False
        self._revoked = self._app.consumer_generation_id

    def _is_current(self, generation: int | None) -> bool:
        return generation == self._app.consumer_generation_id and generation != self._revoked

    async def receive(self, event: Any) -> None:
        """Handle one delivery of `retention` and acknowledge it."""
        message = event.message
        if not self._is_current(message.generation_id):
            return  # it will be delivered again to the process that has the partition now
        failpoint("retain.receive")
        if self._topics is not None:
            await asyncio.to_thread(self._topics.verify)
        self._metrics.events_in(TOPIC)
        try:
            _, tenant = split_topic(self._topics_read[message.topic])
            await self._service.receive(_decoded(message), int(message.timestamp * 1000), tenant)
        except WireError as error:
            await self._refuse(error, message)
        except PURE_ERRORS as error:  # one request must not end the role
            log.exception("a request cannot be accepted")
            await self._refuse(WireError("internal-error", type(error).__name__, got=str(error)), message)
        if self._is_current(message.generation_id):
            event.ack()
        failpoint("retain.ack")
        self._metrics.progress()

    async def tick(self) -> None:
        """Run the calendar if this process has partition 0, and set the lag metric."""
        self._metrics.tick(TOPIC)
        if not self._assigned:
            return
        partitions = [tp for tp in self._app.consumer.assignment() if tp.topic in self._topics_read]
        if any(self._topics_read[tp.topic] == TOPIC and tp.partition == 0 for tp in partitions):
            await self._service.tick()
            await asyncio.to_thread(self._replicas.tick)
        with suppress(KafkaError):  # a rebalance may have begun
            lag = 0
            ends = await self._app.consumer.highwaters(*partitions) if partitions else {}
            for tp in partitions:
                position = await self._app.consumer.position(tp)
                lag += max(0, (ends.get(tp) or 0) - (position or 0))
            self._metrics.lag(TOPIC, lag)

    async def _refuse(self, error: WireError, message: Any) -> None:
        topic = self._topics_read[message.topic]
        log.warning("refused %s[%d]@%d: %s", topic, message.partition, message.offset, error.reason)
        value, headers = encode_dead_letter(
            message.value, message.headers, reason=error.reason, stage="retain", detail=error.detail, topic=topic,
            partition=message.partition, offset=message.offset, at=datetime.fromtimestamp(time.time(), UTC),
        )  # fmt: skip
        await self._produce("dead-letters", message.key, value, headers)
        self._metrics.refused(error.reason)

    async def _send(self, event: Event, event_id: str) -> None:
        record = encode(event, event_id=event_id, source=SOURCE, occurred_at=datetime.fromtimestamp(time.time(), UTC))
        headers = self._signer.sign(event.topic, record.key, record.value, record.headers)
        await self._produce(event.topic, record.key, record.value, headers)

    async def _produce(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> None:
        partition = self._routing.partition(topic, key)
        await self._app.producer.send_and_wait(self._settings.kafka.topic(topic), key, value, partition, None, headers)
        self._metrics.events_out(topic)


def _decoded(message: Any) -> RetentionRequested:
    request = decode(message.value, message.headers, TOPIC).event
    if not isinstance(request, RetentionRequested):
        raise WireError("wrong-topic", "type", got=type(request).__name__, allowed=RetentionRequested.type)
    return request
