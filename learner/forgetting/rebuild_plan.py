"""Plan a forgetting: which examples go, which versions they reached, which updates are rebuilt.

The plan is pure. Only the look-up of suppressed texts may read the store; nothing here needs the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from perennial.learner.versions.history import History, RecordedVersion
from perennial.learner.versions.micro_batches import OriginOffset, origin_offset
from perennial.learner.versions.votes import reasons_not_learned
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.history.pages import ExampleRow
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import Quarantine, QuarantineEntry, SuppressedTexts, ensure_text_key
from perennial.storage.registry.suppressed_texts import load_text_key
from perennial.streams.events.models import ExampleAccepted, ForgetRequested
from perennial.streams.retention.example_rows import bare_example, key_check
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash


@dataclass(frozen=True)
class ExampleMatch:
    """A stored example that a forgetting found; it holds no text.

    Attributes:
        origin_offset: where the example was published.
        example_id: the example.
        text_hash: hash of its text; None if it has none, or if nothing is to be suppressed.
        request_id: the request that removes it now; None if none does.
        wanted_by: the request that would remove it if there were no holds.
        held: a legal hold covers it.
        erased: its text must never be learned again.
        suppressed: an equal text was erased before.
    """

    origin_offset: OriginOffset
    example_id: str
    text_hash: str | None
    request_id: str | None
    wanted_by: str | None
    held: bool
    erased: bool = False
    suppressed: bool = False


BatchMatches = dict[str, list[ExampleMatch]]
"""Matches in micro-batches, by the micro-batch's digest."""

RemovedOffsets = Mapping[str, Collection[OriginOffset]]
"""Offsets of the examples to leave out, by the micro-batch's digest; none of the collections is empty."""


class ForgetTarget:
    """Decides which examples are forgotten: those of the job, and whatever else the quarantine forbids to learn.

    The examples of other requests go in the same rebuild: they were accepted for forgetting, so no rebuilt update may
    hold them. The jobs of those requests then find nothing left to do.

    Args:
        job: the forget job.
        quarantine: the adapter's quarantine as it is now.
        store: the store, for the list of suppressed texts.
    """

    def __init__(self, job: ForgetRequested, quarantine: Quarantine, store: ObjectStore) -> None:
        self._job = job
        self._quarantine = quarantine
        self._suppressed = SuppressedTexts(store, quarantine) if quarantine.suppresses_texts else None
        self._filter = QuarantineFilter(quarantine, store)
        self._filter_without_holds = QuarantineFilter(quarantine.with_holds([]), store)
        suppressing = job.suppress or any(entry.suppress for entry in quarantine.entries)
        self._text_key = ensure_text_key(store, job.adapter) if suppressing else None
        self._index_key = self._text_key
        if self._text_key is None and quarantine.suppresses_texts:  # a lost key must not be made anew here
            self._index_key = load_text_key(store, job.adapter) or b""

    def match(self, examples: Iterable[ExampleAccepted]) -> list[ExampleMatch]:
        """Return one match per example of a micro-batch, also for examples that stay."""
        return [self._match(example) for example in examples]

    def _match(self, example: ExampleAccepted) -> ExampleMatch:
        erased = self._filter.erases(example)
        if self._job.matches(example):
            erased = erased or self._job.suppress
            request_id: str | None = self._job.request_id
            wanted_by = request_id
        else:
            request_id = _request_id(self._filter.entry_of(example))
            wanted_by = _request_id(self._filter_without_holds.entry_of(example))
        return ExampleMatch(
            origin_offset=origin_offset(example),
            example_id=example.example_id,
            text_hash=None if self._text_key is None else text_hash(example, self._text_key),
            request_id=request_id,
            wanted_by=wanted_by,
            held=self._filter.held_by(example) is not None,
            erased=erased,
            suppressed=self._filter.suppresses(example),
        )

    @property
    def key_check(self) -> str | None:
        """The text key that text hashes must be computed under to count; None where they do not count."""
        return None if self._index_key is None else key_check(self._index_key)

    @property
    def needs_texts(self) -> bool:
        """Whether only texts themselves tell what is suppressed: an older release hashed them without a key."""
        return bool(self._quarantine.suppressed)

    def may_match(self, row: ExampleRow) -> bool:
        """Return whether a stored example may be one to forget, by what the history index has of it."""
        example = bare_example(row)
        if self._job.matches(example) or self._filter_without_holds.entry_of(example) is not None:
            return True
        text_hash, suppressed = row["text_hash"], self._suppressed
        return suppressed is not None and text_hash is not None and suppressed.holds_hash(text_hash)

    def is_held(self, matches: Iterable[ExampleMatch]) -> bool:
        """Return whether a hold covers anything that the job itself asks for."""
        return any(match.held and match.request_id == self._job.request_id for match in matches)

    def hashes_to_suppress(self, matches: Iterable[ExampleMatch]) -> frozenset[str]:
        """Return the hashes of the texts that must never be learned again."""
        return frozenset(match.text_hash for match in matches if match.text_hash and match.erased)

    def removed_offsets(self, matches: BatchMatches, hashes: Collection[str]) -> dict[str, set[OriginOffset]]:
        """Return the offsets of the examples to remove, with those of the same text under other ids.

        Args:
            matches: the matches by micro-batch.
            hashes: text hashes that this forgetting suppresses.

        Returns:
            Offsets by digest of the micro-batch; micro-batches that lose nothing are left out.
        """
        removed = {
            digest: {match.origin_offset for match in group if self._is_removed(match, hashes)}
            for digest, group in matches.items()
        }
        return {digest: offsets for digest, offsets in removed.items() if offsets}

    def _is_removed(self, match: ExampleMatch, hashes: Collection[str]) -> bool:
        if match.request_id is not None:
            return True
        return (match.suppressed or match.text_hash in hashes) and not match.held


