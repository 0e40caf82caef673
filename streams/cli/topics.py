"""The command `perennial topics create`: create the missing topics and report those that differ."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from perennial.streams.cli.tables import Column, print_table
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.kafka.installation import open_store_of, provision_recorded

_COLUMNS = (Column("topic"), Column("state"), Column("differs from what Perennial needs", wraps=True))


def create_topics(*, dry_run: bool, as_json: bool) -> int:
    """Create the missing topics and print the state of each.

    Args:
        dry_run: Change nothing; print what would be created.
        as_json: Print JSON instead of a table.

    Returns:
        The exit code: 1 where an existing topic differs from what Perennial needs.

    Raises:
        InstallationError: A topic is not the one that this installation recorded.
    """
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    reports = provision_recorded(settings, open_store_of(settings), dry_run=dry_run)
    differing = [report for report in reports if report.differences]
    if as_json:
        print(json.dumps([asdict(report) for report in reports]))
        return 1 if differing else 0
    created = "would be created" if dry_run else "created"
    print_table(
        _COLUMNS,
        [
            (report.name, created if report.created else "exists", "\n".join(report.differences) or "no")
            for report in reports
        ],
    )
    if differing:
        Console(stderr=True).print(
            "Topics that differ were not changed: change configs with kafka-configs, and partition counts with "
            "`perennial topics repartition`."
        )
    return 1 if differing else 0
