"""`perennial publish`: JSON lines to a topic, each delivery confirmed, bad lines named."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from perennial.storage.errors import NotFoundError, PerennialError
from perennial.streams.client.publisher import Publisher, Receipt
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events import cloudevents as wire

_MAX_LINE_BYTES = 2 * 1024 * 1024
_IN_FLIGHT = 2_000


def publish_file(kind: str, file: str, *, adapter: str | None, as_json: bool) -> int:
    """Publish every line; exit code 1 where a line was refused or not delivered."""
    settings = connected_settings()
    delivered = 0
    refused: list[tuple[int, str]] = []
    pending: list[tuple[int, Receipt]] = []
    console = Console(stderr=True)

    def settle(keep: int) -> int:
        done = 0
        while len(pending) > keep:
            number, receipt = pending.pop(0)
            try:
                receipt.result(30)
                done += 1
            except PerennialError as error:
                refused.append((number, str(error)))
        return done

    with (
        _lines(file) as (lines, total),
        Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher,
        Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task(f"publishing {kind}", total=total)
        for number, line in enumerate(lines, 1):
            try:
                value = _value(line, adapter)
                if value is not None:
                    pending.append((number, publisher.publish(wire.decode(value, (), kind).event)))
            except PerennialError as error:
                refused.append((number, str(error)))
            if len(pending) >= _IN_FLIGHT:
                delivered += settle(_IN_FLIGHT // 2)
            progress.update(task, advance=1)
        publisher.flush(60)
        delivered += settle(0)
    if as_json:
        print(
            json.dumps(
                {
                    "delivered": delivered,
                    "refused": [{"line": line_number, "error": said} for line_number, said in refused],
                }
            )
        )
    else:
        console.print(f"{delivered} {kind} delivered and confirmed, {len(refused)} lines refused")
        for number, said in refused[:20]:
            console.print(f"  line {number}: {said}", markup=False, soft_wrap=True)
        if len(refused) > 20:
            console.print(f"  … and {len(refused) - 20} more (--json lists all)")
    return 1 if refused else 0


def _value(line: bytes, adapter: str | None) -> bytes | None:
    """The line as the topic's plain JSON, with the adapter put in where it names none; None for an empty line."""
    if not line.strip():
        return None
    if len(line) > _MAX_LINE_BYTES or adapter is None:
        return line  # what is too long is refused with its reason by whoever reads it next
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if isinstance(fields, dict):
        fields.setdefault("adapter", adapter)
        return json.dumps(fields).encode()
    return line


@contextlib.contextmanager
def _lines(file: str) -> Iterator[tuple[Iterator[bytes], int | None]]:
    if file == "-":
        yield iter(sys.stdin.buffer), None
        return
    path = Path(file)
    try:
        total = _count_lines(path)
        with path.open("rb") as opened:
            yield iter(opened), total
    except FileNotFoundError as error:
        raise NotFoundError(
            "no such file", got=os.fspath(path), remedy="name a file of JSON lines, or - for standard input"
        ) from error


def _count_lines(path: Path) -> int:
    def chunks(opened: BinaryIO) -> Iterator[bytes]:
        while chunk := opened.read(1 << 20):
            yield chunk

    with path.open("rb") as opened:
        return sum(chunk.count(b"\n") for chunk in chunks(opened))
