"""Why curate refuses an example that was decoded, and which example makes a cut fail. No I/O."""

from __future__ import annotations

from datetime import UTC, datetime

from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.high_water_marks import Position
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.events.wire_error import WireError


class UnfilterableError(Exception):
    """Examples that the quarantine's filter fails at.

    Args:
        errors: what each raised, by example id.
    """

    def __init__(self, errors: dict[str, Exception]) -> None:
        super().__init__(f"the filter fails at {len(errors)} examples")
        self.errors = errors


def out_of_order_error(example: ExampleAccepted, seen: Position) -> WireError:
    """Return the error that reports an example that arrived below its adapter's high-water mark for the first time.

    Args:
        example: the example.
        seen: leader epoch and offset of the highest position that its adapter had seen in its origin partition.
    """
    origin = example.origin
    return WireError(
        "out-of-order", f"an example of {example.adapter} arrived below its high-water mark and had never been seen",
        got=f"{origin.topic}[{origin.partition}]@{origin.offset}, epoch {origin.leader_epoch}",
        allowed=f"a position above offset {seen[1]}, epoch {seen[0]}",
    )  # fmt: skip


def internal_error(error: Exception) -> WireError:
    """Return the error that reports a record that decoded and then made a pure function fail.

    Args:
        error: the exception that it caused.

    Raises:
        MemoryError: `error` is one: no record caused it.
    """
    if isinstance(error, MemoryError):
        raise error
    return WireError("internal-error", type(error).__name__, got=str(error), allowed="any value that decodes")


def breaks_a_cut(adapter: str, policy: CutPolicy, scored: ExampleScored) -> bool:
    """Return whether an example alone makes a micro-batch fail that would hold nothing else."""
    batcher: MicroBatcher[int] = MicroBatcher(adapter, policy)
    try:
        batcher.offer(scored, 0, 0)
        batcher.flush()
        batcher.cut(datetime.now(UTC), "age")
    except Exception:  # noqa: BLE001 - this is the question
        return True
    return False
