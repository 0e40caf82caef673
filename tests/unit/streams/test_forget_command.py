"""`perennial forget` and `perennial explain` over a store in a folder; no broker."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest
from typer.testing import CliRunner

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.dependants import record_dependant
from perennial.storage.registry.manifest import BlobRef, LearnedExample
from perennial.storage.registry.quarantine import QuarantineEntry, ensure_text_key, load_quarantine, update_quarantine
from perennial.storage.registry.suppressed_texts import keyed_text_hash
from perennial.streams.cli.app import app
from perennial.streams.cli.explain import explain
from perennial.streams.cli.forget import approval
from perennial.streams.cli.forget import request_status as status
from perennial.streams.cli.forget.approval import approve_request
from perennial.streams.cli.forget.outcome import print_adapters, print_outcome
from perennial.streams.cli.forget.preview import show_plan
from perennial.streams.cli.forget.request_status import StatusReader, show_requests
from perennial.streams.cli.forget.requests import _conclusion, exit_code_of
from perennial.streams.cli.forget.selection import describe_selection, selector_of
from perennial.streams.cli.forget.unsuppression import unsuppress_texts
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.models import (
    Batch,
    ExampleAccepted,
    Origin,
    RetentionProgressed,
    RetentionRequested,
    Selector,
)
from perennial.streams.retain.ledger import AdapterProgress, Approval, ProgressPage, RequestRecord, page_of
from perennial.streams.retain.request_store import RequestStore, hash_of
from perennial.streams.retention.kinds import DEPENDANT_PREFIX
from perennial.streams.settings import Settings, SettingsError
from perennial.testing import small_weights
from tests.versions import VersionPublisher

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


def learn(versions: VersionPublisher, *examples: ExampleAccepted, outcome: str = "promoted") -> str:
    head = versions.registry.head(versions.adapter)
    cut = head.seq if head else 0
    data = Batch(adapter=versions.adapter, cut=cut, examples=list(examples), skipped=[]).model_dump_json().encode()
    weights = small_weights(cut + 1)
    learned = [
        LearnedExample(example_id=e.example_id, partition=e.origin.partition_key(), offset=e.origin.offset, tokens=3)
        for e in examples
    ]
    manifest = versions.manifest(weights).model_copy(
        update={
            "batch": BlobRef(digest=digest_of(data), size_bytes=len(data)), "learned": learned, "outcome": outcome,
            "gate": GateFigures(held_out_before=4.0, held_out_after=3.5),
        }
    )  # fmt: skip
    return versions.registry.publish(manifest, [weights, data], lambda _: None).version


@pytest.fixture
def versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return VersionPublisher(DirectoryStore(tmp_path / "store", fsync=False), ADAPTER)


def test_a_dry_run_names_examples_and_the_versions_trained_on_them(versions, capsys):
    learn(versions, example(1))
    trained = [learn(versions, example(2, subjects=["ann"]), example(3)), learn(versions, example(4))]
    assert show_plan("acme/*", selector_of("acme/*", [], ["ann"], []), as_json=True) == 0
    (plan,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [item["document_id"] for item in plan["examples"]] == ["d2"]
    assert plan["versions"] == trained
    assert plan["replayed"] == 2
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d2"], [], []), as_json=False) == 0
    shown = capsys.readouterr().out
    assert "d2" in shown
    assert "secret" not in shown


def test_a_dry_run_counts_who_began_with_what_the_adapter_taught(versions, capsys):
    learn(versions, example(1))
    record_dependant(versions.store, ADAPTER, "acme/uli")
    record_dependant(versions.store, ADAPTER, "acme/uma")
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d1"], [], []), as_json=True) == 0
    (plan,) = json.loads(capsys.readouterr().out)["adapters"]
    assert plan["dependants"] == ["acme/uli", "acme/uma"]
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d1"], [], []), as_json=False) == 0
    assert ", 2 adapters that may depend on it to rebuild" in capsys.readouterr().out


def test_a_dry_run_of_what_is_nowhere_says_so(versions, capsys):
    learn(versions, example(1))
    assert show_plan(ADAPTER, selector_of(ADAPTER, ["d9"], [], []), as_json=False) == 4
    assert show_plan("other/*", selector_of("other/*", ["d1"], [], []), as_json=False) == 4


@pytest.mark.parametrize("given", [("", ["d1"]), ("acme/**", ["d1"]), ("Acme", ["d1"]), (ADAPTER, []), (ADAPTER, [""])])
def test_unusable_requests_are_refused(given):
    with pytest.raises(SettingsError):
        selector_of(given[0], given[1], [], [])


@pytest.mark.parametrize(
    ("kind", "selector", "words"),
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
def test_a_selection_is_described_in_words(kind, selector, words):
    request = RetentionRequested(
        request_id="r", kind=kind, adapter=ADAPTER, requested_by="me",
        selector=None if selector is None else Selector(**selector),
    )  # fmt: skip
    assert describe_selection(RequestRecord(request=request, received_ms=0, until_ms=0)) == words


def test_explain_tells_where_each_example_came_from_and_what_became_of_it(versions, capsys):
    first = learn(versions, example(1, retention_class="P1D"), example(2))
    learn(versions, example(3), outcome="refused")
    entry = QuarantineEntry(
        request_id="r", job_id="j", kind="erase", selector={"document_ids": ["d2"]}, until_ms=10**12
    )
    update_quarantine(versions.store, ADAPTER, lambda quarantine: quarantine.with_entry(entry))
    assert explain(ADAPTER, document=None, limit=10, as_json=True) == 0
    examples = {item["document_id"]: item for item in json.loads(capsys.readouterr().out)}
    assert {name: item["state"] for name, item in examples.items()} == {
        "d1": "live", "d2": "quarantined", "d3": "not learned",
    }  # fmt: skip
    one = examples["d1"]
    assert (one["topic"], one["partition"], one["offset"]) == ("documents", 1, 1)
    assert (one["version"], one["seq"], one["outcome"]) == (first, 1, "promoted")
    assert (one["gate_before_nats"], one["gate_after_nats"]) == (4.0, 3.5)
    assert (one["published_at"], one["expires_at"]) == ("1970-01-02T00:00:00+00:00", "1970-01-03T00:00:00+00:00")
    assert examples["d2"]["expires_at"] is None
    assert explain(ADAPTER, document=None, limit=1, as_json=False) == 0
    assert "secret" not in capsys.readouterr().out


def test_case_01_explain_shows_a_life_that_ends_after_the_calendar(versions, capsys, monkeypatch):
    """One document with retention_class P9999Y: a traceback, and nothing shown of any document of the adapter."""
    learn(versions, example(1), example(2))
    ends = iter((253_402_300_800_000, None) * 2)
    monkeypatch.setattr(sys.modules[explain.__module__], "expires_ms", lambda *_: next(ends))
    assert explain(ADAPTER, document=None, limit=10, as_json=True) == 0
    assert {item["expires_at"] for item in json.loads(capsys.readouterr().out)} == {"after 9999", None}
    assert explain(ADAPTER, document=None, limit=10, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "after 9999" in shown
    assert "for ever" in shown


def test_explain_shows_only_the_origin_of_an_erased_example(versions, capsys):
    version = learn(versions, example(1))
    learn(versions, example(2))
    versions.store.delete(f"blobs/sha256/{versions.registry.manifest(ADAPTER, version).batch.digest[7:]}")
    assert explain(ADAPTER, document=None, limit=10, as_json=True) == 0
    examples = json.loads(capsys.readouterr().out)
    assert [(item["document_id"], item["state"], item["offset"]) for item in examples] == [
        ("d2", "live", 2), (None, "erased", 1),
    ]  # fmt: skip
    with pytest.raises(NotFoundError):
        explain(ADAPTER, document="d1", limit=10, as_json=True)


def test_case_13_explain_finds_a_document_by_another_normalisation_of_its_id(versions, capsys):
    """Ids were compared as bytes: the NFD form of an NFC id was another document."""
    learn(versions, example(1).model_copy(update={"document_id": "Ren\u00e9-file"}), example(2))
    assert explain(ADAPTER, document="Rene\u0301-file", limit=10, as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_explain_of_an_unknown_adapter_is_not_found(versions):
    with pytest.raises(NotFoundError):
        explain("nobody", document=None, limit=10, as_json=True)


# ---- what is printed can be copied, at any width

LONG = "a-tenant-with-a-long-name/a-team-of-it/production-assistant-x"
PERSON = "person-" + "0123456789abcdef" * 4
REQUEST = "forget-0123456789abcdef"


def unwrapped(shown: str) -> str:
    """The output without line ends and blanks: a terminal, unlike an ellipsis, loses nothing by wrapping."""
    return "".join(shown.split())


@pytest.fixture(params=["80", "40", "pipe"])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40" if request.param == "pipe" else request.param)
    if request.param != "pipe":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    return request.param


@pytest.fixture
def long_name(versions):
    made = VersionPublisher(versions.store, LONG)
    return made, learn(made, example(1, subjects=[PERSON]))


def plain_text(capsys) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_a_dry_run_cuts_nothing_short(long_name, width, capsys):
    _, version = long_name
    assert show_plan("*", selector_of("*", [], [PERSON], []), as_json=False) == 0
    shown = plain_text(capsys)
    assert LONG in unwrapped(shown)
    assert (version if width == "pipe" else version.removeprefix("sha256:")[:12]) in shown
    assert "…" not in shown


def test_explain_cuts_nothing_short(long_name, width, capsys):
    _, version = long_name
    assert explain(LONG, document=None, limit=10, as_json=False) == 0
    shown = plain_text(capsys)
    assert LONG in unwrapped(shown)
    assert (version if width == "pipe" else version.removeprefix("sha256:")[:12]) in shown
    assert "…" not in shown


class StoredStatuses:
    """Statuses without a broker."""

    def __init__(self, _: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def latest(self):
        events = [
            RetentionProgressed(
                request_id=request_id, adapter=LONG, kind=kind, state=state, examples=3, version="sha256:" + "ab" * 32,
                detail=f"waits for replicas that may serve a version trained on it: {PERSON}",
                at=datetime(2026, 1, 1, tzinfo=UTC),
            )
            for request_id, kind, state in ((REQUEST, "erase", "published"), (f"hold-{'f' * 64}", "hold", "executed"))
        ]  # fmt: skip
        return {event.request_id: event for event in events}


def test_a_list_of_requests_cuts_nothing_short(versions, width, capsys, monkeypatch):
    monkeypatch.setattr(status, "StatusReader", StoredStatuses)
    assert show_requests("", limit=10, as_json=False) == 0
    shown = plain_text(capsys)
    for whole in (REQUEST, f"hold-{'f' * 64}", "published", "executed"):
        assert whole in unwrapped(shown)
    assert "…" not in shown
    if width == "pipe":
        (hold,) = [text for text in shown.splitlines() if text.startswith("hold-")]
        assert LONG in hold
        assert PERSON in hold


def test_one_request_is_shown_whole(versions, width, capsys, monkeypatch):
    monkeypatch.setattr(status, "StatusReader", StoredStatuses)
    assert show_requests(REQUEST, limit=10, as_json=False) == 0
    shown = unwrapped(plain_text(capsys))
    for whole in (REQUEST, LONG, PERSON, "sha256:" + "ab" * 32 if width == "pipe" else "ab" * 6):
        assert whole in shown


def test_requests_as_json_have_their_selector(versions, capsys, monkeypatch):
    monkeypatch.setattr(status, "StatusReader", StoredStatuses)
    request = RetentionRequested(
        request_id=REQUEST, kind="erase", adapter=LONG, requested_by="me", selector=Selector(subjects=[PERSON])
    )
    record = RequestRecord(request=request, received_ms=0, until_ms=0)
    RequestStore(versions.store).save(record, None, None)
    assert show_requests(REQUEST, limit=10, as_json=True) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert (facts["version"], facts["selector"]) == ("sha256:" + "ab" * 32, {"subjects": [PERSON]})
    with pytest.raises(NotFoundError):
        show_requests("forget-of-nobody", limit=10, as_json=True)


@pytest.mark.parametrize(
    ("state", "examples", "kind", "words"),
    [
        ("closed", 1, "erase", "1 example forgotten"),
        ("closed", 0, "erase", "kept out"),
        ("failed", 0, "erase", ""),
        ("held", 1, "erase", "perennial forget release"),
        ("published", 1, "erase", "replica"),
        (None, 0, "erase", "perennial doctor"),
        ("unapproved", 0, "erase", "perennial forget approve r --as NAME"),
        ("executed", 1, "hold", ""),
        (None, 0, "hold", "not in force after 9 s"),
    ],
)
def test_the_last_line_says_what_to_do(state, examples, kind, words):
    request = RetentionRequested(request_id="r", kind=kind, adapter=ADAPTER, requested_by="me")
    last = state and RetentionProgressed(
        request_id="r", adapter=ADAPTER, kind=kind, state=state, examples=examples, at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    carried_out = state in {"closed", "executed"}
    shown = _conclusion(request, last, 9, carried_out=carried_out)
    assert words in shown
    assert bool(shown) == bool(words)
    assert ("forget status r" in shown) == (bool(words) and not carried_out and state != "unapproved")


# ---- exit codes, unsuppress, what is printed at the end


def status_of(state: str, examples: int, kind: str = "erase", **fields: object) -> RetentionProgressed:
    return RetentionProgressed(
        request_id="r", adapter=ADAPTER, kind=kind, state=state, examples=examples, at=datetime(2026, 1, 1, tzinfo=UTC),
        **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (status_of("closed", 1), 0),
        (status_of("closed", 0), 5),
        (status_of("closed", 1, exceptions=True, missing=["web-1"]), 6),
        (status_of("failed", 0), 1),
        (status_of("published", 1), 1),
        (status_of("unapproved", 0), 7),
        (status_of("executed", 0, "hold"), 0),
        (None, 1),
    ],
)
def test_case_13_a_request_that_matched_nothing_has_its_own_exit_code(last, code):
    """A misspelt id read as a fulfilled erasure, for the exit code was 0."""
    request = RetentionRequested(
        request_id="r", kind=last.kind if last else "erase", adapter=ADAPTER, requested_by="me"
    )
    assert exit_code_of(request, last, 9) == code
    assert exit_code_of(request, None, 0) == 0
    shown = _conclusion(request, last, 9, carried_out=code in {0, 5, 6})
    assert ("nothing matched" in shown) == (code == 5)
    assert ("web-1" in shown) == (code == 6)


def test_case_13_what_people_type_is_compared_after_normalisation():
    selector = selector_of(ADAPTER, ["Rene\u0301-file"], ["Zoe\u0308"], ["cafe\u0301"])
    assert selector.document_ids == ["Ren\u00e9-file"]
    assert (selector.subjects, selector.sources) == (["Zo\u00eb"], ["caf\u00e9"])


@pytest.mark.parametrize("wait", ["-1", "nan"])
@pytest.mark.parametrize("command", [["forget"], ["forget", "hold"], ["forget", "release"]])
def test_a_negative_time_to_wait_is_refused(command, wait):
    result = CliRunner().invoke(app, [*command, "--adapter", ADAPTER, "--document", "d", "--wait-s", wait])
    assert result.exit_code == 2


def erased(versions, *texts: str) -> None:
    key = ensure_text_key(versions.store, ADAPTER)
    hashes = [keyed_text_hash(key, text) for text in texts]
    update_quarantine(versions.store, ADAPTER, lambda quarantine: quarantine.suppressing(hashes))


# ---- a second approver


@pytest.fixture
def unapproved(versions):
    """Return a request of ann's over a pattern that waits in the store."""
    request = RetentionRequested(
        request_id=REQUEST, kind="erase", adapter="acme/*", requested_by="ann", selector=Selector(subjects=[PERSON])
    )
    record = RequestRecord(
        request=request, received_ms=0, until_ms=0, state="unapproved", approval=Approval(until_ms=86_400_000)
    )
    return RequestStore(versions.store).save(record, None, None)


