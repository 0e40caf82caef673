"""Collect an adapter's high-water marks, and judge each against the log of its origin partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.mark_repairs import load_mark_repairs, repaired_marks
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.waiting_jobs import MAX_CURATE_STATE_BYTES, curate_state_key
from perennial.streams.events.high_water_marks import NO_MARKS, HighWaterMarks, Position
from perennial.streams.kafka.group_offsets import group_offsets
from perennial.streams.kafka.origin_check import LogEnd, OriginCheck
from perennial.streams.kafka.topics import admin_client
from perennial.streams.settings import Settings

if TYPE_CHECKING:
    from perennial.streams.curate.batcher import MicroBatcher


@dataclass(frozen=True)
class MarkRow:
    """The marks of one origin partition.

    Attributes:
        partition: origin partition key.
        curate: leader epoch and offset of the mark in curate's state; None where it has none.
        manifest: the same in the newest version, repairs included.
        log: start, end and leader epoch of the log; None where the topic is not there as it was.
        committed: offset that intake committed in the partition; None where it committed none.
        problem: why one of the marks is none that the log can have given; None where both may be right.
        compares_with_nothing: True for another cluster, or a topic that was deleted since: the marks have no effect.
    """

    partition: str
    curate: Position | None
    manifest: Position | None
    log: LogEnd | None
    committed: int | None
    problem: str | None
    compares_with_nothing: bool

    def as_dict(self) -> dict[str, object]:
        """Return the row for JSON."""
        cluster_id, topic_id, topic, number = _parts(self.partition)
        return {
            "partition": self.partition, "cluster_id": cluster_id, "topic_id": topic_id, "topic": topic,
            "number": number, "curate": _position(self.curate), "manifest": _position(self.manifest),
            "log": None if self.log is None else self.log._asdict(), "committed": self.committed,
            "ok": self.problem is None, "problem": self.problem, "compares_with_nothing": self.compares_with_nothing,
        }  # fmt: skip


def load_batcher(settings: Settings, store: ObjectStore, adapter: str) -> tuple[MicroBatcher[int], str] | None:
    """Return curate's state of an adapter, and its etag; None where there is none.

    Raises:
        IntegrityError: the state is not readable.
    """
    from perennial.streams.curate.batcher import MicroBatcher
    from perennial.streams.curate.cutting.policy import CutPolicy

    try:
        stored = store.get(curate_state_key(adapter), MAX_CURATE_STATE_BYTES)
    except NotFoundError:
        return None
    return MicroBatcher.restore(adapter, CutPolicy.of(settings), stored.data), stored.etag


def manifest_marks(registry: Registry, adapter: str) -> HighWaterMarks:
    """Return the marks of an adapter's newest version, as a learner sees them: with the repairs."""
    head = registry.head(adapter)
    if head is None:
        return NO_MARKS
    repairs = load_mark_repairs(registry.store, adapter)
    return HighWaterMarks(*repaired_marks(head.manifest.marks, head.manifest.epochs, repairs))


def mark_rows(settings: Settings, registry: Registry, adapter: str, check: OriginCheck) -> list[MarkRow]:
    """Return one row per origin partition that the adapter has a mark of.

    Raises:
        KafkaUnavailableError: Kafka does not answer.
        StoreError: the store does not answer.
    """
    found = load_batcher(settings, registry.store, adapter)
    curate = found[0].history.high_water_marks if found else NO_MARKS
    manifest = manifest_marks(registry, adapter)
    committed = _committed(settings)
    rows = []
    for partition in sorted({key for key, _ in (*curate, *manifest)}):
        positions = [curate.at(partition), manifest.at(partition)]
        problems = [check.mark_problem(partition, position) for position in positions if position is not None]
        _, topic_id, topic, number = _parts(partition)
        is_present = not check.is_foreign(partition) and topic_id == check.present_topic_id(topic)
        rows.append(
            MarkRow(
                partition, positions[0], positions[1], check.log_end(topic, number) if is_present else None,
                committed.get((topic, number)) if is_present else None,
                next((problem for problem in problems if problem), None),
                not is_present,
            )
        )  # fmt: skip
    return rows


def _committed(settings: Settings) -> dict[tuple[str, int], int]:
    with admin_client(settings) as admin:
        offsets = group_offsets(admin, settings.kafka.topic("intake"))
    return {(tp.topic, tp.partition): offset for tp, offset in offsets.items()}


def _parts(partition: str) -> tuple[str, str, str, int]:
    """Return cluster id, topic id, topic and number of an origin partition; empty and -1 where the key is none."""
    try:
        cluster_id, topic_id, topic, number = partition.rsplit("/", 3)
        return cluster_id, topic_id, topic, int(number)
    except ValueError:
        return "", "", "", -1


def _position(position: Position | None) -> dict[str, int] | None:
    return None if position is None else {"epoch": position[0], "offset": position[1]}
