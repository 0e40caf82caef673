"""When to cut a micro-batch, and what state a cut leaves: one adapter's state machine. Pure: clock is an argument.

An example is counted by its origin. `marks` (in the saved state) say what earlier cuts cover; `seen` (in memory) what
arrived since. At or below the mark: covered, drop it. At or below `seen`: a redelivery of what is still pending. So an
example is in exactly one cut however often it is delivered, given that deliveries of one adapter and origin partition
come in order and without holes. Cuts on size are a function of the examples alone, so a replay makes the same cuts.

Bounded per adapter: at most max_batch_examples and MAX_SKIPPED pending, RECENT_IDS ids of 8 bytes, the monitor's
windows, one mark per origin partition.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.streams.curate.drift import DriftMonitor
from perennial.streams.events.models import (
    Batch,
    BatchSkip,
    BlobRef,
    CutReason,
    DriftDetected,
    ExampleAccepted,
    ExampleScored,
    Origin,
    UpdateRequested,
)
from perennial.streams.settings import Settings

RECENT_IDS: Final = 4096
MAX_SKIPPED: Final = 256
STATE_VERSION: Final = 1
MAX_STATE_BYTES: Final = 8 * 1024 * 1024
T = TypeVar("T")


@dataclass(frozen=True)
class CutPolicy:
    """The bounds of a micro-batch. window: detector inputs kept per signal."""

    max_tokens: int
    max_examples: int
    min_examples: int
    max_age_ms: int
    cooldown_examples: int
    window: int

    @classmethod
    def of(cls, settings: Settings) -> CutPolicy:
        """The policy that the settings ask for."""
        return cls(
            settings.curate.max_batch_tokens,
            settings.curate.max_batch_examples,
            settings.curate.min_batch_examples,
            int(settings.curate.max_age_s * 1000),
            settings.curate.cooldown_examples,
            settings.curate.detector_window,
        )


@dataclass(frozen=True)
class Offer:
    """What became of an offered example. covered: an earlier cut has it, acknowledge it now."""

    covered: bool
    drifts: tuple[DriftDetected, ...] = ()
    reason: CutReason | None = None


@dataclass(frozen=True)
class Cut:
    """What to write, in this order: the batch's body, the state, the job. body is None where only skips are saved."""

    body: bytes | None
    state: bytes
    job: UpdateRequested | None


class RecentIds:
    """The last RECENT_IDS example ids, 8 bytes of each; two that share them by chance: 2**-52 per new example."""

    def __init__(self, data: bytes = b"") -> None:
        loaded = np.frombuffer(data, dtype="<u8").astype(np.uint64)[-RECENT_IDS:]
        self._ring: NDArray[np.uint64] = np.zeros(max(64, len(loaded)), dtype=np.uint64)
        self._ring[: len(loaded)] = loaded
        self._added = len(loaded)

    def add(self, example_id: str) -> bool:
        """Remember the id; False where it was there already."""
        key = np.uint64(int(example_id[:16], 16))
        held = min(self._added, len(self._ring))
        if bool((self._ring[:held] == key).any()):
            return False
        if self._added == len(self._ring) < RECENT_IDS:
            grown = np.zeros(min(RECENT_IDS, 2 * held), dtype=np.uint64)
            grown[:held] = self._ring
            self._ring = grown
        self._ring[self._added % len(self._ring)] = key
        self._added += 1
        if self._added == 2 * RECENT_IDS:
            self._added = RECENT_IDS
        return True

    def to_bytes(self) -> bytes:
        """Oldest first, 8 bytes each, little endian."""
        if self._added <= len(self._ring):
            return self._ring[: self._added].astype("<u8").tobytes()
        return np.roll(self._ring, -(self._added % len(self._ring))).astype("<u8").tobytes()


@dataclass
class _Pending(Generic[T]):
    """What arrived since the last save, in order of arrival."""

    tail: list[tuple[ExampleScored, T]] = field(default_factory=list)
    again: list[T] = field(default_factory=list)
    examples: list[ExampleAccepted] = field(default_factory=list)
    skipped: list[BatchSkip] = field(default_factory=list)
    tokens: int = 0
    sizes: list[int] = field(default_factory=list)
    since_ms: int | None = None