@pytest.mark.parametrize(("name", "words"), [("Ann", "who asked for a request cannot approve it"), ("bob", "")])
def test_an_approval_repeats_the_request_under_another_name(unapproved, name, words, monkeypatch, capsys):
    record, _ = unapproved
    sent = []
    monkeypatch.setattr(approval, "publish_and_follow", lambda _, event, **__: sent.append(event) or 0)
    if words:
        with pytest.raises(approval.ApprovalError, match=words):
            approve_request(REQUEST, approved_by=name, wait_s=0, as_json=False)
        assert sent == []
        return
    assert approve_request(REQUEST, approved_by=name, wait_s=0, as_json=False) == 0
    assert sent == [record.request.model_copy(update={"approved_by": "bob"})]
    shown = capsys.readouterr().err
    assert all(word in shown for word in (REQUEST, "acme/*", PERSON, "ann"))


def test_an_approval_goes_to_the_topic_of_the_tenant_that_the_request_came_from(versions, monkeypatch):
    monkeypatch.setenv("PERENNIAL_TENANTS", "acme")
    request = RetentionRequested(request_id="acme:r1", kind="revoke", adapter="acme/*", requested_by="ann")
    waits = RequestRecord(
        request=request, received_ms=0, until_ms=0, state="unapproved", approval=Approval(until_ms=86_400_000)
    )
    RequestStore(versions.store).save(waits, None, None)
    sent = []
    monkeypatch.setattr(
        approval, "publish_and_follow", lambda given, event, **__: sent.append((given.tenants.tenant, event)) or 0
    )
    assert approve_request("acme:r1", approved_by="bob", wait_s=0, as_json=False) == 0
    assert sent == [("acme", request.model_copy(update={"request_id": "r1", "approved_by": "bob"}))]


