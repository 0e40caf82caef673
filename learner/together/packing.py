"""Rows of several adapters packed into one row of tokens, and the tensors that a pass computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch

from perennial.learner.model.tokenization import TokenRow

_LARGE = 4096
ALIGNMENT = 8
"""Grouped matrix products on a GPU read 16 bytes at a time, which are 8 numbers in bf16."""


_Trained = tuple[int, int, float, int]
"""A trained token: where it is predicted, its id, the weight of its loss, its adapter."""


@dataclass(frozen=True)
class PackedRows:
    """One row of T tokens: the documents of n adapters, sorted by adapter, each adapter's tokens one behind the other.

    A document is one `TokenRow`; the tokens that fill up an adapter's part are documents too, of which nothing is
    trained. Of the N trained tokens, those that are trained as text come first, then the M of rows with `like_base`.

    Attributes:
        ids: Token ids (T,).
        positions: Position of each token in its document (T,).
        starts: First token of each document, and T (D + 1,), int32.
        ends: End of each adapter's tokens (n,), int32.
        predicting: Tokens whose next token is trained (N,).
        gathered_from: For each token its place in `predicting`, and N where its next token is not trained (T,).
        labels: The trained tokens (N,).
        weights: Weight of each trained token's loss in its adapter's loss (N,), fp32.
        adapters: Adapter of each trained token (N,).
        lengths: Length of each document, in tokens.
        longest: Most tokens of a document, or a larger number.
        bounds: First token of each adapter, and T.
        like_base: M, the number of trained tokens of rows that have `like_base`.
        tokens: Number of tokens without those that fill up.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    predicting: torch.Tensor
    gathered_from: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    adapters: torch.Tensor
    lengths: tuple[int, ...]
    longest: int
    bounds: tuple[int, ...]
    like_base: int
    tokens: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names of their fields."""
        return {
            field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), torch.Tensor)
        }

    def to(self, device: torch.device) -> PackedRows:
        """Return the same rows with their tensors on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Size:
    """Numbers to fill packed rows up to, so that passes over different rows have tensors of the same shapes.

    Attributes:
        adapters: n.
        tokens: T.
        documents: D.
        longest: Most tokens of a document.
        text: N - M.
        like_base: M.
    """

    adapters: int
    tokens: int
    documents: int
    longest: int
    text: int
    like_base: int

    @classmethod
    def holding(cls, parts: Sequence[AdapterRows]) -> Size:
        """Return a size that the rows of adapters fit into, one of few: at most an eighth of it is filled up.

        Of a large pass, which waits less for launches and is computed more often without a graph, at most a sixteenth.
        """
        adapters = _power_of_two(len(parts))
        used = [sum(len(row.ids) for row in part.rows) for part in parts] + [0] * (adapters - len(parts))
        tokens = _eighths(sum(-(-max(1, number) // ALIGNMENT) * ALIGNMENT for number in used))
        rows = [row for part in parts for row in part.rows]
        longest = _power_of_two(max([64, *(len(row.ids) for row in rows)]))
        text, like_base = (sum(row.tokens for row in rows if row.like_base is kind) for kind in (False, True))
        documents = _power_of_two(len(rows) + adapters + -(-tokens // longest))
        return cls(adapters, tokens, documents, longest, _eighths(text), _eighths(like_base))


def _power_of_two(number: int) -> int:
    """Return the least power of two that is at least the number."""
    return 1 << max(0, number - 1).bit_length()


def _eighths(number: int) -> int:
    """Return the least multiple of an eighth of the power of two below the number, and of 64, that is at least it.

    From `_LARGE` on of a sixteenth.
    """
    below = _power_of_two(number + 1) // 2
    step = max(64, below // (8 if below < _LARGE else 16))
    return -(-number // step) * step


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one adapter in a pass.

    Attributes:
        rows: Rows; may be empty.
        text_weight: Weight of the loss of a token that is trained as text.
        base_weight: Weight of the divergence of a token of a row that has `like_base`.
        pad: Token id to fill up with.
    """

    rows: Sequence[TokenRow]
    text_weight: float
    base_weight: float
    pad: int


def pack(parts: Sequence[AdapterRows], size: Size | None = None) -> PackedRows:
    """Pack the rows of adapters.

    Args:
        parts: Rows of each adapter, in the order of the stacked weights.
        size: Numbers to fill up to; None: every adapter's tokens are filled up to a multiple of `ALIGNMENT`, nothing else.
    """
    if size is not None:
        parts = [*parts, *[AdapterRows((), 0.0, 0.0, parts[-1].pad)] * (size.adapters - len(parts))]
    ids: list[int] = []
    lengths: list[int] = []
    bounds = [0]
    text: list[_Trained] = []
    like_base: list[_Trained] = []
    for adapter, part in enumerate(parts):
        for row in part.rows:
            start = len(ids)
            ids.extend(row.ids)
            lengths.append(len(row.ids))
            weight = part.base_weight if row.like_base else part.text_weight
            (like_base if row.like_base else text).extend(
                (start + place - 1, row.ids[place], weight, adapter) for place in row.trained_places
            )
        fill = -(len(ids) - bounds[-1]) % ALIGNMENT or (0 if part.rows else ALIGNMENT)
        if size is not None and adapter == len(parts) - 1:
            fill += max(0, size.tokens - len(ids) - fill)
        ids.extend([part.pad] * fill)
        longest = fill if size is None else size.longest
        lengths.extend(min(longest, fill - start) for start in range(0, fill, longest or 1))
        bounds.append(len(ids))
    if size is not None:
        lengths.extend([0] * (size.documents - len(lengths)))
        # The last token predicts nothing, so what fills up the trained tokens reads its hidden state.
        nothing: _Trained = (len(ids) - 1, 0, 0.0, 0)
        text.extend([nothing] * (size.text - len(text)))
        like_base.extend([nothing] * (size.like_base - len(like_base)))
    trained = [*text, *like_base]
    predicting = torch.tensor([place for place, _, _, _ in trained], dtype=torch.long)
    gathered_from = torch.full((len(ids),), len(trained), dtype=torch.long)
    gathered_from[predicting] = torch.arange(len(trained))
    gathered_from[-1] = len(trained)
    return PackedRows(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        ends=torch.tensor(bounds[1:], dtype=torch.int32),
        predicting=predicting,
        gathered_from=gathered_from,
        labels=torch.tensor([label for _, label, _, _ in trained], dtype=torch.long),
        weights=torch.tensor([weight for _, _, weight, _ in trained], dtype=torch.float32),
        adapters=torch.tensor([adapter for _, _, _, adapter in trained], dtype=torch.long),
        lengths=tuple(lengths),
        longest=max(lengths) if size is None else size.longest,
        bounds=tuple(bounds),
        like_base=len(like_base),
        tokens=sum(len(row.ids) for part in parts for row in part.rows),
    )
