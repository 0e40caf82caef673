"""Commands that print tables: names, versions and ids can be copied at 80 and 40 columns and out of a pipe."""

from __future__ import annotations

import io
import json
import re
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.gate_figures import GateFigures
from perennial.streams.cli import adapters, dlq, status, topics
from perennial.streams.cli.flow import AdapterStatus, FlowSnapshot
from perennial.streams.cli.tables import short_version
from perennial.streams.cli.versions import version_list
from perennial.streams.client.testing import small_weights
from perennial.streams.deadletters.model import Selection, read_dead_letter
from perennial.streams.deadletters.redrive_plan import RedriveReport
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.kafka.topics import TOPICS
from tests.versions import VersionPublisher

ADAPTER = "a-tenant-with-a-long-name/a-team-of-it/production-assistant"
TOPIC = "documents.a-tenant-with-a-long-name"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Screen:
    """Runs commands with standard output as a terminal of a given width, or as a pipe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def at(self, width: int, command: Any, *arguments: Any, **options: Any) -> str:
        """Return what a command prints at a terminal."""
        self._monkeypatch.setenv("COLUMNS", str(width))
        self._monkeypatch.setenv("TERM", "xterm")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._printed(Terminal(), command, arguments, options))

    def in_pipe(self, command: Any, *arguments: Any, **options: Any) -> str:
        """Return what a command prints into a pipe, though COLUMNS is small."""
        self._monkeypatch.setenv("COLUMNS", "20")
        shown = self._printed(io.StringIO(), command, arguments, options)
        assert not set("│┃─━╭\x1b") & set(shown)
        return shown

    def _printed(self, file: io.StringIO, command: Any, arguments: Any, options: Any) -> str:
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            assert command(*arguments, as_json=False, **options) == 0
        return file.getvalue()


@pytest.fixture
def screen(monkeypatch):
    return Screen(monkeypatch)


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """Versions of one adapter in a store, newest first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    line = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)
    made = []
    for number in range(2):
        weights = small_weights(number + 1)
        gate = GateFigures(held_out_before=4.0, held_out_after=3.5, corrections=8, corrections_not_learned=3 * number)
        manifest = line.manifest(weights).model_copy(update={"gate": gate})
        made.append(line.registry.publish(manifest, [weights], lambda _: None).version)
    return made[::-1]


@pytest.mark.parametrize("width", [80, 40])
def test_adapters_are_shown_whole(screen, versions, width):
    listed = screen.at(width, adapters.list_adapters)
    assert ADAPTER in listed
    assert short_version(versions[0]) in listed
    history = screen.at(width, version_list.show_history, ADAPTER, limit=10)
    assert [short_version(version) in history for version in versions] == [True, True]
    assert "promoted" in history
    shown = screen.at(width, adapters.show_adapter, ADAPTER)
    assert ADAPTER in shown
    assert versions[0] in shown
    assert "…" not in listed + history + shown


def test_adapters_in_a_pipe_have_full_versions_and_all_columns(screen, versions):
    listed = screen.in_pipe(adapters.list_adapters)
    assert re.search(rf"^{ADAPTER}  +\d+  {versions[0]}  ", listed, re.MULTILINE)
    history = screen.in_pipe(version_list.show_history, ADAPTER, limit=10)
    assert history.count("4.000 → 3.500") == 2
    assert history.count("corrections not learned") == history.count("3 of 8 corrections not learned") == 1
    assert all(version in history for version in versions)
    assert history.splitlines()[0].split() == (
        [
            "seq",
            "version",
            "live",
            "kind",
            "outcome",
            "reason",
            "examples",
            "tokens",
            "held-out",
            "loss",
            "before",
            "→",
            "after",
            "general",
            "text",
            "rise",
        ]
    )
    assert versions[0] in screen.in_pipe(adapters.show_adapter, ADAPTER)


def test_json_has_every_column(versions, capsys):
    adapters.list_adapters(as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {
        "adapter", "generation", "version", "versions", "last_outcome", "published_at", "parked", "jobs_waiting"
    }  # fmt: skip
    assert (row["adapter"], row["version"]) == (ADAPTER, versions[0])


def test_a_rollback_takes_the_version_as_a_terminal_shows_it(versions, tmp_path):
    registry = VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER).registry
    for version in versions:
        for given in (short_version(version), version, version.removeprefix("sha256:")):
            assert adapters.resolve_version(registry, ADAPTER, given) == version
    with pytest.raises(NotFoundError, match="several versions"):
        adapters.resolve_version(registry, ADAPTER, "sha256:")
    with pytest.raises(NotFoundError, match="no such version"):
        adapters.resolve_version(registry, ADAPTER, "xyz")


