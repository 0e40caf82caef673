"""`perennial adapters system-prompt`: show, set or clear the system prompt of an adapter."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

from rich.console import Console

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.prompts.system_prompts import (
    MAX_SYSTEM_PROMPT_BYTES,
    SystemPrompt,
    load_system_prompt,
    set_system_prompt,
)
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.paths import expand_path
from perennial.streams.settings import SettingsError


def show_system_prompt(adapter: str, *, as_json: bool) -> int:
    """Print the adapter's system prompt; return the exit code.

    Raises:
        NotFoundError: The adapter has none.
    """
    settings = connected_settings()
    found = load_system_prompt(open_store(settings.store.require_uri(), settings.s3), adapter)
    if as_json:
        print(json.dumps(_facts(found)))
        return 0
    if found.text is None:
        raise NotFoundError(
            "this adapter has no system prompt", got=adapter, allowed="an adapter with a system prompt",
            remedy="set one: `perennial adapters system-prompt ADAPTER --set FILE`",
        )  # fmt: skip
    print(printable_lines(found.text))
    return 0


def change_system_prompt(adapter: str, file: str | None, *, as_json: bool) -> int:
    """Set the adapter's system prompt, or clear it; return the exit code.

    Args:
        adapter: Name of the adapter; it need not have a version yet.
        file: File with the prompt, `-` for standard input; None clears the prompt. White space around it is dropped.
        as_json: Print JSON instead of text.

    Raises:
        NotFoundError: The file does not exist.
        SettingsError: The file cannot be read, or is no UTF-8.
        StoreError: The prompt is blank or too large.
    """
    settings = connected_settings()
    store = open_store(settings.store.require_uri(), settings.s3)
    text = None if file is None else _read(file).strip()
    before = load_system_prompt(store, adapter)
    found = set_system_prompt(store, adapter, text, datetime.now(UTC))
    if as_json:
        print(json.dumps({**_facts(found), "changed": found != before}))
        return 0
    if found == before:
        said = "nothing changes: it is the prompt already" if text is not None else "nothing changes: it has no prompt"
    elif text is None:
        said = "cleared; micro-batches from now on have no system prompt"
    else:
        said = f"set ({len(text.encode())} bytes, {found.digest}); micro-batches from now on train with it"
    Console(stderr=True, highlight=False).print(f"system prompt of {adapter}: {said}", markup=False, soft_wrap=True)
    return 0


def _read(file: str) -> str:
    limit = MAX_SYSTEM_PROMPT_BYTES + 1024
    try:
        if file == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read(limit)
        else:
            with expand_path(file).open("rb") as source:
                data = source.read(limit)
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except FileNotFoundError as error:
        raise NotFoundError("no such file", got=file, remedy="name a text file, or - for standard input") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            "the file cannot be read", got=f"{file}: {error}", allowed="text in UTF-8", remedy="name a text file"
        ) from error


def _facts(found: SystemPrompt) -> dict[str, object]:
    return {
        "adapter": found.adapter, "text": found.text, "digest": found.digest, "revision": found.revision,
        "set_at": None if found.set_at is None else found.set_at.isoformat(),
    }  # fmt: skip
