"""The commands `perennial publish documents` and `interactions`: publish JSON lines and report each refused line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from perennial.storage.errors import NotFoundError, PerennialError
from perennial.streams.client.base_publisher import Receipt
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.cloudevents import decode
from perennial.streams.settings import SettingsError

_MAX_LINE_BYTES = 2 * 1024 * 1024
_IN_FLIGHT = 2_000
"""Most lines that wait for the broker's acknowledgement at one time."""
_MAX_SHOWN = 20


def publish_file(kind: str, file: str, *, adapter: str | None, as_json: bool) -> int:
    """Publish every line of a file and print how many were delivered and which were refused.

    Args:
        kind: Topic without the prefix: `documents` or `interactions`.
        file: Path of the file, or `-` for standard input.
        adapter: Adapter for lines that name none.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where a line was refused or not delivered.

    Raises:
        NotFoundError: The file does not exist.
        SettingsError: The file cannot be read.
    """
    settings = connected_settings()
    delivered = 0
    refused: list[tuple[int, str]] = []
    pending: list[tuple[int, Receipt]] = []
    console = Console(stderr=True)

    def wait_for_oldest(keep: int) -> int:
        """Wait for the oldest deliveries until only `keep` are pending; return how many arrived."""
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
                    pending.append((number, publisher.publish(decode(value, (), kind).event)))
            except PerennialError as error:
                refused.append((number, str(error)))
            if len(pending) >= _IN_FLIGHT:
                delivered += wait_for_oldest(_IN_FLIGHT // 2)
            progress.update(task, advance=1)
        publisher.flush(60)
        delivered += wait_for_oldest(0)
    if as_json:
        print(
            json.dumps(
                {
                    "delivered": delivered,
                    "refused": [{"line": line_number, "error": problem} for line_number, problem in refused],
                }
            )
        )
    else:
        console.print(f"{delivered} {kind} delivered and confirmed, {len(refused)} lines refused")
        for number, problem in refused[:_MAX_SHOWN]:
            console.print(f"  line {number}: {problem}", markup=False, soft_wrap=True)
        if len(refused) > _MAX_SHOWN:
            console.print(f"  … and {len(refused) - _MAX_SHOWN} more (--json lists all)")
    return 1 if refused else 0


def _value(line: bytes, adapter: str | None) -> bytes | None:
    """Return the line with the adapter added where it names none, or None for an empty line."""
    if not line.strip():
        return None
    if len(line) > _MAX_LINE_BYTES or adapter is None:
        return line  # decode refuses a line that is too long, with the reason
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
    """Open the file and yield its lines and their number, which is None for standard input."""
    if file == "-":
        yield iter(sys.stdin.buffer), None
        return
    path = Path(file)
    remedy = "name a file of JSON lines, or - for standard input"
    try:
        total, opened = _count_lines(path), path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError("no such file", got=str(path), remedy=remedy) from error
    except OSError as error:
        raise SettingsError("the file cannot be read", got=f"{path}: {error.strerror}", remedy=remedy) from error
    with opened:
        yield iter(opened), total


def _count_lines(path: Path) -> int:
    def chunks(opened: BinaryIO) -> Iterator[bytes]:
        while chunk := opened.read(1 << 20):
            yield chunk

    with path.open("rb") as opened:
        return sum(chunk.count(b"\n") for chunk in chunks(opened))
