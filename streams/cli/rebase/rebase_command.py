"""The arguments of `perennial adapters rebase`."""

from __future__ import annotations

from typing import Annotated

import typer

from perennial.streams.cli.terminal.ranges import number, seconds_option


def rebase(
    adapter: Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")],
    min_learned: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=number, help="Share of what it has learned that must pass the gate on the new base."
        ),
    ] = 0.9,
    reason: Annotated[
        str, typer.Option(help="Text that is recorded with the new version.")
    ] = "requested on the command line",
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until the version is live; 0 does not wait."),
    ] = 600,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Learn an adapter anew on the base of the running learner; the old version is served until the new one passes."""
    from perennial.streams.cli.rebase.rebase_adapter import rebase_adapter

    raise typer.Exit(
        rebase_adapter(adapter, min_learned_share=min_learned, reason=reason, wait_s=wait_s, as_json=json_)
    )
