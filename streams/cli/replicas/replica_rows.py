"""List the replicas on `adapter-acks`, and delete the record of one."""

from __future__ import annotations

import getpass
import json
import logging
import time
from datetime import UTC, datetime
from typing import Final

from rich.console import Console

from perennial.storage.errors import NotFoundError, PerennialError
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.tables import Column, print_table, short_time, short_version
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.replicas.acks import AckReader
from perennial.streams.replicas.replica_status import ReplicaStatus
from perennial.streams.replicas.replica_watch import serving_revoked
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.replicas")

_COLUMNS: Final = (
    Column("adapter"), Column("alias", 2), Column("replica"), Column("state"), Column("generation", 1, right=True),
    Column("version", shorten=short_version), Column("revoked", 1), Column("lease ends", 2, shorten=short_time),
    Column("last record", 3, shorten=short_time), Column("error", 2, wraps=True),
)  # fmt: skip


class ReplicaInServiceError(PerennialError):
    """A replica that holds a lease is not deleted without --force."""

    exit_code = 2


def list_replicas(adapter: str | None, *, only_revoked: bool, as_json: bool) -> int:
    """Print one row per replica.

    Args:
        adapter: name of the adapter; None: all.
        only_revoked: leave out replicas whose last record names no revoked version.
        as_json: print JSON instead of a table.

    Returns:
        The exit code: 0.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
        StoreError: the store does not answer.
    """
    settings = connected_settings()
    statuses = _read(settings, adapter)
    revoked = set(serving_revoked(open_registry(settings), statuses))
    shown = [status for status in statuses if status in revoked or not only_revoked]
    now_ms = time.time_ns() // 1_000_000
    if as_json:
        print(json.dumps([_as_dict(status, now_ms, is_revoked=status in revoked) for status in shown]))
    elif shown:
        print_table(_COLUMNS, [_cells(status, now_ms, is_revoked=status in revoked) for status in shown])
    else:
        Console(stderr=True, highlight=False).print("no replica has a record on adapter-acks", markup=False)
    return 0


def remove_replica(adapter: str, replica: str, *, force: bool, reason: str, as_json: bool) -> int:
    """Delete the record of a replica.

    Args:
        adapter: name of the adapter.
        replica: name of the replica.
        force: delete it also where the replica holds a lease.
        reason: logged with the deletion.
        as_json: print JSON instead of text.

    Returns:
        The exit code: 0.

    Raises:
        NotFoundError: there is no such replica.
        ReplicaInServiceError: it holds a lease, and `force` is not given.
        KafkaUnavailableError: Kafka does not answer.
    """
    settings = connected_settings()
    reader = AckReader(settings)
    try:
        statuses = reader.replicas(adapter, None)
        found = next((status for status in statuses if status.replica == replica), None)
        if found is None:
            raise NotFoundError(
                f"{adapter} has no such replica", got=replica,
                allowed=", ".join(status.replica for status in statuses[:10]) or "none has a record",
                remedy=f"see `perennial replicas ls {adapter}`",
            )  # fmt: skip
        now_ms = time.time_ns() // 1_000_000
        state = found.state(now_ms)
        if state in {"serving", "failing"} and not force:
            raise ReplicaInServiceError(
                f"{replica} holds a lease until {_time(found.lease_expires_ms)}", got=state, allowed="expired or left",
                remedy="stop it and wait until its lease has ended, or use --force: a replica that still runs is back with its "
                "next heartbeat, and no request waits for it until then",
            )  # fmt: skip
        reader.remove(adapter, replica)
    finally:
        reader.close()
    by = f"{getpass.getuser()}, on the command line"
    log.warning("deleted the record of replica %s of %s (%s) by %s: %s", replica, adapter, state, by, reason or "-")
    if as_json:
        print(json.dumps({"adapter": adapter, "replica": replica, "state": state, "version": found.version, "by": by}))
    else:
        Console(highlight=False, soft_wrap=True).print(
            f"deleted the record of {replica} ({state}, {short_version(found.version)}), by {by}", markup=False
        )
    return 0


def _read(settings: Settings, adapter: str | None) -> list[ReplicaStatus]:
    reader = AckReader(settings)
    try:
        return reader.replicas(adapter, None)
    finally:
        reader.close()


def _cells(status: ReplicaStatus, now_ms: int, *, is_revoked: bool) -> tuple[str, ...]:
    return (
        status.adapter, status.alias, status.replica, status.state(now_ms), str(status.generation),
        status.version or "-", "yes" if is_revoked else "no", _time(status.lease_expires_ms), _time(status.stored_ms),
        status.error or "-",
    )  # fmt: skip


def _as_dict(status: ReplicaStatus, now_ms: int, *, is_revoked: bool) -> dict[str, object]:
    return {
        "adapter": status.adapter, "alias": status.alias, "replica": status.replica, "state": status.state(now_ms),
        "generation": status.generation, "version": status.version, "revoked": is_revoked,
        "lease_expires": None if status.lease_expires_ms is None else _time(status.lease_expires_ms),
        "stored": _time(status.stored_ms), "error": status.error or None,
    }  # fmt: skip


def _time(at_ms: int | None) -> str:
    return "-" if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
