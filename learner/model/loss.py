"""The loss of token rows under the base or an adapter: one forward pass shared by scoring, gate and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch.nn.functional import cross_entropy, kl_div

from perennial.learner.model.lora import Lora
from perennial.learner.model.tokenization import TokenRow
from perennial.storage.errors import PerennialError

_PACKED_TOLERANCE = 0.02
"""Largest difference between logits, as a share of the largest one, that counts as rounding."""
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"

T = TypeVar("T")


def ignore_step() -> None:
    """Do nothing: the `on_step` of a caller that does not want to know of each step."""


class OutOfMemoryError(PerennialError):
    """A single row does not fit the memory."""

    @classmethod
    def of_one_row(cls, tokens: int) -> OutOfMemoryError:
        """Return the error of passes of one row each, the longest of so many tokens."""
        return cls(
            got=f"one row at a time, of up to {tokens} tokens",
            allowed="rows that fit the memory next to the base",
            remedy="lower PERENNIAL_ROW_TOKENS, or use a smaller base or a larger machine",
        )


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row.

    Attributes:
        nats: Sum of the losses of the row's trainable tokens, in nats.
        tokens: Number of these tokens.
    """

    nats: float
    tokens: int


def mean_nats(losses: Sequence[RowLoss]) -> float:
    """Return the mean loss over the tokens of all rows, not the mean of the rows' means; 0 where there are no tokens."""
    tokens = sum(loss.tokens for loss in losses)
    return sum(loss.nats for loss in losses) / tokens if tokens else 0.0


def token_losses(model: Any, rows: Sequence[TokenRow], device: torch.device, pad: int) -> torch.Tensor:
    """Compute the loss of every trainable token of the rows in one forward pass.

    Args:
        model: Causal language model, with the wanted slot selected or disabled.
        rows: B rows, at least one.
        device: Device of the model.
        pad: Token id to pad with; its value changes no loss.

    Returns:
        Tensor (N,) of nats, fp32 on the device: the trainable tokens of the rows in row order.
    """
    logits, labels = _trained_logits(model, rows, device, pad, packed=False)
    return cross_entropy(logits, labels, reduction="none")


def training_losses(
    lora: Lora, rows: Sequence[TokenRow], device: torch.device, pad: int, *, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what training lowers, in one forward pass, and one of the frozen base over the rows that have `like_base`.

    A loss on the tokens of a text compares the predictions with one drawn token each. The divergence compares them with
    all that the base holds possible, so its gradient is zero where the slot predicts as the base does: distillation
    (Hinton et al. 2015, arXiv 1503.02531) with the base as the teacher.

    Args:
        lora: Slot over the base, selected.
        rows: B rows, at least one, those that have `like_base` last.
        device: Device of the model.
        pad: Token id to pad with; its value changes nothing.
        packed: Put the rows one behind the other instead of padding them, where the model can; see `_packs`.

    Returns:
        Two tensors (N,) of nats, fp32 on the device, by trainable token in row order: the loss on the rows that are
        trained as text, and the Kullback-Leibler divergence KL(base ‖ slot) on those that have `like_base`.
    """
    packed = packed and _packs(lora.model)
    like_base = [row for row in rows if row.like_base]
    base = None
    if like_base:
        with lora.disabled(), torch.no_grad():
            base = _trained_logits(lora.model, like_base, device, pad, packed=packed)[0].log_softmax(-1)  # (N, V)
        lora.select()  # after `disabled`, nothing takes gradients
    logits, labels = _trained_logits(lora.model, rows, device, pad, packed=packed)
    if base is None:
        return cross_entropy(logits, labels, reduction="none"), logits.new_zeros(0)
    of_text = len(labels) - len(base)
    slot = logits[of_text:].log_softmax(-1)
    divergences = kl_div(slot, base, reduction="none", log_target=True).sum(-1)
    return cross_entropy(logits[:of_text], labels[:of_text], reduction="none"), divergences


def _trained_logits(
    model: Any, rows: Sequence[TokenRow], device: torch.device, pad: int, *, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of every trainable token of the rows in one forward pass.

    Logits are computed only at positions whose next token is trained.

    Returns:
        Logits (N, V), fp32, and token ids (N,), in row order, on the device.
    """
    inputs, where, labels = _packed(rows) if packed else _padded(rows, pad)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    where, labels = where.to(device), labels.to(device)
    if has_plain_head(model):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, where))  # (N, V)
    else:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, where)  # (N, V)
    return logits.float(), labels


