"""The scorer role: adds the loss under the frozen base and under the live adapter to every accepted example, in order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import ExampleError, ExampleTokenizer, TokenRow, example_rows
from perennial.learner.roles.adapter_cache import NO_ADAPTER, AdapterCache, LiveAdapter
from perennial.learner.together.measure_together import MeasuredRows, measure_together
from perennial.storage.errors import StoreUnavailableError
from perennial.storage.failpoints import failpoint
from perennial.storage.objects.factory import open_store
from perennial.storage.prompts.system_prompts import SystemPrompts
from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, decode
from perennial.streams.events.fields import MAX_LOSS_NATS
from perennial.streams.events.models import ExampleAccepted, ExampleScored, Origin
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.group import ConfirmingProducer, ConsumedRecord, GroupConsumer
from perennial.streams.kafka.installation import ROLE_TOPICS, check_installation
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_log = logging.getLogger("perennial.scorer")

TOPIC = "examples"
POLL_S = 0.2
KAFKA_RETRY_S = 1.0
MAX_SCORE_BYTES = 1024
"""Bytes that a scored event has more than its example, at most."""
FIRST_READ_WAIT_S = 0.25
"""Seconds that scoring waits for the weights of an adapter that it has not met before."""


def run_scorer(
    settings: Settings,
    stop: threading.Event,
    metrics: Metrics,
    base: Base | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Score the topic `examples` into `scored-examples` until `stop` is set.

    Args:
        settings: Kafka, store, model and serving.
        stop: ends the role.
        metrics: what the role reports.
        base: the frozen model, if other roles of this process share it.
        lock: held for one forward pass at a time, if other roles share the base.

    Raises:
        PerennialError: Kafka stays unavailable; offsets of records whose events were not confirmed are not committed.
    """
    store = open_store(settings.store.require_uri(), settings.s3)
    check_installation(settings, store, ROLE_TOPICS["scorer"])
    base = base or load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    make_deterministic(settings.model.threads)
    registry = Registry(store, trust=settings.signing.readers_trust())
    scorer = Scorer(base, settings, lock, SystemPrompts(store))
    with (
        AdapterCache(
            registry, settings.serving.alias, base.digest, scorer.lora.config, scorer.lora.shapes,
            poll_s=settings.serving.poll_s, clock=time.monotonic, metrics=metrics,
        ) as adapters,
        ConfirmingProducer(settings, "scorer", metrics, _now) as producer,
        GroupConsumer(
            settings, TOPIC, "scorer", max_records=4 * settings.model.score_batch, writes=["scored-examples"],
            metrics=metrics,
        ) as consumer,
        OriginCheck.of(settings, store) as origins,
    ):  # fmt: skip
        receiver = Receiver(settings, producer, origins, scorer.require_rows)
        while not stop.is_set():
            records = consumer.poll(POLL_S)
            metrics.lag(TOPIC, consumer.lag() + len(records))
            if not records:
                continue
            failpoint("scorer.receive")
            metrics.events_in(TOPIC, len(records))
            began = time.perf_counter()
            accepted = receiver.accept(records, stop)
            if accepted is None:
                break
            examples = [example for example, _ in accepted]
            live = adapters.get((example.adapter for example in examples if example.learn), FIRST_READ_WAIT_S)
            scored = scorer.score(examples, live)
            metrics.stage_s("score", time.perf_counter() - began)
            failpoint("scorer.score")
            for (_, traceparent), event in zip(accepted, scored, strict=True):
                producer.send(event, event_id=_event_id(event), occurred_at=_now(), traceparent=traceparent)
            producer.flush()
            failpoint("scorer.produce")
            consumer.commit(records)
            failpoint("scorer.commit")
            metrics.progress()
            metrics.lag(TOPIC, consumer.lag())


_Group = tuple[list[int], MeasuredRows]
"""Places of examples, and their rows under one adapter."""


