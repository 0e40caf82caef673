"""Let the engine predict with a version before anybody is answered by it.

Weights may be whole and finite, and the engine may still compute something else with them, or NaN: with another base or
tokenizer, with numbers that overflow in its format, or by a wrong kernel.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from uuid import uuid4

from cachetools import LRUCache, TTLCache

from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.engines.engine_api import NextTokens, NonFiniteAnswerError
from perennial.streams.client.engines.engine_probe import check_answers, texts_to_ask
from perennial.streams.client.vllm_plugin.found_versions import FoundVersion
from perennial.streams.probe_texts import PROBE_TEXTS

_ENGINE_S = 60.0
_REFUSED_S = 60.0
_OVERWRITES = 8


class Engine(Protocol):
    """The methods of vLLM's `EngineClient` that are used here."""

    async def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter."""

    async def remove_lora(self, lora_id: int) -> bool:
        """Drop an adapter."""

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any) -> AsyncIterator[Any]:
        """Answer a prompt."""


class EngineTrial:
    """Loads a version under a name of its own, asks for the learner's probes, and drops it again.

    Args:
        engine: The engine.
        make_request: Returns a request for a folder: its arguments are a name, a new id and the path.
        next_id: Returns an id that no adapter has.
        sampling: Parameters of a request for the 20 most probable next tokens.
        tolerance_nats: Largest mean difference from the learner's log-probabilities, in nats.
        timer: Monotonic clock in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        make_request: Callable[[str, int, str], Any],
        next_id: Callable[[], int],
        sampling: Any,
        tolerance_nats: float,
        timer: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._make_request = make_request
        self._next_id = next_id
        self._sampling = sampling
        self._tolerance_nats = tolerance_nats
        self._passed: LRUCache[str, None] = LRUCache(4096)
        self._refused: TTLCache[str, UnfitVersionError] = TTLCache(1024, _REFUSED_S, timer=timer)

    async def run(self, found: FoundVersion, path: str) -> None:
        """Try a version, unless it passed before. One that failed is refused for a minute without a new trial.

        Args:
            found: The version.
            path: Its folder.

        Raises:
            UnfitVersionError: The engine cannot load it, or predicts something else than the learner did, or NaN.
            TimeoutError: The engine did not answer in time.
        """
        if found.digest in self._passed:
            return
        refused = self._refused.get(found.digest)
        if refused is not None:
            raise refused.with_traceback(None)
        try:
            await asyncio.wait_for(self._run(found, path), _ENGINE_S)
        except UnfitVersionError as error:
            self._refused[found.digest] = error
            raise
        self._passed[found.digest] = None

    async def _run(self, found: FoundVersion, path: str) -> None:
        request = self._make_request(f"{found.name}=trial-{uuid4().hex[:12]}", self._next_id(), path)
        try:
            await self._engine.add_lora(request)
        except Exception as error:
            raise _load_error(found, error) from error
        try:
            answers = [await self._next_tokens(text, request) for text in texts_to_ask(found.manifest).values()]
            if found.shared is None:  # nobody recorded what two versions together predict
                check_answers(found.manifest, answers, self._tolerance_nats)
        except NonFiniteAnswerError:
            await self._overwrite_blocks()
            raise
        finally:
            with suppress(Exception):  # the engine drops it by itself when it needs the room
                await self._engine.remove_lora(request.lora_int_id)

    async def _next_tokens(self, text: str, request: Any) -> NextTokens:
        """Return the most probable tokens after a text. Raise NonFiniteAnswerError where they are not finite."""
        found: Mapping[int, Any] = {}
        async for output in self._engine.generate(
            {"prompt": text}, self._sampling, f"perennial-trial-{uuid4().hex}", lora_request=request
        ):
            logged = output.outputs[0].logprobs
            found = logged[0] if logged else found
        tokens = {token: float(each.logprob) for token, each in found.items()}
        if not tokens or not all(map(math.isfinite, tokens.values())):
            raise NonFiniteAnswerError(
                "the engine computes NaN or infinity with the version", got=str(tokens)[:200],
                remedy="make another version live: `perennial adapters rollback ADAPTER`",
            )  # fmt: skip
        return tokens

    async def _overwrite_blocks(self) -> None:
        """Answer the probes with the base until nothing of a NaN is left in the recycled blocks of the cache.

        vLLM hands a block with NaN to the next request of the same length, whose masked attention computes 0 x NaN
        (pull request 50283).
        """
        good = 0
        for _ in range(_OVERWRITES):
            try:
                for text in PROBE_TEXTS.values():
                    await self._next_tokens(text, None)
                good += 1
            except NonFiniteAnswerError:
                good = 0
            if good == 2:
                return


def _load_error(found: FoundVersion, error: Exception) -> UnfitVersionError:
    remedy = "start it with --enable-lora and a larger --max-lora-rank, or publish versions that it takes"
    if found.shared is None:
        return UnfitVersionError("the engine cannot load the version", got=str(error).strip()[-200:], remedy=remedy)
    own, shared = found.manifest.rank, found.shared.manifest.rank
    return UnfitVersionError(
        f"the engine cannot load {found.manifest.adapter} together with {found.shared.manifest.adapter}, an adapter of "
        f"rank {own} + {shared} = {own + shared}",
        got=str(error).strip()[-200:],
        remedy=f"start it with --enable-lora and a --max-lora-rank of {own + shared} or more, or let both learn with smaller ranks",
    )
