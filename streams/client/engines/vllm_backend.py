"""`VllmBackend` serves versions through a vLLM server, over HTTP. Needs no torch.

Read against vLLM 0.32. What it works around is in docs/serving.md, with the numbers of vLLM's issues.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.engines.engine_api import (
    Answer,
    EngineHttp,
    NextTokens,
    NonFiniteAnswerError,
    base_of,
    model_cards,
    refused,
)
from perennial.streams.client.engines.engine_backend import EngineBackend
from perennial.streams.client.engines.engine_probe import TOLERANCE_NATS

_TOUCHES = 8
"""Adapters that are used at a time before others are displaced."""
_TOP = 20
"""vLLM's default of --max-logprobs."""
_NEVER = re.compile(
    r"max_lora_rank|rank \d+ is greater|modules_to_save|DoRA|dora|unexpected modules|not supported", re.IGNORECASE
)
"""Words in the HTTP 500 with which vLLM refuses an adapter that it can never serve."""
_NOT_FINITE = re.compile(r"out of range float|not JSON compliant|\bnan\b", re.IGNORECASE)
_LORA_INFO = re.compile(r"^vllm:lora_requests_info\{(?P<labels>.*)\} (?P<seconds>[0-9.eE+]+)$", re.MULTILINE)
_LABEL = re.compile(r'(running|waiting)_lora_adapters="(?P<names>[^"]*)"')


