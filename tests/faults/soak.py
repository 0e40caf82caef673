"""Random faults under load, with erasures and expiries, and at the end the books must balance.

`python -m tests.faults.soak --minutes 10 [--seed N]`, on a real Apache Kafka, a real MinIO and all roles as processes:
every acknowledged event is learned once, skipped, refused by the gate, dead-lettered, or expired or erased, and none is
left over; nothing is learned twice, nothing stale is published, and of what was erased neither the text is in the store
nor a use in the schedule of what is live. The last line is JSON; the exit status is 1 where any of that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kafka import KafkaProducer
from kafka.errors import KafkaError

from storage.blobs import open_store
from storage.errors import PerennialError
from storage.quarantine import load_quarantine
from storage.registry import Registry
from streams.broker import EmbeddedBroker
from streams.cli.minio_server import STORE_URI, MinioServer
from streams.cli.supervise import ROLES, Supervisor
from streams.client import Publisher, PublishError, Receipt
from streams.connect import connect
from streams.settings import Settings
from streams.topics import provision
from tests.faults import parts
from tests.integration.test_exactly_once import ADAPTERS, WORDS, small_settings
from tests.oracle import Account, account

QUIET_S = 240.0
"""After the load and the faults end, so long may it take until all is accounted for."""
GONE = frozenset({"expired", "quarantined"})
REFUSED = frozenset({"not-finite", "gradient-explosion", "no-op", "no-gain", "general-rise"})
TERMS = ("learned once", "skipped", "refused by the gate", "dead-lettered", "expired or erased", "pending")


@dataclass(frozen=True)
class Sent:
    """One event that the broker acknowledged. needle: text that nothing else holds."""

    kind: str
    adapter: str
    name: str
    needle: str
    body: str
    origin: tuple[str, int]
    expires_at: datetime | None = None


@dataclass
class Load:
    """Publishes whatever comes to mind, and keeps the log of what was acknowledged."""

    settings: Settings
    rng: random.Random
    publisher: Publisher
    sent: list[Sent] = field(default_factory=list)
    erased: dict[str, Sent] = field(default_factory=dict)
    unknown: int = 0
    number: int = 0

    def one(self) -> None:
        """One event: mostly a document, sometimes a correction, a repeat, junk, a lifetime, an erasure."""
        draw = self.rng.random()
        old = [each for each in self.sent if each.kind == "document" and each.name not in self.erased]
        if draw < 0.03 and len(old) > 20:
            self.erase(self.rng.choice(old[-40:]))
        elif draw < 0.08 and old:
            again = self.rng.choice(old[-100:])
            self.put("repeat", again.adapter, again.name, again.needle, again.body)
        elif draw < 0.13:
            self.junk()
        else:
            self.number += 1
            kind = "correction" if draw < 0.25 else "mortal" if draw < 0.29 else "document"
            needle = f"needle{self.number:06d}x{self.rng.getrandbits(32):08x}"
            body = f"{needle} " + " ".join(self.rng.choices(WORDS, k=20))
            self.put(kind, self.rng.choice(ADAPTERS), f"{kind}-{self.number}", needle, body)

    def put(self, kind: str, adapter: str, name: str, needle: str, body: str) -> None:
        """Publish, and log the acknowledgement."""
        until = datetime.now(UTC) + timedelta(seconds=self.rng.uniform(15, 40)) if kind == "mortal" else None
        try:
            receipt = (
                self.publisher.interaction(
                    adapter=adapter, interaction_id=name, prompt="what is it?", response="no idea", correction=body
                )
                if kind == "correction"
                else self.publisher.document(adapter=adapter, document_id=name, text=body, expires_at=until)
            )
            self.log(receipt, lambda origin: Sent(kind, adapter, name, needle, body, origin, until))
        except PublishError:
            self.unknown += 1

    def log(self, receipt: Receipt, made: Callable[[tuple[str, int]], Sent]) -> None:
        """Wait for the acknowledgement."""
        found = receipt.result(30)
        self.sent.append(made((f"{found.topic}/{found.partition}", found.offset)))

    def junk(self) -> None:
        """What no parser takes, past the SDK."""
        value = self.rng.choice((b"\xff\xfe", b"{", b"[]", b'{"adapter": "A B", "document_id": "x", "text": "y"}', b"null"))
        with suppress(KafkaError, OSError):
            producer = connect(KafkaProducer, self.settings.require_kafka(), 10, acks="all")
            try:
                found = producer.send(self.settings.topic("documents"), value=value).get(15)
            except KafkaError:
                self.unknown += 1
            else:
                self.sent.append(Sent("junk", "", "", "", "", (f"{found.topic}/{found.partition}", found.offset)))
            finally:
                producer.close(timeout=2)

    def erase(self, victim: Sent) -> None:
        """Ask to forget a document."""
        request = f"erase-{len(self.erased)}"
        with suppress(PublishError):
            self.publisher.retention(
                request_id=request, kind="erase", adapter=victim.adapter, requested_by="soak",
                selector={"document_ids": [victim.name]},
            ).result(30)  # fmt: skip
            self.erased[victim.name] = victim


@dataclass
class Stack:
    """Everything that runs, and how to hurt it."""

    settings: Settings
    broker: EmbeddedBroker
    server: MinioServer
    supervisor: Supervisor
    rng: random.Random

    def fault(self) -> Iterator[str]:
        """One random fault: yields what it does while it lasts, and mends it afterwards."""
        kind = self.rng.choice(("kill", "kill", "kill", "stop", "stop", "all", "broker", "store"))
        role = self.rng.choice(ROLES)
        seconds = self.rng.uniform(2, 12)
        if kind == "kill":
            self.supervisor.children[role].signal(signal.SIGKILL)
            yield f"kill -9 {role}"
        elif kind == "all":
            for child in self.supervisor.children.values():
                child.signal(signal.SIGKILL)
            yield "kill -9 of all roles"
        elif kind == "stop":
            self.supervisor.children[role].signal(signal.SIGSTOP)
            try:
                yield f"SIGSTOP {role} for {seconds:.0f} s"
                time.sleep(seconds)
            finally:
                self.supervisor.children[role].signal(signal.SIGCONT)
        elif kind == "broker":
            self.broker.kill()
            yield f"broker killed, away for {seconds / 3:.0f} s"
            time.sleep(seconds / 3)
            self.broker.start()
        else:
            os.killpg(self.server._process.pid, signal.SIGKILL)
            yield f"MinIO killed, away for {seconds:.0f} s"
            time.sleep(seconds)
            self.server.tend()

    def tend(self) -> None:
        """Start again what ended."""
        self.supervisor.tend()
        self.server.tend()


def run(minutes: float, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, object]:
    """The whole soak; the figures of its last line."""
    rng = random.Random(f"soak {seed}")
    with ExitStack() as stack:
        broker = EmbeddedBroker(folder / "kafka").start()
        stack.callback(broker.stop)
        server = MinioServer(folder / "minio")
        server.start()
        stack.callback(server.stop)
        os.environ.update(server.environment())
        settings = small_settings(broker.bootstrap, "", STORE_URI).model_copy(update={"clock_settle_s": 1.0})
        store = open_store(STORE_URI)
        store.probe()
        provision(settings)
        supervisor = Supervisor(settings, folder / "logs")
        supervisor.start()
        stack.callback(supervisor.stop)
        supervisor.wait_healthy()
        everything = Stack(settings, broker, server, supervisor, rng)
        publisher = Publisher(settings.kafka, settings=settings)
        load = Load(settings, rng, publisher)
        registry = Registry(store, nonce=lambda: "soak", now=lambda: datetime.now(UTC))
        faults = soak(everything, load, minutes * 60, say)
        with suppress(PublishError):  # it says what was lost; that is counted as unknown
            publisher.close()
        waited = settle(everything, load, registry, say)
        return judge(settings, registry, load) | {"faults": faults, "quiet_s": round(waited, 1), "seed": seed}


def soak(stack: Stack, load: Load, seconds: float, say: Callable[[str], None]) -> int:
    """Publish and hurt until the time is up; how many faults there were."""
    began, faults = time.monotonic(), 0
    due, told = began + 5, began
    while (now := time.monotonic()) - began < seconds:
        load.one()
        stack.tend()
        if now >= due and seconds - (now - began) > 5:
            for what in stack.fault():
                faults += 1
                say(f"{now - began:6.0f} s  {what}")
                for _ in range(5):
                    load.one()
            due = time.monotonic() + stack.rng.uniform(8, 20)
        if now - told > 10:
            told = now
            say(f"{now - began:6.0f} s  {len(load.sent)} acknowledged, {len(load.erased)} erasures asked for")
        time.sleep(stack.rng.uniform(0.05, 0.4))
    return faults


def settle(stack: Stack, load: Load, registry: Registry, say: Callable[[str], None]) -> float:
    """Wait until all is accounted for and every request is through; the seconds that it took."""
    began, told = time.monotonic(), 0.0
    last_expiry = max((sent.expires_at for sent in load.sent if sent.expires_at), default=datetime.now(UTC))
    while time.monotonic() - began < QUIET_S:
        stack.tend()
        with suppress(PerennialError):
            pending = terms(stack.settings, load, account(registry, ADAPTERS))["pending"]
            waiting = open_requests(registry)
            if not pending and not waiting and datetime.now(UTC) > last_expiry + timedelta(seconds=10):
                break
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"quiet   {len(pending)} pending, {waiting} requests open")
        time.sleep(1)
    return time.monotonic() - began


def open_requests(registry: Registry) -> int:
    """Entries that no learner has ended."""
    return sum(entry.done is None for adapter in ADAPTERS for entry in load_quarantine(registry.store, adapter).entries)


def terms(settings: Settings, load: Load, found: Account) -> dict[str, list[tuple[str, int]]]:
    """The oracle's equation: each acknowledged origin in exactly one term."""
    letters = set()
    for record in parts.read_to_end(settings, "dead-letters"):
        said = {name: (value or b"").decode("utf-8", "replace") for name, value in record.headers}
        letters.add((f"{said['perennial-topic']}/{said['perennial-partition']}", int(said["perennial-offset"])))
    known: set[tuple[str, str, str]] = set()
    result: dict[str, list[tuple[str, int]]] = {name: [] for name in TERMS}
    now = datetime.now(UTC)
    for sent in load.sent:
        reason = found.reasons.get(sent.origin)
        repeated = (sent.adapter, sent.name, sent.body) in known
        known.add((sent.adapter, sent.name, sent.body))
        # Intake drops a repeat without a word: the first publication of the same text is in the log.
        if sent.origin in letters:
            term = "dead-lettered"
        elif reason in GONE or sent.name in load.erased or (sent.expires_at is not None and sent.expires_at < now):
            was_there = reason is not None or sent.origin in found.learned or repeated
            term = "expired or erased" if was_there else "pending"
        elif sent.origin in found.learned:
            term = "learned once"
        elif reason in REFUSED:
            term = "refused by the gate"
        elif reason is not None or repeated:
            term = "skipped"
        else:
            term = "pending"
        result[term].append(sent.origin)
    return result


