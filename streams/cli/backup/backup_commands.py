"""Make, list, check and delete backups."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from rich.console import Console

from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.backup_copy import CopyProgress, create_backup
from perennial.storage.recovery.backup_list import BackupHeader, list_backup_ids, load_header
from perennial.storage.recovery.backup_upkeep import problems_of, prune_backups
from perennial.streams.cli.backup.step_line import StepLine
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.devstack.discovery import connected_settings

_COLUMNS = (
    Column("backup"), Column("made", 1), Column("objects", 2, right=True), Column("MB", right=True),
    Column("MB copied", 3, right=True), Column("Kafka", 4),
)  # fmt: skip


def create_at(place: str, *, without_kafka: bool, as_json: bool) -> int:
    """Make a backup and print it; return the exit code.

    Args:
        place: Address of the place of backups.
        without_kafka: Record no positions.
        as_json: Print JSON instead of text.

    Raises:
        BackupError: The place is not usable, or blobs were deleted during every attempt.
        InstallationError: The settings lack a tenant that has topics.
        KafkaUnavailableError: Kafka does not answer.
    """
    settings = connected_settings()
    store, kept = open_store(settings.store.require_uri(), settings.s3), _open_place(place)
    began_s = time.monotonic()
    with StepLine() as line:
        began_at = datetime.now(UTC)
        positions = None
        if not without_kafka:
            from perennial.streams.kafka.installation import require_recorded_tenants
            from perennial.streams.recovery.announced import read_announced
            from perennial.streams.recovery.kafka_positions import read_positions

            settings.kafka.require_bootstrap()
            require_recorded_tenants(settings, store)
            line.show("reading where the consumer groups stand")
            positions = read_positions(settings, read_announced(settings).by_name()).model_dump(mode="json")

        def show(progress: CopyProgress) -> None:
            line.show(
                f"{progress.phase or 'begin'}: {progress.objects} objects, {progress.copied_bytes / 1e6:.1f} MB copied"
            )

        header = create_backup(store, kept, lambda: datetime.now(UTC), positions, show, began_at)
    if as_json:
        print(json.dumps(_facts(header)))
        return 0
    Console(highlight=False).print(
        printable_lines(
            f"backup {header.backup_id}: {header.objects} objects, {header.size_bytes / 1e6:.1f} MB, of which "
            f"{header.copied_bytes / 1e6:.1f} MB were copied in {time.monotonic() - began_s:.1f} s"
        ),
        soft_wrap=True, markup=False,
    )  # fmt: skip
    return 0


def list_at(place: str, *, as_json: bool) -> int:
    """Print the backups of a place, newest first; return the exit code."""
    kept = _open_place(place)
    headers = [load_header(kept, backup_id) for backup_id in reversed(list_backup_ids(kept))]
    if as_json:
        print(json.dumps([_facts(header) for header in headers]))
        return 0
    print_table(_COLUMNS, [
        (
            header.backup_id, f"{header.began_at:%Y-%m-%d %H:%M:%S}", str(header.objects), f"{header.size_bytes / 1e6:.1f}",
            f"{header.copied_bytes / 1e6:.1f}", "positions recorded" if header.positions else "no positions",
        )
        for header in headers
    ])  # fmt: skip
    return 0


def verify_at(place: str, backup_id: str | None, *, as_json: bool) -> int:
    """Read every byte of a backup and print what is wrong; return the exit code, 1 where something is.

    Args:
        place: Address of the place of backups.
        backup_id: The backup; None for the newest.
        as_json: Print JSON instead of text.

    Raises:
        NotFoundError: There is no such backup.
    """
    kept = _open_place(place)
    header = load_header(kept, backup_id)
    done = [0, 0]
    with StepLine() as line:

        def count(size_bytes: int) -> None:
            done[0] += 1
            done[1] += size_bytes
            line.show(f"{done[0]} of {header.objects} objects, {done[1] / 1e6:.1f} of {header.size_bytes / 1e6:.1f} MB")

        problems = list(problems_of(kept, header, count))
    if as_json:
        print(json.dumps({"backup_id": header.backup_id, "objects": done[0], "problems": problems}))
    else:
        said = problems or [f"backup {header.backup_id}: all of {done[0]} objects are there, byte for byte"]
        Console(highlight=False).print(printable_lines("\n".join(said)), soft_wrap=True, markup=False)
    return 1 if problems else 0


def prune_at(place: str, *, keep_days: float, keep: int, dry_run: bool, as_json: bool) -> int:
    """Delete old backups and print which; return the exit code.

    Args:
        place: Address of the place of backups.
        keep_days: Age from which a backup is deleted.
        keep: Backups to keep, however old they are.
        dry_run: Only print.
        as_json: Print JSON instead of text.
    """
    with StepLine() as line:
        line.show("looking for blobs that no kept backup holds")
        made_before = datetime.now(UTC) - timedelta(days=keep_days)
        report = prune_backups(_open_place(place), made_before, keep=keep, dry_run=dry_run)
    if as_json:
        print(json.dumps({**asdict(report), "dry_run": dry_run}))
        return 0
    verb = "would be deleted" if dry_run else "were deleted"
    Console(highlight=False).print(
        f"{len(report.deleted)} backups and {report.blobs} objects that no other backup holds {verb}; "
        f"{len(report.kept)} backups are kept", soft_wrap=True, markup=False,
    )  # fmt: skip
    return 0


def _open_place(place: str) -> ObjectStore:
    return open_store(place, connected_settings().s3)


def _facts(header: BackupHeader) -> dict[str, object]:
    return header.model_dump(mode="json", exclude={"pages"})
