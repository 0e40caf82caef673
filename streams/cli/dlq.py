"""The commands `perennial dlq ls`, `show` and `replay`: inspect dead letters, and send them back once the cause is fixed."""

from __future__ import annotations

import base64
import json
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any

import orjson
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from perennial.streams.cli.tables import Column, Row, print_facts, print_table, short_time
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.deadletters.model import DeadLetterRecord, Selection, parse_position, parse_since
from perennial.streams.deadletters.reader import DeadLetterReader
from perennial.streams.deadletters.redrive import Redriver
from perennial.streams.deadletters.redrive_plan import RedriveReport, is_handled, redrive_state
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.devstack.signals import event_on_stop_signals

_SHOWN_BYTES = 4096
_SHOWN_CHARS = 256  # a topic name has at most 249; a forged header may be much longer
_BAR_WIDTH = 40
_COLOURS = {"waiting": "yellow", "quarantined": "red", "replayed": "green"}
_COLUMNS = (
    Column("position"), Column("refused at", 3, shorten=short_time), Column("reason", wraps=True),
    Column("refused by", 1), Column("from", 2), Column("adapter"), Column("replays", 4, right=True), Column("state"),
)  # fmt: skip
_REASON_COLUMNS = (Column("reason", wraps=True), Column("refused by"), Column("dead letters", right=True),
    Column("share", 1),
)  # fmt: skip
_REMEDIES = {
    "quarantined": "refused again after --max-replays attempts; raise it once the cause is fixed",
    "erased": "a request to forget matches them by now: publish them anew if they may be learned",
    "inside": "from topics that Perennial itself writes: later events have replaced them",
    "cut": "too large to be kept whole: publish the original again",
    "unreadable": "not written by Perennial",
}


def selection(*, reason: str, stage: str, topic: str, adapter: str, since: str) -> Selection:
    """Return the filters of the command line; an empty filter matches everything.

    Raises:
        SettingsError: `since` is neither a span of time nor an ISO 8601 time.
    """
    moment = parse_since(since, datetime.now(UTC)) if since else None
    return Selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=moment)


def list_dead_letters(chosen: Selection, *, limit: int, max_replays: int, as_json: bool) -> int:
    """Print the newest matching dead letters and the number of matches by state.

    Memory holds one fetch and the rows to print, however many dead letters there are.

    Args:
        chosen: Filters.
        limit: Most rows to print.
        max_replays: Replays after which a dead letter counts as quarantined.
        as_json: Print JSON instead of a table.

    Returns:
        The exit code.
    """
    rows: deque[dict[str, Any]] = deque(maxlen=limit)
    states: Counter[str] = Counter()
    with DeadLetterReader(connected_settings()) as reader:
        progress = reader.progress()
        for record in reader.scan(chosen.since):
            if chosen.matches(record):
                state = redrive_state(record, handled=is_handled(record, progress), max_redrives=max_replays)
                states[state] += 1
                rows.append(_facts(record, state))
    if as_json:
        print(json.dumps({"letters": list(rows), "states": states}))
        return 0
    if rows:
        print_table(_COLUMNS, [_row(facts) for facts in sorted(rows, key=lambda facts: str(facts["at"]))])
    counted = ", ".join(f"{n} {state}" for state, n in states.most_common()) or "none"
    shown = f", the last {len(rows)} shown (--limit)" if states.total() > len(rows) else ""
    Console(stderr=True).print(f"{states.total()} dead letters: {counted}{shown}", highlight=False)
    return 0


def show_dead_letter(position: str, *, max_replays: int, as_json: bool) -> int:
    """Print one dead letter; a long value is shown up to its first 4 KiB.

    Args:
        position: `PARTITION:OFFSET` in the topic `dead-letters`.
        max_replays: Replays after which a dead letter counts as quarantined.
        as_json: Print JSON, with the whole value in base64.

    Returns:
        The exit code.

    Raises:
        NotFoundError: No record is stored at this position.
        SettingsError: The position is not usable.
    """
    partition, offset = parse_position(position)
    with DeadLetterReader(connected_settings()) as reader:
        record = reader.read(partition, offset)
        handled = is_handled(record, reader.progress())
    held, state = record.dead_letter, redrive_state(record, handled=handled, max_redrives=max_replays)
    if as_json:
        headers = [[name, _base64(raw)] for name, raw in held.headers]
        print(json.dumps({
            **_facts(record, state), "detail": held.detail, "key_b64": _base64(record.key), "headers_b64": headers,
            "value_b64": _base64(held.value),
        }))  # fmt: skip
        return 0
    print_facts({
        "position": record.position, "reason": held.reason, "detail": held.detail, "refused by": held.stage,
        "refused at": held.at.isoformat(), "came from": f"{held.topic} {held.partition}:{held.offset}",
        "key": _text(record.key), "adapter": record.adapter, "replays": record.redrives, "state": state,
    })  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    for name, raw in held.headers:  # a name may come twice, so they are no mapping
        console.print(Text.assemble(("header      ", "bold"), f"{printable(name)} = {printable(_text(raw))}"))
    size = "null" if held.value is None else f"{len(held.value)} bytes"
    console.print(Text.assemble(("value       ", "bold"), size))
    console.print(_pretty(held.value), markup=False)
    return 0


