"""Every Kafka client over TLS and SASL on a real broker: what is let in, and what is refused, at once and by name."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ScramMechanism, UserScramCredentialDeletion, UserScramCredentialUpsertion

from perennial.storage.errors import PerennialError
from perennial.streams import faust_app
from perennial.streams.cli import doctor
from perennial.streams.cli.flow import FlowReader
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.publisher import Publisher, PublishError
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.stack import Stack
from perennial.streams.faust_app import run_streams
from perennial.streams.intake.librdkafka import client_log, make_admin
from perennial.streams.intake.service import Intake, run_intake
from perennial.streams.kafka.connect import close_producer, connect
from perennial.streams.kafka.group import GroupConsumer
from perennial.streams.kafka.security.access_errors import KafkaSecurityError
from perennial.streams.kafka.security.options import aiokafka_options, librdkafka_options
from perennial.streams.kafka.topics import admin_client, identify, provision
from perennial.streams.observe.metrics import Metrics
from perennial.streams.replicas.acks import AckReader
from perennial.streams.settings import Settings
from tests.oracle import wait_until
from tests.secure_broker import PASSWORD, USER, Authority, Certificate, SecureBroker, unsigned_token
from tests.services import missing_service

SMALL = {
    "max_batch_examples": 4, "max_age_s": 3, "steps": 1, "rows": 4, "row_tokens": 48, "max_tokens": 48, "threads": 1,
    "anchor_rows": 2, "max_general_rise_nats": 50, "min_gain_nats": -50, "poll_s": 1,
}  # fmt: skip
LIMIT_S = 5.0
"""A refusal takes a third of a second; without the trial the clients take ten seconds, or never end."""


@dataclass(frozen=True)
class Site:
    """A broker with TLS and SASL, and what a client needs for it."""

    broker: SecureBroker
    folder: Path
    authority: Authority
    client: Certificate
    stranger: Certificate
    other_ca: Path
    token: Path

    def settings(self, listener: str, prefix: str = "", **security: object) -> Settings:
        return Settings.of(
            env_file=None, kafka=self.broker.address(listener), topic_prefix=prefix, store=str(self.folder / "store"),
            partitions=1, **{f"kafka_{name}": str(value) for name, value in security.items()},
        )  # fmt: skip

    def sasl(self, mechanism: str, prefix: str = "", **changed: object) -> Settings:
        given = {"username": USER, "password": PASSWORD} if mechanism != "OAUTHBEARER" else {"token_file": self.token}
        given |= {"security": "sasl_ssl", "sasl_mechanism": mechanism, "ca_file": self.authority.ca_file, **changed}
        return self.settings("SECURE", prefix, **{name: value for name, value in given.items() if value})

    def mutual(self, prefix: str = "", **changed: object) -> Settings:
        given = {
            "ca_file": self.authority.ca_file,
            "cert_file": self.client.cert,
            "key_file": self.client.key,
            **changed,
        }
        return self.settings(
            "MUTUAL", prefix, security="ssl", **{name: value for name, value in given.items() if value}
        )


@pytest.fixture(scope="module")
def site(broker_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("secure")
    authority, other = Authority(folder), Authority(folder, "other")
    token = folder / "token"
    token.write_text(unsigned_token("ann"))
    token.chmod(0o600)
    with SecureBroker(folder / "kafka", authority.sign("broker"), authority.ca_file) as broker:
        set_password(broker, USER, PASSWORD)
        yield Site(
            broker, folder, authority, authority.sign("client"), other.sign("stranger"), other.ca_file, token,
        )  # fmt: skip


def set_password(broker: SecureBroker, user: str, password: str | None) -> None:
    """Set a user's SCRAM passwords over the plain listener; None: delete them."""
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    try:
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            change = (
                UserScramCredentialDeletion(user, mechanism)
                if password is None
                else UserScramCredentialUpsertion(user, mechanism, password)
            )
            assert admin.alter_user_scram_credentials([change]) == {user: None}
    finally:
        admin.close()


