"""Make aiokafka read records whose header names are not UTF-8; the invalid bytes are escaped with backslashes.

Hazard: Kafka accepts any bytes as a header's name. aiokafka 0.14 raises UnicodeDecodeError on such a name at every
fetch, so the consumer ends and no member of the group ever gets past the record. One record by anybody who may write
to `retention` would stop the agents curate and retain for good. aiokafka has no setting for this, so its private record
parser is replaced.
"""

from __future__ import annotations

from typing import Any

from aiokafka.consumer import fetcher  # type: ignore[import-untyped]  # it ships no types
from aiokafka.record.default_records import _DefaultRecordBatchPy  # type: ignore[import-untyped]
from aiokafka.record.memory_records import _MemoryRecordsPy  # type: ignore[import-untyped]


class _LenientBytes(bytearray):
    """Bytes whose slices decode without an error, whatever they hold."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _LenientBytes(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka has no types
    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _LenientBytes(self._buffer)


class _LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka has no types
    def next_batch(self) -> Any:
        data = self._next_slice
        batch = super().next_batch()
        return _LenientBatch(data) if batch is not None and batch.magic >= 2 else batch


def read_any_header_name() -> None:
    """Make every aiokafka consumer of this process accept header names that are not UTF-8."""
    fetcher.MemoryRecords = _LenientRecords
