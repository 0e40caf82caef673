"""Erasures that race an update, a hold, a kill: the bytes of a run that never saw it, or, held, everything still there."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from perennial.learner.versions import version_writer
from perennial.storage.registry.quarantine import LegalHold, load_quarantine, update_quarantine
from perennial.streams.events.models import AdapterPromoted
from perennial.streams.kafka.topics import provision
from tests import jobs
from tests.faults import parts
from tests.faults.report import Row
from tests.integration.learner import learner_kit as kit
from tests.integration.learner import test_forgetting as forgetting
from tests.oracle import account
from tests.unit.learner.test_forgetting import readable

ADAPTER = forgetting.ADAPTER


@pytest.fixture
def given(broker, topic_prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(version_writer, "general_texts", parts.few_texts)
    settings = kit.settings(broker.bootstrap, topic_prefix, tmp_path)
    provision(settings)
    return settings


def done(settings, count: int) -> None:
    kit.wait_until(lambda: kit.committed(settings, "adapter-jobs", "learner") == count, f"{count} jobs are committed")


def row(fault: str, settings, documents: int, recovery_s: float) -> tuple[Row, list[str]]:
    line = forgetting.registry(settings)
    found = account(line, [ADAPTER])
    stale = parts.stale_publishes(settings, line)
    lost = found.covers([("documents/0", n) for n in range(documents)])
    return Row(fault, 1, len(lost), len(found.learned_twice), len(stale), recovery_s), stale


@pytest.mark.slow
def test_an_erasure_that_is_accepted_while_its_example_is_learned(given, tmp_path, record_fault):
    """No version that is published after the acceptance knows it, and in the end nothing does."""
    cuts = forgetting.documents(3)
    kit.send(given, *(jobs.update(forgetting.store_of(given), cut, examples) for cut, examples in cuts.items()))
    with parts.child("learner", given, "learner.train:2:stop", parts.FEW_TEXTS) as learner:
        parts.wait_stopped(learner)
        kit.send(given, forgetting.erase(given, "r1", 1, 6))
        learner.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        done(given, 4)
        recovery_s = time.monotonic() - resumed
    line = forgetting.registry(given)
    found, stale = row("erase racing an update", given, 12, recovery_s)
    knowing = [
        event.generation
        for event in (envelope.event for envelope in parts.envelopes(given, "adapter-updates"))
        if isinstance(event, AdapterPromoted)
        and any(learned.offset == 6 for learned in line.manifest(ADAPTER, event.version).learned)
    ]
    record_fault(found)
    assert (found.lost, found.learned_twice, stale, knowing) == (0, 0, [], [])
    assert forgetting.oracle(given, tmp_path, cuts, {1, 6}).equals(line.head(ADAPTER).manifest)
    assert readable(Path(given.store.uri), ["secret001", "secret006"]) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_hold_that_comes_while_the_erasure_is_carried_out(given, tmp_path, record_fault):
    """Up to the deletion the hold wins; released, the erasure goes on and comes to the same bytes."""
    cuts, store = forgetting.documents(3), forgetting.store_of(given)
    kit.send(given, *(jobs.update(store, cut, examples) for cut, examples in cuts.items()))
    committed, kept = 3, []
    for place, number in (("learner.forget_plan", 9), ("learner.forget_published", 5)):
        text = f"secret{number:03d}"
        with parts.child("learner", given, f"{place}:1:stop", parts.FEW_TEXTS) as learner:
            done(given, committed)
            job = forgetting.erase(given, f"r{number}", number)
            kit.send(given, job)
            parts.wait_stopped(learner)
            update_quarantine(store, ADAPTER, lambda found: found.with_holds([LegalHold(request_id="h")]))
            learner.send_signal(signal.SIGCONT)
            resumed = time.monotonic()
            done(given, committed + 1)
            statuses = [envelope.event.state for envelope in parts.envelopes(given, "retention-status")]
            kept.append(
                (
                    place,
                    statuses[-1],
                    bool(readable(Path(given.store.uri), [text])),
                    load_quarantine(store, ADAPTER).entry(f"r{number}").done,
                )
            )
            update_quarantine(store, ADAPTER, lambda found: found.with_holds([]))
            kit.send(given, job)
            done(given, committed + 2)
            recovery_s = time.monotonic() - resumed
        committed += 2
    found, stale = row("hold racing an erase", given, 12, recovery_s)
    record_fault(found)
    assert kept == [(place, "held", True, None) for place in ("learner.forget_plan", "learner.forget_published")]
    assert (found.lost, found.learned_twice, stale) == (0, 0, [])
    head = forgetting.registry(given).head(ADAPTER)
    assert forgetting.oracle(given, tmp_path, cuts, {5, 9}).equals(head.manifest)
    assert readable(Path(given.store.uri), ["secret005", "secret009"]) == []
    assert list(store.list("forgotten/")) == []
