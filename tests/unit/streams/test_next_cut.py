"""`perennial adapters show` says what cuts the next micro-batch, and why."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.waiting_jobs import curate_state_key
from perennial.streams.cli import adapters
from perennial.streams.client.testing import small_weights
from perennial.streams.curate.batcher import Cut, MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleScored
from perennial.streams.settings import Settings
from tests.unit.streams.test_curate_agent import example
from tests.versions import VersionPublisher

ADAPTER = "acme/a"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REFUSED = GateFigures(basis="held-out", held_out_before=4.0, held_out_after=4.0, reason="no-gain")


@pytest.fixture
def store(tmp_path, monkeypatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return DirectoryStore(tmp_path / "store", fsync=False)


def refused(store: DirectoryStore, count: int) -> None:
    versions = VersionPublisher(store, ADAPTER)
    versions.publish()
    for number in range(count):
        weights = small_weights(number)
        made = versions.manifest(weights).model_copy(update={"outcome": "refused", "gate": REFUSED})
        versions.registry.publish(made, [weights], lambda _: None)


def keep(store: DirectoryStore, batcher: MicroBatcher[int], cut: Cut) -> None:
    """Store a cut as curate does."""
    key = curate_state_key(ADAPTER)
    store.compare_and_swap(key, cut.state, store.get(key, 1 << 20).etag if store.exists(key) else None)
    batcher.apply(cut)


def offer(
    batcher: MicroBatcher[int], number: int, *, loss: float = 3.0, generation: int = 1, learn: bool = True
) -> None:
    each = example(number).model_copy(update={"learn": learn})
    batcher.offer(
        ExampleScored(
            example=each, tokens=10, base_loss_nats=loss + 0.1 * (number * 7919 % 11 - 5), live_loss_nats=3.0,
            live_generation=generation,
        ),
        number, 0,
    )  # fmt: skip


def shown(capsys) -> tuple[dict, str]:
    adapters.show_adapter(ADAPTER, as_json=True)
    found = json.loads(capsys.readouterr().out)["next_cut"]
    adapters.show_adapter(ADAPTER, as_json=False)
    return found, " ".join(capsys.readouterr().out.split())


def test_before_the_first_cut_the_bounds_are_shown(store, capsys):
    VersionPublisher(store, ADAPTER).publish()
    found, text = shown(capsys)
    assert (found["cuts"], found["last_reason"], found["drift_examples"]) == (0, None, 8)
    assert "last cut none yet" in text
    assert "next cut 30 s after the first example that waits reaches curate" in text
    assert "768 tokens or 256 examples; by drift from 8 examples on" in text


def test_the_last_cut_and_the_examples_after_a_swap_are_shown(store, capsys):
    VersionPublisher(store, ADAPTER).publish()
    batcher: MicroBatcher[int] = MicroBatcher(ADAPTER, CutPolicy.of(Settings.of(env_file=None)))
    for number in range(10):
        offer(batcher, number)
    keep(store, batcher, batcher.cut(NOW, "age"))
    found, text = shown(capsys)
    assert (found["cuts"], found["last_reason"], found["last_examples"], found["last_tokens"]) == (1, "age", 10, 100)
    assert found["cooldown_examples"] == 22
    assert "number 0, by age, at 2026-01-02T03:04:05+00:00: 10 examples, 100 tokens" in text
    assert "not by drift in the 22 examples after the last cut" in text


def test_distrust_and_its_reason_are_shown(store, capsys):
    refused(store, 4)
    found, text = shown(capsys)
    assert (found["updates_without_gain"], found["distrusted"], found["drift_examples"]) == (4, True, 32)
    assert "by drift from 32 examples on (distrust: the last 4 updates learned nothing)" in text


def test_drift_that_waits_for_examples_is_shown(store, capsys):
    VersionPublisher(store, ADAPTER).publish()
    batcher: MicroBatcher[int] = MicroBatcher(ADAPTER, CutPolicy.of(Settings.of(env_file=None)))
    for number in range(500):
        offer(batcher, number, loss=3.0 if number < 460 else 6.0, learn=number < 400)
        if number == 399:
            keep(store, batcher, batcher.cut(NOW, "size"))
    keep(store, batcher, batcher.flush())
    found, text = shown(capsys)
    assert found["drift_waits"] == "base_loss"
    assert "drift of the base loss is found and waits for examples" in text


def test_the_budget_of_the_tenant_is_shown_as_what_delays_the_update(store, capsys, monkeypatch):
    VersionPublisher(store, ADAPTER).publish()
    monkeypatch.setenv("PERENNIAL_TENANT_TOKENS_PER_HOUR", "acme=5000")
    found, text = shown(capsys)
    assert found["tenant_tokens_per_hour"] == 5000
    assert "budget of 5000 tokens an hour" in text


def test_a_minimum_of_tokens_is_shown_with_how_long_fewer_wait(store, capsys, monkeypatch):
    VersionPublisher(store, ADAPTER).publish()
    assert "no correction wait" not in shown(capsys)[1]
    monkeypatch.setenv("PERENNIAL_MIN_BATCH_TOKENS", "96")
    found, text = shown(capsys)
    assert (found["min_tokens"], found["max_wait_s"]) == (96, 120)
    assert "reaches curate; 120 s if fewer than 96 tokens and no correction wait; sooner by size" in text


def test_a_damaged_state_hides_nothing_else(store, capsys):
    version = VersionPublisher(store, ADAPTER).publish().version
    store.put_if_absent(curate_state_key(ADAPTER), b"{")
    found, text = shown(capsys)
    assert "does not hold what belongs there" in found["error"]
    assert "last cut unknown" in text
    assert version.removeprefix("sha256:")[:8] in text
