"""The learner is killed while it learns adapters anew on another base, beside documents that arrive and replicas that serve."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator

import pytest

from perennial.learner.model.base import digest_of_folder
from perennial.storage.registry.parked import load_parked
from perennial.streams.events.models import RetentionRequested, Selector
from tests.faults.flow import Flow, started
from tests.faults.service_watch import ServiceWatch
from tests.integration.learner.test_rebase import other_base
from tests.integration.test_exactly_once import ADAPTERS
from tests.oracle import read_adapter
from tests.unit.learner.test_forgetting import readable

pytestmark = [
    pytest.mark.slow(150),
    pytest.mark.timeout(1200),
    # kafka-python leaves the socket of every refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
KILLS = ("learner.forget_step:2", "learner.forget_trained:1", "publish.claim_seq:1")
"""Where the learner dies during each adapter's rebase: between two updates, in one, and while the result is published."""


@pytest.fixture
def flow(broker_jars, tmp_path_factory) -> Iterator[Flow]:
    with started(tmp_path_factory.mktemp("rebase")) as flow:
        yield flow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_kill_during_a_rebase_loses_nothing_and_the_old_version_is_served(flow, record_fault):
    erased = "crimson pelican"
    (forgotten,) = flow.publish(1, ADAPTERS[0], text=f"the {erased} flies north")
    for adapter in ADAPTERS:
        for _ in range(3):
            flow.publish(12, adapter)
    flow.settle()
    live = {adapter: flow.registry.alias(adapter) for adapter in ADAPTERS}
    folder = other_base(flow.folder / "other")
    digest = digest_of_folder(folder)
    with ServiceWatch(flow.registry, ADAPTERS, flow.settings) as watch:
        with flow.crew.held("scorer"), flow.crew.held("learner"):
            flow.crew.use(flow.settings.replace(base=str(folder)))
        for adapter in ADAPTERS:
            flow.publish(12, adapter)
        flow.until(lambda: all(load_parked(flow.store, a) for a in ADAPTERS), "the adapters wait for their base")
        assert {a: flow.registry.alias(a) for a in ADAPTERS} == live
        for adapter, kill in zip(ADAPTERS, KILLS, strict=True):
            restarts = flow.crew.restarts
            flow.crew.set_failpoint("learner", kill)
            flow.command("adapters", "rebase", adapter, "--wait-s", "0")
            flow.until(lambda before=restarts: flow.crew.restarts > before, f"the learner dies at {kill}")
            flow.crew.set_failpoint("learner", "")
            flow.until(
                lambda adapter=adapter: load_parked(flow.store, adapter) is None, f"{adapter} is on the new base"
            )
        began = time.monotonic()
        for adapter in ADAPTERS:
            flow.publish(12, adapter)
        flow.settle()
        recovery_s = time.monotonic() - began
    row, wrong = flow.row("kill -9 during a rebase", recovery_s, len(KILLS), watch.gap_s)
    record_fault(row)
    assert (wrong, watch.gaps) == ([], [])
    for adapter in ADAPTERS:
        state, record = flow.registry.alias(adapter), read_adapter(flow.registry, adapter)
        assert flow.registry.manifest(adapter, state.version).base_sha256 == digest
        kinds = [flow.registry.manifest(adapter, version).kind for _, version in flow.registry.versions(adapter)]
        assert kinds.count("rebase") == 1
        assert (len(record.learned), record.learned_twice()) == (sum(a == adapter for a in flow.acked.values()), [])

    # A text of before the rebase is erased after it, from the versions on both bases.
    flow.request(RetentionRequested(
        request_id="after", kind="erase", adapter=ADAPTERS[0], selector=Selector(document_ids=[forgotten]), requested_by="test"
    ))  # fmt: skip
    flow.until(lambda: flow.state_of("after") == "closed", "the request is closed")
    assert readable(flow.folder / "store", [erased]) == []
    head = flow.registry.head(ADAPTERS[0])
    assert (head.manifest.kind, head.manifest.base_sha256) == ("forget", digest)