def _padded(rows: Sequence[TokenRow], pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the model's inputs, where the trained tokens are predicted (N,) into B·T, and these tokens' ids (N,).

    Rows are padded on the right to the longest one. Under a causal mask no real token sees what follows it, so no
    attention mask is needed.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)  # (B, T)
    wanted = torch.zeros((len(rows), width), dtype=torch.bool)  # (B, T): positions whose next token is trained
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        wanted[index, torch.tensor(row.trained_places, dtype=torch.long) - 1] = True
    return {"input_ids": ids}, wanted.flatten().nonzero().squeeze(1), ids[:, 1:][wanted[:, :-1]]


def _packed(rows: Sequence[TokenRow]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the same as `_padded` for rows that lie one behind the other: each token sees its own row alone."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    ids = torch.tensor([token for row in rows for token in row.ids])  # (T,)
    positions = torch.cat([torch.arange(length) for length in lengths])  # (T,)
    row_of = torch.repeat_interleave(lengths)  # (T,)
    starts = accumulate((len(row.ids) for row in rows[:-1]), initial=0)
    places = [start + place for start, row in zip(starts, rows, strict=True) for place in row.trained_places]
    trained = torch.tensor(places, dtype=torch.long)  # (N,)
    mask = (row_of[:, None] == row_of[None, :]).tril()  # (T, T): True where the one may see the other
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask[None, None]}
    return inputs, trained - 1, ids[trained]


def _packs(model: Any) -> bool:
    """Return True if the model computes rows that lie one behind the other as it computes each row alone.

    A model with a recurrent state, or an attention that takes no mask of its own, does not. The answer is measured once
    and kept on the model.
    """
    known = getattr(model, "_packs_rows", None)
    if known is None:
        device = model.get_input_embeddings().weight.device
        rows = [TokenRow((0, 1, 0, 1, 1)), TokenRow((1, 0, 0, 1))]
        with torch.no_grad():
            alone = torch.cat([_trained_logits(model, [row], device, 0, packed=False)[0] for row in rows])
            try:
                together = _trained_logits(model, rows, device, 0, packed=True)[0]
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if is_out_of_memory(error):  # says nothing about the model, and would change the bits of a rebuild
                    raise
                known = False
            else:
                known = bool((together - alone).abs().max() <= _PACKED_TOLERANCE * alone.abs().max())
        model._packs_rows = known  # noqa: SLF001 - a fact about this model, asked at every step
    return bool(known)


