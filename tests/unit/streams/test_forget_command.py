"""`perennial forget --dry-run` and `perennial explain` over a line in a folder; no broker."""

from __future__ import annotations

import json

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import BlobRef, LearnedExample
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.streams.cli.explain import explain
from perennial.streams.cli.forget import meaning, selector_of, show_plan
from perennial.streams.events.models import Batch, ExampleAccepted, Origin, RetentionRequested, Selector
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.settings import SettingsError
from perennial.testing import small_weights
from tests.versions import Line

ADAPTER = "acme/support"


def example(number: int, **fields: object) -> ExampleAccepted:
    return ExampleAccepted(
        adapter=ADAPTER, example_id=f"{number:032x}", kind="document", document_id=f"d{number}", learn=True,
        text=f"secret text {number}",
        origin=Origin(
            cluster_id="c", topic="documents", topic_id="t", partition=1, offset=number, timestamp_ms=86_400_000
        ),
        **fields,
    )  # fmt: skip


def learn(line: Line, *examples: ExampleAccepted, outcome: str = "promoted") -> str:
    head = line.registry.head(ADAPTER)
    cut = head.seq if head else 0
    data = Batch(adapter=ADAPTER, cut=cut, examples=list(examples), skipped=[]).model_dump_json().encode()
    weights = small_weights(cut + 1)
    learned = [
        LearnedExample(example_id=e.example_id, partition=e.origin.partition_key(), offset=e.origin.offset, tokens=3)
        for e in examples
    ]
    manifest = line.manifest(weights).model_copy(
        update={
            "batch": BlobRef(digest=digest_of(data), size_bytes=len(data)), "learned": learned, "outcome": outcome,
            "gate": GateFigures(held_out_before=4.0, held_out_after=3.5),
        }
    )  # fmt: skip
    return line.registry.publish(manifest, [weights, data], lambda _: None).version


@pytest.fixture
def line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return Line(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)


def test_a_dry_run_names_examples_and_the_versions_that_knew_them(line, capsys):
    learn(line, example(1))
    knew = [learn(line, example(2, subjects=["ann"]), example(3)), learn(line, example(4))]
    assert show_plan("acme/*", selector_of("acme/*", [], ["ann"], []), as_json=True) == 0
    (plan,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [item["document_id"] for item in plan["examples"]] == ["d2"]
    assert plan["versions"] == knew
    assert plan["replayed"] == 2
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d2"], [], []), as_json=False) == 0
    shown = capsys.readouterr().out
    assert "d2" in shown
    assert "secret" not in shown


def test_a_dry_run_of_what_is_nowhere_says_so(line, capsys):
    learn(line, example(1))
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d9"], [], []), as_json=False) == 4
    assert show_plan("other/*", selector_of("other/*", ["d1"], [], []), as_json=False) == 4


@pytest.mark.parametrize("given", [("", ["d1"]), ("acme/**", ["d1"]), ("Acme", ["d1"]), (ADAPTER, []), (ADAPTER, [""])])
def test_unusable_requests_are_refused(given):
    with pytest.raises(SettingsError):
        selector_of(given[0], given[1], [], [])


@pytest.mark.parametrize(
    ("kind", "selector", "said"),
    [
        ("hold", None, "everything"),
        ("erase", {"document_ids": ["a"], "subjects": ["ann"]}, "document a, subject ann"),
        (
            "erase",
            {"document_ids": list("abcdefg")},
            "document a, document b, document c, document d, document e and 2 more",
        ),
        ("policy", {"retention_class": "P30D"}, "class P30D"),
        ("revoke", None, "-"),
    ],
)
def test_a_request_is_shown_by_what_it_means(kind, selector, said):
    request = RetentionRequested(
        request_id="r", kind=kind, adapter=ADAPTER, requested_by="me",
        selector=None if selector is None else Selector(**selector),
    )  # fmt: skip
    assert meaning(RequestRecord(request=request, received_ms=0, until_ms=0)) == said


def test_explain_tells_where_each_example_came_from_and_what_became_of_it(line, capsys):
    first = learn(line, example(1, retention_class="P1D"), example(2))
    learn(line, example(3), outcome="refused")
    entry = QuarantineEntry(
        request_id="r", job_id="j", kind="erase", selector={"document_ids": ["d2"]}, until_ms=10**12
    )
    update_quarantine(line.store, ADAPTER, lambda quarantine: quarantine.with_entry(entry))
    assert explain(ADAPTER, document=None, limit=10, as_json=True) == 0
    lines = {item["document_id"]: item for item in json.loads(capsys.readouterr().out)}
    assert {name: item["state"] for name, item in lines.items()} == {
        "d1": "live", "d2": "quarantined", "d3": "not learned",
    }  # fmt: skip
    one = lines["d1"]
    assert (one["topic"], one["partition"], one["offset"]) == ("documents", 1, 1)
    assert (one["version"], one["seq"], one["outcome"]) == (first, 1, "promoted")
    assert (one["gate_before_nats"], one["gate_after_nats"]) == (4.0, 3.5)
    assert (one["published_at"], one["expires_at"]) == ("1970-01-02T00:00:00+00:00", "1970-01-03T00:00:00+00:00")
    assert lines["d2"]["expires_at"] is None
    assert explain(ADAPTER, document=None, limit=1, as_json=False) == 0
    assert "secret" not in capsys.readouterr().out


def test_explain_shows_what_was_erased_by_its_place_alone(line, capsys):
    version = learn(line, example(1))
    learn(line, example(2))
    line.store.delete(f"blobs/sha256/{line.registry.manifest(ADAPTER, version).batch.digest[7:]}")
    assert explain(ADAPTER, document=None, limit=10, as_json=True) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [(item["document_id"], item["state"], item["offset"]) for item in lines] == [
        ("d2", "live", 2), (None, "erased", 1),
    ]  # fmt: skip
    with pytest.raises(NotFoundError):
        explain(ADAPTER, document="d1", limit=10, as_json=True)


def test_explain_of_an_unknown_adapter_is_not_found(line):
    with pytest.raises(NotFoundError):
        explain("nobody", document=None, limit=10, as_json=True)
