"""What the learner reports of tenants: tokens, budgets, who waits, and the oldest example that waits."""

from __future__ import annotations

import logging

import pytest

from perennial.learner.roles.fair_queue import FairQueue
from perennial.learner.roles.job_figures import JobFigures
from perennial.learner.roles.tenant_report import TenantReport
from perennial.streams.observe.metrics import Metrics


def value(metrics: Metrics, name: str, tenant: str) -> float | None:
    return metrics.registry.get_sample_value(f"perennial_{name}", {"role": "learner", "tenant": tenant})


@pytest.fixture
def queue() -> FairQueue[str]:
    """Return a queue in which acme has used twice its budget and has two updates waiting."""
    queue: FairQueue[str] = FairQueue(tokens_per_hour={"acme": 100, "globex": None}.get)
    for number in range(4):
        queue.add("", JobFigures(f"acme/{number}", 100, 1_000.0 + number))
    for _ in range(2):
        entry = queue.next((), 0.0)
        assert entry is not None
        queue.start(entry, 0.0)
    queue.add("", JobFigures("globex/a", 7, 5_000.0))
    queue.add("", JobFigures("acme/9", is_update=False))
    return queue


def test_tokens_budgets_and_waiting_updates_are_shown_by_tenant(queue):
    metrics = Metrics("learner")
    report = TenantReport(queue, metrics)
    report.update(10.0)
    assert (value(metrics, "tenant_hour_tokens", "acme"), value(metrics, "tenant_hour_tokens", "globex")) == (200, 0)
    assert value(metrics, "tenant_budget_share", "acme") == 2.0
    assert value(metrics, "tenant_budget_share", "globex") is None
    assert value(metrics, "jobs_waiting_for_budget", "acme") == 2
    assert report.oldest_s == 1_002.0
    report.update(10.5)
    queue.keep(lambda _: False)
    report.update(10.6)
    assert value(metrics, "jobs_waiting_for_budget", "acme") == 2, "once a second is enough"
    report.update(4_000.0)
    assert value(metrics, "jobs_waiting_for_budget", "acme") == 0
    assert value(metrics, "tenant_hour_tokens", "acme") == 0
    assert report.oldest_s is None


def test_the_log_says_once_who_waits_for_a_budget_and_what_to_do(queue, caplog):
    report = TenantReport(queue, Metrics("learner"))
    with caplog.at_level(logging.WARNING):
        for now_s in (10.0, 20.0, 30.0):
            report.update(now_s)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("tenant acme used up its budget: got 200 tokens in the last 60 minutes; allowed 100;")
    assert "PERENNIAL_TENANT_TOKENS_PER_HOUR" in said


def test_tenants_beyond_the_bound_add_up():
    metrics = Metrics("learner")
    many = {f"t{number:03}": 2 for number in range(110)}
    metrics.tenants(many, dict.fromkeys(many, 0.5) | {"t109": 3.0}, many)
    assert value(metrics, "tenant_hour_tokens", "t000") == 2
    assert value(metrics, "tenant_hour_tokens", "other") == 20
    assert value(metrics, "tenant_budget_share", "other") == 3.0
    metrics.tenants({"t000": 1}, {}, {})
    assert value(metrics, "tenant_hour_tokens", "other") == 0
    assert value(metrics, "jobs_waiting_for_budget", "t000") == 0
