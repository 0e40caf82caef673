"""Counts what became of every acknowledged event, from the producer's own log against the manifests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from storage.registry import Registry


@dataclass
class Account:
    """How often each example (by origin) was learned, what was skipped, and why."""

    learned: Counter[tuple[str, int]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, int]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def learned_twice(self) -> list[tuple[str, int]]:
        return [origin for origin, times in self.learned.items() if times > 1]

    def covers(self, acked: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """The acknowledged origins that no manifest accounts for."""
        return [origin for origin in acked if origin not in self.learned and origin not in self.skipped]


def _partition(key: str) -> str:
    """`topic/partition` of an origin partition key, without the cluster's and topic's ids."""
    _, _, topic, partition = key.rsplit("/", 3)
    return f"{topic}/{partition}"


def account(registry: Registry, adapters: Iterable[str]) -> Account:
    """Read every manifest of the adapters' lines."""
    total = Account()
    for adapter in adapters:
        for _, version in registry.versions(adapter):
            manifest = registry.manifest(adapter, version)
            total.outcomes[manifest.outcome] += 1
            for example in manifest.learned:
                total.learned[_partition(example.partition), example.offset] += 1
            for skipped in manifest.skipped:
                origin = _partition(skipped.partition), skipped.offset
                total.skipped[origin] += 1
                total.reasons[origin] = skipped.reason
    return total


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.2) -> None:
    """Wait for a condition. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
