"""Compare intake as shipped with the same work in Quix Streams and in a plain Faust agent, on one real broker.

Run `python -m tests.benchmarks.bench_intake [--events 60000] [--repeats 5]`. Each contender reads the same topic (one
partition, documents of about 600 B, one in fifty a duplicate), decides with the same Acceptor (validation, window,
origin), writes accepted examples keyed by adapter and acknowledged by all replicas, and commits. The contenders run in
turn, each as a process of its own. Time is measured from the first record to the last commit, without start-up and
joining the group. A first run is not counted: a new broker is slow for a while. CPU time is that of the process alone, without the broker's. With `--protected` all of
them speak TLS and SCRAM-SHA-512 and sign what they write. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perennial.streams.intake.validation import Accepted, Acceptor, Duplicate, OriginPartition
from perennial.streams.kafka.security.options import librdkafka_options
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.settings import Settings
from tests.benchmarks.protection import protected_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 5_000
REPEAT_EVERY = 50
PREFIX = "bench-"
CONTENDERS = ("perennial", "quix", "faust")
LIMIT_S = 300
WORDS = [
    "the", "stream", "carries", "what", "changed", "and", "the", "model", "learns", "it", "while", "nobody", "waits", "for",
    "a", "nightly", "job",
]  # fmt: skip


def main() -> int:
    """Run all contenders in turn and return the exit status: 1 if a contender lost or duplicated events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--protected", action="store_true", help="TLS, SCRAM and signed records for every contender")
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--group", default="")
    options = parser.parse_args()
    if options.events % BATCH:
        parser.error(f"--events must be a multiple of {BATCH}, so that every contender's last commit is a full one")
    if options.contender:
        return _run_one(options.contender, options.events, options.group)
    with _broker(protected=options.protected) as environment:
        os.environ.update(environment)
        settings = _settings()
        size_bytes = _publish(settings, options.events)
        return _compare(settings, options.events, options.repeats, size_bytes)


def _settings() -> Settings:
    return Settings.of(topic_prefix=PREFIX, partitions=1, intake_batch=BATCH, env_file=None)  # type: ignore[call-arg]


@contextmanager
def _broker(*, protected: bool) -> Iterator[dict[str, str]]:
    """Yield the variables that lead to a broker: the one that is set, else one that runs meanwhile."""
    if os.environ.get("PERENNIAL_KAFKA"):
        yield {}
        return
    from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker

    with tempfile.TemporaryDirectory() as folder:
        if protected:
            with protected_broker(Path(folder)) as environment:
                yield environment
            return
        with EmbeddedBroker(Path(folder) / "broker") as broker:
            yield {"PERENNIAL_KAFKA": broker.bootstrap}


def _client(settings: Settings) -> dict[str, Any]:
    """Return librdkafka's options that lead to the broker."""
    return {"bootstrap.servers": settings.kafka.bootstrap, **librdkafka_options(settings.kafka_security)}


def _document(number: int, rng: random.Random) -> bytes:
    """Return about 600 bytes of JSON; one in fifty is a duplicate of the document before it."""
    if number % REPEAT_EVERY == REPEAT_EVERY - 1:
        number -= 1
    rng.seed(number)
    fields = {
        "adapter": f"tenant-{number % 97}/support",
        "document_id": f"kb/{number:09d}",
        "text": " ".join(rng.choices(WORDS, k=94))[:480],
        "source": "wiki",
        "observed_at": "2026-01-31T12:00:00Z",
    }
    return json.dumps(fields).encode()


def _publish(settings: Settings, events: int) -> float:
    """Create and fill the input topic, and return the mean size of a value in bytes."""
    from confluent_kafka import Producer

    from perennial.streams.kafka.topics import provision

    provision(settings)
    producer = Producer({**_client(settings), "linger.ms": 50, "acks": "all"})
    rng, total = random.Random(0), 0
    for number in range(events):
        value = _document(number, rng)
        total += len(value)
        while True:
            try:
                producer.produce(settings.kafka.topic("documents"), value, partition=0)
                break
            except BufferError:
                producer.poll(0.1)
    if producer.flush(60):
        raise TimeoutError("the broker did not take the input")
    return total / events


