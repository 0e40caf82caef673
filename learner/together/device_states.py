"""Adapters' tensors between the host and the device that trains them.

Updates keep their tensors on the host: the registry, the gate and forgetting take them from there. What an adapter was
given back last also stays on a GPU, within a budget, so that its next round, measurement or update copies nothing. On a
CPU there is one copy, and nothing to do.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from perennial.learner.together.stacked_lora import Layout

COPYING_THREADS: Final = 8
"""Threads that gather the weights of adapters on the host before they go to a GPU: one fills the bus to a tenth."""
HOT_SHARE: Final = 0.1
"""Share of a GPU's memory that the states of adapters may take between their updates, for each rank and number format."""

MOST_PINNED_BYTES: Final = 16 * 2**30
"""Most page-locked memory on the host that results may take; further results are in ordinary memory."""


@dataclass(frozen=True)
class _Hot:
    """A copy on the device.

    Attributes:
        first: The first of the host tensors that it was made of.
        version: Number of changes that tensor had had.
        places: Addresses of all of them. They are views of one memory, which lives as long as the first one.
        row: The copy (P,).
    """

    first: weakref.ref[torch.Tensor]
    version: int
    places: list[int]
    row: torch.Tensor


class HotStates:
    """Copies on a device of the host tensors that were used last, within a number of bytes. Thread-safe.

    A copy is found only with the very tensors that it was made of, unchanged, and is freed with them, so it lives no longer
    than an adapter's state on the host. Freed memory is not overwritten, there as here.

    Args:
        most_bytes: Most bytes of all copies.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._size_bytes = 0
        self._rows: OrderedDict[int, _Hot] = OrderedDict()
        self._lock = threading.RLock()  # a tensor may be freed, which calls back, while the lock is held

    @property
    def size_bytes(self) -> int:
        """Bytes of all copies."""
        return self._size_bytes

    def put(self, tensors: Sequence[torch.Tensor], row: torch.Tensor) -> None:
        """Keep the copy (P,) of host tensors, which are views of one memory; the least recently used ones make room."""
        key = id(tensors[0])
        with self._lock:
            self._drop(key)
            if row.nbytes > self._most_bytes:
                return
            first = tensors[0]
            weakref.finalize(first, self._drop, key).atexit = False
            places = [tensor.data_ptr() for tensor in tensors]
            self._rows[key] = _Hot(weakref.ref(first), first._version, places, row)  # noqa: SLF001
            self._size_bytes += row.nbytes
            while self._size_bytes > self._most_bytes:
                self._drop(next(iter(self._rows)))

    def get(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the copy (P,) of these host tensors; None if there is none."""
        with self._lock:
            hot = self._rows.get(id(tensors[0]))
            first = tensors[0]
            if hot is None or hot.first() is not first or hot.version != first._version:  # noqa: SLF001
                return None
            if hot.places != [tensor.data_ptr() for tensor in tensors]:
                return None
            self._rows.move_to_end(id(first))
            return hot.row

    def clear(self) -> None:
        """Free all copies."""
        with self._lock:
            self._rows.clear()
            self._size_bytes = 0

    def _drop(self, key: int) -> None:
        with self._lock:
            hot = self._rows.pop(key, None)
            if hot is not None:
                self._size_bytes -= hot.row.nbytes


def hot_states(device: torch.device) -> HotStates:
    """Return an empty store for a device, with the budget that it has."""
    if device.type != "cuda":
        return HotStates(0)
    return HotStates(int(HOT_SHARE * torch.cuda.get_device_properties(device).total_memory))


