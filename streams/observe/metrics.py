"""Count what a role does, for Prometheus. Knows no topic, store or model: roles report plain numbers.

To add a metric with its panel:

1. Append a row to SERIES: kind, name without the prefix `perennial_`, help text, labels.
2. Add a method to Metrics that roles call when it happens, named after the event, next to the methods of its section.
   It calls `_inc` (counters), `_set` (gauges) or `_observe` (histograms) with the row's name. prometheus_client adds
   `_total` to counters. If intake calls it, add it to streams/intake/metrics.py too.
3. Add a panel to tools/generate_dashboards.py and run `make dashboards`. An alert goes to
   deploy/prometheus/rules/perennial.yml and its test to tests/prometheus/rules_test.yml.
4. Run `pytest tests/unit/streams/test_metrics.py tests/unit/test_compose.py`. They fail for a metric that no method
   moves or no panel shows, and for a panel of a metric that does not exist.

The names in SERIES and their labels are public: dashboards and alerts of users name them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as TallyCounter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from perennial.streams.observe.health import DEFAULT_STALL_S, Health
from perennial.streams.settings import Settings

MAX_LABEL_VALUES: Final = 100
OTHER: Final = "other"
_SHARED_LABELS: Final = frozenset({"adapter", "tenant", "topic"})
_FORGET_BUCKETS_S: Final = (0.1, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86_400, 3 * 86_400, 7 * 86_400, 30 * 86_400)
_ADAPTER_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_STAGE_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Series:
    """One metric.

    Attributes:
        kind: Counter, Gauge or Histogram.
        name: the name without the prefix `perennial_` (and without `_total`, which counters get).
        help: what is counted, as Prometheus shows it.
        labels: its labels besides `role`.
        buckets: upper bounds of a histogram's buckets, in seconds.
    """

    kind: type[Counter | Gauge | Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = _STAGE_BUCKETS_S


SERIES: Final = (
    # Every role: events.
    Series(Counter, "events_in", "Events read.", ("topic",)),
    Series(Counter, "events_out", "Events written and acknowledged.", ("topic",)),
    Series(Counter, "refused", "Events put into dead-letters.", ("reason",)),
    Series(Gauge, "lag_events", "Events published and not yet handled.", ("topic",)),
    Series(
        Gauge, "oldest_unlearned_event_age_seconds",
        "Age of the oldest event not yet learned; grows until it is learned; 0: none.",
    ),
    Series(
        Counter, "stalled_partitions", "Partitions that yielded nothing though records waited, by what was done.",
        ("topic", "remedy"),
    ),
    # Intake: what happened to the logs of the input topics.
    Series(Counter, "topic_recreated", "Input topics deleted and created again.", ("topic",)),
    Series(
        Counter, "offsets_lost", "Offsets that were read and lost (tail), or deleted unread (deleted).", ("topic", "kind")
    ),
    # Curate: drift and micro-batches.
    Series(Counter, "drift", "Drift detections.", ("signal", "detector", "adapter")),
    Series(Counter, "cuts", "Micro-batches cut.", ("reason",)),
    Series(Counter, "cut_examples", "Examples in micro-batches.", ("reason",)),
    Series(Counter, "cut_tokens", "Tokens in micro-batches.", ("reason",)),
    Series(Gauge, "wrong_high_water_marks", "High-water marks beyond the end of their log.", ("adapter",)),
    # Learner: updates.
    Series(Counter, "updates", "Updates done.", ("outcome", "adapter")),
    Series(Gauge, "refused_updates_in_a_row", "Updates refused since the last that was promoted.", ("adapter",)),
    Series(Histogram, "stage_seconds", "Time per stage.", ("stage",)),
    Series(Gauge, "loss_nats", "Mean loss per token, before or after.", ("adapter", "which")),
    Series(Counter, "trained_tokens", "Tokens trained on."),
    Series(Counter, "trained_seconds", "Time spent in training."),
    Series(Counter, "update_flops", "Floating-point operations of updates, by formula: training and the gate's measurements."),
    Series(Counter, "update_device_seconds", "Time of the device for updates: training and the gate's measurements."),
    Series(Counter, "update_joules", "Energy of the device in that time, where it is measured.", ("source",)),
    Series(Histogram, "pass_adapters", "Adapters per round of training.", buckets=_ADAPTER_BUCKETS),
    Series(Gauge, "alias_generation", "Generation of the adapter's alias.", ("adapter",)),
    Series(Gauge, "adapters_parked", "Adapters that wait for an operator.", ("reason",)),
    Series(Gauge, "jobs_waiting", "Update jobs of a parked adapter that wait in the store.", ("adapter",)),
    Series(Gauge, "tenant_hour_tokens", "Tokens of a tenant's updates that started in the last 60 minutes.", ("tenant",)),
    Series(Gauge, "tenant_budget_share", "The same, as a share of the tenant's budget.", ("tenant",)),
    Series(
        Gauge, "jobs_waiting_for_budget", "Updates behind those of others, because their tenant used up its budget.",
        ("tenant",),
    ),
    Series(Counter, "store_errors", "Calls to the object store that failed.", ("op",)),
    # Subscribers.
    Series(Counter, "acks", "Versions that subscribers activated.", ("adapter",)),
    Series(Histogram, "ack_stage_seconds", "Time per stage in subscribers.", ("stage",)),
    Series(Counter, "subscriber_failures", "Failed attempts of subscribers to serve a version.", ("kind",)),
    Series(
        Gauge, "serving_stale_since_seconds",
        "When the version was published that a subscriber cannot serve, in seconds since 1970; 0: it serves the live one.",
        ("adapter",),
    ),
    Series(
        Gauge, "replicas",
        "Replicas on adapter-acks: serving and failing ones hold a lease; expired and left ones are kept for a day.",
        ("state",),
    ),
    Series(
        Gauge, "replicas_serving_revoked",
        "Replicas whose last record names a revoked version, by their state.", ("state",),
    ),
    # Forgetting.
    Series(
        Gauge, "forget_requests",
        "Retention requests in each state; closed and failed: since the role was started.", ("state",),
    ),
    Series(Gauge, "forget_overdue_requests", "Open retention requests that are past due."),
    Series(
        Counter, "forget_exceptions",
        "Requests closed at their due time although replicas had not confirmed that they drop what was forgotten.",
    ),
    Series(Counter, "forgotten_examples", "Examples made forgotten."),
    Series(
        Histogram, "forget_seconds", "Time from a retention request to its end.", buckets=_FORGET_BUCKETS_S
    ),
    Series(Gauge, "quarantined_examples", "Examples held back from learning."),
)  # fmt: skip


class Metrics:
    """The figures of one role, in a registry of its own, and its health.

    Every series has the label `role`. A label takes at most MAX_LABEL_VALUES distinct values in the life of the
    process, `adapter` as many as the setting says; later values are counted under "other", because each series costs memory here and in Prometheus. `adapter`, `tenant`
    and `topic` take the same values in all metrics. Thread-safe.

    Args:
        role: the name of the role.
        settings: gives the time after which the role counts as stalled, and how many adapters are named.
        clock: a monotonic clock, in seconds.

    Attributes:
        registry: the registry of prometheus_client with all series.
        health: the judgement of `lag`, `waiting` and `progress`.

    Example:
        >>> metrics = Metrics("curate")
        >>> metrics.cut("size", examples=12, tokens=700)
        >>> metrics.registry.get_sample_value("perennial_cut_tokens_total", {"role": "curate", "reason": "size"})
        700.0
    """

    def __init__(
        self, role: str, settings: Settings | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.role = role
        self.registry = CollectorRegistry()
        self.health = Health(role, settings.observe.stall_s if settings else DEFAULT_STALL_S, clock=clock)
        self._max_adapters = settings.observe.metric_adapters if settings else MAX_LABEL_VALUES
        self._clock = clock
        self._lock = threading.Lock()
        self._label_values: dict[str, set[str]] = {}
        self._oldest: tuple[float, float] | None = None  # age in seconds, and the clock at that time
        self._refused_runs: dict[str, int] = {}
        self._wrong_marks: set[str] = set()
        self._parked: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()  # reasons and adapters
        self._tenants: dict[str, set[str]] = {}  # label values that each series of tenants has
        self._labels: dict[str, tuple[str, ...]] = {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for series in SERIES:
            self._register(series)
        self._gauges["oldest_unlearned_event_age_seconds"].labels(role).set_function(self._oldest_now_s)
        for name in ("trained_tokens", "trained_seconds", "update_flops", "update_device_seconds", "forget_exceptions"):
            self._inc(name, 0)  # so that a role that has not trained shows 0

    def _register(self, series: Series) -> None:
        name, labels = f"perennial_{series.name}", ("role", *series.labels)
        self._labels[series.name] = series.labels
        if series.kind is Counter:
            self._counters[series.name] = Counter(name, series.help, labels, registry=self.registry)
        elif series.kind is Gauge:
            self._gauges[series.name] = Gauge(name, series.help, labels, registry=self.registry)
        else:
            self._histograms[series.name] = Histogram(
                name, series.help, labels, registry=self.registry, buckets=series.buckets
            )

    def _values(self, name: str, labels: Mapping[str, str]) -> list[str]:
        """Return the label values of a series, in the order of its labels, with the role first."""
        return [self.role, *(self._bounded(name, label, labels[label]) for label in self._labels[name])]

    def _bounded(self, name: str, label: str, value: str) -> str:
        """Return the value, or "other" if the label has taken MAX_LABEL_VALUES other values."""
        scope = label if label in _SHARED_LABELS else f"{name}.{label}"
        with self._lock:
            values = self._label_values.setdefault(scope, set())
            if value in values:
                return value
            if len(values) >= (self._max_adapters if label == "adapter" else MAX_LABEL_VALUES):
                return OTHER
            values.add(value)
            return value

    def _inc(self, name: str, amount: float = 1, **labels: str) -> None:
        self._counters[name].labels(*self._values(name, labels)).inc(amount)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].labels(*self._values(name, labels)).set(value)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._histograms[name].labels(*self._values(name, labels)).observe(seconds)

    # Every role: events, lag, age, progress.

    def events_in(self, topic: str, n: int = 1) -> None:
        """Count events that were read."""
        self._inc("events_in", n, topic=topic)

    def events_out(self, topic: str, n: int = 1) -> None:
        """Count events that were written and acknowledged by the broker."""
        self._inc("events_out", n, topic=topic)

    def refused(self, reason: str, n: int = 1) -> None:
        """Count events that were put into dead-letters."""
        self._inc("refused", n, reason=reason)

    def lag(self, topic: str, events: int) -> None:
        """Set how many events of a topic are published and not yet handled. Work waits while any are."""
        self._set("lag_events", events, topic=topic)
        self.health.lag(topic, events)

    def oldest_age_s(self, seconds: float) -> None:
        """Set the age of the oldest event that is not learned; 0: none. It grows by itself until the next call."""
        with self._lock:
            self._oldest = (seconds, self._clock()) if seconds > 0 else None

    def _oldest_now_s(self) -> float:
        with self._lock:
            if self._oldest is None:
                return 0.0
            age_s, at_s = self._oldest
            return age_s + max(0.0, self._clock() - at_s)

    def progress(self) -> None:
        """Report that an event was handled to its end."""
        self.health.progress()

    def tick(self, loop: str) -> None:
        """Report that a loop of the role turned. A loop that stops turning is stalled, whether work waits or not."""
        self.health.tick(loop)

    def stalled_partition(self, topic: str, remedy: str) -> None:
        """Count a partition that yielded nothing though records waited.

        Args:
            topic: the topic.
            remedy: `seek` or `rejoin`.
        """
        self._inc("stalled_partitions", topic=topic, remedy=remedy)

    def maintenance(self, paused: bool) -> None:
        """Report whether the role pauses for `perennial topics repartition`."""
        self.health.maintenance(paused)

    def waiting(self, waits: bool) -> None:
        """Report whether work waits that `lag` does not count.

        Call it with False when partitions are assigned for the first time too: that ends the status "starting".
        """
        self.health.waiting(waits)

    # Intake: what happened to the logs of the input topics.

    def topic_recreated(self, topic: str) -> None:
        """Count an input topic that was deleted and created again."""
        self._inc("topic_recreated", topic=topic)

    def offsets_lost(self, topic: str, kind: str, n: int) -> None:
        """Count offsets of an input topic.

        Args:
            topic: the topic.
            kind: `tail`: they were read, and the log lost them. `deleted`: they were deleted before they were read.
            n: how many.
        """
        self._inc("offsets_lost", n, topic=topic, kind=kind)

    # Curate: drift and micro-batches.

    def drift(self, signal: str, detector: str, adapter: str = OTHER) -> None:
        """Count a detection of drift in the stream of an adapter."""
        self._inc("drift", signal=signal, detector=detector, adapter=adapter)

    def cut(self, reason: str, examples: int, tokens: int) -> None:
        """Count a micro-batch with its examples and tokens."""
        self._inc("cuts", reason=reason)
        self._inc("cut_examples", examples, reason=reason)
        self._inc("cut_tokens", tokens, reason=reason)

    def wrong_marks(self, adapter: str, n: int) -> None:
        """Set how many high-water marks of an adapter are beyond the end of their log; only adapters that had one are shown."""
        with self._lock:
            if n == 0 and adapter not in self._wrong_marks:
                return
            self._wrong_marks.add(adapter)
        self._set("wrong_high_water_marks", n, adapter=adapter)

    # Learner: updates.

    def update(self, outcome: str, adapter: str) -> None:
        """Count the end of an update, and the refusals in a row of its adapter.

        Args:
            outcome: promoted, refused, unchanged, …
            adapter: the adapter's name.
        """
        self._inc("updates", outcome=outcome, adapter=adapter)
        adapter = self._bounded("updates", "adapter", adapter)
        if adapter == OTHER:
            return  # many adapters share this label value: refusals of one after those of another are not in a row
        with self._lock:
            run = self._refused_runs.get(adapter, 0)
            run = run + 1 if outcome == "refused" else 0 if outcome == "promoted" else run
            self._refused_runs[adapter] = run
            self._gauges["refused_updates_in_a_row"].labels(self.role, adapter).set(run)

    def stage_s(self, stage: str, seconds: float) -> None:
        """Record how long a stage took."""
        self._observe("stage_seconds", seconds, stage=stage)

    def loss(self, adapter: str, which: str, nats: float) -> None:
        """Set the mean loss per token of an adapter.

        Args:
            adapter: the adapter's name.
            which: `before` and `after` the update on its new text, `general`, after it on general text, or `answer_rise`:
                by how much the loss on the base's own answers is above the base's.
            nats: the loss, in nats per token.
        """
        self._set("loss_nats", nats, adapter=adapter, which=which)

    def trained(self, tokens: int) -> None:
        """Count the tokens of an update's training."""
        self._inc("trained_tokens", tokens)

    def training_pass(self, adapters: int, seconds: float) -> None:
        """Count a round of training, the adapters that shared its passes, and the time that it took."""
        self._observe("pass_adapters", adapters)
        self._inc("trained_seconds", seconds)

    def update_cost(self, flops: float, device_s: float, joules: float | None, source: str) -> None:
        """Count what an update used of the device: operations, seconds, and joules (None: not measured) by `source`."""
        self._inc("update_flops", flops)
        self._inc("update_device_seconds", device_s)
        if joules is not None:
            self._inc("update_joules", joules, source=source)

    def generation(self, adapter: str, n: int) -> None:
        """Set the generation of an adapter's alias."""
        self._set("alias_generation", n, adapter=adapter)

    def parked(self, reasons: Mapping[str, str]) -> None:
        """Set which adapters are parked; adapters that are no longer parked have no waiting jobs.

        Args:
            reasons: why each is parked, by adapter.
        """
        counts = TallyCounter(reasons.values())
        with self._lock:
            gone_reasons, gone_adapters = self._parked[0] - counts.keys(), self._parked[1] - reasons.keys()
            self._parked = frozenset(counts), frozenset(reasons)
        for reason in gone_reasons:
            self._set("adapters_parked", 0, reason=reason)
        for reason, count in counts.items():
            self._set("adapters_parked", count, reason=reason)
        for adapter in gone_adapters:
            self._set("jobs_waiting", 0, adapter=adapter)

    def jobs_waiting(self, adapter: str, jobs: int) -> None:
        """Set how many update jobs of a parked adapter wait in the store."""
        self._set("jobs_waiting", jobs, adapter=adapter)

    def tenants(
        self, hour_tokens: Mapping[str, int], budget_share: Mapping[str, float], waiting: Mapping[str, int]
    ) -> None:
        """Set the figures of tenants; those that are left out have none any more.

        Args:
            hour_tokens: tokens that started in the last 60 minutes, by tenant.
            budget_share: the same as a share of the budget, of tenants that have one.
            waiting: updates that wait because the budget is used up.
        """
        self._set_tenants("tenant_hour_tokens", hour_tokens, sum)
        self._set_tenants("tenant_budget_share", budget_share, max)
        self._set_tenants("jobs_waiting_for_budget", waiting, sum)

    def _set_tenants(self, name: str, values: Mapping[str, float], combine: Callable[[list[float]], float]) -> None:
        """Set a gauge of tenants; combine the values of those that share a label value."""
        found: dict[str, list[float]] = {}
        for tenant, value in values.items():
            found.setdefault(self._bounded(name, "tenant", tenant), []).append(value)
        with self._lock:
            gone = self._tenants.get(name, set()) - found.keys()
            self._tenants[name] = set(found)
        for tenant in gone:
            self._set(name, 0, tenant=tenant)
        for tenant, shared in found.items():
            self._set(name, combine(shared), tenant=tenant)

    def store_error(self, op: str) -> None:
        """Count a call to the object store that failed."""
        self._inc("store_errors", op=op)

    # Subscribers.

    def ack(self, adapter: str, stage_s: Mapping[str, float]) -> None:
        """Count a version that a subscriber activated.

        Args:
            adapter: the adapter's name.
            stage_s: how long each stage took, in seconds.
        """
        self._inc("acks", adapter=adapter)
        for stage, seconds in stage_s.items():
            self._observe("ack_stage_seconds", max(0.0, seconds), stage=stage)

    def subscriber_failure(self, kind: str) -> None:
        """Count a failed attempt of a subscriber to serve a version; `kind` is one of FailureKind."""
        self._inc("subscriber_failures", kind=kind)

    def serving_stale(self, adapter: str, since_s: float | None) -> None:
        """Set when the version was published that a subscriber cannot serve.

        Args:
            adapter: the adapter's name.
            since_s: the time in seconds since 1970; None: the subscriber serves the live version.
        """
        self._set("serving_stale_since_seconds", since_s or 0.0, adapter=adapter)

    def replicas(self, states: Mapping[str, int], revoked: Mapping[str, int]) -> None:
        """Set how many replicas are in each state.

        Args:
            states: the number of replicas by state, with every state.
            revoked: the same, of replicas whose last record names a revoked version.
        """
        for state, count in states.items():
            self._set("replicas", count, state=state)
            self._set("replicas_serving_revoked", revoked.get(state, 0), state=state)

    # Forgetting.

    def forget_requests(self, state: str, n: int) -> None:
        """Set how many retention requests are in a state."""
        self._set("forget_requests", n, state=state)

    def forget_overdue(self, n: int) -> None:
        """Set how many open retention requests are past due."""
        self._set("forget_overdue_requests", n)

    def forget_exceptions(self, n: int = 1) -> None:
        """Count requests that were closed at their due time although replicas had not confirmed them."""
        self._inc("forget_exceptions", n)

    def forgot(self, examples: int, seconds: float) -> None:
        """Count the end of a retention request.

        Args:
            examples: the number of examples that were forgotten.
            seconds: the time since the request was made.
        """
        self._inc("forgotten_examples", examples)
        self._observe("forget_seconds", max(0.0, seconds))

    def quarantined(self, n: int) -> None:
        """Set how many examples are held back from learning."""
        self._set("quarantined_examples", n)

    def exposition(self) -> bytes:
        """Return all series in Prometheus's text format 0.0.4."""
        return generate_latest(self.registry)
