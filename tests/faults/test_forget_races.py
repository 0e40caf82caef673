"""Erasures that race an update or a hold.

The result has the bytes of a run that never saw the examples; while a hold blocks the erasure, everything is still there.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.learner.versions import version_writer
from perennial.storage.registry.quarantine import LegalHold, load_quarantine, update_quarantine
from perennial.streams.events.adapter_events import AdapterPromoted
from perennial.streams.kafka.topics import provision
from tests import jobs
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.integration.learner import test_forgetting as forgetting
from tests.oracle import account
from tests.unit.learner.test_forgetting import readable
from tests.unit.learner.test_forgetting_service import Observer

ADAPTER = forgetting.ADAPTER


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(version_writer, "general_texts", parts.few_texts)
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(settings)
    return settings


def wait_committed(settings, count: int) -> None:
    kit.wait_until(lambda: kit.committed(settings, "adapter-jobs", "learner") == count, f"{count} jobs are committed")


def row(fault: str, settings, documents: int, recovery_s: float) -> tuple[Row, list[str]]:
    registry = forgetting.registry(settings)
    found = account(registry, [ADAPTER])
    stale = parts.stale_publishes(settings, registry)
    lost = found.missing([("documents/0", n) for n in range(documents)])
    return Row(fault, 1, len(lost), len(found.learned_twice), len(stale), recovery_s), stale


@pytest.mark.slow(20)
def test_an_erasure_that_is_accepted_while_its_example_is_learned(given, tmp_path, record_fault):
    """No version that is published after the acceptance has learned the example, and in the end none has."""
    cuts = forgetting.documents(3)
    kit.send(given, *(jobs.update(forgetting.store_of(given), cut, examples) for cut, examples in cuts.items()))
    with parts.child("learner", given, "learner.train:2:stop", parts.FEW_TEXTS) as learner:
        parts.wait_stopped(learner)
        kit.send(given, forgetting.erase(given, "r1", 1, 6))
        learner.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        wait_committed(given, 4)
        recovery_s = time.monotonic() - resumed
    registry = forgetting.registry(given)
    found, stale = row("erase racing an update", given, 12, recovery_s)
    contaminated = [
        event.generation
        for event in (envelope.event for envelope in parts.envelopes(given, "adapter-updates"))
        if isinstance(event, AdapterPromoted)
        and any(learned.offset == 6 for learned in registry.manifest(ADAPTER, event.version).learned)
    ]
    record_fault(found)
    assert (found.lost, found.learned_twice, stale, contaminated) == (0, 0, [], [])
    assert forgetting.oracle(given, tmp_path, cuts, {1, 6}).equals(registry.head(ADAPTER).manifest)
    assert readable(Path(given.store.uri), ["secret001", "secret006"]) == []


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_attack_g_an_expiry_under_load_with_kills_in_its_rebuild_leaves_no_service_gap(given, tmp_path, record_fault):
    """The served version was retired for the length of the rebuild, and each kill began the rebuild again."""
    cuts, store, trained = forgetting.documents(8), forgetting.store_of(given), tmp_path / "trained"
    counted = f"{parts.FEW_TEXTS}\n{parts.count_trained(trained)}"
    sent = [jobs.update(store, cut, examples) for cut, examples in cuts.items()]
    kit.send(given, *sent[:6])
    with parts.child("learner", given, "learner.forget_step:2", counted) as learner:
        wait_committed(given, 6)
        with Observer(store) as observer:
            expiry = forgetting.erase(given, "r1", 1, 2).model_copy(update={"kind": "expire", "suppress": False})
            kit.send(given, expiry, *sent[6:])
            wait_killed(learner)
            with parts.child("learner", given, "learner.forget_trained:3", counted) as second:
                wait_killed(second)
            killed = time.monotonic()
            with parts.child("learner", given, "", counted):
                wait_committed(given, 9)
            recovery_s = time.monotonic() - killed
    found, stale = row("kill -9 in the rebuild of an expiry under load", given, 32, recovery_s)
    record_fault(replace(found, runs=2, service_gap_s=observer.gap_s))
    assert (found.lost, found.learned_twice, stale, observer.gaps) == (0, 0, [], [])
    # Eight cuts, six of them a second time, and the one that was in hand at each kill.
    assert len(trained.read_text("utf-8").splitlines()) <= 8 + 6 + 2
    assert forgetting.oracle(given, tmp_path, cuts, {1, 2}).equals(forgetting.registry(given).head(ADAPTER).manifest)
    assert readable(Path(given.store.uri), ["secret001", "secret002"]) == []
    assert [*store.list("rebuilds/"), *store.list("forgotten/")] == []


def wait_killed(learner) -> None:
    kit.wait_until(lambda: learner.poll() is not None, "the learner is killed at its failpoint")
    assert learner.returncode == -signal.SIGKILL


@pytest.mark.slow(45)
@pytest.mark.timeout(600)
def test_a_hold_that_comes_while_the_erasure_is_carried_out(given, tmp_path, record_fault):
    """Until the deletion the hold wins. After its release the erasure goes on, with the same bytes as result."""
    cuts, store = forgetting.documents(3), forgetting.store_of(given)
    kit.send(given, *(jobs.update(store, cut, examples) for cut, examples in cuts.items()))
    committed, observed = 3, []
    for failpoint, number in (("learner.forget_plan", 9), ("learner.forget_published", 5)):
        text = f"secret{number:03d}"
        with parts.child("learner", given, f"{failpoint}:1:stop", parts.FEW_TEXTS) as learner:
            wait_committed(given, committed)
            job = forgetting.erase(given, f"r{number}", number)
            kit.send(given, job)
            parts.wait_stopped(learner)
            update_quarantine(store, ADAPTER, lambda found: found.with_holds([LegalHold(request_id="h")]))
            learner.send_signal(signal.SIGCONT)
            resumed = time.monotonic()
            wait_committed(given, committed + 1)
            statuses = [envelope.event.state for envelope in parts.envelopes(given, "retention-status")]
            observed.append(
                (
                    failpoint,
                    statuses[-1],
                    bool(readable(Path(given.store.uri), [text])),
                    load_quarantine(store, ADAPTER).entry(f"r{number}").done,
                )
            )
            update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
            kit.send(given, job)
            wait_committed(given, committed + 2)
            recovery_s = time.monotonic() - resumed
        committed += 2
    found, stale = row("hold racing an erase", given, 12, recovery_s)
    record_fault(found)
    assert observed == [
        (failpoint, "held", True, None) for failpoint in ("learner.forget_plan", "learner.forget_published")
    ]
    assert (found.lost, found.learned_twice, stale) == (0, 0, [])
    head = forgetting.registry(given).head(ADAPTER)
    assert forgetting.oracle(given, tmp_path, cuts, {5, 9}).equals(head.manifest)
    assert readable(Path(given.store.uri), ["secret005", "secret009"]) == []
    assert list(store.list("forgotten/")) == []
