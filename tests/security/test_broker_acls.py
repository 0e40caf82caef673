"""Every role as a principal of its own at a real broker: the loop runs, and whatever the table does not allow is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
from confluent_kafka import Producer
from typer.testing import CliRunner

from perennial.storage.access.minio_accounts import Account, apply_policies
from perennial.storage.access.store_table import ROLES as STORE_ROLES
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.cli import doctor
from perennial.streams.cli.access.acls_command import run_acls
from perennial.streams.cli.app import app
from perennial.streams.cli.flow import FlowReader
from perennial.streams.cli.forget.request_status import StatusReader
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.client.publisher import Publisher, PublishError
from perennial.streams.client.subscriber import Subscriber
from perennial.streams.devstack import discovery
from perennial.streams.devstack.supervisor import ROLES as PROCESSES
from perennial.streams.devstack.supervisor import Supervisor
from perennial.streams.events.adapter_events import ReplicaLeft
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.fields import Event
from perennial.streams.events.models import DocumentObserved, InteractionObserved, RetentionRequested, Selector
from perennial.streams.intake.librdkafka import client_log
from perennial.streams.kafka.access.acl_admin import AclError, compare, create_missing
from perennial.streams.kafka.access.acl_table import (
    GROUPS,
    ROLES,
    Acl,
    Operation,
    RoleAccess,
    acls_of,
    principals_of,
    roles_of,
)
from perennial.streams.kafka.group_offsets import group_offsets
from perennial.streams.kafka.installation import provision_recorded
from perennial.streams.kafka.security.options import librdkafka_options
from perennial.streams.kafka.topics import TOPICS, admin_client, provision, topics_of
from perennial.streams.replicas.acks import AckReader
from perennial.streams.replicas.replica_status import KEPT_S
from perennial.streams.retain.request_store import load_requests
from perennial.streams.settings import Settings
from tests.oracle import wait_until
from tests.secure_broker import Authority, SecureBroker
from tests.security.acts import Acts
from tests.security.guarded_broker import ADMIN, GuardedSite, Trier, password_of
from tests.services import start_minio

OPERATIONS = get_args(Operation)
GROUP_OPERATIONS: tuple[Operation, ...] = ("Read", "Describe", "Delete")
SMALL = {
    "max_batch_examples": 4, "max_age_s": 3, "steps": 1, "rows": 4, "row_tokens": 48, "max_tokens": 48, "threads": 1,
    "anchor_rows": 2, "max_general_rise_nats": 50, "min_gain_nats": -50, "poll_s": 1,
}  # fmt: skip
STRANGERS = {"stranger": RoleAccess("a user without any ACL"), "nobody": RoleAccess("the plain listener's user")}
OUTSIDE = "another-program"


@pytest.fixture(scope="module")
def site(broker_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedSite]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder)
    with SecureBroker(folder / "kafka", authority.sign("broker"), authority.ca_file, [ADMIN]) as broker:
        yield GuardedSite(broker, folder, authority, authority.sign("admin"))


@pytest.mark.parametrize("role", [*ROLES, *STRANGERS])
def test_the_broker_allows_a_role_what_the_table_says_and_nothing_else(
    role: str, table_site: tuple[GuardedSite, str], acts: Acts
):
    site, prefix = table_site
    access = ROLES.get(role) or STRANGERS[role]
    trier = Trier(site.nobody() if role == "nobody" else site.user(f"{prefix}{role}"))
    names = {f"{prefix}{name}": name for name in (*TOPICS, OUTSIDE)}
    for operation in OPERATIONS:
        for full, done in trier.topics(operation, list(names)).items():
            acts.add(
                f"{role}: {operation} topic {names[full]}",
                allowed=access.may("topic", names[full], operation),
                done=done,
            )
    groups = {f"{prefix}{name}": name for name in (*GROUPS, OUTSIDE)}
    for operation in GROUP_OPERATIONS:
        for full, done in trier.groups(operation, list(groups), f"{prefix}documents").items():
            acts.add(
                f"{role}: {operation} group {groups[full]}",
                allowed=access.may("group", groups[full], operation),
                done=done,
            )
    cluster = trier.cluster()
    for act, done in cluster.items():
        acts.add(f"{role}: {act}", allowed=False, done=done)
    assert not acts.wrong, "allowed although the table does not"
    assert not acts.failed, "refused although the table allows it"
    count = len(OPERATIONS) * len(names) + len(GROUP_OPERATIONS) * len(groups) + len(cluster)
    assert acts.tried + acts.worked == count


@pytest.fixture(scope="module")
def table_site(site: GuardedSite) -> tuple[GuardedSite, str]:
    """Return the site with all topics, one record in each, and the ACLs of the table; and the prefix of all names."""
    prefix = "table-"
    settings = site.admin(prefix)
    provision(settings)
    with admin_client(settings) as admin:
        admin.create_topics({f"{prefix}{OUTSIDE}": {"num_partitions": 1, "replication_factor": 1}})
    site.add_users([f"{prefix}{role}" for role in (*ROLES, "stranger")])
    create_missing(settings, acls_of(settings, principals_of(prefix)))
    written = Trier(settings).topics("Write", [f"{prefix}{name}" for name in (*TOPICS, OUTSIDE)])
    assert all(written.values())
    return site, prefix


def test_the_command_prints_creates_and_checks_the_acls(site: GuardedSite, monkeypatch, capsys):
    prefix = "command-"
    settings = site.admin(prefix)
    monkeypatch.setattr(discovery, "connected_settings", lambda: settings)
    named = ["subscriber=User:CN=eu", "subscriber=User:CN=us"]

    def run(**chosen: bool) -> tuple[int, dict]:
        options = {"apply": False, "check": False, "remove": False, **chosen}
        code = run_acls("p-", named, as_json=True, **options)
        return code, json.loads(capsys.readouterr().out)

    wanted = acls_of(settings, principals_of("p-", [("subscriber", "CN=eu"), ("subscriber", "User:CN=us")]))
    assert len({acl.principal for acl in wanted}) == len(ROLES) + 1
    code, found = run(check=True)
    assert (code, found["present"], len(found["missing"])) == (1, 0, len(wanted))
    code, found = run(apply=True)
    assert (code, len(found["created"]), found["surplus"]) == (0, len(wanted), [])
    code, found = run(apply=True)
    assert (code, found["created"], found["present"]) == (0, [], len(wanted))
    assert run(check=True) == (0, {"wanted": len(wanted), "present": len(wanted), "surplus": [], "missing": []})

    more = Acl("User:p-intake", "topic", f"{prefix}adapter-jobs", "Write")
    stranger = Acl("User:else", "topic", f"{prefix}documents", "Read")
    create_missing(settings, [*wanted, more, stranger])
    code, found = run(check=True)
    assert (code, found["missing"]) == (1, [])
    assert found["surplus"] == [
        f"User:else: allow read on topic {prefix}documents from *",
        f"User:p-intake: allow write on topic {prefix}adapter-jobs from *",
    ]
    assert run_acls("p-", named, apply=False, check=True, remove=False, as_json=False) == 1
    assert "too much: User:p-intake: allow write" in capsys.readouterr().out


def test_the_command_says_who_may_handle_acls(site: GuardedSite, broker, monkeypatch):
    site.add_users(["plain-user"])
    with pytest.raises(AclError, match=r"does not let this user handle ACLs.*PERENNIAL_KAFKA_USERNAME"):
        compare(site.user("plain-user"), [])
    wanted = acls_of(site.admin("x-"), principals_of("x-"))[:1]
    with pytest.raises(AclError, match="does not let this user handle ACLs"):
        create_missing(site.user("plain-user"), wanted)
    open_to_all = Settings.of(env_file=None, kafka=broker.bootstrap)
    with pytest.raises(AclError, match=r"no authorizer.*StandardAuthorizer"):
        compare(open_to_all, wanted)


def test_an_operator_adopts_a_topic_that_was_created_again(site: GuardedSite, tmp_path: Path):
    prefix = "adopt-"
    roles = ("intake", "operator", "provisioner")
    site.add_users([f"{prefix}{role}" for role in roles])
    create_missing(site.admin(prefix), acls_of(site.admin(prefix), principals_of(prefix)))
    of = {role: site.user(f"{prefix}{role}", prefix).replace(store=str(tmp_path / "store")) for role in roles}
    store = open_store(of["operator"].store.require_uri(), of["operator"].s3)
    topic, group = f"{prefix}documents", f"{prefix}intake"
    provision_recorded(of["provisioner"], store)
    assert Trier(of["intake"]).groups("Read", [group], topic) == {group: True}
    with admin_client(site.admin()) as admin:
        assert group_offsets(admin, group)
        admin.delete_topics([topic])
        wait_until(lambda: topic not in admin.list_topics(), 60, "the topic is deleted")
        provision(of["provisioner"])
        given = {**of["operator"].environment(), "PERENNIAL_KAFKA_PASSWORD": password_of(f"{prefix}operator")}
        result = CliRunner().invoke(app, ["topics", "adopt", "documents", "--yes"], env=given)
        assert result.exit_code == 0, (result.output, result.exception)
        assert not group_offsets(admin, group)


def test_streams_deletes_the_records_of_replicas_that_left(site: GuardedSite):
    prefix = "prune-"
    site.add_users([f"{prefix}streams", f"{prefix}subscriber"])
    provision(site.admin(prefix))
    create_missing(site.admin(prefix), acls_of(site.admin(prefix), principals_of(prefix)))
    now = datetime.now(UTC)
    left = ReplicaLeft(adapter="acme/support", replica="r1", generation=1, version="sha256:" + "1" * 64, at=now)
    with Publisher(settings=site.user(f"{prefix}subscriber", prefix)) as publisher:
        publisher.publish(left).result(120)
    later_ms = int(now.timestamp() * 1000) + 2 * KEPT_S * 1000
    with closing(AckReader(site.user(f"{prefix}streams", prefix), lambda: later_ms)) as reader:
        assert reader.prune() == 1
    with closing(AckReader(site.user(f"{prefix}streams", prefix))) as reader:
        assert reader.replicas(None, None) == []


# ---- tenants

TENANTS = ("acme", "globex")
TENANT_ROLES = [role for role in roles_of(TENANTS) if "." in role]


def tenants_of(settings: Settings) -> Settings:
    return settings.replace(tenants=",".join(TENANTS))


@pytest.fixture(scope="module")
def tenant_site(site: GuardedSite) -> tuple[GuardedSite, str]:
    """Return the site with the topics and ACLs of two tenants, and the prefix of all names."""
    prefix = "tenants-"
    roles = roles_of(TENANTS)
    settings = tenants_of(site.admin(prefix))
    site.add_users([f"{prefix}{role}" for role in roles])
    create_missing(settings, acls_of(settings, principals_of(prefix, roles=roles)))
    assert all(report.created for report in provision(tenants_of(site.user(f"{prefix}provisioner", prefix))))
    return site, prefix


@pytest.mark.parametrize("role", [*TENANT_ROLES, "intake", "streams"])
def test_a_tenant_reaches_its_own_topics_and_nobody_elses(role: str, tenant_site: tuple[GuardedSite, str], acts: Acts):
    site, prefix = tenant_site
    access, settings = roles_of(TENANTS)[role], tenants_of(site.admin(prefix))
    names = {f"{prefix}{name}": name for name in topics_of(settings)}
    assert all(Trier(settings).topics("Write", list(names)).values())  # a fetch needs a record
    trier = Trier(site.user(f"{prefix}{role}"))
    for operation in OPERATIONS:
        for full, done in trier.topics(operation, list(names)).items():
            allowed = access.may("topic", names[full], operation)
            acts.add(f"{role}: {operation} topic {names[full]}", allowed=allowed, done=done)
    assert not acts.wrong, "allowed although the table does not"
    assert not acts.failed, "refused although the table allows it"


@pytest.mark.slow(60)
@pytest.mark.timeout(900)
def test_a_record_that_addresses_another_tenants_adapter_becomes_a_dead_letter(
    site: GuardedSite, tmp_path: Path, acts: Acts
):
    """Through real intake and retain, each as its own principal; ids of requests are each tenant's own."""
    prefix = "deliver-"
    roles = roles_of(TENANTS)
    admin = tenants_of(site.admin(prefix))
    site.add_users([f"{prefix}{role}" for role in roles])
    create_missing(admin, acls_of(admin, principals_of(prefix, roles=roles)))

    def of(role: str) -> Settings:
        return tenants_of(site.user(f"{prefix}{role}", prefix)).replace(store=str(tmp_path / "store"))

    store = open_store(of("provisioner").store.require_uri(), of("provisioner").s3)
    provision_recorded(of("provisioner"), store)
    given = [
        (topic, tenant, adapter)
        for topic in ("documents", "interactions", "retention")
        for tenant in TENANTS
        for adapter in (f"{tenant}/support", "acme/support", "globex/support", "*")
        if adapter != "*" or topic == "retention"
    ]
    with ExitStack() as stack:
        for role in ("intake", "streams"):
            password = {"PERENNIAL_KAFKA_PASSWORD": password_of(f"{prefix}{role}")}
            process = Supervisor(of(role), tmp_path / "logs", (role,), password)
            stack.callback(process.stop)
            process.start()
            process.wait_healthy(300)
        for number, (topic, tenant, adapter) in enumerate(given):
            account = f"{'requester' if topic == 'retention' else 'publisher'}.{tenant}"
            write(of(account), f"{topic}.{tenant}", event_for(topic, adapter, number))
        foreign = [(topic, tenant, adapter) for topic, tenant, adapter in given if not adapter.startswith(f"{tenant}/")]

        def dead_letters() -> list[tuple[str, str, str]]:
            env = {**of("operator").environment(), "PERENNIAL_KAFKA_PASSWORD": password_of(f"{prefix}operator")}
            result = CliRunner().invoke(app, ["dlq", "ls", "--json"], env=env)
            assert result.exit_code == 0, result.output
            return [(each["from"], each["adapter"], each["reason"]) for each in json.loads(result.output)["letters"]]

        wait_until(lambda: len(dead_letters()) >= len(foreign), 300, "every foreign record is a dead letter", every_s=1)
        wanted = sorted((f"{topic}.{tenant}", adapter, "other-tenant") for topic, tenant, adapter in foreign)
        assert sorted(dead_letters()) == wanted
        own = [each for each in given if each not in foreign and each[0] != "retention"]

        def examples() -> int:
            with FlowReader(of("operator")) as reader:
                return reader.read().written["examples"]

        # The window drops the second one of two equal examples, so each adapter's own record counts once per topic.
        wait_until(lambda: examples() >= len(own), 300, "every own record is an example", every_s=1)
        assert examples() == len(own)
        for topic, tenant, adapter in foreign:
            acts.add(f"{topic}.{tenant} addresses {adapter}", allowed=False, done=False)
        with StatusReader(of("requester.acme")) as status:
            wait_until(
                lambda: set(status.latest()) == request_ids(given), 300, "the states of all own requests", every_s=1
            )
        assert set(load_requests(store)) == request_ids(given)
    assert refusals(tmp_path / "logs") == []


