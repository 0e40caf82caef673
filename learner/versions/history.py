"""Which versions a forgetting touches, and which updates it replays. Pure: manifests in, a plan out; no store, no model.

Versions are followed two ways. By state: what an example went into, directly or as a replayed row, are the version
that learned it and all that began with that one's state. By schedule: the updates that led to the newest version, in
order, the refused ones among them; a run that never saw the example would have made these, less the example, and
judged each by the gate anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import Quarantine, QuarantineEntry
from perennial.streams.events.models import Batch, ExampleAccepted, ForgetRequested
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash

OriginOffset = tuple[str, int]
"""Origin partition key and offset: one example once published."""


@dataclass(frozen=True)
class RecordedVersion:
    """A version in a schedule."""

    version: str
    manifest: Manifest


@dataclass(frozen=True)
class ExampleMatch:
    """What is noted of a stored example; no text.

    request_id: of what ends it now, None where nothing does. wanted_by: the same as if nothing were held. erased: its
    text is to be kept out for good.
    """

    place: OriginOffset
    example_id: str
    text_hash: str | None
    request_id: str | None
    wanted_by: str | None
    held: bool
    erased: bool = False


class ForgetTarget:
    """What is to be forgotten now: what the job means, and whatever else the quarantine says must not be learned.

    The rest goes in the same replay: it was accepted, so it may be in no update, and its own job then finds nothing.
    """

    def __init__(self, job: ForgetRequested, quarantine: Quarantine) -> None:
        self._job = job
        self._screen = QuarantineFilter(quarantine)
        self._without_holds = QuarantineFilter(quarantine.with_holds([]))
        self._suppressed = frozenset(quarantine.suppressed)

    def look(self, examples: Iterable[ExampleAccepted]) -> list[ExampleMatch]:
        """Note the examples of a micro-batch."""
        return [self._trace(example) for example in examples]

    def _trace(self, example: ExampleAccepted) -> ExampleMatch:
        held = self._screen.held_by(example) is not None
        erased = self._screen.erases(example)
        if self._job.matches(example):
            erased = erased or self._job.suppress
            ends: str | None = self._job.request_id
            wants = ends
        else:
            ends, wants = (_request_of(screen.entry_of(example)) for screen in (self._screen, self._without_holds))
        return ExampleMatch(origin_offset(example), example.example_id, text_hash(example), ends, wants, held, erased)

    def is_held(self, traces: Iterable[ExampleMatch]) -> bool:
        """Whether a hold stands on anything that the job itself means."""
        return any(trace.held and trace.request_id == self._job.request_id for trace in traces)

    def hashes(self, traces: Iterable[ExampleMatch]) -> frozenset[str]:
        """By what the texts are suppressed from now on."""
        return frozenset(trace.text_hash for trace in traces if trace.text_hash and trace.erased)

    def gone(self, traces: Iterable[ExampleMatch], hashes: Collection[str]) -> set[OriginOffset]:
        """Where the examples to forget were published, with those of the same text under other names."""
        return {
            trace.place
            for trace in traces
            if trace.request_id is not None
            or (
                not trace.held
                and trace.text_hash
                and (trace.text_hash in hashes or trace.text_hash in self._suppressed)
            )
        }


@dataclass(frozen=True)
class RebuildPlan:
    """What a forgetting does.

    gone: places to leave out, by micro-batch. knows: versions with the example in their weights. touched: those, and
    versions that a gate let through or not on account of it. before: the last version of the schedule that is not
    touched. steps: what is made anew, in order; empty where the newest version is not touched.
    """

    gone: Mapping[str, Collection[OriginOffset]]
    knows: frozenset[str]
    touched: frozenset[str]
    before: RecordedVersion | None
    steps: tuple[RecordedVersion, ...]


class History:
    """The manifests of an adapter by version: those on its line, and those that were made anew beside it."""

    def __init__(self, manifests: Mapping[str, Manifest], line: Collection[str], head: str) -> None:
        self.manifests = manifests
        self.line = frozenset(line)
        self.head = head

    def schedule(self) -> list[RecordedVersion]:
        """The updates that led to the newest version, and what stands between them, oldest first."""
        return list(self._back(self.head, by_schedule=True))[::-1]

    def _back(self, version: str | None, *, by_schedule: bool) -> Iterator[RecordedVersion]:
        while version is not None:
            manifest = self.manifests[version]
            yield RecordedVersion(version, manifest)
            version = manifest.schedule_parent if by_schedule else manifest.state_parent

    def from_any(self, marked: Collection[str]) -> frozenset[str]:
        """The versions whose state comes from one of these, themselves included."""
        known: dict[str, bool] = {}
        for start in self.manifests:
            trail: list[str] = []
            version: str | None = start
            while version is not None and version not in known and version not in marked:
                trail.append(version)
                version = self.manifests[version].state_parent
            found = version is not None and (version in marked or known[version])
            known |= dict.fromkeys(trail, found)
        return frozenset(marked) | {version for version, found in known.items() if found}

    def plan(self, gone: Mapping[str, Collection[OriginOffset]]) -> RebuildPlan:
        """What forgetting these examples takes. gone: places by digest of the micro-batch, none of them empty."""
        affected, knowing = set(), set()
        for version, manifest in self.manifests.items():
            places = gone.get(manifest.batch.digest) if manifest.batch else None
            if places:
                affected.add(version)
                if any((item.partition, item.offset) in places for item in manifest.learned):
                    knowing.add(version)
        schedule = self.schedule()
        first = next((i for i, step in enumerate(schedule) if step.version in affected), len(schedule))
        return RebuildPlan(
            gone=gone,
            knows=self.from_any(knowing),
            touched=self.from_any(affected),
            before=schedule[first - 1] if first else None,
            steps=tuple(schedule[first:]),
        )

    def standing(self, revoked: Collection[str]) -> set[str]:
        """Digests of all blobs that are needed still: to go on, to replay, or to roll back.

        revoked: versions that nothing goes back to.
        """
        seen: set[str] = set()
        roots = [self.head]
        roots += [v for v in self.line if v not in revoked and self.manifests[v].outcome == "promoted"]
        for root in roots:
            for step in self._back(root, by_schedule=root == self.head):
                if step.version in seen and root != self.head:
                    break
                seen.add(step.version)
        return {ref.digest for version in seen for ref in self.manifests[version].blobs()}


def tried_offsets(manifest: Manifest) -> set[OriginOffset]:
    """Where the examples that the update was trained and judged on were published, whatever the gate then said."""
    if manifest.outcome == "promoted":
        return {(item.partition, item.offset) for item in manifest.learned}
    if manifest.outcome == "refused":
        return {(item.partition, item.offset) for item in manifest.skipped if item.reason == manifest.reason}
    return set()


def without_examples(batch: Batch, places: Collection[OriginOffset]) -> Batch:
    """The micro-batch as it were if these examples had never been published."""
    gone = {example.example_id for example in batch.examples if origin_offset(example) in places}
    return Batch(
        adapter=batch.adapter,
        cut=batch.cut,
        examples=[example for example in batch.examples if origin_offset(example) not in places],
        skipped=[skip for skip in batch.skipped if skip.example_id not in gone],
    )


def batch_to_bytes(batch: Batch) -> bytes:
    """The micro-batch as curate writes it."""
    return batch.model_dump_json(by_alias=True).encode()


def _request_of(entry: QuarantineEntry | None) -> str | None:
    return entry.request_id if entry else None


def origin_offset(example: ExampleAccepted) -> OriginOffset:
    """Where the example was published."""
    return example.origin.partition_key(), example.origin.offset
