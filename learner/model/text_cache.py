"""Disk cache of texts that were collected from source files, so that only the first process has to parse them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from perennial.streams.paths import cache_dir

Texts = tuple[tuple[str, str], ...]


def cached_texts(collect: Callable[[], Texts], root: Path, files: Iterable[Path], code: Path) -> Texts:
    """Return the texts of the cache, or collect them and write the cache.

    The texts decide bits of training, so the cache never changes them: its key covers the Python version, the
    collecting code, and path, size and modification time of every file; its content is checked against a digest. A
    cache that is missing, damaged or not writable costs only time.

    Args:
        collect: Parses the files and returns (name, text) pairs.
        root: Folder of the files.
        files: The files that `collect` reads, in a fixed order.
        code: Source file of `collect`.
    """
    try:
        path = cache_dir() / "general-texts" / f"{_key(root, files, code)}.json"
    except OSError:
        return collect()
    body = read_checked(path)
    if body is not None:
        return tuple((name, text) for name, text in json.loads(body))
    texts = collect()
    with suppress(OSError):
        write_checked(path, json.dumps(texts).encode())
    return texts


def _key(root: Path, files: Iterable[Path], code: Path) -> str:
    digest = hashlib.sha256(f"{sys.version}\n".encode() + code.read_bytes())
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_checked(path: Path) -> bytes | None:
    """Return the content of a file that `write_checked` wrote, None where it is missing or damaged."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return body if hashlib.sha256(body).hexdigest().encode() == digest else None


def write_checked(path: Path, body: bytes) -> None:
    """Write a cache file whole or not at all. Processes that write at the same time replace each other's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
