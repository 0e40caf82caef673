"""Keep the names that vLLM knows at the versions that their aliases name, and give back what is not used any more.

A refreshed name gets a new request with a new id, a new name and the folder of the new version; nothing is loaded in
place. So requests under way end on the version that they began with, and no block of the prefix cache is used for two
versions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.vllm_plugin.engine_trial import Engine
from perennial.streams.client.vllm_plugin.found_versions import FoundVersion, RevokedSharedError, SharedVersions
from perennial.streams.client.vllm_plugin.name_resolver import Followed, NameResolver, Retired, log

GRACE_S = 300.0
"""How long a request may take from the moment when it looks its model up to the moment when the engine has it.

Until then nobody sees that it needs the version. An image that is fetched for the prompt may take minutes.
"""
UNSEEN_S = 3600.0
"""Longest time of a request, where vLLM does not show which requests are under way."""
_AT_ONCE = 2
"""Fewer than the resolver has threads, so that refreshing never keeps a request waiting for one."""
_ENGINE_S = 60.0


class Counting(Protocol):
    """vLLM's counter of adapter ids."""

    def inc(self, num: int) -> int:
        """Add a number and return the sum."""


class Locks(Protocol):
    """vLLM's locks by model name."""

    def __getitem__(self, name: str) -> AbstractAsyncContextManager[Any]:
        """Return the lock of a name."""


class Models(Protocol):
    """The attributes of vLLM's `OpenAIServingModels` that are used here."""

    lora_requests: dict[str, Any]
    lora_id_counter: Counting
    lora_resolver_lock: Locks


@dataclass(frozen=True)
class _Poll:
    """One reading of all aliases: when it began, by the monotonic clock, and what it has read of shared adapters."""

    begin_s: float
    shared_versions: SharedVersions


