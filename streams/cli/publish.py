"""The commands `perennial publish documents` and `interactions`: publish JSON lines and report each refused line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from perennial.storage.errors import NotFoundError, PerennialError
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.client.base_publisher import Receipt
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.cloudevents import decode
from perennial.streams.paths import expand_path
from perennial.streams.settings import SettingsError

_MAX_LINE_BYTES = 2 * 1024 * 1024
_IN_FLIGHT = 2_000
"""Most lines that wait for the broker's acknowledgement at one time."""
_MAX_SHOWN = 20
_UTF8_BOM = b"\xef\xbb\xbf"
_ANY_JSON: TypeAdapter[Any] = TypeAdapter(Any)
_REMEDY = "name a file of JSON lines, or - for standard input"


class NoInputError(PerennialError):
    """The input has no line, so nothing was published."""


def publish_file(kind: str, file: str, *, adapter: str | None, as_json: bool) -> int:
    """Publish every line of a file and print how many were delivered and which were refused.

    Args:
        kind: Topic without the prefix: `documents` or `interactions`.
        file: Path of the file, or `-` for standard input. It is read once, so a pipe may be named, too.
        adapter: Adapter for lines that name none.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where a line was refused or not delivered.

    Raises:
        NotFoundError: The file does not exist.
        SettingsError: The file cannot be read, or is no UTF-8.
        NoInputError: The file has no line that is not empty.
    """
    settings = connected_settings()
    delivered = sent = 0
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
        _opened(file) as source,
        Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher,
        Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[lines]} lines"),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task(f"publishing {kind}", total=_size_bytes(source), lines=0)
        for number, line in enumerate(_lines(source, file), 1):
            try:
                value = _value(line, adapter)
                if value is not None:
                    sent += 1
                    pending.append((number, publisher.publish(decode(value, (), kind).event)))
            except PerennialError as error:
                refused.append((number, str(error)))
            if len(pending) >= _IN_FLIGHT:
                delivered += wait_for_oldest(_IN_FLIGHT // 2)
            progress.update(task, advance=len(line), lines=number)
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
    if not sent:
        raise NoInputError(
            got="standard input without a line" if file == "-" else f"{file}, without a line",
            allowed="one JSON object per line", remedy="check the file, or the command that writes into the pipe",
        )  # fmt: skip
    if not as_json:
        console.print(f"{delivered} {kind} delivered and confirmed, {len(refused)} lines refused")
        for number, problem in refused[:_MAX_SHOWN]:
            console.print(f"  line {number}: {printable_lines(problem)}", markup=False, soft_wrap=True)
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
        fields = _ANY_JSON.validate_json(line)  # the parser of decode: a line is the same with and without --adapter
    except ValueError:
        return line
    if isinstance(fields, dict):
        fields.setdefault("adapter", adapter)
        return json.dumps(fields).encode()
    return line


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """Open the file once. Raise NotFoundError or SettingsError where it cannot be read."""
    if file == "-":
        yield io.BytesIO() if sys.stdin is None else sys.stdin.buffer  # None: the descriptor is closed
        return
    path = expand_path(file)
    try:
        opened = path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError("no such file", got=str(path), remedy=_REMEDY) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    with opened:
        yield opened


def _size_bytes(source: BinaryIO) -> int | None:
    """Return the size of a regular file, None for a pipe or a terminal."""
    try:
        found = os.fstat(source.fileno())
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _lines(source: BinaryIO, file: str) -> Iterator[bytes]:
    """Yield the lines without byte order marks; of a line that is too long only its beginning.

    Raise SettingsError where the input cannot be read or is UTF-16 or UTF-32.
    """
    first = True
    try:
        while line := source.readline(_MAX_LINE_BYTES + 1):
            if first:
                _refuse_other_encodings(line, file)
                first = False
            rest = line
            while len(rest) > _MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = source.readline(_MAX_LINE_BYTES + 1)
            yield line.removeprefix(_UTF8_BOM)
    except OSError as error:
        raise _unreadable(file, error) from error


def _refuse_other_encodings(line: bytes, file: str) -> None:
    """Raise SettingsError where the first bytes of JSON show UTF-16 or UTF-32, as RFC 4627 (section 3) tells them."""
    encoding = json.detect_encoding(line[:4])
    if not encoding.startswith("utf-8"):
        raise SettingsError(
            "the input is not UTF-8", got=f"{file}: {encoding.upper()}", allowed="JSON lines in UTF-8",
            remedy=f"convert it first: iconv -f {encoding.upper()} -t UTF-8",
        )  # fmt: skip


def _unreadable(file: str, error: OSError) -> SettingsError:
    return SettingsError("the file cannot be read", got=f"{file}: {error.strerror or error}", remedy=_REMEDY)
