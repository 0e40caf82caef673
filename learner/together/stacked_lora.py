"""The LoRA weights of several adapters as stacked tensors, and the linear layers that compute with them.

An adapter's numbers are stored in one row: its PEFT tensors one behind the other, sorted by name. The A of a layer is
then a view (n, r, inputs) of all adapters' rows, and its B a view (n, outputs, r), so that an adapter is copied in and out
as it is stored, and clipping and the optimizer work on whole rows.

While a pass computes, the forward method of PEFT's layers is replaced, not the layers themselves: nothing of the base is
copied, and other slots are as they were afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from perennial.learner.bases.frozen_weights import cast_once
from perennial.learner.model.lora import Lora

_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
"""Public since torch 2.10."""

GROUPED_ALIGNMENT = 8
"""Ranks and widths that grouped matrix products take in bf16 are multiples of it."""


@dataclass(frozen=True)
class Layout:
    """Where each LoRA tensor of an adapter is stored in the adapter's row.

    Attributes:
        names: PEFT names, sorted.
        shapes: Shape of each tensor.
        offsets: First number of each tensor.
        width: P, the numbers of one adapter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, lora: Lora) -> Layout:
        """Return the layout of a slot's tensors."""
        names, offsets, width = tuple(sorted(lora.shapes)), [], 0
        for name in names:
            offsets.append(width)
            width += lora.parameters[name].numel()
        return cls(names, tuple(lora.shapes[name] for name in names), tuple(offsets), width)

    def views(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors in rows (n, P) as views by name, (n, *shape); in one row (P,) as views of their shapes."""
        lead = rows.shape[:-1]
        sizes = [shape[0] * shape[1] for shape in self.shapes]
        return {
            name: part.view(*lead, *shape)
            for name, shape, part in zip(self.names, self.shapes, torch.split(rows, sizes, -1), strict=True)
        }


class StackedLora:
    """The weights of up to n adapters over one base, as products take them, and the gradients of these weights.

    Args:
        lora: Slot whose layers, rank and scale the adapters have; its own weights are not used.
        count: n.

    Attributes:
        lora: The slot.
        layout: Where each tensor is stored in a row.
        dtype: Number format that products take.
        weights: The weights in that format (n, P), on the base's device.
        gradient: fp32 (n, P); a backward pass adds to it.
    """

    def __init__(self, lora: Lora, count: int) -> None:
        device = torch.device(lora.base.device)
        self.lora = lora
        self.layout = Layout.of(lora)
        self.dtype = lora.compute_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.weights = torch.zeros(count, self.layout.width, device=device, dtype=self.dtype)
        self.gradient = torch.zeros(count, self.layout.width, device=device)
        self._groups = _Groups()
        weights, gradient = self.layout.views(self.weights), self.layout.views(self.gradient)
        self._layers = {
            layer: _Layer(
                layer,
                [weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]],
                [gradient[f"{name}.lora_A.weight"], gradient[f"{name}.lora_B.weight"]],
                lora.config.alpha / lora.config.rank,
                self._groups,
            )
            for name, layer in lora.layers().items()
        }

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def groups_on_device(self) -> bool:
        """True if no product needs the bounds of the adapters on the host, so that a pass can be captured."""
        return len(self) == 1 or all(layer.groups_on_device for layer in self._layers.values())

    def take(self, bounds: Sequence[int], ends: torch.Tensor) -> None:
        """Compute with the first adapters' weights from now on.

        Args:
            bounds: First token of each adapter and the end of the last.
            ends: End of each adapter's tokens, int32 on the device.
        """
        self._groups.bounds, self._groups.ends, self._groups.last = bounds, ends, None
        for stacked in self._layers.values():
            stacked.take(len(bounds) - 1)

    @contextmanager
    def computing(self, *others: StackedLora, adapted: bool) -> Iterator[None]:
        """Make the base's linear layers compute with these weights inside the block.

        Args:
            others: Weights for further threads: thread n, as `compute_as` says, computes with the n-th of them.
            adapted: True to add the products of the adapters, False for the frozen base alone.
        """
        stacks = (self, *others)
        for layer in self._layers:
            forwards = [stack._layers[layer].of_kind(adapted=adapted) for stack in stacks]  # noqa: SLF001
            layer.__dict__["forward"] = forwards[0] if len(forwards) == 1 else _by_thread(forwards)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]
            for stack in stacks:
                stack._groups.last = None  # noqa: SLF001


class _Thread(threading.local):
    """Which of several stacks this thread computes with."""

    number = 0


_thread = _Thread()


def compute_as(number: int) -> None:
    """Let this thread compute with the stack of a number; see `StackedLora.computing`."""
    _thread.number = number


def _by_thread(forwards: Sequence[Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
    return lambda x, *_, **__: forwards[_thread.number](x)


class _Groups:
    """Which tokens belong to which adapter in the pass that is computed."""

    bounds: Sequence[int] = ()
    ends: torch.Tensor = torch.empty(0)
    last: tuple[torch.Tensor, torch.Tensor] | None = None
    """The last input of a layer, and the same in the number format of the products: several layers have one input."""

    def flat(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return an input of a layer as (T, inputs) in a number format."""
        if self.last is None or self.last[0] is not x or self.last[1].dtype != dtype:
            self.last = x, _as(x.detach().reshape(-1, x.shape[-1]), dtype)
        return self.last[1]


class _Layer:
    """One linear layer of the base with the A (n, r, inputs) and B (n, outputs, r) of all adapters."""

    def __init__(
        self,
        layer: Any,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        scale: float,
        groups: _Groups,
    ) -> None:
        base = layer.base_layer
        self.base = base
        plain = type(base) is torch.nn.Linear
        self.weight = base.weight if plain else None  # (outputs, inputs)
        self.bias = base.bias if plain else None
        self._all = (*weights, *gradients)
        self.a, self.b, self.a_gradient, self.b_gradient = self._all
        self.scale, self.groups = scale, groups

    @property
    def groups_on_device(self) -> bool:
        """True if the layer's products are grouped on the device."""
        return _groups_on_device(self.a, self.b)

    def take(self, count: int) -> None:
        """Compute with the first so many adapters."""
        if len(self.a) != count:
            self.a, self.b, self.a_gradient, self.b_gradient = (tensor[:count] for tensor in self._all)

    def of_kind(self, *, adapted: bool) -> Callable[..., torch.Tensor]:
        """Return the forward method with or without the adapters' products."""
        return self.forward if adapted else self.base_forward

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the output of the base's layer plus that of each token's adapter."""
        if self.weight is None:
            return self.base(x) + _StackedDelta.apply(x, self)  # type: ignore[no-any-return]
        return _StackedLinear.apply(x, self.groups.flat(x, self.a.dtype), self)  # type: ignore[no-any-return]

    def base_forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the output of the base's layer alone."""
        if self.weight is None:
            return self.base(x)  # type: ignore[no-any-return]
        dtype = self.a.dtype
        y = torch.nn.functional.linear(
            self.groups.flat(x, dtype),
            cast_once(self.weight, dtype),
            None if self.bias is None else cast_once(self.bias, dtype),
        )
        return y.view(*x.shape[:-1], -1)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """Return scale · x Aᵀ, (T, r)."""
        hidden = _by_group(x, self.a.transpose(1, 2), self.groups)
        return hidden.mul_(self.scale) if self.scale != 1 else hidden

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden Bᵀ, (T, outputs)."""
        return _by_group(hidden, self.b.transpose(1, 2), self.groups)

    def backward(self, gradient: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Add the gradients of A and B, and return that of x without the base's part."""
        _add_by_group(self.b_gradient, gradient, hidden, self.groups)
        of_hidden = _by_group(gradient, self.b, self.groups)
        if self.scale != 1:
            of_hidden.mul_(self.scale)
        _add_by_group(self.a_gradient, of_hidden, x, self.groups)
        return _by_group(of_hidden, self.a, self.groups)


class _StackedLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · x Aᵀ Bᵀ, the product with the frozen W added to that of the adapters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flat: torch.Tensor, layer: _Layer) -> torch.Tensor:
        weight = cast_once(layer.weight, layer.a.dtype)
        hidden = layer.down(flat)
        y = layer.up(hidden).addmm_(flat, weight.t())
        if layer.bias is not None:
            y += layer.bias
        ctx.save_for_backward(flat, hidden)
        ctx.layer, ctx.dtype = layer, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        layer: _Layer = ctx.layer
        flat, hidden = ctx.saved_tensors
        (outer,) = gradients
        # Hazard: grouped products refuse an expanded gradient, which a sum over the output sends back.
        gradient = _as(outer.reshape(-1, outer.shape[-1]), layer.a.dtype).contiguous()
        of_x = layer.backward(gradient, flat, hidden)
        of_x.addmm_(gradient, cast_once(layer.weight, layer.a.dtype))
        return _as(of_x, ctx.dtype).view(*outer.shape[:-1], -1), None, None


