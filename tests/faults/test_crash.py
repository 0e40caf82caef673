"""kill -9 at every failpoint, on a real Apache Kafka and a real MinIO: nothing lost, nothing learned twice.

All roles run. In each round every role that has a failpoint left gets it, and documents are published. Each of these
roles must die there and is started again at once. The round ends when everything acknowledged is in a manifest, the
alias names the newest version, and that was published; the table has the seconds from each death until then. Other
rounds, each with an adapter of its own, kill retain and the learner during an erasure. At the end the weights must be
those of a training from scratch without kills, with the micro-batches that the publisher's own log implies.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.model.base import load_base
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.client.publisher import Publisher
from perennial.streams.events.models import Batch, ExampleAccepted, ForgetRequested, UpdateRequested
from perennial.streams.kafka.topics import provision
from perennial.streams.settings import Settings
from tests import scratch
from tests.faults.kit import Crew, failpoints
from tests.faults.parts import envelopes, stale_publishes
from tests.faults.report import Row
from tests.integration.streams.test_intake import assert_in_order_without_gaps
from tests.oracle import Account, account
from tests.services import start_minio
from tests.unit.learner.test_forgetting import readable

ELSEWHERE = {"dlq.send", "dlq.save", "gc.mark", "gc.plan", "gc.delete"}
"""`perennial dlq replay` is killed in tests/integration/streams/test_dlq.py, `perennial gc` is cut off in
tests/unit/learner/test_collect_versions.py."""
PER_CUT = 6
DOCUMENTS_PER_ROUND = 2 * PER_CUT
GIVE_UP_S = 240.0
"""Below the 300 s after which a consumer group expels a member that does not poll, so that such a stall is a failure."""
SAME_NATS = 1e-4
ADAPTER = "acme/crash"
OFTEN = {"curate.receive": DOCUMENTS_PER_ROUND, "learner.load": 2, "learner.train": 2, "publish.manifest": 2}
"""Failpoints that a round reaches more than once, and how often: the kill is at any of these times."""


def role_of(failpoint: str) -> str:
    """Return the role that has a failpoint."""
    part = failpoint.partition(".")[0]
    return {"curate": "streams", "retain": "streams", "publish": "learner"}.get(part, part)


def forgets(failpoint: str) -> bool:
    """Return whether only a forgetting reaches the failpoint."""
    return failpoint.startswith(("retain.", "learner.forget_"))


def plan(names: Sequence[str], runs: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rounds with documents and those with an erasure: failpoints by role, each failpoint `runs` times."""

    def rounds(chosen: list[str]) -> list[dict[str, str]]:
        queues = [
            [failpoint for failpoint in chosen if role_of(failpoint) == role]
            for role in dict.fromkeys(map(role_of, chosen))
        ]
        return [{role_of(failpoint): failpoint for failpoint in row if failpoint} for row in zip_longest(*queues)]

    wanted = [name for name in names if name not in ELSEWHERE]
    learning, forgetting = [n for n in wanted if not forgets(n)], [n for n in wanted if forgets(n)]
    return rounds(learning) * runs, rounds(forgetting) * runs


def test_every_failpoint_of_the_source_is_in_the_matrix() -> None:
    names = failpoints()
    learning, forgetting = plan(names, 3)
    times = Counter(failpoint for row in [*learning, *forgetting] for failpoint in row.values())
    assert set(times) == set(names) - ELSEWHERE
    assert set(times.values()) == {3}
    for part in ("intake.", "scorer.", "curate.", "retain.", "learner.", "publish."):
        assert any(name.startswith(part) for name in times), part