def next_token_logits(model: Any, ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the logits of the token that follows a row.

    Args:
        model: Causal language model, with the wanted slot selected or disabled.
        ids: T token ids, at least one.
        device: Device of the model.

    Returns:
        Tensor (V,) on the device.
    """
    row = torch.tensor([ids], dtype=torch.long, device=device)  # (1, T)
    if has_plain_head(model):
        hidden = model.base_model(input_ids=row, use_cache=False).last_hidden_state[:, -1]  # (1, D)
        return model.get_output_embeddings()(hidden)[0]  # type: ignore[no-any-return]
    return model(input_ids=row, use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


def has_plain_head(model: Any) -> bool:
    """Return True if the logits are the output embedding of the last hidden state.

    Some model families scale or cap the logits after it. The answer is measured once and kept on the model.
    """
    known = getattr(model, "_plain_head", None)
    if known is None:
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            body = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            known = body is not None and torch.allclose(model.get_output_embeddings()(body), whole, atol=1e-3)
        model._plain_head = known  # noqa: SLF001 - a fact about this model, asked at every step
    return bool(known)


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> AbstractContextManager[object]:
    """Return a context in which matrix products take inputs of a number format.

    Args:
        device: Device of the model.
        dtype: Number format; None: bf16 on a GPU, fp32 on a CPU.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def row_token_losses(
    lora: Lora,
    rows: Sequence[TokenRow],
    *,
    pad: int,
    adapted: bool,
    max_rows: int = 32,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> list[torch.Tensor]:
    """Compute the loss of every trainable token of each row.

    Rows of similar length are computed together, to pad little.

    Args:
        lora: Slot over the base.
        rows: Rows to measure; may be empty.
        pad: Token id to pad with.
        adapted: True to compute with the slot's weights, False for the frozen base.
        max_rows: Most rows in one forward pass; fewer are taken where memory runs out.
        lock: Lock on the base, held for each forward pass, so that others can use the base in between.
        on_step: Called after each forward pass, without the lock.

    Returns:
        One tensor (tokens,) of nats per row, fp64 on the CPU, in the order of `rows`.

    Raises:
        OutOfMemoryError: A single row does not fit the memory.
    """
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    start = 0
    while start < len(order):
        batch = [rows[index] for index in order[start : start + max_rows]]

        def losses_of_first(count: int, batch: list[TokenRow] = batch) -> list[torch.Tensor]:
            return _losses_of_batch(lora, batch[:count], pad, adapted=adapted, lock=lock)

        losses, max_rows = within_memory(losses_of_first, batch, max_rows)
        for index, nats in zip(order[start:], losses, strict=False):
            result[index] = nats
        start += len(losses)
        on_step()
    return result


def _losses_of_batch(
    lora: Lora,
    batch: Sequence[TokenRow],
    pad: int,
    *,
    adapted: bool,
    lock: AbstractContextManager[object] | None,
) -> list[torch.Tensor]:
    device = torch.device(lora.base.device)
    with lock or nullcontext():
        if adapted:
            lora.select()
        with nullcontext() if adapted else lora.disabled(), torch.no_grad(), autocast(device, lora.compute_dtype):
            losses = token_losses(lora.model, batch, device, pad).double().cpu()  # (N,)
    return list(torch.split(losses, [row.tokens for row in batch]))


def within_memory(attempt: Callable[[int], T], rows: Sequence[TokenRow], max_rows: int) -> tuple[T, int]:
    """Call `attempt` with a number of rows per forward pass, and halve the number each time that memory runs out.

    Args:
        attempt: Takes the most rows per forward pass, and computes everything from the beginning with such passes.
        rows: Rows that the attempt computes with, at least one.
        max_rows: Most rows per forward pass in the first attempt.

    Returns:
        The result of the attempt that succeeded, and its most rows per forward pass.

    Raises:
        OutOfMemoryError: A single row per pass does not fit the memory.
    """
    while True:
        try:
            return attempt(max_rows), max_rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        tried = min(max_rows, len(rows))
        if tried == 1:
            longest = max(len(row.ids) for row in rows)
            raise OutOfMemoryError.of_one_row(longest) from failure
        # Hazard: the traceback keeps the tensors of the failed pass alive, so it is dropped before the next attempt.
        failure.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        max_rows = (tried + 1) // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the error says that memory ran out. On a CPU torch raises a RuntimeError for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error)


def row_losses(
    lora: Lora,
    rows: Sequence[TokenRow],
    *,
    pad: int,
    adapted: bool,
    max_rows: int = 32,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> list[RowLoss]:
    """Compute the summed loss of each row, in the order of `rows`; arguments as for `row_token_losses`."""
    losses = row_token_losses(lora, rows, pad=pad, adapted=adapted, max_rows=max_rows, lock=lock, on_step=on_step)
    return [RowLoss(float(nats.sum()), nats.numel()) for nats in losses]
