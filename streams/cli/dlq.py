"""`perennial dlq`: look at what was refused, and send it back once whatever refused it is mended."""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from perennial.streams.deadletters.model import DeadLetterRecord, Selection, parse_position, parse_since
from perennial.streams.deadletters.plan import RedriveReport, is_handled, redrive_state
from perennial.streams.deadletters.reader import DeadLetterReader
from perennial.streams.deadletters.redrive import Redriver
from perennial.streams.devstack.discovery import connected_settings

_SHOWN_BYTES = 4096
_SHOWN_CHARS = 200
_BAR_WIDTH = 40


def selection(*, reason: str, stage: str, topic: str, adapter: str, since: str) -> Selection:
    """The filters of the command line. Raises SettingsError."""
    moment = parse_since(since, datetime.now(UTC)) if since else None
    return Selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=moment)


def list_letters(chosen: Selection, *, limit: int, max_replays: int, as_json: bool) -> int:
    """The newest `limit` letters that are meant, and how many there are by state. Memory: one fetch and these lines."""
    lines: deque[dict[str, Any]] = deque(maxlen=limit)
    states: Counter[str] = Counter()
    with DeadLetterReader(connected_settings()) as reader:
        progress = reader.progress()
        for letter in reader.scan(chosen.since):
            if chosen.matches(letter):
                handled = is_handled(letter, progress)
                state = redrive_state(letter, handled=handled, max_redrives=max_replays)
                states[state] += 1
                lines.append(_line(letter, state))
    if as_json:
        print(json.dumps({"letters": list(lines), "states": states}))
        return 0
    console = Console()
    if lines:
        table = Table("place", "refused at", "reason", "by", "from", "adapter", "replays", "state")
        for line in sorted(lines, key=lambda line: str(line["at"])):
            table.add_row(
                line["place"], line["at"][:19], escape(line["reason"]), escape(line["stage"]), escape(line["from"]),
                escape(line["adapter"]), str(line["replays"]), _coloured(line["state"]),
            )  # fmt: skip
        console.print(table)
    counted = ", ".join(f"{n} {state}" for state, n in states.most_common()) or "none"
    shown = f", the last {len(lines)} shown (--limit)" if states.total() > len(lines) else ""
    Console(stderr=True).print(f"{states.total()} dead letters: {counted}{shown}", highlight=False)
    return 0


def show_letter(place: str, *, max_replays: int, as_json: bool) -> int:
    """Everything about one letter; of a long value the beginning."""
    partition, offset = parse_position(place)
    with DeadLetterReader(connected_settings()) as reader:
        letter = reader.read(partition, offset)
        handled = is_handled(letter, reader.progress())
    held, state = letter.dead_letter, redrive_state(letter, handled=handled, max_redrives=max_replays)
    if as_json:
        value = None if held.value is None else base64.b64encode(held.value).decode()
        headers = [[name, None if raw is None else base64.b64encode(raw).decode()] for name, raw in held.headers]
        print(json.dumps({**_line(letter, state), "detail": held.detail, "headers_b64": headers, "value_b64": value}))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    facts = {
        "place": letter.position, "reason": held.reason, "detail": held.detail, "refused by": held.stage,
        "refused at": held.at.isoformat(), "came from": f"{held.topic} {held.partition}:{held.offset}",
        "key": _text(letter.key), "adapter": letter.adapter, "replays": letter.redrives, "state": state,
    }  # fmt: skip
    for name, found in facts.items():
        console.print(f"[bold]{name:<11}[/] {_clean(str(found))}")
    for name, raw in held.headers:
        console.print(f"[bold]header[/]      {_clean(name)} = {_clean(_text(raw))}")
    size = "null" if held.value is None else f"{len(held.value)} bytes"
    console.print(f"[bold]value[/]       {size}")
    console.print(_pretty(held.value), markup=False)
    return 0


def replay_letters(
    chosen: Selection, *, dry_run: bool, rate: float, max_replays: int, limit: int, as_json: bool
) -> int:
    """Send letters back; exit code 130 where Ctrl-C ended it early: what was sent is saved, so run it again."""
    settings = connected_settings()
    if dry_run:
        with DeadLetterReader(settings) as reader:
            report = reader.dry_run(chosen, max_redrives=max_replays, limit=limit)
        _say(report, "would be replayed", as_json=as_json)
        return 0
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    console = Console(stderr=True)
    bar = Bar(
        SpinnerColumn(), TextColumn("replayed {task.completed:.0f}"), TimeElapsedColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with Redriver(settings, rate=rate) as replayer, bar:
            task = bar.add_task("", total=None)
            report = replayer.run(
                chosen, max_redrives=max_replays, limit=limit, stop=stop, on_sent=lambda n: bar.advance(task, n)
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _say(report, "replayed", as_json=as_json)
    return 130 if report.stopped else 0


def _say(report: RedriveReport, what: str, *, as_json: bool) -> None:
    if as_json:
        kinds = [{"reason": reason, "stage": stage, "count": n} for (reason, stage), n in report.sent.most_common()]
        print(json.dumps({"sent": report.sent.total(), "kinds": kinds, "left": report.left, "stopped": report.stopped}))
        return
    console = Console(highlight=False)
    if report.sent:
        table = Table("reason", "refused by", "letters", "", box=None)
        most = max(report.sent.values())
        for (reason, stage), n in report.sent.most_common():
            table.add_row(escape(reason), escape(stage), str(n), "█" * max(1, round(_BAR_WIDTH * n / most)))
        console.print(table)
    console.print(f"{report.sent.total()} letters {what}")
    remedies = {
        "quarantined": "refused again after --max-replays; raise it once their cause is mended",
        "erased": "what they hold was to be forgotten since: publish it anew if it may be learned",
        "inside": "of topics that Perennial writes itself: later events have overtaken them",
        "cut": "too large to be kept whole: publish the original again",
        "unreadable": "not written by Perennial",
    }
    for state, n in report.left.most_common():
        console.print(f"{n} left, {_coloured(state)}" + (f": {remedies[state]}" if state in remedies else ""))
    if report.stopped:
        console.print("stopped early; the same command goes on where this one ended")


def _line(letter: DeadLetterRecord, state: str) -> dict[str, Any]:
    return {
        "place": letter.position, "at": letter.dead_letter.at.isoformat(), "reason": letter.dead_letter.reason[:_SHOWN_CHARS],
        "stage": letter.dead_letter.stage[:_SHOWN_CHARS], "from": letter.source_topic[:_SHOWN_CHARS],
        "from_partition": letter.dead_letter.partition, "from_offset": letter.dead_letter.offset, "adapter": letter.adapter,
        "replays": letter.redrives, "state": state,
    }  # fmt: skip


def _coloured(state: str) -> str:
    colour = {"waiting": "yellow", "quarantined": "red", "replayed": "green"}.get(state, "dim")
    return f"[{colour}]{escape(state)}[/]"


def _clean(text: str) -> str:
    """Without what a terminal would obey."""
    return escape("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: 2 * _SHOWN_BYTES]))


def _text(raw: bytes | None) -> str:
    if raw is None:
        return "null"
    try:
        return raw[:_SHOWN_BYTES].decode()
    except UnicodeDecodeError:
        return f"0x{raw[:64].hex()}" + ("…" if len(raw) > 64 else "")


def _pretty(value: bytes | None) -> str:
    """A value as a person reads it: JSON indented, other text as it is, anything else as a hex dump; bounded."""
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