def accepted(site: Site, name: str, prefix: str) -> Settings:
    if name == "mutual TLS":
        return site.mutual(prefix)
    if name == "SASL without TLS":
        return site.settings(
            "SASLONLY", prefix, security="sasl_plaintext", sasl_mechanism="SCRAM-SHA-256", username=USER,
            password=PASSWORD,
        )  # fmt: skip
    return site.sasl(name, prefix)


ACCEPTED = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "mutual TLS", "SASL without TLS")


def python_round(settings: Settings, topic: str) -> bytes:
    security, servers = settings.kafka_security, settings.kafka.bootstrap
    producer = connect(KafkaProducer, servers, 10, security=security, acks="all")
    try:
        producer.send(topic, b"by kafka-python", partition=0).get(10)
    finally:
        close_producer(producer, 1)
    consumer = connect(KafkaConsumer, servers, 10, security=security, group_id=None, auto_offset_reset="earliest")
    try:
        consumer.assign([TopicPartition(topic, 0)])
        consumer.seek_to_beginning()
        return _first(lambda: [r.value for batch in consumer.poll(timeout_ms=500).values() for r in batch])
    finally:
        consumer.close()


def librdkafka_round(settings: Settings, topic: str) -> bytes:
    options = {"bootstrap.servers": settings.kafka.bootstrap, **librdkafka_options(settings.kafka_security)}
    assert make_admin(options).describe_cluster(request_timeout=10).result().cluster_id
    producer = Producer(options, logger=client_log)
    producer.produce(topic, b"by librdkafka", partition=0)
    assert producer.flush(10) == 0
    group = {"group.id": f"{topic}-group", "auto.offset.reset": "earliest"}
    consumer = Consumer({**options, **group}, logger=client_log)
    try:
        consumer.subscribe([topic])
        return _first(lambda: [r.value() for r in consumer.consume(10, 0.5) if r.error() is None])
    finally:
        consumer.close()


async def _aiokafka_round(settings: Settings, topic: str) -> bytes:
    options = {"bootstrap_servers": settings.kafka.bootstrap, **aiokafka_options(settings.kafka_security)}
    async with aiokafka.AIOKafkaProducer(**options) as producer:
        await producer.send_and_wait(topic, b"by aiokafka", partition=0)
    async with aiokafka.AIOKafkaConsumer(topic, **options, auto_offset_reset="earliest") as consumer:
        return (await consumer.getone()).value


def aiokafka_round(settings: Settings, topic: str) -> bytes:
    return asyncio.run(asyncio.wait_for(_aiokafka_round(settings, topic), 20))


def _first(read: Callable[[], list[Any]]) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := read():
            return found[0]
    pytest.fail("nothing was read")


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_client_is_let_in(site: Site, name: str, topic_prefix: str, monkeypatch):
    settings = accepted(site, name, topic_prefix)
    assert all(report.created for report in provision(settings) if report.name.startswith(topic_prefix))
    for number, (client, written) in enumerate(
        ((python_round, b"by kafka-python"), (librdkafka_round, b"by librdkafka"), (aiokafka_round, b"by aiokafka"))
    ):
        topic = settings.kafka.topic(f"round-{number}")
        with admin_client(settings) as admin:
            admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}})
        assert client(settings, topic) == written
    with Publisher(settings=settings, timeout_s=10) as publisher:
        publisher.document(adapter="acme/support", document_id="1", text="Two days.").result()
    with FlowReader(settings) as reader:
        assert reader.read().missing_topics == []
    finding = doctor.CHECKS["broker"](settings)
    assert settings.kafka_security.describe() in finding.found


