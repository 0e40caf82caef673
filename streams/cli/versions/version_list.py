"""`perennial adapters history`: list the versions of an adapter."""

from __future__ import annotations

import json
from typing import Any

from rich.text import Text

from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.collected import load_collected
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.tables import Column, print_table, short_version
from perennial.streams.devstack.discovery import connected_settings

_HISTORY_COLUMNS = (
    Column("seq", right=True), Column("version", shorten=short_version), Column("live", 1), Column("kind", 4),
    Column("outcome"), Column("reason", 2, wraps=True), Column("examples", 5, right=True),
    Column("tokens", 6, right=True), Column("held-out loss before → after", 3, wraps=True),
    Column("general text rise", 4, right=True),
)  # fmt: skip


def show_history(adapter: str, *, limit: int, as_json: bool) -> int:
    """Print the versions of an adapter, newest first, and return the exit code.

    Raises:
        NotFoundError: The adapter has no version.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    alias = registry.alias(adapter, settings.serving.alias)
    collected = load_collected(registry.store, adapter).all
    rows: list[dict[str, Any]] = []
    for seq, version in registry.versions(adapter, newest_first=True, limit=limit):
        manifest = registry.manifest(adapter, version)
        rows.append({
            "seq": seq, "version": version, "kind": manifest.kind, "outcome": manifest.outcome,
            "reason": manifest.reason, "examples": len(manifest.learned), "tokens": manifest.tokens,
            "gate": manifest.gate.as_dict(), "live": bool(alias and alias.version == version),
            "collected": version in collected,
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return 0
    print_table(_HISTORY_COLUMNS, [_history_row(row) for row in rows])
    return 0


def _history_row(row: dict[str, Any]) -> list[str | Text]:
    gate = GateFigures.model_validate(row["gate"])
    before, after = gate.held_out_before, gate.held_out_after
    losses = f"{before:.3f} → {after:.3f}" if before is not None and after is not None else "-"
    tries = f", {gate.tries} tries" if gate.tries else ""
    if gate.corrections_not_learned:
        tries += f", {gate.corrections_not_learned} of {gate.corrections} corrections not learned"
    return [
        str(row["seq"]), row["version"], _served(row), row["kind"], row["outcome"],
        f"{row['reason']}{tries}", str(row["examples"]), str(row["tokens"]), losses,
        _difference(gate.anchor_after, gate.anchor_base),
    ]  # fmt: skip


def _served(row: dict[str, Any]) -> Text:
    return Text("live", "green") if row["live"] else Text("collected" if row["collected"] else "", "dim")


def _difference(after: float | None, before: float | None) -> str:
    return f"{after - before:+.3f}" if after is not None and before is not None else "-"
