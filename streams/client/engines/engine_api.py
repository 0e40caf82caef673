"""The calls that `EngineBackend` makes of an engine, and the HTTP under them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

from perennial.streams.addresses import direct_opener, is_loopback
from perennial.streams.client.backend import BackendError, UnfitVersionError

NextTokens = Mapping[int, float]
"""Token ids with their log-probabilities in nats, the most probable ones after a text."""


class NonFiniteAnswerError(UnfitVersionError):
    """The engine computed NaN or infinity with the version."""


class EngineApi(Protocol):
    """One engine's HTTP interface. Every call raises BackendError where the engine does not answer.

    A name is the engine's name of an adapter; a path is the adapter's folder as the engine sees it.

    Attributes:
        needs_zero: Whether the base must be asked through an adapter that changes nothing, which also displaces
            unloaded adapters from memory.
    """

    needs_zero: bool

    def base_name(self) -> str:
        """Return the name under which the engine serves the base alone."""

    def model_of(self, name: str) -> str:
        """Return what a request names as its model to be answered by the adapter."""

    def served(self) -> dict[str, str]:
        """Return the path of every adapter that the engine serves, by name."""

    def load(self, name: str, path: str) -> None:
        """Load an adapter; it may be loaded already.

        Raises:
            UnfitVersionError: The engine can never serve it.
        """

    def unload(self, name: str) -> None:
        """Let the engine serve a name no more. No error if it does not serve it."""

    def in_use(self, name: str) -> bool:
        """Return whether a request that is running or waiting uses the name. False where the engine cannot tell."""

    def evict(self, path: str, kept: Sequence[str]) -> None:
        """Remove the weights of all adapters that are unloaded from the engine's memory.

        Args:
            path: Folder of an adapter that changes nothing, for engines that forget only what another one displaces.
            kept: Names of adapters that are served, and should stay in memory.
        """

    def next_tokens(self, name: str, texts: Sequence[str]) -> list[NextTokens]:
        """Return the most probable tokens after each text, 20 where the engine gives so many.

        Raises:
            NonFiniteAnswerError: A log-probability is NaN or infinite.
        """


@dataclass(frozen=True)
class Answer:
    """An HTTP answer of the engine.

    Attributes:
        status: HTTP status.
        text: Body.
    """

    status: int
    text: str

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            BackendError: It is not JSON.
        """
        try:
            return json.loads(self.text)
        except ValueError as error:
            raise BackendError(
                "the engine answered something else than JSON", got=self.text, remedy="check the engine's URL"
            ) from error

    @property
    def message(self) -> str:
        """The engine's error message, or the whole body where there is none."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return self.text
        error = found.get("error", found) if isinstance(found, dict) else found
        if isinstance(error, dict):
            error = next((error[key] for key in ("message", "error_message", "detail") if error.get(key)), error)
        return error if isinstance(error, str) else json.dumps(error)


class EngineHttp:
    """Makes HTTP calls of one engine. Thread-safe.

    Args:
        url: Address of the engine, for example `http://127.0.0.1:8000`.
        api_key: Key that is sent as a bearer token; None: no key.
        timeout_s: Longest wait for an answer, in seconds.

    Raises:
        BackendError: The address is not one of HTTP.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BackendError("not the address of an engine", got=url, allowed="http://HOST:PORT or https://HOST")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        # A proxy that the environment names cannot reach this machine's loopback address.
        self._opener = direct_opener() if is_loopback(parts.hostname) else build_opener()

    def get(self, path: str) -> Answer:
        """Get a path."""
        return self._call(Request(self.url + path, headers=self._headers))  # noqa: S310 - the constructor checks it

    def post(self, path: str, content: Mapping[str, object]) -> Answer:
        """Post JSON to a path."""
        data = json.dumps(content).encode()
        return self._call(Request(self.url + path, data, self._headers))  # noqa: S310 - the constructor checks it

    def _call(self, request: Request) -> Answer:
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return Answer(response.status, response.read().decode(errors="replace"))
        except HTTPError as error:
            with error:
                answer = Answer(error.code, error.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            raise BackendError(
                "the engine does not answer", got=f"{type(cause).__name__}: {cause}", allowed=self.url,
                remedy="start it; the call is made again",
            ) from (cause if isinstance(cause, BaseException) else error)  # fmt: skip
        if answer.status in {401, 403}:
            raise BackendError(
                "the engine refuses the key", got=f"{answer.status} {answer.message}", remedy="set the engine's API key"
            )
        return answer


def refused(call: str, answer: Answer, remedy: str) -> BackendError:
    """Return the error of a call that the engine refused for a reason that may pass."""
    return BackendError(f"the engine refused to {call}", got=f"{answer.status} {answer.message}", remedy=remedy)


def model_cards(http: EngineHttp) -> list[dict[str, Any]]:
    """Return what an engine lists at `/v1/models`: the base, and the adapters with the base as their `parent`."""
    answer = http.get("/v1/models")
    if answer.status != 200:
        raise refused("list its models", answer, "check the engine's URL")
    found = answer.json()
    cards = found.get("data") if isinstance(found, dict) else None
    return [card for card in cards or [] if isinstance(card, dict) and "id" in card]


def base_of(cards: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the base among an engine's models."""
    for card in cards:
        if not card.get("parent"):
            return str(card["id"])
    raise BackendError("the engine serves no base", remedy="check the engine's URL")
