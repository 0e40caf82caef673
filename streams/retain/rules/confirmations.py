"""What the replicas of an adapter mean for a job that was carried out in it. Pure."""

from __future__ import annotations

from perennial.streams.retain.ledger import AdapterProgress, RequestRecord, epoch_ms
from perennial.streams.retain.rules.replica_report import ReplicaReport
from perennial.streams.retain.rules.transitions import Observation
from perennial.streams.retention.kinds import KINDS


def observe_replicas(record: RequestRecord, report: ReplicaReport, now_ms: int) -> Observation:
    """Return whether replicas may still serve an affected version, and whether the due time ends the wait for them.

    Args:
        record: The request.
        report: The replicas of one adapter.
        now_ms: The guarded time, in milliseconds since 1970.
    """
    if not report.behind:
        return Observation.CONFIRMED
    request = record.request
    due_ms = epoch_ms(request.due_at) if KINDS[request.kind].due_at == "deadline" else None
    return Observation.UNCONFIRMED if due_ms is not None and due_ms <= now_ms else Observation.DONE


def with_replicas(progress: AdapterProgress, report: ReplicaReport, seen: Observation) -> AdapterProgress:
    """Return the progress with the replicas that confirmed it and those that did not.

    Args:
        progress: The progress of an adapter whose job was carried out.
        report: The adapter's replicas.
        seen: What the step observed.
    """
    return progress.model_copy(
        update={
            "acknowledged": list(report.acknowledged),
            "missing": list(report.behind) if seen is Observation.DONE else report.missing,
            "exceptions": seen is Observation.UNCONFIRMED,
        }
    )