@dataclass
class Bench:
    """The running roles, and what the publisher logged.

    Attributes:
        settings: Of all roles.
        registry: The adapters' versions.
        crew: The roles' processes.
        publisher: Publishes documents and requests.
        rng: Determines texts and kills.
        acked: Positions of the acknowledged documents, by adapter.
    """

    settings: Settings
    registry: Registry
    crew: Crew
    publisher: Publisher
    rng: random.Random
    acked: dict[str, list[tuple[str, int]]]

    def publish(self, adapter: str, count: int) -> None:
        """Publish documents that differ from each other and log their acknowledgements."""
        log = self.acked.setdefault(adapter, [])
        receipts = [
            self.publisher.document(
                adapter=adapter, document_id=f"doc-{len(log) + number}",
                text=" ".join(f"{self.rng.choice(('red', 'blue', 'green'))} {self.rng.randrange(1000)}" for _ in range(8)),
            )
            for number in range(count)
        ]  # fmt: skip
        log += [(f"{d.topic}/{d.partition}", d.offset) for d in (receipt.result(120) for receipt in receipts)]

    def settled(self, adapter: str) -> bool:
        """Return whether the newest version accounts for the last acknowledged document and is served."""
        head = self.registry.head(adapter)
        state = self.registry.alias(adapter, self.settings.serving.alias)
        if head is None or state is None or state.version != head.version:
            return False
        return max(head.manifest.marks.values(), default=-1) >= self.acked[adapter][-1][1]

    def account(self) -> Account:
        """Return what the manifests of all adapters say."""
        return account(self.registry, self.acked)

    def lost(self, found: Account) -> list[tuple[str, int]]:
        """Return what was acknowledged and is in no manifest."""
        return [position for log in self.acked.values() for position in found.missing(log)]

    def run(self, kills: Mapping[str, str], act: Callable[[], None], settled: Callable[[], bool]) -> dict[str, float]:
        """Run a round: set the failpoints, act, start each role again that dies, wait until all is settled.

        Args:
            kills: The failpoint of each role that is to be killed.
            act: Publishes what makes the roles reach their failpoints.
            settled: Returns whether the round may end.

        Returns:
            For each failpoint the seconds from the kill until everything had settled.
        """
        for role, failpoint in kills.items():
            self.crew.set_failpoint(role, f"{failpoint}:{self.rng.randint(1, OFTEN.get(failpoint, 1))}")
        died: dict[str, float] = {}
        act()
        deadline = time.monotonic() + GIVE_UP_S
        while len(died) < len(kills) or not settled():
            for role, failpoint in kills.items():
                code = self.crew.exit_code(role)
                if role not in died and code is not None:
                    assert code == -signal.SIGKILL, (
                        f"{role} ended with {code} on its way to {failpoint}:\n{self.crew.tail(role)}"
                    )
                    died[role] = time.monotonic()
                    self.crew.set_failpoint(role, "")
                    self.crew.start(role)
            if time.monotonic() > deadline:
                late = set(kills) - set(died)
                tails = "\n".join(f"--- {role}\n{self.crew.tail(role)}" for role in kills)
                pytest.fail(f"not settled in {GIVE_UP_S:.0f} s, never reached: {[kills[r] for r in late]}\n{tails}")
            time.sleep(0.05)
        stale_publishes(self.settings, self.registry)  # waits until the last events are published, too
        now = time.monotonic()
        return {kills[role]: now - at for role, at in died.items()}


@pytest.fixture
def bench(broker, topic_prefix, tmp_path, monkeypatch):
    server = start_minio(tmp_path / "minio")
    try:
        environment = server.environment()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        settings = Settings.of(
            kafka=broker.bootstrap, topic_prefix=topic_prefix, store="s3://perennial/crash", partitions=1, threads=1,
            max_batch_examples=PER_CUT, min_batch_examples=PER_CUT + 1, max_batch_tokens=100_000, max_age_s=3600,
            steps=1, rows=4, row_tokens=48, max_tokens=48, anchor_rows=1, max_general_rise_nats=50, min_gain_nats=-50,
            learning_rate=1e-3, poll_s=1,
        )  # fmt: skip
        open_store(settings.store.uri).probe()
        provision(settings)
        crew = Crew(settings, tmp_path / "roles", environment)
        crew.start()
        with Publisher(settings.kafka.bootstrap, settings=settings) as publisher:
            yield Bench(settings, open_registry(settings), crew, publisher, random.Random("crash"), {})
    finally:
        crew.stop()
        server.stop()


def from_scratch(bench: Bench, adapter: str, folder: Path, erased: str | None = None) -> scratch.Scratch:
    """Train without kills on what the publisher logged, in micro-batches of PER_CUT.

    Args:
        bench: Its published manifests give the examples as intake accepted them.
        adapter: The adapter.
        folder: For the micro-batches.
        erased: The document that was erased, if any.
    """
    writer = make_version_writer(
        bench.settings, DirectoryStore(folder), load_base("shipped", "cpu", bench.settings.model.threads)
    )
    known: dict[int, ExampleAccepted] = {}
    version: str | None = bench.registry.head(adapter).version
    while version is not None:
        manifest = bench.registry.manifest(adapter, version)
        if manifest.batch is not None:
            body = Batch.model_validate_json(get_blob(bench.registry.store, manifest.batch.digest))
            known.update({example.origin.offset: example for example in body.examples})
        version = manifest.schedule_parent
    log = [offset for _, offset in bench.acked[adapter]]
    cuts = {
        cut: [known[offset] for offset in log[start : start + PER_CUT] if offset in known]
        for cut, start in enumerate(range(0, len(log), PER_CUT))
    }
    names = [example.document_id for cut in cuts.values() for example in cut]
    assert names == [f"doc-{number}" for number in range(len(log)) if f"doc-{number}" != erased]
    return scratch.train(writer.updater_of(None), DirectoryStore(folder), adapter, cuts)