def judge(settings: Settings, registry: Registry, load: Load) -> dict[str, object]:
    """Print the equation and what is wrong; the figures."""
    found = account(registry, ADAPTERS)
    counted = terms(settings, load, found)
    stale = parts.stale_publishes(settings, registry)
    now = datetime.now(UTC)
    gone = [*load.erased.values(), *(sent for sent in load.sent if sent.expires_at and sent.expires_at < now)]
    used, readable = still_used(registry, gone), still_readable(registry, gone)
    sums = " + ".join(f"{len(counted[name])} {name}" for name in TERMS)
    holds = sum(map(len, counted.values())) == len(load.sent) and not counted["pending"]
    print(f"\n{len(load.sent)} acknowledged = {sums}")
    print(f"{load.unknown} publishes were never acknowledged; published: {dict(Counter(sent.kind for sent in load.sent))}")
    print(f"updates: {dict(found.outcomes)}; forgotten {len(gone)}: {len(load.erased)} erased, the others expired")
    for what, which in (
        ("pending", counted["pending"]), ("learned twice", found.learned_twice), ("stale", stale),
        ("still used", used), ("still readable", readable),
    ):  # fmt: skip
        if which:
            print(f"{what}: {which[:10]}")
    return {
        "acknowledged": len(load.sent), **{name.replace(" ", "_"): len(counted[name]) for name in TERMS},
        "unknown": load.unknown, "learned_twice": len(found.learned_twice), "stale_publishes": len(stale),
        "forgotten": len(gone), "still_used": len(used), "still_readable": len(readable),
        "requests_open": open_requests(registry), "holds": holds,
    }  # fmt: skip


