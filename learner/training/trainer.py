"""Train one adapter over a given schedule of rows. What it is given, and nothing else, decides the new weights.

On a CPU the same weights, rows, config and thread count give the same bits. The optimizer is AdamW (arXiv 1711.05101),
and its moments are carried from update to update, so that a micro-batch continues the run instead of starting it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from perennial.learner.model.lora import Lora, Tensors, load_tensors, rank_axis
from perennial.learner.model.loss import autocast, ignore_step, training_losses, within_memory
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.averaging.slow_average import AVERAGED, check_count, stored_shapes
from perennial.storage.errors import IntegrityError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Prefixes of the moments' names in an optimizer state."""
_STEP = "step"


@dataclass(frozen=True)
class TrainConfig:
    """The hyperparameters of training.

    Attributes:
        learning_rate: Rate after the warm-up, constant.
        clip_norm: Largest gradient norm of a step; a larger gradient is scaled down to it.
        pad: Token id to pad rows with.
        warmup_steps: Steps over which the rate rises linearly, once in an adapter's life.
        micro_rows: Most rows in one forward and backward pass; the gradients of a step are accumulated over passes.
        betas: AdamW's decay rates of the first and second moment.
        packed_tokens: Most tokens of a forward pass, in which the rows lie one behind the other without padding; 0: the
            rows of a pass are padded to the longest.
        like_base_weight: Weight of the divergence from the frozen base, on the rows that have `like_base`.
        frozen_rank: Number of rows at the beginning of each A, and of columns of each B, that are not trained.
    """

    learning_rate: float
    clip_norm: float
    pad: int
    warmup_steps: int = 10
    micro_rows: int = 16
    betas: tuple[float, float] = (0.9, 0.99)
    packed_tokens: int = 0
    like_base_weight: float = 1.0
    frozen_rank: int = 0


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        weights: New LoRA tensors by name, fp32 on the CPU.
        optimizer: AdamW moments (shaped as the weights) and step count (1,), fp32 on the CPU.
        losses: Loss of each step's rows before the step changed the weights, nats per token; see `train`.
        norms: Gradient norm of each step before clipping.
        tokens: Number of trained tokens over all steps.
        adapters: Most adapters that shared a pass of it.
    """

    weights: Tensors
    optimizer: Tensors
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    tokens: int
    adapters: int = 1

    def after(self, earlier: TrainResult) -> TrainResult:
        """Return the result of both runs, of which this one continued the earlier one."""
        return replace(
            self, losses=earlier.losses + self.losses, norms=earlier.norms + self.norms,
            tokens=earlier.tokens + self.tokens, adapters=max(earlier.adapters, self.adapters),
        )  # fmt: skip


def steps_taken(optimizer: Mapping[str, torch.Tensor] | None) -> int:
    """Return the number of optimizer steps that an adapter has had; 0 without an optimizer state."""
    return int(optimizer[_STEP].item()) if optimizer else 0


def optimizer_from_bytes(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Read an optimizer state from stored bytes.

    Args:
        data: Content of a safetensors file.
        shapes: Shape of each LoRA tensor by name, as in `Lora.shapes`.

    Raises:
        IntegrityError: The bytes are not an optimizer state of a LoRA with these shapes.
    """
    state = load_tensors(data)
    expected = {f"{moment}.{name}": shape for name, shape in shapes.items() for moment in MOMENTS} | {_STEP: (1,)}
    if AVERAGED in state:
        expected |= stored_shapes(shapes)
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != expected:
        raise IntegrityError(
            "an optimizer state belongs to another adapter",
            got=sorted(got.items() ^ expected.items())[:2],
            allowed=f"two moments for each of {len(shapes)} tensors, and its fast weights where updates are averaged",
            remedy="use the base and the rank that the adapter's manifest names",
        )
    check_count(state)
    return state


