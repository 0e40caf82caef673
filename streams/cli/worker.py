"""The command `perennial worker`: run one role, or several, in this process until a signal.

Add a role: a function `run_NAME(settings, stop, metrics)` that returns once `stop` is set, one branch in `_bodies`, and
its name in `ROLES` (streams/devstack/supervisor.py).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from perennial.extras import require_extra
from perennial.storage.errors import PerennialError
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.devstack.signals import end_on_stop_signals, event_on_stop_signals
from perennial.streams.devstack.supervisor import ROLES, die_with_parent
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from perennial.learner.model.base import Base

log = logging.getLogger("perennial")

_MODULES = {
    "intake": "perennial.streams.intake.service",
    "streams": "perennial.streams.faust_app",
    "scorer": "perennial.learner.roles.scorer",
    "learner": "perennial.learner.roles.learner",
}


class OneLineFormatter(logging.Formatter):
    """Log formatter that escapes control characters in messages.

    Ids come from outside: with a line end in it, an id could forge a line of the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the base class's
        """Return the formatted line, its message escaped."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def run_worker(roles: list[str], *, parent_pid: int = 0, settings_from_stdin: bool = False) -> int:
    """Run roles in this process until SIGINT or SIGTERM.

    Args:
        roles: Names of roles; the scorer and the learner in one process share the base model.
        parent_pid: End with this process; 0 for none.
        settings_from_stdin: Load what the roles need (modules, the base model) first, then wait for one line on
            standard input: a JSON object of environment variables that complete the settings. So a role that takes
            seconds to load can be started before the broker's address is known.

    Returns:
        The exit code: 0 after a signal, or where standard input ended without a line; 1 where a role failed.

    Raises:
        SettingsError: A role does not exist, or a setting is missing.
        MissingExtraError: The extra `worker` is not installed.
    """
    end_on_stop_signals()
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise SettingsError(
            "no such role", got=", ".join(unknown), allowed=", ".join(ROLES), remedy="name one of these"
        )
    require_extra("worker", "`perennial worker`")
    if parent_pid:
        die_with_parent(parent_pid)
    settings = load_settings()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=settings.observe.log_level.upper())
    for noisy in ("kafka", "aiokafka", "faust", "mode", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    base: Base | None = None
    if settings_from_stdin:
        base = _load_early(roles, settings)
        line = sys.stdin.readline()
        if not line:
            return 0
        os.environ.update(json.loads(line))
        settings = load_settings()
    settings.kafka.require_bootstrap()
    if set(roles) - {"intake"}:
        settings.store.require_uri()

    metrics = Metrics("+".join(roles), settings)
    with event_on_stop_signals() as stop, ExitStack() as opened:
        if settings.observe.metrics_port:
            server = serve_metrics(metrics, settings.observe.metrics_host, settings.observe.metrics_port)
            opened.callback(server.close)
        return _run_all(_bodies(roles, settings, stop, metrics, base), stop)


def _load_early(roles: list[str], settings: Settings) -> Base | None:
    """Import the roles' modules and load what depends neither on the broker nor on the store."""
    for role in roles:
        importlib.import_module(_MODULES[role])
    if not {"scorer", "learner"} & set(roles):
        return None
    from perennial.learner.model.base import load_base
    from perennial.learner.model.general_text import general_texts

    if "learner" in roles and settings.model.base == "shipped":
        general_texts("train")  # its module keeps them, so that the learner does not read them again
    return load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)


def _bodies(
    roles: list[str], settings: Settings, stop: threading.Event, metrics: Metrics, base: Base | None
) -> dict[str, Callable[[], None]]:
    """Return the function to run for each role; each role is imported only where it is named."""
    bodies: dict[str, Callable[[], None]] = {}
    lock = None
    if {"scorer", "learner"} <= set(roles):
        from perennial.learner.model.turns import FairLock

        lock = FairLock()
    if base is None and {"scorer", "learner"} <= set(roles):
        from perennial.learner.model.base import load_base

        base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    for role in dict.fromkeys(roles):
        body: Callable[[threading.Event], None]
        if role == "intake":
            from perennial.streams.intake.service import run_intake, spare_garbage_collector

            if set(roles) == {"intake"}:
                spare_garbage_collector()
            body = partial(run_intake, settings, metrics=metrics)
        elif role == "streams":
            from perennial.streams.faust_app import run_streams

            body = partial(run_streams, settings, metrics=metrics)
        elif role == "scorer":
            from perennial.learner.roles.scorer import run_scorer

            body = partial(run_scorer, settings, metrics=metrics, base=base, lock=lock)
        else:
            from perennial.learner.roles.learner import run_learner

            body = partial(run_learner, settings, metrics=metrics, base=base, lock=lock)
        bodies[role] = partial(_run_pausable, role, settings, stop, metrics, body)
    return bodies


def _run_pausable(
    role: str, settings: Settings, stop: threading.Event, metrics: Metrics, body: Callable[[threading.Event], None]
) -> None:
    """Run a role that pauses for `perennial topics repartition`; without a store there is nobody who could ask for it."""
    from perennial.streams.kafka.installation import open_store_of, role_topics
    from perennial.streams.kafka.maintenance import run_pausable
    from perennial.streams.kafka.topic_guard import TopicGuard

    store = open_store_of(settings)
    if store is None:
        body(stop)
        return
    run_pausable(role, store, stop, metrics, body, lambda: TopicGuard(settings, role_topics(settings, role), store))


def _run_all(bodies: dict[str, Callable[[], None]], stop: threading.Event) -> int:
    """Run every role, in a thread of its own where there are several; the first that ends stops the others."""
    failures: list[str] = []

    def guarded(name: str, body: Callable[[], None]) -> None:
        try:
            body()
        except PerennialError as error:
            log.error("%s stopped: %s", name, error)  # noqa: TRY400  # the error says what to do; a traceback would hide it
            failures.append(name)
        except Exception:
            log.exception("%s stopped", name)
            failures.append(name)
        finally:
            stop.set()

    if len(bodies) == 1:
        ((name, body),) = bodies.items()
        guarded(name, body)
    else:
        threads = [threading.Thread(target=guarded, args=item, name=item[0]) for item in bodies.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)
    return 1 if failures else 0
