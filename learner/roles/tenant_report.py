"""Report what the fair queue holds: metrics of tenants, the oldest waiting example, and who waits for a budget."""

from __future__ import annotations

import logging
from typing import Any

from perennial.learner.roles.fair_queue import FairQueue
from perennial.streams.observe.metrics import Metrics

_log = logging.getLogger("perennial.learner")

REPORT_EVERY_S = 1.0


class TenantReport:
    """Sets the metrics of tenants, at most once a second, and logs when updates begin to wait for a budget.

    Args:
        queue: the learner's waiting jobs.
        metrics: what is set.

    Attributes:
        oldest_s: when the oldest example of the waiting updates was published, in seconds since 1970; None: none waits.
    """

    def __init__(self, queue: FairQueue[Any], metrics: Metrics) -> None:
        self._queue = queue
        self._metrics = metrics
        self._next_s = float("-inf")
        self._waiting: set[str] = set()
        self.oldest_s: float | None = None

    def update(self, now_s: float) -> None:
        """Report, if the last report is a second old.

        Args:
            now_s: monotonic clock, in seconds; the one that the queue is asked with.
        """
        if now_s < self._next_s:
            return
        self._next_s = now_s + REPORT_EVERY_S
        usage = self._queue.usage(now_s)
        updates = (entry.figures for entry in self._queue if entry.figures.is_update)
        self.oldest_s = min((figures.oldest_s for figures in updates), default=None)
        waiting = {tenant: use.waiting for tenant, use in usage.items() if use.over_budget and use.waiting}
        self._metrics.tenants(
            {tenant: use.hour_tokens for tenant, use in usage.items()},
            {tenant: use.hour_tokens / use.budget for tenant, use in usage.items() if use.budget},
            waiting,
        )
        for tenant in sorted(waiting.keys() - self._waiting):
            use = usage[tenant]
            _log.warning(
                "tenant %s used up its budget: got %d tokens in the last 60 minutes; allowed %d; its updates (%d wait) come "
                "behind those of other tenants until the hour's tokens are below it; remedy: wait, or raise "
                "PERENNIAL_TENANT_TOKENS_PER_HOUR", tenant, use.hour_tokens, use.budget, use.waiting,
            )  # fmt: skip
        self._waiting = set(waiting)
