"""Attention of packed documents: each token sees the tokens before it in its own document.

On CUDA it is `torch.nn.attention.varlen.varlen_attn`. On a CPU documents of similar length are computed together with
plain matrix products, and the probabilities are computed again in the backward pass: at a few hundred tokens PyTorch's
own attention takes several times as long there, most of it in its backward pass.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:  # torch 2.10 and later
    from torch.nn.attention import varlen

    _varlen_attn: Any = varlen.varlen_attn
    _VARLEN_OPTIONS = frozenset(inspect.signature(_varlen_attn).parameters)
except ImportError:  # pragma: no cover - depends on the installed torch
    _varlen_attn, _VARLEN_OPTIONS = None, frozenset()

NAME: Final = "perennial_packed"
"""Name of this attention in transformers' table."""
_PADDING: Final = 1.25
"""Most times that a document's length may be rounded up so that it is computed together with longer ones."""
_SCORES: Final = 1 << 24
"""Most scores that are computed together on a CPU: 64 MiB in fp32."""
_IGNORED: Final = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "layer_idx"}
)


class UnknownAttentionError(RuntimeError):
    """A model's attention has an argument that packed attention does not know."""


@dataclass(frozen=True)
class _Together:
    """Documents of similar length.

    Attributes:
        tokens: Their tokens (D, L); the last one of a document is repeated.
        mask: True where a query may not see a key (D, 1, 1, L, L), or (L, L) where all have the same length.
    """

    tokens: torch.Tensor
    mask: torch.Tensor


class Documents:
    """Where the documents of a packed row start and end.

    Args:
        lengths: Length of each document, in tokens.
        starts: First token of each document and the end of the last (D + 1,), int32 on the device.
        longest: Most tokens of a document, or a larger number.
    """

    def __init__(self, lengths: Sequence[int], starts: torch.Tensor, longest: int) -> None:
        self.starts = starts
        self.longest = longest
        self.on_cpu = not starts.is_cuda
        self._lengths = lengths
        self._plans: dict[int, tuple[list[_Together], torch.Tensor]] = {}

    def plan(self, window: int) -> tuple[list[_Together], torch.Tensor]:
        """Return the documents by length, and for each token its place among their tokens (T,).

        Args:
            window: Most tokens that a token sees, itself included; 0: all before it.
        """
        if window not in self._plans:
            self._plans[window] = _plan(self._lengths, window)
        return self._plans[window]


def _plan(lengths: Sequence[int], window: int) -> tuple[list[_Together], torch.Tensor]:
    firsts = [0]
    for length in lengths:
        firsts.append(firsts[-1] + length)
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if not lengths[document]:
            continue
        if not groups or lengths[groups[-1][0]] > _PADDING * lengths[document]:
            groups.append([])
        groups[-1].append(document)
    made: list[_Together] = []
    place_of = torch.empty(firsts[-1], dtype=torch.long)
    places = 0
    for group in groups:
        width = lengths[group[0]]
        size = torch.tensor([lengths[document] for document in group])  # (D,)
        first = torch.tensor([firsts[document] for document in group])
        steps = torch.arange(width)
        tokens = first[:, None] + torch.minimum(steps[None], size[:, None] - 1)  # (D, L)
        inside = steps[None] < size[:, None]
        place_of[tokens[inside]] = (places + torch.arange(tokens.numel()).view_as(tokens))[inside]
        places += tokens.numel()
        ahead = steps[None, :] - steps[:, None]  # (L, L): key minus query
        mask = (ahead > 0) | (ahead <= -window) if window else ahead > 0
        made.append(_Together(tokens, mask))
    return made, place_of


class _Current(threading.local):
    """The documents that this thread computes."""

    documents: Documents | None = None


_current = _Current()


@contextmanager
def packed_attention(model: Any, documents: Documents) -> Iterator[None]:
    """Make a model's attention see the documents of a packed row inside the block, in this thread.

    Hazard: that the model uses this attention is set on the model, so its threads compute inside a block of their caller.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    before = [(config, config._attn_implementation) for config in configs.values()]  # noqa: SLF001
    for config, _ in before:
        config._attn_implementation = NAME  # noqa: SLF001
    outer, _current.documents = _current.documents, documents
    try:
        yield
    finally:
        _current.documents = outer
        for config, implementation in before:
            config._attn_implementation = implementation  # noqa: SLF001


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention (1, T, H, d) of query (1, H, T, d), key and value (1, K, T, d), as transformers calls it."""
    unknown = sorted(name for name, given in more.items() if given is not None and name not in _IGNORED)
    if unknown or dropout or query.shape[0] != 1 or not getattr(module, "is_causal", True):
        raise UnknownAttentionError(f"packed attention does not know {unknown or 'this use'}")
    documents = _current.documents
    assert documents is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, d), (T, K, d)
    if documents.on_cpu:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
        out = _Plain.apply(q.to(dtype), k.to(dtype), v.to(dtype), documents.plan(sliding_window or 0), scale)
    else:
        out = _on_cuda(q, k, v, documents, scale, sliding_window)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float, window: int | None
) -> torch.Tensor:
    if _varlen_attn is None:
        raise UnknownAttentionError("this torch has no varlen_attn")
    options: dict[str, Any] = {}
    if "window_size" in _VARLEN_OPTIONS:
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window:
        raise UnknownAttentionError("this torch's varlen_attn takes no window")
    else:
        options["is_causal"] = True
    if "scale" in _VARLEN_OPTIONS:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1] and "enable_gqa" in _VARLEN_OPTIONS:  # older ones take fewer key heads without asking
        options["enable_gqa"] = True
    starts, longest = documents.starts, documents.longest
    attended: torch.Tensor = _varlen_attn(q, k, v, starts, starts, longest, longest, **options)
    return attended