class NameRefresher:
    """Follows the aliases of the names that a resolver gave to vLLM. Runs in the event loop of the server.

    Args:
        resolver: The resolver.
        models: vLLM's table of names.
        engine: vLLM's engine.
        poll_s: Time between two readings of an alias, in seconds.
        keep_s: Time after which a name is given up, in seconds. The next request for it resolves it again, so that a
            name for which there are none takes no room.
        now: The wall clock, in seconds since 1970.
    """

    def __init__(
        self,
        resolver: NameResolver,
        models: Models,
        engine: Engine,
        *,
        poll_s: float,
        keep_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._resolver = resolver
        self._models = models
        self._engine = engine
        self._poll_s = poll_s
        self._keep_s = keep_s
        self._now = now
        self._retired: list[Retired] = []
        resolver.retired = self._retired
        self._idle_since_s: dict[str, float] = {}
        self._stale_since: dict[str, float] = {}
        resolver.other_names = self._known_names
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Refresh all names at every poll, until the task is cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh_all()
                await self.give_back()
            except Exception as error:  # noqa: BLE001 - the next poll tries again
                self._resolver.log_once("the names that vLLM knows cannot be refreshed", error)

    async def refresh_all(self) -> None:
        """Refresh every name once. An error of one name does not keep the others."""
        names = list(self._resolver.followed)
        await self._withdraw_revoked_shared(names)
        poll = _Poll(self._resolver.clock(), SharedVersions())
        errors = await asyncio.gather(*(self._refresh_in_turn(name, poll) for name in names), return_exceptions=True)
        for name, error in zip(names, errors, strict=True):
            if isinstance(error, Exception):
                self._stale_since.setdefault(name, self._now())
                self._resolver.metrics.refreshes.labels("failed").inc()
                self._resolver.log_once(f"model {name} cannot be refreshed, it is tried again", error)
            elif error is not None:
                raise error
        followed = self._resolver.followed
        self._stale_since = {name: since for name, since in self._stale_since.items() if name in followed}
        self._resolver.metrics.stale_since.set(min(self._stale_since.values(), default=0.0))
        self._resolver.metrics.names.set(len(followed))
        self._resolver.metrics.bytes.set(self._resolver.folders.total_bytes)

    async def _withdraw_revoked_shared(self, names: Iterable[str]) -> None:
        """Take every name out of service whose shared part is revoked, before any name waits for another one's turn.

        The next request for such a name composes it with what is live. Each shared version is asked for once.
        """
        revoked: dict[str, bool] = {}
        for name in names:
            followed = self._resolver.followed.get(name)
            shared = followed.found.shared if followed is not None else None
            if followed is None or shared is None:
                continue
            if shared.version not in revoked:
                try:
                    revoked[shared.version] = await self._resolver.in_thread(self._resolver.folders.is_revoked, shared)
                except Exception as error:  # noqa: BLE001 - the refreshing of each name reports the store
                    self._resolver.log_once("the revocations of a shared adapter cannot be read", error)
                    revoked[shared.version] = False
            if not revoked[shared.version]:
                continue
            async with self._models.lora_resolver_lock[name]:
                if self._resolver.followed.get(name) is followed:
                    self._withdraw(name, followed, "has a shared part that was revoked")

    async def _refresh_in_turn(self, name: str, poll: _Poll) -> None:
        async with self._turns:
            await self._refresh(name, poll)

    async def _refresh(self, name: str, poll: _Poll) -> None:
        # vLLM holds the lock while it resolves or unloads the name; nobody else changes the table then.
        async with self._models.lora_resolver_lock[name]:
            followed = self._resolver.followed.get(name)
            if followed is None or followed.resolved_s > poll.begin_s:
                return  # what the poll read of a shared adapter may be older than what a request was given meanwhile
            if self._models.lora_requests.get(name) is not followed.request:
                self._resolver.give_up(name)  # vLLM could not load it, or somebody unloaded or replaced it
                return
            if self._resolver.clock() - followed.resolved_s >= self._keep_s:
                self._withdraw(name, followed, "was resolved long ago; the next request resolves it again")
                return
            try:
                if followed.name.version is None:
                    await self._follow_alias(name, followed, poll)  # which looks for a revocation itself
                elif await self._is_revoked(followed):
                    self._withdraw(name, followed, "was revoked")
            except Exception as error:
                if not await self._is_revoked(followed):
                    raise
                self._resolver.log_once(f"model {name} has no version that replaces the revoked one", error)
                self._withdraw(name, followed, "was revoked")

    async def _is_revoked(self, followed: Followed) -> bool:
        return await self._resolver.in_thread(self._resolver.folders.is_revoked, followed.found)

    async def _follow_alias(self, name: str, followed: Followed, poll: _Poll) -> None:
        """Serve what the alias names now. A personal adapter whose shared part is revoked goes on alone."""
        resolver = self._resolver
        found: FoundVersion | None
        try:
            found = await resolver.in_thread(
                resolver.folders.find, followed.name, followed.served_model, poll.shared_versions
            )
        except RevokedSharedError as error:
            resolver.log_once(f"model {name} is served without its shared part", error)
            found = error.alone
        if found is None:
            self._withdraw(name, followed, "has no version to serve any more")
        elif found.name == followed.found.name:
            self._stale_since.pop(name, None)
        else:
            await self._replace(name, followed, found)

    async def _replace(self, name: str, followed: Followed, found: FoundVersion) -> None:
        """Serve another version under a name. On an error the name stays as it is."""
        resolver = self._resolver
        changed_s = found.changed_s(followed.found)
        self._stale_since[name] = self._now() if changed_s is None else changed_s
        async with resolver.lock_of(found.name):
            path = await resolver.in_thread(resolver.folders.prepare, found, followed.served_model)
            if resolver.try_out is not None:
                await resolver.try_out(found, str(path))
            lora_int_id = self._models.lora_id_counter.inc(1)
            request = resolver.request_for(found, str(path), lora_int_id)
            try:
                await asyncio.wait_for(self._engine.add_lora(request), _ENGINE_S)
            except BaseException:
                resolver.retire(found, request)  # it may have been loaded all the same
                raise
            if await resolver.in_thread(resolver.folders.is_revoked, found):  # since the poll has read it
                resolver.retire(found, request)
                raise UnfitVersionError(
                    f"{found.served_name} was revoked meanwhile", remedy="the next poll looks again"
                )
            self._models.lora_requests[name] = request
            resolver.followed[name] = Followed(
                followed.name, followed.served_model, found, request, followed.resolved_s
            )
        resolver.retire(followed.found, followed.request)
        self._stale_since.pop(name, None)
        resolver.metrics.refreshes.labels("replaced").inc()
        if changed_s is not None:
            resolver.metrics.published_to_served.observe(max(0.0, self._now() - changed_s))
        log.info("%s is served as %s", name, request.lora_name)

    def _withdraw(self, name: str, followed: Followed, why: str) -> None:
        """Take a name out of vLLM's table: the next request for it asks the resolver again."""
        self._models.lora_requests.pop(name, None)
        self._resolver.give_up(name)
        self._resolver.metrics.refreshes.labels("withdrawn").inc()
        log.info("%s, served as %s, %s", name, followed.request.lora_name, why)

    async def give_back(self) -> None:
        """Drop from the engine what no name leads to and no request uses, and delete folders that nothing uses.

        Hazard: an engine reads the folder of a request again when it has dropped the adapter from its cache, and ends
        where it cannot. So a folder is deleted only `GRACE_S` after the last name and the last request left it.
        """
        under_way = self._names_under_way()
        for retired in list(self._retired):
            waited_s = self._resolver.clock() - retired.since_s
            is_free = waited_s >= UNSEEN_S if under_way is None else retired.request.lora_name not in under_way
            if waited_s < GRACE_S or not is_free:
                continue
            try:
                await self._drop(retired.request.lora_int_id)
            except Exception as error:  # noqa: BLE001 - the engine may raise anything; the next poll tries again
                self._resolver.log_once(f"{retired.request.lora_name} cannot be dropped from the engine", error)
                continue
            self._retired.remove(retired)
        for name in self._resolver.folders.held():
            async with self._resolver.lock_of(name):
                if self._is_used(name):
                    self._idle_since_s.pop(name, None)
                elif self._resolver.clock() - self._idle_since_s.setdefault(name, self._resolver.clock()) >= GRACE_S:
                    await self._resolver.in_thread(self._resolver.folders.remove, name)
                    self._resolver.forget_name(name)
                    self._idle_since_s.pop(name)

    async def _drop(self, lora_int_id: int) -> None:
        known = {request.lora_int_id for request in self._models.lora_requests.values()}
        if lora_int_id not in known:  # somebody's load in place under the same name takes the id over
            await asyncio.wait_for(self._engine.remove_lora(lora_int_id), _ENGINE_S)

    def _is_used(self, found_name: str) -> bool:
        followed = (each.found.name for each in self._resolver.followed.values())
        return found_name in followed or any(retired.found.name == found_name for retired in self._retired)

    def _known_names(self) -> set[str]:
        return {request.lora_name for request in self._models.lora_requests.values()}

    def _names_under_way(self) -> set[str] | None:
        """Return the `lora_name` of every request under way; None if this vLLM does not show them."""
        try:
            states = self._engine.output_processor.request_states  # type: ignore[attr-defined]
            return {state.lora_name for state in states.values() if state.lora_name is not None}
        except AttributeError:
            return None