class PinnedRows:
    """Page-locked memory for rows on the host, which is kept: to lock pages takes thirty times as long as to copy. Thread-safe.

    Args:
        most_bytes: Most bytes; rows beyond them are in ordinary memory.
    """

    def __init__(self, most_bytes: int = MOST_PINNED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._size_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lock = threading.RLock()  # a row may be freed, which calls back, while the lock is held

    @property
    def size_bytes(self) -> int:
        """Bytes of all page-locked rows, used and free."""
        return self._size_bytes

    def row(self, width: int, *, pin: bool = True) -> torch.Tensor:
        """Return a row (P,), fp32, of any content. Its memory is used again once no tensor is a view of it.

        Args:
            width: P.
            pin: False for ordinary memory that is used again.
        """
        with self._lock:
            free = self._free.setdefault(width, [])
            if free:
                memory = free.pop()
            elif self._size_bytes + 4 * width > self._most_bytes:
                return torch.empty(width)
            else:
                memory = torch.empty(width, pin_memory=pin)
                self._size_bytes += 4 * width
        # A tensor made of an array holds the array for as long as a view of the tensor lives.
        lease = memory.numpy().view()
        weakref.finalize(lease, self._put_back, memory).atexit = False
        return torch.from_numpy(lease)

    def _put_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            self._free.setdefault(memory.numel(), []).append(memory)


pinned_rows: Final = PinnedRows()
"""The page-locked memory of this process."""


def stacked_rows(
    layout: Layout,
    states: Sequence[Mapping[str, torch.Tensor] | None],
    prefix: str,
    device: torch.device,
    hot: HotStates,
) -> torch.Tensor:
    """Return tensors of adapters as rows (n, P), fp32 on the device.

    Args:
        layout: Where each tensor is stored in a row.
        states: Tensors of each adapter, on the host or on the device; None: zeros.
        prefix: What their names begin with, before the names of the layout.
        device: Device of the rows.
        hot: Copies that are on the device.
    """
    on_cuda = device.type == "cuda"
    rows = torch.zeros(len(states), layout.width, device=device)
    from_host: list[int] = []
    tensors = [None if state is None else [state[prefix + name] for name in layout.names] for state in states]
    for index, of_state in enumerate(tensors):
        if of_state is None:
            continue
        row = hot.get(of_state) if on_cuda else None
        if row is not None:
            rows[index].copy_(row)
        elif of_state[0].device.type == device.type:  # "cuda" and "cuda:0" are not equal, and the same
            torch.cat([tensor.reshape(-1).float() for tensor in of_state], out=rows[index])
        else:
            from_host.append(index)
    if not from_host:
        return rows

    def load(index: int) -> None:
        of_state = tensors[index] or ()
        row = _pinned_row(layout, of_state)
        if row is None:
            row = pinned_rows.row(layout.width)
            torch.cat([tensor.reshape(-1).float() for tensor in of_state], out=row)
        with torch.cuda.device(device):  # a thread of a pool begins with the first GPU
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            rows[index].copy_(row, non_blocking=True)
            copied.record()
            copied.synchronize()  # the memory of the row is used again

    with ThreadPoolExecutor(min(COPYING_THREADS, len(from_host))) as threads:
        list(threads.map(load, from_host))
    return rows


def _pinned_row(layout: Layout, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the row (P,) that tensors are views of, if they are those of a fetched row; None if not."""
    first = tensors[0].data_ptr()
    for tensor, offset in zip(tensors, layout.offsets, strict=True):
        if tensor.data_ptr() != first + 4 * offset or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return None
    return torch.as_strided(tensors[0], (layout.width,), (1,)) if tensors[0].is_pinned() else None


class Fetching:
    """Rows of a GPU on their way to the host, beside the device's further work.

    Hazard: call `wait` even after an error, or the memory of the copies is used again while they are written.

    Args:
        rows: Rows (P,) on a GPU.

    Attributes:
        copies: The rows on the host, in memory of their own; their numbers are there after `wait`.
    """

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        device = rows[0].device
        self._rows = rows  # the copies read them until `wait`
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self.copies = [pinned_rows.row(row.numel()) for row in rows]
        with torch.cuda.stream(self._stream):
            for copy, row in zip(self.copies, rows, strict=True):
                copy.copy_(row, non_blocking=True)

    def wait(self) -> None:
        """Wait until the numbers are there."""
        self._stream.synchronize()
