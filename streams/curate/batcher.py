"""Decide when to cut a micro-batch of one adapter, and what to store with the cut. No I/O; time is an argument.

Each example is identified by its origin: partition, leader epoch and offset. The stored high-water marks (`marks` and
`epochs` in the JSON) say what earlier cuts cover. The origins of what arrived since the last cut are kept in memory. So
each example is in exactly one cut, however often it is delivered. Cuts for size depend on the examples alone, so a
replay of the log makes the same cuts.

Order: the first deliveries of one adapter's examples from one origin partition arrive in the order of their positions.
Intake writes them so, and the key of `examples` and `scored-examples` is the adapter. A mark is a maximum, so a first
delivery below it looks like a redelivery by the mark alone, and a cut would raise the mark above it for good.
Such a delivery means that the number of partitions changed under a role, or that somebody forged records. `offer`
recognises it and calls it out of order, so that the caller refuses it instead of dropping it:

- Between the stored mark and the highest pending position, a redelivery is among the pending origins.
- At or below the stored mark, a redelivery's example id is among the recent ids, as far back as these reach. `Reach`
  says how far that is.

`MicroBatcher.cut` changes nothing: it returns what to store. `MicroBatcher.apply` adopts the cut once it is stored.

Memory per adapter is bounded: at most `max_batch_examples` and MAX_SKIPPED pending deliveries, RECENT_IDS ids of
8 bytes, the windows of the drift monitor, and three marks per origin partition.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Generic, Literal, TypeVar

import orjson
from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.streams.curate.cutting.drift_trust import examples_for_drift
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.curate.detectors import detectors
from perennial.streams.curate.drift import DriftMonitor
from perennial.streams.curate.recent_ids import NEW_REACH, Reach, RecentIds, dump_marks, load_marks
from perennial.streams.events.high_water_marks import NO_MARKS, HighWaterMarks, Position
from perennial.streams.events.models import (
    Batch,
    BatchSkip,
    BlobRef,
    CutReason,
    DriftDetected,
    ExampleAccepted,
    ExampleScored,
    UpdateRequested,
)

MAX_SKIPPED: Final = 256
STATE_VERSION: Final = 2
READABLE_VERSIONS: Final = frozenset({1, 2})
"""Version 1 has offsets without leader epochs, and no record of how far back the recent ids reach."""
T = TypeVar("T")


@dataclass(frozen=True)
class Offer:
    """The result of offering one delivery.

    Attributes:
        covered: an earlier cut covers the example; acknowledge the delivery now.
        out_of_order: the highest position that this adapter had seen when an example arrived below it that it had
            never seen. The batcher did not take the example: refuse the delivery. None: it was in order.
        drifts: drift that this example revealed, to be published.
        reason: why to cut now; None: do not cut.
    """

    covered: bool
    out_of_order: Position | None = None
    drifts: tuple[DriftDetected, ...] = ()
    reason: CutReason | None = None


@dataclass(frozen=True)
class CutHistory:
    """The state that the cuts so far leave behind.

    Attributes:
        cuts: number of cuts; also the number of the next cut.
        fences: number of times that the state was rewritten only to make the compare-and-swap of another process fail.
        high_water_marks: the covered positions per origin partition.
        reach: how far back the recent ids reach.
        carried: examples that are not learned and that the next micro-batch will list as skipped.
        last_job: the job of the last cut; None before the first.
    """

    cuts: int = 0
    fences: int = 0
    high_water_marks: HighWaterMarks = NO_MARKS
    reach: Reach = NEW_REACH
    carried: tuple[BatchSkip, ...] = ()
    last_job: UpdateRequested | None = None


@dataclass(frozen=True)
class Cut:
    """The things to store and publish, in this order: the body, the state, the job.

    Attributes:
        body: the bytes of the micro-batch; None if only the state is stored.
        state: the bytes of the adapter's new state.
        job: the job that names the body; None if only the state is stored.
        history: the part of the new state that `MicroBatcher.apply` adopts.
    """

    body: bytes | None
    state: bytes
    job: UpdateRequested | None
    history: CutHistory


@dataclass
class _Pending(Generic[T]):
    """The deliveries since the last cut was applied, in order of arrival.

    Attributes:
        deliveries: the first delivery of each example, with the caller's handle of it.
        redelivered: handles of further deliveries of the same examples.
        examples: the examples to learn.
        sizes: the number of text tokens of each of these examples.
        tokens: the sum of `sizes`.
        skipped: the examples that are not learned.
        origins: partition key, leader epoch and offset of each of these deliveries.
        highest: the highest position per origin partition.
        since_ms: when the first delivery was offered.
    """

    deliveries: list[tuple[ExampleScored, T]] = field(default_factory=list)
    redelivered: list[T] = field(default_factory=list)
    examples: list[ExampleAccepted] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    skipped: list[BatchSkip] = field(default_factory=list)
    origins: set[tuple[str, int, int]] = field(default_factory=set)
    highest: dict[str, Position] = field(default_factory=dict)
    since_ms: int | None = None


class MicroBatcher(Generic[T]):
    """Collect the examples of one adapter and decide when to cut a micro-batch.

    T is the caller's handle of a delivery. The parameters `token` and `tokens` take handles, not tokens of a text.

    The caller stores what `cut`, `flush` or `fence` returns and calls `apply` only after the store accepted it. It
    offers nothing between the two calls. If the store reports a conflict, the caller restores a new MicroBatcher from
    the store and offers it `pending_deliveries()` again.

    Args:
        adapter: the adapter's name.
        policy: the bounds of a micro-batch.
    """

    def __init__(self, adapter: str, policy: CutPolicy) -> None:
        self.adapter = adapter
        self.policy = policy
        self.history = CutHistory()
        self._recent = RecentIds()
        self._added = 0  # ids, in the life of the adapter
        self._monitor = DriftMonitor(policy.window, detectors(policy.drift_threshold))
        self._generation = 0
        self._cooldown = 0
        self._armed: DriftDetected | None = None  # drift that will cut, as soon as enough examples are pending
        self._drift_examples = policy.min_examples  # how many these are
        self._pending: _Pending[T] = _Pending()

    @property
    def idle(self) -> bool:
        """True if nothing is pending, so that the stored state is complete."""
        return not self._pending.deliveries

    @property
    def pending_examples(self) -> list[ExampleAccepted]:
        """The examples that the next cut would learn."""
        return list(self._pending.examples)

    @property
    def oldest_origin_ms(self) -> int | None:
        """When the oldest pending example was first published, in milliseconds since 1970; None if idle."""
        return min((scored.example.origin.timestamp_ms for scored, _ in self._pending.deliveries), default=None)

    def pending_deliveries(self) -> list[tuple[ExampleScored, T]]:
        """Return all deliveries that the stored state does not cover, in order, without redeliveries."""
        return list(self._pending.deliveries)

    def redelivered(self) -> list[T]:
        """Return the handles of further deliveries of the pending examples."""
        return list(self._pending.redelivered)

    def add_redelivered(self, tokens: list[T]) -> None:
        """Add handles of redeliveries, which the next `apply` returns.

        Args:
            tokens: the handles.

        Hazard: a redelivery must not be acknowledged before the pending example that it repeats is stored.
        """
        self._pending.redelivered.extend(tokens)

    def is_repeat(self, example: ExampleAccepted) -> bool:
        """Return whether `offer` would skip this example as a duplicate of a recent one."""
        origin = example.origin
        is_new = (origin.partition_key(), origin.leader_epoch, origin.offset) not in self._pending.origins
        is_new = is_new and not self.history.high_water_marks.covers(origin)
        return is_new and not example.returned and example.example_id in self._recent

    def offer(self, scored: ExampleScored, token: T, now_ms: int) -> Offer:
        """Take one delivery and decide whether to cut now.

        Args:
            scored: the example with its losses.
            token: the caller's handle of the delivery; `apply` returns it once the delivery may be acknowledged.
            now_ms: a monotonic clock, in milliseconds.
        """
        example, pending, marks = scored.example, self._pending, self.history.high_water_marks
        partition, position = example.origin.partition_key(), (example.origin.leader_epoch, example.origin.offset)
        identity = (partition, *position)
        if identity in pending.origins:
            pending.redelivered.append(token)
            return Offer(covered=False)
        if marks.covers(example.origin):
            if self.history.reach.remembers(example, self._added) and example.example_id not in self._recent:
                return Offer(covered=False, out_of_order=marks.at(partition))
            return Offer(covered=True)
        highest = pending.highest.get(partition, position)
        if position < highest:
            return Offer(covered=False, out_of_order=highest)
        pending.highest[partition] = position
        pending.origins.add(identity)
        pending.deliveries.append((scored, token))
        if pending.since_ms is None:
            pending.since_ms = now_ms
        self._added += 1
        if not self._recent.add(example.example_id) and not example.returned:
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
        """Feed the drift monitor, and arm a cut if it reports drift that is worth one."""
        example = scored.example
        if scored.live_generation > self._generation:
            self._generation = scored.live_generation
            self._cooldown = self.policy.cooldown_examples
            self._armed = None
            self._drift_examples = self.policy.min_examples
            self._monitor.reset_live()
        cooling = self._cooldown > 0
        self._cooldown = max(0, self._cooldown - 1)
        shifts = self._monitor.update(
            base_loss=scored.base_loss_nats,
            # A scorer that has not noticed the swap yet measures under the version before.
            live_loss=scored.live_loss_nats if scored.live_generation == self._generation else None,
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
        """Return the reason to cut that follows from the examples alone."""
        pending = self._pending
        examples = len(pending.examples)
        skipped = len(self.history.carried) + len(pending.skipped)
        if pending.tokens >= self.policy.max_tokens or examples >= self.policy.max_examples or skipped >= MAX_SKIPPED:
            return "size"
        return "drift" if self._armed is not None and examples >= self._drift_examples else None

    def weigh_drift(self, updates_without_gain: int) -> bool:
        """Decide whether the drift that is due to cut may do so, or has to wait for more examples.

        Args:
            updates_without_gain: newest updates of the adapter in a row that learned nothing.

        Returns:
            True: cut now. False: a later `offer` asks again, once there are enough examples.
        """
        policy = self.policy
        self._drift_examples = examples_for_drift(
            updates_without_gain, policy.min_examples, policy.max_examples, policy.drift_patience
        )
        return len(self._pending.examples) >= self._drift_examples

    def aged(self, now_ms: int) -> bool:
        """Return whether the oldest pending delivery has waited for `max_age_ms`.

        Args:
            now_ms: the clock that `offer` was given, in milliseconds.
        """
        since_ms = self._pending.since_ms
        return since_ms is not None and now_ms - since_ms >= self.policy.max_age_ms

    def due(self, now_ms: int) -> Literal["age", "flush"] | None:
        """Return what to do because the oldest pending delivery has waited long enough; see `CutPolicy.age_cuts`.

        Args:
            now_ms: the clock that `offer` was given, in milliseconds.

        Returns:
            "age": call `cut`. "flush": nothing pending is to be learned, call `flush`. None: wait.
        """
        pending = self._pending
        if pending.since_ms is None or not self.aged(now_ms):
            return None
        if not pending.examples:
            return "flush"
        corrected = any(example.kind == "correction" for example in pending.examples)
        return "age" if self.policy.age_cuts(now_ms - pending.since_ms, pending.tokens, corrected=corrected) else None

    def cut(
        self, now: datetime, reason: CutReason, blocked: Collection[str] = (), system_prompt: str | None = None
    ) -> Cut:
        """Return the micro-batch of everything that is pending, and the state after it.

        Args:
            now: the time of the cut; examples that expired by then are skipped.
            reason: the reason that the job states.
            blocked: ids of examples that are in quarantine; they are skipped.
            system_prompt: the adapter's system prompt; the micro-batch records it if it has a conversation.
        """
        pending, history = self._pending, self.history
        left_out: dict[str, Literal["quarantined", "expired"]]
        left_out = {example.example_id: "quarantined" for example in pending.examples if example.example_id in blocked}
        left_out |= {example.example_id: "expired" for example in pending.examples if _expired(example, now)}
        sized = zip(pending.examples, pending.sizes, strict=True)
        kept = [(example, size) for example, size in sized if example.example_id not in left_out]
        examples = [example for example, _ in kept]
        leaving = [example for example in pending.examples if example.example_id in left_out]
        skipped = [*history.carried, *pending.skipped, *(_skip(e, left_out[e.example_id]) for e in leaving)]
        prompt = system_prompt if any(example.prompt is not None for example in examples) else None
        batch = Batch(adapter=self.adapter, cut=history.cuts, examples=examples, skipped=skipped, system_prompt=prompt)
        body = batch.model_dump_json(by_alias=True).encode()
        digest = digest_of(body)
        origins = [example.origin for example in examples]
        times = [origin.timestamp_ms for origin in origins or [skip.origin for skip in skipped]]
        covered = HighWaterMarks.of(origins + [skip.origin for skip in skipped])
        job = UpdateRequested(
            job_id="sha256:" + hashlib.sha256(f"{self.adapter}\n{history.cuts}\n{digest}".encode()).hexdigest(),
            adapter=self.adapter,
            cut=history.cuts,
            batch=BlobRef(digest=digest, size_bytes=len(body)),
            examples=len(examples),
            skipped=len(skipped),
            tokens=sum(size for _, size in kept),
            reason=reason,
            drift=self._armed if reason == "drift" else None,
            marks=covered.offsets,
            epochs=covered.epochs,
            oldest_ms=min(times, default=0),
            newest_ms=max(times, default=0),
            cut_at=now,
        )
        return self._cut(replace(history, cuts=history.cuts + 1, carried=(), last_job=job), body, job)

    def flush(self) -> Cut:
        """Return a state that keeps the pending skipped examples for the next micro-batch to list.

        Once it is stored, their deliveries may be acknowledged without a micro-batch of their own.
        """
        return self._cut(replace(self.history, carried=(*self.history.carried, *self._pending.skipped)))

    def fence(self) -> Cut:
        """Return the same state in other bytes. Once it is stored, the compare-and-swap of another process fails."""
        return self._cut(replace(self.history, fences=self.history.fences + 1))

    def repaired(self, partition: str, position: Position | None) -> Cut:
        """Return a state in which one origin partition has another high-water mark, also a lower one.

        Once it is stored, the compare-and-swap of a running curate agent fails, and the agent loads this state.

        Args:
            partition: origin partition key.
            position: leader epoch and offset of the mark; None: nothing of the partition is covered.
        """
        history = self.history
        marks = history.high_water_marks.replaced(partition, position)
        reach = history.reach.lowered(partition, position)
        return self._cut(replace(history, fences=history.fences + 1, high_water_marks=marks, reach=reach))

    def distrust(self, partition: str) -> None:
        """Refuse what is covered in an origin partition unless its id is known: its mark is beyond the end of the log."""
        reach = self.history.reach.lowered(partition, None)
        self.history = replace(self.history, reach=reach)

    def _cut(self, history: CutHistory, body: bytes | None = None, job: UpdateRequested | None = None) -> Cut:
        marks = history.high_water_marks.raised(scored.example.origin for scored, _ in self._pending.deliveries)
        history = replace(history, high_water_marks=marks, reach=history.reach.after(marks, self._added))
        armed = self._armed if job is None else None
        state = orjson.dumps(
            {
                "version": STATE_VERSION,
                "adapter": self.adapter,
                "cuts": history.cuts,
                "fences": history.fences,
                **dump_marks(marks),
                "reach": history.reach.dump(),
                "recent": base64.b64encode(self._recent.to_bytes()).decode(),
                "carried": [skip.model_dump(mode="json") for skip in history.carried],
                "generation": self._generation,
                "cooldown": self._cooldown,
                "armed": None if armed is None else armed.model_dump(mode="json"),
                "monitor": self._monitor.state(),
                "job": None if history.last_job is None else history.last_job.model_dump(mode="json"),
            },
            option=orjson.OPT_SORT_KEYS,
        )
        return Cut(body, state, job, history)

    def apply(self, cut: Cut) -> list[T]:
        """Adopt a cut that the store accepted.

        The drift detectors are rebuilt from their kept inputs, as in `restore`, so that this object and one that is
        restored from the stored state decide alike.

        Args:
            cut: what `cut`, `flush` or `fence` returned last.

        Returns:
            The handles of all deliveries that may be acknowledged now; nothing is pending any more.
        """
        tokens = [token for _, token in self._pending.deliveries] + self._pending.redelivered
        self._pending = _Pending()
        self.history = cut.history
        if cut.job is not None:
            self._armed = None
            self._drift_examples = self.policy.min_examples
        self._monitor.canonicalise()
        return tokens

    @classmethod
    def restore(cls, adapter: str, policy: CutPolicy, state: bytes) -> MicroBatcher[T]:
        """Return the batcher that a stored state describes.

        Raises:
            IntegrityError: the bytes are not a state of this version, or they belong to another adapter.
        """
        try:
            data: dict[str, Any] = orjson.loads(state)
            if data["version"] not in READABLE_VERSIONS or data["adapter"] != adapter:
                raise ValueError(f"version {data['version']} of adapter {data['adapter']}")  # noqa: TRY301 - see below
            armed, job = data["armed"], data["job"]
            batcher: MicroBatcher[T] = cls(adapter, policy)
            marks = load_marks(data)
            batcher.history = CutHistory(
                cuts=int(data["cuts"]),
                fences=int(data.get("fences", 0)),
                high_water_marks=marks,
                reach=Reach.load(data["reach"]) if "reach" in data else Reach.from_here(marks),
                carried=tuple(BatchSkip.model_validate(skip) for skip in data["carried"]),
                last_job=None if job is None else UpdateRequested.model_validate(job),
            )
            batcher._recent = RecentIds(base64.b64decode(data["recent"], validate=True))
            batcher._added = batcher.history.reach.added
            batcher._generation, batcher._cooldown = int(data["generation"]), int(data["cooldown"])
            batcher._armed = None if armed is None else DriftDetected.model_validate(armed)
            batcher._monitor = DriftMonitor.from_state(
                data["monitor"], policy.window, detectors(policy.drift_threshold)
            )
        except (ValidationError, LookupError, AttributeError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"the stored curate state of adapter {adapter} is not readable",
                got=f"{type(error).__name__}: {error}",
                allowed=f"a state of at most version {STATE_VERSION} that curate wrote for this adapter",
                remedy="upgrade to the version that wrote it; without the state, curate cannot tell what it has cut",
            ) from error
        return batcher


def _skip(example: ExampleAccepted, reason: Literal["signal", "duplicate", "expired", "quarantined"]) -> BatchSkip:
    # Not the example's own id, which is a hash of its text: no forgetting reaches the skipped examples of a micro-batch,
    # and whoever guesses the text could confirm it.
    at = example.origin
    position = f"skipped record {at.partition_key()}/{at.leader_epoch}/{at.offset}"
    return BatchSkip(example_id=hashlib.sha256(position.encode()).hexdigest()[:32], origin=at, reason=reason)


def _expired(example: ExampleAccepted, now: datetime) -> bool:
    return example.expires_at is not None and example.expires_at <= now
