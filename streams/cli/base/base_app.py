"""The commands `perennial base ls`, `perennial base import` and `perennial base check`."""

from __future__ import annotations

from typing import Annotated

import typer

from perennial.streams.cli.terminal.ranges import MAX_SECONDS, number

base_app = typer.Typer(help="Show which base models can be used, convert one, or check one.", no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
_Name = Annotated[
    str, typer.Argument(help="Name of the base: shipped, smollm2, a folder, a .gguf file or an id on the hub.")
]


@base_app.command("ls")
def ls(json_: _Json = False) -> None:
    """List the bases that are at hand without a download, with their size."""
    from perennial.streams.cli.base.base_rows import list_bases

    raise typer.Exit(list_bases(as_json=json_))


@base_app.command("import")
def import_(
    name: _Name,
    again: Annotated[bool, typer.Option("--again", help="Convert also where the cache has the result.")] = False,
    json_: _Json = False,
) -> None:
    """Convert or download a base now, so that no role has to do it when it starts."""
    from perennial.streams.cli.base.base_rows import import_base

    raise typer.Exit(import_base(name, again=again, as_json=json_))


@base_app.command("check")
def check(
    name: Annotated[str | None, typer.Argument(help="Name of the base; PERENNIAL_BASE if it is left out.")] = None,
    seconds: Annotated[
        float,
        typer.Option(min=1, max=MAX_SECONDS, callback=number, help="Seconds for each of the two measurements."),
    ] = 10.0,
    json_: _Json = False,
) -> None:
    """Load a base, measure it on this machine, and show the settings that suit it."""
    from perennial.streams.cli.base.base_check import check_base

    raise typer.Exit(check_base(name, seconds=seconds, as_json=json_))
