"""The losses of the head as one kernel over bf16 logits on a GPU: loss and gradient in two reads and one write.

PyTorch's operations would make the logits in fp32 and go over them about eight times; for 128,000 words that takes as long
as the products with the head. The kernels run on a CPU too, in Triton's interpreter, where the tests compare them.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - torch brings Triton on Linux
    triton = None

_BLOCK = 4096
"""Words that are computed at a time."""
_WARPS = 8


def has_kernels() -> bool:
    """Return True if Triton is installed."""
    return triton is not None


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, nats: torch.Tensor) -> None:
    """Compute the cross-entropy of each token, and put the gradient of its weighted sum into the logits.

    Args:
        logits: (N, V), contiguous; afterwards the derivatives by the logits.
        labels: Token ids (N,).
        weights: Weight of each token's loss (N,), fp32.
        nats: Where the losses go (N,), fp32.
    """
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), labels, weights, nats, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
    )


def divergence_(logits: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, nats: torch.Tensor) -> None:
    """Compute KL(teacher ‖ logits) of each token, and put the gradient of its weighted sum into the logits.

    Args:
        logits: (N, V), contiguous; afterwards the derivatives by the logits.
        teacher: Logits of the frozen base (N, V), contiguous.
        weights: Weight of each token's divergence (N,), fp32.
        nats: Where the divergences go (N,), fp32.
    """
    _divergence[(len(logits),)](
        logits, teacher, logits.stride(0), weights, nats, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
    )


_cross_entropy: Any = None
_divergence: Any = None

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _log_sum_exp(logits, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, N803
        most = float("-inf")
        total = 0.0
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < words, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(x, 0))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), 0)
            most = higher
        return most + tl.log(total)

    @triton.jit  # type: ignore[untyped-decorator]
    def _cross_entropy_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
        logits,  # noqa: ANN001
        stride,  # noqa: ANN001
        labels,  # noqa: ANN001
        weights,  # noqa: ANN001
        nats,  # noqa: ANN001
        words,  # noqa: ANN001
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        label = tl.load(labels + row)
        weight = tl.load(weights + row)
        norm = _log_sum_exp(logits, words, BLOCK)
        tl.store(nats + row, norm - tl.load(logits + label).to(tl.float32))
        tl.debug_barrier()  # no warp may overwrite the label's logit before all have read it
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < words
            x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
            slopes = (tl.exp(x - norm) - tl.where(at == label, 1.0, 0.0)) * weight
            tl.store(logits + at, slopes, mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _divergence_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
        logits,  # noqa: ANN001
        teacher,  # noqa: ANN001
        stride,  # noqa: ANN001
        weights,  # noqa: ANN001
        nats,  # noqa: ANN001
        words,  # noqa: ANN001
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        teacher += row * stride
        weight = tl.load(weights + row)
        norm = _log_sum_exp(logits, words, BLOCK)
        teacher_norm = _log_sum_exp(teacher, words, BLOCK)
        total = 0.0
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < words
            log_student = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32) - norm
            log_teacher = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32) - teacher_norm
            probabilities = tl.exp(log_teacher)
            total += tl.sum(tl.where(inside, probabilities * (log_teacher - log_student), 0.0), 0)
            tl.store(logits + at, (tl.exp(log_student) - probabilities) * weight, mask=inside)
        tl.store(nats + row, total)

    _cross_entropy, _divergence = _cross_entropy_kernel, _divergence_kernel
