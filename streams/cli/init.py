"""`perennial init`: topics, bucket and a proof of the store, before any role starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from rich.console import Console

from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.factory import open_store
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.topics import KafkaUnavailableError, provision

_PAUSE_S = 1.0
_T = TypeVar("_T")


def initialise(*, wait_s: float, as_json: bool) -> int:
    """Make what is missing. A topic that differs is told and left: its operator may have meant it.

    Raises KafkaUnavailableError or StoreUnavailableError after wait_s seconds without an answer, SettingsError,
    StoreError where the store ignores conditional writes.
    """
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    store = open_store(settings.store.require_uri(), settings.s3)
    deadline_s = time.monotonic() + wait_s
    _persist(store.probe, deadline_s)
    reports = _persist(lambda: provision(settings), deadline_s)
    if as_json:
        print(json.dumps({"store": store.uri, "topics": [asdict(report) for report in reports]}))
        return 0
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"store {store.uri}: create-if-absent and compare-and-swap hold")
    made = [report.name for report in reports if report.created]
    out.print(f"topics made: {', '.join(made)}" if made else f"all {len(reports)} topics were there")
    for report in reports:
        for difference in report.differences:
            out.print(f"topic {report.name}: {difference}; left as it is")
    return 0


def _persist(attempt: Callable[[], _T], deadline_s: float) -> _T:
    while True:
        try:
            return attempt()
        except (KafkaUnavailableError, StoreUnavailableError):
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_PAUSE_S)
