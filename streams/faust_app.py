"""Run the agents curate and retain as one Faust application. The only file that imports faust.

Three hazards of Faust, found in its source, shape the agents (streams/curate/agent.py, streams/retain/agent.py):

- When an agent raises an exception, Faust acknowledges the record that the agent was handling. So no agent raises. A
  fatal error blocks the agent and ends the application, and `run_streams` raises the error.
- Acknowledging out of order commits offsets past records that are not handled yet (see streams/curate/offsets.py).
- Every rebalance revokes all partitions. Those that it gives back start at their committed offsets again. So the state
  in memory belongs to one generation of the consumer group and is dropped when that generation ends.
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
from kafka.errors import KafkaError

from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.curate import agent as curate_agent
from perennial.streams.curate.agent import CurateAgent
from perennial.streams.kafka.aiokafka_headers import read_any_header_name
from perennial.streams.kafka.connect import check_access
from perennial.streams.kafka.installation import check_installation, load_installation, role_topics
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.repartition import forget_offsets
from perennial.streams.kafka.security.options import aiokafka_options, with_password
from perennial.streams.kafka.topic_guard import TopicGuard
from perennial.streams.kafka.topics import admin_client, identify, topic_names
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retain import agent as retain_agent
from perennial.streams.retain.agent import RetainAgent
from perennial.streams.settings import Settings

COMMIT_INTERVAL_S: Final = 1.0
SESSION_S: Final = 10.0
STOP_S: Final = 5.0
ACCESS_CHECK_S: Final = 30.0
METADATA_AGE_MS: Final = 30_000
_POLL_S: Final = 0.05


class StreamsError(PerennialError):
    """The Faust application ended without being told to."""


class InterruptedStepError(StreamsError):
    """A step was interrupted, so the state in memory may differ from the state in the store."""


class Guard:
    """Runs an agent's steps one at a time, and none after a step that failed.

    A failure is kept in `failure` and blocks the agent; it is not raised, because Faust would acknowledge the record.

    Hazard: a step may not complete, because of an error or because the application stops and cancels it. The state in
    memory may then be older than what the step has stored. Another step on that state would count examples twice.

    Attributes:
        failure: The first error of a step, None while there is none.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._lock = asyncio.Lock()
        self._in_step = False

    async def __call__(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step. Where it fails, keep the error and never return, so that Faust acknowledges nothing.

        Args:
            step: The coroutine function to call.
        """
        async with self._lock:
            try:
                if self._in_step:
                    raise InterruptedStepError  # noqa: TRY301 - kept below like any other failure
                self._in_step = True
                await step()
                self._in_step = False
            except Exception as error:  # noqa: BLE001 - no exception may reach Faust
                self.failure = self.failure or error
            else:
                return
        await asyncio.Event().wait()


@dataclass(frozen=True)
class Guards:
    """One guard per agent, so that neither agent waits for the other's calls to the store.

    Attributes:
        curate: The guard of curate's state.
        retain: The guard of retain's state.
    """

    curate: Guard = field(default_factory=Guard)
    retain: Guard = field(default_factory=Guard)

    @property
    def failure(self) -> Exception | None:
        """The error of the agent that failed, None while none has failed."""
        return self.curate.failure or self.retain.failure


def build_app(
    settings: Settings, metrics: Metrics, store: ObjectStore, guards: Guards, folder: Path,
    topics: TopicGuard | None = None, origins: OriginCheck | None = None,
) -> Any:  # fmt: skip
    """Return the Faust application with its agents.

    Args:
        settings: The installation's settings.
        metrics: Where the agents report what they do.
        store: The object store.
        guards: Run the agents' steps.
        folder: An empty folder for the files that Faust always writes.
        topics: Checks that the topics are the recorded ones; None: nothing is checked.
        origins: Refuses origins that the broker cannot have given; None: none is checked.

    Returns:
        The application, not yet started.

    Raises:
        SettingsError: No brokers are set, or a file of TLS or SASL cannot be used.
    """
    app = faust.App(
        settings.kafka.topic("curate"),
        broker=[f"kafka://{server.strip()}" for server in settings.kafka.require_bootstrap().split(",")],
        broker_credentials=faust_credentials(settings),
        store="memory://",
        datadir=str(folder),
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        processing_guarantee="at_least_once",
        consumer_auto_offset_reset="earliest",
        # After `perennial topics repartition` the added partitions are read within this time; the default is 5 minutes.
        consumer_metadata_max_age_ms=METADATA_AGE_MS,
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
    _add_curate(app, CurateAgent(app, settings, metrics, store, topics, origins), settings, guards.curate)
    _add_retain(app, RetainAgent(app, settings, metrics, store, topics), settings, guards.retain)
    return app


def faust_credentials(settings: Settings) -> Any:
    """Return Faust's form of aiokafka's options of TLS and SASL; None for plaintext.

    Raises:
        SettingsError: A file of TLS or SASL cannot be used.
    """
    options = aiokafka_options(settings.kafka_security)
    if not options:
        return None
    context = options.get("ssl_context")
    if "sasl_oauth_token_provider" in options:
        return faust.OAuthCredentials(oauth_cb=options["sasl_oauth_token_provider"], ssl_context=context)
    if "sasl_mechanism" in options:
        return faust.SASLCredentials(
            username=options["sasl_plain_username"], password=options["sasl_plain_password"], ssl_context=context,
            mechanism=options["sasl_mechanism"],
        )  # fmt: skip
    return faust.SSLCredentials(context)


def _add_retain(app: Any, agent: RetainAgent, settings: Settings, guard: Guard) -> None:
    names = [settings.kafka.topic(name) for name in topic_names(settings, [retain_agent.TOPIC])]
    topic = app.topic(*names, key_type=bytes, value_type=bytes)

    @app.agent(topic, name="retain", concurrency=1)  # type: ignore[untyped-decorator]
    async def retain(stream: Any) -> None:
        async for event in stream.noack().events():
            await guard(partial(agent.receive, event))

    @app.timer(interval=retain_agent.TICK_S)  # type: ignore[untyped-decorator]
    async def tick_retain() -> None:
        await guard(agent.tick)

    _follow_partitions(app, agent)


def _add_curate(app: Any, agent: CurateAgent, settings: Settings, guard: Guard) -> None:
    topic = app.topic(settings.kafka.topic(curate_agent.TOPIC), key_type=bytes, value_type=bytes)

    @app.agent(topic, name="curate", concurrency=1)  # type: ignore[untyped-decorator]
    async def curate(stream: Any) -> None:
        async for event in stream.noack().events():
            await guard(partial(agent.receive, event))

    @app.timer(interval=curate_agent.TICK_S)  # type: ignore[untyped-decorator]
    async def tick() -> None:
        await guard(agent.tick)

    _follow_partitions(app, agent)


def _follow_partitions(app: Any, agent: CurateAgent | RetainAgent) -> None:
    async def revoked(*_: Any, **__: Any) -> None:
        agent.revoke()

    async def assigned(*_: Any, **__: Any) -> None:
        agent.assign()

    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_partitions_assigned.connect(assigned, weak=False)


def run_streams(settings: Settings, stop: threading.Event, metrics: Metrics) -> None:
    """Run the agents until they are told to stop.

    Args:
        settings: The installation's settings.
        stop: Ends the agents when set.
        metrics: Where the agents report what they do.

    Raises:
        KafkaSecurityError: The broker refuses TLS or SASL as set, at the start or later.
        PerennialError: A topic is not the one that the installation recorded, an agent cannot go on, or the application ended by itself. Nothing is lost: a restart continues
            at the last commit.
    """
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.ERROR)
    read_any_header_name()
    settings = with_password(settings)
    store = open_store(settings.store.require_uri(), settings.s3)
    _forget_old_positions(settings, store)
    names = role_topics(settings, "streams")
    check_installation(settings, store, names)
    with (
        TopicGuard(
            settings, names, store, writes=["adapter-jobs", "drift"], fixed=topic_names(settings, [retain_agent.TOPIC])
        ) as topics,
        OriginCheck.of(settings, store) as origins,
        tempfile.TemporaryDirectory(prefix="perennial-curate-") as folder,
    ):
        build = partial(build_app, settings, metrics, store, folder=Path(folder), topics=topics, origins=origins)
        asyncio.run(_run(stop, build, settings))


def _forget_old_positions(settings: Settings, store: ObjectStore) -> None:
    """Delete the committed offsets in topics of requests that were created again: requests would be skipped.

    Raises:
        RepartitionError: Another process still reads the old topic.
    """
    record, names = load_installation(store), topic_names(settings, [retain_agent.TOPIC])
    found = identify(settings, names)
    for name in names:
        recorded, full = record.topics.get(name) if record else None, settings.kafka.topic(name)
        if recorded is not None and recorded.topic_id != found.topic_ids[full]:
            with admin_client(settings) as admin:
                forget_offsets(admin, settings, "curate", name, found.partitions[full])


async def _watch_access(settings: Settings) -> None:
    """Try TLS and SASL from time to time, because aiokafka repeats a refused connection for ever and tells nobody.

    Raises:
        KafkaSecurityError: The broker refuses them.
    """
    while settings.kafka_security.protocol != "plaintext":
        await asyncio.sleep(ACCESS_CHECK_S)
        with suppress(KafkaError):  # a broker that is away comes back
            await asyncio.to_thread(check_access, settings, STOP_S)
    await asyncio.Event().wait()


async def _run(stop: threading.Event, build: Callable[..., Any], settings: Settings) -> None:
    guards = Guards()
    app = build(guards=guards)
    app.finalize()
    starting = asyncio.ensure_future(app.start())
    access = asyncio.ensure_future(_watch_access(settings))
    try:
        while not stop.is_set() and guards.failure is None and not app.should_stop:
            if access.done():
                access.result()
            if starting.done():
                starting.result()
            await asyncio.sleep(_POLL_S)
    finally:
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(app.stop(), STOP_S)
        starting.cancel()
        access.cancel()
    failure = guards.failure
    if failure is not None and not (stop.is_set() and isinstance(failure, InterruptedStepError)):
        if isinstance(failure, PerennialError):
            raise failure
        raise StreamsError(
            f"an agent failed: {type(failure).__name__}: {failure}",
            remedy="see the traceback; a restart loses nothing",
        ) from failure
    if not stop.is_set():
        raise StreamsError(
            "the Faust application ended by itself", got=repr(getattr(app, "_crash_reason", None)),
            remedy="check that the broker runs and that the topics exist; a restart loses nothing",
        )  # fmt: skip
