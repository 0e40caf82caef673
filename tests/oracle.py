"""Counts what became of every acknowledged event, from the producer's own log against the manifests.

`account` counts along the lines of versions alone; `reckon` puts every record of the input topics under exactly one
term of the equation, with what intake refused and dropped, what was erased, and what still waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perennial.learner.versions.history import History, load_history
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry

Place = tuple[str, int]
"""`topic/partition` (the topic with its prefix) and offset: where a record was first published."""

LEARNED, SKIPPED, REFUSED, LETTER = "learned once", "skipped", "refused by the gate", "dead-lettered"
ERASED, PENDING = "expired or erased", "pending"
TERMS = (LEARNED, SKIPPED, REFUSED, LETTER, ERASED, PENDING)
_SKIPS = frozenset({"signal", "duplicate", "no-text"})
_GONE = frozenset({"quarantined", "expired"})


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


@dataclass
class Line:
    """What one adapter's manifests say of places: the updates as they were made, and the schedule that stands now.

    The two differ where a forgetting made updates anew. served: what is learned on the schedule of the live version.
    knew: blobs that only versions with an erased example in their state need, so that none of them may be left.
    """

    made: Counter[Place] = field(default_factory=Counter)
    learned: Counter[Place] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    skipped: dict[Place, str] = field(default_factory=dict)
    listed: set[Place] = field(default_factory=set)
    served: set[Place] = field(default_factory=set)
    knew: set[str] = field(default_factory=set)

    @property
    def gone(self) -> set[Place]:
        """What an update once had, and the schedule has no more."""
        return self.listed - set(self.learned) - set(self.skipped)

    @property
    def twice(self) -> list[str]:
        """Places, and examples under several places, that were learned more than once."""
        places = [f"{place[0]}@{place[1]}" for place, times in (self.made | self.learned).items() if times > 1]
        return places + [f"example {name}" for name, times in self.examples.items() if times > 1]


def read_line(registry: Registry, adapter: str) -> Line:
    """Read an adapter's manifests; an empty line where it has none."""
    state = registry.alias(adapter)  # first: what it names is in a history that is read later
    line, history = Line(), load_history(registry, adapter)
    if history is None:
        return line
    for version in history.published:
        manifest = history.manifests[version]
        if manifest.kind == "update":
            line.made.update(_learned(manifest))
            line.listed.update(_learned(manifest), (_place(item) for item in manifest.skipped))
    for step in history.schedule():
        if step.manifest.outcome == "promoted":
            line.learned.update(_learned(step.manifest))
            line.examples.update(item.example_id for item in step.manifest.learned)
        line.skipped |= {_place(item): item.reason for item in step.manifest.skipped}
    if state is not None and state.kind != "retired":
        live = History(history.manifests, history.published, state.version).schedule()
        line.served = {place for step in live for place in _learned(step.manifest)}
    knowing = [v for v, m in history.manifests.items() if not line.gone.isdisjoint(_learned(m))]
    knows = history.descendants(knowing)
    kept = {ref.digest for v, m in history.manifests.items() if v not in knows for ref in m.blobs()}
    line.knew = {ref.digest for v in knows for ref in history.manifests[v].blobs()} - kept
    return line


def _learned(manifest: Manifest) -> list[Place]:
    return [_place(item) for item in manifest.learned]


def _place(item: Any) -> Place:
    return _partition(item.partition), item.offset


@dataclass
class Reckoning:
    """Every record of the input topics with the terms that it comes under: exactly one, where all is well."""

    terms: dict[Place, list[str]]

    def wrong(self, places: Iterable[Place]) -> dict[Place, list[str]]:
        """Those that are lost (no term) or counted twice (several)."""
        return {place: found for place in places if len(found := self.terms.get(place, [])) != 1}

    def count(self, places: Collection[Place]) -> dict[str, int]:
        """How many of these come under each term."""
        found = Counter(terms[0] for place in places if len(terms := self.terms.get(place, [])) == 1)
        return {term: found[term] for term in TERMS}


def reckon(
    values: Mapping[Place, Hashable],
    lines: Iterable[Line],
    accepted: Collection[Place],
    letters: Collection[Place],
    carried: Collection[Place] = (),
    waiting: Collection[Place] = (),
) -> Reckoning:
    """Put every record under its terms. values: what the input topics hold, equal where content is.

    accepted: what intake passed on. letters: what it refused. carried: skipped, and kept by curate for its next cut.
    waiting: what some role has not committed yet; it is pending only where it comes under no other term.
    A record that intake neither passed on nor refused was dropped by it as a repeat: that is believed only where the
    same content lies before it on its partition, and then it is skipped.
    """
    terms: dict[Place, list[str]] = {place: [] for place in values}
    for line in lines:
        for place in line.learned:
            terms.setdefault(place, []).append(LEARNED)
        for place, reason in line.skipped.items():
            term = SKIPPED if reason in _SKIPS else ERASED if reason in _GONE else REFUSED
            terms.setdefault(place, []).append(term)
        for place in line.gone:
            terms.setdefault(place, []).append(ERASED)
    for place in letters:
        terms.setdefault(place, []).append(LETTER)
    for place in carried:
        if SKIPPED not in terms.setdefault(place, []):  # its cut may be in a manifest already
            terms[place].append(SKIPPED)
    seen: set[tuple[str, Hashable]] = set()
    for place in sorted(values):
        same = place[0], values[place]
        if same in seen and place not in accepted and not terms[place]:
            terms[place].append(SKIPPED)
        seen.add(same)
    for place in waiting:
        if not terms.setdefault(place, []):
            terms[place].append(PENDING)
    return Reckoning(terms)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.2) -> None:
    """Wait for a condition. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
