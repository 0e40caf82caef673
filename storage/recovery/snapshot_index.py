"""The objects of one snapshot, and the digests that they name, in a temporary file: memory does not grow with them."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from perennial.storage.recovery.backup_list import BackupEntry


class SnapshotIndex:
    """Entries by key and digests by a state, in SQLite. A context manager that deletes the file. Not thread-safe."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="perennial-backup-")
        self._db = sqlite3.connect(Path(self._folder.name) / "index.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, digest TEXT, size_bytes INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE named (digest TEXT PRIMARY KEY, followed INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE blobs (digest TEXT PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("CREATE TABLE known (digest TEXT PRIMARY KEY, size_bytes INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE manifests (digest TEXT, key TEXT, PRIMARY KEY (digest, key)) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def add(self, entries: Iterable[BackupEntry]) -> None:
        """Add entries; one with a key that is there replaces it."""
        rows = [(each.key, each.digest, each.size_bytes) for each in entries]
        self._many("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    def drop(self, keys: Iterable[str]) -> None:
        """Remove the entries with these keys."""
        self._many("DELETE FROM entries WHERE key = ?", [(key,) for key in keys])

    def keys_below(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix, sorted."""
        rows = self._db.execute(
            "SELECT key FROM entries WHERE key >= ? AND key < ? ORDER BY key", (prefix, prefix + "~")
        )
        return [key for (key,) in rows]

    def get(self, key: str) -> BackupEntry | None:
        """Return the entry with that key; None where there is none."""
        row = self._db.execute("SELECT key, digest, size_bytes FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else BackupEntry(*row)

    def entries(self, prefix: str = "") -> Iterator[BackupEntry]:
        """Yield the entries whose keys begin with a prefix, sorted by key."""
        rows = self._db.execute(
            "SELECT key, digest, size_bytes FROM entries WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, prefix + "~"),
        )
        for row in rows:
            yield BackupEntry(*row)

    def totals(self) -> tuple[int, int]:
        """Return the number of entries and their bytes."""
        count, size_bytes = self._db.execute("SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM entries").fetchone()
        return int(count), int(size_bytes)

    def name(self, digests: Iterable[str]) -> None:
        """Note that some object names these digests."""
        self._many("INSERT OR IGNORE INTO named VALUES (?, 0)", [(digest,) for digest in digests])

    def names(self, digest: str) -> bool:
        """Return whether some object names the digest."""
        return self._db.execute("SELECT 1 FROM named WHERE digest = ?", (digest,)).fetchone() is not None

    def unfollowed(self) -> Iterator[list[str]]:
        """Yield every named digest once over all calls, in lists; also those that are named meanwhile."""
        while True:
            rows = self._db.execute("SELECT digest FROM named WHERE followed = 0 LIMIT 256").fetchall()
            if not rows:
                return
            self._many("UPDATE named SET followed = 1 WHERE digest = ?", rows)
            yield [digest for (digest,) in rows]

    def add_blobs(self, digests: Iterable[str]) -> None:
        """Note that the store has blobs with these digests."""
        self._many("INSERT OR IGNORE INTO blobs VALUES (?)", [(digest,) for digest in digests])

    def add_known(self, entries: Iterable[BackupEntry]) -> None:
        """Note the sizes of blobs that an earlier backup has."""
        self._many("INSERT OR IGNORE INTO known VALUES (?, ?)", ((each.digest, each.size_bytes) for each in entries))

    def named_blobs(self, limit: int = 256) -> Iterator[list[tuple[str, int | None]]]:
        """Yield the blobs of the store that an object names, in lists, each with its size where an earlier backup has it."""
        after = ""
        while True:
            rows = self._db.execute(
                "SELECT n.digest, k.size_bytes FROM named n JOIN blobs b ON b.digest = n.digest "
                "LEFT JOIN known k ON k.digest = 'sha256:' || n.digest WHERE n.digest > ? ORDER BY n.digest LIMIT ?",
                (after, limit),
            ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield rows

    def add_manifests(self, rows: Iterable[tuple[str, str]]) -> None:
        """Note the keys of manifests by their digests."""
        self._many("INSERT OR IGNORE INTO manifests VALUES (?, ?)", list(rows))

    def manifest_keys(self, digests: Iterable[str]) -> list[str]:
        """Return the keys of the manifests with these digests."""
        found: list[str] = []
        for digest in digests:
            found += [key for (key,) in self._db.execute("SELECT key FROM manifests WHERE digest = ?", (digest,))]
        return found

    def _many(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(statement, rows)
        self._db.execute("COMMIT")
