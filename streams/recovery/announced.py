"""Read which generations of aliases were ever announced: subscribers apply only higher ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from perennial.storage.registry.records import MAX_GENERATION
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.wire_error import PURE_ERRORS, WireError
from perennial.streams.kafka.event_signatures import check_event
from perennial.streams.kafka.topics import admin_client, identify
from perennial.streams.recovery.kafka_positions import partition_of
from perennial.streams.recovery.log_reader import read_range
from perennial.streams.replicas.acks import AckReader
from perennial.streams.settings import Settings

_TOPIC = "adapter-updates"


@dataclass
class Announced:
    """The highest generation of each alias, and its version where an event still names it.

    A generation above MAX_GENERATION is not noted: no installation reaches it, and a reconciliation would go on above it.

    Attributes:
        generations: Generations by adapter and alias.
        versions: Versions by adapter and alias; None where only a backup knows the generation.
        acknowledged: The highest generation that a replica says it serves, by adapter and alias. It proves nothing: every
            subscriber may write it, and a generation is in an alias before a replica can serve it.
        unproven: Events that no trusted key signed, where trusted keys are set; they count for nothing.
    """

    generations: dict[tuple[str, str], int] = field(default_factory=dict)
    versions: dict[tuple[str, str], str | None] = field(default_factory=dict)
    acknowledged: dict[tuple[str, str], int] = field(default_factory=dict)
    unproven: int = 0

    def note(self, adapter: str, alias: str, generation: int, version: str | None = None) -> None:
        """Note that a generation was announced."""
        key = adapter, alias
        if self.generations.get(key, 0) < generation <= MAX_GENERATION:
            self.generations[key], self.versions[key] = generation, version

    def note_event(self, record: Any, trust: Trust) -> None:
        """Note what a record of `adapter-updates` announces, unless nobody can read it or no trusted key signed it.

        Args:
            record: The Kafka record.
            trust: The trusted keys.

        Raises:
            KeyFileError: The trusted keys cannot be read.
        """
        if record.value is None:
            return
        try:
            event = decode(record.value, record.headers, _TOPIC).event
            check_event(event, record.value, trust)
        except SignatureError:
            self.unproven += 1
            return
        except (WireError, *PURE_ERRORS):  # what nobody can read, no subscriber has followed
            return
        if isinstance(event, AdapterUpdate):
            self.note(event.adapter, event.alias, event.generation, event.version)

    def note_acknowledged(self, adapter: str, alias: str, generation: int) -> None:
        """Note that a replica says that it serves a generation."""
        key = adapter, alias
        if self.acknowledged.get(key, 0) < generation <= MAX_GENERATION:
            self.acknowledged[key] = generation

    def by_name(self) -> dict[str, int]:
        """Return the generations by `adapter#alias`, as backups keep them."""
        return {f"{adapter}#{alias}": generation for (adapter, alias), generation in self.generations.items()}


def read_announced(settings: Settings, on_record: Callable[[], None] = lambda: None) -> Announced:
    """Read `adapter-updates` and `adapter-acks` to their ends; memory grows with the adapters.

    Args:
        settings: Name the brokers, the topic prefix and the trusted keys.
        on_record: Called for every record of `adapter-updates`.

    Raises:
        KafkaUnavailableError: A topic cannot be read to its end.
        TopicError: A topic is missing.
        KeyFileError: The trusted keys cannot be read.
    """
    from kafka.admin import OffsetSpec

    trust = settings.signing.readers_trust()
    full = settings.kafka.topic(_TOPIC)
    each = [partition_of(settings, _TOPIC, n) for n in range(identify(settings, [_TOPIC]).partitions[full])]
    with admin_client(settings) as admin:
        begins = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.EARLIEST))
        ends = admin.list_partition_offsets(dict.fromkeys(each, OffsetSpec.LATEST))
    found = Announced()
    for partition in each:
        for record in read_range(settings, partition, begins[partition].offset, ends[partition].offset):
            on_record()
            found.note_event(record, trust)
    acks = AckReader(settings)
    try:
        for status in acks.replicas(None, None):
            found.note_acknowledged(status.adapter, status.alias, status.generation)
    finally:
        acks.close()
    return found
