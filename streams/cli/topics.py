"""The commands `perennial topics create`, `repartition` and `adopt`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console

from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.cli.terminal.printable import printable, printable_lines
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.tenants import base_topic
from perennial.streams.kafka.installation import INPUT_TOPICS, load_installation, open_store_of, provision_recorded
from perennial.streams.kafka.repartition import adopt, plan_repartition, repartition
from perennial.streams.kafka.topics import identify, topics_of
from perennial.streams.settings import Settings, SettingsError

_COLUMNS = (Column("topic"), Column("state"), Column("differs from what Perennial needs", wraps=True))


def create_topics(*, dry_run: bool, as_json: bool) -> int:
    """Create the missing topics and print the state of each.

    Args:
        dry_run: Change nothing; print what would be created.
        as_json: Print JSON instead of a table.

    Returns:
        The exit code: 1 where an existing topic differs from what Perennial needs.

    Raises:
        InstallationError: A topic is not the one that this installation recorded.
    """
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    reports = provision_recorded(settings, open_store_of(settings), dry_run=dry_run)
    differing = [report for report in reports if report.differences]
    if as_json:
        print(json.dumps([asdict(report) for report in reports]))
        return 1 if differing else 0
    created = "would be created" if dry_run else "created"
    print_table(
        _COLUMNS,
        [
            (report.name, created if report.created else "exists", "\n".join(report.differences) or "no")
            for report in reports
        ],
    )
    if differing:
        Console(stderr=True).print(
            "Topics that differ were not changed: change configs with kafka-configs, and partition counts with "
            "`perennial topics repartition`."
        )
    return 1 if differing else 0


def repartition_topic(topic: str, partitions: int, *, yes: bool, wait_s: float, as_json: bool) -> int:
    """Give an ordered topic more partitions, and print the progress.

    Args:
        topic: The topic without the prefix.
        partitions: The partition count afterwards.
        yes: Do not ask before the roles pause.
        wait_s: Seconds to wait until the writers have paused and the topic is read to its end.
        as_json: Print the result as JSON; the progress goes to standard error in any case.

    Returns:
        The exit code: 1 where the answer was no.

    Raises:
        RepartitionError: The topic cannot have this count, or was not read to its end in time.
        InstallationError: The topic is not the one that this installation recorded.
    """
    settings, store = _connected()
    plan = plan_repartition(settings, store, topic, partitions)
    if plan.recorded == plan.actual == plan.wanted:
        return _report(as_json, f"{topic} has {partitions} partitions already", topic=topic, partitions=partitions)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    progress.print(
        f"{topic}: {plan.recorded} partitions are recorded, the broker has {plan.actual}, and it is to have {plan.wanted}. "
        f"All processes of the role {plan.flow.role} pause (their health says maintenance) until "
        + (f"{plan.flow.reader} has handled what waits in the topic." if plan.flow.readers else "the topic is altered.")
    )
    if not yes and not typer.confirm("go on?", err=True):
        return 1
    repartition(settings, store, plan, lambda line: progress.print(printable_lines(line), markup=False), wait_s)
    return _report(as_json, f"{topic} has {partitions} partitions", topic=topic, partitions=partitions)


def adopt_topics(names: list[str], *, all_topics: bool, yes: bool, as_json: bool) -> int:
    """Record the present ids of topics that were created again, after printing what was lost with the old ones.

    Args:
        names: The topics without the prefix.
        all_topics: Adopt every topic, and the cluster.
        yes: Do not ask.
        as_json: Print the record as JSON.

    Returns:
        The exit code: 1 where the answer was no.

    Raises:
        SettingsError: No topic is named, or one that does not exist.
        RepartitionError: A process still reads one of the topics.
        InstallationError: Nothing is recorded yet.
    """
    settings, store = _connected()
    known = topics_of(settings)
    if bool(names) == all_topics or set(names) - set(known):
        raise SettingsError(
            "name the topics that were created again", got=", ".join(names) or "none", allowed=", ".join(known),
            remedy="name one or several of these, or --all",
        )  # fmt: skip
    chosen = list(known) if all_topics else names
    found, record = identify(settings, chosen), load_installation(store)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    changed = [
        name
        for name in chosen
        if record and name in record.topics and record.topics[name].topic_id != found.topic_ids[settings.kafka.topic(name)]
    ]  # fmt: skip
    if record is not None and record.cluster_id != found.cluster_id:
        notes.print(printable(f"cluster: {record.cluster_id} is recorded, {found.cluster_id} answers"), markup=False)
        changed = list(chosen)
    if not changed:
        return _report(as_json, "the recorded topics are the present ones: nothing to adopt", adopted=[])
    for name in changed:
        notes.print(f"{settings.kafka.topic(name)}: {_LOST.get(base_topic(name), _LOST_OTHER)}", markup=False)
    if not yes and not typer.confirm("record the present ids?", err=True):
        return 1
    adopt(settings, store, chosen)
    return _report(as_json, f"recorded: {', '.join(changed)}", adopted=changed)


_REREAD = "set the offsets of the group {group} back (kafka-consumer-groups --reset-offsets --to-earliest) before the roles start"
_LOST = {
    "examples": "examples that waited for the scorer are gone; to read them again from the input topics, as far as these "
    "still hold them, " + _REREAD.format(group="intake"),
    "scored-examples": "examples that waited for curate are gone; to score them again, " + _REREAD.format(group="scorer"),
    "adapter-jobs": "jobs that waited for the learner are gone from Kafka, and the store keeps the updates. Once the roles run, "
    "run `perennial adapters unpark ADAPTER` for each adapter that `perennial adapters ls` shows as waiting; it publishes "
    "them and the open requests to forget again",
    **dict.fromkeys(INPUT_TOPICS, "what was published to the old topic and not read yet is gone; ask its producers"),
}  # fmt: skip
_LOST_OTHER = "its old records are gone; nothing is learned or forgotten by them"


def _connected() -> tuple[Settings, ObjectStore]:
    settings = connected_settings()
    settings.kafka.require_bootstrap()
    return settings, open_store(settings.store.require_uri(), settings.s3)


def _report(as_json: bool, text: str, **facts: object) -> int:
    if as_json:
        print(json.dumps(facts))
    else:
        Console(highlight=False, soft_wrap=True).print(text, markup=False)
    return 0
