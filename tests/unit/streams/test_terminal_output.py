"""What commands print: any time, any character of foreign text, on any terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from perennial.storage.errors import PerennialError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.gate_figures import GateFigures
from perennial.streams.cli.app import print_error
from perennial.streams.cli.tables import Column, layout, print_facts, print_table
from perennial.streams.cli.terminal.printable import printable, printable_lines
from perennial.streams.cli.terminal.terminal_encoding import write_any_character
from perennial.streams.cli.terminal.times import iso_time, spoken_time
from perennial.testing import small_weights
from tests.versions import VersionPublisher

HOSTILE = "\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202egnp\u2066\r\ud800"
FORBIDDEN = set(HOSTILE) - set("gnp]0;PWNED[2J31m")


@pytest.mark.parametrize(
    ("at_ms", "iso"),
    [
        (0, "1970-01-01T00:00:00+00:00"), (-1, "1969-12-31T23:59:59+00:00"),
        (253_402_300_799_999, "9999-12-31T23:59:59+00:00"), (253_402_300_800_000, "after 9999"),
        (2**63 - 1, "after 9999"), (10**40, "after 9999"), (-62_135_596_800_000, "0001-01-01T00:00:00+00:00"),
        (-62_135_596_800_001, "before 0001"), (-(2**63), "before 0001"),
    ],
)  # fmt: skip
def test_case_01_no_time_breaks_a_display(at_ms, iso):
    """One document whose life ended after the year 9999 broke `perennial explain` for its whole adapter."""
    assert iso_time(at_ms) == iso
    assert spoken_time(at_ms) == iso.replace("T", " ").replace("+00:00", "Z")


def test_attack_q_foreign_text_cannot_steer_a_terminal(monkeypatch):
    """A document's id with escape sequences set the title of the terminal and cleared it."""
    written = io.StringIO()
    written.isatty = lambda: True
    terminal = Console(file=written, width=200, color_system=None, force_terminal=True)
    pipe = io.StringIO()
    monkeypatch.setattr(sys.modules[print_error.__module__], "errors", terminal)
    for console in (terminal, Console(file=pipe, width=200)):
        print_table([Column("id"), Column("text", wraps=True)], [(HOSTILE, HOSTILE)], title=HOSTILE, console=console)
        print_facts({"id": HOSTILE}, console=console)
    terminal.print(layout([Column("id"), Column("text")], [(HOSTILE, HOSTILE)], width=5, title=HOSTILE))
    print_error(PerennialError(HOSTILE, got=HOSTILE, allowed=HOSTILE, remedy=f"[bold]{HOSTILE}"))
    for shown in (written.getvalue(), pipe.getvalue()):
        assert not FORBIDDEN & set(shown)
        assert "\\x1b" in shown
        assert "\\u202e" in shown
    assert "[bold]" in written.getvalue()


def test_attack_q_lines_stay_where_they_are_meant():
    assert printable_lines("a\n\tb\x1b\r") == "a\n\tb\\x1b\\r"
    assert printable("a\nb") == "a\\nb"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "störe→"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    line = VersionPublisher(DirectoryStore(tmp_path / "störe→", fsync=False), "acme/support")
    weights = small_weights(1)
    gate = GateFigures(held_out_before=4.0, held_out_after=3.5)
    line.registry.publish(line.manifest(weights).model_copy(update={"gate": gate}), [weights], lambda _: None)


SCRIPT = """
import json, sys
from datetime import UTC, datetime
from perennial.streams.cli import status
from perennial.streams.cli.app import main
from perennial.streams.cli.flow import AdapterStatus, FlowSnapshot
from perennial.streams.kafka.topics import TOPICS
flow = FlowSnapshot(1.0, dict.fromkeys(TOPICS, 7), dict.fromkeys(status.GROUPS, 2), missing_topics=[])
flow.adapters = [AdapterStatus("acme/郵", 3, "sha256:" + "0" * 64, 4, "promoted", 4.0, 3.5, 2, 1)]
flow.more_adapters = True
class Reader:
    def __init__(self, _): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def read(self): return flow
status.FlowReader = Reader
for words in json.loads(sys.argv.pop()):
    sys.argv = ["perennial", *words]
    print("$", *words)
    try:
        main()
    except SystemExit:
        pass
    sys.stdout.flush(), sys.stderr.flush()
"""


COMMANDS = (
    (["adapters", "history", "acme/support"], "4.000 -> 3.500"),
    (["adapters", "show", "acme/support"], "acme/support"),
    (["adapters", "ls"], "acme/support"),
    (["explain", "acme/support"], "acme/support: 0 examples"),
    (["status"], "4.000 -> 3.500 nats"),
    (["watch", "--times", "1", "--every-s", "0"], "4.000 -> 3.500 nats"),
    (["publish", "documents", "no-such-ö→file"], "no such file"),
    (["forget", "--adapter", "ö→", "--document", "x"], "--adapter is not usable"),
    (["forget", "--adapter", "acme/support", "--document", "ö→", "--dry-run"], "no such example"),
    (["--help"], "Keep language models learning"),
    (["up", "--port", "99999"], "99999"),
)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_case_16_every_command_prints_on_every_terminal(store, encoding, terminal):
    """PYTHONIOENCODING=latin-1 ended `status`, `explain` and `history` in a traceback, at the first arrow."""
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([words for words, _ in COMMANDS])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280, check=False,
        env={**environment(), "PYTHONIOENCODING": encoding, "FORCE_COLOR": "1" if terminal else "", "COLUMNS": "160"},
    )  # fmt: skip
    text = answer.stdout.decode(encoding)
    assert "Traceback" not in text
    assert "UnicodeEncodeError" not in text
    shown = text.split("$ ")
    for (words, wanted), part in zip(COMMANDS, shown[1:], strict=True):
        assert (wanted.replace("->", "→") if encoding == "utf-8" else wanted) in part, words


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONUTF8", "LC_ALL", "LANG"}}


def test_case_16_characters_fall_back_to_similar_ones(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    write_any_character()
    stream.write("é → … ━╭█⠋ 郵 \udcff")
    stream.flush()
    assert raw.getvalue() == b"\xe9 -> ... -+#* \\u90f5 \\udcff"


def test_case_16_a_table_keeps_its_width_on_a_terminal_without_unicode():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    console = Console(file=stream, width=40, force_terminal=True, color_system=None)
    console.print(layout([Column("name"), Column("id")], [("a" * 18, "b" * 20)], width=40))
    stream.flush()
    assert b"a" * 18 + b"  " + b"b" * 20 in raw.getvalue()
    assert b"-" * 20 in raw.getvalue()
