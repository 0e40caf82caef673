"""Restore a backup, and reconcile a store that is older than Kafka."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console

from perennial.storage.objects.factory import open_store
from perennial.storage.recovery.backup_list import load_header
from perennial.storage.recovery.restored_store import RestoreProgress, restore_backup
from perennial.streams.cli.backup.step_line import StepLine
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.recovery.reconcile import EventMaker, ReconcileReport, reconcile, require_stopped
from perennial.streams.settings import SettingsError


def restore_from(
    place: str,
    backup_id: str | None,
    *,
    replace: bool,
    accept_lost: bool,
    reconciles: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Copy a backup into the store and reconcile it; print what was done and return the exit code.

    Args:
        place: Address of the place of backups.
        backup_id: The backup; None for the newest.
        replace: Delete what the store holds and the backup does not.
        accept_lost: Go on although records are gone from Kafka.
        reconciles: Reconcile the store with Kafka afterwards.
        yes: Do not ask.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where the answer was no, a restored alias was refused, or requests may have to be sent again.

    Raises:
        BackupError: The store is not empty.
        ReconcileError: A role runs, or records are gone from Kafka.
        NotFoundError: There is no such backup.
    """
    settings = connected_settings()
    kept, store = open_store(place, settings.s3), open_store(settings.store.require_uri(), settings.s3)
    header = load_header(kept, backup_id)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    notes.print(
        printable_lines(
            f"backup {header.backup_id} of {header.began_at:%Y-%m-%d %H:%M:%S %Z} goes into {store.uri}: {header.objects} "
            f"objects, {header.size_bytes / 1e6:.1f} MB"
            + ("; everything else there is deleted" if replace else "")
        ),
        markup=False,
    )  # fmt: skip
    if not yes and not typer.confirm("go on?", err=True):
        return 1
    try:
        require_stopped(settings)
    except (KafkaUnavailableError, SettingsError):
        if reconciles:
            raise
        notes.print("Kafka does not answer, so nobody checks that no role runs", markup=False)
    with StepLine() as line:

        def show(progress: RestoreProgress) -> None:
            line.show(f"{progress.objects} of {progress.of} objects, {progress.written_bytes / 1e6:.1f} MB written")

        restore_backup(kept, header, store, replace=replace, on_progress=show)
    if reconciles:
        return reconcile_store(accept_lost=accept_lost, anyway=True, as_json=as_json)
    if as_json:
        print(json.dumps({"backup_id": header.backup_id, "reconciled": False}))
    else:
        notes.print("restored; no role starts until `perennial backup reconcile` has run", markup=False)
    return 0


def reconcile_store(*, accept_lost: bool, anyway: bool, as_json: bool) -> int:
    """Bring the store and Kafka together; print what was done and return the exit code.

    Args:
        accept_lost: Go on although records are gone from Kafka.
        anyway: Go on where nothing shows that the store is older.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where a restored alias was refused, or requests may have to be sent again.

    Raises:
        ReconcileError: A role runs, or records are gone from Kafka.
    """
    from perennial.learner.versions.alias_events import alias_event, alias_event_id

    settings = connected_settings()
    settings.kafka.require_bootstrap()
    store = open_store(settings.store.require_uri(), settings.s3)
    with StepLine() as line:
        report = reconcile(
            settings, store, EventMaker(alias_event, alias_event_id), accept_lost=accept_lost, anyway=anyway,
            on_progress=line.show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        Console(highlight=False).print(
            printable_lines("\n".join(_said(report, anyway=anyway))), soft_wrap=True, markup=False
        )
    return 0 if report.requests.is_whole and not report.refused else 1


def _said(report: ReconcileReport, *, anyway: bool) -> list[str]:
    if not (report.evidence or anyway):
        return ["the store is not older than what Kafka announced: nothing to do (--anyway does it all the same)"]
    said = [f"the store is older than Kafka: {each}" for each in report.evidence]
    said += [
        f"{group} reads {topic} again from " + ", ".join(f"{number}:{offset}" for number, offset in sorted(each.items()))
        for group, topics in report.offsets.items() for topic, each in topics.items() if group != "learner" and each
    ]  # fmt: skip
    said += [
        f"{count} records of {topic} are gone: publish their documents again" for topic, count in report.lost.items()
    ]
    requests = report.requests
    said.append(
        f"{len(requests.accepted)} requests since then were accepted again, {requests.known} were known, "
        f"{requests.refused} had been refused"
    )
    if requests.revocations:
        said.append(
            "not carried out, because they were about versions that this store does not have: revocations "
            + ", ".join(requests.revocations)
        )
    if requests.unapproved:
        said.append(
            "NOT carried out, because no approval of these requests over patterns counts now (nobody approved them, or keys "
            "in PERENNIAL_TRUSTED_REQUEST_KEYS have changed): " + ", ".join(requests.unapproved)
        )
    if requests.ambiguous:
        said.append(
            "NOT carried out twice, because a tenant and somebody on `retention` used the same ids: "
            + ", ".join(requests.ambiguous)
        )
    if not requests.is_whole:
        said.append(
            "what these requests had erased before the backup was restored is live again: for each that had been carried "
            "out, send it again under another id, and let it be approved (`perennial forget`, `perennial forget approve`)"
        )
    said.append(f"{report.forget_jobs} forget jobs and {report.jobs} update jobs were published again")
    said += [f"served again: {name}, generation {generation}" for name, generation in report.resumed.items()]
    said += [f"not served until what was erased since is forgotten again: {name}" for name in report.waiting]
    said += [
        f"{name} was made after the backup; it will begin above generation {generation}"
        for name, generation in report.floors.items()
    ]
    said += [f"not put back, and so not served: {key}: {why}" for key, why in report.refused.items()]
    if report.refused:
        said.append(
            "find out who can write to the place of the backups; then see docs/operations.md, An alias that was refused"
        )
    said += [
        f"a replica says that it serves generation {generation} of {name}, which no alias and no event has, so it is not "
        "believed; if the replica is yours, restart it, or it passes over every lower generation"
        for name, generation in report.claims.items()
    ]
    if report.unproven:
        said.append(f"{report.unproven} events of aliases count for nothing: no trusted key signed them")
    said.append("the roles may be started")
    return said
