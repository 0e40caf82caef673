"""The commands `perennial backup create`, `ls`, `verify`, `prune`, `restore` and `reconcile`."""

from __future__ import annotations

from typing import Annotated

import typer

backup_app = typer.Typer(
    help="Copy the store while the roles run, restore a copy, and reconcile a restored store with Kafka.",
    no_args_is_help=True,
)
_Place = Annotated[str, typer.Argument(help="Where backups are kept: a folder, or s3://bucket/prefix.")]
_Id = Annotated[
    str | None, typer.Option("--id", help="Id of the backup, as `backup ls` prints it; the newest by default.")
]
_AcceptLost = Annotated[
    bool, typer.Option("--accept-lost", help="Go on although Kafka no longer holds everything that the store lacks.")
]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@backup_app.command("create")
def create(
    place: _Place,
    without_kafka: Annotated[
        bool,
        typer.Option(
            "--without-kafka", help="Do not record where the consumer groups stand; a restore then reads more again."
        ),
    ] = False,
    json_: _Json = False,
) -> None:
    """Copy the store to a place of backups; roles may run, and what the place has is not copied again."""
    from perennial.streams.cli.backup.backup_commands import create_at

    raise typer.Exit(create_at(place, without_kafka=without_kafka, as_json=json_))


@backup_app.command("ls")
def ls(place: _Place, json_: _Json = False) -> None:
    """List the backups of a place, newest first."""
    from perennial.streams.cli.backup.backup_commands import list_at

    raise typer.Exit(list_at(place, as_json=json_))


@backup_app.command("verify")
def verify(place: _Place, backup_id: _Id = None, json_: _Json = False) -> None:
    """Read every byte of a backup; exit code 1 where something is missing or damaged."""
    from perennial.streams.cli.backup.backup_commands import verify_at

    raise typer.Exit(verify_at(place, backup_id, as_json=json_))


@backup_app.command("prune")
def prune(
    place: _Place,
    keep_days: Annotated[
        float, typer.Option(min=0, max=36_500, help="Delete backups that are older than so many days.")
    ],
    keep: Annotated[int, typer.Option(min=0, max=10_000, help="Keep at least so many of the newest.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    json_: _Json = False,
) -> None:
    """Delete old backups, and with them the texts that were erased since they were made."""
    from perennial.streams.cli.backup.backup_commands import prune_at

    raise typer.Exit(prune_at(place, keep_days=keep_days, keep=keep, dry_run=dry_run, as_json=json_))


@backup_app.command("restore")
def restore(
    place: _Place,
    backup_id: _Id = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what the store holds and the backup does not.")
    ] = False,
    accept_lost: _AcceptLost = False,
    no_reconcile: Annotated[
        bool, typer.Option("--no-reconcile", help="Only copy; no role starts until `backup reconcile` has run.")
    ] = False,
    yes: _Yes = False,
    json_: _Json = False,
) -> None:
    """Copy a backup into the store of PERENNIAL_STORE and reconcile it with Kafka; all roles must be stopped."""
    from perennial.streams.cli.backup.restore_commands import restore_from

    raise typer.Exit(
        restore_from(
            place,
            backup_id,
            replace=replace,
            accept_lost=accept_lost,
            reconciles=not no_reconcile,
            yes=yes,
            as_json=json_,
        )
    )


@backup_app.command("reconcile")
def reconcile(
    accept_lost: _AcceptLost = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Reconcile although nothing shows that the store is older than Kafka.")
    ] = False,
    json_: _Json = False,
) -> None:
    """Bring the store and Kafka together after the store was set back; all roles must be stopped."""
    from perennial.streams.cli.backup.restore_commands import reconcile_store

    raise typer.Exit(reconcile_store(accept_lost=accept_lost, anyway=anyway, as_json=json_))
