"""Tables and lists of facts for the command line, readable at any width and complete in a pipe.

At a terminal a table fits the width: columns of low priority are left out, long texts wrap, and where even that does
not suffice every row becomes a block of `name: value` lines. Names, versions and ids are never cut short, so that they
can be copied into the next command. In a pipe a table is plain text, aligned by spaces, with every column in full.

Add a table to a command: describe its columns once, then print the rows.

    COLUMNS = (Column("adapter"), Column("version", shorten=short_version), Column("reason", 1, wraps=True))
    print_table(COLUMNS, [("acme/support", version, reason)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich import box
from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from perennial.streams.cli.terminal.printable import printable

Cell: TypeAlias = str | Text
"""Plain text (never markup), or text with a style."""
Row: TypeAlias = Sequence[Cell]


class _HeadBox(Box):
    """A line below the header, also on a terminal without Unicode, where rich would draw a wider box of its own."""

    def substitute(self, options: ConsoleOptions, safe: bool = True) -> Box:  # noqa: ARG002  # rich names it
        return _ASCII_HEAD_BOX if options.ascii_only else self


_HEAD_BOX = _HeadBox(str(box.SIMPLE_HEAD))
_ASCII_HEAD_BOX = Box(str(box.SIMPLE_HEAD).replace("─", "-"), ascii=True)
_GAP = 2
_MIN_WRAPPED = 14
"""Narrowest column for texts that wrap; a narrower one is harder to read than a block of lines."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: Header, and the name of the value in a block.
        priority: 0 for a column that every table shows; columns with the highest number are left out first.
        wraps: True for texts that may go over several lines; False for names, ids and numbers.
        right: True to align the cells to the right, for numbers.
        shorten: Shortens a cell at a terminal, for example `short_version`; a pipe shows the cell in full.
    """

    name: str
    priority: int = 0
    wraps: bool = False
    right: bool = False
    shorten: Callable[[str], str] | None = None


def short_version(version: str | None) -> str:
    """Return the first twelve hex digits of a version's digest, or `-` for None.

    The commands that take a version accept this beginning as long as it is unique.
    """
    return version.removeprefix("sha256:")[:12] if version and version != "-" else "-"


def short_time(iso: str) -> str:
    """Return an ISO 8601 time without the fraction of the second; other text comes back unchanged."""
    head, dot, tail = iso.partition(".")
    return head + tail.lstrip("0123456789") if dot else iso


def at_terminal(console: Console) -> bool:
    """Return True where the console prints to a terminal; FORCE_COLOR does not make one of a pipe."""
    return console.file.isatty()


def shown_version(version: str | None, console: Console) -> str:
    """Return a version for a message: twelve hex digits at a terminal, the full id elsewhere."""
    return short_version(version) if at_terminal(console) else version or "-"


def print_table(
    columns: Sequence[Column], rows: Sequence[Row], *, title: str = "", console: Console | None = None
) -> None:
    """Print a table: fitted to the width at a terminal, complete and without lines in a pipe.

    Args:
        columns: One description per cell of a row.
        rows: Cells in the order of the columns.
        title: Line above the table.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    if not at_terminal(console):
        print(plain(columns, rows, title=title), file=console.file)
        return
    shown = layout(columns, rows, width=console.width, title=title)
    # soft_wrap leaves breaking long lines to the terminal, so that a copied id has no line end; a table must wrap itself
    console.print(shown, soft_wrap=isinstance(shown, Text), highlight=False)


