"""Decoding of answers with a cache of keys and values: a batch of prompts at a time, one token per forward pass.

transformers' own `generate` would hold the lock on the base for the whole answer, and it ends in an error where a
logit is not finite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import autocast, ignore_step


@dataclass(frozen=True)
class Sampling:
    """Draw tokens at random instead of taking the most probable one.

    Attributes:
        temperature: Divisor of the logits, above 0.
        generator: Random numbers, on the CPU.
    """

    temperature: float
    generator: torch.Generator


@dataclass(frozen=True)
class Decoded:
    """What was generated after one prompt.

    Attributes:
        ids: Token ids, without the one that ended it.
        ended: True if a stop token ended it; False if it was cut.
        finite: False if a logit was NaN or infinite; `ids` ends before it.
    """

    ids: tuple[int, ...]
    ended: bool
    finite: bool = True


def decode(
    lora: Lora,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Collection[int],
    pad: int,
    adapted: bool,
    sampling: Sampling | None = None,
    max_rows: int = 32,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> list[Decoded]:
    """Generate up to `max_tokens` tokens after each prompt, by default greedily.

    Args:
        lora: Slot over the base.
        prompts: Token ids of each prompt, at least one each.
        max_tokens: Most tokens to generate per prompt.
        stop: Token ids that end an answer.
        pad: Token id to pad shorter prompts with; its value has no effect.
        adapted: True to compute with the slot's weights, False for the frozen base.
        sampling: How to draw tokens; None takes the most probable one.
        max_rows: Most prompts in one forward pass.
        lock: Lock on the base, held for each forward pass, so that others can use the base in between.
        on_step: Called after each forward pass, without the lock.

    Returns:
        What was generated, in the order of the prompts.
    """
    padded = "position_ids" in inspect.signature(lora.model.forward).parameters
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    found: dict[int, Decoded] = {}
    while order:
        width = len(prompts[order[0]])
        # A model that takes no positions cannot be told which tokens are padding: prompts of one length at a time.
        batch = [index for index in order[:max_rows] if padded or len(prompts[index]) == width]
        order = order[len(batch) :]
        decoder = _Decoder(lora, [prompts[index] for index in batch], pad, adapted=adapted, lock=lock)
        found.update(zip(batch, decoder.run(max_tokens, frozenset(stop), sampling, on_step), strict=True))
    return [found[index] for index in range(len(prompts))]


class _Decoder:
    """One batch: the rows that still generate, their mask and positions, and the cache of what they have seen."""

    def __init__(
        self,
        lora: Lora,
        prompts: Sequence[Sequence[int]],
        pad: int,
        *,
        adapted: bool,
        lock: AbstractContextManager[object] | None,
    ) -> None:
        self._lora = lora
        self._adapted = adapted
        self._lock = lock
        self._device = torch.device(lora.base.device)
        width = max(map(len, prompts))
        self._ids = torch.full((len(prompts), width), pad, dtype=torch.long)  # (B, T), padded on the left
        self._mask = torch.zeros((len(prompts), width), dtype=torch.long)  # (B, T)
        for row, prompt in enumerate(prompts):
            self._ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            self._mask[row, width - len(prompt) :] = 1
        self._is_padded = bool((self._mask == 0).any())
        self._cache: Any = None

    def run(
        self, max_tokens: int, stop: frozenset[int], sampling: Sampling | None, on_step: Callable[[], None]
    ) -> list[Decoded]:
        rows = list(range(len(self._ids)))
        answers: list[list[int]] = [[] for _ in rows]
        ends: dict[int, tuple[bool, bool]] = {}  # (ended, finite) of the rows that are done
        for _ in range(max_tokens):
            logits = self._next_logits()  # (rows, V)
            on_step()
            finite = logits.isfinite().all(-1).tolist()
            tokens = _choose(torch.nan_to_num(logits), sampling)  # (rows, 1)
            for place, (row, token) in enumerate(zip(rows, tokens[:, 0].tolist(), strict=True)):
                if row in ends:
                    continue
                if not finite[place] or token in stop:
                    ends[row] = (finite[place], finite[place])
                else:
                    answers[row].append(token)
            if len(ends) == len(answers):
                break
            self._ids = tokens
            self._mask = torch.cat((self._mask, torch.ones((len(rows), 1), dtype=torch.long)), 1)
            rows = self._without_ended(rows, ends)
        return [Decoded(tuple(answer), *ends.get(row, (False, True))) for row, answer in enumerate(answers)]

    def _next_logits(self) -> torch.Tensor:
        """Return the logits of the next token of each row, (B, V), fp32 on the CPU."""
        lora = self._lora
        more: dict[str, Any] = {}
        if self._is_padded:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]  # (B, T)
            more = {"attention_mask": self._mask.to(self._device), "position_ids": positions.to(self._device)}
        with self._lock or nullcontext():
            if self._adapted:
                lora.select()
            with nullcontext() if self._adapted else lora.disabled(), torch.no_grad(), autocast(self._device):
                made = lora.model(
                    input_ids=self._ids.to(self._device), past_key_values=self._cache, use_cache=True, **more
                )
        self._cache = made.past_key_values
        return made.logits[:, -1].float().cpu()  # type: ignore[no-any-return]

    def _without_ended(self, rows: list[int], ends: dict[int, tuple[bool, bool]]) -> list[int]:
        """Drop the rows that have ended, once they are half of the batch: they cost as much as the others."""
        kept = [place for place, row in enumerate(rows) if row not in ends]
        if 2 * len(kept) > len(rows) or not hasattr(self._cache, "batch_select_indices"):
            return rows
        chosen = torch.tensor(kept)
        self._cache.batch_select_indices(chosen.to(self._device))
        self._ids, self._mask = self._ids[chosen], self._mask[chosen]
        return [rows[place] for place in kept]


def _choose(logits: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
    """Return the next token of each row, (B, 1)."""
    if sampling is None:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=sampling.generator)
