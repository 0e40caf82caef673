"""One forward and backward pass over the packed rows of several adapters."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import autocast, has_plain_head, is_out_of_memory
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.chunked_head import losses_and_gradient, token_losses
from perennial.learner.together.device_states import HotStates, hot_states
from perennial.learner.together.kernels.fused_layers import fused_layers
from perennial.learner.together.packed_attention import Documents, packed_attention
from perennial.learner.together.packing import AdapterRows, PackedRows, Size, pack
from perennial.learner.together.pass_graphs import PassGraphs
from perennial.learner.together.stacked_lora import StackedLora, compute_as

_TOLERANCE, _COARSE_TOLERANCE = 0.02, 0.2
"""Largest difference between hidden states, as a share of their norm, that counts as rounding: in fp32, and in a coarser
format. In bf16 those of SmolLM2 differ by .03 to .1, and by .9 where the rows see each other."""


_HALVES: Final = 2
_LEAST_PARAMETERS: Final = 50_000_000
"""Least size of a base whose passes two threads share: with a small one they would wait for Python's own lock."""


class SharedPass:
    """Computes losses and gradients of several adapters. One per base, rank and number format: it keeps its tensors.

    On CUDA all passes are filled up to one of few sizes. The second pass of a size is captured as a CUDA graph and
    replayed from then on: small passes wait for the launching of kernels most of the time.

    Args:
        lora: Slot whose layers, rank and scale the adapters have.
        graphs: On CUDA, capture graphs.

    Attributes:
        hot: States of adapters that are on the device.
    """

    def __init__(self, lora: Lora, *, graphs: bool) -> None:
        self._lora = lora
        self._device = torch.device(lora.base.device)
        self.hot: HotStates = hot_states(self._device)
        self._on_cuda = self._fills = self._device.type == "cuda"
        self._graphs = PassGraphs() if graphs and self._on_cuda else None
        self._stacked: dict[int, StackedLora] = {}

    @classmethod
    def of(cls, lora: Lora, *, graphs: bool) -> SharedPass:
        """Return the object for a slot, which is kept on the model."""
        kept = lora.model.__dict__.setdefault("_shared_passes", {})
        key = (lora.config, lora.compute_dtype, graphs)
        if key not in kept:
            kept[key] = cls(lora, graphs=graphs)
        found: SharedPass = kept[key]
        return found

    def release(self) -> None:
        """Free the tensors and graphs that are kept between passes."""
        self.hot.clear()
        self._release_stacks()

    def _release_stacks(self) -> None:
        self._stacked = {}
        if self._graphs is not None:
            self._graphs.clear()
        if self._on_cuda:
            torch.cuda.empty_cache()

    def run(self, weights: torch.Tensor, parts: Sequence[AdapterRows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the losses of adapters and the gradients of their weights.

        Args:
            weights: fp32 (n, P), see `Layout`.
            parts: Rows of the n adapters.

        Returns:
            Losses (n,) and gradients (n, P), fp32; valid until the next call.
        """
        count = len(parts)
        size = Size.holding(parts) if self._fills else None
        if (halves := self._halves(parts)) is not None:
            return self._run_halves(weights, halves)
        stacked = self._filled(weights, size)
        inputs = _Inputs.of(parts, size)
        if self._graphs is None or size is None or not stacked.groups_on_device:
            losses = _compute(self._lora, stacked, inputs.to(self._device))
        else:
            losses = self._graphs.run(inputs, lambda static: _compute(self._lora, stacked, static), self._device)
        return losses[:count], stacked.gradient[:count]

    @torch.no_grad()
    def measure(self, weights: torch.Tensor, parts: Sequence[AdapterRows]) -> torch.Tensor:
        """Compute the loss of each trained token, without gradients.

        Args:
            weights: (n, P), see `Layout`.
            parts: Rows of the n adapters, none with `like_base`.

        Returns:
            Losses (N,) in nats, fp32 on the device: adapter by adapter, row by row.
        """
        size = Size.holding(parts) if self._fills else None
        stacked = self._filled(weights, size)
        packed = pack(parts, size).to(self._device)
        stacked.take(packed.bounds, packed.ends)
        with fused_layers(self._lora.model, self._device), stacked.computing(adapted=True):
            hidden = _hidden(self._lora, packed)  # (T, d)
        trained = sum(row.tokens for part in parts for row in part.rows)
        predicting = hidden.index_select(0, packed.predicting[:trained]).to(stacked.dtype)  # (N, d)
        model: Any = self._lora.model
        return token_losses(model.get_output_embeddings(), predicting, packed.labels[:trained])

    def _halves(self, parts: Sequence[AdapterRows]) -> list[list[AdapterRows]] | None:
        """Return every other row of each adapter, and the rest, for two threads; None where one thread computes all.

        Most operations of a small pass are too short to be shared by threads, so a second core is idle most of the time.
        """
        rows = sum(len(part.rows) for part in parts)
        if self._on_cuda or torch.get_num_threads() < _HALVES or rows < 2 * _HALVES or not self._is_large:
            return None
        return [
            [replace(part, rows=part.rows[(half + index) % _HALVES :: _HALVES]) for index, part in enumerate(parts)]
            for half in range(_HALVES)
        ]

    @functools.cached_property
    def _is_large(self) -> bool:
        # Without the slots, whose number depends on what the process has run.
        weights = (weight for name, weight in self._lora.model.named_parameters() if ".lora_" not in name)
        parameters: int = sum(weight.numel() for weight in weights)
        return parameters >= _LEAST_PARAMETERS

    def _run_halves(
        self, weights: torch.Tensor, halves: Sequence[Sequence[AdapterRows]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the halves of a pass in two threads, and add their gradients up in a fixed order."""
        count = len(weights)
        first, second = stacks = (self._filled(weights, None), self._filled(weights, None, second=True))
        threads = torch.get_num_threads()
        inputs = [_Inputs.of(half, None) for half in halves]

        def both(compute: Callable[[int], torch.Tensor | None]) -> list[torch.Tensor | None]:
            other = self._second_thread.submit(_as_thread, 1, threads - threads // 2, compute)
            try:
                own = _as_thread(0, threads // 2, compute)
            finally:
                concurrent.futures.wait([other])  # it computes with what is taken off the model below
                torch.set_num_threads(threads)
            return [own, other.result()]

        # The outer block keeps the attention on the model until both threads are done.
        with packed_attention(self._lora.model, Documents((), torch.empty(0), 0)):
            with first.computing(second, adapted=False):
                bases = both(lambda half: _of_teacher(self._lora, stacks[half], inputs[half]))
            with first.computing(second, adapted=True), _taking_gradients(self._lora.model):
                losses = both(lambda half: _with_gradients(self._lora, stacks[half], inputs[half], bases[half]))
        assert losses[0] is not None
        assert losses[1] is not None
        gradient = first.gradient[:count]
        gradient += second.gradient[:count]
        return losses[0] + losses[1], gradient

    @functools.cached_property
    def _second_thread(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="half-pass")

    def _filled(self, weights: torch.Tensor, size: Size | None, *, second: bool = False) -> StackedLora:
        """Return a stack with the weights; what fills it up are zeros, not what an earlier pass left."""
        count = len(weights)
        stacked = self._stacks(size.adapters if size else count, int(second))
        stacked.weights[:count].copy_(weights)
        if size is not None:
            stacked.weights[count : size.adapters].zero_()
        return stacked

    def _stacks(self, count: int, number: int) -> StackedLora:
        kept = self._stacked.get(number)
        if kept is None or len(kept) < count:
            if number == 0:
                self._release_stacks()
            kept = self._stacked[number] = StackedLora(self._lora, count)
        return kept


@dataclass(frozen=True)
class _Inputs:
    """The rows of a pass.

    Attributes:
        packed: Rows of all adapters.
        teacher: Those with `like_base` alone, which the frozen base reads.
    """

    packed: PackedRows
    teacher: PackedRows | None

    @classmethod
    def of(cls, parts: Sequence[AdapterRows], size: Size | None) -> _Inputs:
        rows = [row for part in parts for row in part.rows if row.like_base]
        if not rows:
            return cls(pack(parts, size), None)
        alone = [AdapterRows(rows, 0.0, 0.0, parts[0].pad)]
        of_teacher = None if size is None else replace(Size.holding(alone), like_base=size.like_base)
        return cls(pack(parts, size), pack(alone, of_teacher))

    def to(self, device: torch.device) -> _Inputs:
        return _Inputs(self.packed.to(device), self.teacher.to(device) if self.teacher else None)

    def tensors(self) -> dict[str, torch.Tensor]:
        of_teacher = self.teacher.tensors() if self.teacher else {}
        return self.packed.tensors() | {f"teacher.{name}": tensor for name, tensor in of_teacher.items()}

    def shape(self) -> tuple[object, ...]:
        shapes = tuple(tuple(tensor.shape) for tensor in self.tensors().values())
        return (*shapes, self.packed.longest, self.teacher.longest if self.teacher else 0)


def _compute(lora: Lora, stacked: StackedLora, inputs: _Inputs) -> torch.Tensor:
    """Compute one pass over rows on the device, and put the gradients into those of the stack.

    Returns:
        Losses (n,), fp32 on the device.
    """
    with fused_layers(lora.model, torch.device(lora.base.device)):
        with stacked.computing(adapted=False):
            base = _of_teacher(lora, stacked, inputs)
        with stacked.computing(adapted=True), _taking_gradients(lora.model):
            return _with_gradients(lora, stacked, inputs, base)


def _of_teacher(lora: Lora, stacked: StackedLora, inputs: _Inputs) -> torch.Tensor | None:
    """Return the frozen base's hidden states (M, d) where a token of a row with `like_base` is predicted."""
    teacher = inputs.teacher
    if teacher is None:
        return None
    with torch.no_grad():
        return _hidden(lora, teacher).index_select(0, teacher.predicting).to(stacked.dtype)


def _with_gradients(lora: Lora, stacked: StackedLora, inputs: _Inputs, base: torch.Tensor | None) -> torch.Tensor:
    """Put the gradients of a pass into those of the stack, and return its losses (n,); arguments as for `_compute`."""
    model: Any = lora.model
    packed = inputs.packed
    stacked.gradient[: len(packed.bounds) - 1].zero_()
    stacked.take(packed.bounds, packed.ends)
    with torch.enable_grad():
        hidden = _hidden(lora, packed)  # (T, d)
        with torch.no_grad():
            predicting = hidden.detach().index_select(0, packed.predicting).to(stacked.dtype)  # (N, d)
            nats, gradient = losses_and_gradient(
                model.get_output_embeddings(), predicting, base, packed.labels, packed.weights
            )
            # Gathered, not scattered: a sum in any order would change the last bits from run to run.
            gradient = torch.cat([gradient, gradient.new_zeros(1, gradient.shape[1])])
            gradient = gradient.index_select(0, packed.gathered_from).to(hidden.dtype)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
    adapters = torch.arange(len(packed.bounds) - 1, device=nats.device)
    # A product with zero would spread one adapter's NaN to all.
    of_adapter = torch.where(packed.adapters == adapters[:, None], nats * packed.weights, 0.0)  # (n, N)
    return of_adapter.sum(1)


def _as_thread(number: int, threads: int, compute: Callable[[int], torch.Tensor | None]) -> torch.Tensor | None:
    """Compute one half of a pass in this thread, with so many threads per operation."""
    compute_as(number)
    torch.set_num_threads(threads)
    return compute(number)


def _hidden(lora: Lora, packed: PackedRows) -> torch.Tensor:
    """Return the last hidden states (T, d)."""
    model: Any = lora.model
    device = torch.device(lora.base.device)
    documents = Documents(packed.lengths, packed.starts, packed.longest)
    # A base in bf16 computes in bf16 by itself.
    casting = autocast(device, lora.compute_dtype if device.type == "cpu" else torch.float32)
    with packed_attention(model, documents), casting:
        inputs = {"input_ids": packed.ids[None], "position_ids": packed.positions[None]}
        return model.base_model(**inputs, use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]


@contextmanager
def _taking_gradients(model: Any) -> Iterator[None]:
    """Make the hidden states take gradients from the first layer on, for the weights are none of autograd's inputs."""

    def require(_: Any, __: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()


def packs_together(lora: Lora) -> bool:
    """Return True if the model computes packed rows, with this package's attention, as it computes each row alone.

    A model with a recurrent state, with an attention that packed attention does not know, or with more than an embedding
    as its head does not. The answer is measured once and kept on the model.
    """
    model: Any = lora.model
    known = getattr(model, "_packs_together", None)
    if known is None:
        model._packs_together = known = has_plain_head(model) and _measure_packing(lora)  # noqa: SLF001
    return bool(known)


def _measure_packing(lora: Lora) -> bool:
    device = torch.device(lora.base.device)
    # Real models have hidden states of thousands, and bf16 rounds those by more than the tolerance.
    lora = lora.computing_in(torch.float32) if device.type == "cpu" else lora
    rows = [TokenRow((0, 1, 0, 1, 1, 0, 1)), TokenRow((1, 0, 0, 1))]
    packed = pack([AdapterRows(rows, 1.0, 1.0, 0)])
    with lora.disabled(), torch.no_grad():
        alone = torch.cat(
            [
                lora.model.base_model(
                    input_ids=torch.tensor([row.ids], device=device), use_cache=False
                ).last_hidden_state[0]
                for row in rows
            ]
        )
        try:
            together = _hidden(lora, packed.to(device))[: len(alone)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return False
    tolerance = _TOLERANCE if alone.dtype == torch.float32 else _COARSE_TOLERANCE
    return bool((together - alone).float().norm() <= tolerance * alone.float().norm())