def still_used(registry: Registry, gone: list[Sent]) -> list[str]:
    """Forgotten documents that an update in the schedule of what is newest has learned."""
    origins = {sent.origin: sent.name for sent in gone}
    found = []
    for adapter in ADAPTERS:
        head = registry.head(adapter)
        version = head.version if head else None
        while version is not None:
            manifest = registry.manifest(adapter, version)
            for item in manifest.learned:
                topic_partition = "/".join(item.partition.rsplit("/", 2)[-2:])
                if (topic_partition, item.offset) in origins:
                    found.append(origins[topic_partition, item.offset])
            version = manifest.schedule_parent
    return found


def still_readable(registry: Registry, gone: list[Sent]) -> list[str]:
    """Forgotten documents whose text is in any object of the store."""
    bodies = [registry.store.get(key, 1 << 30).data for key in registry.store.list("")]
    return [sent.name for sent in gone if any(sent.needle.encode() in body for body in bodies)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long there is load and faults")
    parser.add_argument("--seed", type=int, default=None, help="of load and faults; by default the time")
    arguments = parser.parse_args()
    seed = int(time.time()) % 1_000_000 if arguments.seed is None else arguments.seed
    print(f"soak of {arguments.minutes:g} minutes, seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="perennial-soak-"))
    figures = run(arguments.minutes, seed, folder, lambda line: print(line, flush=True))
    wrong = ("pending", "learned_twice", "stale_publishes", "still_used", "still_readable", "requests_open")
    ok = bool(figures["holds"]) and not any(figures[name] for name in wrong)
    print(f"logs: {folder}" if not ok else "the equation holds")
    print(json.dumps(figures))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
