"""The scorer: adds to every accepted example what the frozen base and the live adapter lose on it, in order."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import ExampleError, ExampleTokenizer, TokenRow, example_rows
from perennial.learner.roles.adapter_cache import NO_ADAPTER, AdapterCache, LiveAdapter
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import Envelope, WireError, decode
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.kafka.group import ConfirmingProducer, ConsumedRecord, GroupConsumer
from perennial.streams.kafka.topics import identify
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.scorer")

TOPIC = "examples"
POLL_S = 0.2
FIRST_SIGHT_WAIT_S = 0.25


def run_scorer(
    settings: Settings,
    stop: threading.Event,
    metrics: Metrics,
    base: Base | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Score the topic examples into scored-examples until stop is set.

    base, lock: shared with other roles of this process; the lock is held for one forward pass at a time.
    Raises PerennialError where Kafka stays away; what was not acknowledged was not committed.
    """
    identify(settings, [TOPIC, "scored-examples", "dead-letters"])
    base = base or load_base(settings.model.base, settings.model.device, settings.model.threads)
    make_deterministic(settings.model.threads)
    registry = Registry(open_store(settings.store.require_uri(), settings.s3), nonce=lambda: uuid4().hex, now=_now)
    scorer = Scorer(base, settings, lock)
    with (
        AdapterCache(
            registry, settings.serving.alias, base.digest, scorer.lora.shapes,
            poll_s=settings.serving.poll_s, clock=time.monotonic, metrics=metrics,
        ) as live,
        ConfirmingProducer(settings, "scorer", metrics, _now) as outbox,
        GroupConsumer(settings, TOPIC, "scorer", max_records=4 * settings.model.score_batch) as inbox,
    ):  # fmt: skip
        while not stop.is_set():
            records = inbox.poll(POLL_S)
            metrics.lag(TOPIC, inbox.lag() + len(records))
            if not records:
                continue
            failpoint("scorer.receive")
            metrics.events_in(TOPIC, len(records))
            began = time.perf_counter()
            envelopes = _decoded(records, outbox)
            examples = [envelope.event for envelope in envelopes if isinstance(envelope.event, ExampleAccepted)]
            versions = live.get((example.adapter for example in examples if example.learn), FIRST_SIGHT_WAIT_S)
            scored = scorer.score(examples, versions)
            metrics.stage_s("score", time.perf_counter() - began)
            failpoint("scorer.score")
            for envelope, event in zip(envelopes, scored, strict=True):
                outbox.send(event, event_id=_event_id(event), occurred_at=_now(), traceparent=envelope.traceparent)
            outbox.flush()
            failpoint("scorer.produce")
            inbox.commit(records)
            failpoint("scorer.commit")
            metrics.progress()
            metrics.lag(TOPIC, inbox.lag())


class Scorer:
    """Losses of examples under the base and under given versions; pure given those."""

    def __init__(self, base: Base, settings: Settings, lock: AbstractContextManager[Any] | None = None) -> None:
        self._codec = ExampleTokenizer(base.tokenizer)
        self._row_tokens = min(settings.model.max_tokens, base.max_positions)
        self._max_rows = settings.model.score_batch
        self._lock = lock or threading.RLock()
        with self._lock:  # another role may be putting its own slot into the shared base
            self.lora = Lora(base, LoraConfig(settings.training.rank, settings.training.alpha), slot="scorer")

    def score(self, examples: Sequence[ExampleAccepted], live: Mapping[str, LiveAdapter]) -> list[ExampleScored]:
        """One scored event per example, in order.

        Losses are nats per token over the example's first row of max_tokens; tokens counts all of the example.
        What is no text to learn passes with neither.
        """
        rows = [self._rows(example) for example in examples]
        places = [index for index, group in enumerate(rows) if group]
        heads = [rows[index][0] for index in places]
        base = dict(zip(places, self._losses(heads, adapted=False), strict=True))
        adapted: dict[int, float | None] = {}
        for name in dict.fromkeys(examples[index].adapter for index in places):
            state = live.get(name, NO_ADAPTER).state
            mine = [index for index in places if examples[index].adapter == name]
            if state is not None:
                self.lora.load(state)  # the slot is this thread's own: no lock
                losses = self._losses([rows[index][0] for index in mine], adapted=True)
                adapted.update(zip(mine, losses, strict=True))
        return [
            ExampleScored(
                example=example,
                tokens=sum(row.tokens for row in rows[index]),
                base_loss_nats=base.get(index),
                live_loss_nats=adapted.get(index),
                live_version=live.get(example.adapter, NO_ADAPTER).version if index in adapted else None,
                live_generation=live.get(example.adapter, NO_ADAPTER).generation if index in adapted else 0,
            )
            for index, example in enumerate(examples)
        ]

    def _rows(self, example: ExampleAccepted) -> list[TokenRow]:
        if not example.learn:
            return []
        try:
            return example_rows(example, self._codec, self._row_tokens)
        except ExampleError:
            return []

    def _losses(self, rows: Sequence[TokenRow], *, adapted: bool) -> list[float | None]:
        """Nats per token of each row; None where it is not a number."""
        losses = row_losses(
            self.lora, rows, pad=self._codec.pad, adapted=adapted, max_rows=self._max_rows, lock=self._lock
        )
        means = [mean_nats([loss]) for loss in losses]
        return [nats if math.isfinite(nats) else None for nats in means]


def _decoded(records: Sequence[ConsumedRecord], outbox: ConfirmingProducer) -> list[Envelope]:
    """The records that can be read; the others go to the dead letters."""
    envelopes = []
    for record in records:
        try:
            envelope = decode(record.value, record.headers, TOPIC)
        except WireError as error:
            _log.warning("record %d/%d refused: %s", record.partition, record.offset, error)
            outbox.send_dead_letter(record, error.reason, error.detail)
            continue
        envelopes.append(envelope)
    return envelopes


def _event_id(event: ExampleScored) -> str:
    origin = event.example.origin
    return str(uuid5(NAMESPACE_URL, f"scored/{event.example.adapter}/{origin.partition_key()}/{origin.offset}"))


def _now() -> datetime:
    return datetime.now(UTC)
