"""An embedded broker with listeners for TLS and SASL, and the certificates for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.devstack.ports import HOST, free_port

USER = "intake-user"
PASSWORD = "a password; with 'marks', and = signs"
_LOGIN = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, as files in PEM.

    Attributes:
        cert: The certificate.
        key: The private key, not encrypted.
        both: One file with both.
        name: The common name.
    """

    cert: Path
    key: Path
    both: Path
    name: str


class Authority:
    """A certificate authority that signs with an elliptic-curve key.

    Args:
        folder: Where its files are written.
        name: The authority's name, and the beginning of its files' names.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._cert = self._build(self._name, self._key.public_key(), authority=True).sign(self._key, hashes.SHA256())
        self.ca_file = folder / f"{name}.pem"
        self.ca_file.write_bytes(self._cert.public_bytes(serialization.Encoding.PEM))

    def sign(self, name: str) -> Certificate:
        """Return a certificate for this machine, for servers and clients."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address(HOST))]
        builder = self._build(subject, key.public_key(), authority=False).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        cert = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        paths = [self._folder / f"{name}.{kind}.pem" for kind in ("cert", "key", "both")]
        for path, content in zip(paths, (cert, private, private + cert), strict=True):
            path.write_bytes(content)
            path.chmod(0o600)
        return Certificate(*paths, name)

    def _build(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, authority: bool
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        flags = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **flags),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder if authority else builder.add_extension(uses, critical=False)


class SecureBroker(EmbeddedBroker):
    """A broker with a listener for TLS and SASL, one for mutual TLS and one for SASL without TLS.

    The plain listener of the embedded broker stays: the brokers among themselves and the start use it.

    Args:
        data_dir: The broker's data folder.
        certificate: The broker's certificate.
        ca_file: The authority of the clients' certificates.
        super_users: With any, the broker refuses what no ACL allows, except to these, and to itself. It then speaks
            mutual TLS with itself, so that nobody on the plain listener has its rights.
    """

    def __init__(
        self, data_dir: Path, certificate: Certificate, ca_file: Path, super_users: Sequence[str] = ()
    ) -> None:
        self._guarded = bool(super_users)
        self._listeners = {"SECURE": "SASL_SSL", "MUTUAL": "SSL", "SASLONLY": "SASL_PLAINTEXT"}
        self._ports = {name: free_port() for name in self._listeners}
        stores = {
            "ssl.keystore.type": "PEM", "ssl.keystore.location": str(certificate.both),
            "ssl.truststore.type": "PEM", "ssl.truststore.location": str(ca_file),
        }  # fmt: skip
        quoted = PASSWORD.replace("\\", "\\\\").replace('"', '\\"')
        mechanisms = {
            "plain": f'{_LOGIN}.plain.PlainLoginModule required user_{USER}="{quoted}";',
            "scram-sha-256": f"{_LOGIN}.scram.ScramLoginModule required;",
            "scram-sha-512": f"{_LOGIN}.scram.ScramLoginModule required;",
            "oauthbearer": f'{_LOGIN}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="b";',
        }
        settings = {"ssl.client.auth": "none"}
        for name in ("secure", "mutual", *(["controller"] if super_users else [])):
            settings |= {f"listener.name.{name}.{key}": value for key, value in stores.items()}
        settings["listener.name.mutual.ssl.client.auth"] = "required"
        if super_users:
            settings["listener.name.controller.ssl.client.auth"] = "required"
            settings["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
            settings["super.users"] = ";".join([f"User:CN={certificate.name}", *super_users])
        for name, offered in (("secure", list(mechanisms)), ("saslonly", ["scram-sha-256"])):
            settings[f"listener.name.{name}.sasl.enabled.mechanisms"] = ",".join(offered).upper()
            for mechanism in offered:
                settings[f"listener.name.{name}.{mechanism}.sasl.jaas.config"] = mechanisms[mechanism]
        super().__init__(data_dir, settings=settings)

    def address(self, listener: str) -> str:
        """Return the address of a listener: SECURE, MUTUAL or SASLONLY."""
        return f"{HOST}:{self._ports[listener]}"

    def _properties(self, folder: Path, controller_port: int) -> dict[str, str]:
        properties = super()._properties(folder, controller_port)
        more = ",".join(f"{name}://{HOST}:{port}" for name, port in self._ports.items())
        own = "SSL" if self._guarded else "PLAINTEXT"
        protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": own, **self._listeners}
        return properties | {
            "listeners": f"{properties['listeners']},{more}",
            "advertised.listeners": f"{properties['advertised.listeners']},{more}",
            "listener.security.protocol.map": ",".join(f"{name}:{kind}" for name, kind in protocols.items()),
            "inter.broker.listener.name": "MUTUAL" if self._guarded else "PLAINTEXT",
        }


def unsigned_token(subject: str, lifetime_s: float = 3600.0) -> str:
    """Return a JWT without a signature, which Kafka's validator for development accepts."""
    now_s = datetime.now(UTC).timestamp()
    claims = {"sub": subject, "iat": now_s, "exp": now_s + lifetime_s}
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "none"}, claims)
    ]
    return f"{parts[0]}.{parts[1]}."
