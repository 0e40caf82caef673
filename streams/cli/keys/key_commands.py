"""Make, replace, list and remove keys. Private keys are written into files and shown nowhere."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from rich.console import Console

from perennial.storage.errors import NotFoundError
from perennial.storage.signing.key_files import (
    KeyFileError,
    TrustedKeys,
    make_signing_key,
    read_signing_key,
    write_public_keys,
    write_signing_key,
)
from perennial.storage.signing.signatures import PublicKey, SigningKey
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.settings import load_settings
from perennial.streams.settings.signing_group import SigningSettings

_COLUMNS = (Column("key"), Column("signs here"), Column("label", 1, wraps=True))


def new_key(private: Path | None, public: Path | None, label: str) -> int:
    """Make a private key, add its public key to the trusted ones, and return the exit code.

    Args:
        private: file of the private key; None: the one of the settings.
        public: file of the trusted keys; None: the one of the settings.
        label: text for people.

    Raises:
        KeyFileError: a file cannot be used, or the private one exists.
    """
    settings = load_settings().signing
    private, public = _private_path(settings, private), _public_path(settings, public)
    key = make_signing_key()
    write_signing_key(private, key)
    _trust(public, key, label)
    _tell(f"new key {key.public.key_id}", private, public)
    return 0


def rotate_key(private: Path | None, public: Path | None, label: str) -> int:
    """Replace the private key, keep the public key before it among the trusted ones, and return the exit code.

    Args:
        private: file of the private key; None: the one of the settings.
        public: file of the trusted keys; None: the one of the settings.
        label: text for people.

    Raises:
        KeyFileError: a file cannot be used, or there is no private key to replace.
    """
    settings = load_settings().signing
    private, public = _private_path(settings, private), _public_path(settings, public)
    old, key = read_signing_key(private), make_signing_key()
    draft, previous = (
        private.with_name(f".{private.name}.{uuid4().hex[:8]}"),
        private.with_name(f"{private.name}.previous"),
    )
    if old.public.key_id not in _trusted(public):
        _trust(public, old, "")
    _trust(public, key, label)  # first, so that no process signs with a key that nobody trusts
    write_signing_key(draft, key)
    try:
        private.replace(previous)
        draft.replace(private)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise KeyFileError(f"{private} cannot be replaced", got=error.strerror, allowed="a file in a folder that can be "
                           "written", remedy="correct the permissions of the folder") from error  # fmt: skip
    _tell(f"new key {key.public.key_id}, before it {old.public.key_id}", private, public)
    Console(stderr=True).print(
        f"then: 1. copy {public} to every client; 2. start learner and streams again; 3. `perennial keys sign`; "
        f"4. `perennial keys remove {old.public.key_id[:15]}` and copy the file again; 5. delete {previous}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    return 0


def list_keys(public: Path | None, *, as_json: bool) -> int:
    """Print the trusted keys and return the exit code.

    Raises:
        KeyFileError: a file of keys cannot be used.
    """
    settings = load_settings().signing
    own = settings.key_to_sign()
    keys = _trusted(_public_path(settings, public))
    own_id = own.public.key_id if own else None
    if as_json:
        print(json.dumps([{"key": each, "signs": each == own_id, "label": key.label} for each, key in keys.items()]))
    elif keys:
        print_table(_COLUMNS, [(each, "yes" if each == own_id else "", key.label) for each, key in keys.items()])
    if own is not None and own.public.key_id not in keys:
        Console(stderr=True).print(
            f"the key that signs here, {own.public.key_id}, is not trusted; its public key is:\n{own.public.pem()}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        return 1
    if not keys and not as_json:
        Console(stderr=True).print("no key is trusted yet: `perennial keys new`")
    return 0


def remove_key(key_id: str, public: Path | None) -> int:
    """Take a key out of the trusted ones and return the exit code.

    Raises:
        KeyFileError: the file cannot be used, or the key is the one that signs, or the last one.
        NotFoundError: no key has such an id, or more than one.
    """
    settings = load_settings().signing
    path, own = _public_path(settings, public), settings.key_to_sign()
    keys = _trusted(path)
    found = [each for each in keys if each.startswith(key_id if key_id.startswith("sha256:") else f"sha256:{key_id}")]
    if len(found) != 1:
        raise NotFoundError(
            "no single trusted key has that id", got=key_id, allowed=", ".join(keys), remedy="see `perennial keys ls`"
        )
    if own is not None and own.public.key_id == found[0]:
        raise KeyFileError(
            "the key that signs here stays trusted", got=found[0], allowed="another key",
            remedy="replace it first: `perennial keys rotate`",
        )  # fmt: skip
    if len(keys) == 1:
        raise KeyFileError("the last trusted key stays", got=found[0], allowed="a file with other keys besides",
                           remedy="to ask for no signatures, unset PERENNIAL_TRUSTED_KEYS")  # fmt: skip
    write_public_keys(path, {each: key for each, key in keys.items() if each != found[0]})
    print(f"{found[0]} is no longer trusted by {path}")
    return 0


def _trust(path: Path, key: SigningKey, label: str) -> None:
    stamp = label or f"made {datetime.now(UTC):%Y-%m-%d}"
    keys = dict(_trusted(path))
    keys.setdefault(key.public.key_id, PublicKey(key.public.key_id, key.public.raw, " ".join(stamp.split())[:100]))
    write_public_keys(path, keys)


def _trusted(path: Path) -> dict[str, PublicKey]:
    return dict(TrustedKeys(path).by_id()) if path.exists() else {}


def _private_path(settings: SigningSettings, given: Path | None) -> Path:
    return _given(given, settings.signing_key_file, "--private", "PERENNIAL_SIGNING_KEY_FILE")


def _public_path(settings: SigningSettings, given: Path | None) -> Path:
    return _given(given, settings.trusted_keys, "--public", "PERENNIAL_TRUSTED_KEYS")


def _given(given: Path | None, setting: str, option: str, variable: str) -> Path:
    path = given or (Path(setting) if setting else None)
    if path is None:
        raise KeyFileError(f"no file is named: {option}", got=f"{variable} is not set", allowed="the path of a file",
                           remedy=f"give {option} PATH, or set {variable}")  # fmt: skip
    return path.absolute()


def _tell(what: str, private: Path, public: Path) -> None:
    console = Console(stderr=True)
    print(what)
    for line in (
        f"private key, for the writers alone: PERENNIAL_SIGNING_KEY_FILE={private}",
        f"trusted keys, for everybody: PERENNIAL_TRUSTED_KEYS={public}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
