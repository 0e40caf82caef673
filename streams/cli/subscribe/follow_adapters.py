"""The command `perennial subscribe`: one subscriber per adapter in this process, until a signal."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from perennial.storage.errors import PerennialError
from perennial.storage.registry.registry import AliasState
from perennial.streams.cli.subscribe.served_backends import BackendChoice, BackendKind, make_backend
from perennial.streams.cli.terminal.printable import printable, printable_lines
from perennial.streams.cli.worker import OneLineFormatter
from perennial.streams.client.backend import Backend, Current
from perennial.streams.client.following_thread import SubscriberError
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.devstack.signals import event_on_stop_signals
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings

_ANSWER_TOKENS = 48
_DRAIN_S = 0.1
"""A subscriber sees no newer version while it waits for requests on the last one, so it rather looks again."""


def run_subscribe(adapters: list[str], choice: BackendChoice, *, prompt: str = "") -> int:
    """Follow the adapters until SIGINT or SIGTERM.

    Args:
        adapters: Names of the adapters; one that is named twice is followed once.
        choice: The backend.
        prompt: With peft, answered by each version that comes into service; empty for nothing.

    Returns:
        The exit code: 0 after a signal, 1 where a subscriber ended by an error.

    Raises:
        SettingsError: A setting is missing, or the options do not fit the kind of backend.
        OtherTenantError: PERENNIAL_TENANT is set, and an adapter is none of that tenant.
    """
    settings = connected_settings()
    settings.store.require_uri()
    adapters = list(dict.fromkeys(adapters))
    for adapter in adapters:
        settings.tenants.require_own(adapter)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=settings.observe.log_level.upper())
    for noisy in ("kafka", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with ExitStack() as opened:
        stop = opened.enter_context(event_on_stop_signals())
        backend = make_backend(choice, adapters, settings)
        close = getattr(backend, "close", None)
        if close is not None:
            opened.callback(close)
        metrics = Metrics("subscriber", settings)
        if settings.observe.metrics_port:
            server = serve_metrics(metrics, settings.observe.metrics_host, settings.observe.metrics_port)
            opened.callback(server.close)
        answer = partial(_answer, backend, prompt) if prompt and choice.kind is BackendKind.PEFT else None
        followed = [_subscriber(adapter, backend, settings, metrics, answer) for adapter in adapters]
        return _follow(followed, choice, stop)


def _subscriber(
    adapter: str, backend: Backend, settings: Settings, metrics: Metrics, answer: Callable[[], None] | None
) -> Subscriber:
    def report(state: AliasState, stage_s: Mapping[str, float]) -> None:
        served, beneath = subscriber.served_name, subscriber.served_with
        stages = ", ".join(
            f"{stage} {seconds:.3f}" for stage, seconds in stage_s.items() if stage != "publish_to_served"
        )
        _say(
            f"{state.adapter}: generation {state.generation} is served, version {state.version[7:19]}, "
            f"{stage_s.get('publish_to_served', 0.0):.2f} s after it was published ({stages})"
        )
        if beneath is not None:
            _say(f"{adapter}: serving {_short(subscriber.current)} together with {beneath[:-52]}, as {served}")
        if answer is not None:
            answer()

    subscriber = Subscriber(adapter, backend, settings=settings, metrics=metrics, on_activate=report, drain_s=_DRAIN_S)
    return subscriber


def _short(current: Current | None) -> str:
    return current.name[:-52] if current is not None else "nothing"


def _follow(subscribers: list[Subscriber], choice: BackendChoice, stop: threading.Event) -> int:
    for subscriber in subscribers:
        subscriber.start()
        _say(f"{subscriber.adapter}: following `{subscriber.alias}` as replica {subscriber.replica}, for {choice.kind}")
    failed = False
    while not stop.wait(0.2):
        if any(not subscriber.alive for subscriber in subscribers):
            failed = True
            break
    for subscriber in subscribers:
        try:
            subscriber.close()
            _say(f"{subscriber.adapter}: left; what is served stays as it is")
        except SubscriberError as error:
            failed = True
            _say(f"{subscriber.adapter}: {error}")
    return int(failed)


def _answer(backend: Backend, prompt: str) -> None:
    generate = getattr(backend, "generate", None)
    try:
        answered = generate(prompt, max_new_tokens=_ANSWER_TOKENS) if generate else ""
    except PerennialError as error:
        answered = str(error)
    print(printable_lines(answered), flush=True)


def _say(line: str) -> None:
    print(printable(line), flush=True)