def request_ids(given: list[tuple[str, str, str]]) -> set[str]:
    """Return the ids by which retain knows the requests of tenants about their own adapters."""
    return {
        f"{t}:r{n}"
        for n, (topic, t, adapter) in enumerate(given)
        if topic == "retention" and adapter.startswith(f"{t}/")
    }


def event_for(topic: str, adapter: str, number: int) -> Event:
    if topic == "documents":
        return DocumentObserved(
            adapter=adapter, document_id=f"d{number}", text=f"Note {number}: parcels leave at noon."
        )
    if topic == "interactions":
        return InteractionObserved(
            adapter=adapter, interaction_id=f"i{number}", prompt="2+2?", response="5", correction="4"
        )
    return RetentionRequested(
        request_id=f"r{number}", kind="erase", adapter=adapter, selector=Selector(document_ids=["none"]),
        requested_by="ann",
    )  # fmt: skip


def write(settings: Settings, topic: str, event: Event) -> None:
    """Write an event to a topic without a publisher's own check of the tenant."""
    record = encode(event, event_id="1", source="/test", occurred_at=datetime.now(UTC))
    producer = Producer(
        {"bootstrap.servers": settings.kafka.require_bootstrap(), **librdkafka_options(settings.kafka_security)},
        logger=client_log,
    )
    errors: list[object] = []
    producer.produce(
        settings.kafka.topic(topic), record.value, record.key, headers=record.headers,
        on_delivery=lambda error, _: errors.append(error),
    )  # fmt: skip
    assert producer.flush(120) == 0
    assert errors == [None]


