"""`perennial topics create`."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.topics import provision


def create_topics(*, dry_run: bool, as_json: bool) -> int:
    """Make what is missing; exit code 1 where an existing topic differs."""
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    reports = provision(settings, dry_run=dry_run)
    differing = [report for report in reports if report.differences]
    if as_json:
        print(json.dumps([asdict(report) for report in reports]))
        return 1 if differing else 0
    table = Table("topic", "state", "differs from what the project needs")
    for report in reports:
        state = ("would be made" if dry_run else "made") if report.created else "was there"
        table.add_row(report.name, state, "\n".join(report.differences))
    Console().print(table)
    if differing:
        Console(stderr=True).print(
            "Topics that differ were left as they are: change them with kafka-configs, or delete them."
        )
    return 1 if differing else 0
