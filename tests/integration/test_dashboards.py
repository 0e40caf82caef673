"""Every expression of every panel and alert, queried from a real Prometheus that scrapes the running roles.

The roles are led through everything that the dashboards show: documents, unreadable events, ratings that fall, a
subscriber, an adapter without subscribers, updates that the gate refuses, a store that does not answer, an event from
hours ago, a missing process. Nothing is forgotten in this run, so the metrics of forgetting come from a Metrics object
that the test itself serves; the printed table has the source of every value.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from perennial.storage.objects.s3 import open_minio
from perennial.storage.objects.s3_settings import S3Settings
from perennial.storage.registry.manifest import Manifest
from perennial.streams.addresses import direct_opener
from perennial.streams.client.publisher import Publisher
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.client.vllm_plugin.resolver_metrics import ResolverMetrics
from perennial.streams.devstack.supervisor import ROLES, Supervisor
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.input_events import DocumentObserved
from perennial.streams.kafka.topics import provision
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import compose
from tests.services import free_port, missing_service

DEPLOY = compose.ROOT / "deploy"
WINDOW, RANGE = "1m", "15m"
SERVED, ALONE, REFUSED, LATE = "acme/served", "acme/alone", "acme/refused", "acme/late"
DOCUMENTS, RATINGS, UNREADABLE, BACK_FILL = 48, 96, 6, 60
HOURS_AGO_MS = 3 * 3600 * 1000
TIMEOUT_S = 240.0
NOT_IN_THE_RUN = re.compile(
    r"perennial_(forget|forgotten|quarantined|topic_recreated|offsets_lost|wrong_high|subscriber_failures|serving_stale"
    r"|stalled_partitions|adapters_parked|jobs_waiting|tenant_budget|replicas_serving|resolver|update_joules)(_|\b)"
)
"""Metrics of what does not happen in this run: forgetting, topics that are lost or created again, forged records, parked
adapters, tenants over a budget, stalled partitions, subscribers that fail or are gone, vLLM with the plugin, and energy,
which few machines measure."""
OF_REFUSALS = {"Refused", "Updates refused", "UpdatesRefusedInARow"}
WORDS = [
    "the", "broker", "keeps", "each", "record", "until", "a", "reader", "saw", "it", "then", "adapter", "learns",
    "what", "says", "while", "graphs", "and", "matrices", "wait", "for", "their", "turn", "to", "be", "multiplied",
]  # fmt: skip


@dataclass
class Query:
    """An expression of a panel or an alert, and the data that Prometheus had for it in the run.

    Attributes:
        where: The dashboard's name, or `alert`.
        title: The panel's or the alert's name.
        expr: The expression.
        series: How many series had data.
        value: The largest value, as text; empty without data.
        source: What produced the data.
    """

    where: str
    title: str
    expr: str
    series: int = 0
    value: str = ""
    source: str = ""

    @property
    def by_the_test(self) -> bool:
        """Return whether the expression is about what the run does not do: forgetting, and lost logs."""
        return bool(NOT_IN_THE_RUN.search(self.expr))

    @property
    def promql(self) -> str:
        """Return the expression as Grafana would send it with all adapters selected."""
        expr = self.expr.replace("$__rate_interval", WINDOW).replace("$__range", RANGE).replace("$adapter", ".*")
        assert "$" not in expr, expr
        return expr


def all_queries() -> list[Query]:
    """Return the expressions of all dashboards and alerts."""
    found = []
    for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            found += [Query(path.stem, panel["title"], target["expr"]) for target in panel.get("targets", [])]
    for group in yaml.safe_load((DEPLOY / "prometheus/rules/perennial.yml").read_text("utf-8"))["groups"]:
        found += [Query("alert", rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


@dataclass
class Prometheus:
    """A Prometheus server with the project's own configuration, but this test's targets.

    Attributes:
        port: Its port.
        since_s: When it was started, in seconds since the epoch.
    """

    port: int
    since_s: float

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with direct_opener().open(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{query}: {error.read().decode()}")

    def look(self, query: Query, source: str) -> bool:
        """Run a query as a panel does, over the time of the run; return whether it has data that is not NaN."""
        found = self.get("query_range", query=query.promql, start=str(self.since_s), end=str(time.time()), step="1")
        series = [[float(value) for _, value in one["values"]] for one in found["result"]]
        series = [numbers for values in series if (numbers := [value for value in values if not math.isnan(value)])]
        if series:
            query.series, query.source = len(series), query.source or source
            query.value = f"{max(map(max, series)):.4g}"
        return bool(series)


def configuration(tmp_path: Path, loop: list[int], subscribers: list[int], served: int) -> Path:
    """Write the project's prometheus.yml with this test's targets and intervals, and return its path."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / pattern) for pattern in config["rule_files"]]
    by_job = {"perennial": loop, "subscribers": subscribers, "vllm": list[int]()}
    assert {scrape["job_name"] for scrape in config["scrape_configs"]} == set(by_job)
    for scrape in config["scrape_configs"]:
        for discovery in ("dns_sd_configs", "file_sd_configs"):
            scrape.pop(discovery, None)
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in by_job[scrape["job_name"]]]}]
    config["scrape_configs"].append(
        {"job_name": "served-by-the-test", "static_configs": [{"targets": [f"127.0.0.1:{served}"]}]}
    )
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


