"""Training of one adapter over a given schedule of rows; nothing else decides what the weights become.

On a CPU the same state, rows, plan and thread count give the same bytes. AdamW (arXiv 1711.05101) with its moments
carried from update to update, so a micro-batch continues the run instead of starting it anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from perennial.learner.model.lora import Lora, Tensors, load_tensors
from perennial.learner.model.loss import autocast, fewer_rows, ran_out, token_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.storage.errors import IntegrityError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
_YIELD_S = 0.001


@dataclass(frozen=True)
class TrainConfig:
    """How to train: rate (constant after one warm-up of the adapter's first steps), clipping, rows per pass."""

    learning_rate: float
    clip_norm: float
    pad: int
    warmup_steps: int = 10
    micro_rows: int = 16
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class TrainResult:
    """The new state and optimizer state, with mean loss (nats per token) and gradient norm of each step."""

    state: Tensors
    optimizer: Tensors
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    tokens: int


def steps_taken(optimizer: Mapping[str, torch.Tensor] | None) -> int:
    """How many optimizer steps an adapter has had."""
    return int(optimizer[_STEP].item()) if optimizer else 0


def optimizer_from_bytes(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """A stored optimizer state. Raises IntegrityError where it is not one of a LoRA with these shapes."""
    state = load_tensors(data)
    expected = {f"{moment}.{name}": shape for name, shape in shapes.items() for moment in _MOMENTS} | {_STEP: (1,)}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != expected:
        raise IntegrityError(
            "an optimizer state belongs to another adapter",
            got=sorted(got.items() ^ expected.items())[:2],
            allowed=f"two moments for each of {len(shapes)} tensors",
            remedy="use the base and the rank that the adapter's manifest names",
        )
    return state


def train(
    lora: Lora,
    state: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, torch.Tensor] | None,
    schedule: Sequence[Sequence[TokenRow]],
    plan: TrainConfig,
    lock: AbstractContextManager[object] | None = None,
) -> TrainResult:
    """Train the slot from `state`, one optimizer step per entry of the schedule.

    The loss of a step is summed over its trainable tokens and divided by their number. Where memory runs out the
    rows per pass are halved and the step begins again; raises OutOfMemoryError where one row is still too much.
    The lock is held per step, so that others can use the base between steps.
    """
    lora.load(state)
    optimizer = _optimizer(lora, optimizer_state, plan)
    taken = steps_taken(optimizer_state)
    losses: list[float] = []
    norms: list[float] = []
    tokens = 0
    micro_rows = plan.micro_rows
    for number, rows in enumerate(schedule, start=taken + 1):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, number / plan.warmup_steps)
        with lock or nullcontext(), lora.enabled():
            loss, micro_rows = _gradients(lora, optimizer, rows, plan, micro_rows)
            norm = torch.nn.utils.clip_grad_norm_(list(lora.parameters.values()), plan.clip_norm)
            optimizer.step()
        losses.append(loss)
        norms.append(float(norm))
        tokens += sum(row.tokens for row in rows)
        if lock is not None:
            time.sleep(_YIELD_S)  # a released lock may be taken again before a waiter wakes up
    optimizer.zero_grad(set_to_none=True)
    return TrainResult(
        state=lora.state(),
        optimizer=_optimizer_state(lora, optimizer, taken + len(schedule)),
        losses=tuple(losses),
        norms=tuple(norms),
        tokens=tokens,
    )


def _gradients(
    lora: Lora, optimizer: torch.optim.Optimizer, rows: Sequence[TokenRow], plan: TrainConfig, micro_rows: int
) -> tuple[float, int]:
    """Accumulate the gradient of a step; gives its loss and the rows per pass that fitted."""
    while True:
        try:
            return _accumulate(lora, optimizer, rows, plan, micro_rows), micro_rows
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            too_many = error
        micro_rows = fewer_rows(rows[:micro_rows], too_many)


def _accumulate(
    lora: Lora, optimizer: torch.optim.Optimizer, rows: Sequence[TokenRow], plan: TrainConfig, micro_rows: int
) -> float:
    device = torch.device(lora.base.device)
    total = sum(row.tokens for row in rows)
    ordered = sorted(rows, key=lambda row: len(row.ids))  # like lengths together: less padding
    optimizer.zero_grad(set_to_none=True)
    nats = 0.0
    for start in range(0, len(ordered), micro_rows):
        with autocast(device):
            loss = token_losses(lora.model, ordered[start : start + micro_rows], device, plan.pad).sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        nats += loss.item()
    return nats


def _optimizer(lora: Lora, state: Mapping[str, torch.Tensor] | None, plan: TrainConfig) -> torch.optim.AdamW:
    parameters = list(lora.parameters.items())
    # No weight decay: it would pull an idle adapter's lessons back to nothing over many updates.
    optimizer = torch.optim.AdamW(
        [p for _, p in parameters], lr=plan.learning_rate, betas=plan.betas, weight_decay=0.0, fused=True
    )
    if state is not None:
        for name, parameter in parameters:
            moments = {m: state[f"{m}.{name}"].to(parameter.device, copy=True) for m in _MOMENTS}
            step = torch.tensor(float(steps_taken(state)), device=parameter.device)
            optimizer.state[parameter] = {_STEP: step, **moments}
    return optimizer


def _optimizer_state(lora: Lora, optimizer: torch.optim.AdamW, steps: int) -> Tensors:
    state: Tensors = {_STEP: torch.tensor([float(steps)])}
    for name, parameter in lora.parameters.items():
        for moment in _MOMENTS:
            kept = optimizer.state.get(parameter, {}).get(moment)
            tensor = torch.zeros_like(parameter) if kept is None else kept
            state[f"{moment}.{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state
