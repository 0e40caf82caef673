"""The command `perennial doctor`: check what the roles need and print the remedy where something is wrong.

Add a check: write a function from settings to a Finding and put it into CHECKS. An error that it raises becomes a
failed finding.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape

from perennial.extras import MissingExtraError, require_extra
from perennial.storage.errors import PerennialError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.parked import list_parked
from perennial.storage.registry.waiting_jobs import count_jobs, job_key, list_jobs
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.tenants import base_topic
from perennial.streams.settings import Settings

_MIN_FREE_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        ok: True where the roles can run with what was found.
        found: What was found.
        remedy: What to do where `ok` is False.
    """

    check: str
    ok: bool
    found: str
    remedy: str = ""


def _python(_: Settings) -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")


def _disk(settings: Settings) -> Finding:
    folder = settings.store.data_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding("disk", free >= _MIN_FREE_BYTES, f"{free / 1024**3:.1f} GiB free at {folder}", "free at least 2 GiB")


def _jars(_: Settings) -> Finding:
    from perennial.streams.devstack.embedded_kafka.kafka_broker import fetch_jars

    require_extra("devstack", "the embedded broker")
    jars = fetch_jars()
    return Finding("embedded broker", True, f"{len(jars)} jars cached")


def _broker(settings: Settings) -> Finding:
    from kafka import KafkaAdminClient

    from perennial.streams.kafka.connect import secured

    bootstrap = settings.kafka.require_bootstrap()
    with secured(settings, 5) as options:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap.split(","), bootstrap_timeout_ms=5000, **options)
    try:
        cluster = admin.describe_cluster()
    finally:
        admin.close()
    return Finding(
        "broker", True, f"{bootstrap}, cluster {cluster.get('cluster_id')}, {settings.kafka_security.describe()}"
    )


def _topics(settings: Settings) -> Finding:
    from perennial.streams.kafka.installation import load_installation, open_store_of
    from perennial.streams.kafka.topics import provision

    store = open_store_of(settings)
    record = load_installation(store) if store else None
    reports = provision(settings, True, record.partitions() if record else {})
    missing = [report.name for report in reports if report.created]
    differing = [f"{report.name}: {'; '.join(report.differences)}" for report in reports if report.differences]
    if missing:
        return Finding("topics", False, f"missing: {', '.join(missing)}", "create them with `perennial topics create`")
    return Finding(
        "topics",
        not differing,
        "; ".join(differing) or f"all {len(reports)} exist as needed",
        "change configs with kafka-configs, and partition counts with `perennial topics repartition`",
    )


def _recorded_topics(settings: Settings) -> Finding:
    """Compare the cluster, the topic ids and the partition counts with those that the installation recorded."""
    from perennial.streams.kafka.installation import first_difference, load_installation, tenants_error
    from perennial.streams.kafka.topics import identify

    name = "recorded topics"
    record = load_installation(open_store(settings.store.require_uri(), settings.s3))
    if record is None:
        return Finding(name, True, "nothing is recorded yet; the first role that starts does it")
    found = identify(settings)
    present = [topic for topic in record.topics if settings.kafka.topic(topic) in found.topic_ids]
    differing = [
        error for topic in present if (error := first_difference(settings, record, found, [topic])) is not None
    ]
    missing = tenants_error(settings, record.topics)
    if missing is not None:
        differing.insert(0, missing)
    if not differing:
        return Finding(name, True, f"cluster, ids and partition counts of {len(present)} topics are the recorded ones")
    first = differing[0]
    found_text = "; ".join(f"{error.message} (got {error.got}, recorded {error.allowed})" for error in differing)
    return Finding(name, False, found_text, first.remedy)


