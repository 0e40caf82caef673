"""The Faust application: its agents, and how they run and end. The only file that imports faust.

Hazards of Faust that shape the agents (streams/curate/agent.py, streams/retain/agent.py), all read in its source:
- an agent that raises acknowledges what it was given, so nothing here raises: a fatal error parks the agent and ends
  the application, and `run_streams` raises it;
- acknowledging out of order commits past what is pending (see streams/curate/offsets.py);
- every rebalance revokes all partitions and rewinds those it gives back to their committed offset, so all that is in
  memory belongs to one generation of the group and is dropped with it.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import faust

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.curate import agent as curate_agent
from perennial.streams.curate.agent import CurateAgent
from perennial.streams.kafka.aiokafka_headers import read_any_header_name
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain import agent as retain_agent
from perennial.streams.retain.agent import RetainAgent
from perennial.streams.settings import Settings

COMMIT_INTERVAL_S: Final = 1.0
SESSION_S: Final = 10.0
STOP_S: Final = 5.0
_UNTIL_STOPPED: Final = 0.05


class StreamsError(PerennialError):
    """The Faust application ended by itself."""


class InterruptedStepError(StreamsError):
    """A step was cancelled half-way, so the state in memory may not be what is in the store."""


class Guard:
    """One step at a time on the shared state, and a clear end on what cannot be handled: parked, never raised.

    Hazard: a step that did not come to its end (an error, or a cancellation on stopping) leaves the state in memory
    behind what it may have written; another step on it would count examples twice. So none runs after it.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._lock = asyncio.Lock()
        self._in_step = False

    async def __call__(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step; where it fails, remember why and never return, so that Faust acknowledges nothing."""
        async with self._lock:
            try:
                if self._in_step:
                    raise InterruptedStepError  # noqa: TRY301 - parked below like any other failure
                self._in_step = True
                await step()
                self._in_step = False
                return  # noqa: TRY300 - nothing here may be left undone
            except Exception as error:  # noqa: BLE001 - the agent's boundary: nothing may reach Faust
                self.failure = self.failure or error
        await asyncio.Event().wait()


@dataclass(frozen=True)
class Guards:
    """One per agent, so that neither waits for the other's store."""

    curate: Guard = field(default_factory=Guard)
    retain: Guard = field(default_factory=Guard)

    @property
    def failure(self) -> Exception | None:
        """What one of them could not handle."""
        return self.curate.failure or self.retain.failure


def build_app(settings: Settings, metrics: Metrics, store: ObjectStore, guards: Guards, folder: Path) -> Any:
    """The application with its agents. folder: an empty one, for what Faust insists on writing."""
    app = faust.App(
        settings.kafka.topic("curate"),
        broker=[f"kafka://{server.strip()}" for server in settings.kafka.require_bootstrap().split(",")],
        store="memory://",
        datadir=str(folder),
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        processing_guarantee="at_least_once",
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=COMMIT_INTERVAL_S,
        broker_session_timeout=SESSION_S,
        broker_heartbeat_interval=SESSION_S / 4,
        producer_acks=-1,
        producer_max_request_size=8 * 1024 * 1024,
        stream_wait_empty=False,
        stream_buffer_maxsize=1024,
        key_serializer="raw",
        value_serializer="raw",
    )
    _add_curate(app, settings, metrics, store, guards.curate)
    _add_retain(app, settings, metrics, store, guards.retain)
    return app


def _add_retain(app: Any, settings: Settings, metrics: Metrics, store: ObjectStore, guard: Guard) -> None:
    agent = RetainAgent(app, settings, metrics, store)
    topic = app.topic(settings.kafka.topic(retain_agent.TOPIC), key_type=bytes, value_type=bytes)

    @app.agent(topic, name="retain", concurrency=1)  # type: ignore[untyped-decorator]
    async def retain(stream: Any) -> None:
        async for event in stream.noack().events():
            await guard(partial(agent.receive, event))

    @app.timer(interval=retain_agent.TICK_S)  # type: ignore[untyped-decorator]
    async def tick_retain() -> None:
        await guard(agent.tick)

    _follow_partitions(app, agent)


def _add_curate(app: Any, settings: Settings, metrics: Metrics, store: ObjectStore, guard: Guard) -> None:
    curation = CurateAgent(app, settings, metrics, store)
    topic = app.topic(settings.kafka.topic(curate_agent.TOPIC), key_type=bytes, value_type=bytes)

    @app.agent(topic, name="curate", concurrency=1)  # type: ignore[untyped-decorator]
    async def curate(stream: Any) -> None:
        async for event in stream.noack().events():
            await guard(partial(curation.receive, event))

    @app.timer(interval=curate_agent.TICK_S)  # type: ignore[untyped-decorator]
    async def tick() -> None:
        await guard(curation.tick)

    _follow_partitions(app, curation)


def _follow_partitions(app: Any, agent: CurateAgent | RetainAgent) -> None:
    async def revoked(*_: Any, **__: Any) -> None:
        agent.revoke()

    async def assigned(*_: Any, **__: Any) -> None:
        agent.assign()

    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_partitions_assigned.connect(assigned, weak=False)


def run_streams(settings: Settings, stop: threading.Event, metrics: Metrics) -> None:
    """Run the agents until `stop` is set. Raises PerennialError where they cannot go on."""
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.ERROR)
    read_any_header_name()
    store = open_store(settings.store.require_uri(), settings.s3)
    with tempfile.TemporaryDirectory(prefix="perennial-curate-") as folder:
        asyncio.run(_run(settings, stop, metrics, store, Path(folder)))


async def _run(settings: Settings, stop: threading.Event, metrics: Metrics, store: ObjectStore, folder: Path) -> None:
    guards = Guards()
    app = build_app(settings, metrics, store, guards, folder)
    app.finalize()
    starting = asyncio.ensure_future(app.start())
    try:
        while not stop.is_set() and guards.failure is None and not app.should_stop:
            if starting.done():
                starting.result()
            await asyncio.sleep(_UNTIL_STOPPED)
    finally:
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(app.stop(), STOP_S)
        starting.cancel()
    failure = guards.failure
    if failure is not None and not (stop.is_set() and isinstance(failure, InterruptedStepError)):
        if isinstance(failure, PerennialError):
            raise failure
        raise StreamsError(
            f"an agent failed: {type(failure).__name__}: {failure}",
            remedy="the traceback says where; a restart loses nothing",
        ) from failure
    if not stop.is_set():
        raise StreamsError(
            "the Faust application ended by itself", got=repr(getattr(app, "_crash_reason", None)),
            remedy="check that the broker is up and that the topics exist; restarting loses nothing",
        )  # fmt: skip
