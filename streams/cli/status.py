"""`perennial status` and `perennial watch`: one look, or a look every second."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from perennial.streams.cli.flow import GROUPS, Flow, FlowReader
from perennial.streams.cli.tables import short_version
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.topics import TOPICS


def show_status(*, as_json: bool) -> int:
    """Print one look; exit code 1 where topics are missing."""
    with FlowReader(connected_settings()) as reader:
        flow = reader.look()
    if as_json:
        print(json.dumps(asdict(flow)))
    else:
        Console().print(render(flow, None))
    return 1 if flow.missing_topics else 0


def watch_status(*, every_s: float, times: int) -> int:
    """Show looks until Ctrl-C, or so many."""
    console = Console()
    before: Flow | None = None
    taken = 0
    with FlowReader(connected_settings()) as reader, Live(console=console, auto_refresh=False) as live:
        try:
            while not times or taken < times:
                flow = reader.look()
                live.update(render(flow, before), refresh=True)
                before = flow
                taken += 1
                if not times or taken < times:
                    time.sleep(every_s)
        except KeyboardInterrupt:
            return 0
    return 0


def render(flow: Flow, before: Flow | None) -> RenderableType:
    """The picture of one look; rates need the look before."""
    flow_table = Table("topic", "events", "per second", "read by", "waiting", title="flow", title_justify="left")
    readers = {topic: role for role, topics in GROUPS.items() for topic in topics}
    for name in TOPICS:
        role = readers.get(name, "")
        rate = "-"
        if before and flow.taken_at > before.taken_at:
            rate = f"{(flow.written[name] - before.written[name]) / (flow.taken_at - before.taken_at):.1f}"
        waiting = flow.lag[role] if role else 0
        shown = "" if not role else f"[yellow]{waiting}[/]" if waiting else "0"
        letters = name == "dead-letters" and flow.written[name]
        flow_table.add_row(f"[red]{name}[/]" if letters else name, str(flow.written[name]), rate, role, shown)
    adapters = Table(
        "adapter", "generation", "version", "made", "last outcome", "held-out before → after", "served by", "failing",
        title="adapters", title_justify="left",
    )  # fmt: skip
    for line in flow.adapters:
        loss = "-"
        if line.held_out_before_nats is not None and line.held_out_after_nats is not None:
            loss = f"{line.held_out_before_nats:.3f} → {line.held_out_after_nats:.3f} nats"
        adapters.add_row(
            line.adapter, str(line.generation), short_version(line.version), str(line.seq), line.outcome, loss,
            str(line.served_by), f"[red]{line.failing}[/]" if line.failing else "0",
        )  # fmt: skip
    parts: list[RenderableType] = [flow_table]
    if flow.missing_topics:
        parts.append(
            Text(
                "topics are missing, make them with `perennial topics create`: " + ", ".join(flow.missing_topics), "red"
            )
        )
    parts.append(adapters if flow.adapters else Text("no adapter has a version yet"))
    if flow.more_adapters:
        parts.append(Text("… and more; `perennial adapters ls` lists all"))
    return Group(*parts)
