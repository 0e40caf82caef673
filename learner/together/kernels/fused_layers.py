"""Norms, gated activations and rotary positions as one kernel each on a GPU, where liger-kernel is installed.

A Llama computes each of them in five to ten kernels that read and write all activations. Liger's kernels (arXiv
2410.10989) take a fifth off a step, and keep fewer activations for the backward pass. A layer gets one only where the
kernel computes what the layer computes, which is measured once per layer, so no list of model types is needed.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

_TOLERANCE: Final = 0.02
"""Largest difference from the layer's own output, as a share of its norm, that counts as rounding in bf16."""
_KEPT: Final = "_perennial_fused"
_ROTATE: Final = "apply_rotary_pos_emb"
_Forward = Callable[..., Any]


class _Active(threading.local):
    """Whether this thread computes with fused rotations."""

    rotations = False


_active = _Active()


@contextmanager
def fused_layers(model: Any, device: torch.device) -> Iterator[None]:
    """Let the layers of a model on a GPU compute in fused kernels inside the block; without Liger nothing changes.

    Hazard: the layers' forward methods are replaced, so the block needs the lock on the base.
    """
    if device.type != "cuda" or not _liger():
        yield
        return
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = _found(model, device)
        _fuse_rotations(model, device)
    for module, forward in kept:
        module.__dict__["forward"] = forward
    _active.rotations = True
    try:
        yield
    finally:
        _active.rotations = False
        for module, _ in kept:
            del module.__dict__["forward"]


@functools.cache
def _liger() -> dict[str, Callable[..., Any]]:
    """Return Liger's functions by name; empty where it is not installed. Its import takes a second."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    return {
        "norm": LigerRMSNormFunction.apply,
        "rotate": LigerRopeFunction.apply,
        "gate": LigerSiLUMulFunction.apply,
    }


@torch.no_grad()
def _found(model: Any, device: torch.device) -> list[tuple[Any, _Forward]]:
    """Return the layers that a kernel computes, with their fused forward methods."""
    found: list[tuple[Any, _Forward]] = []
    for module in model.modules():
        fused = _norm(module, device) if type(module).__name__.endswith("RMSNorm") else _gated(module, device)
        if fused is not None:
            found.append((module, fused))
    return found


def _norm(module: Any, device: torch.device) -> _Forward | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or eps is None:
        return None
    x = torch.linspace(-3, 3, 4 * len(weight), device=device, dtype=weight.dtype).view(4, -1)
    norm = _liger()["norm"]
    for offset, casting in ((0.0, "llama"), (0.0, "gemma"), (1.0, "gemma")):
        # Not in place: a norm whose output is added to the residual shares its gradient with it.
        fused = functools.partial(_in_order, norm, weight, eps, offset, casting, False, None)
        if _agree(functools.partial(fused, x), functools.partial(module, x)):
            return fused
    return None


def _in_order(function: _Forward, weight: torch.Tensor, *arguments: Any) -> Any:
    """Call a function with its input, which comes last, as its first argument."""
    *others, x = arguments
    return function(x, weight, *others)


def _gated(module: Any, device: torch.device) -> _Forward | None:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if any(part is None for part in parts):
        return None
    gate, up, down, activation = parts
    product = _liger()["gate"]
    a = torch.linspace(-3, 3, 512, device=device, dtype=torch.bfloat16).view(4, -1)
    b = a.flip(1) + 1
    if not _agree(lambda: product(a, b), lambda: activation(a) * b):
        return None

    def fused(x: torch.Tensor) -> Any:
        return down(product(gate(x), up(x)))

    # A module that does more than the product of the two must keep its own forward method.
    width = getattr(gate, "in_features", 0)
    x = torch.linspace(-1, 1, 4 * width, device=device, dtype=torch.bfloat16).view(1, 4, -1)
    return fused if width and _agree(lambda: fused(x), lambda: module(x)) else None


def _agree(some: Callable[[], Any], other: Callable[[], Any]) -> bool:
    try:
        one, two = some().float(), other().float()
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return False
    return bool((one - two).norm() <= _TOLERANCE * two.norm())


def _fuse_rotations(model: Any, device: torch.device) -> None:
    """Let the rotary positions of the model's module be fused in threads that compute inside `fused_layers`."""
    for source in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules.get(source), _ROTATE, None)
        if own is None or getattr(own, _KEPT, False):
            continue
        q, k = (
            torch.linspace(-2, 2, 8 * heads * 16, device=device).bfloat16().view(1, heads, 8, 16) for heads in (2, 1)
        )
        angles = torch.linspace(0, 3, 8 * 8, device=device).view(1, 8, 8).repeat(1, 1, 2)
        inputs = q, k, angles.cos().bfloat16(), angles.sin().bfloat16()
        if _agree(functools.partial(_rotated, _liger()["rotate"], inputs), functools.partial(_rotated, own, inputs)):
            setattr(sys.modules[source], _ROTATE, _by_place(own, _liger()["rotate"]))


def _rotated(rotate: _Forward, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    # Liger rotates in place.
    return torch.cat([part.flatten() for part in rotate(*(tensor.clone() for tensor in inputs))])


def _by_place(own: _Forward, fused: _Forward) -> _Forward:
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        if _active.rotations and q.is_cuda and not more and not named:
            return fused(q, k, cos, sin)
        return own(q, k, cos, sin, *more, **named)

    setattr(rotate, _KEPT, True)
    return rotate
