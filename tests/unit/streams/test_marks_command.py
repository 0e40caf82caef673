"""`perennial marks`: what it says of each mark, and which repairs it refuses."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.waiting_jobs import curate_state_key
from perennial.streams.cli.app import app
from perennial.streams.cli.marks import mark_repair, mark_rows
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import ExampleAccepted, ExampleScored, Origin
from perennial.streams.kafka.origin_check import LogEnd, OriginCheck
from perennial.streams.settings import Settings

ADAPTER = "acme/a"


class Logs:
    def cluster_ids(self) -> set[str]:
        return {"c"}

    def topic_ids(self, topic: str) -> list[str]:
        return ["before", "t"] if topic == "documents" else []

    def ends(self, topic: str) -> dict[int, LogEnd]:
        return {0: LogEnd(0, 796, 4), 1: LogEnd(0, 796, 4)}

    def close(self) -> None:
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    made = DirectoryStore(tmp_path, fsync=False)
    settings = Settings.of(store=str(tmp_path), kafka="broker:1", env_file=None)
    monkeypatch.setattr(mark_repair, "connected_settings", lambda: settings)
    monkeypatch.setattr(mark_repair, "_check", lambda _: OriginCheck(Logs()))
    monkeypatch.setattr(mark_rows, "_committed", lambda _: {("documents", 0): 790})
    return made


def seen(store, *, topic_id="t", partition=0, epoch=4, offset=5, cluster="c"):
    """Store a curate state with one more mark."""
    policy = CutPolicy.of(Settings.of(env_file=None))
    key = curate_state_key(ADAPTER)
    etag, batcher = None, MicroBatcher(ADAPTER, policy)
    if store.exists(key):
        stored = store.get(key)
        etag, batcher = stored.etag, MicroBatcher.restore(ADAPTER, policy, stored.data)
    origin = Origin(
        cluster_id=cluster, topic="documents", topic_id=topic_id, partition=partition, leader_epoch=epoch, offset=offset,
        timestamp_ms=0,
    )  # fmt: skip
    example = ExampleAccepted(
        adapter=ADAPTER, example_id=f"{hash(origin) % 2**64:032x}", kind="document", document_id="d", learn=True,
        text="x", origin=origin,
    )  # fmt: skip
    batcher.offer(ExampleScored(example=example, tokens=1, base_loss_nats=1.0, live_loss_nats=1.0), 0, 0)
    store.compare_and_swap(key, batcher.cut(datetime.now(UTC), "age").state, etag)
    return origin.partition_key()


def run(*arguments: str):
    return CliRunner().invoke(app, ["marks", *arguments])


def test_marks_that_the_logs_can_have_given_are_ok(store):
    seen(store, offset=795)
    seen(store, topic_id="before", offset=10**12, epoch=9)
    seen(store, cluster="moved-from", offset=10**12)
    seen(store, partition=1, epoch=3, offset=805)  # the tail was lost: what follows has epoch 4
    shown = run("show", ADAPTER, "--json")
    assert shown.exit_code == 0, shown.output
    rows = {row["partition"]: row for row in json.loads(shown.stdout)}
    assert all(row["ok"] for row in rows.values())
    assert rows["c/t/documents/0"] | {"curate": None} == {
        "partition": "c/t/documents/0", "cluster_id": "c", "topic_id": "t", "topic": "documents", "number": 0,
        "curate": None, "manifest": None, "log": {"start": 0, "end": 796, "epoch": 4}, "committed": 790, "ok": True,
        "problem": None, "compares_with_nothing": False,
    }  # fmt: skip
    assert rows["c/before/documents/0"]["log"] is None
    without_effect = [key for key, row in rows.items() if row["compares_with_nothing"]]
    assert without_effect == ["c/before/documents/0", "moved-from/t/documents/0"]
    assert run("show", ADAPTER).stdout.count("without effect") == 2


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"epoch": 4, "offset": 805}, "allowed: an offset below 796"),
        ({"epoch": 5, "offset": 3}, "got: 5; allowed: at most 4"),
        ({"epoch": 4, "offset": 2**63 - 1}, "allowed: an offset below 796"),
        ({"partition": 7}, "a partition that does not exist"),
    ],
)
def test_attack_k_a_mark_beyond_the_end_of_its_log_is_told_and_repaired(store, mark, words):
    partition = seen(store, **mark)
    shown = run("show", ADAPTER, "--json")
    assert shown.exit_code == 1
    (row,) = json.loads(shown.stdout)
    assert words in row["problem"]
    repaired = run("repair", ADAPTER, "--partition", partition, "--to", "2", "--yes", "--json")
    assert repaired.exit_code == 0, repaired.output
    assert json.loads(repaired.stdout)["changed"] == ["curate"]
    state = MicroBatcher.restore(
        ADAPTER, CutPolicy.of(Settings.of(env_file=None)), store.get(curate_state_key(ADAPTER)).data
    )
    epoch = min(mark.get("epoch", 4), 4)
    assert state.history.high_water_marks == HighWaterMarks({partition: 2}, {partition: epoch})


def test_a_repair_to_the_end_of_the_log(store):
    partition = seen(store, offset=10**9)
    assert run("repair", ADAPTER, "--partition", partition, "--to-log-end", "--yes").exit_code == 0
    shown = run("show", ADAPTER)
    assert shown.exit_code == 0
    assert "795 (epoch 4)" in shown.stdout


def test_a_repair_that_would_raise_a_mark_or_says_nothing_is_refused(store):
    partition = seen(store, offset=5)
    for options, message in (
        (["--to", "6"], "only lowers"), (["--to", "5"], "only lowers"), (["--to-log-end"], "only lowers"),
        ([], "must name the offset"), (["--to", "1", "--to-log-end"], "must name the offset"),
    ):  # fmt: skip
        refused = run("repair", ADAPTER, "--partition", partition, "--yes", *options)
        assert message in str(refused.exception), options
    assert "no mark of this" in str(run("repair", ADAPTER, "--partition", "x", "--to", "1").exception)
    assert "no high-water marks" in str(run("show", "nobody/else").exception)
    assert "not known" in str(
        run("repair", ADAPTER, "--partition", seen(store, topic_id="before"), "--to-log-end").exception
    )


def test_without_a_yes_nothing_is_changed(store):
    partition = seen(store, offset=10**9)
    before = store.get(curate_state_key(ADAPTER)).data
    assert run("repair", ADAPTER, "--partition", partition, "--to", "3").exit_code == 1
    assert store.get(curate_state_key(ADAPTER)).data == before