def _compare(settings: Settings, events: int, repeats: int, size_bytes: float) -> int:
    expected = events - events // REPEAT_EVERY
    print(
        f"{events} events of {size_bytes:.0f} B, {expected} to accept, {os.cpu_count()} cores, {repeats} repeats each"
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    rounds = [CONTENDERS[:1]]
    rounds += [CONTENDERS[shift:] + CONTENDERS[:shift] for shift in (n % len(CONTENDERS) for n in range(repeats))]
    for number, names in enumerate(rounds):
        for name in names:
            before = _end(settings)
            command = [sys.executable, "-m", "tests.benchmarks.bench_intake", "--contender", name,
                       "--events", str(events), "--group", f"{PREFIX}{name}-{os.getpid()}-{number}"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            written = _end(settings) - before
            if done.returncode or written != expected:
                print(f"{name}: exit {done.returncode}, wrote {written} of {expected}\n{done.stderr[-3000:]}")
                return 1
            taken = json.loads(done.stdout.splitlines()[-1])
            figures = {"per_s": events / taken["wall_s"], "per_core_s": events / taken["cpu_s"]}
            if number:
                found[name].append(figures)
            print(
                f"{name:10} {figures['per_s']:>9,.0f}/s {figures['per_core_s']:>9,.0f}/core-s"
                f"{'' if number else ', not counted'}",
                flush=True,
            )
    print(json.dumps(_summary(found, events, size_bytes)))
    return 0


def _summary(found: dict[str, list[dict[str, float]]], events: int, size_bytes: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"events": events, "event_bytes": round(size_bytes), "n": len(found["quix"])}
    for name, runs in found.items():
        for figure in ("per_s", "per_core_s"):
            values = [run[figure] for run in runs]
            summary[f"{name}_{figure}"] = round(statistics.median(values))
            summary[f"{name}_{figure}_range"] = [round(min(values)), round(max(values))]
    for figure, label in (("per_s", "ratio"), ("per_core_s", "ratio_per_core_s")):
        best = max(summary[f"quix_{figure}"], summary[f"faust_{figure}"])
        summary[label] = round(summary[f"perennial_{figure}"] / best, 2)
    return summary


def _end(settings: Settings) -> int:
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({**_client(settings), "group.id": f"{PREFIX}look"})
    try:
        high: int = consumer.get_watermark_offsets(TopicPartition(settings.kafka.topic("examples"), 0), timeout=20)[1]
    finally:
        consumer.close()
    return high


class Stopwatch:
    """Measures wall time and this process's CPU time from the first call of `start` to the last call of `lap`."""

    def __init__(self) -> None:
        self._started: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)

    def start(self) -> None:
        if self._started is None:
            self._started = (time.perf_counter(), time.process_time())

    def lap(self) -> None:
        self._ended = (time.perf_counter(), time.process_time())

    def report(self) -> None:
        if self._started is None:
            raise RuntimeError("nothing was read")
        wall_s, cpu_s = (end - start for end, start in zip(self._ended, self._started, strict=True))
        print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s}))


def _run_one(contender: str, events: int, group: str) -> int:
    logging.basicConfig(level=logging.WARNING)
    watch = Stopwatch()
    {"perennial": _perennial, "quix": _quix, "faust": _faust}[contender](_settings(), events, group, watch)
    watch.report()
    return 0


def _acceptor(settings: Settings) -> Acceptor:
    from perennial.streams.kafka.topics import identify

    ids = identify(settings, ["documents"])
    topic = settings.kafka.topic("documents")
    origin = OriginPartition(ids.cluster_id, topic, ids.topic_ids[topic], 0, "documents")
    return Acceptor(origin, settings.intake.dedupe_window, settings.curate.learn_turns)


def _perennial(settings: Settings, events: int, group: str, watch: Stopwatch) -> None:
    """Run the shipped loop with its metrics; only the stopwatch is added."""
    from perennial.streams.intake.service import Intake, spare_garbage_collector
    from perennial.streams.observe.metrics import Metrics

    class Timed(Intake):
        def _produce(self, messages: Any) -> None:
            watch.start()
            super()._produce(messages)

        def finish_commit(self) -> None:
            self._input.finish_commit()

    timed = Timed(settings, Metrics("intake", settings), group)
    spare_garbage_collector()
    stop, consumed = threading.Event(), 0
    while consumed < events:
        consumed += timed.step(stop)
    timed.finish_commit()
    watch.lap()
    timed.close()


