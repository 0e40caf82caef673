"""Tables of the command line: nothing that is copied may be cut short, at any width and in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from perennial.streams.cli.tables import Column, plain, print_facts, print_table, short_time, short_version

ADAPTER = "a-tenant-with-a-long-name/a-team-of-it/production-assistant-x"
VERSION = "sha256:" + "0123456789abcdef" * 4
REASON = "the held-out loss did not fall, so that the gate refused this version and kept the one before"
COLUMNS = (
    Column("adapter"),
    Column("version", shorten=short_version),
    Column("examples learned", 2, right=True),
    Column("reason", 1, wraps=True),
)


class Terminal(io.StringIO):
    """Text in memory that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def rendered(
    rows: list[tuple[str | Text, ...]], *, width: int, terminal: bool, columns: tuple[Column, ...] = COLUMNS
) -> str:
    file = Terminal() if terminal else io.StringIO()
    print_table(columns, rows, title="adapters", console=Console(file=file, width=width, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 40])
@pytest.mark.parametrize("adapter", ["acme/support", ADAPTER])
def test_a_terminal_shows_names_and_versions_whole(width: int, adapter: str) -> None:
    shown = rendered([(adapter, VERSION, "12", REASON)], width=width, terminal=True)
    assert adapter in shown
    assert short_version(VERSION) in shown
    assert "…" not in shown
    if adapter != ADAPTER or width == 200:
        assert max(map(cell_len, shown.splitlines())) <= width


def test_every_line_of_a_table_fits_the_width_at_every_width() -> None:
    for width in range(24, 130):
        shown = rendered(
            [("acme/support", VERSION, "12", REASON), ("b", VERSION, "3", "ok")], width=width, terminal=True
        )
        if "adapter: " not in shown:  # blocks are left to the terminal to wrap
            assert max(map(cell_len, shown.splitlines())) <= width, shown
        assert "acme/support" in shown
        assert shown.count(short_version(VERSION)) == 2


def test_columns_of_low_priority_go_first_and_are_named() -> None:
    shown = rendered([("acme/support", VERSION, "12", REASON)], width=46, terminal=True)
    assert "not shown at this width: examples learned" in " ".join(shown.split())
    assert "gate refused" in shown or "refused" in shown


def test_rows_become_blocks_where_no_table_fits() -> None:
    shown = rendered([(ADAPTER, VERSION, "12", REASON)] * 2, width=40, terminal=True)
    assert f"adapter: {ADAPTER}\nversion: 0123456789ab\nexamples learned: 12\nreason: {REASON}\n\n" in shown


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_pipe_has_every_column_in_full_and_no_lines_drawn(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = rendered([(ADAPTER, VERSION, "12", REASON), ("b", "", "7", Text("x", "red"))], width=20, terminal=False)
    title, header, first, second = shown.splitlines()
    assert title == "adapters"
    assert header.split() == ["adapter", "version", "examples", "learned", "reason"]
    assert first.startswith(f"{ADAPTER}  {VERSION}")
    assert first.endswith(REASON)
    assert second.split() == ["b", "-", "7", "x"]
    assert first.index("12  ") == second.index(" 7  ")
    assert not set("│┃─━…\x1b") & set(shown)


def test_control_characters_of_cells_are_escaped_everywhere() -> None:
    for terminal in (True, False):
        shown = rendered([("a\x1b[31m", "", "1", "two\nlines")], width=80, terminal=terminal)
        assert "\x1b[31m" not in shown
        assert "\\x1b[31m" in shown


def test_an_empty_table_has_its_header() -> None:
    assert plain(COLUMNS, []) == "adapter  version  examples learned  reason"
    assert "adapter" in rendered([], width=40, terminal=True)


def test_square_brackets_are_text_and_not_markup() -> None:
    for terminal in (True, False):
        assert "topic[3]@7 [red]" in rendered([("topic[3]@7 [red]", "", "", "")], width=80, terminal=terminal)


def test_facts_are_not_cut_at_any_width() -> None:
    for terminal in (True, False):
        file = Terminal() if terminal else io.StringIO()
        console = Console(file=file, width=20, color_system=None)
        print_facts({"version": VERSION, "long name": Text(ADAPTER, "red")}, console=console)
        assert file.getvalue() == f"version    {VERSION}\nlong name  {ADAPTER}\n"


def test_short_forms() -> None:
    assert short_version(VERSION) == "0123456789ab"
    assert short_version(None) == short_version("-") == "-"
    assert short_time("2026-01-31T12:00:00.123456+00:00") == "2026-01-31T12:00:00+00:00"
    assert short_time("2026-01-31T12:00:00Z") == "2026-01-31T12:00:00Z"
    assert short_time("-") == "-"
