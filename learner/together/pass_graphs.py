"""Passes as CUDA graphs: captured once per size, replayed with other rows and weights.

A step of a small pass launches some thousand kernels that take less time than their launch. Replayed as one graph they
follow each other without the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import torch

_log = logging.getLogger("perennial.learner")
MAX_GRAPHS: Final = 12
"""Most graphs that are kept; the one that was not used for the longest time goes first. They share their memory."""


class GraphInputs(Protocol):
    """Rows whose tensors a graph reads."""

    def to(self, device: torch.device) -> Self:
        """Return the same rows on a device."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""

    def shape(self) -> tuple[object, ...]:
        """Return everything of the rows that decides which kernels run, and with which shapes."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Any
    losses: torch.Tensor


class PassGraphs:
    """The graphs of one base."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[object, ...], _Captured | None] = OrderedDict()
        self._pool: Any = None
        self._refused = False

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._pool = None

    def run(self, inputs: GraphInputs, compute: Callable[[Any], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Compute a pass: the first of its size as it is, later ones as a graph.

        Args:
            inputs: Rows, on the host.
            compute: Computes the pass over rows on the device, and returns the losses. It must launch the same kernels
                over the same tensors for all rows of one shape.
            device: CUDA device.

        Returns:
            The losses; valid until the next call.
        """
        key = inputs.shape()
        captured = self._graphs.get(key)
        if captured is None:
            if key in self._graphs and not self._refused:
                captured = self._capture(key, inputs, compute, device)
            if captured is None:
                self._graphs[key] = None
                self._trim()
                return compute(inputs.to(device))
        self._graphs.move_to_end(key)
        for name, tensor in inputs.tensors().items():
            captured.inputs[name].copy_(tensor.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.losses

    def _capture(
        self, key: tuple[object, ...], inputs: GraphInputs, compute: Callable[[Any], torch.Tensor], device: torch.device
    ) -> _Captured | None:
        """Capture a pass without computing it; None where the model does something that no graph can hold."""
        static = inputs.to(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Hazard: memory that passes without a graph have left is not returned during a capture, which then runs out of it.
        torch.cuda.empty_cache()
        try:
            # The libraries set up their work space for a stream with the first kernel on it, which no graph can hold.
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                compute(static)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.empty_cache()
            # Other threads may wait for the device meanwhile, or allocate memory.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                losses = compute(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.warning("passes are computed without CUDA graphs: %s", str(error).partition("\n")[0])
            self._refused = True
            return None
        made = self._graphs[key] = _Captured(graph, static.tensors(), losses)
        return made

    def _trim(self) -> None:
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