def _request_id(entry: QuarantineEntry | None) -> str | None:
    return entry.request_id if entry else None


@dataclass(frozen=True)
class RebuildPlan:
    """The changes that a forgetting makes.

    Attributes:
        removed_offsets: the examples to leave out.
        contaminated_versions: versions that have such an example in their weights, learned or taken over.
        affected_versions: those, and versions whose gate may have decided differently because of such an example, with
            every version whose state started from one of them.
        last_clean: the newest version of the schedule before the first affected one whose state is stored; None if there
            is none.
        steps: the updates to rebuild, in order; empty if no version of the schedule is affected.
        drops_start: the adapter's learned start must not be used any more: the first update begins with nothing learned.
    """

    removed_offsets: RemovedOffsets
    contaminated_versions: frozenset[str]
    affected_versions: frozenset[str]
    last_clean: RecordedVersion | None
    steps: tuple[RecordedVersion, ...]
    drops_start: bool = False


def plan_rebuild(
    history: History,
    removed_offsets: RemovedOffsets,
    collected: Collection[str] = frozenset(),
    depending: Collection[str] = frozenset(),
    *,
    drops_start: bool = False,
) -> RebuildPlan:
    """Return what forgetting these examples changes.

    Args:
        history: all manifests of the adapter.
        removed_offsets: the examples to leave out.
        collected: versions whose state was deleted to save space. A rebuild starts from an earlier one; training the
            updates in between again gives their very states.
        depending: versions that depend on revoked versions of other adapters.
        drops_start: the adapter's start is one of these, and must not be used any more.
    """
    affected, contaminated = set(depending), set(depending)
    for version, node in history.versions.items():
        offsets = removed_offsets.get(node.batch) if node.batch else None
        if offsets:
            affected.add(version)
            if any(item.origin_offset in offsets for item in history.manifests[version].learned):
                contaminated.add(version)
    schedule = history.scheduled()
    first = next((i for i, version in enumerate(schedule) if version in affected), len(schedule))
    while 0 < first < len(schedule) and schedule[first - 1] in collected:
        first -= 1
    return RebuildPlan(
        removed_offsets=removed_offsets,
        contaminated_versions=history.descendants(contaminated),
        affected_versions=history.descendants(affected),
        last_clean=history.recorded(schedule[first - 1]) if first else None,
        steps=tuple(map(history.recorded, schedule[first:])),
        drops_start=drops_start,
    )


def trained_offsets(manifest: Manifest) -> set[OriginOffset]:
    """Return the offsets of the examples that an update was given to train, whatever was then decided.

    Those that were outvoted are among them: without a forgotten example others may win.
    """
    reasons = reasons_not_learned(manifest)
    skipped = {item.origin_offset for item in manifest.skipped if item.reason in reasons}
    return skipped | {item.origin_offset for item in manifest.learned}


def state_version(step: RecordedVersion | None) -> str | None:
    """Return the version that trained a step's state: the step itself or, if it was refused, its parent."""
    if step is None:
        return None
    return step.version if step.manifest.outcome == "promoted" else step.manifest.parent
