"""A broker with TLS and SCRAM, and the variables with which a benchmark's processes use it and sign what they write."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from perennial.streams.kafka.topics import admin_client
from perennial.streams.settings import Settings
from tests.keys import Keys
from tests.secure_broker import Authority, SecureBroker

USER = "bench"


@contextmanager
def protected_broker(folder: Path) -> Iterator[dict[str, str]]:
    """Run a broker and yield the variables of its clients: TLS, SCRAM-SHA-512, signed records and signed versions.

    Args:
        folder: Where the broker's data, certificates and keys are written.
    """
    authority, keys = Authority(folder), Keys(folder / "keys")
    password = secrets.token_urlsafe()
    with SecureBroker(folder / "kafka", authority.sign("broker"), authority.ca_file) as broker:
        with admin_client(Settings.of(env_file=None, kafka=broker.bootstrap)) as admin:
            change = UserScramCredentialUpsertion(USER, ScramMechanism.SCRAM_SHA_512, password)
            if set(admin.alter_user_scram_credentials([change]).values()) != {None}:
                raise RuntimeError("the broker did not take the user's password")
        yield {
            "PERENNIAL_KAFKA": broker.address("SECURE"),
            "PERENNIAL_KAFKA_SECURITY": "sasl_ssl",
            "PERENNIAL_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "PERENNIAL_KAFKA_USERNAME": USER,
            "PERENNIAL_KAFKA_PASSWORD": password,
            "PERENNIAL_KAFKA_CA_FILE": str(authority.ca_file),
            "PERENNIAL_INTERNAL_KEY": secrets.token_urlsafe(),
            "PERENNIAL_SIGNING_KEY_FILE": str(keys.private),
            "PERENNIAL_TRUSTED_KEYS": str(keys.public),
        }
