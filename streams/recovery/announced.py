"""Read which generations of aliases were ever announced: subscribers apply only higher ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.wire_error import PURE_ERRORS
from perennial.streams.kafka.topics import admin_client, identify
from perennial.streams.recovery.kafka_positions import partition_of
from perennial.streams.recovery.log_reader import read_range
from perennial.streams.replicas.acks import AckReader
from perennial.streams.settings import Settings

_TOPIC = "adapter-updates"


@dataclass
class Announced:
    """The highest generation of each alias, and its version where an event still names it.

    Attributes:
        generations: Generations by adapter and alias.
        versions: Versions by adapter and alias; None where only replicas or a backup know the generation.
    """

    generations: dict[tuple[str, str], int] = field(default_factory=dict)
    versions: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def note(self, adapter: str, alias: str, generation: int, version: str | None = None) -> None:
        """Note that a generation was announced."""
        key = adapter, alias
        if generation > self.generations.get(key, 0):
            self.generations[key], self.versions[key] = generation, version

    def by_name(self) -> dict[str, int]:
        """Return the generations by `adapter#alias`, as backups keep them."""
        return {f"{adapter}#{alias}": generation for (adapter, alias), generation in self.generations.items()}


def read_announced(settings: Settings, on_record: Callable[[], None] = lambda: None) -> Announced:
    """Read `adapter-updates` and `adapter-acks` to their ends; memory grows with the adapters.

    Args:
        settings: Name the brokers and the topic prefix.
        on_record: Called for every record of `adapter-updates`.

    Raises:
        KafkaUnavailableError: A topic cannot be read to its end.
        TopicError: A topic is missing.
    """
    from kafka.admin import OffsetSpec

    full = settings.kafka.topic(_TOPIC)
    each = [partition_of(settings, _TOPIC, n) for n in range(identify(settings, [_TOPIC]).partitions[full])]
    with admin_client(settings) as admin:
        begins = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.EARLIEST))
        ends = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.LATEST))
    found = Announced()
    for partition in each:
        for record in read_range(settings, partition, begins[partition].offset, ends[partition].offset):
            on_record()
            with suppress(*PURE_ERRORS):  # what nobody can read, no subscriber has followed
                event = decode(record.value, record.headers, _TOPIC).event if record.value is not None else None
                if isinstance(event, AdapterUpdate):
                    found.note(event.adapter, event.alias, event.generation, event.version)
    acks = AckReader(settings)
    try:
        for status in acks.replicas(None, None):
            found.note(status.adapter, status.alias, status.generation)
    finally:
        acks.close()
    return found
