"""Topics of tenants: which adapters a record on them may address, under which ids requests are known, and who may write."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace

import orjson
import pytest
from pydantic import ValidationError

from perennial.storage.signing.signatures import SignatureError
from perennial.streams.client import publisher as publisher_module
from perennial.streams.client.publisher import Publisher, PublishError
from perennial.streams.deadletters.model import read_dead_letter
from perennial.streams.deadletters.redrive_plan import redriven_record
from perennial.streams.events.dead_letter import encode_dead_letter
from perennial.streams.events.fields import MAX_ID_CHARS
from perennial.streams.events.models import RetentionProgressed, RetentionRequested, Selector
from perennial.streams.events.tenants import request_in_tenant, tenant_of_id, with_tenants
from perennial.streams.events.wire_error import WireError
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition
from perennial.streams.kafka.access.acl_table import ROLES, acls_of, principals_of, roles_of
from perennial.streams.kafka.event_signatures import ReceivedRequest, check_request, signed_request
from perennial.streams.kafka.installation import load_installation, record_found, role_topics
from perennial.streams.kafka.topics import TOPICS, ClusterIds, topics_of
from perennial.streams.observe.metrics import Metrics
from perennial.streams.recovery.offset_plan import LogRange, plan_offsets
from perennial.streams.retain.request_store import load_requests
from perennial.streams.retain.service import RetainService
from perennial.streams.retain.store_facts import StoreFacts
from perennial.streams.settings import Settings, SettingsError
from tests.keys import Keys
from tests.memory_store import MemoryStore

TENANTS = ("acme", "globex")
SETTINGS = Settings.of(tenants="acme, globex", kafka="k:1", topic_prefix="t-", clock_settle_s=0.001, env_file=None)
AT = datetime(2026, 1, 1, tzinfo=UTC)


def request(request_id: str = "r", adapter: str = "acme/support", **fields: object) -> RetentionRequested:
    selector = Selector(document_ids=["d1"])
    return RetentionRequested(
        request_id=request_id, kind="erase", adapter=adapter, selector=selector, requested_by="ann", **fields
    )


# ---- settings and names


@pytest.mark.parametrize(
    ("text", "names"), [("", ()), ("acme", ("acme",)), (" acme , globex.eu,", ("acme", "globex.eu"))]
)
def test_the_setting_names_the_tenants(text, names):
    assert Settings.of(tenants=text, env_file=None).tenants.names == names


@pytest.mark.parametrize(
    "text", ["Acme", "acme/eu", "acme*", "acme,acme", "a.b,a_b", "a-b,a_b", "perennial", "a" * 101, "acme:eu"]
)
def test_a_name_that_could_be_mistaken_is_refused(text):
    """`perennial` would make ids that retain's own requests have."""
    with pytest.raises(ValidationError):
        Settings.of(tenants=text, env_file=None)


def test_each_tenant_has_topics_with_the_configs_of_those_without_a_tenant():
    specs = topics_of(SETTINGS)
    own = {f"{name}.{tenant}" for name in ("documents", "interactions", "retention") for tenant in TENANTS}
    assert set(specs) == set(TOPICS) | own
    assert specs["retention.acme"].configs == TOPICS["retention"].configs
    assert specs["documents.acme"].event_types == TOPICS["documents"].event_types
    assert all(name == spec.name for name, spec in specs.items())
    assert topics_of(Settings.of(env_file=None)) == TOPICS
    assert set(role_topics(SETTINGS, "intake")) - set(TOPICS) == {name for name in own if "retention" not in name}
    assert set(role_topics(SETTINGS, "streams")) - set(TOPICS) == {name for name in own if "retention" in name}
    assert role_topics(SETTINGS, "learner") == role_topics(Settings.of(env_file=None), "learner")


def test_the_record_of_the_installation_keeps_every_id_of_a_tenants_topic():
    store, names = MemoryStore(), ["documents.acme", "retention.acme"]

    def found(version: int) -> ClusterIds:
        full = [SETTINGS.kafka.topic(name) for name in names]
        return ClusterIds("c", {name: f"id{version}-{name}" for name in full}, dict.fromkeys(full, 4))

    record_found(SETTINGS, store, found(1), names)
    record_found(SETTINGS, store, found(2), names)
    assert load_installation(store).known_topic_ids("documents.acme") == ("id1-t-documents.acme",)
    record_found(SETTINGS, store, found(2), names, by_reader=True)
    assert load_installation(store).known_topic_ids("documents.acme") == (
        "id1-t-documents.acme",
        "id2-t-documents.acme",
    )