class Scorer:
    """Computes losses of examples under the base and under given versions. Equal arguments give equal losses.

    Args:
        base: the frozen model; a LoRA slot is put into it.
        settings: row length, batch size and LoRA shape.
        lock: held for one forward pass at a time, if other roles share the base.
        system_prompt: returns the system prompt of an adapter; None where it has none.
    """

    def __init__(
        self,
        base: Base,
        settings: Settings,
        lock: AbstractContextManager[Any] | None = None,
        system_prompt: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._system_prompt = system_prompt
        self._codec = ExampleTokenizer(base.tokenizer)
        self._row_tokens = min(settings.model.max_tokens, base.max_positions)
        self._lock = lock or threading.RLock()
        with self._lock:  # another role may be putting its own slot into the shared base
            self.lora = Lora(base, LoraConfig(settings.training.rank, settings.training.alpha), slot="scorer")
        self._composed: dict[LoraConfig, Lora] = {}

    def score(self, examples: Sequence[ExampleAccepted], live: Mapping[str, LiveAdapter]) -> list[ExampleScored]:
        """Return one scored event per example, in order.

        Args:
            examples: the examples.
            live: the live version of each adapter, as clients serve it.

        Returns:
            Events with losses in nats per token over the example's first row (at most `max_tokens` tokens) and the
            number of tokens of the whole example. An example without text to learn has no losses and no tokens.
        """
        rows = [self._rows(example) for example in examples]
        with_text = [index for index, group in enumerate(rows) if group]
        first_rows = [rows[index][0] for index in with_text]
        groups: dict[LoraConfig | None, list[_Group]] = {None: [(with_text, MeasuredRows(None, first_rows))]}
        for name in dict.fromkeys(examples[index].adapter for index in with_text):
            served = live.get(name, NO_ADAPTER)
            if served.state is not None:
                places = [index for index in with_text if examples[index].adapter == name]
                measured = MeasuredRows(served.state, [rows[index][0] for index in places])
                groups.setdefault(served.config, []).append((places, measured))
        base: dict[int, float | None] = {}
        adapted: dict[int, float | None] = {}
        for config, group in groups.items():
            losses = self._losses(config, [measured for _, measured in group])
            for (places, measured), nats in zip(group, losses, strict=True):
                found = base if measured.weights is None else adapted
                found.update(zip(places, nats, strict=True))
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

    def require_rows(self, example: ExampleAccepted) -> None:
        """Raise what the example's text breaks in the tokenizer, if anything; `score` tokenizes it again."""
        self._rows(example)

    def _rows(self, example: ExampleAccepted) -> list[TokenRow]:
        if not example.learn:
            return []
        try:
            prompt = None if example.prompt is None else self._system_prompt(example.adapter)
            return example_rows(example, self._codec, self._row_tokens, prompt)
        except ExampleError:
            return []

    def _lora(self, config: LoraConfig | None) -> Lora:
        """Return the slot for weights of this rank and alpha; None: those of an adapter alone.

        There are as many slots as shared adapters have ranks: one, unless PERENNIAL_RANK was changed.
        """
        if config is None:
            return self.lora
        if config not in self._composed:
            with self._lock:
                slot = f"scorer-{config.rank}-{config.alpha}"
                self._composed[config] = Lora(self.lora.base, config, slot)
        return self._composed[config]

    def _losses(self, config: LoraConfig | None, measured: Sequence[MeasuredRows]) -> list[list[float | None]]:
        """Return the loss of each row in nats per token; None if it is not finite, or out of an event's bounds."""
        losses = measure_together(self._lora(config), measured, self._codec.pad, lock=self._lock)
        means = [[float(nats.mean()) if len(nats) else 0.0 for nats in of_adapter] for of_adapter in losses]
        return [[nats if abs(nats) <= MAX_LOSS_NATS else None for nats in of_adapter] for of_adapter in means]


class Receiver:
    """Refuses the records that cannot be scored, so that none of them ends the role.

    Args:
        settings: the key of the records' signatures.
        producer: of the dead letters.
        origins: refuses origins that the broker cannot have given.
        require: raises any exception where an example makes a pure function fail.
    """

    def __init__(
        self,
        settings: Settings,
        producer: ConfirmingProducer,
        origins: OriginCheck,
        require: Callable[[ExampleAccepted], None],
    ) -> None:
        self._signer = RecordSigner(settings)
        self._producer = producer
        self._origins = origins
        self._require = require

    def accept(
        self, records: Sequence[ConsumedRecord], stop: threading.Event
    ) -> list[tuple[ExampleAccepted, str | None]] | None:
        """Return the examples that can be scored with their trace contexts, in order; None if `stop` was set meanwhile.

        The other records are sent to the dead letters. While Kafka does not answer, this waits.
        """
        decoded: list[tuple[ConsumedRecord, ExampleAccepted, str | None]] = []
        for record in records:
            try:
                example, traceparent = self._example(record)
            except WireError as error:
                self._refuse(record, error)
            else:
                decoded.append((record, example, traceparent))
        errors = self._origin_errors([example.origin for _, example, _ in decoded], stop)
        if errors is None:
            return None
        accepted = []
        for (record, example, traceparent), implausible in zip(decoded, errors, strict=True):
            if implausible is None:
                accepted.append((example, traceparent))
            else:
                self._refuse(record, implausible)
        return accepted

    def _example(self, record: ConsumedRecord) -> tuple[ExampleAccepted, str | None]:
        try:
            self._signer.verify(TOPIC, record.key, record.value, record.headers)
            envelope = decode(record.value, record.headers, TOPIC)
        except PURE_ERRORS as error:
            raise WireError("internal-error", type(error).__name__, got=str(error)) from error
        example = envelope.event
        if not isinstance(example, ExampleAccepted):
            raise WireError("wrong-topic", "type", got=envelope.type, allowed=ExampleAccepted.type)
        size, limit = len(record.value or b""), MAX_INSIDE_VALUE_BYTES - MAX_SCORE_BYTES
        if size > limit // 2:  # the scored event writes out what the record may have left to defaults
            size = max(size, len(example.model_dump_json(by_alias=True).encode()))
        if size > limit:
            raise WireError("oversize", "size of the value in bytes", got=size, allowed=f"at most {limit}")
        try:
            self._require(example)
        except (WireError, MemoryError):
            raise
        except Exception as error:
            raise WireError("internal-error", type(error).__name__, got=str(error)) from error
        return example, envelope.traceparent

    def _origin_errors(self, origins: Sequence[Origin], stop: threading.Event) -> list[WireError | None] | None:
        while not stop.is_set():
            try:
                return self._origins.errors(origins)
            except (KafkaUnavailableError, StoreUnavailableError) as error:
                _log.warning("the origins of examples cannot be checked yet: %s", error)
                stop.wait(KAFKA_RETRY_S)
        return None

    def _refuse(self, record: ConsumedRecord, error: WireError) -> None:
        _log.warning("record %d/%d refused: %s", record.partition, record.offset, error)
        self._producer.send_dead_letter(record, error.reason, error.detail)


def _event_id(event: ExampleScored) -> str:
    origin = event.example.origin
    return str(uuid5(NAMESPACE_URL, f"scored/{event.example.adapter}/{origin.partition_key()}/{origin.offset}"))


def _now() -> datetime:
    return datetime.now(UTC)
