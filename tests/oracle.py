"""Accounts for every acknowledged event: compares the producer's own log with the manifests.

`account` reads the adapters' published versions alone. `classify` puts every record of the input topics under exactly
one term of an equation, which also counts what intake refused or dropped, what was erased and what is still waiting.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perennial.learner.versions.garbage_collection import load_history
from perennial.learner.versions.history import History
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry

Position = tuple[str, int]
"""Where a record was first published: `topic/partition` (the topic with its prefix), and the offset."""

LEARNED, SKIPPED, REFUSED, DEAD_LETTERED = "learned once", "skipped", "refused by the gate", "dead-lettered"
ERASED, ROLLED_BACK, PENDING = "expired or erased", "rolled back", "pending"
TERMS = (LEARNED, SKIPPED, REFUSED, DEAD_LETTERED, ERASED, ROLLED_BACK, PENDING)
_SKIP_REASONS = frozenset({"signal", "duplicate", "no-text"})
_REMOVAL_REASONS = frozenset({"quarantined", "expired"})


@dataclass
class Account:
    """What the manifests say about each example.

    Attributes:
        learned: How often each example was learned, by its position.
        skipped: How often each example was skipped, by its position.
        outcomes: Versions by the gate's outcome.
        reasons: Why an example was skipped, by its position.
    """

    learned: Counter[Position] = field(default_factory=Counter)
    skipped: Counter[Position] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: dict[Position, str] = field(default_factory=dict)

    @property
    def learned_twice(self) -> list[Position]:
        """The positions of examples that were learned more than once."""
        return [position for position, times in self.learned.items() if times > 1]

    def missing(self, acked: Iterable[Position]) -> list[Position]:
        """Return the acknowledged positions that no manifest accounts for."""
        return [position for position in acked if position not in self.learned and position not in self.skipped]


def _partition(key: str) -> str:
    """Return `topic/partition` of an origin's partition key, without the ids of cluster and topic."""
    _, _, topic, partition = key.rsplit("/", 3)
    return f"{topic}/{partition}"


def account(
    registry: Registry, adapters: Iterable[str], position_of: Callable[[Any], Position] | None = None
) -> Account:
    """Read the manifest of every published version of the adapters.

    Args:
        registry: The adapters' versions.
        adapters: Their names.
        position_of: Returns the position of a learned or skipped example; by default `topic/partition` and the offset.
            `exact_position` keeps records apart that had one offset after another.
    """
    total, position_of = Account(), position_of or _position
    for adapter in adapters:
        for _, version in registry.versions(adapter):
            manifest = registry.manifest(adapter, version)
            total.outcomes[manifest.outcome] += 1
            total.learned.update(position_of(item) for item in manifest.learned)
            for skipped in manifest.skipped:
                position = position_of(skipped)
                total.skipped[position] += 1
                total.reasons[position] = skipped.reason
    return total


@dataclass
class AdapterRecord:
    """What one adapter's manifests say about positions.

    Forgetting rebuilds updates, so the updates as they were first published and the current schedule may differ.

    Attributes:
        first_learned: How often each position was learned by updates as they were first published.
        learned: How often each position is learned on the current schedule.
        examples: Where each example is learned on the current schedule, by its id.
        skipped: Positions that updates on the current schedule skipped, with the reason.
        in_updates: All positions in updates as they were first published, skipped ones included.
        undone: Positions of updates that a rollback or a revocation undid. What a later rollback brought back is on the
            current schedule, too.
        served: Positions learned on the schedule of the live version.
        contaminated_blobs: Digests of states that were trained on an erased example, and of micro-batches that hold
            one, where no other version needs them: none of these blobs may be left in the store.
    """

    first_learned: Counter[Position] = field(default_factory=Counter)
    learned: Counter[Position] = field(default_factory=Counter)
    examples: dict[str, list[Position]] = field(default_factory=dict)
    skipped: dict[Position, str] = field(default_factory=dict)
    in_updates: set[Position] = field(default_factory=set)
    undone: set[Position] = field(default_factory=set)
    served: set[Position] = field(default_factory=set)
    contaminated_blobs: set[str] = field(default_factory=set)

    @property
    def removed(self) -> set[Position]:
        """The positions that an update once had and the current schedule no longer has."""
        return self.in_updates - set(self.learned) - set(self.skipped)

    def learned_twice(self, published: Mapping[Position, tuple[int, bool]] | None = None) -> list[str]:
        """Return positions that were learned more than once, and examples learned from several positions.

        Args:
            published: When each position was published, in ms since the epoch, and whether its example is marked as one
                to be learned again. Only such an example may be learned after an earlier publication of the same.
        """
        counts = self.first_learned | self.learned
        positions = [f"{position[0]}@{position[1]}" for position, times in counts.items() if times > 1]
        known = published or {}
        for name, where in self.examples.items():
            _, *later = sorted((known.get(position, (0, False))[0], position) for position in where)
            positions += [f"example {name}" for _, position in later if not known.get(position, (0, False))[1]]
        return positions


