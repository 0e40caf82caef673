"""The commands `perennial status` and `perennial watch`: the flow now, or the flow refreshed every second."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from perennial.streams.cli.flow import GROUPS, AdapterStatus, FlowReader, FlowSnapshot
from perennial.streams.cli.tables import Column, Row, at_terminal, layout, plain, print_table, short_version
from perennial.streams.cli.terminal.times import spoken_time
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.tenants import base_topic

_TOPIC_COLUMNS = (
    Column("topic"), Column("events", 1, right=True), Column("per second", 2, right=True), Column("read by", 3),
    Column("waiting", right=True),
)  # fmt: skip
_ADAPTER_COLUMNS = (
    Column("adapter"), Column("generation", 3, right=True), Column("version", shorten=short_version),
    Column("made", 4, right=True), Column("last outcome", 1), Column("held-out loss before → after", 2, wraps=True),
    Column("served by", right=True), Column("failing", right=True),
)  # fmt: skip


class _Table(NamedTuple):
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]


def show_status(*, as_json: bool) -> int:
    """Print the flow once and return the exit code: 1 where topics are missing.

    Raises:
        BrokerUnreachableError: The broker does not answer.
    """
    with FlowReader(connected_settings()) as reader:
        flow = reader.read()
    if as_json:
        print(json.dumps(asdict(flow)))
    else:
        tables, notes = _parts(flow, None)
        for table in tables:
            print_table(table.columns, table.rows, title=table.title)
            print()
        for note in notes:
            Console(highlight=False).print(note, soft_wrap=True)
    return 1 if flow.missing_topics else 0


def watch_status(*, every_s: float, times: int) -> int:
    """Print the flow again and again until Ctrl-C, at a terminal in place.

    Args:
        every_s: Seconds between two readings.
        times: Number of readings; 0 for no end.

    Raises:
        BrokerUnreachableError: The broker does not answer.
    """
    console = Console(highlight=False)
    before: FlowSnapshot | None = None
    taken = 0
    # In a pipe every reading is printed below the one before: a live display would print only the last.
    display = Live(console=console, auto_refresh=False) if at_terminal(console) else nullcontext()
    with FlowReader(connected_settings()) as reader, display as live:
        try:
            while not times or taken < times:
                flow = reader.read()
                if live is None:
                    print(as_text(flow, before), end="\n\n", flush=True)
                else:
                    live.update(render(flow, before, console.width), refresh=True)
                before = flow
                taken += 1
                if not times or taken < times:
                    time.sleep(every_s)
        except KeyboardInterrupt:
            return 0
    return 0


def render(flow: FlowSnapshot, before: FlowSnapshot | None, width: int) -> RenderableType:
    """Return the flow as tables for a terminal.

    Args:
        flow: The reading to show.
        before: The reading before it, from which the rates are computed.
        width: Width of the terminal in cells.
    """
    tables, notes = _parts(flow, before)
    shown: list[Any] = []
    for table in tables:
        shown += [layout(table.columns, table.rows, width=width, title=table.title), Text()]
    return Group(*shown, *notes)


def as_text(flow: FlowSnapshot, before: FlowSnapshot | None) -> str:
    """Return the flow as plain text for a pipe; the arguments are those of `render`."""
    tables, notes = _parts(flow, before)
    shown = [plain(table.columns, table.rows, title=table.title) for table in tables]
    return "\n\n".join([*shown, *(note.plain for note in notes)])


def _parts(flow: FlowSnapshot, before: FlowSnapshot | None) -> tuple[list[_Table], list[Text]]:
    readers = {topic: role for role, topics in GROUPS.items() for topic in topics}
    tables = [
        _Table(
            "flow",
            _TOPIC_COLUMNS,
            [_topic_row(flow, before, name, readers.get(base_topic(name), "")) for name in flow.written],
        )
    ]
    notes = []
    if flow.missing_topics:
        names = ", ".join(flow.missing_topics)
        notes.append(Text(f"topics are missing, create them with `perennial topics create`: {names}", "red"))
    if flow.adapters:
        tables.append(_Table("adapters", _ADAPTER_COLUMNS, [_adapter_row(adapter) for adapter in flow.adapters]))
    else:
        notes.append(Text("no adapter has a version yet"))
    for adapter, reason in flow.parked.items():
        notes.append(
            Text(f"{adapter} is parked: {reason}; `perennial adapters show {adapter}` says what to do", "red")
        )  # fmt: skip
    for request_id, until_ms in flow.unapproved.items():
        text = f"request {request_id} waits for a second approver until {spoken_time(until_ms)}; "
        notes.append(Text(f"{text}`perennial forget status {request_id}` shows it", "yellow"))
    for adapter, (made, total) in flow.rebases.items():
        notes.append(Text(f"{adapter} is learned anew on another base: {made} of {total} updates"))
    if flow.more_adapters:
        notes.append(Text("… and more; `perennial adapters ls` lists all"))
    return tables, notes


def _topic_row(flow: FlowSnapshot, before: FlowSnapshot | None, name: str, role: str) -> Row:
    rate = "-"
    if before and flow.taken_at > before.taken_at:
        rate = f"{(flow.written[name] - before.written[name]) / (flow.taken_at - before.taken_at):.1f}"
    waiting = flow.lag[role] if role else 0
    has_dead_letters = name == "dead-letters" and flow.written[name]
    return (
        Text(name, "red") if has_dead_letters else name, str(flow.written[name]), rate, role,
        Text(str(waiting), "yellow") if waiting else "0" if role else "",
    )  # fmt: skip


def _adapter_row(adapter: AdapterStatus) -> Row:
    loss = "-"
    if adapter.held_out_before_nats is not None and adapter.held_out_after_nats is not None:
        loss = f"{adapter.held_out_before_nats:.3f} → {adapter.held_out_after_nats:.3f} nats"
    return (
        adapter.adapter, str(adapter.generation), adapter.version or "-", str(adapter.seq), adapter.outcome, loss,
        str(adapter.served_by), Text(str(adapter.failing), "red") if adapter.failing else "0",
    )  # fmt: skip