def test_only_a_request_that_waits_can_be_approved(versions, unapproved):
    record, etag = unapproved
    with pytest.raises(NotFoundError, match="no such request"):
        approve_request("other", approved_by="bob", wait_s=0, as_json=False)
    ended = record.model_copy(update={"state": "failed", "ended_ms": 1})
    RequestStore(versions.store).save(ended, record, etag)
    with pytest.raises(approval.ApprovalError, match="does not wait for a second approver"):
        approve_request(REQUEST, approved_by="bob", wait_s=0, as_json=False)


def test_a_text_is_taken_off_the_list_and_it_is_recorded(versions, tmp_path, capsys):
    erased(versions, "Ren\u00e9 lives here", "another")
    file = tmp_path / "text.txt"
    file.write_bytes("Rene\u0301 lives here\r\n".encode())
    assert unsuppress_texts(ADAPTER, [file], [], requested_by="ann", reason="consent", as_json=False) == 0
    assert "1 text may be learned again" in capsys.readouterr().out
    (key,) = versions.store.list(f"audit/{ADAPTER}/")
    record = json.loads(versions.store.get(key).data)
    assert (record["action"], record["requested_by"], record["reason"]) == ("unsuppress", "ann", "consent")
    assert len(load_quarantine(versions.store, ADAPTER).keyed) == 1
    assert unsuppress_texts(ADAPTER, [file], [], requested_by="", reason="", as_json=False) == 4
    assert "nothing matched" in capsys.readouterr().err
    (left,) = load_quarantine(versions.store, ADAPTER).keyed
    assert unsuppress_texts(ADAPTER, [], [left], requested_by="", reason="", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["hashes"] == [left]


@pytest.mark.parametrize(
    ("adapter", "files", "hashes"),
    [(ADAPTER, [], []), (ADAPTER, ["nowhere.txt"], []), (ADAPTER, [], ["xyz"]), ("Acme", [], ["0" * 32])],
)
def test_an_unusable_unsuppression_is_refused(versions, adapter, files, hashes):
    with pytest.raises(SettingsError):
        unsuppress_texts(adapter, [Path(name) for name in files], hashes, requested_by="", reason="", as_json=False)


def test_the_outcome_names_adapters_examples_and_replicas(versions, capsys):
    request = RetentionRequested(
        request_id=REQUEST, kind="erase", adapter="acme/*", requested_by="me", selector=Selector(subjects=[PERSON])
    )
    names = [f"acme/a{number:02d}" for number in range(30)]
    progress = AdapterProgress(phase="done", examples=2, acknowledged=["web-1"], missing=["pod-7"])
    store = RequestStore(versions.store)
    pages: dict[str, ProgressPage] = {}
    for name in names:
        page = pages.get(page_of(name), ProgressPage())
        pages[page_of(name)] = page.model_copy(update={"adapters": page.adapters | {name: progress}})
    for name, page in pages.items():
        store.save_page(hash_of(REQUEST), name, page, None)
    sums = {name: page.summary() for name, page in pages.items()}
    record = RequestRecord(request=request, received_ms=0, until_ms=0, pages=sums)
    store.save(record, None, None)
    print_outcome(Settings.of(), status_of("closed", 60).model_copy(update={"request_id": REQUEST}))
    shown = capsys.readouterr().out
    assert shown.count("web-1") == 20
    assert "and 10 adapters more" in shown
    assert "pod-7" in shown


def test_the_outcome_names_who_began_with_its_start(versions, capsys):
    users = {f"acme/u{number:02d}": AdapterProgress(phase="sent") for number in range(30)}
    users["acme/u00"] = AdapterProgress(phase="published", missing=["pod-7"])
    request = RetentionRequested(
        request_id=REQUEST, kind="erase", adapter="acme/fay", requested_by="me", selector=Selector(subjects=[PERSON])
    )
    progress = AdapterProgress(phase="sent", examples=2, dependants=users)
    record = RequestRecord(request=request, received_ms=0, until_ms=0, adapters={"acme/fay": progress})
    print_adapters(versions.store, record)
    shown = unwrapped(capsys.readouterr().out)
    assert "acme/u00(dependant)published" in shown
    assert "pod-7" in shown
    assert shown.count("(dependant)") == 19
    assert "and11adaptersmore" in shown


def test_jobs_about_learned_starts_are_not_listed_as_requests(monkeypatch):
    shown = status_of("closed", 1)
    hidden = shown.model_copy(update={"request_id": f"{DEPENDANT_PREFIX}0", "state": "published"})
    records = [
        encode(event, event_id=event.request_id, source="test", occurred_at=event.at) for event in (hidden, shown)
    ]

    class Consumer:
        def partitions_for_topic(self, topic: str) -> set[int]:
            return {0}

        def assign(self, partitions: object) -> None:
            self.left = list(records)

        def seek_to_beginning(self, *partitions: object) -> None:
            pass

        def end_offsets(self, partitions: list[object]) -> dict[object, int]:
            return dict.fromkeys(partitions, len(records))

        def position(self, partition: object) -> int:
            return len(records) - len(self.left)

        def poll(self, timeout_ms: int) -> dict[int, list[object]]:
            return {0: [self.left.pop(0)]}

    monkeypatch.setattr(status, "connect", lambda *_, **__: Consumer())
    assert list(StatusReader(Settings.of(kafka="localhost:9")).latest()) == [shown.request_id]


def test_the_outcome_is_shown_without_a_store(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    last = status_of("closed", 3, acknowledged=["web-1"], missing=["pod-7"])
    print_outcome(Settings.of(store="", env_file=None), last)
    assert "pod-7" in capsys.readouterr().out


def test_case_07_a_text_file_with_a_byte_order_mark_is_the_text_without_it(tmp_path):
    """`perennial forget unsuppress --text-file`: a file of Notepad matched nothing."""
    from perennial.streams.cli.forget.unsuppression import _text_of

    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfsecret text")
    assert _text_of(tmp_path / "text") == "secret text"