class _StackedDelta(torch.autograd.Function):
    """scale · x Aᵀ Bᵀ, for layers of the base that keep their weights in another form."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Layer) -> torch.Tensor:
        flat = _as(x.reshape(-1, x.shape[-1]), layer.a.dtype).contiguous()
        hidden = layer.down(flat)
        ctx.save_for_backward(flat, hidden)
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.up(hidden).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (outer,) = gradients
        gradient = _as(outer.reshape(-1, outer.shape[-1]), ctx.layer.a.dtype).contiguous()
        of_x = ctx.layer.backward(gradient, *ctx.saved_tensors)
        return _as(of_x, ctx.dtype).view(*outer.shape[:-1], -1), None


def _as(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    cast: torch.Tensor = tensor.to(dtype)  # itself, if it has the format
    return cast


def _by_group(x: torch.Tensor, weights: torch.Tensor, groups: _Groups) -> torch.Tensor:
    """Return each adapter's tokens of x (T, k) times its weights (n, k, m): (T, m)."""
    if weights.shape[0] == 1:
        return x.mm(weights[0])
    if _groups_on_device(x, weights):
        grouped: torch.Tensor = _grouped_mm(x, weights, offs=groups.ends)
        return grouped
    y = x.new_empty(x.shape[0], weights.shape[2])
    for index, start, end in _slices(groups):
        torch.mm(x[start:end], weights[index], out=y[start:end])
    return y


def _add_by_group(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor, groups: _Groups) -> None:
    """Add leftᵀ right of each adapter's tokens, left (T, k) and right (T, m), to sums (n, k, m)."""
    if sums.shape[0] > 1 and _groups_on_device(left, right):
        sums += _grouped_mm(left.t(), right, offs=groups.ends)
        return
    for index, start, end in _slices(groups):
        product_of = left[start:end].t(), right[start:end]
        if sums.dtype == left.dtype:
            sums[index].addmm_(*product_of)
        else:
            sums[index] += torch.mm(*product_of)


def _groups_on_device(*tensors: torch.Tensor) -> bool:
    return bool(
        _grouped_mm is not None
        and tensors[0].is_cuda
        and tensors[0].dtype == torch.bfloat16
        and all(size % GROUPED_ALIGNMENT == 0 for tensor in tensors for size in tensor.shape[1:])
    )


def _slices(groups: _Groups) -> Iterator[tuple[int, int, int]]:
    for index, (start, end) in enumerate(zip(groups.bounds, groups.bounds[1:], strict=False)):
        if end > start:
            yield index, start, end