def _durability(settings: Settings) -> Finding:
    """Check that what the broker acknowledges outlives the loss of one broker; of a single broker only say so."""
    from kafka.admin import ConfigResource, ConfigResourceType

    from perennial.streams.kafka.topics import admin_client, topics_of

    with admin_client(settings) as admin:
        brokers = len(admin.describe_cluster()["brokers"])
        existing = set(admin.list_topics())
        names = [full for topic in topics_of(settings) if (full := settings.kafka.topic(topic)) in existing]
        topics = admin.describe_topics(names) if names else []
        resources = [ConfigResource(ConfigResourceType.TOPIC, full) for full in names]
        configs = admin.describe_configs(resources, config_filter="all")["topic"] if names else {}
    values = {full: {key: entry["value"] for key, entry in configs[full].items()} for full in names}
    if brokers == 1:
        flushed = all(each.get("flush.messages") == "1" for each in values.values())
        return Finding(
            "durability", True,
            "one broker, which is for development: "
            + ("every record is flushed to its disk" if flushed else "a power cut may lose what it acknowledged, because "
            "flush.messages is not 1") + "; production needs replication 3",
        )  # fmt: skip
    return durability_of({topic["name"]: len(topic["partitions"][0]["replicas"]) for topic in topics}, values)


def durability_of(replicas: dict[str, int], configs: dict[str, dict[str, str | None]]) -> Finding:
    """Return the finding about the topics of a cluster of several brokers.

    Args:
        replicas: The replication factor of each topic.
        configs: The configs of each topic.
    """
    weak = []
    for topic, count in replicas.items():
        found = configs[topic]
        if count < 3:
            weak.append(f"{topic}: replication factor {count}, should be 3")
        if int(found.get("min.insync.replicas") or 1) < 2:
            weak.append(f"{topic}: min.insync.replicas is {found.get('min.insync.replicas')}, should be 2")
        if found.get("unclean.leader.election.enable") != "false":
            weak.append(f"{topic}: unclean.leader.election.enable is not false")
    return Finding(
        "durability",
        not weak,
        "; ".join(weak) or "replication 3, min.insync.replicas 2, no unclean elections",
        "see docs/operations.md, Before production: kafka-reassign-partitions and kafka-configs change it",
    )


def _offsets(settings: Settings) -> Finding:
    """Compare committed offsets with the logs: an offset behind a log's end was lost, one before its start unread."""
    from perennial.streams.kafka.group_offsets import reader_positions
    from perennial.streams.kafka.repartition import READERS
    from perennial.streams.kafka.topics import admin_client, identify, topic_names

    wrong, waiting = [], 0
    partitions = identify(settings).partitions
    with admin_client(settings) as admin:
        for topic in topic_names(settings, READERS):
            group, full = settings.kafka.topic(READERS[base_topic(topic)]), settings.kafka.topic(topic)
            for position in reader_positions(admin, group, full, partitions.get(full, 0)):
                where = f"{group} in {full}[{position.partition.partition}]"
                offset, begin, end = position.committed, position.begin, position.end
                if offset > end:
                    wrong.append(f"{where}: committed {offset}, the log ends at {end}: its tail was lost")
                elif 0 <= offset < begin:
                    wrong.append(f"{where}: committed {offset}, the log begins at {begin}: unread records were deleted")
                waiting += position.waiting
    return Finding(
        "offsets",
        not wrong,
        "; ".join(wrong) or f"every committed offset is in its log; {waiting} records wait",
        "see docs/operations.md, InputRecordsLost: lost records must be published again; raise retention.ms where "
        "records are deleted unread",
    )


def _store(settings: Settings) -> Finding:
    store = open_store(settings.store.require_uri(), settings.s3)
    store.probe()
    return Finding("store", True, f"{store.uri}: create-if-absent and compare-and-swap hold")


def _age_of_store(settings: Settings) -> Finding:
    """Compare the store with what Kafka announced: a store that was set back loses examples and revives erased texts."""
    from perennial.streams.recovery.announced import read_announced
    from perennial.streams.recovery.reconcile import evidence_of_age

    announced = read_announced(settings)
    evidence = evidence_of_age(open_store(settings.store.require_uri(), settings.s3), announced)
    return Finding(
        "age of the store", not evidence,
        "; ".join(evidence) or f"it has every generation that was announced, of {len(announced.generations)} aliases",
        "stop all roles and run `perennial backup reconcile` (docs/operations.md, A bucket that was set back)",
    )  # fmt: skip


