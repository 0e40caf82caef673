"""The commands `perennial replicas ls` and `perennial replicas rm`."""

from __future__ import annotations

from typing import Annotated

import typer

replicas_app = typer.Typer(
    help="Show which subscribers serve which version, or delete the record of one that ended.", no_args_is_help=True
)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@replicas_app.command("ls")
def ls(
    adapter: Annotated[str | None, typer.Argument(help="Name of the adapter; all if it is left out.")] = None,
    revoked: Annotated[
        bool, typer.Option("--revoked", help="Only replicas whose last record names a revoked version.")
    ] = False,
    json_: _Json = False,
) -> None:
    """List replicas with their version, state and lease."""
    from perennial.streams.cli.replicas.replica_rows import list_replicas

    raise typer.Exit(list_replicas(adapter, only_revoked=revoked, as_json=json_))


@replicas_app.command("rm")
def rm(
    adapter: Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")],
    replica: Annotated[str, typer.Argument(help="Name of the replica, as `replicas ls` prints it.")],
    force: Annotated[bool, typer.Option("--force", help="Also where the replica holds a lease.")] = False,
    reason: Annotated[str, typer.Option(help="Text that is logged with the deletion.")] = "",
    json_: _Json = False,
) -> None:
    """Delete the record of a replica, so that no request waits for it or names it any more."""
    from perennial.streams.cli.replicas.replica_rows import remove_replica

    raise typer.Exit(remove_replica(adapter, replica, force=force, reason=reason, as_json=json_))
