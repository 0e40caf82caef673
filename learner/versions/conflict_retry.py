"""Doing a job again where another learner came first: a zombie and its heir, or two groups, may have the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from perennial.learner.versions.micro_batches import JobError
from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.registry.registry import Registry

MAX_CONFLICTS = 8
T = TypeVar("T")


def retry_on_conflict(registry: Registry, adapter: str, attempt: Callable[[], T]) -> T:
    """What the first attempt comes to that no other learner disturbs; each begins with the line as it then is.

    Something that is gone ends it only at the second sight of the same head: whoever did the job meanwhile deletes
    what it was done with. Raises ConflictError after as many lost races as there may be, and what attempts raise.
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
