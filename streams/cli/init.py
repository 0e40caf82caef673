"""The command `perennial init`: create topics and bucket, and test the store, before any role starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.factory import open_store
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.installation import provision_recorded
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError

_PAUSE_S = 1.0
_T = TypeVar("_T")


def initialise(*, wait_s: float, as_json: bool) -> int:
    """Create the missing topics and the bucket, test the store, and print what was done.

    A topic that differs from what Perennial needs is reported and not changed: its operator may have chosen it so.

    Args:
        wait_s: Seconds to keep trying while broker or store do not answer.
        as_json: Print JSON instead of text.

    Returns:
        The exit code.

    Raises:
        KafkaUnavailableError: The broker did not answer in time.
        StoreUnavailableError: The store did not answer in time.
        StoreError: The store ignores conditional writes.
        InstallationError: A topic is not the one that this installation recorded.
        SettingsError: A setting is missing or not usable.
    """
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    store = open_store(settings.store.require_uri(), settings.s3)
    deadline_s = time.monotonic() + wait_s
    _retry(store.probe, deadline_s)
    reports = _retry(lambda: provision_recorded(settings, store), deadline_s)
    if as_json:
        print(json.dumps({"store": store.uri, "topics": [asdict(report) for report in reports]}))
        return 0
    created = [report.name for report in reports if report.created]
    lines = [
        f"store {store.uri}: create-if-absent and compare-and-swap hold",
        f"topics created: {', '.join(created)}" if created else f"all {len(reports)} topics exist",
        *(f"topic {report.name}: {difference}; not changed" for report in reports for difference in report.differences),
    ]
    for line in lines:
        print(printable(line))
    return 0


def _retry(attempt: Callable[[], _T], deadline_s: float) -> _T:
    """Call `attempt` until broker and store answer, or until the monotonic clock passes `deadline_s`."""
    while True:
        try:
            return attempt()
        except (KafkaUnavailableError, StoreUnavailableError):
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_PAUSE_S)
