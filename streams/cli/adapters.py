"""`perennial adapters`: what the registry knows of each adapter."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import AliasState, Registry
from perennial.streams.cli.tables import short_version
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import RollbackRequested
from perennial.streams.settings import Settings


def open_registry(settings: Settings) -> Registry:
    """The registry in the settings' store."""
    return Registry(
        open_store(settings.store.require_uri(), settings.s3),
        nonce=lambda: uuid.uuid4().hex,
        now=lambda: datetime.now(UTC),
    )


def list_adapters(*, as_json: bool) -> int:
    """A line per adapter."""
    settings = connected_settings()
    registry = open_registry(settings)
    rows = []
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
    table = Table("adapter", "generation", "live version", "versions made", "last outcome", "live since")
    for row in rows:
        table.add_row(
            str(row["adapter"]), str(row["generation"]), short_version(row["version"]),  # type: ignore[arg-type]
            str(row["versions"]), str(row["last_outcome"] or "-"), str(row["published_at"] or "-"),
        )  # fmt: skip
    Console().print(table)
    return 0


def require_adapter(registry: Registry, adapter: str) -> None:
    """Raises NotFoundError where the adapter has no version."""
    if registry.head(adapter) is None:
        known = ", ".join(islice(registry.adapters(), 10)) or "none yet"
        raise NotFoundError(
            "no such adapter", got=adapter, allowed=f"known adapters: {known}", remedy="see `perennial adapters ls`"
        )


def show_adapter(adapter: str, *, as_json: bool) -> int:
    """Everything about the live version and the head of the line."""
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
    table = Table(show_header=False, box=None)
    for name, value in {**_alias_facts(alias), **_facts(manifest)}.items():
        table.add_row(f"[bold]{name}[/]", str(value))
    Console().print(table)
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
        "outcome": f"{manifest.outcome} ({manifest.reason})", "seq": manifest.seq, "kind": manifest.kind,
        "parent": manifest.parent, "base": f"{manifest.base_model} {manifest.base_sha256}",
        "learned": f"{len(manifest.learned)} examples, {manifest.tokens} tokens",
        "skipped": len(manifest.skipped), "weights": f"{manifest.weights.digest}, {manifest.weights.size_bytes} bytes",
        "recipe": ", ".join(f"{k}={v}" for k, v in sorted(manifest.config.items())),
    }  # fmt: skip
    facts.update({f"gate {name}": value for name, value in manifest.gate.items()})
    return facts


def show_history(adapter: str, *, limit: int, as_json: bool) -> int:
    """The line of versions, newest first."""
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
            "gate": manifest.gate, "live": bool(alias and alias.version == version),
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return 0
    table = Table("seq", "version", "kind", "outcome", "examples", "tokens", "held-out before → after", "general rise")
    for row in rows:
        gate = row["gate"]
        before, after = gate.get("held_out_before"), gate.get("held_out_after")
        rise = _difference(gate.get("anchor_after"), gate.get("anchor_base"))
        table.add_row(
            str(row["seq"]), short_version(row["version"]) + (" [green]live[/]" if row["live"] else ""), row["kind"],
            row["outcome"] if row["outcome"] == "promoted" else f"{row['outcome']}: {row['reason']}",
            str(row["examples"]), str(row["tokens"]),
            f"{before:.3f} → {after:.3f}" if isinstance(before, float) and isinstance(after, float) else "-", rise,
        )  # fmt: skip
    Console().print(table)
    return 0


def _difference(after: object, before: object) -> str:
    return f"{after - before:+.3f}" if isinstance(after, float) and isinstance(before, float) else "-"


def roll_back(adapter: str, *, to: str | None, reason: str, wait_s: float, as_json: bool) -> int:
    """Ask for a rollback and wait until the alias moved; exit code 1 where it did not in time."""
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
        publisher.publish(job).result(30)
    deadline = time.monotonic() + wait_s
    state = before
    while time.monotonic() < deadline:
        state = registry.alias(adapter, settings.serving.alias)
        if state and (before is None or state.generation > before.generation) and state.kind == "rolled_back":
            break
        time.sleep(0.2)
    moved = bool(state and (before is None or state.generation > before.generation))
    if as_json:
        print(json.dumps({"job_id": job.job_id, "moved": moved, "alias": _alias_facts(state)}))
    elif moved and state:
        Console().print(f"{adapter} is at {short_version(state.version)} again, generation {state.generation}")
    elif wait_s:
        Console(stderr=True).print(
            f"the rollback was asked for ({job.job_id}) but is not live after {wait_s:.0f} s: is a learner running? "
            "`perennial status` shows the jobs that wait"
        )
    return 0 if moved or not wait_s else 1


def _resolve(registry: Registry, adapter: str, prefix: str) -> str:
    wanted = prefix.removeprefix("sha256:")
    found = [version for _, version in registry.versions(adapter) if version.removeprefix("sha256:").startswith(wanted)]
    if len(found) != 1:
        raise NotFoundError(
            "no such version" if not found else "more than one version begins so",
            got=prefix, allowed="a version of `perennial adapters history`, or its unique beginning",
        )  # fmt: skip
    return found[0]
