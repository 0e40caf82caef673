"""Print an adapter's high-water marks, and lower one beyond the end of its log."""

from __future__ import annotations

import getpass
import json
import logging
from datetime import UTC, datetime

import typer
from rich.console import Console

from perennial.storage.errors import ConflictError, NotFoundError, PerennialError
from perennial.storage.registry.mark_repairs import MarkRepair, add_mark_repair, mark_repairs_key
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.waiting_jobs import curate_state_key
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.marks.mark_rows import MarkRow, load_batcher, manifest_marks, mark_rows
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.high_water_marks import Position
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.settings import Settings

log = logging.getLogger("perennial.marks")

_ATTEMPTS = 64
_COLUMNS = (
    Column("origin partition"), Column("curate", right=True), Column("manifest", 1, right=True),
    Column("log", 2), Column("committed", 3, right=True), Column("verdict", wraps=True),
)  # fmt: skip


class MarksError(PerennialError):
    """A mark cannot be repaired as asked."""

    exit_code = 2


def show_marks(adapter: str, *, as_json: bool) -> int:
    """Print one row per origin partition.

    Args:
        adapter: name of the adapter.
        as_json: print JSON instead of a table.

    Returns:
        The exit code: 1 where a mark is wrong.

    Raises:
        NotFoundError: the adapter has no marks.
        KafkaUnavailableError: Kafka does not answer.
    """
    settings = connected_settings()
    with _check(settings) as check:
        rows = mark_rows(settings, open_registry(settings), adapter, check)
    if not rows:
        raise NotFoundError(
            f"{adapter} has no high-water marks", got=adapter, allowed="an adapter that learned or is learning",
            remedy="see `perennial adapters ls`",
        )  # fmt: skip
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
    else:
        print_table(_COLUMNS, [_cells(row) for row in rows])
        if any(row.problem for row in rows):
            Console(stderr=True, soft_wrap=True).print(
                f"repair a wrong mark with `perennial marks repair {adapter} --partition … --to-log-end`", markup=False
            )
    return 1 if any(row.problem for row in rows) else 0


