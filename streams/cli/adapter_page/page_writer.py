"""Write the page of an adapter to a file."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from perennial.streams.cli.adapter_page.adapter_history import adapter_history
from perennial.streams.cli.adapter_page.page_elements import html_bytes
from perennial.streams.cli.adapter_page.page_layout import page
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.devstack.discovery import connected_settings


def write_report(adapter: str, out: Path | None, *, measure: bool, as_json: bool) -> int:
    """Write the page, print where it is, and return the exit code.

    Args:
        adapter: Name of the adapter.
        out: File to write; None for one in the current folder that is named after the adapter.
        measure: Measure the stored examples of each domain under several versions.
        as_json: Print JSON instead of text.

    Raises:
        NotFoundError: The adapter has no version.
        MissingExtraError: `measure` needs the extra `worker`, which is not installed.
        OSError: The file cannot be written.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    history = adapter_history(registry, adapter, settings.serving.alias)
    if measure:
        from perennial.streams.cli.adapter_page.measured_domains import measure_domains

        measured = measure_domains(settings, registry, adapter)
        if measured is None:
            Console(stderr=True).print("nothing to measure: the store has no text or no weights of this adapter")
        history = replace(history, measured=measured)
    path = out or Path(f"{adapter.replace('/', '-')}.html")
    body = html_bytes(page(history, datetime.now(UTC)))
    path.write_bytes(body)
    if as_json:
        print(json.dumps({
            "file": str(path.absolute()), "bytes": len(body), "versions": len(history.versions),
            "domains": history.domains, "measured": history.measured is not None,
        }))  # fmt: skip
    else:
        shown = printable(f"{path}: {len(history.versions)} versions of {adapter}, {len(body) / 1024:.0f} KB")
        Console(highlight=False).print(shown, soft_wrap=True, markup=False)
    return 0
