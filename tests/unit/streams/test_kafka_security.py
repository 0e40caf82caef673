"""Settings of TLS and SASL: what belongs together, what each client gets, and that no secret is shown."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.errors import KafkaConnectionError, KafkaError

from perennial.streams.cli import doctor
from perennial.streams.devstack.ports import free_port
from perennial.streams.devstack.stack import Stack
from perennial.streams.kafka.security.access_errors import KafkaSecurityError
from perennial.streams.kafka.security.options import (
    HiddenText,
    aiokafka_options,
    kafka_python_options,
    librdkafka_options,
    token_expiry_s,
)
from perennial.streams.kafka.security.trial import try_access
from perennial.streams.settings import Settings, SettingsError, all_fields, load_settings
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings
from tests.secure_broker import Authority, Certificate, unsigned_token

PASSWORD = "never-shown-password"
SCRAM = {"security": "sasl_ssl", "sasl_mechanism": "SCRAM-SHA-512", "username": "ann", "password": PASSWORD}


def security(**values: object) -> KafkaSecuritySettings:
    return Settings.of(env_file=None, **{f"kafka_{name}": str(value) for name, value in values.items()}).kafka_security


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def client(authority: Authority) -> Certificate:
    return authority.sign("client")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first-token\n")
    path.chmod(0o600)
    return path


def test_every_variable_sets_its_field(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = {
        "PERENNIAL_KAFKA_SECURITY": "SASL_SSL", "PERENNIAL_KAFKA_SASL_MECHANISM": "scram-sha-256",
        "PERENNIAL_KAFKA_USERNAME": "ann", "PERENNIAL_KAFKA_PASSWORD": "", "PERENNIAL_KAFKA_PASSWORD_FILE": "/p",
        "PERENNIAL_KAFKA_TOKEN_FILE": "", "PERENNIAL_KAFKA_CA_FILE": "/ca", "PERENNIAL_KAFKA_CERT_FILE": "/cert",
        "PERENNIAL_KAFKA_KEY_FILE": "~/key",
    }  # fmt: skip
    assert {variable for group, variable, _ in all_fields() if group == "kafka_security"} == set(values)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = load_settings().kafka_security
    assert (found.protocol, found.sasl_mechanism, found.username) == ("sasl_ssl", "SCRAM-SHA-256", "ann")
    assert (found.password, found.password_file, found.token_file) == (None, "/p", "")
    assert (found.ca_file, found.cert_file, found.key_file) == ("/ca", "/cert", str(Path.home() / "key"))


def test_children_get_the_settings_but_not_the_password(monkeypatch):
    settings = Settings.of(env_file=None, **{f"kafka_{name}": value for name, value in SCRAM.items()})
    environment = settings.environment()
    assert environment["PERENNIAL_KAFKA_SECURITY"] == "sasl_ssl"
    assert environment["PERENNIAL_KAFKA_USERNAME"] == "ann"
    assert "PERENNIAL_KAFKA_PASSWORD" not in environment
    for name, value in {**environment, "PERENNIAL_KAFKA_PASSWORD": PASSWORD}.items():
        monkeypatch.setenv(name, value)
    assert load_settings(env_file=None).kafka_security == settings.kafka_security


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"security": "sasl_ssl"}, "PERENNIAL_KAFKA_SECURITY=sasl_ssl needs a mechanism.*allowed: PLAIN, SCRAM"),
        ({"security": "sasl_plaintext", "sasl_mechanism": "PLAIN"}, "PLAIN needs credentials; got: none of them"),
        (SCRAM | {"password_file": "/p"}, "either PERENNIAL_KAFKA_PASSWORD or PERENNIAL_KAFKA_PASSWORD_FILE"),
        (SCRAM | {"token_file": "/t"}, "PERENNIAL_KAFKA_TOKEN_FILE is set, and SCRAM-SHA-512 does not use it"),
        ({"security": "sasl_ssl", "sasl_mechanism": "OAUTHBEARER"}, "set PERENNIAL_KAFKA_TOKEN_FILE"),
        (
            {"security": "sasl_ssl", "sasl_mechanism": "OAUTHBEARER", "token_file": "/t", "username": "ann"},
            "PERENNIAL_KAFKA_USERNAME is set, and OAUTHBEARER does not use it",
        ),
        (SCRAM | {"username": "cn=ann,o=x"}, "PERENNIAL_KAFKA_USERNAME cannot be used with SCRAM; got: cn=ann,o=x"),
        ({"username": "ann"}, "PERENNIAL_KAFKA_USERNAME is set, and no client would use it; got: .*=plaintext"),
        ({"security": "ssl", "password": PASSWORD}, "PERENNIAL_KAFKA_PASSWORD is set, and no client would use it"),
        ({"ca_file": "/ca"}, "PERENNIAL_KAFKA_CA_FILE is set, and no connection would be encrypted"),
        ({"security": "ssl", "cert_file": "/c"}, "got: PERENNIAL_KAFKA_KEY_FILE is not set"),
        ({"security": "ssl", "key_file": "/k"}, "got: PERENNIAL_KAFKA_CERT_FILE is not set"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(values: dict[str, str], message: str):
    with pytest.raises(SettingsError, match=message) as raised:
        security(**values)
    assert PASSWORD not in f"{raised.value}"
    assert raised.value.remedy


@pytest.mark.parametrize(("variable", "value"), [("SECURITY", "tls"), ("SASL_MECHANISM", "GSSAPI")])
def test_an_unknown_word_is_refused_with_those_that_are_allowed(variable, value, monkeypatch):
    monkeypatch.setenv(f"PERENNIAL_KAFKA_{variable}", value)
    with pytest.raises(SettingsError, match=f"PERENNIAL_KAFKA_{variable} is not usable; got: {value}.*; allowed: .*'"):
        load_settings(env_file=None)


def test_plaintext_changes_no_client():
    plain = security()
    assert librdkafka_options(plain) == kafka_python_options(plain) == aiokafka_options(plain) == {}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_password_reaches_each_client_under_its_own_name(mechanism, authority):
    given = security(**{**SCRAM, "sasl_mechanism": mechanism, "ca_file": authority.ca_file})
    assert librdkafka_options(given) == {
        "security.protocol": "sasl_ssl", "ssl.ca.location": str(authority.ca_file), "sasl.mechanism": mechanism,
        "sasl.username": "ann", "sasl.password": PASSWORD,
    }  # fmt: skip
    for options in (kafka_python_options(given), aiokafka_options(given)):
        context = options.pop("ssl_context")
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert len(context.get_ca_certs()) == 1
        assert options == {
            "security_protocol": "SASL_SSL", "sasl_mechanism": mechanism, "sasl_plain_username": "ann",
            "sasl_plain_password": PASSWORD,
        }  # fmt: skip


def test_sasl_without_tls_has_no_context():
    given = security(**{**SCRAM, "security": "sasl_plaintext"})
    assert librdkafka_options(given)["security.protocol"] == "sasl_plaintext"
    for options in (kafka_python_options(given), aiokafka_options(given)):
        assert options["security_protocol"] == "SASL_PLAINTEXT"
        assert "ssl_context" not in options


def test_mutual_tls_gives_each_client_certificate_and_key(authority, client):
    given = security(security="ssl", ca_file=authority.ca_file, cert_file=client.cert, key_file=client.key)
    assert librdkafka_options(given) == {
        "security.protocol": "ssl", "ssl.ca.location": str(authority.ca_file),
        "ssl.certificate.location": str(client.cert), "ssl.key.location": str(client.key),
    }  # fmt: skip
    for options in (kafka_python_options(given), aiokafka_options(given)):
        assert set(options) == {"security_protocol", "ssl_context"}
        assert options["security_protocol"] == "SSL"


def test_a_token_is_read_from_its_file_each_time(token_file):
    given = security(security="sasl_plaintext", sasl_mechanism="OAUTHBEARER", token_file=token_file)
    rd, python, aio = librdkafka_options(given), kafka_python_options(given), aiokafka_options(given)
    assert {name: value for name, value in rd.items() if name != "oauth_cb"} == {
        "security.protocol": "sasl_plaintext", "sasl.mechanism": "OAUTHBEARER",
    }  # fmt: skip
    for options in (python, aio):
        assert set(options) == {"security_protocol", "sasl_mechanism", "sasl_oauth_token_provider"}
        assert options["sasl_mechanism"] == "OAUTHBEARER"

    def tokens() -> set[str]:
        return {
            rd["oauth_cb"]("")[0],
            python["sasl_oauth_token_provider"].token(),
            asyncio.run(aio["sasl_oauth_token_provider"].token()),
        }

    assert tokens() == {"first-token"}
    token_file.write_text("second-token")
    assert tokens() == {"second-token"}


def test_librdkafka_learns_when_a_token_expires():
    now_s = time.time()
    assert token_expiry_s(unsigned_token("ann", 60)) == pytest.approx(now_s + 60, abs=5)
    for opaque in ("opaque", "a.b.c", "e30.e30.", "e30.WyJsaXN0Il0."):
        assert token_expiry_s(opaque) == pytest.approx(now_s + 300, abs=5)


def test_a_password_file_is_read_for_every_client(tmp_path):
    path = tmp_path / "password"
    path.write_text("one\n")
    given = security(**{**SCRAM, "security": "sasl_plaintext", "password": "", "password_file": path})
    assert kafka_python_options(given)["sasl_plain_password"] == "one"
    path.write_text("two")
    assert librdkafka_options(given)["sasl.password"] == "two"


@pytest.mark.parametrize("make", [librdkafka_options, kafka_python_options, aiokafka_options])
def test_a_file_that_cannot_be_used_is_named(make: Any, tmp_path, authority, client):
    missing = tmp_path / "missing"
    empty = tmp_path / "empty"
    empty.write_text("\n")
    other = Authority(tmp_path, "other").sign("stranger")
    token = {"security": "sasl_ssl", "sasl_mechanism": "OAUTHBEARER"}
    mutual = {"security": "ssl", "ca_file": authority.ca_file}
    for values, message in (
        ({**SCRAM, "ca_file": missing}, f"PERENNIAL_KAFKA_CA_FILE cannot be read; got: {missing}: No such file"),
        ({**SCRAM, "ca_file": empty}, "PERENNIAL_KAFKA_CA_FILE cannot be used"),
        ({**SCRAM, "password": "", "password_file": missing}, "PERENNIAL_KAFKA_PASSWORD_FILE cannot be read"),
        (
            {**SCRAM, "password": "", "password_file": empty},
            f"PERENNIAL_KAFKA_PASSWORD_FILE holds no secret; got: {empty}",
        ),
        ({**token, "token_file": tmp_path}, "PERENNIAL_KAFKA_TOKEN_FILE cannot be read; got: .*: Is a directory"),
        ({**mutual, "cert_file": missing, "key_file": client.key}, "PERENNIAL_KAFKA_CERT_FILE cannot be read"),
        ({**mutual, "cert_file": client.cert, "key_file": missing}, "PERENNIAL_KAFKA_KEY_FILE cannot be read"),
        ({**mutual, "cert_file": client.cert, "key_file": other.key}, "KEY_FILE cannot be used; got: .*MISMATCH"),
    ):
        with pytest.raises(SettingsError, match=message) as raised:
            make(security(**values))
        assert raised.value.remedy


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path, authority, client):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(client.key.read_bytes(), None)
    encrypted = tmp_path / "encrypted"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    with pytest.raises(SettingsError, match="in PEM without a password"):
        kafka_python_options(security(security="ssl", cert_file=client.cert, key_file=encrypted))


def test_a_secret_that_every_user_can_read_is_reported_once(tmp_path, caplog):
    path = tmp_path / "password"
    path.write_text(PASSWORD)
    given = security(**{**SCRAM, "security": "sasl_plaintext", "password": "", "password_file": path})
    path.chmod(0o640)
    given.read_password()
    assert not caplog.records
    path.chmod(0o644)
    given.read_password()
    given.read_password()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"PERENNIAL_KAFKA_PASSWORD_FILE: every user of this machine can read {path}" in warning
    assert PASSWORD not in warning


def test_a_password_is_shown_nowhere(monkeypatch, caplog, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    settings = Settings.of(
        kafka="127.0.0.1:1", store=str(tmp_path), data_dir=str(tmp_path), **{f"kafka_{k}": v for k, v in SCRAM.items()}
    )
    options = (
        librdkafka_options(settings.kafka_security),
        kafka_python_options(settings.kafka_security),
        aiokafka_options(settings.kafka_security),
    )
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.environment()), *map(str, options)]
    assert settings.kafka_security.describe() == "sasl_ssl with SCRAM-SHA-512 as ann"
    with pytest.raises(KafkaError):  # kafka-python logs its whole configuration
        KafkaAdminClient(bootstrap_servers="127.0.0.1:1", bootstrap_timeout_ms=100, **options[1])
    assert "sasl_plain_password" in caplog.text
    for name, value in {**settings.environment(), "PERENNIAL_KAFKA_PASSWORD": PASSWORD}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "CHECKS", {"broker": doctor.CHECKS["broker"]})
    assert doctor.examine(as_json=True) == 1
    printed = capsys.readouterr()
    assert not any(PASSWORD in text for text in (*shown, caplog.text, printed.out, printed.err))
    assert f"{HiddenText(PASSWORD)}" == PASSWORD


def test_the_embedded_broker_is_not_started_for_clients_that_want_tls(tmp_path):
    settings = Settings.of(env_file=None, data_dir=str(tmp_path), kafka_security="ssl")
    with pytest.raises(SettingsError, match="the embedded broker has neither TLS nor SASL"):
        Stack(settings, tmp_path).start()
    assert not list(tmp_path.iterdir())


class Listener:
    """A TCP server that answers every connection with the same bytes; None: with nothing at all, and stays open."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            if self._answer is None:
                self._open.append(connection)
                continue
            with connection:
                connection.recv(4096)
                connection.sendall(self._answer)

    def close(self) -> None:
        self._server.close()
        for connection in self._open:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "it ended the connection"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "it speaks TLS"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "none of Kafka's"),
        (b"\x00\x00\x00\x04\x00\x00\x00\x00", "it ended the connection"),
    ],
)
def test_a_listener_of_another_protocol_is_named(answer, message):
    listener = Listener(answer)
    try:
        with pytest.raises(KafkaSecurityError, match=message) as raised:
            try_access(listener.address, security(), 5)
        assert "PERENNIAL_KAFKA_SECURITY" in raised.value.remedy
    finally:
        listener.close()


@pytest.mark.parametrize("values", [{}, {"security": "ssl"}, SCRAM, {**SCRAM, "security": "sasl_plaintext"}])
def test_a_broker_that_never_answers_ends_the_trial_in_time(values):
    listener = Listener(None)
    try:
        with pytest.raises(KafkaConnectionError, match=listener.address):
            try_access(listener.address, security(**values), 0.2)
    finally:
        listener.close()
    with pytest.raises(KafkaConnectionError, match="refused"):
        try_access(f"127.0.0.1:{free_port()}", security(**values), 5)
