"""A store that is lost, restored to yesterday's backup, and reconciled with a Kafka that is a day ahead."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.storage.recovery.backup_list import folders
from perennial.streams.cli.adapters import open_registry
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.events.models import RetentionRequested, Selector
from perennial.streams.retain.request_store import load_requests
from perennial.testing import MemoryBackend
from tests.faults.flow import ROOT, Flow, started
from tests.faults.parts import read_to_end
from tests.integration.test_exactly_once import ADAPTERS
from tests.oracle import read_adapter
from tests.unit.learner.test_forgetting import readable
from tests.unit.test_privacy_map import documented

pytestmark = [
    pytest.mark.slow(200),
    pytest.mark.timeout(1200),
    # kafka-python leaves the socket of every refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

OLD, NEW = "crimson pelican", "violet walrus"
"""Words of documents that are erased after the backup: one was learned before it, one after it."""


@pytest.fixture(scope="module")
def flow(broker_jars, tmp_path_factory) -> Iterator[Flow]:
    with started(tmp_path_factory.mktemp("restore")) as flow:
        yield flow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def command(flow: Flow, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `perennial ...` without starting roles that have ended."""
    return subprocess.run(
        [sys.executable, "-m", "perennial.streams.cli", *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, **flow.settings.environment()}, timeout=300,
    )  # fmt: skip


def said(flow: Flow, *arguments: str) -> dict:
    done = command(flow, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def erase(flow: Flow, request_id: str, document: str) -> None:
    flow.request(
        RetentionRequested(
            request_id=request_id, kind="erase", adapter="acme/a", selector=Selector(document_ids=[document]),
            requested_by="test",
        )
    )  # fmt: skip
    flow.until(lambda: flow.state_of(request_id) == "closed", f"request {request_id} is closed")


def test_a_store_that_is_restored_to_yesterday_loses_nothing_and_revives_nothing(flow, record_fault, tmp_path):
    place = str(tmp_path / "backups")
    flow.publish(24)
    (old,) = flow.publish(1, "acme/a", text=f"{OLD} writes down what nobody may know {OLD}")
    flow.settle()
    with Subscriber(
        "acme/a", MemoryBackend(None), settings=flow.settings, store=flow.store, replica="watch"
    ) as follower:
        flow.publish(40)  # the backup is made while they are cut and learned
        made = said(flow, "backup", "create", place)
        assert made["positions"]["offsets"]["scored-examples"]
        assert readable(Path(place), [OLD]) != []

        (new,) = flow.publish(1, "acme/a", text=f"{NEW} writes down what nobody may know either {NEW}")
        between = flow.publish(40)
        flow.settle()
        erase(flow, "of-before", old)
        erase(flow, "of-between", new)
        assert readable(flow.folder / "store", [OLD, NEW]) == []
        generations = {adapter: flow.registry.alias(adapter).generation for adapter in ADAPTERS}
        assert follower.wait_for(generations["acme/a"], 180)

        refused = command(flow, "backup", "restore", place, "--yes")
        assert refused.returncode == 1
        assert "roles are running" in refused.stderr
        flow.crew.stop()
        shutil.rmtree(flow.folder / "store")  # the disaster
        began = time.monotonic()
        report = said(flow, "backup", "restore", place, "--yes")
        flow.registry = open_registry(flow.settings)
        assert sorted(report["requests"]["accepted"]) == ["of-before", "of-between"]
        assert report["waiting"] == ["acme/a#live"]
        assert readable(flow.folder / "store", [OLD]) != [], "the backup is older than the erasure"
        retired = flow.registry.alias("acme/a")
        assert (retired.kind, retired.generation) == ("retired", generations["acme/a"])
        assert follower.current is not None, "a subscriber that runs goes on with the version without the erased text"

        flow.crew.start()
        for request in ("of-before", "of-between"):
            flow.until(lambda request=request: flow.state_of(request) == "closed", f"{request} is closed again")
        flow.settle()
        recovery_s = time.monotonic() - began
        assert follower.wait_for(generations["acme/a"] + 1, 180)
        assert follower.current.version in dict(map(reversed, flow.registry.versions("acme/a")))
    row, wrong = flow.row("store lost and restored from yesterday's backup", recovery_s)
    record_fault(row)
    assert wrong == []
    assert readable(flow.folder / "store", [OLD, NEW]) == []
    assert all(flow.registry.alias(adapter).generation > generations[adapter] for adapter in ADAPTERS)
    positions = {
        (f"{event.origin.topic}/{event.origin.partition}", event.origin.offset)
        for event in flow.examples() if event.document_id in {old, new}
    }  # fmt: skip
    assert len(positions) == 2
    served = read_adapter(flow.registry, "acme/a")
    assert not positions & served.served
    learned = set().union(*(read_adapter(flow.registry, adapter).learned for adapter in ADAPTERS))
    of_between = {
        (f"{event.origin.topic}/{event.origin.partition}", event.origin.offset)
        for event in flow.examples() if event.document_id in set(between)
    }  # fmt: skip
    assert of_between <= learned
    assert {record.request.request_id for record in load_requests(flow.store).values()} >= {"of-before", "of-between"}
    assert read_to_end(flow.settings, "dead-letters") == []
    assert {name.partition("/")[0] for name in folders(flow.store)} <= documented("Object store")
