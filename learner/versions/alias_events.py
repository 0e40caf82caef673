"""Events that tell subscribers where an alias points, built from the registry alone, so that they can be sent again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import NAMESPACE_URL, uuid5

from perennial.storage.objects.keys import blob_key
from perennial.storage.registry.registry import AliasState, Registry, manifest_key
from perennial.streams.events.adapter_events import (
    AdapterPromoted,
    AdapterRetired,
    AdapterRevoked,
    AdapterRolledBack,
    AdapterUpdate,
    BaseRef,
    Learned,
)
from perennial.streams.events.models import RetentionProgressed
from perennial.streams.kafka.event_signatures import signed_event

_EVENTS: dict[str, type[AdapterPromoted | AdapterRolledBack | AdapterRevoked | AdapterRetired]] = {
    "promoted": AdapterPromoted,
    "rolled_back": AdapterRolledBack,
    "revoked": AdapterRevoked,
    "retired": AdapterRetired,
}


def alias_event(registry: Registry, state: AliasState, stage_at: Mapping[str, datetime] | None = None) -> AdapterUpdate:
    """Return the event that says where an alias points, signed where the registry has a key.

    Args:
        registry: holds the manifest of the alias's version.
        state: the alias.
        stage_at: by stage, when the update's oldest example was published, and when the update was cut, received,
            trained and promoted; None where these times are not known.
    """
    manifest = registry.manifest(state.adapter, state.version)
    event = _EVENTS[state.kind](
        adapter=state.adapter,
        alias=state.alias,
        generation=state.generation,
        version=state.version,
        seq=state.seq,
        manifest_uri=f"{registry.store.uri}/{manifest_key(state.adapter, state.version)}",
        weights_uri=f"{registry.store.uri}/{blob_key(manifest.weights.digest)}",
        weights_sha256=manifest.weights.digest,
        weights_bytes=manifest.weights.size_bytes,
        rank=manifest.rank,
        extends=manifest.extends,
        base=BaseRef(model=manifest.base_model, sha256=manifest.base_sha256),
        previous_version=state.previous_version,
        learned=Learned(
            examples=len(manifest.learned),
            tokens=sum(example.tokens for example in manifest.learned),
            from_=_time(manifest.published_from_ms),
            to=_time(manifest.published_to_ms),
        ),
        gate=manifest.gate.as_dict(),
        reason=state.reason,
        stage_at=dict(stage_at or {}),
        published_at=state.published_at,
    )
    return signed_event(event, registry.trust)


def alias_event_id(event: AdapterUpdate) -> str:
    """Return the CloudEvents id of an alias state, the same each time it is sent."""
    return str(uuid5(NAMESPACE_URL, f"{event.key()}/{event.generation}"))


def status_id(status: RetentionProgressed) -> str:
    """Return the CloudEvents id of a retention request's status, the same each time it is sent."""
    parts = (status.request_id, status.adapter, status.state, str(status.examples), str(status.version), status.detail)
    return str(uuid5(NAMESPACE_URL, "\n".join(parts)))


def _time(timestamp_ms: int | None) -> datetime | None:
    return None if timestamp_ms is None else datetime.fromtimestamp(timestamp_ms / 1000, UTC)
