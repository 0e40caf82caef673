"""Map the settings of TLS and SASL to the options of each Kafka client.

There are three clients: librdkafka (intake), kafka-python (everything else) and aiokafka (inside Faust). Each has its own
names for the same things. kafka-python and aiokafka get one `ssl.SSLContext`; librdkafka reads the files by itself.

A password is read when a client is created, by all three. A token is read for every connection, and librdkafka and
kafka-python read it again before it expires.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
from typing import Any, Final

from pydantic import SecretStr

from perennial.streams.settings import Settings, SettingsError
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings

_OPAQUE_TOKEN_S: Final = 300.0
"""For how long librdkafka keeps a token that is no JWT, or a JWT without an expiry time."""
_PREFIX: Final = "PERENNIAL_KAFKA_"


class HiddenText(str):
    """A secret for a client's options, which some clients write into their debug log.

    Example:
        >>> f"{dict(sasl_plain_password=HiddenText('secret'))}"
        "{'sasl_plain_password': '**********'}"
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'**********'"


def with_password(settings: Settings) -> Settings:
    """Return settings that keep the Kafka password which its file holds at this moment.

    For roles whose client keeps the password that it was created with. Their trials must use that one too, or a role
    with the password from before would not notice that the broker refuses it.

    Raises:
        SettingsError: The file cannot be read, or is empty.
    """
    security = settings.kafka_security
    if not security.password_file:
        return settings
    kept = security.model_copy(update={"password": SecretStr(security.read_password())})
    return settings.model_copy(update={"kafka_security": kept})


def librdkafka_options(security: KafkaSecuritySettings) -> dict[str, Any]:
    """Return the options of TLS and SASL for a client of confluent-kafka; empty for plaintext.

    Args:
        security: The settings.

    Raises:
        SettingsError: A file cannot be used.
    """
    if security.protocol == "plaintext":
        return {}
    options: dict[str, Any] = {"security.protocol": security.protocol}
    if security.uses_tls:
        ssl_context(security)  # librdkafka's own errors for such files name no file
        files = {
            "ssl.ca.location": security.ca_file,
            "ssl.certificate.location": security.cert_file,
            "ssl.key.location": security.key_file,
        }
        options |= {name: path for name, path in files.items() if path}
    if security.uses_sasl:
        options["sasl.mechanism"] = security.sasl_mechanism
        if security.uses_token:
            security.read_token()

            def token(_config: str) -> tuple[str, float]:
                text = security.read_token()
                return text, token_expiry_s(text)

            options["oauth_cb"] = token
        else:
            options["sasl.username"] = security.username
            options["sasl.password"] = HiddenText(security.read_password())
    return options


def kafka_python_options(security: KafkaSecuritySettings) -> dict[str, Any]:
    """Return the options of TLS and SASL for a client of kafka-python; empty for plaintext.

    Args:
        security: The settings.

    Raises:
        SettingsError: A file cannot be used.
    """
    options = _python_options(security)
    if security.uses_token:
        from kafka.net.sasl.oauth import AbstractTokenProvider

        class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
            def token(self) -> str:
                return security.read_token()

        options["sasl_oauth_token_provider"] = TokenFile()
    return options


def aiokafka_options(security: KafkaSecuritySettings) -> dict[str, Any]:
    """Return the options of TLS and SASL for a client of aiokafka; empty for plaintext.

    Args:
        security: The settings.

    Raises:
        SettingsError: A file cannot be used.
    """
    options = _python_options(security)
    if security.uses_token:
        from aiokafka.abc import AbstractTokenProvider  # type: ignore[import-untyped]

        class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
            async def token(self) -> str:
                return security.read_token()

        options["sasl_oauth_token_provider"] = TokenFile()
    return options


def _python_options(security: KafkaSecuritySettings) -> dict[str, Any]:
    """Return the options that have the same names in kafka-python and aiokafka."""
    if security.protocol == "plaintext":
        return {}
    options: dict[str, Any] = {"security_protocol": security.protocol.upper()}
    if security.uses_tls:
        options["ssl_context"] = ssl_context(security)
    if security.uses_sasl:
        options["sasl_mechanism"] = security.sasl_mechanism
        if security.uses_token:
            security.read_token()
        else:
            options["sasl_plain_username"] = security.username
            options["sasl_plain_password"] = HiddenText(security.read_password())
    return options


def ssl_context(security: KafkaSecuritySettings) -> ssl.SSLContext:
    """Return the context of TLS connections: the broker's certificate and its host name are checked.

    Args:
        security: Settings with `uses_tls`.

    Raises:
        SettingsError: A file cannot be read, or does not hold what it should.
    """
    security.check_tls_files()
    try:
        context = ssl.create_default_context(cafile=security.ca_file or None)
    except ssl.SSLError as error:
        raise SettingsError(
            f"{_PREFIX}CA_FILE cannot be used", got=f"{security.ca_file}: {_reason(error)}",
            allowed="certificates in PEM", remedy="write the certificate of the authority into the file",
        ) from error  # fmt: skip
    if security.cert_file:
        try:
            # Without a password of its own OpenSSL would ask for one at the terminal, and a role would wait for ever.
            context.load_cert_chain(security.cert_file, security.key_file, password=lambda: "")
        except (ssl.SSLError, ValueError) as error:
            raise SettingsError(
                f"{_PREFIX}CERT_FILE and {_PREFIX}KEY_FILE cannot be used",
                got=f"{security.cert_file}, {security.key_file}: {_reason(error)}",
                allowed="a certificate in PEM, and its private key in PEM without a password",
                remedy="see that the key belongs to the certificate and is not encrypted (`openssl pkey -in KEY`)",
            ) from error
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


def token_expiry_s(token: str) -> float:
    """Return when a token expires, in seconds since 1970: the `exp` of a JWT, or else in five minutes.

    The signature is not checked: the broker does that.

    Example:
        >>> token_expiry_s("e30.eyJleHAiOiAxOTAwMDAwMDAwfQ.")
        1900000000.0
    """
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return time.time() + _OPAQUE_TOKEN_S
