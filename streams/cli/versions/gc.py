"""`perennial gc`: delete the weights of old versions, and blobs that crashed processes left behind."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from rich.console import Console

from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.devstack.discovery import connected_settings

_COLUMNS = (
    Column("adapter"), Column("versions"), Column("blobs", right=True), Column("MB", right=True),
    Column("kept", 1, right=True), Column("skipped", 2, wraps=True),
)  # fmt: skip


def collect(adapters: list[str], *, keep: int | None, dry_run: bool, as_json: bool) -> int:
    """Delete the weights of old versions that nothing can need; print what was freed and return the exit code.

    Args:
        adapters: The adapters; all where none is named.
        keep: How many of the newest versions keep their weights; None: the setting.
        dry_run: Only print what would be deleted.
        as_json: Print JSON instead of a table.

    Raises:
        NotFoundError: An adapter has no version.
    """
    from perennial.learner.forgetting.collect_versions import collect_versions

    settings = connected_settings()
    registry = open_registry(settings)
    keep = settings.store.keep_versions if keep is None else keep
    for adapter in adapters:
        require_adapter(registry, adapter)
    reports = []
    if keep:
        reports = [
            collect_versions(registry, adapter, keep, dry_run=dry_run)
            for adapter in adapters or list(registry.adapters())
        ]
    if as_json:
        print(json.dumps({"keep": keep, "dry_run": dry_run, "adapters": [asdict(report) for report in reports]}))
        return 0
    if not keep:
        print("PERENNIAL_KEEP_VERSIONS is 0: every version keeps its weights; name a number by --keep")
        return 0
    changed = [report for report in reports if report.versions or report.skipped]
    if changed:
        print_table(_COLUMNS, [
            (r.adapter, str(r.versions), str(r.blobs), f"{r.freed_bytes / 1e6:.1f}", str(r.kept), r.skipped)
            for r in changed
        ])  # fmt: skip
    freed, versions = sum(r.freed_bytes for r in reports), sum(r.versions for r in reports)
    verb = "would free" if dry_run else "freed"
    Console(highlight=False).print(
        f"{verb} {freed / 1e6:.1f} MB of {versions} versions in {len(reports)} adapters; the newest {keep} are kept",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    return 0


def collect_orphaned(*, min_age_h: float, dry_run: bool, as_json: bool) -> int:
    """Delete the blobs that nothing has referred to for a while; print how many and return the exit code.

    Args:
        min_age_h: Hours for which nothing must have referred to a blob, counted from the first run that saw it so.
        dry_run: Only print what would be deleted.
        as_json: Print JSON instead of text.
    """
    from perennial.learner.forgetting.collect_orphans import collect_orphans

    registry = open_registry(connected_settings())
    report = collect_orphans(registry, datetime.now(UTC), timedelta(hours=min_age_h), dry_run=dry_run)
    if as_json:
        print(json.dumps({"dry_run": dry_run, **asdict(report)}))
        return 0
    verb = "would be deleted" if dry_run else "were deleted"
    Console(highlight=False).print(
        f"{report.deleted} of {report.blobs} blobs {verb}; {report.waiting} more that nothing refers to are kept until "
        f"a run finds them so again after {min_age_h:g} h", soft_wrap=True, markup=False,
    )  # fmt: skip
    return 0
