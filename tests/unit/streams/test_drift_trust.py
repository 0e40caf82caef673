"""Drift of text that cannot be learned cuts ever more rarely, and an update that learned something restores the trust."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.waiting_jobs import list_jobs, load_job
from perennial.streams.client.testing import small_weights
from perennial.streams.curate.agent import CurateAgent
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.drift_trust import (
    LOOK_BACK,
    examples_for_drift,
    newest_updates_without_gain,
    updates_without_gain,
)
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleScored, UpdateRequested
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests.unit.streams.test_curate_agent import ADAPTER, App, delivery_of_scored, example
from tests.versions import VersionPublisher

PATIENCE = Settings.of(env_file=None).curate.drift_patience_updates
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GAIN = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=3.8, held_out_error=0.05, reason="ok")
TINY = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=3.995, held_out_error=0.001, reason="ok")
CHANCE = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=3.95, held_out_error=0.05, reason="ok")
NO_GAIN = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=4.1, reason="ok")
REFUSED = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=3.9, reason="general-rise")


def version(outcome: str, gate: GateFigures, kind: str = "update") -> Manifest:
    return Manifest.model_construct(kind=kind, outcome=outcome, gate=gate)


LEARNED = version("promoted", GAIN)
OUTCOMES = {
    "learned": LEARNED,
    "refused": version("refused", REFUSED),
    "no gain": version("promoted", NO_GAIN),
    "chance": version("promoted", CHANCE),
    "tiny": version("promoted", TINY),
    "nothing to learn": version("unchanged", GateFigures()),
    "rolled back": version("promoted", GateFigures(), kind="rollback"),
}
COUNTED = {"refused", "no gain", "chance", "tiny"}
names = st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=30)


@given(names)
def test_only_updates_that_learned_nothing_count_and_only_up_to_the_first_that_did(newest):
    counted = newest[: newest.index("learned")] if "learned" in newest else newest
    expected = sum(name in COUNTED for name in counted)
    assert updates_without_gain(OUTCOMES[name] for name in newest) == expected


bounds = {"low": st.integers(1, 300), "high": st.integers(1, 300), "patience": st.integers(1, 10)}


@given(count=st.integers(0, 200), **bounds)
def test_the_number_of_examples_stays_within_its_bounds_and_never_falls_with_more_failures(count, low, high, patience):
    needed = examples_for_drift(count, low, high, patience)
    assert low <= needed <= max(low, high)
    assert needed <= examples_for_drift(count + 1, low, high, patience)


@given(count=st.integers(0, 9), extra=st.integers(1, 9), **bounds)
def test_drift_is_trusted_until_patience_ends(count, extra, low, high, patience):
    assert examples_for_drift(min(count, patience - 1), low, high, patience) == low
    needed = examples_for_drift(patience + extra - 1, low, high, patience)
    assert needed == max(low, min(high, low * 2**extra))


@given(low=st.integers(1, 300), high=st.integers(1, 300))
def test_what_is_read_reaches_the_bound_at_the_default_patience(low, high):
    assert examples_for_drift(LOOK_BACK, low, high, PATIENCE) == max(low, high)


def publish(store: DirectoryStore, outcome: str, gate: GateFigures, number: int) -> None:
    versions = VersionPublisher(store, ADAPTER)
    weights = small_weights(number)
    made = versions.manifest(weights).model_copy(update={"outcome": outcome, "gate": gate})
    versions.registry.publish(made, [weights], lambda _: None)


def test_the_outcomes_are_those_that_the_registry_has(tmp_path):
    store = DirectoryStore(tmp_path, fsync=False)
    registry = VersionPublisher(store, ADAPTER).registry
    assert newest_updates_without_gain(registry, ADAPTER) == 0
    for number, (outcome, gate, expected) in enumerate(
        [("promoted", GAIN, 0), ("refused", REFUSED, 1), ("promoted", NO_GAIN, 2), ("refused", REFUSED, 3),
         ("promoted", GAIN, 0)]
    ):  # fmt: skip
        publish(store, outcome, gate, number)
        assert newest_updates_without_gain(registry, ADAPTER) == expected


def cuts(store: DirectoryStore, first: int, levels: list[float]) -> list[UpdateRequested]:
    """Let a curate agent read examples whose losses stay at each level for 200 examples, and return the jobs that it cut."""
    agent = CurateAgent(App(), Settings.of(env_file=None, max_batch_tokens=10**9), Metrics("curate"), store)
    known = set(list_jobs(store, ADAPTER))

    async def read() -> None:
        for number in range(first, first + 200 * len(levels)):
            loss = levels[(number - first) // 200] + 0.1 * (number * 7919 % 11 - 5)
            each = ExampleScored(example=example(number), tokens=1, base_loss_nats=loss, live_loss_nats=None)
            await agent.receive(delivery_of_scored(each, None, number))

    asyncio.run(read())
    jobs = [load_job(store, ADAPTER, cut) for cut in list_jobs(store, ADAPTER) if cut not in known]
    return [UpdateRequested.model_validate_json(job.data) for job in jobs if job is not None]


def test_drift_cuts_a_trusted_adapter_early_and_a_distrusted_one_with_more_examples(tmp_path):
    store = DirectoryStore(tmp_path, fsync=False)
    levels = [3.0, 5.0, 3.0, 5.0, 3.0, 5.0]
    trusted = [job for job in cuts(store, 0, levels) if job.reason == "drift"]
    assert len(trusted) >= 4
    for number in range(8):
        publish(store, "refused", REFUSED, number)
    distrusted = cuts(store, 5000, levels)
    assert {job.reason for job in distrusted} == {"size"}, "drift waits until the micro-batch is full"
    assert len(distrusted) < len(trusted)
    publish(store, "promoted", GAIN, 9)
    again = [job for job in cuts(store, 10_000, levels) if job.reason == "drift"]
    assert len(again) >= 4


@pytest.mark.parametrize(("without_gain", "needed"), [(0, None), (2, None), (4, 32), (5, 64), (6, 128)])
def test_drift_that_waits_cuts_at_exactly_the_examples_that_it_needs(without_gain, needed):
    policy = CutPolicy.of(Settings.of(env_file=None, max_batch_tokens=10**9))
    batcher: MicroBatcher[int] = MicroBatcher(ADAPTER, policy)
    due = []
    for number in range(700):
        loss = (3.0 if number < 400 else 5.0) + 0.1 * (number * 7919 % 11 - 5)
        each = ExampleScored(example=example(number), tokens=1, base_loss_nats=loss, live_loss_nats=None)
        reason = batcher.offer(each, number, 0).reason
        if reason == "drift":
            pending = len(batcher.pending_examples)
            due.append(pending)
            if batcher.weigh_drift(without_gain):
                break
        if number == 399:
            batcher.apply(batcher.cut(NOW, "age"))
    assert due[0] < 32
    assert due[1:] == ([] if needed is None else [needed])
