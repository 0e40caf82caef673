"""Gather what the threads of a learner train and measure, and compute it in passes that several adapters share.

Each thread runs one update from its beginning to its end, and knows nothing of the others. Where it trains or measures, it
leaves a request here and waits. One of the waiting threads computes the next round for all: every measurement that
waits, or a few optimizer steps of every adapter that trains. An adapter joins between two rounds and leaves once its
schedule is done, so a short update neither waits for the end of a long one nor trains alone beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch

from perennial.learner.costs.device_use import DeviceUse, Reading, add_use
from perennial.learner.costs.operations import WeightCounts, measuring_flops, training_flops
from perennial.learner.model.lora import Lora
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.measure_together import MeasuredRows, measure_together
from perennial.learner.together.shared_pass import SharedPass
from perennial.learner.together.stacked_lora import Layout
from perennial.learner.together.train_together import AdapterJob, to_host, train_together
from perennial.learner.training.trainer import TrainConfig, TrainResult

ROUND_STEPS = {"cpu": 4, "cuda": 16}
"""Optimizer steps of a round, if the schedules have so many. A round gathers the weights of its adapters."""
ROUND_S = 0.25
"""Seconds that a round with more steps may take: so long an adapter may wait before it joins. Rounds change no bits."""


@dataclass(eq=False)
class _Request:
    """What one thread waits for.

    Attributes:
        lora: Its slot; requests share a pass if their slots have the same rank, scale and number format.
        lock: Lock on the base.
        on_step: Called in the thread after each step of the round.
        queued_s: When it was left, or its last round ended, by the clock.
        train: Steps that are still to be trained; None for a measurement.
        measure: Rows to measure; None for training.
        pad: Token id to fill up with.
        trained: Result of the steps so far.
        for_slot: The weights of the result, where the base is.
        losses: Losses of the measured rows.
        used: Its share of the rounds that computed it.
        error: What the request failed with.
        done: True once there is a result or an error.
    """

    lora: Lora
    lock: AbstractContextManager[object] | None
    on_step: Callable[[], None]
    queued_s: float
    train: AdapterJob | None = None
    measure: MeasuredRows | None = None
    pad: int = 0
    trained: TrainResult | None = None
    for_slot: Mapping[str, torch.Tensor] = field(default_factory=dict)
    losses: list[torch.Tensor] | None = None
    used: DeviceUse = field(default_factory=DeviceUse)
    error: Exception | None = None
    done: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        return self.lora.config, self.lora.compute_dtype, self.pad


class _InterruptedError(Exception):
    """The thread that computes a round is to stop.

    Args:
        cause: What its `on_step` raised.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class GatheredPasses:
    """Computes the requests of several threads together. One per learner; see `training.compute.Compute`.

    With one thread it computes the same bits as `alone`.

    Args:
        most_adapters: Most adapters per round.
        wait_s: Longest time that a request waits for those that are about to come, in seconds.
        clock: Monotonic clock, in seconds.
        report: Called with the number of adapters of each round that trained, and its seconds.
    """

    def __init__(
        self,
        most_adapters: int = 1,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        self._most_adapters = most_adapters
        self._wait_s = wait_s
        self._clock = clock
        self._report = report
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._joined = 0
        self._leading = False
        self._steps = 0
        self._step_s: float | None = None

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Say that this thread is about to train or measure: rounds wait for it, for at most `wait_s`."""
        with self._changed:
            self._joined += 1
        try:
            yield
        finally:
            with self._changed:
                self._joined -= 1
                self._changed.notify_all()

    def alone(self) -> GatheredPasses:
        """Return the same arithmetic in passes that no other adapter shares."""
        return GatheredPasses()

    def train(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor] | None,
        steps: Sequence[Sequence[TokenRow]],
        config: TrainConfig,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> TrainResult:
        """See `Compute.train`. The result counts the adapters that shared a pass."""
        job = AdapterJob(weights, optimizer, steps, config)
        request = _Request(lora, lock, on_step, self._clock(), train=job, pad=config.pad)
        if not steps:
            (trained,) = train_together(lora, [job], lock=lock, on_step=on_step)
        else:
            self._compute(request)
            assert request.trained is not None
            trained = request.trained
        lora.load(request.for_slot if steps else trained.weights)
        return trained

    def token_losses(
        self,
        lora: Lora,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[TokenRow],
        pad: int,
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> list[torch.Tensor]:
        """See `Compute.token_losses`."""
        measured = MeasuredRows(weights, rows)
        request = _Request(lora, lock, on_step, self._clock(), measure=measured, pad=pad)
        self._compute(request)
        lora.load(weights)  # a model whose rows cannot be packed measures all adapters in one thread's slot
        return request.losses or []

    # ---- waiting

    def _compute(self, request: _Request) -> None:
        """Wait until the request is done; compute rounds in this thread where no other thread does."""
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            while self._is_to_lead(request):
                try:
                    self._lead(request)
                finally:
                    with self._changed:
                        self._leading = False
                        self._changed.notify_all()
        finally:
            with self._changed:
                if request in self._waiting:  # its thread is to stop
                    self._waiting.remove(request)
            add_use(request.used)
        if request.error is not None:
            raise request.error

    def _is_to_lead(self, request: _Request) -> bool:
        """Wait until the request is done, or nobody computes; return True in the second case."""
        seen = self._steps
        while True:
            with self._changed:
                if not request.done and self._leading and self._steps == seen:
                    self._changed.wait()
                if request.done:
                    return False
                if not self._leading:
                    self._leading = True
                    return True
                moved, seen = self._steps != seen, self._steps
            if moved:  # a thread that hangs must not look healthy because others wait for it
                request.on_step()

    def _gathered(self) -> list[_Request]:
        """Return the requests of the next round, after waiting for those that are about to come."""
        with self._changed:
            while True:
                waiting = [request for request in self._waiting if not request.done]
                ready = [request for request in waiting if request.key == waiting[0].key]
                left_s = min(request.queued_s for request in ready) + self._wait_s - self._clock()
                if len(waiting) >= self._joined or len(ready) >= self._most_adapters or left_s <= 0:
                    break
                self._changed.wait(left_s)
        measured = [request for request in ready if request.measure is not None]
        return (measured or ready)[: self._most_adapters]

    # ---- computing

    def _lead(self, request: _Request) -> None:
        """Compute one round."""
        members = self._gathered()
        try:
            self._round_or_parts(members, request.lock, self._steps_of(request))
        except _InterruptedError as error:
            raise error.cause from None
        now_s = self._clock()
        with self._changed:
            for member in members:
                member.queued_s = now_s
            # To the end of the queue: where more wait than a round takes, they take turns.
            self._waiting = [
                *(waiting for waiting in self._waiting if waiting not in members),
                *(member for member in members if member in self._waiting and not member.done),
            ]

    def _steps_of(self, request: _Request) -> Callable[[], None]:
        """Return what is called after each step: it wakes the other threads, and ends the round if this one is to stop."""

        def after_step() -> None:
            with self._changed:
                self._steps += 1
                self._changed.notify_all()
            try:
                request.on_step()
            except Exception as error:
                raise _InterruptedError(error) from error

        return after_step

    def _round_or_parts(
        self,
        members: Sequence[_Request],
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> None:
        """Compute a round; if it fails, compute each request by itself, so that the one at fault alone gets the error."""
        failure: Exception | None = None
        try:
            self._round(members, lock, on_step)
        except _InterruptedError:
            raise
        except Exception as error:  # noqa: BLE001 - handed over to the thread whose request failed
            failure = error
        if failure is None:
            return
        if len(members) == 1:
            members[0].error, members[0].done = failure, True
            return
        failure.__traceback__ = None  # it keeps the tensors of the failed round alive
        for member in members:
            self._round_or_parts([member], lock, on_step)

    def _round(
        self,
        members: Sequence[_Request],
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None],
    ) -> None:
        lora, pad, device = members[0].lora, members[0].pad, members[0].lora.base.device
        began = Reading.now(device)
        measured = [member.measure for member in members if member.measure is not None]
        if measured:
            losses = measure_together(lora, measured, pad, lock=lock, on_step=on_step)
            for member, of_member in zip(members, losses, strict=True):
                member.losses, member.done = of_member, True
            counts = WeightCounts.of(lora)
            used, flops = began.until_now(device), [measuring_flops(counts, job.rows) for job in measured]
            for member, own in zip(members, flops, strict=True):
                member.used += used.share(own / max(1.0, sum(flops)), measuring_flops=own)
            return
        jobs = [member.train for member in members if member.train is not None]
        most = ROUND_STEPS["cuda" if torch.device(lora.base.device).type == "cuda" else "cpu"]
        if self._step_s:
            most = max(most, int(ROUND_S / self._step_s))
        count = min(most, *(len(job.schedule) for job in jobs))
        now = [replace(job, schedule=job.schedule[:count]) for job in jobs]
        began_s = self._clock()
        results = train_together(lora, now, lock=lock, on_step=on_step, on_device=True)
        seconds = self._clock() - began_s
        self._step_s = seconds / count
        self._report(len(members), seconds)
        trained = [
            done.after(member.trained) if member.trained else done
            for member, done in zip(
                members, (replace(result, adapters=len(members)) for result in results), strict=True
            )
        ]
        ended = [number for number, job in enumerate(jobs) if count == len(job.schedule)]
        hosted = to_host([trained[number] for number in ended], Layout.of(lora), SharedPass.of(lora, graphs=True).hot)
        counts, used = WeightCounts.of(lora), began.until_now(device)
        flops = [sum(training_flops(counts, rows) for rows in job.schedule) for job in now]
        # Hazard: from here on nothing may fail, or the round would be computed again from its own results.
        for member, job, result, done, own in zip(members, jobs, results, trained, flops, strict=True):
            member.used += used.share(own / max(1.0, sum(flops)), training_flops=own)
            member.train = AdapterJob(result.weights, result.optimizer, job.schedule[count:], job.config)
            member.trained, member.for_slot = done, done.weights
        for number, result in zip(ended, hosted, strict=True):
            members[number].trained, members[number].done = result, True