def read_adapter(registry: Registry, adapter: str, forgotten: Collection[Position] = ()) -> AdapterRecord:
    """Read an adapter's manifests. The record is empty if the adapter has no version.

    Args:
        registry: The adapters' versions.
        adapter: The adapter.
        forgotten: Positions that requests to forget match, besides those that the manifests show to be erased.
    """
    state = registry.alias(adapter)  # before the history, so that the history has the version which it names
    record, history = AdapterRecord(), load_history(registry, adapter)
    if history is None:
        return record
    for version in history.published:
        manifest = history.manifests[version]
        if manifest.kind == "update":
            record.first_learned.update(_learned(manifest))
            record.in_updates.update(_learned(manifest), (_position(item) for item in manifest.skipped))
    for step in history.schedule():
        if step.manifest.outcome == "promoted":
            record.learned.update(_learned(step.manifest))
            for item in step.manifest.learned:
                record.examples.setdefault(item.example_id, []).append(_position(item))
        record.skipped |= {_position(item): item.reason for item in step.manifest.skipped}
    for version in history.published:
        manifest = history.manifests[version]
        if manifest.kind in {"rollback", "revoke"}:
            record.undone |= _scheduled(history, manifest.head) - _scheduled(history, version)
    if state is not None and state.kind != "retired":
        live = History(history.manifests, history.published, state.version).schedule()
        record.served = {position for step in live for position in _learned(step.manifest)}
    removed = (record.removed - record.undone) | record.in_updates.intersection(forgotten)
    learned_removed = [v for v, m in history.manifests.items() if not removed.isdisjoint(_learned(m))]
    contaminated = history.descendants(learned_removed)
    needed = {ref.digest for v, m in history.manifests.items() if v not in contaminated for ref in m.blobs()}
    record.contaminated_blobs = {
        ref.digest
        for manifest in (history.manifests[v] for v in contaminated)
        for ref in manifest.blobs()
        # An update that a rollback undid keeps its micro-batch, unless an example in it was erased.
        if ref != manifest.batch or not removed.isdisjoint(_learned(manifest))
    } - needed
    return record


def _scheduled(history: History, version: str | None) -> set[Position]:
    """Return all positions in the updates that led to a version."""
    if version is None:
        return set()
    steps = History(history.manifests, history.published, version).schedule()
    return {
        position for step in steps for position in (*_learned(step.manifest), *map(_position, step.manifest.skipped))
    }


def _learned(manifest: Manifest) -> list[Position]:
    return [_position(item) for item in manifest.learned]


def _position(item: Any) -> Position:
    return _partition(item.partition), item.offset


def exact_position(item: Any) -> Position:
    """Return a position that tells topics of one name and leader epochs apart."""
    return f"{item.partition}#{item.epoch}", item.offset


@dataclass
class Classification:
    """The terms of every record of the input topics; a record without a fault has exactly one.

    Attributes:
        terms: The terms that apply to each record, by its position.
    """

    terms: dict[Position, list[str]]

    def wrong(self, positions: Iterable[Position]) -> dict[Position, list[str]]:
        """Return the positions that are lost (no term) or counted twice (several terms), with their terms."""
        return {position: found for position in positions if len(found := self.terms.get(position, [])) != 1}

    def count(self, positions: Collection[Position]) -> dict[str, int]:
        """Return how many of the positions each term has, without those that are wrong."""
        found = Counter(terms[0] for position in positions if len(terms := self.terms.get(position, [])) == 1)
        return {term: found[term] for term in TERMS}


def classify(
    contents: Mapping[Position, Hashable],
    adapters: Iterable[AdapterRecord],
    accepted: Collection[Position],
    dead_letters: Collection[Position],
    carried: Collection[Position] = (),
    uncommitted: Collection[Position] = (),
    documents: Mapping[Position, Hashable] | None = None,
) -> Classification:
    """Find the terms of every record.

    A record that intake neither wrote to `examples` nor refused was dropped by it as a duplicate. That is believed only
    if an earlier record of the same partition has equal content, and no record of the same document with other content
    lies in between; the record is then skipped.

    Args:
        contents: The content of every record of the input topics; equal values mean equal content.
        adapters: What the manifests of every adapter say.
        accepted: Records that intake wrote to `examples`.
        dead_letters: Records that intake refused.
        carried: Records that curate skipped and will list in its next micro-batch.
        uncommitted: Records that some role has not committed yet; pending if no other term applies.
        documents: Which document each record is about. A record that is not in it is about one of its own.
    """
    terms: dict[Position, list[str]] = {position: [] for position in contents}
    for record in adapters:
        for position in record.learned:
            terms.setdefault(position, []).append(LEARNED)
        for position, reason in record.skipped.items():
            term = SKIPPED if reason in _SKIP_REASONS else ERASED if reason in _REMOVAL_REASONS else REFUSED
            terms.setdefault(position, []).append(term)
        for position in record.removed:
            terms.setdefault(position, []).append(ROLLED_BACK if position in record.undone else ERASED)
    for position in dead_letters:
        terms.setdefault(position, []).append(DEAD_LETTERED)
    for position in carried:
        if SKIPPED not in terms.setdefault(position, []):  # its micro-batch may be in a manifest already
            terms[position].append(SKIPPED)
    latest: dict[tuple[str, Hashable], Hashable] = {}
    for position in sorted(contents):
        if position in dead_letters:
            continue
        content = contents[position]
        document = position[0], (documents or {}).get(position, content)
        if latest.get(document) == content and position not in accepted and not terms[position]:
            terms[position].append(SKIPPED)
        latest[document] = content
    for position in uncommitted:
        if not terms.setdefault(position, []):
            terms[position].append(PENDING)
    return Classification(terms)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.2) -> None:
    """Wait until the condition holds.

    Args:
        condition: Called every `every_s` seconds.
        timeout_s: Seconds to wait. Give plenty: on a busy machine everything takes longer, and the wait ends early.
        what: Names the condition in the error.
        every_s: Seconds between two calls of the condition.

    Raises:
        TimeoutError: The condition does not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
