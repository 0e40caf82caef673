"""An object store in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from perennial.storage.errors import ConflictError, NoSpaceError, NotFoundError, StoreError, StoreUnavailableError
from perennial.storage.objects.keys import check_prefix, is_segment, key_of, stored_name
from perennial.storage.objects.object_store import MAX_OBJECT_BYTES, StoredObject, probe_conditional_writes, too_large

_LINK_ATTEMPTS = 100
_LOCKS, _TEMPORARY, _STRIPES = ".locks", ".tmp", 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class DirectoryStore:
    """An object store in a folder, safe among the threads and processes of one machine.

    Objects appear by link and change by rename, both after fsync, so a reader sees a whole object or none, also after a
    power cut. Compare-and-swap holds an flock on one of 4,096 lock files, chosen by the key's hash.

    Args:
        root: the folder; created if it does not exist, and then only this user may enter it. To share the store with
            other users, make the folder with the mode that you want.
        fsync: wait until writes are on disk; False is for tests.
    """

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = self.root.as_uri()
        self._fsync = fsync
        self._anonymous = hasattr(os, "O_TMPFILE")
        with self._mapped_errors("open"):
            try:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            except (FileExistsError, NotADirectoryError) as error:
                raise StoreError(
                    "the store's address is no folder", got=str(self.root), allowed="a folder, or a path that is free",
                    remedy="correct PERENNIAL_STORE",
                ) from error  # fmt: skip
            for folder in (_LOCKS, _TEMPORARY):
                (self.root / folder).mkdir(parents=True, exist_ok=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        path = self._path(key)
        with self._mapped_errors(key):
            created = not path.exists() and self._create(path, data)
            if not created and self._fsync:
                # The caller relies on the object from now on, so it must survive a power cut even if the process that
                # created it has not synced it yet.
                self._sync_entry(path)
            return created

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """See ObjectStore; the etag is the SHA-256 of the bytes."""
        path = self._path(key)
        with self._mapped_errors(key), self._locked(key) as stripe:
            found = self._etag(path)
            won = found == expected and (self._create(path, data) if found is None else True)
            if not won:
                raise ConflictError(
                    f"object {key} was changed by another writer",
                    got=found or "no object",
                    allowed=expected or "no object",
                    remedy="read it again and decide anew",
                )
            if found is not None:
                self._replace(path, data, self.root / _TEMPORARY / stripe)
        return hashlib.sha256(data).hexdigest()

    def get(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> StoredObject:
        """See ObjectStore."""
        path = self._path(key)
        with self._mapped_errors(key):
            try:
                with path.open("rb") as file:
                    size_bytes = os.fstat(file.fileno()).st_size
                    if size_bytes > max_bytes:
                        raise too_large(key, size_bytes, max_bytes)
                    data = file.read()
            except FileNotFoundError:
                raise NotFoundError(f"no object {key} in {self.uri}", remedy="check the store's address") from None
        etag = hashlib.sha256(data).hexdigest()
        return StoredObject(data, etag, f"sha256:{etag}")

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        path = self._path(key)
        with self._mapped_errors(key):
            return path.is_file()

    def delete(self, key: str) -> bool:
        """See ObjectStore; folders that become empty are removed, too."""
        path = self._path(key)
        with self._mapped_errors(key), self._locked(key):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            self._sync_folder(path.parent)
            for folder in path.parents:
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:  # not empty, or already gone
                    break
            return True

    def list(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """See ObjectStore."""
        folder = check_prefix(prefix).rpartition("/")[0]
        yield from self._walk(self.root / folder, f"{folder}/" if folder else "", prefix, start_after)

    def probe(self) -> None:
        """See ObjectStore."""
        probe_conditional_writes(self, "this file system ignores links or locks: put the store on a local disk")

    def _path(self, key: str) -> Path:
        return self.root / stored_name(key)

    def _walk(self, folder: Path, folder_key: str, prefix: str, start_after: str) -> Iterator[str]:
        with self._mapped_errors(prefix):
            try:
                with os.scandir(folder) as entries:
                    found = sorted((folder_key + entry.name + ("/" if entry.is_dir() else "")) for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in found:
            if not name.endswith("/"):
                key = key_of(name)
                if key is not None and key.startswith(prefix) and key > start_after:
                    yield key
            elif is_segment(name[len(folder_key) : -1]) and (  # not the locks and temporaries
                (name.startswith(prefix) or prefix.startswith(name))
                and (name > start_after or start_after.startswith(name))
            ):
                yield from self._walk(self.root / name, name, prefix, start_after)

    def _create(self, path: Path, data: bytes) -> bool:
        """Write all bytes to an unnamed file, then link it to `path`; return False if `path` exists."""
        with self._unnamed() as (fd, source):
            self._write(fd, data)
            for attempt in range(_LINK_ATTEMPTS):
                self._make_folder(path.parent)
                try:
                    # With a src_dir_fd, whichever it is, Python calls linkat(2), and only linkat(2) follows the link in /proc
                    # to the unnamed file.
                    os.link(source, path, src_dir_fd=fd, follow_symlinks=True)
                    break
                except FileExistsError:
                    return False
                except FileNotFoundError:  # a delete took the emptied folder away in between
                    if attempt == _LINK_ATTEMPTS - 1:
                        raise
        self._sync_folder(path.parent)
        return True

    def _replace(self, path: Path, data: bytes, temporary: Path) -> None:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._write(fd, data)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self._sync_folder(path.parent)

    @contextlib.contextmanager
    def _unnamed(self) -> Iterator[tuple[int, str]]:
        """Yield a file that vanishes with the process, or a named temporary one where the system has no such files."""
        folder = self.root / _TEMPORARY
        named: Path | None = None
        fd = -1
        if self._anonymous:
            try:
                fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
                    raise
                self._anonymous = False
        if fd < 0:
            named = folder / secrets.token_hex(16)
            fd = os.open(named, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield fd, str(named) if named else f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
            if named:
                named.unlink(missing_ok=True)

    def _write(self, fd: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        if self._fsync:
            os.fsync(fd)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True, parents=True)
            self._sync_folder(path.parent)

    def _sync_folder(self, folder: Path) -> None:
        if self._fsync:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def _sync_entry(self, path: Path) -> None:
        self._sync_folder(path)
        self._sync_folder(path.parent)

    def _etag(self, path: Path) -> str | None:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[str]:
        stripe = f"{int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % _STRIPES:04d}"
        fd = os.open(self.root / _LOCKS / stripe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield stripe
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _mapped_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{key} in {self.uri}"
            if error.errno in _FULL:
                raise NoSpaceError(
                    f"no room to write {where}",
                    got=error.strerror,
                    remedy=f"free or add space at {self.root}",
                ) from error
            if error.errno in _DENIED:
                raise StoreError(
                    f"not allowed: {where}",
                    got=error.strerror,
                    remedy=f"let this user read and write {self.root}",
                ) from error
            raise StoreUnavailableError(
                f"the folder failed: {where}", got=str(error), remedy="check the disk, then do it again"
            ) from error
