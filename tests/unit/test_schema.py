"""The generated documents are up to date, valid AsyncAPI 3.0, and agree with the models."""

from __future__ import annotations

import re

import orjson
import pytest

from perennial.streams.events.models import EVENTS
from perennial.streams.kafka.topics import TOPICS
from tools import generate_schemas as schema


def test_docs_agree_with_the_models():
    assert schema.stale() == [], "run `python -m tools.generate_schemas`"


def test_stale_files_are_found_and_rewritten(tmp_path):
    assert len(schema.write(tmp_path)) == len(EVENTS) + 1
    assert schema.stale(tmp_path) == []
    (tmp_path / "asyncapi.json").write_text("{}")
    (tmp_path / "schema" / "document.observed.json").unlink()
    (tmp_path / "schema" / "gone.json").write_text("{}")
    stale = ["asyncapi.json", "schema/document.observed.json", "schema/gone.json"]
    assert schema.stale(tmp_path) == stale
    assert schema.write(tmp_path) == stale
    assert schema.stale(tmp_path) == []


def resolve(document, reference):
    assert reference.startswith("#/")
    found = document
    for part in reference[2:].split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.fixture(scope="module")
def asyncapi():
    return orjson.loads(schema.documents()["asyncapi.json"])


def test_asyncapi_has_the_members_of_version_3(asyncapi):
    assert asyncapi["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(asyncapi["info"])
    assert set(asyncapi) <= {
        "asyncapi", "id", "info", "servers", "defaultContentType", "channels", "operations", "components",
    }  # fmt: skip
    for group in asyncapi["components"].values():
        assert all(re.fullmatch(r"[a-zA-Z0-9.\-_]+", name) for name in group)
    for channel in asyncapi["channels"].values():
        assert isinstance(channel["address"], str)
        assert channel["messages"]
    for operation in asyncapi["operations"].values():
        assert operation["action"] in {"send", "receive"}
        assert resolve(asyncapi, operation["channel"]["$ref"])["address"] in TOPICS
        # An operation's messages must be references into its own channel.
        assert all(m["$ref"].startswith(f"{operation['channel']['$ref']}/messages/") for m in operation["messages"])


def test_every_reference_resolves(asyncapi):
    found = list(references(asyncapi))
    assert len(found) > len(EVENTS)
    for reference in found:
        assert resolve(asyncapi, reference)


def test_every_topic_and_event_is_there(asyncapi):
    assert set(asyncapi["channels"]) == set(TOPICS)
    carried = {name for channel in asyncapi["channels"].values() for name in channel["messages"]}
    assert carried == {*EVENTS, "dead-letter"}
    used = {operation["channel"]["$ref"].removeprefix("#/channels/") for operation in asyncapi["operations"].values()}
    assert used == set(TOPICS)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_event_schemas_name_the_models_fields(name):
    document = orjson.loads(schema.documents()[f"schema/{name}.json"])
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    fields = {field.alias or key: field for key, field in EVENTS[name].model_fields.items()}
    assert set(document["properties"]) == set(fields)
    assert set(document.get("required", [])) == {key for key, field in fields.items() if field.is_required()}
    for reference in references(document):
        assert resolve(document, reference)


def test_check_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "DOCS", tmp_path)
    monkeypatch.setattr(schema.stale, "__defaults__", (tmp_path,))
    assert schema.main(["--check"]) == 1
    assert "stale: docs/asyncapi.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
