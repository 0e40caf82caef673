"""Where subscribers put adapters: into a PEFT model in this process, or into a folder that other servers watch.

Both follow streams.client.Backend. A name stands for one version and is never reloaded in place. Importing this
module loads no torch: the folder backend runs where there is none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from storage.blobs import digest_of
from storage.errors import PerennialError
from storage.manifest import Manifest
from storage.tensors import check_safetensors

if TYPE_CHECKING:
    from learner.adapter import Lora, LoraConfig
    from learner.base import Base

_SEGMENT = r"[a-z0-9][a-z0-9._-]*"
_NAME = re.compile(rf"(?P<adapter>{_SEGMENT}(?:/{_SEGMENT}){{0,3}})(?:#(?P<alias>{_SEGMENT}))?@(?P<hex>[0-9a-f]{{64}})")
_HEX = re.compile(r"[0-9a-f]{64}")


class BackendError(PerennialError):
    """A backend cannot do what a subscriber asks."""


# ---- a folder


class DirectoryBackend:
    """Versions as PEFT adapter folders, for servers that watch a folder or are told a path.

    `<path>/<adapter>/@<64 hex>/` has adapter_model.safetensors, adapter_config.json and manifest.json, and appears
    whole or not at all; `<path>/<adapter>/@live.json` names the folder to serve and is replaced atomically. (No
    adapter's own name has an `@`, so none can collide.) base_sha256: the base of the servers, None: any. grace_s: how
    long a version stays on the disk after another one became live, for servers that still read it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        base_sha256: str | None = None,
        grace_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self.base_sha256 = base_sha256
        self._grace_s = grace_s
        self._clock = clock
        self._left_at_s: dict[str, float] = {}
        self.path.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Write the version's folder. Raises BackendError, and IntegrityError where the weights are no safetensors."""
        folder = self._folder(name)
        files = {
            "adapter_model.safetensors": weights,
            "adapter_config.json": adapter_config(weights, manifest),
            "manifest.json": manifest.to_bytes(),
        }
        if self._holds(folder, files):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".loading-", dir=self.path))
        try:
            staging.chmod(0o755)  # mkdtemp's 0700 would lock out servers of other users
            for file_name, data in files.items():
                _write_synced(staging / file_name, data)
            if folder.exists():  # damaged, or this call would have ended above
                self._remove(folder)
            staging.rename(folder)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _holds(self, folder: Path, files: dict[str, bytes]) -> bool:
        try:
            return all(digest_of((folder / name).read_bytes()) == digest_of(data) for name, data in files.items())
        except FileNotFoundError:
            return False

    def warm(self, name: str) -> None:
        """Nothing to warm here. Raises BackendError where the version is not held."""
        self._require(name)

    def activate(self, name: str) -> None:
        """Point the alias's file at the version."""
        folder = self._require(name)
        pointer = self._pointer(name)
        before = self._active(pointer)
        staging = pointer.with_name(f".{pointer.name}.{os.getpid()}")
        pointed = {"name": name, "version": f"sha256:{folder.name[-64:]}", "folder": folder.name}
        _write_synced(staging, orjson.dumps(pointed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        staging.replace(pointer)
        _sync_folder(pointer.parent)
        if before and before != name:
            self._left_at_s[before] = self._clock()

    def drain(self, name: str, timeout_s: float) -> bool:  # noqa: ARG002 - nobody to wait for
        """Whether the grace time is over; it is not waited for."""
        left_at_s = self._left_at_s.setdefault(name, self._clock())
        return self._clock() - left_at_s >= self._grace_s

    def unload(self, name: str) -> None:
        """Delete the version's folder, and its alias's file first where it points there."""
        folder, pointer = self._folder(name), self._pointer(name)
        if self._active(pointer) == name:
            pointer.unlink()
            _sync_folder(pointer.parent)
        if folder.exists():
            self._remove(folder)
        self._left_at_s.pop(name, None)

    def list(self) -> list[str]:
        """The names of all complete folders, of every adapter."""
        found = []
        for folder, below, _ in os.walk(self.path):
            adapter = Path(folder).relative_to(self.path).as_posix()
            for name in below:
                alias, _, version = name[1:].rpartition("@")
                if name.startswith("@") and _HEX.fullmatch(version):
                    found.append(f"{adapter}{'#' if alias else ''}{alias}@{version}")
            below[:] = [name for name in below if name[0] not in "@."]
        return sorted(found)

    def current(self, adapter: str, alias: str = "live") -> str | None:
        """The name that the alias's file points at, also after a restart; None where there is no file."""
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

    def _folder(self, name: str) -> Path:
        above, alias, version = self._parts(name)
        return above / (f"@{alias}@{version}" if alias else f"@{version}")

    def _pointer(self, name: str) -> Path:
        above, alias, _ = self._parts(name)
        return above / f"@{alias or 'live'}.json"

    def _require(self, name: str) -> Path:
        folder = self._folder(name)
        if not folder.is_dir():
            raise BackendError(f"{name} is not held", remedy="load it first")
        return folder

    def _remove(self, folder: Path) -> None:
        # Renamed first: a reader sees the whole folder or none of it.
        doomed = Path(tempfile.mkdtemp(prefix=".unloading-", dir=self.path))
        folder.rename(doomed / folder.name)
        _sync_folder(folder.parent)
        shutil.rmtree(doomed)


def adapter_config(weights: bytes, manifest: Manifest) -> bytes:
    """PEFT's `adapter_config.json` of a version, read off its tensors' names; needs no torch.

    Raises IntegrityError where the weights are no safetensors, BackendError where the manifest does not say alpha.
    """
    check_safetensors(weights)
    (header_bytes,) = struct.unpack_from("<Q", weights)
    names = orjson.loads(weights[8 : 8 + header_bytes])
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if ".lora_" in name})
    alpha = manifest.config.get("alpha")
    if not targets or not isinstance(alpha, int | float):
        raise BackendError(
            "the version cannot be written as a PEFT adapter",
            got=f"alpha {alpha}, {len(targets)} target modules",
            allowed="alpha in the manifest's config, and tensors named as in a PEFT adapter file",
        )
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": manifest.base_model,
        "r": manifest.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "modules_to_save": None,
    }  # fmt: skip
    return json.dumps(content, sort_keys=True).encode()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- a PEFT model in this process


