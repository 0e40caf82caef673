"""The loss of rows under the base or an adapter: the one forward pass that scoring, gate and training share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from perennial.learner.model.lora import Lora
from perennial.learner.model.tokenization import TokenRow
from perennial.storage.errors import PerennialError

EMPTY = 0.0
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class OutOfMemoryError(PerennialError):
    """A single row does not fit the memory."""


@dataclass(frozen=True)
class RowLoss:
    """The summed loss of one row in nats, and over how many tokens."""

    nats: float
    tokens: int


def mean_nats(losses: Sequence[RowLoss]) -> float:
    """Nats per token over all rows: total over total, not a mean of means; 0 without tokens."""
    tokens = sum(loss.tokens for loss in losses)
    return sum(loss.nats for loss in losses) / tokens if tokens else EMPTY


def token_losses(model: Any, rows: Sequence[TokenRow], device: torch.device, pad: int) -> torch.Tensor:
    """Loss of every trainable token of the rows, in row order: (N,) nats, fp32.

    Rows are padded on the right to the longest: under a causal mask no real token sees what follows it, so no
    attention mask is needed. Logits are made only where a token is trained.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)  # (B, T)
    wanted = torch.zeros((len(rows), width), dtype=torch.bool)  # (B, T): positions whose next token is trained
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        wanted[index, row.train_from - 1 : len(row.ids) - 1] = True
    labels = ids[:, 1:][wanted[:, :-1]].to(device)  # (N,)
    where = wanted.flatten().nonzero().squeeze(1).to(device)  # (N,) into B·T
    ids = ids.to(device)
    if _head_is_plain(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, where))  # (N, V)
    else:
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).index_select(0, where)  # (N, V)
    return cross_entropy(logits.float(), labels, reduction="none")


def _head_is_plain(model: Any) -> bool:
    """Whether logits are the output embedding of the last hidden state; some families scale or cap them after it."""
    known = getattr(model, "_plain_head", None)
    if known is None:
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            body = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            known = body is not None and torch.allclose(model.get_output_embeddings()(body), whole, atol=1e-3)
        model._plain_head = known  # noqa: SLF001 - a fact about this model, asked at every step
    return bool(known)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Bf16 where a GPU computes; fp32 on a CPU, whose bytes must repeat."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def row_token_losses(
    lora: Lora,
    rows: Sequence[TokenRow],
    *,
    pad: int,
    adapted: bool,
    max_rows: int = 32,
    lock: AbstractContextManager[object] | None = None,
) -> list[torch.Tensor]:
    """Loss of every trainable token of each row, in the order given: fp64 tensors (tokens,) on the CPU.

    adapted: with the slot's weights, else under the frozen base. Rows of like length are computed together, at most
    max_rows at a time and fewer where memory runs out; the lock is held per batch, so that others can use the base in
    between. Raises OutOfMemoryError.
    """
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    device = torch.device(lora.base.device)
    start = 0
    while start < len(order):
        part = order[start : start + max_rows]
        batch = [rows[index] for index in part]
        try:
            with (
                lock or nullcontext(),
                torch.no_grad(),
                lora.enabled() if adapted else lora.disabled(),
                autocast(device),
            ):
                losses = token_losses(lora.model, batch, device, pad).double().cpu()  # (N,)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            too_many = error
        else:
            for index, piece in zip(part, torch.split(losses, [row.tokens for row in batch]), strict=True):
                result[index] = piece
            start += len(part)
            continue
        max_rows = fewer_rows(batch, too_many)
    return result


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory ran out. On a CPU torch has no type of its own for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error)


def fewer_rows(batch: Sequence[TokenRow], error: BaseException) -> int:
    """How many rows to try after these did not fit. Raises OutOfMemoryError where it was one.

    Hazard: the error's traceback keeps the failed pass's tensors alive, so it is dropped here.
    """
    if len(batch) == 1:
        raise OutOfMemoryError(
            got=f"{len(batch[0].ids)} tokens in a row",
            allowed="what fits beside the base",
            remedy="lower PERENNIAL_ROW_TOKENS, or use a smaller base or a larger machine",
        ) from error
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return (len(batch) + 1) // 2


def row_losses(
    lora: Lora,
    rows: Sequence[TokenRow],
    *,
    pad: int,
    adapted: bool,
    max_rows: int = 32,
    lock: AbstractContextManager[object] | None = None,
) -> list[RowLoss]:
    """Summed loss of each row; see row_token_losses."""
    losses = row_token_losses(lora, rows, pad=pad, adapted=adapted, max_rows=max_rows, lock=lock)
    return [RowLoss(float(nats.sum()), nats.numel()) for nats in losses]
