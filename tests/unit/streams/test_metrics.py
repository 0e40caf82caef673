"""Metric names and their panels, the bound on label values, health, and the HTTP server."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from perennial.streams.addresses import direct_opener
from perennial.streams.observe.http_server import MetricsError, serve_metrics
from perennial.streams.observe.metrics import MAX_LABEL_VALUES, SERIES, Metrics
from perennial.streams.settings import Settings
from tools.generate_dashboards import DASHBOARDS


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"role": metrics.role, **labels})


def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with direct_opener().open(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def test_every_method_moves_the_series_that_dashboards_name():
    metrics = Metrics("learner")
    metrics.events_in("adapter-jobs", 3)
    metrics.events_out("adapter-updates")
    metrics.refused("not-json", 2)
    metrics.topic_recreated("documents")
    metrics.offsets_lost("documents", "tail", 10)
    metrics.lag("adapter-jobs", 7)
    metrics.drift("base_loss", "adwin", "acme/support")
    metrics.cut("size", 8, 512)
    metrics.update("promoted", "acme/support")
    metrics.stage_s("train", 0.3)
    metrics.loss("acme/support", "before", 2.5)
    metrics.trained(512)
    metrics.training_pass(3, 1.5)
    metrics.generation("acme/support", 4)
    metrics.store_error("get")
    metrics.stalled_partition("examples", "seek")
    metrics.ack("acme/support", {"fetch": 0.1, "publish_to_served": 0.4})
    metrics.forget_requests("accepted", 3)
    metrics.forget_overdue(2)
    metrics.forgot(7, 40.0)
    metrics.quarantined(5)
    metrics.subscriber_failure("space")
    metrics.serving_stale("acme/support", 1.5e9)
    metrics.replicas({"serving": 3, "expired": 2}, {"expired": 1})
    metrics.parked({"acme/a": "no-space"})
    metrics.jobs_waiting("acme/a", 3)
    metrics.update_cost(4e9, 0.25, 90.0, "nvml")
    metrics.tenants({"acme": 700}, {"acme": 0.7}, {"acme": 2})
    metrics.wrong_marks("acme/other", 0)
    metrics.wrong_marks("acme/support", 2)
    metrics.oldest_age_s(30)
    assert {family.name for family in metrics.registry.collect() if not family.samples} == set()
    expected = {
        ("perennial_forget_requests", ("state", "accepted")): 3,
        ("perennial_forget_overdue_requests",): 2,
        ("perennial_forgotten_examples_total",): 7,
        ("perennial_forget_seconds_sum",): 40,
        ("perennial_quarantined_examples",): 5,
        ("perennial_adapters_parked", ("reason", "no-space")): 1,
        ("perennial_jobs_waiting", ("adapter", "acme/a")): 3,
        ("perennial_tenant_hour_tokens", ("tenant", "acme")): 700,
        ("perennial_tenant_budget_share", ("tenant", "acme")): 0.7,
        ("perennial_jobs_waiting_for_budget", ("tenant", "acme")): 2,
        ("perennial_wrong_high_water_marks", ("adapter", "acme/support")): 2,
        ("perennial_events_in_total", ("topic", "adapter-jobs")): 3,
        ("perennial_events_out_total", ("topic", "adapter-updates")): 1,
        ("perennial_refused_total", ("reason", "not-json")): 2,
        ("perennial_topic_recreated_total", ("topic", "documents")): 1,
        ("perennial_offsets_lost_total", ("topic", "documents"), ("kind", "tail")): 10,
        ("perennial_lag_events", ("topic", "adapter-jobs")): 7,
        ("perennial_drift_total", ("signal", "base_loss"), ("detector", "adwin"), ("adapter", "acme/support")): 1,
        ("perennial_cuts_total", ("reason", "size")): 1,
        ("perennial_cut_examples_total", ("reason", "size")): 8,
        ("perennial_cut_tokens_total", ("reason", "size")): 512,
        ("perennial_updates_total", ("outcome", "promoted"), ("adapter", "acme/support")): 1,
        ("perennial_stage_seconds_sum", ("stage", "train")): 0.3,
        ("perennial_loss_nats", ("adapter", "acme/support"), ("which", "before")): 2.5,
        ("perennial_trained_tokens_total",): 512,
        ("perennial_trained_seconds_total",): 1.5,
        ("perennial_pass_adapters_sum",): 3,
        ("perennial_update_flops_total",): 4e9,
        ("perennial_update_device_seconds_total",): 0.25,
        ("perennial_update_joules_total", ("source", "nvml")): 90,
        ("perennial_alias_generation", ("adapter", "acme/support")): 4,
        ("perennial_store_errors_total", ("op", "get")): 1,
        ("perennial_acks_total", ("adapter", "acme/support")): 1,
        ("perennial_subscriber_failures_total", ("kind", "space")): 1,
        ("perennial_serving_stale_since_seconds", ("adapter", "acme/support")): 1.5e9,
        ("perennial_replicas", ("state", "serving")): 3,
        ("perennial_replicas_serving_revoked", ("state", "expired")): 1,
        ("perennial_ack_stage_seconds_count", ("stage", "publish_to_served")): 1,
    }
    found = {key: value(metrics, key[0], **dict(key[1:])) for key in expected}
    assert found == expected


def test_every_metric_is_on_a_panel_or_in_an_alert():
    asked = [
        q.expr for board in DASHBOARDS.values() for row in board.rows for panel in row.panels for q in panel.queries
    ]
    asked.append((Path(__file__).parents[3] / "deploy/prometheus/rules/perennial.yml").read_text("utf-8"))
    named = {re.sub("_(total|bucket|sum|count)$", "", name) for name in re.findall(r"perennial_(\w+)", " ".join(asked))}
    unseen = {series.name for series in SERIES} - named
    assert unseen == set()


def test_refusals_in_a_row_are_counted_per_adapter_and_end_with_a_promotion():
    metrics = Metrics("learner")
    rows = []
    for outcome in ("refused", "refused", "unchanged", "refused", "promoted", "refused"):
        metrics.update(outcome, "acme/a")
        rows.append(value(metrics, "perennial_refused_updates_in_a_row", adapter="acme/a"))
    metrics.update("refused", "acme/b")
    assert rows == [1, 2, 2, 3, 0, 1]
    assert value(metrics, "perennial_refused_updates_in_a_row", adapter="acme/b") == 1


def test_a_label_takes_a_hundred_values_and_then_other():
    metrics = Metrics("learner")
    for i in range(MAX_LABEL_VALUES + 50):
        metrics.update("promoted", f"tenant/{i}")
    metrics.update("promoted", "tenant/0")
    assert value(metrics, "perennial_updates_total", outcome="promoted", adapter="tenant/0") == 2
    assert value(metrics, "perennial_updates_total", outcome="promoted", adapter="other") == 50
    assert value(metrics, "perennial_updates_total", outcome="promoted", adapter="tenant/120") is None


def test_case_scale_adapters_beyond_the_hundredth_can_be_named():
    """faults.md, "Scale": adapter 101 and later cannot be seen in the metrics."""
    metrics = Metrics("learner", Settings.of(metric_adapters=3))
    for i in range(5):
        metrics.update("promoted", f"tenant/{i}")
    assert value(metrics, "perennial_updates_total", outcome="promoted", adapter="tenant/2") == 1
    assert value(metrics, "perennial_updates_total", outcome="promoted", adapter="other") == 2


def test_roles_do_not_share_figures():
    one, two = Metrics("intake"), Metrics("intake")
    one.events_in("documents")
    assert value(two, "perennial_events_in_total", topic="documents") is None


def test_the_headline_age_grows_while_nobody_reports_and_falls_to_zero():
    clock = Clock()
    metrics = Metrics("learner", clock=clock)
    name = "perennial_oldest_unlearned_event_age_seconds"
    assert value(metrics, name) == 0
    metrics.oldest_age_s(5)
    clock.now_s += 60
    assert value(metrics, name) == 65
    metrics.oldest_age_s(0)
    clock.now_s += 60
    assert value(metrics, name) == 0


def test_health_starts_then_stalls_only_while_work_waits_and_nothing_moves():
    clock = Clock()
    metrics = Metrics("learner", Settings.of(stall_s=120), clock=clock)
    assert metrics.health.report().status == "starting"
    metrics.waiting(False)
    clock.now_s += 10_000
    report = metrics.health.report()
    assert (report.healthy, report.status, report.work_waits) == (True, "ok", False)
    metrics.lag("adapter-jobs", 3)  # an idle role is not blamed for the time before work came
    clock.now_s += 119
    assert metrics.health.report().healthy
    clock.now_s += 1
    report = metrics.health.report()
    assert (report.healthy, report.status, report.lag_events) == (False, "stalled", 3)
    metrics.lag("adapter-jobs", 4)  # more work is not progress
    assert not metrics.health.report().healthy
    metrics.progress()
    assert metrics.health.report().healthy
    clock.now_s += 121
    assert not metrics.health.report().healthy
    metrics.lag("adapter-jobs", 0)
    assert metrics.health.report().healthy
    metrics.waiting(True)
    clock.now_s += 121
    assert not metrics.health.report().healthy


def test_a_loop_that_stops_turning_is_stalled_even_if_no_work_is_known_to_wait():
    """Soak: a learner's lag was 0 and its health green while records waited."""
    clock = Clock()
    metrics = Metrics("scorer+learner", Settings.of(stall_s=120), clock=clock)
    metrics.tick("examples")
    metrics.tick("adapter-jobs")
    metrics.waiting(False)
    clock.now_s += 119
    metrics.tick("examples")
    assert metrics.health.report().healthy
    clock.now_s += 1
    report = metrics.health.report()
    assert (report.status, report.seconds_without_progress) == ("stalled", 120)
    metrics.tick("adapter-jobs")
    assert metrics.health.report().status == "ok"


