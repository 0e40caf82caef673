"""The commands `perennial adapters ls`, `show`, `history` and `rollback`: what the registry stores of each adapter."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.cli.tables import Column, print_facts, print_table, short_time, short_version, shown_version
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import RollbackRequested
from perennial.streams.settings import Settings

_MAX_NAMED_ADAPTERS = 10
_DELIVERY_TIMEOUT_S = 30
_POLL_S = 0.2

_LIST_COLUMNS = (
    Column("adapter"), Column("generation", 1, right=True), Column("live version", shorten=short_version),
    Column("versions made", 2, right=True), Column("last outcome", 1), Column("live since", 3, shorten=short_time),
)  # fmt: skip
_HISTORY_COLUMNS = (
    Column("seq", right=True), Column("version", shorten=short_version), Column("live", 1), Column("kind", 4),
    Column("outcome"), Column("reason", 2, wraps=True), Column("examples", 5, right=True),
    Column("tokens", 6, right=True), Column("held-out loss before → after", 3, wraps=True),
    Column("general text rise", 4, right=True),
)  # fmt: skip


def open_registry(settings: Settings) -> Registry:
    """Return the registry in the store that the settings name."""
    return Registry(
        open_store(settings.store.require_uri(), settings.s3),
        nonce=lambda: uuid.uuid4().hex,
        now=lambda: datetime.now(UTC),
    )


def list_adapters(*, as_json: bool) -> int:
    """Print one row per adapter and return the exit code."""
    settings = connected_settings()
    registry = open_registry(settings)
    rows: list[dict[str, Any]] = []
    for adapter in registry.adapters():
        alias, head = registry.alias(adapter, settings.serving.alias), registry.head(adapter)
        rows.append({
            "adapter": adapter,
            "generation": alias.generation if alias else 0,
            "version": alias.version if alias else None,
            "versions": head.seq if head else 0,
            "last_outcome": head.manifest.outcome if head else None,
            "published_at": alias.published_at.isoformat() if alias else None,
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        Console(stderr=True).print("no adapter has a version yet: publish documents first, then `perennial watch`")
        return 0
    print_table(_LIST_COLUMNS, [["-" if value is None else str(value) for value in row.values()] for row in rows])
    return 0


def require_adapter(registry: Registry, adapter: str) -> None:
    """Check that the adapter has a version.

    Raises:
        NotFoundError: It has none.
    """
    if registry.head(adapter) is None:
        known = ", ".join(islice(registry.adapters(), _MAX_NAMED_ADAPTERS)) or "none yet"
        raise NotFoundError(
            "no such adapter", got=adapter, allowed=f"known adapters: {known}", remedy="see `perennial adapters ls`"
        )


def show_adapter(adapter: str, *, as_json: bool) -> int:
    """Print the live version of an adapter, or its newest where none is live, and return the exit code.

    Raises:
        NotFoundError: The adapter has no version.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    alias, head = registry.alias(adapter, settings.serving.alias), registry.head(adapter)
    manifest = registry.manifest(adapter, alias.version) if alias else (head.manifest if head else None)
    if manifest is None:
        return 4
    if as_json:
        print(json.dumps({"alias": _alias_facts(alias), "manifest": json.loads(manifest.to_bytes())}))
        return 0
    print_facts({"adapter": adapter, **_alias_facts(alias), **_facts(manifest)})
    return 0


def _alias_facts(alias: AliasState | None) -> dict[str, object]:
    if alias is None:
        return {"alias": "none: no version passed the gate yet"}
    return {
        "alias": alias.alias, "generation": alias.generation, "version": alias.version,
        "previous": alias.previous_version, "kind": alias.kind, "live since": alias.published_at.isoformat(),
    }  # fmt: skip