def train(
    lora: Lora,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, torch.Tensor] | None,
    schedule: Sequence[Sequence[TokenRow]],
    config: TrainConfig,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> TrainResult:
    """Train the slot from `weights`, one optimizer step per entry of the schedule.

    The loss of a step is the sum over its trainable tokens divided by their number. Rows that have `like_base` are
    counted apart: their divergence from the frozen base per token, times its weight, is added to the loss of the other
    rows. Where memory runs out, the rows per forward pass are halved and the step begins again.

    Args:
        lora: Slot to train in; what it held before has no effect.
        weights: LoRA tensors by name to start from.
        optimizer_state: Moments and step count to continue from; None for an adapter's first training.
        schedule: Rows of each step.
        config: Rate, clipping and batch size.
        lock: Lock on the base, held for each step, so that others can use the base between steps: a fair one (see
            `FairLock`), for with a plain lock this thread may take every turn.
        on_step: Called after each optimizer step, without the lock; it has no effect on the result.

    Raises:
        AdapterError: The weights do not fit the slot.
        OutOfMemoryError: A single row does not fit the memory.
    """
    lora.load(weights)
    optimizer = _optimizer(lora, optimizer_state, config)
    taken = steps_taken(optimizer_state)
    losses: list[float] = []
    norms: list[float] = []
    tokens = 0
    micro_rows = config.micro_rows
    for number, rows in enumerate(schedule, start=taken + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, number / config.warmup_steps)
        with lock or nullcontext():
            lora.select()
            loss, micro_rows = _accumulate_gradients(lora, optimizer, rows, config, micro_rows)
            if config.frozen_rank:
                freeze({name: p.grad for name, p in lora.parameters.items() if p.grad is not None}, config.frozen_rank)
            norm = torch.nn.utils.clip_grad_norm_(list(lora.parameters.values()), config.clip_norm)
            optimizer.step()
        losses.append(loss)
        norms.append(float(norm))
        tokens += sum(row.tokens for row in rows)
        on_step()
    optimizer.zero_grad(set_to_none=True)
    return TrainResult(
        weights=lora.weights(),
        optimizer=_optimizer_state(lora, optimizer, taken + len(schedule)),
        losses=tuple(losses),
        norms=tuple(norms),
        tokens=tokens,
    )


def freeze(gradients: Mapping[str, torch.Tensor], rank: int) -> None:
    """Set the gradients of the frozen part to zero in place. Without a gradient AdamW changes no bit of it.

    Args:
        gradients: Gradients by PEFT name, A (r, inputs) and B (outputs, r).
        rank: Rows of A and columns of B that are frozen.
    """
    for name, gradient in gradients.items():
        gradient.narrow(rank_axis(name), 0, rank).zero_()


def _accumulate_gradients(
    lora: Lora, optimizer: torch.optim.Optimizer, rows: Sequence[TokenRow], config: TrainConfig, micro_rows: int
) -> tuple[float, int]:
    """Put the gradient of one step into the parameters.

    Returns:
        The loss of the step, nats per token, and the most rows per pass that fitted the memory.
    """
    device = torch.device(lora.base.device)
    ordered = sorted(rows, key=lambda row: (row.like_base, len(row.ids)))  # like lengths together: less padding
    text_tokens, base_tokens = (
        sum(row.tokens for row in rows if row.like_base is like_base) for like_base in (False, True)
    )
    packed = config.packed_tokens > 0

    def accumulate(micro_rows: int) -> float:
        optimizer.zero_grad(set_to_none=True)  # an attempt that ran out of memory left a part of the gradient
        nats = 0.0
        for together in _passes(ordered, micro_rows, config.packed_tokens):
            with autocast(device, lora.compute_dtype):
                losses, divergences = training_losses(lora, together, device, config.pad, packed=packed)
            parts = []
            if len(losses):
                parts.append(losses.sum() / text_tokens)
            if len(divergences):
                parts.append(divergences.sum() / base_tokens * config.like_base_weight)
            loss = sum(parts[1:], parts[0])
            loss.backward()  # type: ignore[no-untyped-call]
            nats += loss.item()
        return nats

    return within_memory(accumulate, ordered, micro_rows)


def _passes(ordered: Sequence[TokenRow], micro_rows: int, max_tokens: int) -> list[list[TokenRow]]:
    """Return the rows in forward passes, in their order.

    Args:
        ordered: Rows.
        micro_rows: Most rows per pass.
        max_tokens: Most tokens per pass, but for a single row that has more; 0: any number.
    """
    passes: list[list[TokenRow]] = []
    tokens = 0
    for row in ordered:
        tokens += len(row.ids)
        if not passes or len(passes[-1]) == micro_rows or (max_tokens and tokens > max_tokens):
            passes.append([])
            tokens = len(row.ids)
        passes[-1].append(row)
    return passes


def _optimizer(lora: Lora, state: Mapping[str, torch.Tensor] | None, config: TrainConfig) -> torch.optim.AdamW:
    parameters = list(lora.parameters.items())
    # No weight decay: over many updates it would undo what an idle adapter has learned.
    optimizer = torch.optim.AdamW(
        [p for _, p in parameters], lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True
    )
    if state is not None:
        for name, parameter in parameters:
            moments = {m: state[f"{m}.{name}"].to(parameter.device, copy=True) for m in MOMENTS}
            step = torch.tensor(float(steps_taken(state)), device=parameter.device)
            optimizer.state[parameter] = {_STEP: step, **moments}
    return optimizer


def _optimizer_state(lora: Lora, optimizer: torch.optim.AdamW, steps: int) -> Tensors:
    """Return the moments and step count as they are stored: zeros for a parameter that had no step yet."""
    state: Tensors = {_STEP: torch.tensor([float(steps)])}
    for name, parameter in lora.parameters.items():
        for moment in MOMENTS:
            current = optimizer.state.get(parameter, {}).get(moment)
            tensor = torch.zeros_like(parameter) if current is None else current
            state[f"{moment}.{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state