class _Plain(torch.autograd.Function):
    """Attention by matrix products over groups of documents of similar length."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: tuple[list[_Together], torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.scale = plan, scale
        groups, place_of = plan
        outs = []
        for group in groups:
            gathered = _grouped(group, q, k, v)
            out = torch.empty_like(gathered[0])
            for part in _parts(gathered):
                probabilities = _probabilities(gathered[0][part], gathered[1][part], group.mask, scale)
                torch.bmm(probabilities.flatten(0, 1), gathered[2][part].flatten(0, 1), out=out[part].flatten(0, 1))
            outs.append(_ungrouped(out, group, q.shape[1]))
        return torch.cat(outs).index_select(0, place_of)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        groups, place_of = ctx.plan
        (outer,) = gradients
        sums: tuple[list[torch.Tensor], ...] = ([], [], [])
        for group in groups:
            q_, k_, v_ = gathered = _grouped(group, q, k, v)
            # A token that only fills up a shorter document is a copy: what it would send back must not count.
            filling = group.tokens == torch.roll(group.tokens, 1, 1)  # (D, L)
            filling[:, 0] = False
            g_ = _grouped(group, outer, k, v)[0]
            g_ = g_.view(*g_.shape[:2], -1, group.tokens.shape[1], g_.shape[-1]).masked_fill(
                filling[:, None, None, :, None], 0
            )
            g_ = g_.view(q_.shape)
            made = tuple(torch.empty_like(tensor) for tensor in gathered)
            for part in _parts(gathered):
                probabilities = _probabilities(q_[part], k_[part], group.mask, ctx.scale)
                torch.matmul(probabilities.transpose(2, 3), g_[part], out=made[2][part])
                slopes = torch.matmul(g_[part], v_[part].transpose(2, 3)).float()
                p = probabilities.float()
                slopes = (p * (slopes - (p * slopes).sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
                torch.matmul(slopes, k_[part], out=made[0][part])
                torch.matmul(slopes.transpose(2, 3), q_[part], out=made[1][part])
            for total, tensor, like in zip(sums, made, (q, k, v), strict=True):
                total.append(_ungrouped(tensor, group, like.shape[1]))
        return *(torch.cat(total).index_select(0, place_of) for total in sums), None, None


def _grouped(group: _Together, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return q as (D, K, H / K · L, d), and k and v as (D, K, L, d): query heads that share a key head are one matrix."""
    documents, width = group.tokens.shape
    heads, flat = k.shape[1], group.tokens.flatten()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, flat).view(documents, width, heads, -1, tensor.shape[-1]).permute(0, 2, 3, 1, 4)

    # Contiguous: the products write into parts of tensors of the same layout.
    return tuple(gather(tensor).reshape(documents, heads, -1, tensor.shape[-1]).contiguous() for tensor in (q, k, v))


def _ungrouped(tensor: torch.Tensor, group: _Together, heads: int) -> torch.Tensor:
    """Return (D, K, H / K · L, d) as (D · L, H, d)."""
    documents, width = group.tokens.shape
    keys, size = tensor.shape[1], tensor.shape[-1]
    return tensor.view(documents, keys, -1, width, size).permute(0, 3, 1, 2, 4).reshape(documents * width, heads, size)


def _parts(gathered: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Yield slices of the documents, so that few scores are in memory at a time."""
    q, k = gathered[0], gathered[1]
    size = max(1, _SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    for start in range(0, q.shape[0], size):
        yield slice(start, start + size)


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the probabilities (D, K, H / K · L, L), in the number format of q."""
    scores = torch.matmul(q, k.transpose(2, 3)).float().mul_(scale)
    width = mask.shape[0]
    scores.view(*q.shape[:2], -1, width, width).masked_fill_(mask, float("-inf"))
    return scores.softmax(-1).to(q.dtype)
