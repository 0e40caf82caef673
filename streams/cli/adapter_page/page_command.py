"""The command `perennial adapters report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    adapter: Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: the adapter's name with .html, in this folder.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Load the base and measure the stored examples of each domain under several versions; minutes on a CPU.",
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write the history of an adapter as one HTML page: losses, general drift, the gate's decisions, its examples."""
    from perennial.streams.cli.adapter_page.page_writer import write_report

    raise typer.Exit(write_report(adapter, out, measure=measure, as_json=json_))