class VllmBackend(EngineBackend):
    """Serves versions through a vLLM server that was started with LoRA and with run-time updates of it.

    Start the server with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora --max-loras N --max-cpu-loras M
    --max-lora-rank R`, so that it can read `path`. N is the number of adapters in one batch: the adapters that are
    served, one for the base, and one for a version that is being loaded.

    Args:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        path: Folder for the versions, which this process writes and the server reads.
        server_path: The path of that folder as the server sees it. None: the same.
        base_sha256: Digest of the base that the server runs, `sha256:<64 hex>`. None: the base of the first
            version that was active, which the folder keeps. In any case the server must predict what the learner
            recorded.
        base_model_name: Name of the base in `adapter_config.json`. None: the name in the version's manifest.
        max_cpu_loras: The server's `--max-cpu-loras`, or more. So many zero adapters displace an unloaded version from
            the server's memory, which only forgets the name of a version that it unloads (issue 54839).
        max_rank: The server's `--max-lora-rank`; None: the server's answer tells.
        tolerance_nats: Largest mean difference from the learner's log-probabilities, in nats.
        grace_s: How long a version is kept after another one became active, for clients that have just read its name.
        api_key: The server's `--api-key`.
        timeout_s: Longest wait for an answer of the server, in seconds.
        check_s: Seconds between two looks whether the server was started anew; None: never look.
        clock: Monotonic clock in seconds.

    Example:
        >>> from perennial import VllmBackend
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> backend = VllmBackend("http://127.0.0.1:8000", folder.name)
        >>> backend.active_name("acme/support") is None
        True
        >>> folder.cleanup()

        `Subscriber("acme/support", backend, ...).run()` keeps the server at the live version.
    """

    def __init__(
        self,
        url: str,
        path: Path | str,
        *,
        server_path: str | None = None,
        base_sha256: str | None = None,
        base_model_name: str | None = None,
        max_cpu_loras: int = 8,
        max_rank: int | None = None,
        tolerance_nats: float = TOLERANCE_NATS,
        grace_s: float = 2.0,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        check_s: float | None = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            VllmApi(EngineHttp(url, api_key, timeout_s), max_cpu_loras),
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


class VllmApi:
    """The HTTP interface of vLLM, as `EngineApi`.

    Args:
        http: Makes the calls.
        max_cpu_loras: Adapters that the server keeps in memory.
    """

    needs_zero = True

    def __init__(self, http: EngineHttp, max_cpu_loras: int) -> None:
        self._http = http
        self._max_cpu_loras = max_cpu_loras

    def base_name(self) -> str:
        """Return the first name of the base."""
        return base_of(model_cards(self._http))

    def model_of(self, name: str) -> str:
        """Return the adapter's own name."""
        return name

    def served(self) -> dict[str, str]:
        """Return the path of every adapter that the server lists, by name."""
        return {str(card["id"]): str(card.get("root")) for card in model_cards(self._http) if card.get("parent")}

    def load(self, name: str, path: str) -> None:
        """Load an adapter; see `EngineApi.load`."""
        answer = self._http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.status == 200 or (answer.status == 400 and "already been" in answer.message):
            return
        if answer.status == 404 and "lora" not in answer.message.lower() and "adapter" not in answer.message.lower():
            raise refused("load adapters at run time", answer, "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        if answer.status == 404:
            raise refused(f"load {name} from {path}", answer, "let the engine read the folder, under the same path")
        if answer.status >= 500 and _NEVER.search(answer.message):
            raise UnfitVersionError(
                f"the engine can never serve {name}", got=answer.message,
                remedy="start it with a larger --max-lora-rank, or publish versions that it takes",
            )  # fmt: skip
        raise refused(f"load {name}", answer, "see the engine's log; it is tried again")

    def unload(self, name: str) -> None:
        """Let the server forget a name; see `EngineApi.unload`."""
        answer = self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
        if answer.status not in {200, 404}:
            raise refused(f"unload {name}", answer, "see the engine's log; it is tried again")

    def in_use(self, name: str) -> bool:
        """Return whether the newest line of the server's metric names the adapter; see `EngineApi.in_use`."""
        answer = self._http.get("/metrics")
        lines = list(_LORA_INFO.finditer(answer.text)) if answer.status == 200 else []
        if not lines:
            return False
        newest = max(lines, key=lambda line: float(line["seconds"]))
        return any(name in found["names"].split(",") for found in _LABEL.finditer(newest["labels"]))

    def evict(self, path: str, kept: Sequence[str]) -> None:
        """Fill the server's memory with adapters that were used later than the unloaded ones; see `EngineApi.evict`.

        The least recently used adapter makes room. So those that are kept are used first, and zero adapters under names
        of their own take the rest.
        """
        with ThreadPoolExecutor(_TOUCHES) as pool:  # the engine computes requests that wait in one batch
            used = sum(pool.map(self._use, kept[: self._max_cpu_loras - 1]))
        for _ in range(self._max_cpu_loras - used):
            name = f"evict-{uuid4().hex}"
            self.load(name, path)
            self.unload(name)

    def _use(self, name: str) -> bool:
        """Let the server use an adapter; return whether it did."""
        try:
            self.next_tokens(name, ["."])
        except BackendError:  # it takes no room then
            return False
        return True

    def next_tokens(self, name: str, texts: Sequence[str]) -> list[NextTokens]:
        """Return the most probable tokens after each text; see `EngineApi.next_tokens`.

        Hazard: `echo` or `prompt_logprobs` would give the log-probabilities of the text itself, but on the CPU build
        0.32 such a request to an adapter ends the engine.
        """
        answer = self._http.post(
            "/v1/completions",
            {
                "model": name, "prompt": list(texts), "max_tokens": 1, "temperature": 0, "logprobs": _TOP,
                "return_tokens_as_token_ids": True,
            },
        )  # fmt: skip
        if answer.status != 200:
            if _NOT_FINITE.search(answer.message):
                raise NonFiniteAnswerError(
                    f"the engine computes NaN or infinity with {name}", got=answer.message,
                    remedy="revoke the version; restart the engine where other answers fail too",
                )  # fmt: skip
            raise refused(f"answer with {name}", answer, "see the engine's log; it is tried again")
        return [self._tokens(name, choice) for choice in _in_order(answer)]

    @staticmethod
    def _tokens(name: str, choice: dict[str, object]) -> NextTokens:
        logprobs = choice.get("logprobs")
        first = logprobs["top_logprobs"][0] if isinstance(logprobs, dict) and logprobs.get("top_logprobs") else {}
        found = {int(token.removeprefix("token_id:")): float(nats) for token, nats in first.items()}
        if not found or not all(math.isfinite(nats) for nats in found.values()):
            raise NonFiniteAnswerError(f"the engine gives no finite log-probabilities with {name}", got=str(first))
        return found


def _in_order(answer: Answer) -> list[dict[str, object]]:
    choices: list[dict[str, object]] = answer.json()["choices"]
    return sorted(choices, key=lambda choice: int(str(choice.get("index", 0))))
