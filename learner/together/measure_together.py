"""Measure the losses of several adapters, and of the frozen base, in the same forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from perennial.learner.model.lora import Lora, check_weights
from perennial.learner.model.loss import OutOfMemoryError, ignore_step, is_out_of_memory, row_token_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.device_states import stacked_rows
from perennial.learner.together.packing import AdapterRows
from perennial.learner.together.shared_pass import SharedPass, packs_together
from perennial.learner.together.splitting import most_pass_tokens, split_into_passes
from perennial.learner.together.stacked_lora import Layout


@dataclass(frozen=True)
class MeasuredRows:
    """The rows that are measured under one adapter.

    Attributes:
        weights: LoRA tensors by name; None for the frozen base.
        rows: Rows; may be empty.
    """

    weights: Mapping[str, torch.Tensor] | None
    rows: Sequence[TokenRow]


def measure_together(
    lora: Lora,
    measured: Sequence[MeasuredRows],
    pad: int,
    *,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
    pass_tokens: int | None = None,
) -> list[list[torch.Tensor]]:
    """Compute the loss of every trainable token of each row under the row's adapter.

    A model that does not compute packed rows as it computes each alone measures one adapter after another, in the slot.

    Args:
        lora: Slot whose layers, rank and scale all adapters have.
        measured: Adapters with their rows.
        pad: Token id to fill up with; its value changes no loss.
        lock: Lock on the base, held for each forward pass.
        on_step: Called after each forward pass, without the lock.
        pass_tokens: Most tokens of a forward pass, but for a single row that has more; None: as `most_pass_tokens` says.

    Returns:
        For each adapter one tensor (tokens,) of nats per row, fp64 on the CPU, in the order of its rows.

    Raises:
        AdapterError: Weights do not fit the slot.
        OutOfMemoryError: A single row does not fit the memory.
    """
    for part in measured:
        if part.weights is not None:
            check_weights(part.weights, lora.shapes)
    with lock or nullcontext():  # another thread may put a slot into the model
        together, pass_tokens = packs_together(lora), pass_tokens or most_pass_tokens(lora)
    if not together:
        return [_in_the_slot(lora, part, pad, lock, on_step) for part in measured]
    parts = [AdapterRows([replace(row, like_base=False) for row in part.rows], 1.0, 0.0, pad) for part in measured]
    passes = split_into_passes(parts, pass_tokens)
    shared = SharedPass.of(lora, graphs=True)
    # The frozen base has zeros, whose products add nothing.
    device, states = torch.device(lora.base.device), [part.weights for part in measured]
    weights = stacked_rows(Layout.of(lora), states, "", device, shared.hot)  # (n, P)
    losses: list[list[torch.Tensor]] = [[] for _ in measured]
    while passes:
        first, of_pass = passes[0]
        try:
            with lock or nullcontext():
                nats = shared.measure(weights[first : first + len(of_pass)], of_pass).double().cpu()  # (N,)
        except (RuntimeError, MemoryError) as error:
            passes[:1] = _halves(first, of_pass, error)
            error.__traceback__ = None  # it keeps the tensors of the failed pass alive
            with lock or nullcontext():
                shared.release()
            continue
        passes.pop(0)
        rows = iter(torch.split(nats, [row.tokens for part in of_pass for row in part.rows]))
        for adapter, of_adapter in enumerate(of_pass, first):
            losses[adapter].extend(next(rows) for _ in of_adapter.rows)
        on_step()
    return losses


def _in_the_slot(
    lora: Lora,
    part: MeasuredRows,
    pad: int,
    lock: AbstractContextManager[object] | None,
    on_step: Callable[[], None],
) -> list[torch.Tensor]:
    if part.weights is not None:
        lora.load(part.weights)
    adapted = part.weights is not None
    return row_token_losses(lora, part.rows, pad=pad, adapted=adapted, lock=lock, on_step=on_step)


def _halves(first: int, of_pass: Sequence[AdapterRows], error: Exception) -> list[tuple[int, list[AdapterRows]]]:
    """Return a pass that did not fit the memory as smaller passes.

    Raises:
        OutOfMemoryError: The pass has a single row.
        Exception: The error itself, where it is another one.
    """
    if not is_out_of_memory(error):
        raise error
    lengths = [len(row.ids) for part in of_pass for row in part.rows]
    if len(lengths) == 1:
        error.__traceback__ = None  # it keeps the tensors of the failed attempt alive
        raise OutOfMemoryError.of_one_row(max(lengths)) from error
    halves = split_into_passes(of_pass, max(1, (sum(lengths) + 1) // 2))
    return [(first + start, part) for start, part in halves]