def _parked(settings: Settings) -> Finding:
    store = open_store(settings.store.require_uri(), settings.s3)
    parked, waiting = list(list_parked(store)), count_jobs(store)
    queued = sum(waiting.values()) - sum(waiting.get(record.adapter, 0) for record in parked)
    said = [
        f"{record.adapter} is parked since {record.since.isoformat()} ({record.reason}), {waiting.get(record.adapter, 0)} "
        f"updates wait from {_oldest_job(store, record.adapter)} on: {record.detail}"
        for record in parked
    ]
    said.append(f"{queued} updates of other adapters wait for a learner")
    return Finding(
        "jobs", not parked, "; ".join(said),
        "mend the named cause (docs/operations.md, PerennialAdapterParked), then `perennial adapters unpark ADAPTER`",
    )  # fmt: skip


def _oldest_job(store: ObjectStore, adapter: str) -> str:
    cut = next(list_jobs(store, adapter), None)
    return "the next one" if cut is None else job_key(adapter, cut)


def _signatures(settings: Settings) -> Finding:
    """Look whether clients that trust the same keys would serve what is live."""
    from perennial.streams.cli.keys.stored_signatures import StoredSignatures

    name, keys = "signatures", settings.signing
    signer = keys.key_to_sign()
    signs = f"signed with {signer.public.key_id}" if signer else "not signed by this process"
    if signer is None and not keys.trusted_keys:
        return Finding(name, True, "versions are not signed and signatures are not asked for")
    stored = StoredSignatures.of(settings)
    faults = [
        f"{adapter}#{alias}: {why}"
        for adapter in stored.adapters(None)
        for alias, why in stored.live_faults(adapter).items()
    ]
    return Finding(
        name, not faults, f"{signs}; {len(faults)} live versions have no trusted signature: {', '.join(faults[:5])}"
        if faults else f"{signs}; every live version has a signature",
        "see `perennial keys check`, and docs/signatures.md",
    )  # fmt: skip


def _base(settings: Settings) -> Finding:
    require_extra("worker", "the base model")
    from perennial.learner.model.base import load_base

    base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    size = sum(p.numel() for p in base.model.parameters()) / 1e6
    return Finding("base", True, f"{base.name}, {size:.1f} M parameters, {base.dtype}, {base.digest}")


def _device(settings: Settings) -> Finding:
    require_extra("worker", "the device")
    import torch

    if torch.cuda.is_available():
        return Finding("device", True, f"cuda: {torch.cuda.get_device_name()}")
    wanted_cuda = settings.model.device == "cuda"
    return Finding(
        "device",
        not wanted_cuda,
        f"cpu, {settings.model.threads} threads (no CUDA device)",
        "set PERENNIAL_DEVICE=auto, or repair the driver",
    )


CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "python": _python, "disk": _disk, "embedded broker": _jars, "broker": _broker, "topics": _topics,
    "durability": _durability, "offsets": _offsets, "store": _store, "recorded topics": _recorded_topics,
    "age of the store": _age_of_store,
    "jobs": _parked, "signatures": _signatures, "device": _device, "base": _base,
}  # fmt: skip


def examine(*, as_json: bool) -> int:
    """Run every check, print each finding, and return the exit code: 1 where a check failed."""
    settings = connected_settings()
    findings: list[Finding] = []
    console = Console()
    for name, check in CHECKS.items():
        with Console(stderr=True).status(f"checking {name}"):
            finding = _guarded(name, check, settings)
        findings.append(finding)
        if not as_json:
            mark = "[green]ok  [/]" if finding.ok else "[red]FAIL[/]"
            console.print(
                f"{mark} [bold]{name}[/]: {escape(printable(finding.found))}", highlight=False, soft_wrap=True
            )
            if not finding.ok and finding.remedy:
                console.print(f"     remedy: {escape(printable(finding.remedy))}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    return 0 if all(finding.ok for finding in findings) else 1


def _guarded(name: str, check: Callable[[Settings], Finding], settings: Settings) -> Finding:
    try:
        return check(settings)
    except MissingExtraError as error:  # a machine that only publishes or subscribes needs no extra
        return Finding(name, True, f"not checked: {error.message}; {error.remedy}")
    except PerennialError as error:
        found = error.message + (f" ({error.got})" if error.got else "")
        return Finding(name, False, found, error.remedy)
    except Exception as error:  # noqa: BLE001  # a check that breaks is a finding; the next check must still run
        return Finding(
            name, False, f"{type(error).__name__}: {error}", "check that the address is right and that the service runs"
        )