def repair_marks(
    adapter: str, partition: str, *, to: int | None, to_log_end: bool, reason: str, yes: bool, as_json: bool
) -> int:
    """Lower the mark of one origin partition.

    Args:
        adapter: name of the adapter.
        partition: origin partition key.
        to: the last offset that counts as covered; -1 for none.
        to_log_end: count all that the log holds as covered.
        reason: recorded with the repair.
        yes: do not ask.
        as_json: print JSON instead of text.

    Returns:
        The exit code: 1 where the answer was no.

    Raises:
        NotFoundError: the adapter has no mark of the partition.
        MarksError: the options name no lower mark.
        ConflictError: curate changed its state at every attempt.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    with _check(settings) as check:
        rows = mark_rows(settings, registry, adapter, check)
    row = next((row for row in rows if row.partition == partition), None)
    if row is None:
        raise NotFoundError(
            f"{adapter} has no mark of this origin partition", got=partition,
            allowed=", ".join(row.partition for row in rows) or "none", remedy=f"see `perennial marks show {adapter}`",
        )  # fmt: skip
    wanted = _wanted(row, to, to_log_end=to_log_end)
    what = f"{partition}: curate {_text(row.curate)}, manifest {_text(row.manifest)} → {_text(wanted)}"
    if not yes and not typer.confirm(f"Repair the mark of {adapter}, {what}?"):
        return 1
    by = f"{getpass.getuser()}, on the command line"
    changed = repair_mark(settings, registry, adapter, partition, wanted, by, reason or row.problem or "")
    log.warning("repaired a mark of %s, %s, by %s: %s", adapter, what, by, reason or row.problem)
    if as_json:
        print(json.dumps({"adapter": adapter, "partition": partition, "changed": changed}))
        return 0
    Console(highlight=False, soft_wrap=True).print(
        f"{what}\nrecorded in {mark_repairs_key(adapter)}. Documents that were refused meanwhile (`perennial dlq ls "
        f"--adapter {adapter}`) can be published again as they are.", markup=False,
    )  # fmt: skip
    return 0


def repair_mark(
    settings: Settings, registry: Registry, adapter: str, partition: str, wanted: Position | None, by: str, reason: str
) -> list[str]:
    """Lower an adapter's mark of one origin partition, where it is above `wanted`.

    The learner's mark comes first: until curate's is lowered too, curate sends nothing that the learner would take
    twice.

    Args:
        settings: bounds of a micro-batch, which reading curate's state needs.
        registry: the registry.
        adapter: the adapter.
        partition: origin partition key.
        wanted: leader epoch and offset of the mark; None: nothing of the partition is covered.
        by: who repairs it.
        reason: why.

    Returns:
        Which of `manifest` and `curate` was changed.

    Raises:
        ConflictError: curate changed its state at every attempt.
        StoreError: the store failed.
    """
    changed = []
    for _ in range(_ATTEMPTS):
        wrong = manifest_marks(registry, adapter).at(partition)
        if wrong is None or (wanted is not None and wrong <= wanted):
            break
        epoch, offset = wanted or (0, None)
        add_mark_repair(
            registry.store, adapter,
            MarkRepair(
                partition=partition, wrong_epoch=wrong[0], wrong_offset=wrong[1], epoch=epoch, offset=offset,
                at=datetime.now(UTC), by=by[:256], reason=reason[:1024],
            ),
        )  # fmt: skip
        changed = ["manifest"]
    for _ in range(_ATTEMPTS):
        found = load_batcher(settings, registry.store, adapter)
        mark = found[0].history.high_water_marks.at(partition) if found else None
        if found is None or mark is None or (wanted is not None and mark <= wanted):
            return changed
        batcher, etag = found
        try:
            registry.store.compare_and_swap(curate_state_key(adapter), batcher.repaired(partition, wanted).state, etag)
        except ConflictError:
            continue  # curate stored a cut meanwhile
        return [*changed, "curate"]
    raise ConflictError(
        f"curate changed the state of {adapter} at each of {_ATTEMPTS} attempts", remedy="run the same command again"
    )


def _wanted(row: MarkRow, to: int | None, *, to_log_end: bool) -> Position | None:
    """Return the position that the options name. Raise MarksError where they name none, or a higher one."""
    if (to is None) != to_log_end:
        raise MarksError(
            "one option must name the offset", got="both or neither", allowed="either --to or --to-log-end"
        )
    highest = max(position for position in (row.curate, row.manifest) if position is not None)
    epoch = min(highest[0], row.log.epoch if row.log and row.log.epoch is not None else highest[0])
    if to_log_end:
        if row.log is None:
            raise MarksError(
                "the log's end is not known: the topic was deleted, or is in another cluster", got=row.partition, allowed="--to",
                remedy="give --to -1 to count nothing of this origin partition as covered",
            )  # fmt: skip
        to = row.log.end - 1
    wanted = None if to is None or to < 0 else (epoch, to)
    if wanted is not None and wanted >= highest:
        raise MarksError(
            "a repair only lowers a mark", got=_text(wanted), allowed=f"less than {_text(highest)}",
            remedy="what a higher mark covered would never be learned",
        )  # fmt: skip
    return wanted


def _check(settings: Settings) -> OriginCheck:
    from perennial.storage.objects.factory import open_store

    return OriginCheck.of(settings, open_store(settings.store.require_uri(), settings.s3))


def _cells(row: MarkRow) -> tuple[str, ...]:
    shown_log = "-" if row.log is None else f"{row.log.start} to {row.log.end}, epoch {row.log.epoch}"
    committed = "-" if row.committed is None else str(row.committed)
    return (row.partition, _text(row.curate), _text(row.manifest), shown_log, committed, _verdict(row))


def _verdict(row: MarkRow) -> str:
    if row.problem is not None:
        return row.problem
    return "of another cluster, or of a topic that was deleted: without effect" if row.compares_with_nothing else "ok"


def _text(position: Position | None) -> str:
    return "none" if position is None else f"{position[1]} (epoch {position[0]})"