@dataclass(eq=False)
class _Slot:
    lora: Lora
    name: str | None = None
    requests: int = 0
    loading: bool = False

    def wipe(self) -> None:
        import torch

        with torch.no_grad():
            for parameter in self.lora.parameters.values():
                parameter.zero_()


class PeftBackend:
    """Swaps versions in and out of a running model with no pause and no request seeing parts of two versions.

    Each version sits in a LoRA slot of its own. A request leases the slot that is active when it begins and
    keeps it to its end; the slot is selected anew for every forward pass, under a lock, so that requests on the
    version before and on the new one interleave. Activation therefore waits for nobody. config: the rank and
    alpha of every version served. slots: versions held at once: the live one, and those being loaded or drained.
    lock: held for each forward pass; pass the one that others who use the same base hold. Thread-safe.
    """

    def __init__(
        self,
        base: Base,
        config: LoraConfig,
        *,
        slots: int = 2,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        from peft.tuners.lora import LoraLayer

        from learner.adapter import Lora

        if slots < 2:
            raise BackendError("too few slots to swap without a pause", got=slots, allowed="2 or more")
        self.base = base
        self.config = config
        self.base_sha256: str | None = base.digest
        self._forward_lock = lock if lock is not None else threading.Lock()
        with self._forward_lock, warnings.catch_warnings():
            # several slots in one model are what is wanted here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self._slots = [_Slot(Lora(base, config, slot=f"serving-{i}")) for i in range(slots)]
        self._layer = next(module for module in base.model.modules() if isinstance(module, LoraLayer))
        for slot in self._slots:
            slot.wipe()
        self._active: _Slot | None = None
        self._changed = threading.Condition()
        self._leased = threading.local()
        self._hooks = [
            base.model.register_forward_pre_hook(self._before_forward),
            base.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    # ---- requests

    @contextmanager
    def lease(self) -> Iterator[str | None]:
        """Everything that this thread runs through `base.model` inside the block uses one version: the name given."""
        if hasattr(self._leased, "slot"):
            yield self._leased.slot.name if self._leased.slot else None
            return
        with self._changed:
            slot = self._active
            if slot is not None:
                slot.requests += 1
        self._leased.slot = slot
        try:
            yield slot.name if slot else None
        finally:
            del self._leased.slot
            if slot is not None:
                with self._changed:
                    slot.requests -= 1
                    self._changed.notify_all()

    def _before_forward(self, *_: object) -> None:
        if not hasattr(self._leased, "slot"):
            return  # somebody else's use of the same base, under their own hold of the lock
        slot: _Slot | None = self._leased.slot
        with ExitStack() as selected:
            selected.enter_context(self._forward_lock)
            if not self._is_selected(slot):
                selected.enter_context(slot.lora.enabled() if slot else self._slots[0].lora.disabled())
            self._leased.selected = selected.pop_all()

    def _is_selected(self, slot: _Slot | None) -> bool:
        # All layers are switched together and under the lock, so one speaks for all; switching costs a fifth of a
        # small model's forward pass.
        layer = self._layer
        return slot is not None and not layer.disable_adapters and layer.active_adapters == [slot.lora.slot]

    def _after_forward(self, *_: object) -> None:
        selected: ExitStack | None = self._leased.__dict__.pop("selected", None)
        if selected is not None:
            selected.close()

    def generate(self, prompt: str, max_new_tokens: int = 32) -> str:
        """Continue a prompt greedily. Inside a lease the version is the lease's."""
        import torch

        tokenizer = self.base.tokenizer
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(self.base.device)  # (1, T)
        ids = ids[:, -max(1, self.base.max_positions - max_new_tokens) :]
        with self.lease(), torch.no_grad():
            out = self.base.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # (1, T + new)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def loss(self, text: str) -> float:
        """Mean loss of a text in nats per token, cut to what the model takes. Raises BackendError below two tokens."""
        import torch

        ids = self.base.tokenizer(text, return_tensors="pt").input_ids[:, : self.base.max_positions]  # (1, T)
        if ids.shape[1] < 2:
            raise BackendError("a text is too short to score", got=f"{ids.shape[1]} tokens", allowed="2 or more")
        ids = ids.to(self.base.device)
        with self.lease(), torch.no_grad():
            logits = self.base.model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    # ---- what a subscriber asks

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Copy the weights into a free slot.

        Raises BackendError where no slot is free or rank or alpha are others, AdapterError, IntegrityError.
        """
        from learner.adapter import from_safetensors

        alpha = manifest.config.get("alpha", self.config.alpha)
        if (manifest.rank, alpha) != (self.config.rank, self.config.alpha):
            raise BackendError(
                f"{name} has another rank or alpha than this backend was made for",
                got=f"rank {manifest.rank}, alpha {alpha}",
                allowed=f"rank {self.config.rank}, alpha {self.config.alpha}",
                remedy="make the backend with the LoraConfig of the versions that it is to serve",
            )
        with self._changed:
            if self._find(name) is not None:
                return
            free = next((s for s in self._slots if s.name is None and not s.requests and not s.loading), None)
            if free is None:
                raise BackendError(
                    "no slot is free",
                    got=f"{len(self._slots)} versions held",
                    remedy="unload a version, or make the backend with more slots",
                )
            free.loading = True
        try:
            free.lora.load(from_safetensors(weights, free.lora.shapes))  # no request looks at this slot: no lock
            free.name = name
        finally:
            free.loading = False

    def warm(self, name: str) -> None:
        """Run one token through the version."""
        import torch

        slot = self._require(name)
        self._leased.slot = slot
        try:
            with torch.no_grad():
                self.base.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.base.device))
        finally:
            del self._leased.slot

    def activate(self, name: str) -> None:
        """Requests that begin from now on use the version."""
        slot = self._require(name)
        with self._changed:
            self._active = slot

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses the version."""
        slot = self._find(name)
        with self._changed:
            return slot is None or self._changed.wait_for(lambda: not slot.requests, timeout_s)

    def unload(self, name: str) -> None:
        """Overwrite the version's weights with zeros; an active one leaves the base alone in service."""
        with self._changed:
            slot = self._find(name)
            if slot is None:
                return
            if self._active is slot:
                self._active = None
            if slot.requests:
                raise BackendError(
                    f"requests still use {name}", got=f"{slot.requests} requests", remedy="drain it first"
                )
            slot.loading, slot.name = True, None
        try:
            slot.wipe()  # a forgotten version must not stay in memory
        finally:
            slot.loading = False

    def list(self) -> list[str]:
        """The names held."""
        return sorted(slot.name for slot in self._slots if slot.name is not None)

    @property
    def current(self) -> str | None:
        """The name that new requests use; None: the base alone."""
        with self._changed:
            return self._active.name if self._active else None

    def close(self) -> None:
        """Take the hooks off the model and the versions out of memory; the base can be used as before."""
        for hook in self._hooks:
            hook.remove()
        for slot in self._slots:
            slot.wipe()

    def _find(self, name: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.name == name), None)

    def _require(self, name: str) -> _Slot:
        slot = self._find(name)
        if slot is None:
            raise BackendError(f"{name} is not held", remedy="load it first")
        return slot
