"""Write the Grafana dashboards to deploy/grafana/dashboards: `python -m tools.generate_dashboards`.

A panel here has a title, the queries to Prometheus and a description of how to read it. Its position and the forty
lines of Grafana's JSON are generated.

To add a panel: append a `Panel` (a curve) or a `stat` (a single number) to a `Row` of FLOW (the whole installation),
ADAPTER (one adapter; its queries select `{adapter=~"$adapter"}`) or FORGETTING. Use `counted` for counters and `quantile_of`
for histograms. Then run `make dashboards` and `pytest tests/unit/test_compose.py tests/unit/streams/test_metrics.py`.
The docstring of streams/observe/metrics.py has the recipe for the metric itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DATASOURCE = {"type": "prometheus", "uid": "perennial-prometheus"}
SCHEMA_VERSION = 39
WIDTH = 24
NEW_IN = "({series} unless {series} offset {window})"
"""Selects the series that are new in the window. increase() needs an earlier value to subtract; a new series has none,
so its first count would be lost. It is counted whole instead."""


@dataclass(frozen=True)
class Query:
    """A query of a panel.

    Attributes:
        expr: the PromQL expression.
        legend: the name of each series, with `{{label}}`.
        instant: show the value now instead of a curve over time.
    """

    expr: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: the heading.
        queries: what it shows.
        description: how to read it.
        unit: Grafana's name of the unit.
        kind: a curve over time, a single number, or a table.
        thresholds: pairs of the value from which a colour holds, and the colour.
        width: in 24ths of the page.
        height: in Grafana's rows.
        decimals: digits after the point; None: as Grafana chooses.
        zero: what to show if there is no data.
        stacked: stack the series on each other.
        bars: draw bars instead of lines.
    """

    title: str
    queries: Sequence[Query]
    description: str
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    thresholds: Sequence[tuple[float | None, str]] = ((None, "green"),)
    width: int = 8
    height: int = 8
    decimals: int | None = None
    zero: str | None = None
    stacked: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Row:
    """A heading with the panels below it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: its identity in Grafana and in links.
        title: the heading.
        description: what it is for.
        rows: its panels.
        by_adapter: it has the variable `adapter`.
    """

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    by_adapter: bool = False


def counted(series: str, by: str, window: str = "$__rate_interval") -> str:
    """Return a query for the growth of counters in a window, with those that are new in it counted whole.

    Args:
        series: a counter, possibly with a selector.
        by: the labels to group by, separated by commas; empty: the sum over all.
        window: a PromQL duration.
    """
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({_grown(series, window)} > 0)"


def quantile_of(quantile: float, histogram: str, by: str, window: str = "$__rate_interval") -> str:
    """Return a query for a quantile of a histogram in a window, with its first observation included.

    Args:
        quantile: from 0 to 1.
        histogram: the name without `_bucket`.
        by: the labels to group by, separated by commas.
        window: a PromQL duration.
    """
    return f"histogram_quantile({quantile}, sum by (le, {by}) ({_grown(f'{histogram}_bucket', window)}))"


