"""`SglangBackend` serves versions through an SGLang server, over HTTP. Needs no torch.

Written from the source of SGLang 0.5.23 and tested against a double of its HTTP interface only, never on an engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.engines.engine_api import (
    EngineHttp,
    NextTokens,
    NonFiniteAnswerError,
    base_of,
    model_cards,
    refused,
)
from perennial.streams.client.engines.engine_backend import EngineBackend
from perennial.streams.client.engines.engine_probe import TOLERANCE_NATS

_TOP = 20
_NEVER = ("rank", "target_modules", "target modules", "incompatible", "not supported")
"""Words in the message with which SGLang refuses an adapter that its memory pool can never hold."""


class SglangBackend(EngineBackend):
    """Serves versions through an SGLang server. Untested on an engine.

    Start the server with `--enable-lora --max-lora-rank R --lora-target-modules all --max-loras-per-batch N`, with one
    data-parallel rank, so that it can read `path`. Do not set `--max-loaded-loras` below the number of adapters that
    are served, one more for each that is being loaded: SGLang then unloads the least recently used one.

    An unload in SGLang ends the name at once, waits for the requests under way, and then removes the weights. SGLang
    loads a name that it once knew again when it is asked for, from its folder; the folder is deleted, so it cannot.

    Args:
        url: Address of the server, for example `http://127.0.0.1:30000`.
        path: Folder for the versions, which this process writes and the server reads.
        server_path: The path of that folder as the server sees it. None: the same.
        base_sha256: Digest of the base that the server runs, `sha256:<64 hex>`. None: the base of the first
            version that was active, which the folder keeps. In any case the server must predict what the learner
            recorded.
        base_model_name: Name of the base in `adapter_config.json`. None: the name in the version's manifest.
        max_rank: The server's `--max-lora-rank`; None: the server's answer tells.
        tolerance_nats: Largest mean difference from the learner's log-probabilities, in nats.
        grace_s: How long a version is kept after another one became active, for clients that have just read its name.
        api_key: The server's `--admin-api-key`, or its `--api-key`.
        timeout_s: Longest wait for an answer of the server, in seconds; an unload waits for requests under way.
        check_s: Seconds between two looks whether the server was started anew; None: never look.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        url: str,
        path: Path | str,
        *,
        server_path: str | None = None,
        base_sha256: str | None = None,
        base_model_name: str | None = None,
        max_rank: int | None = None,
        tolerance_nats: float = TOLERANCE_NATS,
        grace_s: float = 2.0,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        check_s: float | None = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            SglangApi(EngineHttp(url, api_key, timeout_s)),
            DirectoryBackend(
                path,
                base_sha256=base_sha256,
                base_model_name=base_model_name,
                grace_s=grace_s,
                durable=False,
                clock=clock,
            ),  # an engine that lost its power has no adapters, and gets what is active from the store
            server_path=server_path,
            tolerance_nats=tolerance_nats,
            max_rank=max_rank,
            check_s=check_s,
            clock=clock,
        )


class SglangApi:
    """The HTTP interface of SGLang, as `EngineApi`.

    Args:
        http: Makes the calls.
    """

    needs_zero = False

    def __init__(self, http: EngineHttp) -> None:
        self._http = http

    def base_name(self) -> str:
        """Return the name of the base."""
        return base_of(model_cards(self._http))

    def model_of(self, name: str) -> str:
        """Return `<base>:<adapter>`: the form in which SGLang's OpenAI interface is asked for an adapter."""
        return f"{self.base_name()}:{name}"

    def served(self) -> dict[str, str]:
        """Return the path of every adapter that the server lists, by name."""
        return {str(card["id"]): str(card.get("root")) for card in model_cards(self._http) if card.get("parent")}

    def load(self, name: str, path: str) -> None:
        """Load an adapter; see `EngineApi.load`."""
        answer = self._http.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.status == 200 or "already" in answer.message:
            return
        if answer.status == 404:
            raise refused("load adapters at run time", answer, "start SGLang with --enable-lora")
        if answer.status == 400 and any(word in answer.message.lower() for word in _NEVER):
            raise UnfitVersionError(
                f"the engine can never serve {name}", got=answer.message,
                remedy="start it with a larger --max-lora-rank and with --lora-target-modules all",
            )  # fmt: skip
        raise refused(f"load {name} from {path}", answer, "let the engine read the folder, under the same path")

    def unload(self, name: str) -> None:
        """Unload an adapter, once no request uses it; see `EngineApi.unload`."""
        answer = self._http.post("/unload_lora_adapter", {"lora_name": name})
        if answer.status != 200 and name in self.served():
            raise refused(f"unload {name}", answer, "see the engine's log; it is tried again")

    def in_use(self, name: str) -> bool:  # noqa: ARG002 - the engine waits for them itself
        """Return False: an unload waits for the requests that use the adapter."""
        return False

    def evict(self, path: str, kept: Sequence[str]) -> None:
        """Do nothing: an unload removes the weights."""

    def next_tokens(self, name: str, texts: Sequence[str]) -> list[NextTokens]:
        """Return the most probable tokens after each text; see `EngineApi.next_tokens`."""
        answer = self._http.post(
            "/generate",
            {
                "text": list(texts), "lora_path": [name] * len(texts), "return_logprob": True,
                "top_logprobs_num": _TOP, "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            },
        )  # fmt: skip
        if answer.status != 200:
            raise refused(f"answer with {name}", answer, "see the engine's log; it is tried again")
        found = answer.json()
        return [_tokens(name, each) for each in (found if isinstance(found, list) else [found])]


def _tokens(name: str, answer: dict[str, Any]) -> NextTokens:
    """Return the tokens of `output_top_logprobs`: per generated token, a list of (nats, token id, text)."""
    per_token = (answer.get("meta_info") or {}).get("output_top_logprobs") or [[]]
    pairs = [(entry[1], entry[0]) for entry in per_token[0] or []]
    # JSON has no NaN: a number that is none was not finite.
    if not pairs or not all(isinstance(nats, int | float) and math.isfinite(nats) for _, nats in pairs):
        raise NonFiniteAnswerError(f"the engine gives no finite log-probabilities with {name}", got=str(pairs))
    return {int(token): float(nats) for token, nats in pairs}