def test_a_role_that_pauses_for_a_command_is_healthy_and_begins_anew():
    clock = Clock()
    metrics = Metrics("intake", Settings.of(stall_s=120), clock=clock)
    metrics.tick("intake")
    metrics.lag("documents", 5)
    metrics.maintenance(True)
    clock.now_s += 1000
    report = metrics.health.report()
    assert (report.healthy, report.status) == (True, "maintenance")
    metrics.maintenance(False)
    assert metrics.health.report().status == "ok"
    clock.now_s += 120
    assert metrics.health.report().status == "stalled"


def test_the_server_answers_its_two_paths_and_nothing_else():
    clock = Clock()
    metrics = Metrics("scorer", Settings.of(stall_s=5), clock=clock)
    metrics.events_in("examples")
    with serve_metrics(metrics, "127.0.0.1", 0) as server:
        status, body, kind = get(server.port, "/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=0.0.4")
        assert b'perennial_events_in_total{role="scorer",topic="examples"} 1.0' in body
        status, body, _ = get(server.port, "/healthz")
        assert (status, orjson.loads(body)["status"]) == (200, "starting")
        metrics.waiting(True)
        clock.now_s += 5
        status, body, _ = get(server.port, "/healthz")
        assert (status, orjson.loads(body)) == (503, {
            "status": "stalled", "role": "scorer", "work_waits": True, "lag_events": 0, "seconds_without_progress": 5.0,
            "stall_s": 5.0,
        })  # fmt: skip
        assert get(server.port, "/metrics", "HEAD")[:2] == (200, b"")
        assert get(server.port, "/metrics/../etc")[0] == 404
        assert get(server.port, "/")[0] == 404
        assert get(server.port, "/healthz", "POST")[0] == 501
    with pytest.raises(urllib.error.URLError):
        get(server.port, "/healthz")


def test_idle_connections_do_not_take_the_server_down():
    metrics = Metrics("scorer")
    with serve_metrics(metrics) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(40)]
        closed = 0
        for connection in idle[16:]:
            closed += connection.recv(1) == b""  # beyond the bound: closed at once
            connection.close()
        assert closed == 24
        for connection in idle[:16]:
            connection.close()
        for _ in range(200):
            try:
                assert get(server.port, "/healthz")[0] == 200
                break
            except (OSError, urllib.error.URLError):
                continue  # the threads of the closed ones are still ending
        else:
            pytest.fail("the server did not come back")


def test_a_taken_port_is_said_with_a_remedy():
    metrics = Metrics("scorer")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MetricsError, match="METRICS_PORT"):
        serve_metrics(metrics, "127.0.0.1", taken.getsockname()[1])
