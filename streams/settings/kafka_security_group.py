"""The group of settings of TLS and SASL towards Kafka. See `loading` for how they are set.

`perennial.streams.kafka.security.options` maps the group to the options of each Kafka client.
"""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from perennial.streams.settings.groups import OptionalPath, OptionalSecret, SettingsError, SettingsGroup

PASSWORD_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
TOKEN_MECHANISM: Final = "OAUTHBEARER"  # noqa: S105 - the name of a mechanism
_MECHANISMS: Final = ", ".join((*PASSWORD_MECHANISMS, TOKEN_MECHANISM))
_MAX_SECRET_BYTES: Final = 64 * 1024
_PREFIX: Final = "PERENNIAL_KAFKA_"
_log = logging.getLogger("perennial.kafka")
_warned_paths: set[str] = set()


def _variable(name: str) -> AliasChoices:
    return AliasChoices(_PREFIX + name)


class KafkaSecuritySettings(SettingsGroup):
    """TLS and SASL of every Kafka client. An empty variable counts as not set.

    Which settings belong together is checked here. Files are read where a client is created, so that a replaced
    certificate, password or token is found without a restart of the process wherever a client connects anew.

    Example:
        >>> security = KafkaSecuritySettings(protocol="SASL_SSL", sasl_mechanism="scram-sha-512", username="learner",
        ...     password="never shown", _env_file=None)
        >>> security.protocol, security.sasl_mechanism, security.uses_tls
        ('sasl_ssl', 'SCRAM-SHA-512', True)
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True)
    secret_fields: ClassVar[frozenset[str]] = frozenset({"password"})

    protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        "plaintext",
        validation_alias=_variable("SECURITY"),
        description="how clients reach the broker: `plaintext`, `ssl` (TLS), `sasl_plaintext` (SASL without TLS), "
        "`sasl_ssl`",
    )
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "",
        validation_alias=_variable("SASL_MECHANISM"),
        description=f"how clients prove who they are under `sasl_…`: {_MECHANISMS}",
    )
    username: str = Field("", validation_alias=_variable("USERNAME"), description="user of PLAIN and SCRAM")
    password: OptionalSecret = Field(
        None, validation_alias=_variable("PASSWORD"), description="password of PLAIN and SCRAM"
    )
    password_file: OptionalPath = Field(
        "",
        validation_alias=_variable("PASSWORD_FILE"),
        description="file with the password, instead of the password itself",
    )
    token_file: OptionalPath = Field(
        "",
        validation_alias=_variable("TOKEN_FILE"),
        description="file with the token of OAUTHBEARER, read again for every connection; another program renews it",
    )
    ca_file: OptionalPath = Field(
        "",
        validation_alias=_variable("CA_FILE"),
        description="certificates (PEM) that the broker's must be signed by; by default those of the system",
    )
    cert_file: OptionalPath = Field(
        "",
        validation_alias=_variable("CERT_FILE"),
        description="certificate (PEM) of this client, for mutual TLS",
    )
    key_file: OptionalPath = Field(
        "",
        validation_alias=_variable("KEY_FILE"),
        description="private key (PEM, not encrypted) of that certificate",
    )

    @field_validator("protocol", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("sasl_mechanism", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.strip().upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._check_sasl()
        self._check_tls()
        return self

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.protocol in {"ssl", "sasl_ssl"}

    @property
    def uses_sasl(self) -> bool:
        """Whether clients prove who they are by SASL."""
        return self.protocol in {"sasl_plaintext", "sasl_ssl"}

    @property
    def uses_token(self) -> bool:
        """Whether clients prove who they are by a token."""
        return self.uses_sasl and self.sasl_mechanism == TOKEN_MECHANISM

    def describe(self) -> str:
        """Return protocol, mechanism and user in words, without any secret."""
        if not self.uses_sasl:
            return f"{self.protocol} with a client certificate" if self.cert_file else self.protocol
        user = "" if self.uses_token else f" as {self.username}"
        return f"{self.protocol} with {self.sasl_mechanism}{user}"

    def read_password(self) -> str:
        """Return the password of PLAIN and SCRAM, from its variable or its file.

        Raises:
            SettingsError: The file cannot be read, or is empty.
        """
        if self.password is not None:
            return self.password.get_secret_value()
        return _read_secret("PASSWORD_FILE", self.password_file)

    def read_token(self) -> str:
        """Return the token of OAUTHBEARER as its file holds it at this moment.

        Raises:
            SettingsError: The file cannot be read, or is empty.
        """
        return _read_secret("TOKEN_FILE", self.token_file)

    def check_tls_files(self) -> None:
        """Check that the files of TLS can be read, and warn of a private key that others can read.

        Raises:
            SettingsError: A file cannot be read.
        """
        for name, path, secret in (
            ("CA_FILE", self.ca_file, False), ("CERT_FILE", self.cert_file, False), ("KEY_FILE", self.key_file, True),
        ):  # fmt: skip
            if path:
                _read(name, path, secret=secret)

    def _check_sasl(self) -> None:
        given = {
            "SASL_MECHANISM": self.sasl_mechanism, "USERNAME": self.username, "PASSWORD": self.password,
            "PASSWORD_FILE": self.password_file, "TOKEN_FILE": self.token_file,
        }  # fmt: skip
        names = [name for name, value in given.items() if value]
        if not self.uses_sasl:
            if names:
                raise _not_together(
                    f"{_PREFIX}{names[0]} is set, and no client would use it",
                    got=f"{_PREFIX}SECURITY={self.protocol}",
                    allowed=f"{_PREFIX}SECURITY=sasl_ssl or sasl_plaintext",
                    remedy=f"set {_PREFIX}SECURITY, or unset {', '.join(_PREFIX + name for name in names)}",
                )
            return
        if not self.sasl_mechanism:
            raise _not_together(
                f"{_PREFIX}SECURITY={self.protocol} needs a mechanism",
                got=f"{_PREFIX}SASL_MECHANISM is not set", allowed=_MECHANISMS,
                remedy=f"set {_PREFIX}SASL_MECHANISM to one that the broker's listener has",
            )  # fmt: skip
        wanted = {"TOKEN_FILE"} if self.uses_token else {"USERNAME", "PASSWORD", "PASSWORD_FILE"}
        useless = [name for name in names if name not in wanted | {"SASL_MECHANISM"}]
        if useless:
            raise _not_together(
                f"{_PREFIX}{useless[0]} is set, and {self.sasl_mechanism} does not use it",
                got=", ".join(_PREFIX + name for name in useless),
                allowed=", ".join(_PREFIX + name for name in sorted(wanted)),
                remedy="unset it, or choose another mechanism",
            )
        if self.uses_token:
            complete = bool(self.token_file)
            needed = f"{_PREFIX}TOKEN_FILE"
        else:
            complete = bool(self.username) and (self.password is not None) != bool(self.password_file)
            needed = f"{_PREFIX}USERNAME, and either {_PREFIX}PASSWORD or {_PREFIX}PASSWORD_FILE"
        if self.sasl_mechanism.startswith("SCRAM") and set(self.username) & set(",="):
            raise _not_together(  # they have to be escaped in SCRAM's messages, which kafka-python 3.0.12 does not do
                f"{_PREFIX}USERNAME cannot be used with SCRAM", got=self.username, allowed="a name without `,` and `=`",
                remedy="give the user another name, or use another mechanism",
            )  # fmt: skip
        if not complete:
            found = [_PREFIX + name for name in names if name != "SASL_MECHANISM"]
            raise _not_together(
                f"{self.sasl_mechanism} needs credentials", got=", ".join(found) or "none of them",
                allowed=needed, remedy=f"set {needed}",
            )  # fmt: skip

    def _check_tls(self) -> None:
        given = {"CA_FILE": self.ca_file, "CERT_FILE": self.cert_file, "KEY_FILE": self.key_file}
        names = [_PREFIX + name for name, value in given.items() if value]
        if names and not self.uses_tls:
            raise _not_together(
                f"{names[0]} is set, and no connection would be encrypted", got=f"{_PREFIX}SECURITY={self.protocol}",
                allowed=f"{_PREFIX}SECURITY=ssl or sasl_ssl", remedy=f"set it, or unset {', '.join(names)}",
            )  # fmt: skip
        if bool(self.cert_file) != bool(self.key_file):
            missing = "KEY_FILE" if self.cert_file else "CERT_FILE"
            raise _not_together(
                "a certificate and its private key belong together", got=f"{_PREFIX}{missing} is not set",
                allowed=f"{_PREFIX}CERT_FILE and {_PREFIX}KEY_FILE; both may name one file",
                remedy=f"set {_PREFIX}{missing}, or unset the other one",
            )  # fmt: skip


def _not_together(message: str, *, got: str, allowed: str, remedy: str) -> SettingsError:
    return SettingsError(message, got=got, allowed=allowed, remedy=remedy)


def _read_secret(name: str, path: str) -> str:
    text = _read(name, path, secret=True).decode("utf-8", "replace").strip()
    if not text or "\ufffd" in text:
        raise SettingsError(
            f"{_PREFIX}{name} holds no secret", got=f"{path} is {'not UTF-8' if text else 'empty'}",
            allowed="one line of UTF-8", remedy="write the secret into the file",
        )  # fmt: skip
    return text


def _read(name: str, path: str, *, secret: bool) -> bytes:
    """Return what a file holds. Warn once where it holds a secret that other users can read."""
    try:
        with Path(path).open("rb") as file:
            mode = stat.S_IMODE(Path(path).stat().st_mode)
            content = file.read(_MAX_SECRET_BYTES) if secret else file.read()
    except OSError as error:
        raise SettingsError(
            f"{_PREFIX}{name} cannot be read", got=f"{path}: {error.strerror}", allowed="a file that this user can read",
            remedy=f"mount the file there, or correct {_PREFIX}{name}",
        ) from error  # fmt: skip
    # Not an error: orchestrators mount secrets readable by all users of a container that has one user.
    if secret and mode & stat.S_IROTH and path not in _warned_paths:
        _warned_paths.add(path)
        _log.warning("%s%s: every user of this machine can read %s; remedy: chmod 600", _PREFIX, name, path)
    return content
