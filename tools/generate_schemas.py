"""Generate docs/schema (JSON Schema of every event) and docs/asyncapi.json (AsyncAPI 3.0) from the event models.

`python -m tools.generate_schemas` writes the files; with `--check` it writes nothing and exits with 1 where a file
differs from the models.

Sources: AsyncAPI 3.0.0; its Kafka bindings 0.5.0; JSON Schema 2020-12.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from perennial.streams.events.fields import Event
from perennial.streams.events.models import EVENTS
from perennial.streams.kafka.topics import TOPICS, TopicSpec

DOCS = Path(__file__).resolve().parent.parent / "docs"
API_VERSION = "1.0.0"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_WRITES: Mapping[str, tuple[str, ...]] = {
    "intake": ("examples", "dead-letters"),
    "scorer": ("scored-examples", "dead-letters"),
    "curate": ("drift", "adapter-jobs", "dead-letters"),
    "learner": ("adapter-updates", "retention-status", "dead-letters"),
    "retain": ("adapter-jobs", "retention-status", "dead-letters"),
    "subscriber": ("adapter-acks",),
}
_READS: Mapping[str, tuple[str, ...]] = {
    "intake": ("documents", "interactions"),
    "scorer": ("examples",),
    "curate": ("scored-examples",),
    "learner": ("adapter-jobs",),
    "retain": ("retention", "adapter-acks"),
    "subscriber": ("adapter-updates",),
}


def event_schema(model: type[Event]) -> dict[str, Any]:
    """Return the JSON Schema of the values that a reader of this event accepts."""
    schema = model.model_json_schema(by_alias=True, mode="validation", ref_template="#/$defs/{model}")
    return {"$schema": _DIALECT, "title": model.type, **{k: v for k, v in schema.items() if k != "title"}}


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI document: a channel per topic, a message per event type, an operation per role and topic."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Perennial",
            "version": API_VERSION,
            "description": "Keeps language models learning from Kafka. Events are CloudEvents 1.0: written in binary "
            "mode; read in binary mode, structured mode and, on documents, interactions and retention, as plain JSON.",
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(spec) for name, spec in TOPICS.items()},
        "operations": {
            **{f"{role}.receive.{topic}": _operation("receive", topic) for role, topic in _pairs(_READS)},
            **{f"{role}.send.{topic}": _operation("send", topic) for role, topic in _pairs(_WRITES)},
        },
        "components": {
            "messages": {**{name: _message(model) for name, model in EVENTS.items()}, "dead-letter": _DEAD_LETTER},
            "messageTraits": {"cloudevent": _CLOUDEVENT},
            "schemas": _schemas(),
        },
    }


def documents() -> dict[str, bytes]:
    """Return every generated file: its path below docs/ and its content."""
    files = {f"schema/{name}.json": _render(event_schema(model)) for name, model in EVENTS.items()}
    return {**files, "asyncapi.json": _render(asyncapi())}


def stale(folder: Path = DOCS) -> list[str]:
    """Return the paths of files that are missing, differ from the models, or belong to no event.

    Args:
        folder: The folder with the generated files; the paths are relative to it.
    """
    wanted = documents()
    present = {f"schema/{path.name}" for path in (folder / "schema").glob("*.json")}
    differing = [
        name for name, data in wanted.items() if not (folder / name).is_file() or (folder / name).read_bytes() != data
    ]
    return sorted([*differing, *(present - set(wanted))])


def write(folder: Path = DOCS) -> list[str]:
    """Write the stale files, delete those that belong to no event, and return their paths.

    Args:
        folder: The folder with the generated files; the paths are relative to it.
    """
    changed = stale(folder)
    wanted = documents()
    for name in changed:
        path = folder / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wanted[name])
        else:
            path.unlink()
    return changed


def _render(document: Mapping[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _pairs(roles: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(role, topic) for role, topics in roles.items() for topic in topics]


def _messages_of(spec: TopicSpec) -> tuple[str, ...]:
    return spec.event_types or ("dead-letter",)


def _channel(spec: TopicSpec) -> dict[str, Any]:
    configs: dict[str, Any] = {"cleanup.policy": [spec.cleanup]}
    configs |= {
        name: int(spec.configs[name])
        for name in ("retention.ms", "delete.retention.ms", "max.message.bytes")
        if name in spec.configs
    }
    return {
        "address": spec.name,
        "description": f"Key: {spec.key}. A deployment may put a prefix before the name.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _messages_of(spec)},
        "bindings": {"kafka": {"topic": spec.name, "topicConfiguration": configs, "bindingVersion": "0.5.0"}},
    }


def _operation(action: str, topic: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{topic}"},
        "messages": [{"$ref": f"#/channels/{topic}/messages/{name}"} for name in _messages_of(TOPICS[topic])],
    }


def _message(model: type[Event]) -> dict[str, Any]:
    return {
        "name": model.type,
        "title": model.__name__,
        "summary": (model.__doc__ or "").strip().splitlines()[0],
        "contentType": "application/json",
        "traits": [{"$ref": "#/components/messageTraits/cloudevent"}],
        "payload": {"$ref": f"#/components/schemas/{model.type}"},
        "bindings": {"kafka": {"key": {"type": "string"}, "bindingVersion": "0.5.0"}},
    }


def _schemas() -> dict[str, Any]:
    """Return the schemas of all events and of their nested models, which AsyncAPI looks up from the document's root."""
    found: dict[str, Any] = {}
    for name, model in EVENTS.items():
        schema = model.model_json_schema(by_alias=True, mode="validation", ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[name] = schema
    return found


_CLOUDEVENT: dict[str, Any] = {
    "headers": {
        "type": "object",
        "required": ["ce_specversion", "ce_type", "ce_id", "ce_source"],
        "properties": {
            "content-type": {"type": "string", "const": "application/json"},
            "ce_specversion": {"type": "string", "const": "1.0"},
            "ce_type": {"type": "string", "enum": sorted(EVENTS)},
            "ce_id": {"type": "string", "minLength": 1},
            "ce_source": {"type": "string", "minLength": 1, "format": "uri-reference"},
            "ce_time": {"type": "string", "format": "date-time"},
            "ce_traceparent": {"type": "string", "description": "W3C Trace Context"},
        },
    }
}

_DEAD_LETTER: dict[str, Any] = {
    "name": "dead-letter",
    "title": "DeadLetter",
    "summary": "A record that was refused: its bytes and headers as they came, and why and where it was refused.",
    "headers": {
        "type": "object",
        "required": [f"perennial-{name}" for name in ("reason", "stage", "topic", "partition", "offset", "at")],
        "properties": {
            f"perennial-{name}": {"type": "string"}
            for name in ("reason", "stage", "detail", "topic", "partition", "offset", "at")
        },
    },
    "payload": {"description": "any bytes, or null"},
}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the generated files and return the exit code.

    Args:
        arguments: Command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.generate_schemas", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is stale")
    checking = parser.parse_args(arguments).check
    changed = stale() if checking else write()
    for name in changed:
        print(f"{'stale' if checking else 'wrote'}: docs/{name}", file=sys.stderr)
    return 1 if checking and changed else 0


if __name__ == "__main__":
    sys.exit(main())
