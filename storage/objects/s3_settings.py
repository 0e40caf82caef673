"""Settings of the S3 client: the variables PERENNIAL_S3_*, and the AWS variables that are used where those are not set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr, field_validator

from perennial.storage.errors import StoreError

AWS_ENDPOINT = "s3.amazonaws.com"
AWS_REGION = "us-east-1"
_NO_SECRET = SecretStr("")


def _variables(*names: str) -> AliasChoices:
    return AliasChoices(*names)


class S3Settings(BaseModel):
    """Address and credentials of an S3 server, as set; a variable that is empty counts as not set.

    Values are checked where a store is opened, so that a role whose store is a folder does not stop at them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    endpoint: str = Field(
        AWS_ENDPOINT,
        validation_alias=_variables("PERENNIAL_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        description="host:port or URL of the server",
    )
    region: str = Field(
        AWS_REGION,
        validation_alias=_variables("PERENNIAL_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
        description="region that requests are signed for",
    )
    secure: str = Field(
        "",
        validation_alias=_variables("PERENNIAL_S3_SECURE"),
        description="false: plain HTTP; by default as the URL says",
    )
    access_key: SecretStr = Field(
        _NO_SECRET, validation_alias=_variables("PERENNIAL_S3_ACCESS_KEY"), description="access key"
    )
    access_key_file: str = Field(
        "", validation_alias=_variables("PERENNIAL_S3_ACCESS_KEY_FILE"), description="file with the access key"
    )
    secret_key: SecretStr = Field(
        _NO_SECRET, validation_alias=_variables("PERENNIAL_S3_SECRET_KEY"), description="secret key"
    )
    secret_key_file: str = Field(
        "", validation_alias=_variables("PERENNIAL_S3_SECRET_KEY_FILE"), description="file with the secret key"
    )
    session_token: SecretStr = Field(
        _NO_SECRET,
        validation_alias=_variables("PERENNIAL_S3_SESSION_TOKEN"),
        description="token of temporary credentials",
    )
    session_token_file: str = Field(
        "", validation_alias=_variables("PERENNIAL_S3_SESSION_TOKEN_FILE"), description="file with the token"
    )
    aws_access_key: SecretStr = Field(
        _NO_SECRET,
        validation_alias=_variables("AWS_ACCESS_KEY_ID"),
        description="access key where PERENNIAL_S3_ACCESS_KEY is not set",
    )
    aws_secret_key: SecretStr = Field(
        _NO_SECRET,
        validation_alias=_variables("AWS_SECRET_ACCESS_KEY"),
        description="secret key where PERENNIAL_S3_SECRET_KEY is not set",
    )
    aws_session_token: SecretStr = Field(
        _NO_SECRET,
        validation_alias=_variables("AWS_SESSION_TOKEN"),
        description="token where PERENNIAL_S3_SESSION_TOKEN is not set",
    )
    ca_file: str = Field(
        "",
        validation_alias=_variables("PERENNIAL_S3_CA_FILE", "AWS_CA_BUNDLE", "SSL_CERT_FILE"),
        description="certificates to trust; by default those of certifi",
    )

    @field_validator("access_key_file", "secret_key_file", "session_token_file", "ca_file")
    @classmethod
    def _expand(cls, path: str) -> str:
        return os.path.expanduser(path)  # noqa: PTH111  # Path.expanduser raises for an unknown user; reading names it

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings from environment variables.

        Args:
            env: the variables; by default those of this process.

        Returns:
            The settings as set, unchecked.
        """
        return cls.model_validate(
            {name: value for name, value in (os.environ if env is None else env).items() if value}
        )

    def address(self) -> tuple[str, bool]:
        """Check and split the endpoint.

        Returns:
            host:port, and whether it is reached over TLS.

        Raises:
            StoreError: the endpoint or PERENNIAL_S3_SECURE is not usable.
        """
        secure = self.secure.strip().lower()
        if secure not in {"", "1", "0", "true", "false", "yes", "no"}:
            raise StoreError(
                "PERENNIAL_S3_SECURE is not usable", got=secure, allowed="true or false", remedy="correct it"
            )
        parts = urlsplit(self.endpoint if "://" in self.endpoint else f"//{self.endpoint}")
        unusable = parts.scheme not in {"", "http", "https"} or not parts.netloc
        if unusable or parts.path.strip("/") or "@" in parts.netloc:
            raise StoreError(
                "PERENNIAL_S3_ENDPOINT is not usable",
                got=parts.netloc.rpartition("@")[2],
                allowed="host:port, or http(s)://host:port without a path or credentials",
                remedy="correct it",
            )
        return parts.netloc, secure in {"1", "true", "yes"} if secure else parts.scheme != "http"

    def credentials(self) -> tuple[str, str, str]:
        """Resolve access key, secret key and session token, the token empty where there is none.

        Raises:
            StoreError: a key is missing, or a file that holds one cannot be read.
        """
        access = _secret("ACCESS_KEY", self.access_key, self.access_key_file, self.aws_access_key)
        secret = _secret("SECRET_KEY", self.secret_key, self.secret_key_file, self.aws_secret_key)
        if not access or not secret:
            raise StoreError(
                "no credentials for the S3 server",
                got=f"{'an' if access else 'no'} access key, {'a' if secret else 'no'} secret key",
                allowed="PERENNIAL_S3_ACCESS_KEY and PERENNIAL_S3_SECRET_KEY, each also as _FILE; or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                remedy="set both",
            )
        token = _secret("SESSION_TOKEN", self.session_token, self.session_token_file, self.aws_session_token)
        return access, secret, token


def _secret(name: str, value: SecretStr, path: str, fallback: SecretStr) -> str:
    if value.get_secret_value():
        return value.get_secret_value()
    if not path:
        return fallback.get_secret_value()
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"PERENNIAL_S3_{name}_FILE cannot be read",
            got=f"{path}: {error}",
            remedy="mount the file where it is expected",
        ) from error