@pytest.fixture
def prometheus(tmp_path) -> Iterator[Any]:
    """Return a function that starts a Prometheus server with a configuration file."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing_service("no prometheus on PATH: install the package")
    started: list[subprocess.Popen[bytes]] = []

    def start(config: Path) -> Prometheus:
        port = free_port()
        with (tmp_path / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'prometheus'}",
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        started.append(process)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with direct_opener().open(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                    return Prometheus(port, time.time())
            except OSError:
                time.sleep(0.2)
        pytest.fail((tmp_path / "prometheus.log").read_text()[-2000:])

    yield start
    for process in started:
        process.terminate()
        process.wait(120)


@dataclass
class Shelf:
    """A backend that only keeps the names of versions."""

    base_sha256: str | None = None
    held: set[str] = field(default_factory=set)

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        self.held.add(name)

    def warm(self, name: str) -> None: ...

    def activate(self, name: str) -> None: ...

    def drain(self, name: str, timeout_s: float) -> bool:
        return True

    def unload(self, name: str) -> None:
        self.held.discard(name)

    def list(self) -> list[str]:
        return sorted(self.held)


def small_settings(kafka: str, prefix: str, store: Path) -> Settings:
    """Return settings for updates that take a fraction of a second: their metrics matter, not what they learn."""
    return Settings.of(
        env_file=None, kafka=kafka, topic_prefix=prefix, store=str(store), partitions=2, threads=1,
        max_batch_examples=12, max_batch_tokens=600, max_age_s=3, steps=1, rows=4, row_tokens=48, max_tokens=48,
        anchor_rows=2, max_general_rise_nats=50, min_gain_nats=-50, learning_rate=1e-4, poll_s=1,
    )  # fmt: skip


class Scenario:
    """What is done to the running roles so that every panel has data."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.rng = random.Random("dashboards")
        self.published = 0

    def documents(self, publisher: Publisher, adapter: str, count: int) -> None:
        for _ in range(count):
            self.published += 1
            text = f"note {self.published}: " + " ".join(self.rng.choices(WORDS, k=24))
            publisher.document(adapter=adapter, document_id=f"doc-{self.published}", text=text)
        publisher.flush(30)

    def begin(self, publisher: Publisher) -> None:
        """Publish documents for two adapters, one of which has a subscriber, and ratings that fall."""
        for adapter in (SERVED, ALONE):
            self.documents(publisher, adapter, DOCUMENTS // 2)
        for number in range(RATINGS):
            publisher.interaction(
                adapter=SERVED, interaction_id=f"turn-{number}", prompt="What waits?", response=f"Matrices, {number}.",
                rating=1.0 if number < RATINGS // 2 else -1.0,
            )  # fmt: skip
        publisher.flush(30)

    def unreadable(self, producer: KafkaProducer) -> None:
        for number in range(UNREADABLE):
            producer.send(self.settings.kafka.topic("documents"), b"{not json %d" % number)
        producer.flush(30)

    def from_hours_ago(self, producer: KafkaProducer) -> None:
        """Publish events with the time of hours ago. The topic otherwise replaces the producer's time by the broker's."""
        admin = KafkaAdminClient(bootstrap_servers=self.settings.kafka.bootstrap)
        documents, config = self.settings.kafka.topic("documents"), {"message.timestamp.type": "CreateTime"}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, documents, config)])
        admin.close()
        for number in range(BACK_FILL):
            text = f"hours ago {number}: " + " ".join(self.rng.choices(WORDS, k=24))
            event = DocumentObserved(adapter=LATE, document_id=f"late-{number}", text=text)
            record = encode(event, event_id=f"late-{number}", source="/tests", occurred_at=datetime.now(UTC))
            producer.send(
                documents, key=record.key, value=record.value, headers=record.headers,
                timestamp_ms=int(time.time() * 1000) - HOURS_AGO_MS,
            )  # fmt: skip
        producer.flush(30)

    def refuse(self) -> None:
        """Restart the learner with a gate that refuses everything."""
        learner = self.supervisor.children["learner"]
        learner.signal(signal.SIGTERM)
        assert learner.process is not None
        learner.process.wait(120)
        learner.environment["PERENNIAL_MIN_GAIN_NATS"] = "50"
        self.supervisor.restart("learner")


def table(queries: list[Query]) -> str:
    """Return panels and values as a Markdown table."""
    lines = ["| dashboard | panel or alert | series | largest value | from |", "|---|---|---|---|---|"]
    lines += [
        f"| {query.where} | {query.title} | {query.series} | {query.value or 'none'} | {query.source} |"
        for query in queries
    ]
    return "\n".join(lines)


