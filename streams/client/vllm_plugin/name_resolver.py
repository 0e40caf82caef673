"""Answer vLLM's question for an unknown model name with a version of the object store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from cachetools import TTLCache

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.trust.untrusted import UntrustedVersionError
from perennial.streams.client.vllm_plugin.found_versions import FoundVersion, RevokedSharedError
from perennial.streams.client.vllm_plugin.requested_names import RequestedName, parse_requested_name
from perennial.streams.client.vllm_plugin.resolver_metrics import ResolverMetrics
from perennial.streams.client.vllm_plugin.version_folders import VersionFolders
from perennial.streams.settings.tenant_group import OtherTenantError

log = logging.getLogger("vllm.perennial")
"""vLLM configures the logger `vllm`; messages of another one would be lost, or unlike its own."""

_THREADS = 4
_REPEAT_S = 60.0
T = TypeVar("T")


class LoraRequest(Protocol):
    """The fields of vLLM's `LoRARequest` that are used here."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class MakeLoraRequest(Protocol):
    """vLLM's class `LoRARequest`."""

    def __call__(self, *, lora_name: str, lora_int_id: int, lora_path: str) -> LoraRequest:
        """Return a request."""


@dataclass
class Followed:
    """A name that vLLM was given a version for.

    Attributes:
        name: The name, in its parts.
        served_model: Name of the model that the server has.
        found: The version that the name stands for.
        request: What vLLM was given; it keeps this very object.
        resolved_s: When the name was resolved; monotonic clock.
    """

    name: RequestedName
    served_model: str
    found: FoundVersion
    request: LoraRequest
    resolved_s: float


@dataclass(frozen=True)
class Retired:
    """A request that no name leads to any more.

    Attributes:
        found: Its version.
        request: The request.
        since_s: Since when; monotonic clock.
    """

    found: FoundVersion
    request: LoraRequest
    since_s: float