def replay_dead_letters(
    chosen: Selection, *, dry_run: bool, rate: float, max_replays: int, limit: int, as_json: bool
) -> int:
    """Send matching dead letters back to their topics.

    Progress is saved while records are sent, so that running the command again continues where it ended.

    Args:
        chosen: Filters.
        dry_run: Send nothing; print what would be sent.
        rate: Records per second; 0 for no limit.
        max_replays: Replays after which a dead letter stays in quarantine.
        limit: Most records to send; 0 for all.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 130 where Ctrl-C or SIGTERM ended it early.
    """
    settings = connected_settings()
    if dry_run:
        with DeadLetterReader(settings) as reader:
            report = reader.dry_run(chosen, max_redrives=max_replays, limit=limit)
        _print_report(report, "would be sent back", as_json=as_json)
        return 0
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(), TextColumn("sent back {task.completed:.0f}"), TimeElapsedColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    with event_on_stop_signals() as stop, Redriver(settings, rate=rate) as redriver, bar:
        task = bar.add_task("", total=None)
        report = redriver.run(
            chosen, max_redrives=max_replays, limit=limit, stop=stop, on_sent=lambda n: bar.advance(task, n)
        )
    _print_report(report, "sent back", as_json=as_json)
    return 130 if report.stopped else 0


def _print_report(report: RedriveReport, done: str, *, as_json: bool) -> None:
    if as_json:
        kinds = [{"reason": reason, "stage": stage, "count": n} for (reason, stage), n in report.sent.most_common()]
        print(json.dumps({"sent": report.sent.total(), "kinds": kinds, "left": report.left, "stopped": report.stopped}))
        return
    console = Console(highlight=False, soft_wrap=True)
    if report.sent:
        most = max(report.sent.values())
        rows = [
            (reason, stage, str(n), "█" * max(1, round(_BAR_WIDTH * n / most)))
            for (reason, stage), n in report.sent.most_common()
        ]
        print_table(_REASON_COLUMNS, rows, console=console)
    console.print(f"{report.sent.total()} dead letters {done}")
    for state, n in report.left.most_common():
        remedy = f": {_REMEDIES[state]}" if state in _REMEDIES else ""
        console.print(Text.assemble(f"{n} not sent, ", (state, _COLOURS.get(state, "dim")), remedy))
    if report.stopped:
        console.print("stopped early; the same command continues where this one ended")


def _facts(record: DeadLetterRecord, state: str) -> dict[str, Any]:
    return {
        "place": record.position, "at": record.dead_letter.at.isoformat(), "reason": record.dead_letter.reason[:_SHOWN_CHARS],
        "stage": record.dead_letter.stage[:_SHOWN_CHARS], "from": record.source_topic[:_SHOWN_CHARS],
        "from_partition": record.dead_letter.partition, "from_offset": record.dead_letter.offset, "adapter": record.adapter,
        "replays": record.redrives, "state": state,
    }  # fmt: skip


def _row(facts: dict[str, Any]) -> Row:
    return (
        facts["place"], facts["at"], facts["reason"], facts["stage"], facts["from"], facts["adapter"],
        str(facts["replays"]), Text(facts["state"], _COLOURS.get(facts["state"], "dim")),
    )  # fmt: skip


def _base64(raw: bytes | None) -> str | None:
    return None if raw is None else base64.b64encode(raw).decode()


def _text(raw: bytes | None) -> str:
    if raw is None:
        return "null"
    try:
        return raw[:_SHOWN_BYTES].decode()
    except UnicodeDecodeError:
        return f"0x{raw[:64].hex()}" + (f"… ({len(raw)} bytes)" if len(raw) > 64 else "")


def _pretty(value: bytes | None) -> str:
    """Return at most 4 KiB of a value for reading: JSON indented, other text unchanged, anything else as a hex dump."""
    if value is None:
        return ""
    try:
        text = orjson.dumps(orjson.loads(value), option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        text = value.decode("utf-8", "replace")
        if "\ufffd" in text or not all(c.isprintable() or c in "\n\t\r" for c in text[:_SHOWN_BYTES]):
            return _hexdump(value)
    more = f"\n… ({len(value)} bytes in all; --json gives them)" if len(text) > _SHOWN_BYTES else ""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text[:_SHOWN_BYTES]) + more


def _hexdump(value: bytes, limit: int = 512) -> str:
    rows = []
    for at in range(0, min(len(value), limit), 16):
        part = value[at : at + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        rows.append(f"{at:08x}  {part.hex(' '):<47}  {shown}")
    more = [f"… ({len(value)} bytes in all; --json gives them)"] if len(value) > limit else []
    return "\n".join([*rows, *more])
