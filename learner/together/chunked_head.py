"""The losses of hidden states and their gradient, computed in chunks, so that few logits are in memory at a time.

The weight of each token's loss is known before the loss is, and the head is frozen. So the gradient of a chunk is
computed while its logits are there, and nothing is computed again in the backward pass (as in Liger, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from perennial.learner.bases.frozen_weights import cast_once
from perennial.learner.together.kernels.head_losses import cross_entropy_, divergence_, has_kernels

CHUNK_TOKENS = {"cuda": 4096, "cpu": 256}


@torch.no_grad()
def losses_and_gradient(
    head: Any, hidden: torch.Tensor, base: torch.Tensor | None, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of each token, and the gradient of the weighted sum of the losses.

    Args:
        head: Output embedding of the base, a linear layer.
        hidden: Last hidden states (N, d); the first N - M are trained as text, the rest towards the base.
        base: Hidden states of the frozen base (M, d) for the last M tokens; None where M is 0.
        labels: Token ids (N,).
        weights: Weight of each token's loss (N,).

    Returns:
        Losses (N,) in nats, fp32: cross-entropy of the first N - M, KL(base ‖ adapter) of the others. And the gradient
        (N, d) in the number format of `hidden`.
    """
    size = CHUNK_TOKENS["cuda" if hidden.is_cuda else "cpu"]
    weight, bias = _cast(head, hidden.dtype)
    base = hidden[:0] if base is None else base
    of_text = len(hidden) - len(base)
    nats = torch.empty(len(hidden), device=hidden.device)
    gradient = torch.empty_like(hidden)
    in_place = hidden.is_cuda and has_kernels()
    for start in range(0, of_text, size):
        part = slice(start, min(start + size, of_text))
        slopes = linear(hidden[part], weight, bias)
        if in_place:
            cross_entropy_(slopes, labels[part], weights[part], nats[part])
        else:
            nats[part], slopes = _cross_entropy(slopes.float(), labels[part], weights[part])
        torch.mm(slopes.to(hidden.dtype), weight, out=gradient[part])
    for start in range(of_text, len(hidden), size):
        part = slice(start, start + size)
        teacher = linear(base[start - of_text : start - of_text + size], weight, bias)
        slopes = linear(hidden[part], weight, bias)
        if in_place:
            divergence_(slopes, teacher, weights[part], nats[part])
        else:
            nats[part], slopes = _divergence(slopes.float(), teacher.float(), weights[part])
        torch.mm(slopes.to(hidden.dtype), weight, out=gradient[part])
    return nats, gradient


@torch.no_grad()
def token_losses(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss of each token.

    Args:
        head: Output embedding of the base, a linear layer.
        hidden: Last hidden states (N, d).
        labels: Token ids (N,).

    Returns:
        Losses (N,) in nats, fp32.
    """
    size = CHUNK_TOKENS["cuda" if hidden.is_cuda else "cpu"]
    weight, bias = _cast(head, hidden.dtype)
    nats = torch.empty(len(hidden), device=hidden.device)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        nats[part] = cross_entropy(linear(hidden[part], weight, bias).float(), labels[part], reduction="none")
    return nats


def _cast(head: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight and the bias of the head in a number format."""
    return cast_once(head.weight, dtype), None if head.bias is None else cast_once(head.bias, dtype)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy (C,) of logits (C, V), and the derivatives of its weighted sum by the logits."""
    logits = logits.requires_grad_()
    with torch.enable_grad():
        nats = cross_entropy(logits, labels, reduction="none")
    (slopes,) = torch.autograd.grad(nats, logits, weights)
    return nats.detach(), slopes


def _divergence(
    logits: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(teacher ‖ logits) (C,) of logits (C, V), and the derivatives of its weighted sum by the logits."""
    log_student, log_teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    probabilities = log_teacher.exp()
    nats = (probabilities * (log_teacher - log_student)).sum(-1)
    return nats, log_student.exp_().sub_(probabilities).mul_(weights[:, None])