class NameResolver:
    """Resolves model names to folders of versions, within a time limit and without ever raising an error into vLLM.

    All methods but `in_thread`'s work run in the event loop of the server.

    Args:
        folders: Finds the versions and lays them down.
        timeout_s: Longest time for one call that reads the store, in seconds.
        make_request: vLLM's class `LoRARequest`.
        metrics: Where to count.
        clock: Monotonic clock in seconds.
        require_own: Raises OtherTenantError for the name of an adapter that the server must not serve. By default none.

    Attributes:
        followed: What vLLM was given, by the model name of the requests.
        version_locks: One lock per version's name. Who lays a version's folder down or deletes it holds the lock.
        try_out: Called with a version and its folder before it is served; raises where it must not be. None: not tried.
        retired: What no name leads to any more, for the one who gives it back. None: nobody does.
        other_names: Returns the names of all requests that the server knows, for you to set. By default there are none.
    """

    def __init__(
        self,
        folders: VersionFolders,
        timeout_s: float,
        make_request: MakeLoraRequest,
        metrics: ResolverMetrics,
        clock: Callable[[], float] = time.monotonic,
        require_own: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folders = folders
        self.metrics = metrics
        self.clock = clock
        self.followed: dict[str, Followed] = {}
        self.version_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._timeout_s = timeout_s
        self._make_request = make_request
        self._require_own = require_own
        self.try_out: Callable[[FoundVersion, str], Awaitable[None]] | None = None
        self.retired: list[Retired] | None = None
        self.other_names: Callable[[], Collection[str]] = tuple
        self._given: dict[str, Counter[str]] = {}
        self._logged: TTLCache[str, None] = TTLCache(1024, _REPEAT_S)
        self._threads = ThreadPoolExecutor(_THREADS, "perennial-resolver")

    async def resolve(self, served_model: str, lora_name: str) -> LoraRequest | None:
        """Return a request for the version that a name stands for. None if there is none, or on any error.

        vLLM calls this for a name that it does not know, and keeps the answer until the name is unloaded.

        Args:
            served_model: Name of the model that the server has, as vLLM gives it.
            lora_name: The model name of a request; it may be anything.
        """
        name = parse_requested_name(lora_name)
        if name is None:
            self.metrics.requests.labels("unknown").inc()
            return None
        try:
            self._require_own(name.adapter)
            try:
                found = await self.in_thread(self.folders.find, name, served_model)
            except RevokedSharedError as error:
                self.log_once(f"model {lora_name} is served without its shared part", error)
                found = error.alone
            if found is None:
                self.metrics.requests.labels("unknown").inc()
                log.debug("%s is no adapter in the store, or it is retired", lora_name)
                return None
            try:
                request = await self._follow(lora_name, name, served_model, found)
            except (UnfitVersionError, IntegrityError) as error:
                if found.shared is None or name.shared_version is not None:
                    raise
                self.log_once(f"model {lora_name} is served without its shared part", error)
                request = await self._follow(lora_name, name, served_model, replace(found, shared=None))
        except Exception as error:  # noqa: BLE001 - what is raised here would end the request with status 500
            self.metrics.requests.labels("refused" if is_refusal(error) else "failed").inc()
            self.log_once(f"model {lora_name} cannot be served", error)
            return None
        self.metrics.requests.labels("resolved").inc()
        self.metrics.names.set(len(self.followed))
        self.metrics.bytes.set(self.folders.total_bytes)
        log.info("%s is served as %s", lora_name, request.lora_name)
        return request

    async def _follow(self, lora_name: str, name: RequestedName, served_model: str, found: FoundVersion) -> LoraRequest:
        """Lay a version down, try it out, and follow the name that it was found for."""
        async with self.lock_of(found.name):
            path = await self.in_thread(self.folders.prepare, found, served_model)
            if self.try_out is not None:
                await self.try_out(found, str(path))
            request = self.request_for(found, str(path))
            self.give_up(lora_name)  # vLLM asks again for what it could not load, and for what was unloaded
            self.followed[lora_name] = Followed(name, served_model, found, request, self.clock())
        return request

    def give_up(self, lora_name: str) -> None:
        """Follow a name no longer, if it is followed."""
        followed = self.followed.pop(lora_name, None)
        if followed is not None:
            self.retire(followed.found, followed.request)

    def retire(self, found: FoundVersion, request: LoraRequest) -> None:
        """Keep a request that no name leads to in mind until it is given back."""
        if self.retired is not None:
            self.retired.append(Retired(found, request, self.clock()))

    def request_for(self, found: FoundVersion, path: str, lora_int_id: int = 1) -> LoraRequest:
        """Return a new request for a version, with a name that no other request has.

        Engines tell requests in one batch apart by `lora_name`: two that have one name and two ids would share one
        adapter (`LoRARequest.__eq__`). So a name that is given out again gets a number behind it.

        Args:
            found: The version.
            path: Its folder.
            lora_int_id: The engine's number of the adapter; vLLM sets it itself where it resolves a name.
        """
        counts = self._given.setdefault(found.name, Counter())
        known = self.other_names()
        while True:
            count = counts[found.served_name] = counts[found.served_name] + 1
            lora_name = found.served_name if count == 1 else f"{found.served_name}={count}"
            if lora_name not in known:
                break
        return self._make_request(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=path)

    def forget_name(self, found_name: str) -> None:
        """Let the names of a version be given out again: the engine holds no request for it any more."""
        self._given.pop(found_name, None)

    def lock_of(self, found_name: str) -> asyncio.Lock:
        """Return the lock of a version."""
        lock = self.version_locks.get(found_name)
        if lock is None:
            lock = self.version_locks[found_name] = asyncio.Lock()
        return lock

    async def in_thread(self, work: Callable[..., T], *values: Any) -> T:
        """Call a function that blocks in a thread, and wait for it no longer than the time limit.

        Raises:
            TimeoutError: It took too long. It may go on in its thread.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *values)
        try:
            return await asyncio.wait_for(future, self._timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"the object store took too long; got: no answer in {self._timeout_s:g} s; remedy: see that "
                "PERENNIAL_STORE answers, or raise PERENNIAL_RESOLVE_TIMEOUT_S"
            ) from error

    def log_once(self, message: str, error: Exception) -> None:
        """Log an error with its cause, and the same one again only after a minute. Count one that is not trusted."""
        if isinstance(error, UntrustedVersionError):
            self.metrics.untrusted.labels(error.reason).inc()
        text = f"{message}: {error or type(error).__name__}"
        # Whoever asks chooses the name: a line for each name of another tenant would fill the log.
        logged = type(error).__name__ if isinstance(error, OtherTenantError) else text
        is_repeated = logged in self._logged
        self._logged[logged] = None
        level = logging.DEBUG if is_repeated else logging.WARNING if is_refusal(error) else logging.ERROR
        log.log(level, "%s", text, exc_info=level == logging.ERROR and not hasattr(error, "remedy"))


def is_refusal(error: Exception) -> bool:
    """Return whether an error is about the name or the version, and not about the store or this process."""
    return isinstance(error, UnfitVersionError | NotFoundError | IntegrityError | OtherTenantError)
