"""The objects of backups: one header and its pages for each backup, and blobs that all backups of a place share.

    backups/<id>/backup.json     the header; written last, so a backup without it is one that was cut off
    backups/<id>/pages/<n>       which objects the store had, by key, with the digest and the size of each
    blobs/sha256/<digest>        the bytes of these objects, whatever they were in the store

An object that two backups hold is stored once, so a backup costs what changed since the one before. The header names the
digest of every page, a page the digest of every object: whoever reads a backup notices a changed byte.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Final

from pydantic import AwareDatetime, Field

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError
from perennial.storage.objects.keys import check_key, digest_of, hex_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import Digest
from perennial.storage.registry.records import RegistryRecord, parse_record

PREFIX: Final = "backups/"
PAGE_ENTRIES: Final = 4096
_MAX_PAGE_BYTES: Final = 8 << 20
_MAX_HEADER_BYTES: Final = 32 << 20
_ID = re.compile(r"\d{8}T\d{9}Z-[0-9a-f]{4}")
_Count = Annotated[int, Field(ge=0)]


class BackupError(PerennialError):
    """A backup cannot be made, read or restored."""


@dataclass(frozen=True)
class BackupEntry:
    """One object of a backup.

    Attributes:
        key: its key in the store.
        digest: the digest of its bytes.
        size_bytes: how many bytes it has.
    """

    key: str
    digest: str
    size_bytes: int


class BackupHeader(RegistryRecord):
    """What is known of a whole backup.

    Attributes:
        schema_version: version of this format.
        backup_id: the backup's id; ids sort by the time at which they were made.
        store: address of the store that was copied.
        began_at: when the positions of Kafka were read; everything that the store held then is in the backup.
        ended_at: when the last object was copied.
        objects: how many objects it holds.
        size_bytes: bytes of these objects.
        copied_bytes: bytes that were not stored at this place before.
        pages: digests of its pages, in order.
        positions: where the consumer groups stood at `began_at`, as `streams/recovery/kafka_positions.py` writes it; None
            where no broker was asked.
    """

    schema_version: int = 1
    backup_id: Annotated[str, Field(pattern=_ID.pattern)]
    store: str
    began_at: AwareDatetime
    ended_at: AwareDatetime
    objects: _Count
    size_bytes: _Count
    copied_bytes: _Count
    pages: list[Digest]
    positions: dict[str, Any] | None = None


def new_backup_id(now: datetime) -> str:
    """Return an id for a backup that begins now: the time to the millisecond, and four random digits."""
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z-{secrets.token_hex(2)}"


def header_key(backup_id: str) -> str:
    """Return the key of a backup's header."""
    return f"{PREFIX}{backup_id}/backup.json"


def page_key(backup_id: str, number: int) -> str:
    """Return the key of a backup's page; padded, so that lists sort."""
    return f"{PREFIX}{backup_id}/pages/{number:08d}"


def write_pages(place: ObjectStore, backup_id: str, entries: Iterable[BackupEntry]) -> list[str]:
    """Store the pages of a backup and return their digests.

    Args:
        place: where backups are kept.
        backup_id: the backup's id.
        entries: its objects, sorted by key.
    """
    digests: list[str] = []
    rest = iter(entries)
    while page := list(islice(rest, PAGE_ENTRIES)):
        number = len(digests)
        body = "".join(f"{hex_of(each.digest)} {each.size_bytes} {each.key}\n" for each in page).encode()
        place.put_if_absent(page_key(backup_id, number), body)
        digests.append(digest_of(body))
    return digests


def write_header(place: ObjectStore, header: BackupHeader) -> None:
    """Store a backup's header: from now on the backup is complete."""
    place.put_if_absent(header_key(header.backup_id), header.to_bytes())


def list_backup_ids(place: ObjectStore) -> list[str]:
    """Return the ids of all complete backups, oldest first."""
    ids = (each.removesuffix("/") for each in folders(place, PREFIX))
    return [each for each in ids if _ID.fullmatch(each) and place.exists(header_key(each))]


def folders(store: ObjectStore, prefix: str = "") -> Iterator[str]:
    """Yield the folders right below a prefix, such as `aliases/`, and the names of objects in no folder; one call each.

    Args:
        store: the store.
        prefix: ends with a slash; empty for the whole store.
    """
    cursor = prefix
    while True:
        key = next(store.list(prefix, cursor), None)
        if key is None:
            return
        name, slash, _ = key.removeprefix(prefix).partition("/")
        yield name + slash
        cursor = f"{prefix}{name}/~" if slash else key  # no key has a tilde, so this sorts after the whole folder


def load_header(place: ObjectStore, backup_id: str | None = None) -> BackupHeader:
    """Return the header of a backup.

    Args:
        place: where backups are kept.
        backup_id: the backup; None for the newest complete one.

    Raises:
        NotFoundError: there is no such backup.
        IntegrityError: the header is not readable.
    """
    ids = list_backup_ids(place) if backup_id is None else [backup_id]
    if not ids or not _ID.fullmatch(ids[-1]):
        raise NotFoundError(
            f"no complete backup in {place.uri}", got=backup_id, allowed="an id of `perennial backup ls`",
            remedy="make one with `perennial backup create DEST`, or correct the address",
        )  # fmt: skip
    key = header_key(ids[-1])
    return parse_record(BackupHeader, key, place.get(key, _MAX_HEADER_BYTES).data)


def entries_of(place: ObjectStore, header: BackupHeader) -> Iterator[BackupEntry]:
    """Yield the objects of a backup by key, one page in memory.

    Raises:
        IntegrityError: a page is missing, or is not the one that the header names.
    """
    for number, digest in enumerate(header.pages):
        key = page_key(header.backup_id, number)
        try:
            body = place.get(key, _MAX_PAGE_BYTES).data
        except NotFoundError as error:
            raise _damaged(header, f"no object {key}") from error
        if digest_of(body) != digest:
            raise _damaged(header, f"{key} holds other bytes")
        for line in body.decode().splitlines():
            digits, size_bytes, entry_key = line.split(" ", 2)
            yield BackupEntry(check_key(entry_key), f"sha256:{digits}", int(size_bytes))


def _damaged(header: BackupHeader, got: str) -> IntegrityError:
    return IntegrityError(
        f"backup {header.backup_id} is damaged", got=got, allowed="the page that its header names",
        remedy="use another backup: see `perennial backup ls`",
    )  # fmt: skip
