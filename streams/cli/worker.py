"""The command `perennial worker`: run one role, or several, in this process until a signal.

Add a role: a function `run_NAME(settings, stop, metrics)` that returns once `stop` is set, one branch in `_bodies`, and
its name in `ROLES` (streams/devstack/supervisor.py).
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from perennial.storage.errors import PerennialError
from perennial.streams.devstack.supervisor import ROLES, die_with_parent
from perennial.streams.observe.http_server import serve_metrics
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from perennial.learner.model.base import Base

log = logging.getLogger("perennial")


class OneLineFormatter(logging.Formatter):
    """Log formatter that escapes control characters in messages.

    Ids come from outside: with a line end in it, an id could forge a line of the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the base class's
        """Return the formatted line, its message escaped."""
        record.message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in record.message)
        return super().formatMessage(record)


def run_worker(roles: list[str], *, parent_pid: int = 0) -> int:
    """Run roles until SIGTERM or SIGINT.

    Args:
        roles: Names of roles; the scorer and the learner in one process share the base model.
        parent_pid: End with this process; 0 for none.

    Returns:
        The exit code: 0 after a signal, 1 where a role failed.

    Raises:
        SettingsError: A role does not exist, or a setting is missing.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise SettingsError(
            "no such role", got=", ".join(unknown), allowed=", ".join(ROLES), remedy="name one of these"
        )
    settings = load_settings()
    settings.kafka.require_bootstrap()
    if set(roles) - {"intake"}:
        settings.store.require_uri()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=settings.observe.log_level.upper())
    for noisy in ("kafka", "aiokafka", "faust", "mode", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if parent_pid:
        die_with_parent(parent_pid)

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    metrics = Metrics("+".join(roles), settings)
    server = (
        serve_metrics(metrics, settings.observe.metrics_host, settings.observe.metrics_port)
        if settings.observe.metrics_port
        else None
    )
    try:
        return _run_all(_bodies(roles, settings, stop, metrics), stop)
    finally:
        if server:
            server.close()


def _bodies(
    roles: list[str], settings: Settings, stop: threading.Event, metrics: Metrics
) -> dict[str, Callable[[], None]]:
    """Return the function to run for each role; each role is imported only where it is named."""
    bodies: dict[str, Callable[[], None]] = {}
    base: Base | None = None
    lock = threading.RLock()
    if {"scorer", "learner"} <= set(roles):
        from perennial.learner.model.base import load_base

        base = load_base(settings.model.base, settings.model.device, settings.model.threads)
    for role in dict.fromkeys(roles):
        if role == "intake":
            from perennial.streams.intake.service import run_intake

            bodies[role] = lambda: run_intake(settings, stop, metrics)
        elif role == "streams":
            from perennial.streams.faust_app import run_streams

            bodies[role] = lambda: run_streams(settings, stop, metrics)
        elif role == "scorer":
            from perennial.learner.roles.scorer import run_scorer

            bodies[role] = lambda: run_scorer(settings, stop, metrics, base=base, lock=lock)
        else:
            from perennial.learner.roles.learner import run_learner

            bodies[role] = lambda: run_learner(settings, stop, metrics, base=base, lock=lock)
    return bodies


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
