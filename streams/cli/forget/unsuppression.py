"""`perennial forget unsuppress`: let an adapter learn texts again that were erased; audited."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from perennial.storage.registry.quarantine import unsuppress
from perennial.storage.registry.suppressed_texts import TEXT_HASH_CHARS
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.forget.selection import check_pattern, count_of
from perennial.streams.cli.terminal.user_name import user_name
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.paths import expand_path
from perennial.streams.settings import SettingsError

_HASH = re.compile(rf"[0-9a-f]{{{TEXT_HASH_CHARS}}}")
_NOT_FOUND = 4


def unsuppress_texts(
    adapter: str,
    text_files: Sequence[Path],
    hashes: Sequence[str],
    *,
    requested_by: str,
    reason: str,
    as_json: bool,
) -> int:
    """Take texts off an adapter's list of suppressed texts.

    Args:
        adapter: The adapter.
        text_files: Files that each hold one erased text, in UTF-8.
        hashes: Hashes of erased texts.
        requested_by: Who asks for it; empty: the user of this process.
        reason: Why.
        as_json: Print the audit record as JSON.

    Returns:
        The exit code: 0, or 4 where none of the texts is suppressed.

    Raises:
        SettingsError: The adapter's name is none, no text is named, a file is not readable, or a hash is none.
    """
    check_pattern(adapter)
    if not (text_files or hashes):
        raise _unusable("the selection", "nothing", "at least one of --text-file and --hash")
    for text_hash in hashes:
        if not _HASH.fullmatch(text_hash):
            raise _unusable("--hash", text_hash, f"{TEXT_HASH_CHARS} hex digits, as an audit record names them")
    texts = [_text_of(path) for path in text_files]
    store = open_registry(connected_settings()).store
    record = unsuppress(
        store, adapter, hashes=hashes, texts=texts, requested_by=requested_by or f"{user_name()}, command line", reason=reason,
        now=datetime.now(UTC),
    )  # fmt: skip
    if as_json:
        print(json.dumps(json.loads(record.to_bytes())))  # ASCII: a reason may hold control characters
    elif record.hashes:
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{count_of(len(record.hashes), 'text')} may be learned again by {adapter}; recorded under audit/{adapter}"
        )
        console.print("publish it again: nothing that was kept out comes back by itself")
    if not record.hashes:
        Console(stderr=True).print(
            "nothing matched: no such text is suppressed; white space around it and line ends do not matter, case does",
            soft_wrap=True,
        )
    return 0 if record.hashes else _NOT_FOUND


def _text_of(path: Path) -> str:
    try:
        return expand_path(path).read_text("utf-8-sig")  # an editor's byte order mark is no part of the text
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable("--text-file", f"{path}: {error}", "a readable file in UTF-8") from error


def _unusable(what: str, got: str, allowed: str) -> SettingsError:
    return SettingsError(
        f"{what} is not usable", got=got, allowed=allowed,
        remedy="for example: perennial forget unsuppress acme/support --text-file text.txt --reason REASON",
    )  # fmt: skip