class MicroBatcher(Generic[T]):
    """Decides for one adapter. T: the caller's token for a delivery, given back once it may be acknowledged.

    The caller saves what `cut` or `flush` gives, and calls `saved` only then; where saving fails with a conflict it
    restores a new Curator from the store and offers it `tail()` again.
    """

    def __init__(self, adapter: str, policy: CutPolicy) -> None:
        self.adapter = adapter
        self.policy = policy
        self.cuts = 0
        self._fences = 0
        self.marks: dict[str, int] = {}
        self.last_job: UpdateRequested | None = None
        self._seen: dict[str, int] = {}
        self._recent = RecentIds()
        self._carried: list[BatchSkip] = []
        self._monitor = DriftMonitor(policy.window)
        self._generation = 0
        self._cooldown = 0
        self._armed: DriftDetected | None = None
        self._pending: _Pending[T] = _Pending()

    @property
    def idle(self) -> bool:
        """Nothing is pending: the saved state says all that this object knows."""
        return not self._pending.tail

    @property
    def pending(self) -> list[ExampleAccepted]:
        """The examples that the next cut would learn."""
        return list(self._pending.examples)

    @property
    def since_ms(self) -> int | None:
        """When the oldest pending delivery was offered."""
        return self._pending.since_ms

    @property
    def oldest_origin_ms(self) -> int | None:
        """When the oldest pending example was first published."""
        return min((scored.example.origin.timestamp_ms for scored, _ in self._pending.tail), default=None)

    def tail(self) -> list[tuple[ExampleScored, T]]:
        """All deliveries that the saved state does not cover, in order."""
        return list(self._pending.tail)

    def redelivered(self) -> list[T]:
        """Tokens of further deliveries of what is in the tail."""
        return list(self._pending.again)

    def adopt(self, tokens: list[T]) -> None:
        """Give these tokens back with the next save, or the pending that they repeat were acknowledged alone."""
        self._pending.again.extend(tokens)

    def offer(self, scored: ExampleScored, token: T, now_ms: int) -> Offer:
        """Take one delivery; the answer says whether to cut now."""
        example, pending = scored.example, self._pending
        partition, offset = example.origin.partition_key(), example.origin.offset
        if offset <= self.marks.get(partition, -1):
            return Offer(covered=True)
        if offset <= self._seen.get(partition, -1):
            pending.again.append(token)
            return Offer(covered=False)
        self._seen[partition] = offset
        pending.tail.append((scored, token))
        if pending.since_ms is None:
            pending.since_ms = now_ms
        if not self._recent.add(example.example_id):
            pending.skipped.append(_skip(example, "duplicate"))
            return Offer(covered=False, reason=self._due_by_content())
        drifts = self._watch(scored)
        if example.learn:
            pending.examples.append(example)
            pending.sizes.append(scored.tokens)
            pending.tokens += scored.tokens
        else:
            pending.skipped.append(_skip(example, "signal"))
        return Offer(covered=False, drifts=tuple(drifts), reason=self._due_by_content())

    def _watch(self, scored: ExampleScored) -> list[DriftDetected]:
        example = scored.example
        if scored.live_generation > self._generation:
            self._generation = scored.live_generation
            self._cooldown = self.policy.cooldown_examples
            self._armed = None
            self._monitor.reset_live()
        cooling = self._cooldown > 0
        self._cooldown = max(0, self._cooldown - 1)
        shifts = self._monitor.update(
            base_loss=scored.base_loss_nats,
            live_loss=scored.live_loss_nats,
            text=example.text or example.answer,
            rating=example.rating,
        )
        found = []
        for shift in shifts:
            event = DriftDetected(
                adapter=self.adapter, signal=shift.signal, detector=shift.detector, before=shift.before,
                after=shift.after, examples_seen=self._monitor.seen, origin=example.origin,
            )  # fmt: skip
            found.append(event)
            if shift.cuts and not cooling and self._armed is None:
                self._armed = event
        return found

    def _due_by_content(self) -> CutReason | None:
        """Size or drift: what follows from the examples alone."""
        pending = self._pending
        examples = len(pending.examples)
        skipped = len(self._carried) + len(pending.skipped)
        if pending.tokens >= self.policy.max_tokens or examples >= self.policy.max_examples or skipped >= MAX_SKIPPED:
            return "size"
        return "drift" if self._armed is not None and examples >= self.policy.min_examples else None

    def due(self, now_ms: int) -> Literal["age", "flush"] | None:
        """Whether the oldest delivery waited long enough: for a cut, or for a save where only skips are pending."""
        pending = self._pending
        if pending.since_ms is None or now_ms - pending.since_ms < self.policy.max_age_ms:
            return None
        return "age" if pending.examples else "flush"

    def cut(self, now: datetime, reason: CutReason, blocked: Collection[str] = ()) -> Cut:
        """The micro-batch of all that is pending; without what expired by `now`, or is named in `blocked`."""
        pending = self._pending
        left_out: dict[str, Literal["quarantined", "expired"]]
        left_out = {example.example_id: "quarantined" for example in pending.examples if example.example_id in blocked}
        left_out |= {example.example_id: "expired" for example in pending.examples if _expired(example, now)}
        sized = zip(pending.examples, pending.sizes, strict=True)
        kept = [(example, size) for example, size in sized if example.example_id not in left_out]
        examples = [example for example, _ in kept]
        leaving = [example for example in pending.examples if example.example_id in left_out]
        skipped = self._carried + pending.skipped + [_skip(e, left_out[e.example_id]) for e in leaving]
        batch = Batch(adapter=self.adapter, cut=self.cuts, examples=examples, skipped=skipped)
        body = batch.model_dump_json(by_alias=True).encode()
        digest = digest_of(body)
        origins = [example.origin for example in examples]
        times = [origin.timestamp_ms for origin in origins or [skip.origin for skip in skipped]]
        self.last_job = UpdateRequested(
            job_id="sha256:" + hashlib.sha256(f"{self.adapter}\n{self.cuts}\n{digest}".encode()).hexdigest(),
            adapter=self.adapter,
            cut=self.cuts,
            batch=BlobRef(digest=digest, size_bytes=len(body)),
            examples=len(examples),
            skipped=len(skipped),
            tokens=sum(size for _, size in kept),
            reason=reason,
            drift=self._armed if reason == "drift" else None,
            marks=_highest(origins + [skip.origin for skip in skipped]),
            oldest_ms=min(times, default=0),
            newest_ms=max(times, default=0),
            cut_at=now,
        )
        self.cuts += 1
        self._carried = []
        self._armed = None
        return Cut(body, self._snapshot(), self.last_job)

    def flush(self) -> Cut:
        """Only skips are pending: carry them to the next cut, so that their deliveries may be acknowledged."""
        self._carried = self._carried + self._pending.skipped
        return Cut(None, self._snapshot(), None)

    def fence(self) -> bytes:
        """The saved state in other bytes, so that who still holds the one before cannot replace it."""
        self._fences += 1
        return self._snapshot()

    def saved(self) -> list[T]:
        """The state of the last cut or flush is in the store: tokens that may be acknowledged; nothing is pending."""
        tokens = [token for _, token in self._pending.tail] + self._pending.again
        self._pending = _Pending()
        return tokens

    def _snapshot(self) -> bytes:
        """The state in which nothing is pending; rebuilds the detectors so that this object is in it too."""
        self.marks = {**self.marks, **self._seen}
        self._seen = {}
        self._monitor.canonicalise()
        return orjson.dumps(
            {
                "version": STATE_VERSION,
                "adapter": self.adapter,
                "cuts": self.cuts,
                "fences": self._fences,
                "marks": self.marks,
                "recent": base64.b64encode(self._recent.to_bytes()).decode(),
                "carried": [skip.model_dump(mode="json") for skip in self._carried],
                "generation": self._generation,
                "cooldown": self._cooldown,
                "armed": None if self._armed is None else self._armed.model_dump(mode="json"),
                "monitor": self._monitor.state(),
                "job": None if self.last_job is None else self.last_job.model_dump(mode="json"),
            },
            option=orjson.OPT_SORT_KEYS,
        )

    @classmethod
    def restore(cls, adapter: str, policy: CutPolicy, state: bytes) -> MicroBatcher[T]:
        """The curator that saved this state. Raises IntegrityError where it is not one, or another adapter's."""
        try:
            data: dict[str, Any] = orjson.loads(state)
            if data["version"] != STATE_VERSION or data["adapter"] != adapter:
                raise ValueError(f"version {data['version']} of adapter {data['adapter']}")  # noqa: TRY301 - told below
            curator: MicroBatcher[T] = cls(adapter, policy)
            curator.cuts, curator._fences = int(data["cuts"]), int(data.get("fences", 0))
            curator.marks = {str(partition): int(offset) for partition, offset in data["marks"].items()}
            curator._recent = RecentIds(base64.b64decode(data["recent"], validate=True))
            curator._carried = [BatchSkip.model_validate(skip) for skip in data["carried"]]
            curator._generation, curator._cooldown = int(data["generation"]), int(data["cooldown"])
            armed, job = data["armed"], data["job"]
            curator._armed = None if armed is None else DriftDetected.model_validate(armed)
            curator.last_job = None if job is None else UpdateRequested.model_validate(job)
            curator._monitor = DriftMonitor.from_state(data["monitor"], policy.window)
        except (orjson.JSONDecodeError, binascii.Error, ValidationError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"the saved state of adapter {adapter} is not readable",
                got=f"{type(error).__name__}: {error}",
                allowed=f"a state of version {STATE_VERSION} that curate wrote",
                remedy="upgrade to the version that wrote it; without the state, curate cannot tell what it has cut",
            ) from error
        return curator


