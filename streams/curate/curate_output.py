"""Everything that the curate agent publishes: jobs, drift, and the dead letters of what it refuses."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Final

from perennial.storage.failpoints import failpoint
from perennial.streams.events.cloudevents import Encoded, encode
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.events.fields import Event
from perennial.streams.events.models import DriftDetected, ExampleScored, UpdateRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.kafka.topic_guard import KeyRouting
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.curate")

SOURCE: Final = "perennial/curate"
TOPIC: Final = ExampleScored.topic


class CurateOutput:
    """Publishes through the application's producer.

    Args:
        app: the Faust application, of which the producer is used.
        settings: names of the topics, and the key that signs jobs.
        metrics: counts what is published and refused.
        routing: the partition of each record.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, routing: KeyRouting) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._routing = routing
        self._signer = RecordSigner(settings)

    def verify(self, message: Any) -> None:
        """Check the signature of a delivery.

        Raises:
            WireError: a key is set, and the record is not signed with it.
        """
        self._signer.verify(TOPIC, message.key, message.value, message.headers)

    async def send_job(self, job: UpdateRequested) -> None:
        """Publish a job."""
        await self._send(job, encode(job, event_id=job.job_id, source=SOURCE, occurred_at=job.cut_at))
        failpoint("curate.produce")

    async def send_drift(self, drift: DriftDetected) -> None:
        """Publish drift, and count it."""
        log.info("drift of %s in %s: %.3f to %.3f", drift.signal, drift.adapter, drift.before, drift.after)
        self._metrics.drift(drift.signal, drift.detector, drift.adapter)
        event_id = f"{drift.adapter}:{drift.signal}:{drift.examples_seen}"
        await self._send(drift, encode(drift, event_id=event_id, source=SOURCE, occurred_at=_now()))

    async def refuse(self, error: WireError, value: bytes | None, headers: Any, message: Any) -> None:
        """Send a record to the dead letters as it came.

        Args:
            error: why it is refused.
            value: its value.
            headers: its headers.
            message: Faust's message, of which key, partition and offset are used.
        """
        log.warning("refused %s[%d]@%d: %s", TOPIC, message.partition, message.offset, error)
        await self._send_dead_letter(error, value, headers, message.key, message.partition, message.offset)

    async def refuse_example(self, error: WireError, scored: ExampleScored, partition: int, offset: int) -> None:
        """Send an example that was decoded to the dead letters.

        Args:
            error: why it is refused.
            scored: the example.
            partition: partition of scored-examples that it came from.
            offset: its offset there.
        """
        log.error("refused an example of %s, %s[%d]@%d: %s", scored.example.adapter, TOPIC, partition, offset, error)
        example = scored.example
        try:
            record = encode(scored, event_id=example.example_id, source=SOURCE, occurred_at=_now())
        except WireError:  # it decoded, so only its size, with all defaults written out, can be too much for an event
            record = Encoded(example.adapter.encode(), scored.model_dump_json(by_alias=True).encode(), [])
        await self._send_dead_letter(error, record.value, record.headers, record.key, partition, offset)

    async def _send_dead_letter(
        self, error: WireError, value: bytes | None, headers: Any, key: bytes | None, partition: int, offset: int
    ) -> None:
        record, record_headers = encode_dead_letter(
            value, headers, reason=error.reason, stage="curate", detail=error.detail, topic=TOPIC,
            partition=partition, offset=offset, at=_now(),
        )  # fmt: skip
        await self._produce("dead-letters", key, record, record_headers)
        self._metrics.refused(error.reason)

    async def _send(self, event: Event, encoded: Encoded) -> None:
        headers = self._signer.sign(event.topic, encoded.key, encoded.value, encoded.headers)
        await self._produce(event.topic, encoded.key, encoded.value, headers)

    async def _produce(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> None:
        """Publish a record and wait until all in-sync replicas have acknowledged it."""
        partition = self._routing.partition(topic, key)
        await self._app.producer.send_and_wait(self._settings.kafka.topic(topic), key, value, partition, None, headers)
        self._metrics.events_out(topic)


def _now() -> datetime:
    return datetime.now(UTC)
