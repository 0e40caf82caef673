"""Upgrades under load: all roles restarted one after another, and a learner of the next release beside one of this release."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator

import pytest

from perennial.storage.registry.parked import load_parked
from perennial.streams.devstack.supervisor import ROLES
from perennial.streams.events.models import RetentionRequested, Selector
from tests.faults import parts
from tests.faults.flow import Flow, started
from tests.faults.service_watch import ServiceWatch
from tests.integration.test_exactly_once import ADAPTERS
from tests.oracle import read_adapter
from tests.unit.learner.test_forgetting import readable

pytestmark = [
    pytest.mark.slow(200),
    pytest.mark.timeout(1200),
    # kafka-python leaves the socket of every refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
ROUNDS = 2
NEXT_RELEASE = """
from perennial.learner.training.recipe import Recipe as _Recipe
from perennial.learner.versions.update_job import UpdateExecutor as _Executor
from perennial.streams.events.adapter_events import AdapterPromoted as _Promoted
_manifest, _dump, _recorded = _Executor._manifest, _Promoted.model_dump_json, _Recipe.recorded.__func__

def _newer_manifest(self, job, trained):
    made = _manifest(self, job, trained)
    config = made.config | ({"next_setting": 0.5} if made.adapter == "acme/b" else {})
    return made.model_copy(update={"schema_version": 2, "next_field": {"a": 1}, "config": config})

def _newer_event(self, **more):
    return _dump(self, **more)[:-1] + ',"next_field":{"a":1}}'

def _newer_recipe(cls, config):
    return _recorded(cls, {name: value for name, value in config.items() if name != "next_setting"})

_Executor._manifest, _Promoted.model_dump_json = _newer_manifest, _newer_event
_Recipe.recorded = classmethod(_newer_recipe)
"""
"""What the next release may change: schema 2, new fields in manifests and events, and for one adapter a new setting in its
recipe, which decides what is trained."""


@pytest.fixture
def flow(broker_jars, tmp_path_factory) -> Iterator[Flow]:
    with started(tmp_path_factory.mktemp("upgrades")) as flow:
        yield flow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_rolling_restart_of_every_role_loses_nothing(flow, record_fault):
    flow.publish(12)
    flow.settle()
    ended, codes = threading.Event(), []

    def load() -> None:
        while not ended.wait(0.2):
            flow.publish(3)

    publishing = threading.Thread(target=load)
    with ServiceWatch(flow.registry, ADAPTERS, flow.settings) as watch:
        publishing.start()
        try:
            for _ in range(ROUNDS):
                for role in ROLES:
                    codes.append((role, flow.crew.drain(role)))
                    before = len(flow.account().learned)
                    flow.until(lambda before=before: len(flow.account().learned) > before, f"learning after {role}")
        finally:
            ended.set()
            publishing.join()
        recovery_s = flow.settle()
    row, wrong = flow.row("rolling restart of every role under load", recovery_s, ROUNDS, watch.gap_s)
    record_fault(row)
    assert (wrong, watch.gaps) == ([], [])
    assert codes == [(role, 0) for _ in range(ROUNDS) for role in ROLES], "each role ended by itself, without an error"
    assert flow.crew.restarts == 0


def schemas(flow: Flow) -> dict[str, list[int]]:
    """Return the schemas of each adapter's versions, oldest first."""
    return {
        adapter: [
            flow.registry.manifest(adapter, version).schema_version
            for _, version in flow.registry.versions(adapter, newest_first=False)
        ]
        for adapter in ADAPTERS
    }


def erase(flow: Flow, adapter: str, document: str) -> None:
    flow.request(RetentionRequested(
        request_id=f"erase {document}", kind="erase", adapter=adapter, selector=Selector(document_ids=[document]),
        requested_by="test",
    ))  # fmt: skip


def test_a_learner_of_the_next_release_beside_one_of_this_release(flow, record_fault):
    """Each goes on from the other's versions; what this release must not train again waits for the next one."""
    for adapter in ADAPTERS:
        flow.publish(6, adapter)
    flow.settle()
    with ServiceWatch(flow.registry, ADAPTERS, flow.settings) as watch:
        with parts.child("learner", flow.settings, more=NEXT_RELEASE):
            with flow.crew.held("learner"):
                texts = {adapter: f"crimson {adapter} pelican" for adapter in ADAPTERS}
                named = {adapter: flow.publish(1, adapter, text=text)[0] for adapter, text in texts.items()}
                flow.settle()
                assert all(2 in found for found in schemas(flow).values())
            for adapter in ADAPTERS:  # both share the jobs
                flow.publish(12, adapter)
            flow.settle()
        for adapter in ADAPTERS:
            flow.publish(6, adapter)
        recovery_s = flow.settle()
        assert all(found[-1] == 1 and 2 in found for found in schemas(flow).values()), "this one goes on from schema 2"

        for adapter in ("acme/a", "acme/b"):
            erase(flow, adapter, named[adapter])
        flow.until(lambda: flow.state_of(f"erase {named['acme/a']}") == "closed", "what this release knows is rebuilt")
        flow.until(lambda: load_parked(flow.store, "acme/b") is not None, "a recipe that it does not know waits")
        assert load_parked(flow.store, "acme/b").reason == "recipe-mismatch"
        assert readable(flow.folder / "store", [texts["acme/b"]]) != [], "nothing is deleted before it is rebuilt"
        with flow.crew.held("learner"), parts.child("learner", flow.settings, more=NEXT_RELEASE):
            flow.command("adapters", "unpark", "acme/b", "--wait-s", "150")
            flow.until(lambda: flow.state_of(f"erase {named['acme/b']}") == "closed", "the next release rebuilds it")
        for adapter in ADAPTERS:
            flow.publish(3, adapter)
        flow.settle()
    row, wrong = flow.row("learners of two releases side by side", recovery_s, 1, watch.gap_s)
    record_fault(row)
    gone = {named["acme/a"], named["acme/b"]}
    assert ([each for each in wrong if each not in gone], watch.gaps) == ([], [])
    assert readable(flow.folder / "store", [texts["acme/a"], texts["acme/b"]]) == []
    for adapter in ADAPTERS:
        assert read_adapter(flow.registry, adapter).learned_twice() == []