class OffsetLine(Generic[T]):
    """Deliveries of one input partition, given back for acknowledgement in order and without holes.

    Hazard: Faust commits past a hole of one offset, and past any hole before its first commit, so nothing may be
    acknowledged before everything below it is.
    """

    def __init__(self) -> None:
        self._line: deque[tuple[int, T]] = deque()
        self._done: set[int] = set()
        self.next_offset: int | None = None

    def add(self, offset: int, item: T) -> bool:
        """Take a delivery; False where this offset was here before. Raises IntegrityError where offsets are missing."""
        if self.next_offset is not None and offset < self.next_offset:
            return False
        if self.next_offset is not None and offset > self.next_offset:
            raise IntegrityError(
                "the consumer left offsets out",
                got=offset,
                allowed=self.next_offset,
                remedy="restart the role: it resumes at the committed offset, and nothing was acknowledged past it",
            )
        self.next_offset = offset + 1
        self._line.append((offset, item))
        return True

    def done(self, offset: int) -> None:
        """What was delivered at this offset is safe."""
        self._done.add(offset)

    def ready(self) -> Iterator[T]:
        """The items that may be acknowledged now, each once, in order."""
        while self._line and self._line[0][0] in self._done:
            offset, item = self._line.popleft()
            self._done.discard(offset)
            yield item


def _skip(example: ExampleAccepted, reason: Literal["signal", "duplicate", "expired", "quarantined"]) -> BatchSkip:
    return BatchSkip(example_id=example.example_id, origin=example.origin, reason=reason)


def _expired(example: ExampleAccepted, now: datetime) -> bool:
    return example.expires_at is not None and example.expires_at <= now


def _highest(origins: list[Origin]) -> dict[str, int]:
    marks: dict[str, int] = {}
    for origin in origins:
        partition = origin.partition_key()
        marks[partition] = max(marks.get(partition, -1), origin.offset)
    return marks
