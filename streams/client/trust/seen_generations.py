"""Remember the highest signed generation of each alias in files, so that a client refuses an older one after a restart.

A signature says who wrote an alias and not when. Whoever can write to the store can put an older signed alias back, and with
it a version that was rolled back or revoked since.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

_log = logging.getLogger("perennial.subscriber")
_MAX_BYTES = 4096


class SeenGenerations:
    """The highest generations of the aliases of one store; shared by the processes of a host that have one folder.

    Nothing here raises an error because of the file system: a client that cannot remember still checks signatures. It logs
    a warning once, and remembers as long as it runs.

    Args:
        folder: Where the files are, one per alias.
        store_uri: Address of the store, so that stores with adapters of one name are kept apart.
    """

    def __init__(self, folder: Path, store_uri: str) -> None:
        self._folder = folder
        self._store_uri = store_uri
        self._known: dict[str, int] = {}
        self._warned = False

    def path_of(self, adapter: str, alias: str) -> Path:
        """Return the file of an alias; deleting it makes clients forget the generation."""
        digest = hashlib.sha256(json.dumps([self._store_uri, adapter, alias]).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def highest(self, adapter: str, alias: str) -> int:
        """Return the highest generation that was noted; 0: none."""
        path = self.path_of(adapter, alias)
        try:
            stored = _generation(path.read_bytes()[:_MAX_BYTES])
        except FileNotFoundError:
            stored = 0
        except OSError as error:
            self._warn(path, error)
            stored = 0
        return max(stored, self._known.get(path.name, 0))

    def note(self, adapter: str, alias: str, generation: int) -> None:
        """Keep a generation, unless a higher one is kept."""
        path = self.path_of(adapter, alias)
        if self._known.get(path.name, 0) >= generation:
            return
        self._known[path.name] = generation
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another process may write a higher one
                if _generation(file.read(_MAX_BYTES)) >= generation:
                    return
                kept = {"store": self._store_uri, "alias": f"{adapter}#{alias}", "generation": generation}
                file.seek(0)
                file.truncate()
                file.write(json.dumps(kept).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._warn(path, error)

    def _warn(self, path: Path, error: OSError) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(level, "the generation of an alias is kept in memory only: %s: %s", path, error.strerror or error)


def _generation(data: bytes) -> int:
    """Return the generation in a file; 0 where it is empty or was cut off by a crash."""
    try:
        found = json.loads(data)["generation"]
    except (ValueError, KeyError, TypeError):
        return 0
    return found if isinstance(found, int) else 0
