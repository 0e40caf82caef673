"""Train several adapters over one base in the same forward and backward passes.

Each adapter has its own rows, losses, gradient norm, clipping, rate and optimizer state, as if `train` had trained it
alone; only the products with the frozen base are shared. An adapter whose loss is not finite spoils nothing but its own
result. What shares a pass decides the last bits, because products of other sizes add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from perennial.learner.model.lora import Lora, Tensors, check_weights
from perennial.learner.model.loss import OutOfMemoryError, ignore_step, is_out_of_memory
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.device_states import Fetching, HotStates, stacked_rows
from perennial.learner.together.packing import AdapterRows
from perennial.learner.together.shared_pass import SharedPass, packs_together
from perennial.learner.together.splitting import most_pass_tokens, split_into_passes
from perennial.learner.together.stacked_adamw import StackedAdamW, clip
from perennial.learner.together.stacked_lora import Layout
from perennial.learner.training.trainer import MOMENTS, TrainConfig, TrainResult, freeze, steps_taken, train


@dataclass(frozen=True)
class AdapterJob:
    """What `train` takes for one adapter.

    Attributes:
        weights: LoRA tensors by name to start from, on the host or on the base's device.
        optimizer: Moments and step count to continue from; None for an adapter's first training.
        schedule: Rows of each step.
        config: Rate, clipping and weights. `micro_rows` and `packed_tokens` have no effect: passes are bounded by tokens.
    """

    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor] | None
    schedule: Sequence[Sequence[TokenRow]]
    config: TrainConfig


def train_together(
    lora: Lora,
    jobs: Sequence[AdapterJob],
    *,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
    pass_tokens: int | None = None,
    graphs: bool = True,
    on_device: bool = False,
) -> list[TrainResult]:
    """Train adapters of one base and rank, one optimizer step of each per entry of its schedule.

    An adapter with fewer steps than others is finished earlier. Where memory runs out, passes are halved, then the
    adapters are trained in two parts. A model that does not compute packed rows as it computes each alone gets its
    adapters trained one by one.

    Args:
        lora: Slot whose layers, rank and scale all adapters have.
        jobs: Adapters.
        lock: Lock on the base, held for each step of all adapters.
        on_step: Called after each step, without the lock; it has no effect on the result.
        pass_tokens: Most tokens of a forward and backward pass, but for a single row that has more; None: as
            `most_pass_tokens` says.
        graphs: On CUDA, replay passes of the same size as one CUDA graph.
        on_device: Leave the tensors of the results on the base's device, as views of tensors that all results share.

    Returns:
        One result per job, in the order of the jobs. The losses of an adapter that failed are not finite.

    Raises:
        AdapterError: The weights of a job do not fit the slot.
        OutOfMemoryError: A single row does not fit the memory.
    """
    for job in jobs:
        check_weights(job.weights, lora.shapes)
    with lock or nullcontext():  # another thread may put a slot into the model
        together, pass_tokens = packs_together(lora), pass_tokens or most_pass_tokens(lora)
    if not together:
        return [train(lora, job.weights, job.optimizer, job.schedule, job.config, lock, on_step) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index].schedule))
    results = _within_memory(
        lora,
        [jobs[index] for index in order],
        lock or nullcontext(),
        on_step,
        pass_tokens,
        graphs=graphs,
        on_device=on_device,
    )
    by_job = dict(zip(order, results, strict=True))
    return [by_job[index] for index in range(len(jobs))]


def _within_memory(
    lora: Lora,
    jobs: Sequence[AdapterJob],
    lock: AbstractContextManager[object],
    on_step: Callable[[], None],
    pass_tokens: int,
    *,
    graphs: bool,
    on_device: bool,
) -> list[TrainResult]:
    """Train the jobs, in two parts where their states do not fit the memory at once."""
    try:
        return _Together(lora, jobs, pass_tokens, graphs=graphs, on_device=on_device).run(lock, on_step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(jobs) < 2:
            raise
        error.__traceback__ = None  # it keeps the tensors of the failed attempt alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(jobs) // 2
    return [
        result
        for part in (jobs[:half], jobs[half:])
        for result in _within_memory(lora, part, lock, on_step, pass_tokens, graphs=graphs, on_device=on_device)
    ]


class _Together:
    """One run: the states of the jobs, stacked, and the steps that change them."""

    def __init__(
        self, lora: Lora, jobs: Sequence[AdapterJob], pass_tokens: int, *, graphs: bool, on_device: bool
    ) -> None:
        self._lora, self._jobs = lora, jobs
        self._device = torch.device(lora.base.device)
        self._on_host = self._device.type == "cuda" and not on_device
        self._layout = Layout.of(lora)
        self._pass_tokens = pass_tokens
        self._shared = SharedPass.of(lora, graphs=graphs)
        parts: list[tuple[Sequence[Mapping[str, torch.Tensor] | None], str]] = [([job.weights for job in jobs], "")]
        parts += [([job.optimizer for job in jobs], f"{name}.") for name in MOMENTS]
        weights, exp_avg, exp_avg_sq = (
            stacked_rows(self._layout, states, prefix, self._device, self._shared.hot) for states, prefix in parts
        )
        self._weights = weights
        self._optimizer = StackedAdamW(weights, exp_avg, exp_avg_sq)
        self._taken = [steps_taken(job.optimizer) for job in jobs]
        for row, taken in enumerate(self._taken):
            self._optimizer.set_taken(row, taken)
        self._limits = torch.tensor([job.config.clip_norm for job in jobs], device=self._device)

    def run(self, lock: AbstractContextManager[object], on_step: Callable[[], None]) -> list[TrainResult]:
        """Take all steps.

        Returns:
            One result per job.
        """
        losses: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        for step in range(len(self._jobs[0].schedule)):
            with lock:
                loss, norm = self._step(step)
            losses.append(loss)
            norms.append(norm)
            on_step()
        return self._results(losses, norms)

    def _step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step of each adapter that has one.

        Returns:
            Losses and norms of these adapters, on the device.
        """
        active = sum(len(job.schedule) > step for job in self._jobs)
        parts = [_adapter_rows(job.schedule[step], job.config) for job in self._jobs[:active]]
        losses, gradient = self._accumulate(parts)
        for row, job in enumerate(self._jobs[:active]):
            if job.config.frozen_rank:
                freeze(self._layout.views(gradient[row]), job.config.frozen_rank)
        norms = clip(gradient, self._limits[:active])
        rates = [
            job.config.learning_rate * min(1.0, (taken + step + 1) / job.config.warmup_steps)
            for job, taken in zip(self._jobs[:active], self._taken, strict=False)
        ]
        betas = [job.config.betas for job in self._jobs[:active]]
        self._optimizer.step(gradient, rates, betas)
        return losses, norms

    def _accumulate(self, parts: Sequence[AdapterRows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a step, with smaller passes where memory runs out.

        Returns:
            Losses (n,) and gradients (n, P), fp32 on the device; valid until the next step.
        """
        while True:
            passes = split_into_passes(parts, self._pass_tokens)
            try:
                return self._accumulate_passes(passes, len(parts))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            largest = max(sum(len(row.ids) for part in of_pass for row in part.rows) for _, of_pass in passes)
            if all(sum(len(part.rows) for part in of_pass) == 1 for _, of_pass in passes):
                failure.__traceback__ = None  # it keeps the tensors of the failed attempt alive
                raise OutOfMemoryError.of_one_row(largest) from failure
            failure.__traceback__ = None
            self._shared.release()
            self._pass_tokens = (min(largest, self._pass_tokens) + 1) // 2

    def _accumulate_passes(
        self, passes: Sequence[tuple[int, Sequence[AdapterRows]]], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(passes) == 1 and len(passes[0][1]) == count:
            losses, gradients = self._shared.run(self._weights[:count], passes[0][1])
            return losses.clone(), gradients  # the next pass overwrites both
        losses = torch.zeros(count, device=self._device)
        gradients = torch.zeros_like(self._weights[:count])
        for first, of_pass in passes:
            rows = slice(first, first + len(of_pass))
            loss, gradient = self._shared.run(self._weights[rows], of_pass)
            losses[rows] += loss
            gradients[rows] += gradient
        return losses, gradients

    def _results(self, losses: Sequence[torch.Tensor], norms: Sequence[torch.Tensor]) -> list[TrainResult]:
        stacks = (self._weights, self._optimizer.exp_avg, self._optimizer.exp_avg_sq)
        rows = [stack[row] for row in range(len(self._jobs)) for stack in stacks]
        fetching = Fetching(rows) if self._on_host else None
        try:
            # Thousands of views are made while the device computes.
            views = [self._layout.views(row) for row in (fetching.copies if fetching else rows)]
            of_steps = [(loss.tolist(), norm.tolist()) for loss, norm in zip(losses, norms, strict=True)]
        finally:
            if fetching:
                fetching.wait()
        results = []
        for row, job in enumerate(self._jobs):
            steps = len(job.schedule)
            optimizer: Tensors = {"step": torch.tensor([float(self._taken[row] + steps)])}
            weights, *moments = views[3 * row : 3 * row + 3]
            for name, moment in zip(MOMENTS, moments, strict=True):
                optimizer |= {f"{name}.{tensor}": view for tensor, view in moment.items()}
            results.append(
                TrainResult(
                    weights=weights,
                    optimizer=optimizer,
                    losses=tuple(loss[row] for loss, _ in of_steps[:steps]),
                    norms=tuple(norm[row] for _, norm in of_steps[:steps]),
                    tokens=sum(row.tokens for rows in job.schedule for row in rows),
                )
            )
        return results


def _adapter_rows(rows: Sequence[TokenRow], config: TrainConfig) -> AdapterRows:
    """Return an adapter's rows of one step, those with `like_base` last and like lengths together, as `train` has them."""
    text, base = (sum(row.tokens for row in rows if row.like_base is kind) for kind in (False, True))
    return AdapterRows(
        rows=sorted(rows, key=lambda row: (row.like_base, len(row.ids))),
        text_weight=1 / text if text else 0.0,
        base_weight=config.like_base_weight / base if base else 0.0,
        pad=config.pad,
    )


def to_host(results: Sequence[TrainResult], layout: Layout, hot: HotStates) -> list[TrainResult]:
    """Return results of `train_together` with tensors of their own on the host, and keep copies on the device.

    Results share the memory of all adapters of a round until then. All are fetched in one call of one thread: every thread
    that makes thousands of views holds up the one that launches the next round.

    Args:
        results: Results whose tensors are on the base's device, which may be the host.
        layout: Where each tensor is stored in a row.
        hot: Where the rows on the device are kept.
    """
    prefixes = ("", *(f"{name}." for name in MOMENTS))
    rows: list[torch.Tensor] = []
    for result in results:
        of_names = result.weights | result.optimizer
        rows += [torch.cat([of_names[prefix + name].reshape(-1) for name in layout.names]) for prefix in prefixes]
    fetching = Fetching(rows) if rows and rows[0].is_cuda else None
    try:
        views = [layout.views(row) for row in (fetching.copies if fetching else rows)]
    finally:
        if fetching:
            fetching.wait()
    if fetching:
        for row, of_row in zip(rows, views, strict=True):
            hot.put(list(of_row.values()), row)
    made = []
    for number, result in enumerate(results):
        weights, first, second = (
            {f"{prefix}{name}": view for name, view in of_row.items()}
            for prefix, of_row in zip(prefixes, views[3 * number : 3 * number + 3], strict=True)
        )
        optimizer = {"step": result.optimizer["step"], **first, **second}
        made.append(replace(result, weights=weights, optimizer=optimizer))
    return made