@pytest.mark.slow(60)
@pytest.mark.timeout(1200)
def test_every_panel_and_alert_has_data_in_a_run_that_produces_it(broker, topic_prefix, tmp_path, prometheus):
    settings = small_settings(broker.bootstrap, topic_prefix, tmp_path / "store")
    provision(settings)
    supervisor = Supervisor(settings, tmp_path / "logs")
    queries = all_queries()
    following, lost, served = Metrics("subscriber", settings), Metrics("subscriber", settings), Metrics("retain")
    with serve_metrics(following) as one, serve_metrics(lost) as two:
        served_port = free_port()
        ports = [supervisor.children[role].port for role in ROLES]
        server = prometheus(configuration(tmp_path, ports, [one.port, two.port], served_port))

        def look(source: str) -> list[Query]:
            """Return the queries that still have no data."""
            return [query for query in queries if not query.value and not server.look(query, source)]

        def look_until(done: Callable[[list[Query]], bool], source: str, timeout_s: float) -> list[Query]:
            deadline = time.monotonic() + timeout_s
            while not done(left := look(source)) and time.monotonic() < deadline:
                for role in supervisor.children.values():
                    assert role.running, f"{role.name} ended: {role.log_tail()}"
                time.sleep(1)
            return left

        # Before any role runs the alerts for missing processes must have data.
        first = [query for query in queries if query.title in {"RoleMissing", "TargetDown"}]
        deadline = time.monotonic() + 120
        while not all(server.look(query, "the loop, before its start") for query in first):
            assert time.monotonic() < deadline, table(first)
            time.sleep(0.5)

        nowhere = {
            "PERENNIAL_S3_ENDPOINT": f"http://127.0.0.1:{free_port()}",
            "PERENNIAL_S3_ACCESS_KEY": "nobody", "PERENNIAL_S3_SECRET_KEY": "nothing",
        }  # fmt: skip
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap)
        supervisor.start()
        try:
            supervisor.wait_healthy(300)
            scenario = Scenario(settings, supervisor)
            with (
                Publisher(settings.kafka.bootstrap, settings=settings) as publisher,
                Subscriber(SERVED, Shelf(), settings=settings, metrics=following),
                Subscriber(
                    SERVED,
                    Shelf(),
                    store=open_minio("s3://nowhere", S3Settings.from_env(nowhere)),
                    settings=settings,
                    metrics=lost,
                ),
            ):
                scenario.begin(publisher)
                scenario.unreadable(producer)
                scenario.from_hours_ago(producer)
                look_until(
                    lambda left: all(query.by_the_test or query.title in OF_REFUSALS for query in left),
                    "the loop",
                    TIMEOUT_S,
                )
                scenario.refuse()
                for _ in range(3):  # one update each
                    scenario.documents(publisher, REFUSED, settings.curate.max_batch_examples)
                left = look_until(lambda left: all(query.by_the_test for query in left), "the loop", TIMEOUT_S)
                unexpected = [query for query in left if not query.by_the_test]
                assert not unexpected, "without data:\n" + table(unexpected)

                for query in queries:
                    server.look(query, query.source)  # record the largest values of the whole run
                    if query.by_the_test:
                        query.series, query.value, query.source = 0, "", ""  # zeros prove nothing: query again below

                resolver = ResolverMetrics(served.registry)
                with serve_metrics(served, port=served_port):
                    resolver.stale_since.set(time.time() - 3600)
                    served.forget_overdue(1)
                    served.quarantined(3)
                    served.serving_stale("acme/a", time.time() - 3600)
                    served.parked({"acme/a": "missing-object"})
                    served.jobs_waiting("acme/a", 2)
                    served.tenants({"acme": 900}, {"acme": 1.5}, {"acme": 2})
                    states = dict.fromkeys(("serving", "failing", "expired", "left"), 1)
                    served.replicas(states, states)
                    for state, count in (("accepted", 2), ("executed", 1), ("closed", 4), ("failed", 1)):
                        served.forget_requests(state, count)
                    for number in range(240):
                        served.forgot(2, 5.0 * number)
                        served.forget_exceptions()
                        served.topic_recreated("documents")
                        served.offsets_lost("documents", "deleted", 3)
                        served.subscriber_failure("disk-full")
                        served.wrong_marks("acme/a", 2)
                        served.update_cost(1e9, 0.5, 60.0, "nvml")
                        served.stalled_partition("examples", "seek")
                        resolver.requests.labels("failed").inc()
                        time.sleep(0.5)
                        of_test = [query for query in queries if query.by_the_test]
                        left = [query for query in of_test if not server.look(query, "served by the test")]
                        if number > 4 and not left:
                            break
                assert not left, "without data:\n" + table(left)
            rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
            assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
            adapters = server.get("label/adapter/values", **{"match[]": "perennial_updates_total"})
            assert {SERVED, ALONE, REFUSED} <= set(adapters), "the variable `adapter` offers them"
        finally:
            producer.close()
            supervisor.stop()
            (tmp_path / "panels.md").write_text(table(queries) + "\n", "utf-8")
            print("\n" + table(queries))
