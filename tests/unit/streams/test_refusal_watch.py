"""When intake finds out that the broker refuses TLS and SASL: until it knows, it asks again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from confluent_kafka import KafkaError

from perennial.streams.devstack.ports import HOST, free_port
from perennial.streams.intake import librdkafka
from perennial.streams.intake.librdkafka import RefusalWatch
from perennial.streams.kafka.security.access_errors import KafkaSecurityError
from perennial.streams.settings import Settings

REFUSED = KafkaError(KafkaError._AUTHENTICATION)
GONE = KafkaError(KafkaError._TRANSPORT)


@contextmanager
def listener_that_ends_connections(port: int) -> Iterator[None]:
    with closing(socket.create_server((HOST, port))) as server:

        def serve() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = server.accept()
                    connection.recv(1)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(librdkafka, "_TRY_EVERY_S", 0.0)
    return free_port()


def settings(port):
    return Settings.of(
        env_file=None, kafka=f"{HOST}:{port}", kafka_security="sasl_plaintext", kafka_sasl_mechanism="PLAIN",
        kafka_username="u", kafka_password="p",
    )  # fmt: skip


def test_one_report_is_tried_until_the_broker_answers(port):
    watch = RefusalWatch(settings(port))
    assert watch.suspects(REFUSED)
    watch.raise_if_refused()  # nobody listens: nothing is known yet
    with listener_that_ends_connections(port), pytest.raises(KafkaSecurityError):
        watch.raise_if_refused()  # librdkafka reports no second time


def test_silence_that_is_suspected_is_tried(port):
    watch = RefusalWatch(settings(port))
    watch.suspect()
    with listener_that_ends_connections(port), pytest.raises(KafkaSecurityError):
        watch.raise_if_refused()


def test_other_errors_are_not_tried(port):
    watch = RefusalWatch(settings(port))
    assert not watch.suspects(GONE)
    with listener_that_ends_connections(port):
        watch.raise_if_refused()


def test_it_asks_no_more_than_once_a_second(port, monkeypatch):
    monkeypatch.setattr(librdkafka, "_TRY_EVERY_S", 60.0)
    watch = RefusalWatch(settings(port))
    watch.suspect()
    watch.raise_if_refused()
    with listener_that_ends_connections(port):
        watch.raise_if_refused()
