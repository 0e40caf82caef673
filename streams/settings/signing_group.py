"""The group of settings of Ed25519 signatures. See `loading` for how they are set."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from perennial.storage.signing.key_files import TrustedKeys, parse_signing_key, read_signing_key
from perennial.storage.signing.signatures import SigningKey
from perennial.storage.signing.trust import Trust
from perennial.streams.paths import state_dir
from perennial.streams.settings.groups import OptionalPath, OptionalSecret, SettingsError, SettingsGroup


class SigningSettings(SettingsGroup):
    """Keys that sign versions, aliases and events, and keys whose signatures are asked for.

    Files are read where a process opens the registry, not where the settings are read.

    Example:
        >>> SigningSettings(_env_file=None).trust().verifies
        False
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True)
    secret_fields: ClassVar[frozenset[str]] = frozenset({"signing_key"})

    signing_key_file: OptionalPath = Field(
        "",
        description="file with the private key (Ed25519, PEM, mode 0600) that signs versions, aliases and events: for "
        "learner, streams and commands that move aliases; empty: nothing is signed",
    )
    signing_key: OptionalSecret = Field(None, description="the private key itself, instead of its file")
    trusted_keys: OptionalPath = Field(
        "",
        description="file with the public keys (PEM) of which one must have signed what subscribers, vLLM's plugin, "
        "learner, scorer and streams read; empty: signatures are not asked for",
    )
    seen_dir: OptionalPath = Field(
        "",
        description="subscriber, vLLM plugin: folder that keeps the highest signed generation of each alias, so that an "
        "older one is refused after a restart too; empty: one in perennial's state folder",
    )
    replica_key_file: OptionalPath = Field(
        "",
        description="subscriber: file with the private key (Ed25519, PEM, mode 0600) that signs its acknowledgements; "
        "empty: they are not signed",
    )
    trusted_replica_keys: OptionalPath = Field(
        "",
        description="streams: file with the public keys (PEM) of which one must have signed an acknowledgement, for it to "
        "count in a request to forget; empty: all count",
    )
    request_key_file: OptionalPath = Field(
        "",
        description="people who ask to forget or approve it: file with the private key (Ed25519, PEM, mode 0600) that "
        "signs their requests; empty: they are not signed",
    )
    trusted_request_keys: OptionalPath = Field(
        "",
        description="streams: file with the public keys (PEM) of the people who may ask for what needs a second approver, "
        "and approve it: two different ones must have signed; empty: their names are believed",
    )

    @model_validator(mode="after")
    def _check_one_key(self) -> Self:
        if self.signing_key_file and self.signing_key is not None:
            # No ValueError: pydantic's error of a whole group holds all its values, and so the key.
            raise SettingsError(
                "two keys to sign with are set", got="PERENNIAL_SIGNING_KEY_FILE and PERENNIAL_SIGNING_KEY",
                allowed="one of them", remedy="unset the other",
            )  # fmt: skip
        return self

    def key_to_sign(self) -> SigningKey | None:
        """Return the private key; None where none is set.

        Raises:
            KeyFileError: The file cannot be read, others can read it, or it holds no such key.
        """
        if self.signing_key is not None:
            # In a line of `.env` the ends of lines are written as \n.
            pem = self.signing_key.get_secret_value().replace("\\n", "\n")
            return parse_signing_key(pem.encode(), "PERENNIAL_SIGNING_KEY")
        return _signing_key(self.signing_key_file)

    def trust(self) -> Trust:
        """Return the keys of a process that may write.

        Raises:
            KeyFileError: A file of keys cannot be used.
            SettingsError: The private key is not among the trusted ones, so that this process would refuse its own work.
        """
        key = self.key_to_sign()
        trusted = self.readers_trust().trusted
        if key is not None and trusted is not None and key.public.key_id not in trusted.by_id():
            raise SettingsError(
                "the key that signs is not trusted by this process itself", got=key.public.key_id,
                allowed=", ".join(trusted.by_id()), remedy=f"add its public key to {trusted.path}: `perennial keys ls`",
            )  # fmt: skip
        return Trust(key, trusted)

    def readers_trust(self) -> Trust:
        """Return the keys of a process that only reads.

        Raises:
            KeyFileError: The file of the trusted keys cannot be used.
        """
        return Trust(None, _trusted(self.trusted_keys))

    def replica_trust(self) -> Trust:
        """Return the key with which a subscriber signs its acknowledgements.

        Raises:
            KeyFileError: The file cannot be read, others can read it, or it holds no such key.
        """
        return Trust(_signing_key(self.replica_key_file))

    def replica_readers_trust(self) -> Trust:
        """Return the keys whose acknowledgements count.

        Raises:
            KeyFileError: The file of the trusted keys cannot be used.
        """
        return Trust(None, _trusted(self.trusted_replica_keys))

    def request_trust(self) -> Trust:
        """Return the key with which a person signs requests to forget, and approvals.

        Raises:
            KeyFileError: The file cannot be read, others can read it, or it holds no such key.
        """
        return Trust(_signing_key(self.request_key_file))

    def request_readers_trust(self) -> Trust:
        """Return the keys of the people whose requests over patterns, and whose approvals, count.

        Raises:
            KeyFileError: The file of the trusted keys cannot be used.
        """
        return Trust(None, _trusted(self.trusted_request_keys))

    def seen_folder(self) -> Path:
        """Return the folder that keeps the highest generations."""
        return Path(self.seen_dir).absolute() if self.seen_dir else state_dir() / "seen-generations"


def _signing_key(path: str) -> SigningKey | None:
    """Return the private key of a file; None where no file is named."""
    return read_signing_key(Path(path)) if path else None


def _trusted(path: str) -> TrustedKeys | None:
    """Return the keys of a file, which must be readable now; None where no file is named."""
    trusted = TrustedKeys(Path(path)) if path else None
    if trusted is not None:
        trusted.by_id()
    return trusted