def judge(bench: Bench, recovered: Mapping[str, float], record_fault: Callable[[Row], None]) -> list[str]:
    """Record a row for each failpoint of a round, and return what is wrong after it, as text."""
    found = bench.account()
    lost, twice, stale = bench.lost(found), found.learned_twice, stale_publishes(bench.settings, bench.registry)
    for failpoint, seconds in recovered.items():
        record_fault(Row(f"kill -9 at {failpoint}", 1, len(lost), len(twice), len(stale), round(seconds, 1)))
    return [f"{', '.join(recovered)}: lost {lost}, twice {twice}, stale {stale}"] if lost or twice or stale else []


@pytest.mark.slow(210)
@pytest.mark.timeout(7200)
def test_a_kill_at_every_failpoint_of_learning_loses_nothing_and_learns_nothing_twice(
    bench, fault_runs, record_fault, tmp_path
):
    wrong: list[str] = []
    for kills in plan(failpoints(), fault_runs)[0]:
        killed = bench.run(kills, lambda: bench.publish(ADAPTER, DOCUMENTS_PER_ROUND), lambda: bench.settled(ADAPTER))
        wrong += judge(bench, killed, record_fault)
    assert not wrong, "\n".join(wrong)
    judge_topics(bench, erasures=0)
    assert from_scratch(bench, ADAPTER, tmp_path / "oracle").equals(bench.registry.head(ADAPTER).manifest)


@pytest.mark.slow(120)
@pytest.mark.timeout(7200)
def test_a_kill_at_every_failpoint_of_forgetting_leaves_what_never_saw_it(bench, fault_runs, record_fault, tmp_path):
    rounds = plan(failpoints(), fault_runs)[1]
    adapters = [f"acme/forget-{number}" for number in range(len(rounds))]
    wrong: list[str] = []
    for kills, adapter in zip(rounds, adapters, strict=True):
        request = adapter.replace("/", "-")
        bench.publish(adapter, DOCUMENTS_PER_ROUND)
        bench.run({}, lambda: None, lambda adapter=adapter: bench.settled(adapter))
        killed = bench.run(
            kills, lambda a=adapter, r=request: erase(bench, a, r), lambda a=adapter, r=request: forgotten(bench, a, r)
        )
        wrong += judge(bench, killed, record_fault)
    assert not wrong, "\n".join(wrong)
    judge_topics(bench, erasures=len(rounds))
    for adapter in adapters:
        made = from_scratch(bench, adapter, tmp_path / adapter, erased="doc-3")
        assert made.equals(bench.registry.head(adapter).manifest), adapter
        (entry,) = load_quarantine(bench.registry.store, adapter).entries
        assert entry.done.examples == 1
    erased = [event.text for event in events(bench, "examples") if event.document_id == "doc-3"]
    assert len(set(erased)) == len(rounds)
    assert readable(tmp_path / "minio" / "minio-data" / "perennial", erased) == []


def events(bench: Bench, topic: str) -> list[Any]:
    """Return every event of a topic, in its order."""
    return [envelope.event for envelope in envelopes(bench.settings, topic)]


def judge_topics(bench: Bench, erasures: int) -> None:
    """Check the topics between the roles.

    Records may be repeated after a kill, but with the same content; their first occurrences are in order and without
    gaps, and micro-batches have the size that the publisher's log implies.
    """
    total = sum(map(len, bench.acked.values()))
    assert_in_order_without_gaps(bench.settings, {0: total})
    nats: dict[int, list[float]] = {}
    for event in events(bench, "scored-examples"):
        nats.setdefault(event.example.origin.offset, []).append(event.base_loss_nats)
    assert list(nats) == list(range(total)), "first sightings are in order"
    # Rows are padded to the widest of their batch, so the last bits may differ.
    assert [offset for offset, found in nats.items() if max(found) - min(found) > SAME_NATS] == []
    jobs = events(bench, "adapter-jobs")
    assert len({job.model_dump_json() for job in jobs}) == len({job.job_id for job in jobs}), "a job has one wording"
    sizes = {(job.adapter, job.cut): job.examples + job.skipped for job in jobs if isinstance(job, UpdateRequested)}
    assert sizes == {(name, cut): PER_CUT for name, log in bench.acked.items() for cut in range(len(log) // PER_CUT)}
    assert len({job.job_id for job in jobs if isinstance(job, ForgetRequested)}) == erasures


def erase(bench: Bench, adapter: str, request: str) -> None:
    """Request the erasure of the fourth document."""
    bench.publisher.retention(
        request_id=request, kind="erase", adapter=adapter, requested_by="test", selector={"document_ids": ["doc-3"]}
    ).result(120)


def forgotten(bench: Bench, adapter: str, request: str) -> bool:
    """Return whether the request is done and nothing is left to delete."""
    entry = load_quarantine(bench.registry.store, adapter).entry(request)
    left = list(bench.registry.store.list(f"forgotten/{adapter}"))
    return entry is not None and entry.done is not None and not entry.done.failure and not left
