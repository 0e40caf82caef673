"""`DirectoryBackend` serves versions as PEFT adapter folders, for servers that watch a folder. Needs no torch."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson

from perennial.storage.errors import PerennialError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import BackendError, UnfitVersionError

_SEGMENT = r"[a-z0-9][a-z0-9._-]*"
_NAME = re.compile(rf"(?P<adapter>{_SEGMENT}(?:/{_SEGMENT}){{0,3}})(?:#(?P<alias>{_SEGMENT}))?@(?P<hex>[0-9a-f]{{64}})")
_LOADING, _UNLOADING = ".loading-", ".unloading-"
_STALE_S = 3600.0
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NOTE_BYTES = 4096
_HUB_ID_AT_REVISION = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)@[\w.-]+")


class DirectoryBackend:
    """Writes versions as PEFT adapter folders, for a server that watches a folder or is given a path.

    `<path>/<adapter>/@<64 hex>/` has adapter_model.safetensors, adapter_config.json and manifest.json, and appears whole
    or not at all. `<path>/<adapter>/@live.json` names the folder to serve and is replaced atomically. `@live.base` beside
    it has the digest of the base that the servers run, and stays when no version is served. No adapter name may have an
    `@` in it, so these names collide with no adapter.

    >>> import tempfile
    >>> from perennial import DirectoryBackend, Settings, Subscriber
    >>> from perennial.testing import publish_version
    >>> store, served = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
    >>> version = publish_version(store.name, "acme/support")  # a learner does this
    >>> backend = DirectoryBackend(served.name)
    >>> settings = Settings.of(poll_s=0.05, kafka="")
    >>> with Subscriber("acme/support", backend, store=store.name, settings=settings) as subscriber:
    ...     subscriber.wait_for(generation=1, timeout_s=30)
    True
    >>> backend.current("acme/support") == f"acme/support@{version.removeprefix('sha256:')}"
    True
    >>> folder = backend.path / "acme/support" / f"@{version.removeprefix('sha256:')}"
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'manifest.json']
    >>> store.cleanup(), served.cleanup()
    (None, None)

    Args:
        path: The folder; it is made if it does not exist.
        base_sha256: Digest of the base model of the servers, `sha256:<64 hex>`. None: the base of the first
            version that was active, which the folder keeps for each alias. A digest replaces the one that it keeps as
            soon as a version is active.
        base_model_name: Name of the base in `adapter_config.json`. vLLM's own resolvers serve only a folder that names
            the model exactly as the server's `--model` does. None: the name in the version's manifest, for a hub id
            without its revision.
        grace_s: How long a version stays on the disk after another one became active, in seconds, for servers that
            still read it.
        durable: Whether a version and the file of an alias are flushed to the disk before they appear, which can take
            seconds on a busy disk. False where a loss of power also ends the servers that read them: what it damages is
            written again at the next load. A deletion is flushed in any case.
        clock: Monotonic clock in seconds.
    """

    has_room = True

    def __init__(
        self,
        path: Path | str,
        *,
        base_sha256: str | None = None,
        base_model_name: str | None = None,
        grace_s: float = 0.0,
        durable: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path).expanduser()
        self.base_sha256 = base_sha256
        self.base_model_name = base_model_name
        self._grace_s = grace_s
        self._durable = durable
        self._clock = clock
        self._left_at_s: dict[str, float] = {}
        self.path.mkdir(parents=True, exist_ok=True)
        # Folders that a killed process left half written. A young one may belong to a process that is still writing.
        for unfinished in self.path.glob(f"{_LOADING}*"):
            if time.time() - unfinished.stat().st_mtime > _STALE_S:
                shutil.rmtree(unfinished, ignore_errors=True)

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Write the folder of a version.

        Args:
            name: Name of the version, `<adapter>@<64 hex>` or `<adapter>#<alias>@<64 hex>`.
            weights: The LoRA weights as a safetensors file.
            manifest: The manifest of the version.

        Raises:
            BackendError: The name is not a version's name.
            UnfitVersionError: The version cannot be written as a PEFT adapter, or the servers have another base.
            BackendError: The file with the base of the servers is damaged.
            OSError: The folder cannot be written; nothing of the version is left then.
            IntegrityError: The weights are not safetensors.
        """
        self._require_base(name, manifest)
        files = {
            "adapter_model.safetensors": weights,
            "adapter_config.json": adapter_config(weights, manifest, self.base_model_name),
            "manifest.json": manifest.to_bytes(),
        }
        self.write_folder(self.folder_of(name).relative_to(self.path), files)

    def _require_base(self, name: str, manifest: Manifest) -> None:
        """Refuse a version of another base than the servers have run: they still run it, also where they serve nothing."""
        if self.base_sha256 is not None:
            return  # the subscriber has compared it
        kept = self._kept_base(name)
        if kept is None:  # the folder may come from a release that kept no base
            served = self._active(self._pointer(name))
            kept = self._base_of(served) if served and _NAME.fullmatch(served) else None
        if kept is not None and kept != manifest.base_sha256:
            raise UnfitVersionError(
                f"{name} belongs to another base than the servers of this folder",
                got=manifest.base_sha256, allowed=kept,
                remedy="once the servers run the new base, start their subscriber with its digest (--base-sha256)",
            )  # fmt: skip

    def manifest_of(self, name: str) -> Manifest | None:
        """Return the manifest of a version that is held; None where there is none that can be read."""
        try:
            return Manifest.from_bytes((self.folder_of(name) / "manifest.json").read_bytes())
        except (OSError, PerennialError):
            return None

    def _base_of(self, name: str) -> str | None:
        """Return the base of a version; None where it is not held, or is damaged."""
        try:
            found = orjson.loads((self.folder_of(name) / "manifest.json").read_bytes()).get("base_sha256")
        except (OSError, orjson.JSONDecodeError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    def _base_file(self, name: str) -> Path:
        return self._pointer(name).with_suffix(".base")

    def _kept_base(self, name: str) -> str | None:
        """Return the base that the folder keeps for the alias of a version; None if it keeps none.

        Raises:
            BackendError: The file is damaged.
        """
        path = self._base_file(name)
        try:
            data = _read_note(path)
            if not data and not self._durable:
                return None  # a loss of power came before the flush
            found = orjson.loads(data)["base_sha256"]
        except FileNotFoundError:
            return None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            found = None
        if not isinstance(found, str) or not _DIGEST.fullmatch(found):
            raise BackendError(
                "the file with the base of the servers is damaged, so nobody knows which versions they can serve",
                got=str(path), allowed='{"base_sha256": "sha256:<64 hex>"}',
                remedy="start the subscriber with the digest of the base that they run (--base-sha256)",
            )  # fmt: skip
        return found

    def _keep_base(self, name: str, *, leaving: bool) -> None:
        """Keep the base of the servers; flush it where the version leaves, because nothing else tells it then."""
        path, before = self._base_file(name), b""
        with suppress(FileNotFoundError):
            before = _read_note(path)
        content = before
        if self.base_sha256 is not None or not before:  # else `load` has compared it
            base_sha256 = self.base_sha256 or self._base_of(name)
            if base_sha256 is None:
                return
            content = orjson.dumps({"base_sha256": base_sha256}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        if leaving or content != before:
            _replace_file(path, content, leaving or self._durable)

    def write_folder(self, inside: Path, files: dict[str, bytes]) -> None:
        """Write a folder as a whole; do nothing where it has these files already.

        Args:
            inside: Path of the folder below that of the backend.
            files: Contents by file name.

        Raises:
            OSError: It cannot be written; nothing of it is left then.
        """
        folder = self.path / inside
        if self._holds(folder, files):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_LOADING, dir=self.path))
        try:
            staging.chmod(0o755)  # mkdtemp's 0700 would lock out servers of other users
            for file_name, data in files.items():
                _write_file(staging / file_name, data, self._durable)
            if folder.exists():  # damaged, or this call would have ended above
                self._remove(folder)
            staging.rename(folder)
            self._sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _holds(self, folder: Path, files: dict[str, bytes]) -> bool:
        try:
            return all(digest_of((folder / name).read_bytes()) == digest_of(data) for name, data in files.items())
        except FileNotFoundError:
            return False

    def warm(self, name: str) -> None:
        """Do nothing: a folder needs no warm-up.

        Raises:
            BackendError: The version is not held.
        """
        self._require(name)

    def activate(self, name: str) -> None:
        """Point the file of the alias at the version.

        Raises:
            BackendError: The version is not held.
        """
        folder = self._require(name)
        pointer = self._pointer(name)
        before = self._active(pointer)
        pointed = {"name": name, "version": f"sha256:{folder.name[-64:]}", "folder": folder.name}
        content = orjson.dumps(pointed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        self._keep_base(name, leaving=False)  # first: the servers may read the version as soon as the file names it
        _replace_file(pointer, content, self._durable)
        if before and before != name:
            self._left_at_s[before] = self._clock()

    def deactivate(self, name: str) -> None:
        """Delete the file of the alias, if it points at the version. The base of the servers is kept."""
        pointer = self._pointer(name)
        if self._active(pointer) == name:
            with suppress(OSError):  # a full disk must not keep a revoked version in service
                self._keep_base(name, leaving=True)
            pointer.unlink()
            _sync_folder(pointer.parent)

    def is_active(self, name: str) -> bool:
        """Return whether the file of the version's alias points at it."""
        return self._active(self._pointer(name)) == name

    def folder_of(self, name: str) -> Path:
        """Return the folder of a version, whether it exists or not.

        Raises:
            BackendError: The name is not a version's name.
        """
        above, alias, version = self._parts(name)
        return above / (f"@{alias}@{version}" if alias else f"@{version}")

    def drain(self, name: str, timeout_s: float) -> bool:  # noqa: ARG002 - it does not wait
        """Return whether the version's grace time is over, without waiting for it."""
        left_at_s = self._left_at_s.setdefault(name, self._clock())
        return self._clock() - left_at_s >= self._grace_s

    def unload(self, name: str) -> None:
        """Delete the folder of the version. If the file of its alias points there, delete that file first."""
        folder = self.folder_of(name)
        self.deactivate(name)
        if folder.exists():
            self._remove(folder)
        for doomed in folder.parent.glob(
            f"{_UNLOADING}*/{folder.name}"
        ):  # a process was killed while it deleted this folder
            shutil.rmtree(doomed.parent)
        self._left_at_s.pop(name, None)

    def list(self) -> list[str]:
        """Return the names of all versions that have a folder, of every adapter.

        A folder whose deletion was cut off still counts, so that a subscriber deletes the rest of it.
        """
        found = set()
        for folder, below, _ in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            adapter = (inside.parent if inside.name.startswith(_UNLOADING) else inside).as_posix()
            for name in below:
                alias, _, version = name[1:].rpartition("@")
                if name.startswith("@") and _HEX.fullmatch(version):
                    found.add(f"{adapter}{'#' if alias else ''}{alias}@{version}")
            below[:] = [name for name in below if name[0] not in "@." or name.startswith(_UNLOADING)]
        return sorted(found)

    def current(self, adapter: str, alias: str = "live") -> str | None:
        """Return the name of the version that an alias's file points at, also after a restart.

        Args:
            adapter: Name of the adapter.
            alias: Name of the alias.

        Returns:
            The name, or None if there is no such file.
        """
        return self._active(self.path / adapter / f"@{alias}.json")

    def _active(self, pointer: Path) -> str | None:
        try:
            pointed = orjson.loads(pointer.read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None
        name = pointed.get("name") if isinstance(pointed, dict) else None
        return name if isinstance(name, str) else None

    def _parts(self, name: str) -> tuple[Path, str, str]:
        match = _NAME.fullmatch(name)
        if match is None:
            raise BackendError("not a version's name", got=name, allowed="adapter@64hex or adapter#alias@64hex")
        return self.path / match["adapter"], match["alias"] or "", match["hex"]

    def _pointer(self, name: str) -> Path:
        above, alias, _ = self._parts(name)
        return above / f"@{alias or 'live'}.json"

    def _require(self, name: str) -> Path:
        folder = self.folder_of(name)
        if not folder.is_dir():
            raise BackendError(f"{name} is not held", remedy="load it first")
        return folder

    def _sync(self, folder: Path) -> None:
        if self._durable:
            _sync_folder(folder)

    def _remove(self, folder: Path) -> None:
        # Rename first, so that a reader sees the whole folder or none of it.
        try:
            doomed = Path(tempfile.mkdtemp(prefix=_UNLOADING, dir=folder.parent))
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            shutil.rmtree(folder)  # the disk is full: what is deleted is what makes room
            return
        folder.rename(doomed / folder.name)
        _sync_folder(folder.parent)
        shutil.rmtree(doomed)


def adapter_config(weights: bytes, manifest: Manifest, base_model_name: str | None = None) -> bytes:
    """Return PEFT's `adapter_config.json` for a version, with the target modules taken from the tensors' names.

    Args:
        weights: The LoRA weights as a safetensors file with the tensor names of a PEFT adapter file.
        manifest: The manifest of the version; it gives the base, the rank and alpha.
        base_model_name: Name of the base to write. None: the name in the manifest, for a hub id without its revision,
            because servers are given the revision apart from the id.

    Raises:
        IntegrityError: The weights are not safetensors.
        UnfitVersionError: The manifest names no alpha, or no tensor is named as in a PEFT adapter file.
    """
    check_safetensors(weights)
    (header_bytes,) = struct.unpack_from("<Q", weights)
    names = orjson.loads(weights[8 : 8 + header_bytes])
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if ".lora_" in name})
    alpha = manifest.config.get("alpha")
    if not targets or not isinstance(alpha, int | float):
        raise UnfitVersionError(
            "the version cannot be written as a PEFT adapter",
            got=f"alpha {alpha}, {len(targets)} target modules",
            allowed="alpha in the manifest's config, and tensors named as in a PEFT adapter file",
        )
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name or _name_for_servers(manifest.base_model),
        "r": manifest.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "modules_to_save": None,
    }  # fmt: skip
    return json.dumps(content, sort_keys=True).encode()


def _name_for_servers(base_model: str) -> str:
    match = _HUB_ID_AT_REVISION.fullmatch(base_model)
    return match["id"] if match else base_model


def _write_file(path: Path, data: bytes, durable: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _read_note(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_NOTE_BYTES)


def _replace_file(path: Path, content: bytes, durable: bool) -> None:
    """Replace a file atomically, and delete what processes that were killed left half written."""
    staging = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # two containers may have one process id
    try:
        _write_file(staging, content, durable)
        staging.replace(path)
    except BaseException:  # on a full disk every attempt would leave one
        staging.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)
    for unfinished in path.parent.glob(f".{path.name}.*"):
        if time.time() - unfinished.stat().st_mtime > _STALE_S:
            unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
