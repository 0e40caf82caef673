"""`perennial replicas`: who is listed, who is refused, and what is deleted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.app import app
from perennial.streams.cli.replicas import replica_rows
from perennial.streams.replicas.replica_status import ReplicaStatus
from perennial.streams.settings import Settings
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
NOW_MS = time.time_ns() // 1_000_000


class Reader:
    """An AckReader of known replicas."""

    statuses: list[ReplicaStatus] = []  # noqa: RUF012 - set by each test
    removed: list[tuple[str, str]] = []  # noqa: RUF012 - set by each test

    def __init__(self, _settings: Settings) -> None:
        pass

    def replicas(self, adapter: str | None, _alias: str | None) -> list[ReplicaStatus]:
        return [status for status in self.statuses if adapter in {None, status.adapter}]

    def remove(self, adapter: str, replica: str) -> int:
        self.removed.append((adapter, replica))
        return 1

    def close(self) -> None:
        pass


def status(replica: str, version: str, **fields: Any) -> ReplicaStatus:
    given: dict[str, Any] = {
        "adapter": ADAPTER, "alias": "live", "generation": 1, "failed": False, "lease_expires_ms": NOW_MS + 3_600_000,
        "left": False, "stored_ms": NOW_MS,
    }  # fmt: skip
    return ReplicaStatus(replica=replica, version=version, **given | fields)


@pytest.fixture(autouse=True)
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two versions; the first one is revoked. Four replicas."""
    publisher = VersionPublisher(DirectoryStore(tmp_path, fsync=False), ADAPTER)
    first, second = publisher.publish().version, publisher.publish().version
    publisher.registry.revoke(ADAPTER, first, "erased")
    settings = Settings.of(store=str(tmp_path), kafka="broker:1", env_file=None)
    monkeypatch.setattr(replica_rows, "connected_settings", lambda: settings)
    monkeypatch.setattr(replica_rows, "AckReader", Reader)
    Reader.removed = []
    Reader.statuses = [
        status("ended", first, lease_expires_ms=NOW_MS - 1),
        status("full", second, failed=True, error="OSError: no space"),
        status("gone", first, left=True, lease_expires_ms=None),
        status("runs", second),
    ]
    return [first, second]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["replicas", *arguments])


def test_a_list_names_state_version_and_whether_it_is_revoked(versions: list[str]):
    rows = json.loads(run("ls", ADAPTER, "--json").stdout)
    assert [(row["replica"], row["state"], row["revoked"]) for row in rows] == [
        ("ended", "expired", True), ("full", "failing", False), ("gone", "left", True), ("runs", "serving", False),
    ]  # fmt: skip
    assert rows[1]["error"] == "OSError: no space"
    table = run("ls").stdout
    assert "ended" in table
    assert versions[0] in table
    assert [row["replica"] for row in json.loads(run("ls", "--revoked", "--json").stdout)] == ["ended", "gone"]
    assert json.loads(run("ls", "acme/other", "--json").stdout) == []


@pytest.mark.parametrize(
    ("replica", "options", "code"),
    [("ended", [], 0), ("gone", [], 0), ("runs", [], 2), ("full", [], 2), ("runs", ["--force"], 0), ("nobody", [], 4)],
)
def test_attack_l_a_replica_with_a_lease_is_deleted_only_by_force(replica: str, options: list[str], code: int):
    """No command deleted the record of a replica that was scaled down, so erasures stayed open for ever."""
    done = run("rm", ADAPTER, replica, *options)
    assert (done.exit_code if not isinstance(done.exception, Exception) else done.exception.exit_code) == code
    assert Reader.removed == ([(ADAPTER, replica)] if code == 0 else [])
