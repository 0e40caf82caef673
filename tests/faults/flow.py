"""The whole flow with a broker of its own and a small base, for faults of topics, records and requests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.history.example_ids import ExampleIds
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import ExampleAccepted, Origin
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.installation import provision_recorded
from perennial.streams.retain.request_store import load_requests
from perennial.streams.settings import Settings
from tests.faults import parts
from tests.faults.kit import Crew
from tests.faults.report import Row
from tests.integration.learner.learner_kit import base_folder
from tests.integration.test_exactly_once import ADAPTERS, small_settings, text
from tests.oracle import Account, account, exact_position

ROOT = Path(__file__).parents[2]
SETTLED_S = 240.0
COMMAND_S = 200.0


@dataclass
class Flow:
    """A broker, a store, every role, and what the broker acknowledged.

    Attributes:
        broker: The broker.
        settings: Of all roles.
        store: The store.
        registry: The adapters' versions.
        crew: The roles.
        folder: For data and logs.
        acked: The adapter of every acknowledged document, by its id; no two documents have one id.
        rng: Determines the documents.
    """

    broker: EmbeddedBroker
    settings: Settings
    store: DirectoryStore
    registry: Registry
    crew: Crew
    folder: Path
    acked: dict[str, str] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random("flow"))

    def publish(self, count: int, adapter: str | None = None, one_by_one: bool = False, **fields: Any) -> list[str]:
        """Publish documents, wait for the broker, and return their ids.

        Args:
            count: How many.
            adapter: For which adapter; by default any.
            one_by_one: Each in a batch of its own.
            fields: More fields of each document.
        """
        sent = []
        with Publisher(self.settings.kafka.bootstrap, settings=self.settings) as publisher:
            for _ in range(count):
                number = len(self.acked) + len(sent)
                name, chosen = f"doc-{number}", adapter or self.rng.choice(ADAPTERS)
                more = {"text": text(self.rng, number), **fields}
                sent.append((name, chosen, publisher.document(adapter=chosen, document_id=name, **more)))
                if one_by_one:
                    publisher.flush(30)
            for name, chosen, receipt in sent:
                receipt.result(60)
                self.acked[name] = chosen
        return [name for name, _, _ in sent]

    def examples(self) -> list[ExampleAccepted]:
        """Return everything that intake accepted."""
        found = []
        for record in parts.read_to_end(self.settings, "examples"):
            with suppress(WireError):  # a forged record
                event = decode(record.value, record.headers, "examples").event
                found += [event] if isinstance(event, ExampleAccepted) else []
        return found

    def account(self) -> Account:
        """Return what the manifests say; positions tell topics of one name and leader epochs apart."""
        return account(self.registry, ADAPTERS, exact_position)

    def missing(self) -> list[str]:
        """Return the acknowledged documents that no manifest accounts for."""
        found = self.account()
        done = {
            event.document_id for event in self.examples() if not found.missing([_exact(event.origin)])
        }  # fmt: skip
        return [name for name in self.acked if name not in done]

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = SETTLED_S) -> float:
        """Wait until the condition holds, restart roles that end meanwhile, and return the seconds it took."""
        return parts.seconds_until(condition, timeout_s, f"{what}; logs in {self.folder}", self.crew.tend)

    def settle(self, timeout_s: float = SETTLED_S) -> float:
        """Wait until every acknowledged document is in a manifest, and return the seconds it took."""
        return self.until(lambda: not self.missing(), "every acknowledged document is in a manifest", timeout_s)

    def command(self, *arguments: str) -> str:
        """Run `perennial ...` while the roles go on, and return what it printed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "perennial.streams.cli", *arguments], cwd=ROOT, text=True,
            env={**os.environ, **self.settings.environment()}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self.until(lambda: process.poll() is not None, " ".join(arguments), COMMAND_S)
        finally:
            process.kill()
            said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def request(self, *events: Event) -> None:
        """Publish requests and wait for the broker."""
        with Publisher(self.settings.kafka.bootstrap, settings=self.settings) as publisher:
            for event in events:
                publisher.publish(event).result(60)

    def state_of(self, request_id: str) -> str:
        """Return the state of a request to forget; empty while nobody has read it."""
        record = load_requests(self.store).get(request_id)
        return "" if record is None else record.state

    def row(self, fault: str, recovery_s: float, runs: int = 1, service_gap_s: float = 0.0) -> tuple[Row, list[str]]:
        """Return the figures of a fault, and what is wrong in them as text."""
        time.sleep(1.5)  # a second learning of an example would show now
        found, lost = self.account(), self.missing()
        ids = {adapter: ExampleIds.load(self.store, adapter) for adapter in ADAPTERS}
        by_example = Counter(
            ids[adapter].comparable(item.example_id)
            for adapter in ADAPTERS
            for _, version in self.registry.versions(adapter)
            for item in self.registry.manifest(adapter, version).learned
        )
        twice = [*found.learned_twice, *(name for name, times in by_example.items() if times > 1)]
        stale = parts.stale_publishes(self.settings, self.registry)
        row = Row(fault, runs, len(lost), len(twice), len(stale), recovery_s, service_gap_s)
        return row, [*lost, *map(str, twice), *stale]


def _exact(origin: Origin) -> tuple[str, int]:
    return f"{origin.partition_key()}#{origin.leader_epoch}", origin.offset


@contextmanager
def started(root: Path) -> Iterator[Flow]:
    """Start a broker and every role on an empty store; end them afterwards."""
    with ExitStack() as stack:
        broker = EmbeddedBroker(root / "kafka").start()
        stack.callback(broker.stop)
        settings = small_settings(broker.bootstrap, "", root / "store").replace(
            base=str(base_folder(root)), device="cpu", learning_rate=1e-3, clock_settle_s=1.0, expiry_lead_s=3.0,
            replica_lease_s=4.0, poll_s=0.5,
        )  # fmt: skip
        store = DirectoryStore(root / "store")
        provision_recorded(settings, store)
        crew = Crew(settings, root / "logs", {})
        stack.callback(crew.stop)
        crew.start()
        yield Flow(broker, settings, store, open_registry(settings), crew, root)