@pytest.mark.slow(90)
@pytest.mark.timeout(900)
def test_the_whole_loop_runs_with_a_principal_for_each_role(site: GuardedSite, tmp_path: Path):
    prefix = "loop-"
    server = start_minio(tmp_path)
    secret = server.secret
    root = S3Settings.from_env(server.environment())
    apply_policies(root, {role: Account(f"store-{role}", secret) for role in STORE_ROLES}, "perennial")
    site.add_users([f"{prefix}{role}" for role in ROLES])
    create_missing(site.admin(prefix), acls_of(site.admin(prefix), principals_of(prefix)))

    def of(role: str) -> Settings:
        given = site.user(f"{prefix}{role}", prefix)
        s3 = S3Settings.from_env(s3_of(role))
        return given.replace(store="s3://perennial", data_dir=str(tmp_path), s3=s3, **SMALL)

    def s3_of(role: str) -> dict[str, str]:
        return {
            **server.environment(), "PERENNIAL_S3_ACCESS_KEY": f"store-{role}", "PERENNIAL_S3_SECRET_KEY": secret,
        }  # fmt: skip

    with ExitStack() as stack:
        stack.callback(server.stop)
        store = open_store("s3://perennial", of("provisioner").s3)
        store.probe()
        assert all(report.created for report in provision_recorded(of("provisioner"), store))
        processes = [
            Supervisor(
                of(role), tmp_path / "logs", (role,),
                {"PERENNIAL_KAFKA_PASSWORD": password_of(f"{prefix}{role}"), **s3_of(role)},
            )
            for role in PROCESSES
        ]  # fmt: skip
        for each in processes:
            stack.callback(each.stop)
            each.start()
        for each in processes:
            each.wait_healthy(300)
        with Publisher(settings=of("publisher")) as publisher:
            for number in range(8):
                text = f"Note {number}: parcels leave at noon."
                publisher.document(adapter="acme/support", document_id=f"d{number}", text=text)
        subscriber = Subscriber("acme/support", DirectoryBackend(tmp_path / "served"), settings=of("subscriber"))
        stack.enter_context(subscriber)
        wait_until(lambda: subscriber.current is not None, 300, "a version is served", every_s=0.5)

        def perennial(role: str, *words: str, code: int = 0) -> str:
            """Run a command with the accounts of a role."""
            kafka = "operator" if role == "collector" else role  # `gc` has no use for Kafka
            given = {
                **of(kafka).environment(), "PERENNIAL_KAFKA_PASSWORD": password_of(f"{prefix}{kafka}"), **s3_of(role),
            }  # fmt: skip
            result = CliRunner().invoke(app, words, env=given)
            assert result.exit_code == code, (words, result.output, result.exception)
            return result.output

        def versions() -> int:
            return len(json.loads(perennial("operator", "adapters", "history", "acme/support", "--json")))

        wait_until(lambda: versions() > 1, 300, "two versions", every_s=1)
        # Where the store refuses, the command would leave the rollback to a learner, and say so.
        assert "again, generation" in perennial("operator", "adapters", "rollback", "acme/support", "--wait-s", "0")
        with Publisher(settings=of("requester")) as publisher:
            publisher.retention(
                request_id="r1", kind="erase", adapter="acme/support", selector={"document_ids": ["d3"]},
                requested_by="ann",
            ).result()  # fmt: skip
        with StatusReader(of("requester")) as status:
            states = [found.state for found in status.follow("r1", 300) if found is not None]
        assert states[-1] == "closed", states
        with FlowReader(of("operator")) as reader:
            flow = reader.read()
        assert flow.missing_topics == []
        assert [status.adapter for status in flow.adapters] == ["acme/support"]
        for name in ("broker", "topics", "durability", "offsets", "recorded topics", "store", "jobs"):
            finding = doctor.CHECKS[name](of("operator"))
            assert finding.ok, finding
        assert Trier(of("publisher")).topics("Write", [f"{prefix}documents"]) == {f"{prefix}documents": True}
        wait_until(lambda: json.loads(perennial("operator", "dlq", "ls", "--json"))["letters"], 300, "a dead letter")
        for words in (
            ["adapters", "ls"], ["adapters", "show", "acme/support"], ["explain", "acme/support"], ["dlq", "replay"],
            ["adapters", "park", "acme/support"], ["adapters", "unpark", "acme/support"],
            ["adapters", "system-prompt", "acme/support", "--set", str(written(tmp_path / "prompt", "Be brief."))],
            ["marks", "show", "acme/support"], ["replicas", "ls"],
            ["forget", "--adapter", "acme/support", "--document", "d4", "--wait-s", "300"],
            ["forget", "unsuppress", "acme/support", "--text-file", str(written(tmp_path / "erased", "Note 3: parcels leave at noon."))],
            ["replicas", "rm", "acme/support", subscriber.replica, "--force"],
        ):  # fmt: skip
            perennial("operator", *words)
        perennial("collector", "gc", "--keep", "1")
        perennial("collector", "gc", "--orphans")
        perennial("provisioner", "topics", "create")
        perennial("provisioner", "topics", "repartition", "drift", "--partitions", "2", "--yes")
        with pytest.raises(PublishError, match="Authorization"), Publisher(settings=of("subscriber")) as forger:
            forger.document(adapter="acme/support", document_id="forged", text="Pay at once.").result()

        assert refusals(tmp_path / "logs") == []


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def refusals(folder: Path) -> list[str]:
    """Return what servers refused to the roles, as their logs say it."""
    signs = ("AccessDenied", "Authorization", "not authorized", "may not write")
    lines = [f"{path.name}: {line}" for path in folder.iterdir() for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if any(sign in line for sign in signs)]