def print_facts(facts: Mapping[str, object], *, console: Console | None = None) -> None:
    """Print one `name  value` line per fact; nothing is cut, and only the terminal breaks long lines.

    Args:
        facts: Names and values in the order to print; a value may be text with a style.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    width = max((cell_len(name) for name in facts), default=0)
    for name, value in facts.items():
        line = Text.assemble(
            (name.ljust(width), "bold"), "  ", _escaped(value if isinstance(value, Text) else str(value))
        )
        console.print(line, soft_wrap=True, highlight=False)


def plain(columns: Sequence[Column], rows: Sequence[Row], *, title: str = "") -> str:
    """Return a table as plain text with every cell in full: columns aligned by spaces, one line per row.

    An empty cell is `-`. The width of the terminal and COLUMNS play no part.
    """
    lines = [[column.name for column in columns], *([_escaped(cell).plain or "-" for cell in row] for row in rows)]
    widths = [max(cell_len(line[col]) for line in lines) for col in range(len(columns))]
    shown = [
        (" " * _GAP)
        .join(_padded(cell, widths[col], right=columns[col].right) for col, cell in enumerate(line))
        .rstrip()
        for line in lines
    ]
    return "\n".join([printable(title), *shown] if title else shown)


def layout(columns: Sequence[Column], rows: Sequence[Row], *, width: int, title: str = "") -> RenderableType:
    """Return a table that fits into `width` terminal cells, or blocks of lines (a `Text`) where no table fits.

    A last line names the columns that were left out.
    """
    cells = [[_shortened(column, cell) for column, cell in zip(columns, row, strict=True)] for row in rows]
    shown = list(range(len(columns)))
    while (widths := _widths(columns, cells, shown, width)) is None:
        last = max(shown, key=lambda col: (columns[col].priority, col))
        if columns[last].priority == 0:
            return _blocks(columns, cells, title)
        shown.remove(last)
    table = Table(
        box=_HEAD_BOX, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), title=Text(printable(title), "italic") or None,
        title_justify="left",
    )  # fmt: skip
    for col, wide in zip(shown, widths, strict=True):
        table.add_column(
            columns[col].name, width=wide, overflow="fold", justify="right" if columns[col].right else "left"
        )
    for row in cells:
        table.add_row(*(row[col] for col in shown))
    hidden = [column.name for col, column in enumerate(columns) if col not in shown]
    if not hidden:
        return table
    note = f"not shown at this width: {', '.join(hidden)}; a wider terminal or a pipe shows all"
    return Group(table, Text(note, "dim"))


def _widths(
    columns: Sequence[Column], cells: Sequence[Sequence[Text]], shown: Sequence[int], width: int
) -> list[int] | None:
    """Return a width per shown column, or None where they do not fit: headers and texts wrap, other cells never do."""
    least, wanted = [], []
    for col in shown:
        longest = max((cell_len(line) for row in cells for line in row[col].plain.split("\n")), default=0)
        header = columns[col].name
        word = max(cell_len(part) for part in header.split())
        least.append(max(word, min(longest, _MIN_WRAPPED) if columns[col].wraps else longest))
        wanted.append(max(longest, cell_len(header)))
    spare = width - sum(least) - _GAP * (len(shown) - 1)
    if spare < 0:
        return None
    while (
        spare and (needy := max(range(len(shown)), key=lambda col: wanted[col] - least[col], default=None)) is not None
    ):
        if wanted[needy] <= least[needy]:
            break
        least[needy] += 1
        spare -= 1
    return least


def _blocks(columns: Sequence[Column], cells: Sequence[Sequence[Text]], title: str) -> Text:
    blocks = [
        Text("\n").join(
            Text.assemble((f"{column.name}: ", "bold"), cell) for column, cell in zip(columns, row, strict=True)
        )
        for row in cells
    ]
    return Text("\n\n").join([Text(printable(title), "italic"), *blocks] if title else blocks)


def _shortened(column: Column, cell: Cell) -> Text:
    if column.shorten is None:
        return _escaped(cell, keep_lines=True)
    text = cell if isinstance(cell, Text) else Text(cell)
    return Text(printable(column.shorten(text.plain)), text.style)


def _escaped(cell: Cell, *, keep_lines: bool = False) -> Text:
    """Return the cell without control characters; line ends become `; ` unless they are kept."""
    text = cell if isinstance(cell, Text) else Text(cell)
    lines = [printable(line) for line in text.plain.split("\n")]
    clean = ("\n" if keep_lines else "; ").join(lines)
    return text if clean == text.plain else Text(clean, text.style)


def _padded(text: str, width: int, *, right: bool) -> str:
    blanks = " " * (width - cell_len(text))
    return blanks + text if right else text + blanks