def test_a_publisher_of_a_tenant_that_nobody_reads_is_refused():
    """A broker that creates topics by itself would acknowledge its records into a topic that nobody reads."""
    with pytest.raises(SettingsError, match="acme, globex"):
        Settings.of(tenants="acme, globex", tenant="amce", env_file=None)
    assert Settings.of(tenant="acme", env_file=None).tenants.tenant == "acme"


# ---- intake


@pytest.mark.parametrize(
    ("tenant", "adapter", "accepted"),
    [
        ("acme", "acme/support", True), ("acme", "acme/support/de", True), ("acme", "globex/support", False),
        ("acme", "acme", False), ("acme", "acmes/support", False), ("acme", "support", False),
        (None, "acme/support", True), (None, "globex/support", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("topic", ["documents", "interactions"])
def test_intake_refuses_a_record_that_addresses_another_tenants_adapter(topic, tenant, adapter, accepted):
    full = f"t-{topic}.{tenant}" if tenant else f"t-{topic}"
    acceptor = Acceptor(OriginPartition("c", full, "id", 0, topic, tenant), 100, learn_turns=False)
    fields = {"document_id": "d", "text": "hello"}
    if topic == "interactions":
        fields = {"interaction_id": "i", "prompt": "2+2?", "response": "5", "correction": "4"}
    decision = acceptor.accept(orjson.dumps({"adapter": adapter, **fields}), None, 0, 1000)
    if accepted:
        assert type(decision) is Accepted
        assert orjson.loads(decision.value)["origin"]["topic"] == full
    else:
        assert decision.reason == "other-tenant"
        assert "adapters below acme/" in decision.detail
        assert len(acceptor) == 0


def test_a_dead_letter_of_a_tenants_topic_goes_back_to_it():
    value, headers = encode_dead_letter(
        b'{"adapter":"globex/a"}', [], reason="other-tenant", stage="intake", detail="", topic="t-documents.acme",
        partition=1, offset=7, at=AT,
    )  # fmt: skip
    letter = read_dead_letter(0, 0, b"k", value, headers, "t-")
    assert letter.source_topic == "documents.acme"
    assert redriven_record(letter).topic == "documents.acme"


@pytest.mark.parametrize("prefix", ["", "t-", "documents.", "retention."])
@pytest.mark.parametrize("topic", ["documents", "interactions.acme", "retention"])
@pytest.mark.parametrize("full", [True, False])
def test_a_prefix_that_looks_like_a_tenants_topic_is_taken_off(prefix, topic, full):
    """Some roles name the topic of a dead letter with the prefix, some without it."""
    named = f"{prefix}{topic}" if full else topic
    value, headers = encode_dead_letter(
        b"{}", [], reason="bad-field", stage="intake", detail="", topic=named, partition=1, offset=7, at=AT,
    )  # fmt: skip
    assert read_dead_letter(0, 0, b"k", value, headers, prefix).source_topic == topic


# ---- retain


@pytest.mark.parametrize(
    ("tenant", "given", "known"),
    [
        (None, request("r1"), "r1"), (None, request("other:r1"), "other:r1"), (None, request("r1", "*"), "r1"),
        ("acme", request("r1"), "acme:r1"), ("acme", request("globex:r1"), "acme:globex:r1"),
        ("acme", request("perennial:expire:1"), "acme:perennial:expire:1"), ("acme", request("r", "acme/*"), "acme:r"),
        (None, request("acme:r1"), "bad-field"), ("acme", request("r1", "globex/a"), "other-tenant"),
        ("acme", request("r1", "*"), "other-tenant"), ("acme", request("r1", "globex/*"), "other-tenant"),
        ("acme", request("r1", "acme"), "other-tenant"), ("acme", request("r" * MAX_ID_CHARS), "bad-field"),
    ],
)  # fmt: skip
def test_a_request_is_known_by_an_id_that_no_other_tenant_can_take(tenant, given, known):
    try:
        found = request_in_tenant(given, tenant, TENANTS)
    except WireError as error:
        assert error.reason == known  # noqa: PT017 - one table for both outcomes
        return
    assert found.request_id == known
    assert tenant_of_id(known, TENANTS) == tenant


def served(store: MemoryStore, settings: Settings) -> tuple[RetainService, list[object]]:
    sent: list[object] = []

    async def send(event: object, _: str) -> None:
        sent.append(event)

    acks = SimpleNamespace(replicas=lambda *_: [])
    return RetainService(settings, Metrics("retain"), StoreFacts(settings, store, acks), send), sent


def test_the_same_id_from_two_tenants_is_two_requests():
    store = MemoryStore()
    retain, sent = served(store, SETTINGS)
    for tenant in (*TENANTS, "acme"):
        asyncio.run(retain.receive(request("r1", f"{tenant}/support"), 1000, tenant))
    assert {name: record.request.adapter for name, record in load_requests(store).items()} == {
        "acme:r1": "acme/support", "globex:r1": "globex/support",
    }  # fmt: skip
    assert {event.request_id for event in sent if isinstance(event, RetentionProgressed)} == {"acme:r1", "globex:r1"}


def test_a_tenant_approves_its_own_request_with_signatures_over_the_id_that_it_gave(tmp_path):
    ann, bob = Keys(tmp_path / "ann"), Keys(tmp_path / "bob")
    ann.public.write_text(ann.public.read_text("utf-8") + bob.public.read_text("utf-8"), "utf-8")
    store = MemoryStore()
    retain, _ = served(store, SETTINGS.replace(trusted_request_keys=str(ann.public)))
    made = request("r1", "acme/*", requested_at=datetime.fromtimestamp(1, UTC))
    approval = signed_request(made.model_copy(update={"approved_by": "bob"}), bob.owner, "t-retention.acme")
    asyncio.run(retain.receive(signed_request(made, ann.owner, "t-retention.acme"), 1000, "acme"))
    with pytest.raises(WireError, match="adapters below globex/"):
        asyncio.run(retain.receive(approval, 1000, "globex"))
    assert load_requests(store)["acme:r1"].state == "unapproved"
    asyncio.run(retain.receive(approval, 1000, "acme"))
    assert load_requests(store)["acme:r1"].approval.approved_by == "bob"


def test_a_tenant_ends_its_own_holds_and_not_an_operators():
    store = MemoryStore()
    retain, _ = served(store, SETTINGS)

    def ask(request_id: str, kind: str, tenant: str | None) -> None:
        asked = request(request_id).model_copy(update={"kind": kind})
        asyncio.run(retain.receive(asked, 1000, tenant))

    ask("legal", "hold", None)
    ask("own", "hold", "acme")
    ask("x", "release", "acme")
    assert load_requests(store)["acme:x"].ends == ["acme:own"]
    ask("all", "release", None)
    assert "legal" in load_requests(store)["all"].ends


@pytest.mark.parametrize("signed_for", ["t-retention", "retention", "t-retention.acme", "retention.acme"])
@pytest.mark.parametrize("tenant", [None, "acme"])
def test_a_signed_request_counts_on_the_topic_that_it_was_signed_for(tmp_path, signed_for, tenant):
    """Else whoever writes to another tenant's topic, or another installation's, could send a copy of both records."""
    ann = Keys(tmp_path / "ann")
    store = MemoryStore()
    retain, _ = served(store, SETTINGS.replace(trusted_request_keys=str(ann.public)))
    made = signed_request(request("r1", "acme/*", requested_at=datetime.fromtimestamp(1, UTC)), ann.owner, signed_for)
    if signed_for == ("t-retention.acme" if tenant else "t-retention"):
        asyncio.run(retain.receive(made, 1000, tenant))
        assert [record.state for record in load_requests(store).values()] == ["unapproved"]
        return
    with pytest.raises(WireError) as caught:
        asyncio.run(retain.receive(made, 1000, tenant))
    assert (caught.value.reason, load_requests(store)) == ("bad-signature", {})


@pytest.mark.parametrize("tenant", ["", "acme"])
def test_a_publisher_signs_for_the_topic_that_it_sends_to(tmp_path, monkeypatch, tenant):
    ann = Keys(tmp_path / "ann")
    monkeypatch.setattr(Publisher, "_connect", lambda _: None)
    settings = SETTINGS.replace(tenant=tenant, request_key_file=str(ann.private))
    sent = Publisher(settings=settings)._signed(request("r1", "acme/*"))
    received = ReceivedRequest.of(sent, f"t-retention.{tenant}" if tenant else "t-retention")
    assert check_request(received, ann.readers) == ann.key_id
    assert sent.model_dump() == {key: value for key, value in received.model_dump().items() if key != "full_topic"}
    with pytest.raises(SignatureError):
        check_request(ReceivedRequest.of(sent, "t-retention.globex"), ann.readers)


# ---- publishers


@pytest.fixture
def wire(monkeypatch):
    """Return what a publisher sends, by topic; no broker."""
    sent: list[str] = []

    class Producer:
        def send(self, topic: str, **_: object):
            sent.append(topic)
            return SimpleNamespace(add_callback=lambda _: None, add_errback=lambda _: None, is_done=True)

    monkeypatch.setattr(Publisher, "_connect", lambda _: Producer())
    monkeypatch.setattr(publisher_module, "close_producer", lambda *_: None)
    return sent


def test_a_publisher_writes_to_its_tenants_topics(wire):
    publisher = Publisher(settings=SETTINGS.replace(tenant="acme"))
    publisher.document(adapter="acme/support", document_id="d", text="hello")
    publisher.retention(request_id="r", kind="revoke", adapter="acme/support", requested_by="ann")
    with pytest.raises(PublishError, match="none of the tenant acme"):
        publisher.document(adapter="globex/support", document_id="d", text="hello")
    Publisher(settings=SETTINGS).document(adapter="globex/support", document_id="d", text="hello")
    assert wire == ["t-documents.acme", "t-retention.acme", "t-documents"]


@pytest.mark.parametrize("approved_by", [None, "bob"])
def test_an_approval_of_an_unsigned_request_keeps_its_fields(wire, tmp_path, approved_by):
    keys, sent = Keys(tmp_path / "bob"), []
    publisher = Publisher(settings=SETTINGS.replace(request_key_file=str(keys.private)))
    publisher._signed = lambda event, signed=publisher._signed: sent.append(signed(event)) or sent[-1]
    fields = {"approved_by": approved_by} if approved_by else {}
    publisher.retention(request_id="r", kind="revoke", adapter="acme/*", requested_by="ann", **fields)
    assert sent[0].signature
    assert (sent[0].requested_at is None) is (approved_by is not None)


# ---- who may do what


def test_tenants_have_publishers_requesters_and_subscribers_of_their_own():
    roles = roles_of(TENANTS)
    names = topics_of(SETTINGS)
    writers = {name: {role for role, access in roles.items() if access.may("topic", name, "Write")} for name in names}
    readers = {name: {role for role, access in roles.items() if access.may("topic", name, "Read")} for name in names}
    for tenant in TENANTS:
        for topic in ("documents", "interactions"):
            assert writers[f"{topic}.{tenant}"] == {f"publisher.{tenant}", "operator"}
            assert readers[f"{topic}.{tenant}"] == {"intake", "operator"}
        assert writers[f"retention.{tenant}"] == {f"requester.{tenant}", "operator"}
        assert readers[f"retention.{tenant}"] == {"streams", "operator"}
        assert roles[f"subscriber.{tenant}"].topics == ROLES["subscriber"].topics
    assert writers["documents"] == writers["interactions"] == writers["retention"] == {"operator"}
    for role in ("scorer", "streams", "learner"):  # they compare origins with the logs that they name
        assert roles[role].may("topic", "documents.acme", "Describe")
    assert roles_of([]) is ROLES
    acls = acls_of(SETTINGS, principals_of("p-", [("publisher.acme", "CN=acme")], roles))
    written = {acl.name for acl in acls if (acl.principal, acl.operation) == ("User:CN=acme", "Write")}
    assert written == {"t-documents.acme", "t-interactions.acme"}


# ---- recovery


def test_a_restore_reads_the_logs_of_tenants_again():
    logs = {
        "scored-examples": [LogRange(0, 5, 9, 3)], "examples": [LogRange(0, 5, 9, 3)],
        "documents": [LogRange(0, 0, 9, 4)], "documents.acme": [LogRange(0, 0, 9, 2)],
        "interactions.acme": [LogRange(0, 3, 9, 2)], "retention.acme": [LogRange(0, 0, 9, 2)],
    }  # fmt: skip
    plan = plan_offsets(logs, None)
    assert plan.commits["intake"] == {
        "documents": {0: 4}, "interactions": {}, "documents.acme": {0: 2}, "interactions.acme": {0: 3},
    }  # fmt: skip
    assert plan.lost == {"interactions.acme": 1}


def test_names_keep_their_order():
    assert with_tenants(["retention", "drift"], TENANTS) == ("retention", "retention.acme", "retention.globex", "drift")