REFUSED = {
    "wrong password": (lambda s: s.sasl("SCRAM-SHA-512", password="wrong"), "KAFKA_USERNAME and .*KAFKA_PASSWORD"),
    "wrong password of PLAIN": (lambda s: s.sasl("PLAIN", password="wrong"), "KAFKA_USERNAME and .*KAFKA_PASSWORD"),
    "unknown user": (lambda s: s.sasl("SCRAM-SHA-256", username="nobody"), "refused user 'nobody' or the password"),
    "forged token": (lambda s: s.sasl("OAUTHBEARER", token_file=s.client.cert), "the token in .*KAFKA_TOKEN_FILE"),
    "other authority": (lambda s: s.sasl("SCRAM-SHA-512", ca_file=s.other_ca), "set PERENNIAL_KAFKA_CA_FILE"),
    "the system's authorities": (lambda s: s.sasl("SCRAM-SHA-512", ca_file=""), "set PERENNIAL_KAFKA_CA_FILE"),
    "no certificate": (lambda s: s.mutual(cert_file="", key_file=""), "wants a certificate.*KAFKA_CERT_FILE"),
    "a stranger's certificate": (
        lambda s: s.mutual(cert_file=s.stranger.cert, key_file=s.stranger.key), "refused this client's .*CERT_FILE",
    ),
    "another mechanism": (
        lambda s: s.settings(
            "SASLONLY", security="sasl_plaintext", sasl_mechanism="SCRAM-SHA-512", username=USER, password=PASSWORD
        ),
        "does not have SCRAM-SHA-512; .*allowed: SCRAM-SHA-256; .*KAFKA_SASL_MECHANISM",
    ),
    "TLS without SASL": (lambda s: s.settings("SECURE", security="ssl", ca_file=s.authority.ca_file), "KAFKA_SECURITY"),
    "SASL without TLS": (
        lambda s: s.settings(
            "SECURE", security="sasl_plaintext", sasl_mechanism="PLAIN", username=USER, password=PASSWORD
        ),
        "it speaks TLS.*KAFKA_SECURITY",
    ),
    "TLS where there is none": (
        lambda s: s.settings("SASLONLY", security="ssl", ca_file=s.authority.ca_file),
        "does not speak TLS.*KAFKA_SECURITY",
    ),
}  # fmt: skip