class Reader:
    """Dead letters without a broker."""

    def __init__(self, *_: object) -> None:
        value = json.dumps({"adapter": ADAPTER, "document_id": "d1"}).encode()
        refused = encode_dead_letter(
            value, [("a", b"b")], reason="missing-field", stage="intake", detail="text; got: nothing", topic=TOPIC,
            partition=3, offset=1_234_567, at=NOW,
        )  # fmt: skip
        self.records = [read_dead_letter(1, offset, b"k", *refused, "") for offset in (10, 11)]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...

    def progress(self) -> dict[int, Any]:
        return {}

    def scan(self, _since: object):
        return iter(self.records)

    def read(self, _partition: int, _offset: int):
        return self.records[0]


@pytest.fixture
def dead_letters(monkeypatch):
    monkeypatch.setattr(dlq, "DeadLetterReader", Reader)


@pytest.mark.parametrize("width", [80, 40])
def test_dead_letters_are_shown_whole(screen, dead_letters, width):
    listed = screen.at(width, dlq.list_dead_letters, Selection(), limit=5, max_replays=3)
    for text in ("1:10", "1:11", ADAPTER, "missing-field"):
        assert text in listed
    shown = screen.at(width, dlq.show_dead_letter, "1:10", max_replays=3)
    for text in (f"{TOPIC} 3:1234567", ADAPTER, "text; got: nothing", "header      a = b"):
        assert text in shown


def test_dead_letters_in_a_pipe_have_all_columns(screen, dead_letters, capsys):
    listed = screen.in_pipe(dlq.list_dead_letters, Selection(), limit=5, max_replays=3)
    assert re.search(
        rf"^1:10 +2026-01-02T03:04:05.678901\+00:00  missing-field  intake +{TOPIC}  {ADAPTER} ", listed, re.MULTILINE
    )
    assert f"{TOPIC} 3:1234567" in screen.in_pipe(dlq.show_dead_letter, "1:10", max_replays=3)
    capsys.readouterr()
    dlq.show_dead_letter("1:10", max_replays=3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert {"place", "detail", "key_b64", "headers_b64", "value_b64", "replays", "state"} <= set(shown)


def test_a_report_of_sent_dead_letters_is_whole(screen):
    report = RedriveReport()
    report.sent["missing-field", "intake"] = 3
    report.left["quarantined"] = 2

    def printed(*, as_json: bool) -> int:
        dlq._print_report(report, "sent back", as_json=as_json)
        return 0

    for shown in (screen.at(40, printed), screen.in_pipe(printed)):
        assert "missing-field" in shown
        assert "3 dead letters sent back" in shown
        assert "2 not sent, quarantined: refused again after --max-replays attempts" in shown


VERSION = "sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def flow(monkeypatch):
    counts = dict.fromkeys(TOPICS, 7)
    shown = FlowSnapshot(1.0, counts, dict.fromkeys(status.GROUPS, 2), missing_topics=[])
    shown.adapters = [AdapterStatus(ADAPTER, 3, VERSION, 4, "promoted", 4.0, 3.5, 2, 1)]

    class FlowReader:
        def __init__(self, _: object) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...
        def read(self) -> FlowSnapshot:
            return shown

    monkeypatch.setattr(status, "FlowReader", FlowReader)
    return shown


def watched(*, as_json: bool) -> int:
    assert not as_json
    return status.watch_status(every_s=0.01, times=2)


@pytest.mark.parametrize("command", [status.show_status, watched])
@pytest.mark.parametrize("width", [80, 40])
def test_the_flow_is_shown_whole(screen, flow, width, command):
    shown = screen.at(width, command).replace("\r\n", "\n")
    # A live display breaks a name that is longer than the terminal at its edge, as the terminal itself would.
    assert ADAPTER in (shown if command is status.show_status or width == 80 else shown.replace("\n", ""))
    assert short_version(VERSION) in shown
    assert all(name in shown for name in TOPICS)
    assert "…" not in shown


def test_the_flow_in_a_pipe_has_every_column_of_every_reading(screen, flow):
    assert f"{ADAPTER}           3  {VERSION}     4  promoted" in screen.in_pipe(status.show_status)
    assert screen.in_pipe(watched).count(VERSION) == 2
    flow.missing_topics = ["documents"]
    assert "`perennial topics create`: documents" in status.as_text(flow, None)


def test_topics_are_shown_whole(screen, monkeypatch):
    class Report:
        name, created, differences = TOPIC, False, ("cleanup.policy is compact, not delete", "one partition, not four")

    monkeypatch.setattr(topics, "provision_recorded", lambda *_, **__: [Report])
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")

    def created(*, as_json: bool) -> int:
        return topics.create_topics(dry_run=True, as_json=as_json) - 1

    assert TOPIC in screen.at(40, created)
    shown = screen.in_pipe(created)
    assert f"{TOPIC}  exists  cleanup.policy is compact, not delete; one partition, not four" in shown
