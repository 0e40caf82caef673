"""System prompts: the text that stands in front of the conversations of one adapter, in training and in answers.

One object per adapter, `prompts/<adapter>`. curate reads it at every cut and records the text in the micro-batch, so that
a rebuild trains with the text that the update had. A conversation that has a system turn of its own keeps that one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from cachetools import TTLCache
from pydantic import AwareDatetime

from perennial.storage.errors import NotFoundError, StoreError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.compare_and_swap import update_object
from perennial.storage.registry.manifest import AdapterName
from perennial.storage.registry.records import MAX_RECORD_BYTES, RegistryRecord, check_adapter, parse_record

MAX_SYSTEM_PROMPT_BYTES = 16 << 10
CACHED_S = 10.0
_MAX_ADAPTERS = 1_000
_log = logging.getLogger("perennial.storage")


class SystemPrompt(RegistryRecord):
    """The system prompt of one adapter.

    Attributes:
        adapter: the adapter.
        text: the prompt; None where it was cleared.
        revision: grows by one with every change.
        set_at: when it was changed last.
    """

    adapter: AdapterName
    text: str | None = None
    revision: int = 0
    set_at: AwareDatetime | None = None

    @property
    def digest(self) -> str | None:
        """Digest of the text, to compare it with the text that clients send."""
        return None if self.text is None else digest_of(self.text.encode())


def system_prompt_key(adapter: str) -> str:
    """Return the key of an adapter's system prompt."""
    return f"prompts/{check_adapter(adapter)}"


def load_system_prompt(store: ObjectStore, adapter: str) -> SystemPrompt:
    """Return the adapter's system prompt; its text is None where none is set.

    Raises:
        IntegrityError: The object is not readable.
    """
    return _load(store, adapter)[0]


def set_system_prompt(store: ObjectStore, adapter: str, text: str | None, now: datetime) -> SystemPrompt:
    """Set or clear the adapter's system prompt; micro-batches that are cut from now on have it.

    Args:
        store: the store.
        adapter: the adapter.
        text: the prompt; None clears it.
        now: the time to record.

    Raises:
        StoreError: The text is blank or larger than MAX_SYSTEM_PROMPT_BYTES.
        ConflictError: Other writers were first at every attempt.
        IntegrityError: The stored object is not readable.
    """
    size = 0 if text is None else len(text.encode())
    if text is not None and (not text.strip() or size > MAX_SYSTEM_PROMPT_BYTES):
        raise StoreError(
            "not a usable system prompt", got="only white space" if not text.strip() else f"{size} bytes",
            allowed=f"text of at most {MAX_SYSTEM_PROMPT_BYTES} bytes", remedy="shorten it, or clear the prompt",
        )  # fmt: skip

    def changed(found: SystemPrompt) -> SystemPrompt:
        if found.text == text:
            return found
        return SystemPrompt(adapter=adapter, text=text, revision=found.revision + 1, set_at=now)

    return update_object(
        store, system_prompt_key(adapter), lambda: _load(store, adapter), changed, SystemPrompt.to_bytes
    )


class SystemPrompts:
    """Looks up system prompts for a role that asks often; a change is seen within `CACHED_S` seconds. Thread-safe.

    Args:
        store: the store.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._texts: TTLCache[str, str | None] = TTLCache(_MAX_ADAPTERS, CACHED_S, timer=clock)
        self._last: dict[str, str | None] = {}
        self._lock = threading.Lock()  # cachetools is not thread-safe

    def __call__(self, adapter: str) -> str | None:
        """Return the adapter's system prompt; None where none is set.

        While the store does not answer, the text that was read last counts: a measurement must not wait for it.
        """
        with self._lock:
            if adapter in self._texts:
                return self._texts[adapter]
        try:
            text = load_system_prompt(self._store, adapter).text
        except StoreError as error:
            _log.warning("the system prompt of %s cannot be read: %s", adapter, error)
            text = self._last.get(adapter)
        with self._lock:
            self._texts[adapter] = text
            if text is None:
                self._last.pop(adapter, None)
            else:
                self._last[adapter] = text
        return text


def _load(store: ObjectStore, adapter: str) -> tuple[SystemPrompt, str | None]:
    key = system_prompt_key(adapter)
    try:
        stored = store.get(key, MAX_RECORD_BYTES)
    except NotFoundError:
        return SystemPrompt(adapter=adapter), None
    return parse_record(SystemPrompt, key, stored.data), stored.etag