def _attempts(settings: Settings) -> dict[str, Callable[[], object]]:
    stop, security, servers = threading.Event(), settings.kafka_security, settings.kafka.bootstrap
    return {
        "admin": lambda: identify(settings, ["documents"]),
        "producer": lambda: connect(KafkaProducer, servers, 10, security=security),
        "consumer": lambda: connect(KafkaConsumer, servers, 10, security=security),
        "intake": lambda: run_intake(settings, stop, Metrics("intake", settings)),
        "streams": lambda: run_streams(settings, stop, Metrics("streams", settings)),
        "group": lambda: GroupConsumer(settings, "adapter-jobs", "learner", 1),
        "status": lambda: FlowReader(settings),
        "doctor": lambda: doctor.CHECKS["broker"](settings),
        "publisher": lambda: Publisher(settings=settings, timeout_s=10),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_every_client_is_refused_at_once_and_the_setting_is_named(site: Site, name: str, caplog):
    make, message = REFUSED[name]
    caplog.set_level(logging.DEBUG)
    settings = make(site)
    for role, attempt in _attempts(settings).items():
        error = PublishError if role == "publisher" else KafkaSecurityError
        started = time.monotonic()
        with pytest.raises(error, match=message) as raised:
            attempt()
        assert time.monotonic() - started < LIMIT_S, role
        assert raised.value.exit_code == 3
        assert PASSWORD not in f"{raised.value}"
    assert PASSWORD not in caplog.text


def test_kcat_publishes_as_docs_operations_says(site: Site, topic_prefix: str):
    if not shutil.which("kcat"):
        missing_service("kcat is not installed (Debian package kcat)")
    # Debian 12's kcat has librdkafka 2.0.2, whose SCRAM this broker refuses; PLAIN takes the same options.
    settings = site.sasl("PLAIN", topic_prefix)
    provision(settings)
    options = {
        "security.protocol": "sasl_ssl", "ssl.ca.location": site.authority.ca_file, "sasl.mechanism": "PLAIN",
        "sasl.username": USER, "sasl.password": PASSWORD,
    }  # fmt: skip
    given = [part for name, value in options.items() for part in ("-X", f"{name}={value}")]
    topic = settings.kafka.topic("documents")
    command = ["kcat", "-b", settings.kafka.bootstrap, "-t", topic, "-P", *given]
    subprocess.run(command, input='{"adapter":"acme/support"}', text=True, check=True, timeout=60)
    consumer = connect(KafkaConsumer, settings.kafka.bootstrap, 10, security=settings.kafka_security, group_id=None)
    try:
        assert sum(consumer.end_offsets([TopicPartition(topic, 0)]).values()) == 1
    finally:
        consumer.close()


def test_a_plain_client_learns_that_the_listener_wants_more(site: Site):
    for listener in ("SECURE", "SASLONLY"):
        with pytest.raises(KafkaSecurityError, match=r"does not take plaintext connections.*KAFKA_SECURITY"):
            connect(KafkaProducer, site.broker.address(listener), 1, security=Settings.of(env_file=None).kafka_security)


# The thread in which Faust's consumer runs ends with what the broken connection raised, sometimes before it was stopped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.timeout(600)
def test_roles_end_when_their_password_is_changed_and_start_with_the_new_one(
    site: Site, topic_prefix: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(faust_app, "ACCESS_CHECK_S", 1.0)
    user, password = f"u-{uuid.uuid4().hex[:8]}", tmp_path / "password"
    password.write_text("the first")
    password.chmod(0o600)
    set_password(site.broker, user, "the first")
    settings = site.sasl("SCRAM-SHA-512", topic_prefix, username=user, password="", password_file=password)
    provision(settings)
    ended: list[BaseException] = []
    stop, running, watch = threading.Event(), threading.Event(), faust_app._watch_access

    async def watched(of_role: Settings) -> None:
        running.set()
        await watch(of_role)

    monkeypatch.setattr(faust_app, "_watch_access", watched)

    def run() -> None:
        try:
            run_streams(settings, stop, Metrics("streams", settings))
        except Exception as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    streams = threading.Thread(target=run)
    streams.start()
    intake = Intake(settings, Metrics("intake", settings))
    try:
        while not intake._input.partitions:
            intake.step(stop)
        wait_until(running.is_set, 60, "the agents")  # a role that is still starting ends with another error
        password.write_text("the second")
        set_password(site.broker, user, "the second")
        site.broker.stop()
        site.broker.start()
        with pytest.raises(KafkaSecurityError, match="PERENNIAL_KAFKA_USERNAME and PERENNIAL_KAFKA_PASSWORD_FILE"):
            step_for(intake, 180)
        wait_until(lambda: bool(ended), 180, "the end of streams")
        # Faust may notice the broken connection first; started again, the role says what the broker refuses.
        assert isinstance(ended[0], PerennialError), repr(ended[0])
        if isinstance(ended[0], KafkaSecurityError):
            assert "PERENNIAL_KAFKA_PASSWORD_FILE" in str(ended[0])
    finally:
        stop.set()
        streams.join(60)
        intake.close()
    again = Intake(settings, Metrics("intake", settings))
    again.step(threading.Event())
    again.close()


def step_for(intake: Intake, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(KafkaException):
            intake.step(threading.Event())


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_the_whole_loop_runs_over_tls_and_scram(site: Site, tmp_path: Path, topic_prefix: str):
    settings = site.sasl("SCRAM-SHA-512", topic_prefix).replace(
        store=str(tmp_path / "store"), data_dir=str(tmp_path), **SMALL
    )
    secrets = {"PERENNIAL_KAFKA_PASSWORD": PASSWORD}
    stack = Stack(settings, tmp_path, environment=secrets)
    try:
        stack.start()
        with Publisher(settings=settings) as publisher:
            for number in range(8):
                text = f"Note {number}: parcels leave at noon."
                publisher.document(adapter="acme/support", document_id=f"d{number}", text=text)
        subscriber = Subscriber("acme/support", DirectoryBackend(tmp_path / "served"), settings=settings)
        with subscriber:
            wait_until(lambda: subscriber.current is not None, 400, "a version that was learned over TLS", every_s=0.5)
            acks = AckReader(settings)
            wait_until(lambda: bool(acks.replicas("acme/support")), 30, "an acknowledgement", every_s=0.5)
            acks.close()
    finally:
        stack.stop()
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "logs").iterdir())
    assert PASSWORD not in written
