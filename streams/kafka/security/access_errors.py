"""Errors of a connection to Kafka. A refusal of TLS or SASL names the setting to correct."""

from __future__ import annotations

import ssl
from typing import Final

from perennial.storage.errors import PerennialError
from perennial.streams.settings.kafka_security_group import KafkaSecuritySettings

_PREFIX: Final = "PERENNIAL_KAFKA_"
_OTHER_HOST: Final = frozenset({62, 63, 64})
"""OpenSSL's codes X509_V_ERR_HOSTNAME_MISMATCH, …_EMAIL_MISMATCH and …_IP_ADDRESS_MISMATCH."""


class KafkaUnavailableError(PerennialError):
    """Kafka does not answer."""

    exit_code = 3


class KafkaSecurityError(KafkaUnavailableError):
    """Kafka and this client do not agree on TLS or SASL."""


class Refusals:
    """Makes the errors of one connection.

    Args:
        server: The broker's address.
        security: The settings of TLS and SASL.
    """

    def __init__(self, server: str, security: KafkaSecuritySettings) -> None:
        self._server = server
        self._security = security

    def tls(self, error: OSError) -> KafkaSecurityError:
        """Return the error of a TLS handshake that failed."""
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code in _OTHER_HOST:
                return self._error(
                    "the broker's certificate is for another host", error.verify_message,
                    allowed="a host name that the certificate has",
                    remedy="set PERENNIAL_KAFKA, and the broker's advertised.listeners, to a name in its certificate",
                )  # fmt: skip
            return self._error(
                "the broker's certificate is not trusted", error.verify_message,
                allowed="a certificate that an authority signed which is trusted",
                remedy=f"set {_PREFIX}CA_FILE to the certificate of the authority that signed the broker's",
            )  # fmt: skip
        return self._error(
            "the broker's listener does not speak TLS, or no version of it from 1.2 on", str(error),
            allowed="a listener with TLS",
            remedy=f"set PERENNIAL_KAFKA to a listener with TLS, or {_PREFIX}SECURITY to what this listener has",
        )  # fmt: skip

    def client_certificate(self, error: ssl.SSLError) -> KafkaSecurityError:
        """Return the error of a connection that the broker ends after the handshake."""
        return self._error(
            "the broker refused this client's certificate" if self._security.cert_file else "the broker wants a certificate",
            error.reason or str(error), allowed="a certificate that an authority signed which the broker trusts",
            remedy=f"set {_PREFIX}CERT_FILE and {_PREFIX}KEY_FILE to a certificate that the broker accepts",
        )  # fmt: skip

    def protocol(self, what: str) -> KafkaSecurityError:
        """Return the error of a listener that has another protocol.

        Args:
            what: What the listener did.
        """
        return self._error(
            f"the broker's listener does not take {self._security.protocol} connections", what,
            allowed=f"{_PREFIX}SECURITY as the listener has it: plaintext, ssl, sasl_plaintext or sasl_ssl",
            remedy=f"correct {_PREFIX}SECURITY, or set PERENNIAL_KAFKA to another listener",
        )  # fmt: skip

    def mechanism(self, offered: list[str]) -> KafkaSecurityError:
        """Return the error of a listener that does not have the SASL mechanism.

        Args:
            offered: The mechanisms that it has.
        """
        return self._error(
            f"the broker's listener does not have {self._security.sasl_mechanism}", "an unsupported mechanism",
            allowed=", ".join(offered), remedy=f"set {_PREFIX}SASL_MECHANISM to one of these",
        )  # fmt: skip

    def credentials(self, reason: str) -> KafkaSecurityError:
        """Return the error of an authentication that failed.

        Args:
            reason: What the broker said.
        """
        security = self._security
        if security.uses_token:
            names, what = f"the token in {_PREFIX}TOKEN_FILE", "the token"
        else:
            password = "PASSWORD_FILE" if security.password_file else "PASSWORD"
            names, what = f"{_PREFIX}USERNAME and {_PREFIX}{password}", f"user {security.username!r} or the password"
        return self._error(
            f"the broker refused {what}", reason, allowed="credentials that the broker knows", remedy=f"correct {names}"
        )

    def _error(self, message: str, got: str, *, allowed: str, remedy: str) -> KafkaSecurityError:
        return KafkaSecurityError(
            message, got=f"{got[:300]} ({self._server}, {self._security.describe()})", allowed=allowed, remedy=remedy
        )