def _grown(series: str, window: str) -> str:
    # The new series must come first: where both sides have a value, `or` takes the left one.
    return f"({NEW_IN.format(series=series, window=window)} or increase({series}[{window}]))"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """Return the JSON document that Grafana reads."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
             "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y}}
        )  # fmt: skip
        y += 1
        x = tallest = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "uid": dashboard.uid, "title": dashboard.title, "description": dashboard.description, "tags": ["perennial"],
        "schemaVersion": SCHEMA_VERSION, "version": 1, "editable": True, "graphTooltip": 1, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "timezone": "browser", "timepicker": {}, "fiscalYearStartMonth": 0,
        "annotations": {"list": []}, "panels": panels,
        "templating": {"list": [_ADAPTER] if dashboard.by_adapter else []},
        "links": [
            {"type": "dashboards", "title": "Perennial", "tags": ["perennial"], "asDropdown": False, "icon": "",
             "includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": ""}
        ],
    }  # fmt: skip


_ADAPTER: dict[str, Any] = {
    "name": "adapter", "label": "Adapter", "type": "query", "datasource": DATASOURCE, "refresh": 2, "sort": 1,
    "definition": "label_values(perennial_updates_total, adapter)",
    "query": {"query": "label_values(perennial_updates_total, adapter)", "refId": "adapters", "qryType": 1},
    "multi": True, "includeAll": True, "allValue": ".*", "hide": 0, "regex": "", "skipUrlSync": False, "options": [],
    "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
}  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"color": c, "value": v} for v, c in panel.thresholds]},
    }
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.zero is not None:
        defaults["noValue"] = panel.zero
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "bars" if panel.bars else "line", "lineWidth": 1, "showPoints": "auto", "spanNulls": True,
            "fillOpacity": 60 if panel.bars else 30 if panel.stacked else 8,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if len(panel.thresholds) > 1 else "off"},
        }  # fmt: skip
    options: dict[str, Any] = {
        "timeseries": {
            "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value",
            "graphMode": "area", "justifyMode": "auto", "orientation": "auto", "textMode": "auto",
        },
        "table": {"showHeader": True, "cellHeight": "sm"},
    }[panel.kind]  # fmt: skip
    rendered = {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.description,
        "datasource": DATASOURCE, "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        "targets": [_target(query, ref_id, panel.kind) for ref_id, query in zip("ABCDEF", panel.queries, strict=False)],
    }  # fmt: skip
    if panel.kind == "table":
        rendered["transformations"] = [
            {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}, "renameByName": {}}}
        ]
    return rendered


def _target(query: Query, ref_id: str, kind: str) -> dict[str, Any]:
    instant = query.instant or kind == "table"
    return {
        "refId": ref_id, "datasource": DATASOURCE, "editorMode": "code", "expr": query.expr,
        "legendFormat": query.legend or "__auto", "instant": instant, "range": not instant,
        "format": "table" if kind == "table" else "time_series",
    }  # fmt: skip


def stat(title: str, expr: str, description: str, **rest: Any) -> Panel:
    """Return a panel with a single number."""
    return Panel(title, [Query(expr)], description, kind="stat", **{"width": 4, "height": 4, **rest})


AGE = ((None, "green"), (300, "orange"), (1800, "red"))
ANY_IS_BAD = ((None, "green"), (1, "red"))
ANY_IS_DOUBTFUL = ((None, "green"), (1, "orange"))
OF_ADAPTER = '{adapter=~"$adapter"}'


FLOW = Dashboard(
    "perennial-flow", "Perennial: the flow", "Events in, adapters out: how much is processed, how much waits and how much is refused.",
    [
        Row("Now", [
            stat("Oldest unlearned event", "max(perennial_oldest_unlearned_event_age_seconds)",
                 "How far the adapters are behind what was published. Orange and red are the bounds of the alerts.", unit="s", thresholds=AGE, width=6),
            stat("Events waiting", "sum(perennial_lag_events)",
                 "Published and not yet handled, over all topics and roles.", width=3),
            stat("Versions promoted", counted('perennial_updates_total{outcome="promoted"}', "", "$__range"),
                 "In the time shown.", zero="0", decimals=0, width=3),
            stat("Updates refused", counted('perennial_updates_total{outcome="refused"}', "", "$__range"),
                 "By the gate, in the time shown. Some are normal: the previous version stays in service.",
                 zero="0", decimals=0, thresholds=ANY_IS_DOUBTFUL, width=3),
            stat("Dead letters", counted("perennial_refused_total", "", "$__range"),
                 "Events refused in the time shown; each is in dead-letters with its reason.",
                 zero="0", decimals=0, thresholds=ANY_IS_DOUBTFUL, width=3),
            stat("Activations", counted("perennial_acks_total", "", "$__range"),
                 "Versions that subscribers put into service in the time shown.", zero="0", decimals=0, width=3),
            stat("Processes up", 'sum(up{job="perennial"})', "Roles that Prometheus reaches.",
                 thresholds=((None, "red"), (4, "green")), width=3),
        ]),
        Row("Events", [
            Panel("Read", [Query("sum by (role, topic) (rate(perennial_events_in_total[$__rate_interval]))",
                                 "{{role}} ← {{topic}}")],
                  "Events that each role reads a second.", unit="ops"),
            Panel("Written", [Query("sum by (role, topic) (rate(perennial_events_out_total[$__rate_interval]))",
                                    "{{role}} → {{topic}}")],
                  "Events that each role wrote and the broker acknowledged, a second.", unit="ops"),
            Panel("Waiting", [Query("sum by (role, topic) (perennial_lag_events)", "{{role}} ← {{topic}}")],
                  "Where events pile up. The first role of the flow whose curve grows is the slow one.", stacked=True),
            Panel("Age of the oldest unlearned event",
                  [Query("max by (role) (perennial_oldest_unlearned_event_age_seconds)", "{{role}}")],
                  "As each role sees it. A saw-tooth up to the age that cuts a micro-batch is normal.",
                  unit="s", thresholds=AGE),
            Panel("Dead letters", [Query(counted("perennial_refused_total", "role, reason"), "{{role}}: {{reason}}")],
                  "Refused events per reason.", bars=True, stacked=True, zero="none"),
            Panel("Alerts", [Query("sort_desc(sum by (alertname, alertstate, severity) (ALERTS))")],
                  "Pending or firing now. None is good.", kind="table", zero="none"),
        ]),
        Row("Micro-batches and drift", [
            Panel("Micro-batches cut", [Query(counted("perennial_cuts_total", "reason"), "{{reason}}")],
                  "Per reason: drift, size (examples or tokens) or age.", bars=True, stacked=True),
            Panel("Size of a micro-batch",
                  [Query("sum(rate(perennial_cut_examples_total[$__rate_interval])) "
                         "/ sum(rate(perennial_cuts_total[$__rate_interval]))", "examples"),
                   Query("sum(rate(perennial_cut_tokens_total[$__rate_interval])) "
                         "/ sum(rate(perennial_cuts_total[$__rate_interval]))", "tokens")],
                  "Mean over the micro-batches cut."),
            Panel("Drift detected",
                  [Query(counted("perennial_drift_total", "signal, detector"), "{{signal}} ({{detector}})")],
                  "Per signal and detector, over all adapters.", bars=True, stacked=True, zero="none"),
            Panel("Wrong high-water marks", [Query("max by (adapter) (perennial_wrong_high_water_marks) > 0", "{{adapter}}")],
                  "Marks beyond the end of their log; `perennial marks show` lists those of an adapter. There should be none.", zero="none"),
        ]),
        Row("Learning", [
            Panel("Updates", [Query(counted("perennial_updates_total", "outcome"), "{{outcome}}")],
                  "Per outcome: promoted, refused by the gate, unchanged.", bars=True, stacked=True),
            Panel("Time per stage, 95 %", [Query(quantile_of(0.95, "perennial_stage_seconds", "role, stage"), "{{role}}: {{stage}}")],
                  "How long the stages of scorers, learners and subscribers take.", unit="s"),
            Panel("Training speed",
                  [Query("sum(rate(perennial_trained_tokens_total[$__rate_interval])) "
                         "/ sum(rate(perennial_trained_seconds_total[$__rate_interval]))", "tokens a second of training")],
                  "Tokens a second while training."),
            Panel("Learners busy with training",
                  [Query("sum by (instance) (rate(perennial_trained_seconds_total[$__rate_interval]) > 0)", "{{instance}}")],
                  "Share of time. Near 100 %: start more learners, up to one per partition.", unit="percentunit"),
            Panel("Adapters per pass",
                  [Query("sum(rate(perennial_pass_adapters_sum[$__rate_interval])) "
                         "/ sum(rate(perennial_pass_adapters_count[$__rate_interval]))", "adapters")],
                  "Mean over the rounds of training. Near PERENNIAL_PASS_ADAPTERS while updates wait: raise it, if the "
                  "device has memory for more."),
            Panel("Cost of an update",
                  [Query("sum(rate(perennial_update_device_seconds_total[$__rate_interval])) "
                         '/ sum(rate(perennial_stage_seconds_count{role="learner",stage="train"}[$__rate_interval]))',
                         "device seconds per update")],
                  "Mean time of the device per update, the gate's measurements included; `perennial economics` has each update.",
                  unit="s"),
            Panel("Operations per second",
                  [Query("sum(rate(perennial_update_flops_total[$__rate_interval])) "
                         "/ sum(rate(perennial_update_device_seconds_total[$__rate_interval]))", "operations a second")],
                  "Floating-point operations of updates, by formula, per second of the device.", unit="flops"),
            Panel("Power during updates",
                  [Query("sum by (source) (rate(perennial_update_joules_total[$__rate_interval])) "
                         "/ on () group_left () sum(rate(perennial_update_device_seconds_total[$__rate_interval]))", "{{source}}")],
                  "Energy of the device per second of updates, idle power included. None where neither NVML nor RAPL can be "
                  "read.", unit="watt", zero="not measured"),
            Panel("Published to served", [Query(quantile_of(q, "perennial_ack_stage_seconds", "stage"), f"{{{{stage}}}} {name}")
                                          for q, name in ((0.5, "50 %"), (0.95, "95 %"))],
                  "Time that subscribers need for a new version, by stage; publish_to_served is the total.", unit="s"),
            Panel("Partitions read anew",
                  [Query(counted("perennial_stalled_partitions_total", "role, topic, remedy"),
                         "{{role}} ← {{topic}}: {{remedy}}")],
                  "Partitions that yielded nothing though records waited. The role reads on by itself; report it if it "
                  "repeats.", bars=True, stacked=True, zero="none"),
            Panel("Store errors", [Query(counted("perennial_store_errors_total", "role, op"), "{{role}}: {{op}}")],
                  "Calls to the object store that failed.", bars=True, stacked=True, zero="none"),
            Panel("Tokens by tenant, last 60 minutes",
                  [Query("sum by (tenant) (perennial_tenant_hour_tokens)", "{{tenant}}")],
                  "Of the updates that started; what the budgets of PERENNIAL_TENANT_TOKENS_PER_HOUR count.", stacked=True),
            Panel("Tenants' budgets", [
                Query("max by (tenant) (perennial_tenant_budget_share)", "{{tenant}}: used"),
                Query("sum by (tenant) (perennial_jobs_waiting_for_budget) > 0", "{{tenant}}: updates that wait"),
            ], "Share of the hour's budget that is used. From 1 on, updates of the tenant wait while others have work.",
                  zero="none"),
            Panel("Parked adapters", [Query("max by (reason) (perennial_adapters_parked)", "{{reason}}")],
                  "Adapters that wait for an operator, by reason.", zero="none"),
            Panel("Updates that wait in the store", [Query("max by (adapter) (perennial_jobs_waiting)", "{{adapter}}")],
                  "Of parked adapters; nothing is lost while they wait.", zero="none"),
        ]),
    ],
)  # fmt: skip

ADAPTER = Dashboard(
    "perennial-adapter", "Perennial: one adapter's life",
    "What an adapter learned, what the gate decided, and who serves it. Select the adapter above; All shows all of them.",
    [
        Row("Now", [
            stat("Generation", f"max by (adapter) (perennial_alias_generation{OF_ADAPTER})",
                 "How often the live version was replaced.", decimals=0, width=6),
            stat("Promoted", counted('perennial_updates_total{adapter=~"$adapter",outcome="promoted"}', "", "$__range"),
                 "Updates that went live in the time shown.", decimals=0, zero="0", width=6),
            stat("Refused", counted('perennial_updates_total{adapter=~"$adapter",outcome="refused"}', "", "$__range"),
                 "Updates that the gate refused in the time shown.", decimals=0, zero="0",
                 thresholds=ANY_IS_DOUBTFUL, width=6),
            stat("Refused in a row", f"max by (adapter) (perennial_refused_updates_in_a_row{OF_ADAPTER})",
                 "Since the last update that was promoted. Three raise an alert.", decimals=0,
                 thresholds=((None, "green"), (1, "orange"), (3, "red")), width=6),
        ]),
        Row("Loss", [
            Panel("New text, before and after each update",
                  [Query('max by (adapter, which) (perennial_loss_nats{adapter=~"$adapter",which=~"before|after"})',
                         "{{adapter}} {{which}}")],
                  "Mean loss per token on examples that are held out of the update (on all its examples where they are "
                  "few), in nats. Before jumps when the text changes; after below before is learning.",
                  decimals=3, width=12, height=9),
            Panel("Fall by the last update",
                  [Query('max by (adapter) (perennial_loss_nats{adapter=~"$adapter",which="before"}) '
                         '- max by (adapter) (perennial_loss_nats{adapter=~"$adapter",which="after"})', "{{adapter}}")],
                  "Loss before minus loss after, in nats per token. The gate refuses an update that does not lower the loss.",
                  decimals=3, width=6, height=9),
            Panel("General text after the update",
                  [Query('max by (adapter) (perennial_loss_nats{adapter=~"$adapter",which="general"})', "{{adapter}}")],
                  "Mean loss on text of the base's own kind, in nats per token. It must not rise. The rows rotate, so it moves a "
                  "little even without an update.", decimals=3, width=6, height=9),
        ]),
        Row("Drift and updates", [
            Panel("Drift detected",
                  [Query(counted('perennial_drift_total{adapter=~"$adapter"}', "adapter, signal, detector"),
                         "{{adapter}} {{signal}} ({{detector}})")],
                  "When the adapter's text changed, and in which signal.", bars=True, stacked=True, zero="none"),
            Panel("Updates by the gate's verdict",
                  [Query(counted('perennial_updates_total{adapter=~"$adapter"}', "adapter, outcome"),
                         "{{adapter}} {{outcome}}")],
                  "`perennial adapters history` shows why an update was refused.", bars=True, stacked=True),
            Panel("Generation", [Query(f"max by (adapter) (perennial_alias_generation{OF_ADAPTER})", "{{adapter}}")],
                  "Each step is a version that went live, or a rollback.", decimals=0),
        ]),
        Row("Service", [
            Panel("Activations", [Query(counted('perennial_acks_total{adapter=~"$adapter"}', "adapter"), "{{adapter}}")],
                  "Versions that subscribers put into service. If there is none while versions are promoted, no subscriber follows.",
                  bars=True, stacked=True, width=12),
            Panel("Published to served, 95 %",
                  [Query(quantile_of(0.95, "perennial_ack_stage_seconds", "stage"), "{{stage}}")],
                  "By stage, over all adapters.", unit="s", width=12),
            Panel("Failed attempts of subscribers", [Query(counted("perennial_subscriber_failures_total", "kind"), "{{kind}}")],
                  "Over all adapters, by kind: what passes is tried again within 30 s, what is wrong with a version each minute.",
                  bars=True, stacked=True, zero="none", width=8),
            Panel("Behind since",
                  [Query("max by (adapter) (time() - perennial_serving_stale_since_seconds > 0 and "
                         f"perennial_serving_stale_since_seconds{OF_ADAPTER} > 0)", "{{adapter}}")],
                  "Age of the version that a subscriber cannot serve. Above five minutes, an alert is raised.",
                  unit="s", zero="none", width=8),
            Panel("Replicas", [Query("max by (state) (perennial_replicas)", "{{state}}"),
                               Query("max by (state) (perennial_replicas_serving_revoked)", "{{state}}, a revoked version")],
                  "Over all adapters. Serving and failing replicas hold a lease; expired and left ones are kept for a day.",
                  decimals=0, width=8),
        ]),
    ],
    by_adapter=True,
)  # fmt: skip

FORGETTING = Dashboard(
    "perennial-forgetting", "Perennial: forgetting", "Which requests to forget are open, done or late.",
    [
        Row("Now", [
            stat("Past due", "sum(perennial_forget_overdue_requests)",
                 "Open requests that are past their due time. Above zero, an alert is raised.",
                 decimals=0, thresholds=ANY_IS_BAD, width=4),
            stat("Closed with exceptions", "sum(perennial_forget_exceptions_total)",
                 "Requests closed at their due time although a replica had not confirmed them, since the roles were started.",
                 decimals=0, thresholds=ANY_IS_BAD, width=5),
            stat("Open", 'sum(perennial_forget_requests{state!~"closed|failed"})', "Requests that are not closed or failed.",
                 decimals=0, width=5),
            stat("Examples forgotten", "sum(perennial_forgotten_examples_total)",
                 "Since the roles were started.", decimals=0, width=5),
            stat("Held back", "sum(perennial_quarantined_examples)",
                 "Examples of open requests: quarantined until they are forgotten, or kept because of a legal hold.",
                 decimals=0, thresholds=ANY_IS_DOUBTFUL, width=5),
        ]),
        Row("Requests", [
            Panel("Requests by state", [Query("sum by (state) (perennial_forget_requests)", "{{state}}")],
                  "The number of requests in each state, closed and failed ones since the roles were started; the topic "
                  "retention-status has each request.", stacked=True, width=12),
            Panel("From request to end", [Query(quantile_of(q, "perennial_forget_seconds", "role", "$__range"), name)
                                          for q, name in ((0.5, "50 %"), (0.95, "95 %"))],
                  "For the requests that ended in the time shown.", unit="s", width=12),
            Panel("Past due", [Query("sum(perennial_forget_overdue_requests)", "past due")],
                  "Above zero an alert is raised after a minute.", decimals=0, thresholds=ANY_IS_BAD, width=12),
            Panel("Examples forgotten", [Query(counted("perennial_forgotten_examples_total", "role"), "{{role}}")],
                  "Counted when their request ends.", bars=True, width=12),
        ]),
    ],
)  # fmt: skip

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards"
DASHBOARDS = {"flow": FLOW, "adapter": ADAPTER, "forgetting": FORGETTING}


def text_of(dashboard: Dashboard) -> str:
    """Return the content of a dashboard's file."""
    return json.dumps(render(dashboard), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, made in DASHBOARDS.items():
        FOLDER.joinpath(f"{name}.json").write_text(text_of(made), encoding="utf-8")
