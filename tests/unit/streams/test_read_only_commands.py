"""Commands that only show something write nothing to the store, so they work for who may only read it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from perennial.storage.errors import StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli import doctor
from perennial.streams.cli.app import app
from perennial.streams.settings import Settings
from tests.unit.streams.test_forget_command import ADAPTER, example, learn
from tests.versions import VersionPublisher

WRITES = ("put_if_absent", "compare_and_swap", "delete")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return the keys that a command tried to write to a store that refuses every write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    monkeypatch.setenv("PERENNIAL_KAFKA_TIMEOUT_S", "1")
    learn(VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER), example(1))
    keys: list[str] = []

    def refuse(_: DirectoryStore, key: str, *__: object) -> object:
        keys.append(key)
        raise StoreError(f"{key} may not be written")

    for name in WRITES:
        monkeypatch.setattr(DirectoryStore, name, refuse)
    return keys


@pytest.mark.parametrize(
    "command",
    [
        ["explain", ADAPTER],
        ["explain", ADAPTER, "--document", "d1", "--json"],
        ["forget", "--adapter", ADAPTER, "--document", "d1", "--dry-run"],
        ["forget", "--adapter", "acme/*", "--document", "d1", "--dry-run", "--json"],
        ["adapters", "ls"],
        ["adapters", "show", ADAPTER],
        ["adapters", "history", ADAPTER],
    ],
    ids=" ".join,
)
def test_a_command_that_shows_something_needs_no_right_to_write(written, command):
    """`explain` and a dry run created keys/<adapter>, and failed where they might not."""
    result = CliRunner().invoke(app, command)
    assert written == []
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["python", "disk", "embedded broker", "jobs"])
def test_a_check_of_the_doctor_writes_nothing(written, name):
    """Only the check of the store writes: it tests conditional writes with an object of its own, and deletes it."""
    doctor._guarded(name, doctor.CHECKS[name], Settings.of())
    assert written == []