def _quix(settings: Settings, events: int, group: str, watch: Stopwatch) -> None:
    """Run a StreamingDataFrame with checkpoints of the same size as intake's batches."""
    from quixstreams import Application
    from quixstreams.checkpointing import Checkpoint
    from quixstreams.context import message_context
    from quixstreams.kafka.configuration import ConnectionConfig
    from quixstreams.models.serializers import Serializer

    class Value(Serializer):
        def __call__(self, value: Any, ctx: Any) -> bytes:
            return bytes(value.value)

    app = Application(
        ConnectionConfig.from_librdkafka_dict(_client(settings)), consumer_group=group, auto_offset_reset="earliest", commit_every=BATCH, commit_interval=5.0,
        producer_extra_config={"acks": "all", "enable.idempotence": True, "partitioner": "murmur2_random"},
        loglevel="WARNING", auto_create_topics=False, state_dir=tempfile.mkdtemp(prefix="bench-quix-"),
    )  # fmt: skip
    documents = app.topic(settings.kafka.topic("documents"), value_deserializer="bytes", key_deserializer="bytes")
    examples = app.topic(settings.kafka.topic("examples"), value_serializer=Value(), key_serializer="bytes")
    acceptor, sign = _acceptor(settings), RecordSigner(settings).sign

    done = 0

    def decide(value: Any, key: Any, timestamp: int, headers: Any) -> list[Accepted]:
        nonlocal done
        watch.start()
        done += 1
        decision = acceptor.accept(value, headers, message_context().offset, timestamp)
        if isinstance(decision, Accepted):
            return [decision]
        if isinstance(decision, Duplicate):
            return []
        raise ValueError(decision)

    frame = app.dataframe(documents).apply(decide, expand=True, metadata=True)
    frame = frame.set_headers(lambda value, *_: sign("examples", value.key, value.value, value.headers))
    frame.to_topic(examples, key=lambda value: value.key)
    commit = Checkpoint.commit

    def timed_commit(self: Checkpoint, **options: Any) -> None:
        commit(self, **options)
        watch.lap()
        if done == events:
            app.stop()

    Checkpoint.commit = timed_commit  # type: ignore[method-assign]
    app.run(frame, collect=False)


def _faust(settings: Settings, events: int, group: str, watch: Stopwatch) -> None:
    """Run a plain agent: it decides per event, sends, and acknowledges a chunk once its sends are acknowledged."""
    import faust

    from perennial.streams.faust_app import faust_credentials

    app = faust.App(
        group, broker=f"kafka://{settings.kafka.bootstrap}", broker_credentials=faust_credentials(settings), value_serializer="raw", web_enabled=False, topic_disable_leader=True,
        producer_acks=-1, producer_linger=0.005, producer_max_request_size=2**21, broker_commit_every=BATCH,
        consumer_auto_offset_reset="earliest", stream_wait_empty=False, datadir=tempfile.mkdtemp(),
        producer_partitioner=None,
    )  # fmt: skip
    documents = app.topic(
        settings.kafka.topic("documents"), value_type=bytes, value_serializer="raw", key_serializer="raw"
    )
    examples = app.topic(
        settings.kafka.topic("examples"), value_type=bytes, value_serializer="raw", key_serializer="raw"
    )
    acceptor, sign = _acceptor(settings), RecordSigner(settings).sign
    ended = asyncio.Event()

    async def settle(pending: list[Any], seen: list[Any]) -> None:
        await asyncio.gather(*pending)
        for event in seen:
            event.ack()
        pending.clear()
        seen.clear()

    @app.agent(documents)
    async def accept(stream: Any) -> None:
        pending: list[Any] = []
        seen: list[Any] = []
        done = 0
        async for event in stream.noack().events():
            watch.start()
            message = event.message
            decision = acceptor.accept(event.value, message.headers, message.offset, int(message.timestamp * 1000))
            if isinstance(decision, Accepted):
                headers = sign("examples", decision.key, decision.value, decision.headers)
                pending.append(await examples.send(key=decision.key, value=decision.value, headers=headers))
            seen.append(event)
            done += 1
            if len(seen) == 500 or done == events:
                await settle(pending, seen)
            if done == events:
                await app.consumer.commit()
                watch.lap()
                ended.set()

    async def run() -> None:
        await app.start()
        await ended.wait()
        await app.stop()

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
