"""Run a job again when another learner changed the adapter first.

Two learners may have the same job: one that was stalled and the one that took over its partition, or members of two
consumer groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from perennial.learner.versions.job_result import JobError
from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.registry.registry import Registry

MAX_CONFLICTS = 8
T = TypeVar("T")


def retry_on_conflict(registry: Registry, adapter: str, attempt: Callable[[], T]) -> T:
    """Call `attempt` until it completes without a write conflict; each attempt must start from the current head.

    An object that is missing ends the job only when it is missing twice under the same head: another learner may have
    done the job in the meantime and deleted what the job needed. There is no wait between attempts, because the other
    learner's write is complete when the conflict shows; so no retry library is used.

    Args:
        registry: the adapter's versions.
        adapter: the job's adapter.
        attempt: one attempt at the job.

    Returns:
        What `attempt` returned.

    Raises:
        ConflictError: `MAX_CONFLICTS` attempts in a row met a conflict.
        JobError: raised by an attempt.
        StoreError: raised by an attempt.
    """
    heads: set[str | None] = set()
    for _ in range(MAX_CONFLICTS):
        try:
            return attempt()
        except ConflictError:
            continue
        except (JobError, NotFoundError) as error:
            if isinstance(error, JobError) and error.reason != "missing-batch":
                raise
            head = registry.head(adapter)
            version = head.version if head else None
            if version in heads:
                raise
            heads.add(version)
    raise ConflictError(
        f"other learners were faster {MAX_CONFLICTS} times in a row on {adapter}",
        remedy="let one consumer group own the topic adapter-jobs",
    )
