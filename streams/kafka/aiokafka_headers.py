"""Kafka's records as aiokafka reads them, but for header names that are not UTF-8: those are read too, escaped.

Hazard: aiokafka raises on such a name at every fetch, the consumer ends, and nobody gets past the record any more.
Kafka takes any bytes there, so one record by anybody who may write to `retention` would end curate and retain for good.
"""

from __future__ import annotations

from typing import Any

from aiokafka.consumer import fetcher  # type: ignore[import-untyped]  # it ships no types
from aiokafka.record.default_records import _DefaultRecordBatchPy  # type: ignore[import-untyped]
from aiokafka.record.memory_records import _MemoryRecordsPy  # type: ignore[import-untyped]


class _Bytes(bytearray):
    """Bytes whose parts are text in any case."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Bytes(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka has no types
    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Bytes(self._buffer)


class _Records(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka has no types
    def next_batch(self) -> Any:
        data = self._next_slice
        batch = super().next_batch()
        return _Batch(data) if batch is not None and batch.magic >= 2 else batch


def read_any_header_name() -> None:
    """Have every aiokafka consumer of this process read records so."""
    fetcher.MemoryRecords = _Records
