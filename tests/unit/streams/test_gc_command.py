"""`perennial gc` shows what it freed, and `perennial adapters ls` every adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.manifest import BlobRef
from perennial.streams.cli.adapters import adapter_rows, open_registry
from perennial.streams.cli.versions.gc import collect, collect_orphaned
from perennial.streams.cli.versions.version_list import show_history
from perennial.streams.client.testing import small_weights
from perennial.streams.devstack.discovery import connected_settings
from tests.memory_store import MemoryStore
from tests.synthetic import registry_of, write_adapter
from tests.versions import VersionPublisher

ADAPTER = "acme/support"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    store = DirectoryStore(tmp_path / "store", fsync=False)
    publisher = VersionPublisher(store, ADAPTER)
    for _ in range(5):
        publisher.publish()
    return store


def test_gc_frees_what_it_says_and_history_shows_it(store: DirectoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect([], keep=2, dry_run=True, as_json=True) == 0
    planned = json.loads(capsys.readouterr().out)["adapters"][0]
    assert (planned["versions"], planned["blobs"], planned["kept"]) == (3, 3, 2)
    assert len(list(store.list("blobs/"))) == 5
    assert collect([ADAPTER], keep=2, dry_run=False, as_json=False) == 0
    assert "of 3 versions in 1 adapters; the newest 2 are kept" in capsys.readouterr().out
    assert len(list(store.list("blobs/"))) == 2
    assert show_history(ADAPTER, limit=10, as_json=True) == 0
    assert [row["collected"] for row in json.loads(capsys.readouterr().out)] == [False, False, True, True, True]


def test_gc_keeps_everything_where_the_setting_is_nought(
    store: DirectoryStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERENNIAL_KEEP_VERSIONS", "0")
    assert connected_settings().store.keep_versions == 0
    assert collect([], keep=None, dry_run=False, as_json=False) == 0
    assert "every version keeps its weights" in capsys.readouterr().out
    assert len(list(store.list("blobs/"))) == 5


def test_gc_of_an_adapter_that_does_not_exist_says_which_do(store: DirectoryStore) -> None:
    assert list(store.list("adapters/"))
    with pytest.raises(NotFoundError, match=ADAPTER):
        collect(["acme/suport"], keep=2, dry_run=False, as_json=False)


def test_orphans_wait_for_the_second_run(store: DirectoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    put_blob(store, b"left behind")
    assert collect_orphaned(min_age_h=24, dry_run=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"dry_run": False, "blobs": 6, "waiting": 1, "deleted": 0}
    assert collect_orphaned(min_age_h=24, dry_run=False, as_json=False) == 0
    assert "0 of 6 blobs were deleted; 1 more" in capsys.readouterr().out


def test_case_scale_adapters_ls_shows_the_adapters_that_metrics_add_up() -> None:
    """faults.md, "Scale": adapter 101 and later cannot be seen in the metrics."""
    store = MemoryStore()
    weights = small_weights(0)
    ref = BlobRef(digest=put_blob(store, weights), size_bytes=len(weights))
    names = [f"tenant/user-{number:03d}" for number in range(150)]
    for name in names:
        write_adapter(store, name, ref)
    rows = adapter_rows(registry_of(store), "live")
    assert [row["adapter"] for row in rows] == names
    assert all(row["versions"] == row["generation"] == 1 for row in rows)


def test_registry_of_the_command_line_is_that_of_the_settings(store: DirectoryStore) -> None:
    assert open_registry(connected_settings()).store.uri == store.uri
