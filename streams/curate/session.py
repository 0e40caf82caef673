"""What the curate agent holds in memory: the loaded adapters, and the deliveries that are not acknowledged."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.offsets import OffsetTracker

Delivery: TypeAlias = tuple[Any, int]
"""Input partition (Faust's TP) and offset."""


@dataclass
class LoadedAdapter:
    """Everything that this process holds of one adapter.

    Attributes:
        batcher: the pending examples and the decision when to cut.
        state_etag: etag of the object at `curate_state_key`; None: it does not exist.
        unconfirmed: the state was loaded, so it is not known whether its last job was published.
    """

    batcher: MicroBatcher[Delivery]
    state_etag: str | None = None
    unconfirmed: bool = False


@dataclass
class Session:
    """Everything in memory that belongs to one generation of the consumer group.

    Attributes:
        generation: the generation; None: nothing was received yet.
        adapters: the loaded adapters, least recently used first.
        waiting: names of the adapters with pending deliveries, longest waiting first.
        offsets: the unacknowledged deliveries of each input partition.
    """

    generation: int | None = None
    adapters: OrderedDict[str, LoadedAdapter] = field(default_factory=OrderedDict)
    waiting: dict[str, None] = field(default_factory=dict)
    offsets: dict[Any, OffsetTracker[Any]] = field(default_factory=dict)