def _facts(manifest: Manifest) -> dict[str, object]:
    facts: dict[str, object] = {
        "outcome": f"{manifest.outcome} ({manifest.reason})", "seq": manifest.seq, "made by": manifest.kind,
        "parent": manifest.parent, "base": f"{manifest.base_model} {manifest.base_sha256}",
        "learned": f"{len(manifest.learned)} examples, {manifest.tokens} tokens",
        "skipped": len(manifest.skipped), "weights": f"{manifest.weights.digest}, {manifest.weights.size_bytes} bytes",
        "recipe": ", ".join(f"{k}={v}" for k, v in sorted(manifest.config.items())),
    }  # fmt: skip
    facts.update({f"gate {name}": value for name, value in manifest.gate.as_dict().items()})
    return facts


def show_history(adapter: str, *, limit: int, as_json: bool) -> int:
    """Print the versions of an adapter, newest first, and return the exit code.

    Raises:
        NotFoundError: The adapter has no version.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    alias = registry.alias(adapter, settings.serving.alias)
    rows: list[dict[str, Any]] = []
    for seq, version in registry.versions(adapter, newest_first=True, limit=limit):
        manifest = registry.manifest(adapter, version)
        rows.append({
            "seq": seq, "version": version, "kind": manifest.kind, "outcome": manifest.outcome,
            "reason": manifest.reason, "examples": len(manifest.learned), "tokens": manifest.tokens,
            "gate": manifest.gate.as_dict(), "live": bool(alias and alias.version == version),
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
    return [
        str(row["seq"]), row["version"], Text("live", "green") if row["live"] else "", row["kind"], row["outcome"],
        row["reason"], str(row["examples"]), str(row["tokens"]), losses,
        _difference(gate.anchor_after, gate.anchor_base),
    ]  # fmt: skip


def _difference(after: float | None, before: float | None) -> str:
    return f"{after - before:+.3f}" if after is not None and before is not None else "-"


def roll_back(adapter: str, *, to: str | None, reason: str, wait_s: float, as_json: bool) -> int:
    """Request a rollback and wait until the alias has changed.

    Args:
        adapter: Name of the adapter.
        to: Version to make live, or its unique beginning; None for the version that was live before.
        reason: Recorded in the job.
        wait_s: Seconds to wait for the alias; 0 returns at once.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where the alias did not change in time.

    Raises:
        NotFoundError: The adapter or the version does not exist, or several versions begin like `to`.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    before = registry.alias(adapter, settings.serving.alias)
    target = _resolve(registry, adapter, to) if to else None
    job = RollbackRequested(
        job_id=f"rollback-{uuid.uuid4().hex}", adapter=adapter, alias=settings.serving.alias, version=target,
        requested_by="command line", reason=reason,
    )  # fmt: skip
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        publisher.publish(job).result(_DELIVERY_TIMEOUT_S)
    deadline = time.monotonic() + wait_s
    state = before
    while time.monotonic() < deadline:
        state = registry.alias(adapter, settings.serving.alias)
        if state and (before is None or state.generation > before.generation) and state.kind == "rolled_back":
            break
        time.sleep(_POLL_S)
    moved = bool(state and (before is None or state.generation > before.generation))
    if as_json:
        print(json.dumps({"job_id": job.job_id, "moved": moved, "alias": _alias_facts(state)}))
    elif moved and state:
        console = Console(highlight=False)
        version = shown_version(state.version, console)
        console.print(f"{adapter} is at {version} again, generation {state.generation}", soft_wrap=True, markup=False)
    elif wait_s:
        Console(stderr=True, highlight=False).print(
            f"the rollback was requested ({job.job_id}) but is not live after {wait_s:.0f} s: is a learner running? "
            "`perennial status` shows the waiting jobs", soft_wrap=True, markup=False,
        )  # fmt: skip
    return 0 if moved or not wait_s else 1


def _resolve(registry: Registry, adapter: str, prefix: str) -> str:
    """Return the one version of the adapter whose digest begins with the prefix."""
    wanted = prefix.removeprefix("sha256:")
    found = [version for _, version in registry.versions(adapter) if version.removeprefix("sha256:").startswith(wanted)]
    if len(found) != 1:
        raise NotFoundError(
            "several versions begin like this" if found else "no such version", got=prefix,
            allowed="a version of this adapter, or its unique beginning", remedy="see `perennial adapters history`",
        )  # fmt: skip
    return found[0]
