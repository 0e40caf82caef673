"""The commands `perennial adapters`: what the registry stores of each adapter, rollback, park and unpark.

`perennial adapters history` is in versions/version_list.py.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError, StoreError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.recovery.rollback import roll_back as roll_back_now
from perennial.storage.recovery.rollback import version_before
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.parked import (
    MAX_DETAIL_CHARS,
    OPERATOR,
    ParkedAdapter,
    list_parked,
    load_parked,
    park_adapter,
    unpark_adapter,
)
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import LIVE, AliasState, Registry
from perennial.storage.registry.waiting_jobs import (
    count_jobs,
    give_up_cut,
    list_jobs,
    load_given_up,
    load_job,
)
from perennial.storage.signing.trust import Trust
from perennial.streams.cli.cuts.next_cut import read_next_cut
from perennial.streams.cli.example_counts import counted_examples
from perennial.streams.cli.tables import Column, print_facts, print_table, short_time, short_version, shown_version
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import (
    RollbackRequested,
)
from perennial.streams.recovery.waiting_work import cuts_in_store, open_forget_jobs, waiting_updates
from perennial.streams.retention.example_rows import history_index
from perennial.streams.settings import Settings

_MAX_NAMED_ADAPTERS = 10
_DELIVERY_TIMEOUT_S = 30
_POLL_S = 0.2
_READERS = 16

_LIST_COLUMNS = (
    Column("adapter"), Column("generation", 1, right=True), Column("live version", shorten=short_version),
    Column("versions made", 2, right=True), Column("last outcome", 1), Column("live since", 3, shorten=short_time),
    Column("parked", 1), Column("waiting", 4, right=True),
)  # fmt: skip


def open_registry(settings: Settings, trust: Trust | None = None) -> Registry:
    """Return the registry in the store that the settings name. Without keys it shows what others refuse, too."""
    return Registry(
        open_store(settings.store.require_uri(), settings.s3),
        trust=trust,
    )


def list_adapters(*, as_json: bool) -> int:
    """Print one row per adapter and return the exit code."""
    settings = connected_settings()
    rows = adapter_rows(open_registry(settings), settings.serving.alias)
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        Console(stderr=True).print("no adapter has a version yet: publish documents first, then `perennial watch`")
        return 0
    print_table(_LIST_COLUMNS, [_list_row(row) for row in rows])
    return 0


def adapter_rows(registry: Registry, alias: str) -> list[dict[str, Any]]:
    """Return the facts of every adapter, sorted by name. Several adapters are read at a time.

    Args:
        registry: The registry to read.
        alias: The alias whose version counts as live.
    """
    parked = {record.adapter: record.reason for record in list_parked(registry.store)}
    waiting = count_jobs(registry.store)

    def row_of(adapter: str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "adapter": adapter, "generation": 0, "version": None, "versions": 0, "last_outcome": None,
            "published_at": None, "parked": parked.get(adapter), "jobs_waiting": waiting.get(adapter, 0),
        }  # fmt: skip
        try:
            state, head = registry.alias(adapter, alias), registry.head(adapter)
        except (IntegrityError, NotFoundError) as error:  # one damaged adapter must not hide the others
            return {**row, "last_outcome": "unreadable", "error": str(error)}
        if state is not None:
            row |= {
                "generation": state.generation, "version": state.version, "published_at": state.published_at.isoformat()
            }  # fmt: skip
        if head is not None:
            row |= {"versions": head.seq, "last_outcome": head.manifest.outcome}
        return row

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(row_of, sorted({*registry.adapters(), *parked})))


def _list_row(row: dict[str, Any]) -> list[str | Text]:
    shown: list[str | Text] = [
        "-" if row[name] is None else str(row[name])
        for name in ("adapter", "generation", "version", "versions", "last_outcome", "published_at")
    ]
    return [*shown, Text(row["parked"], "red") if row["parked"] else "-", str(row["jobs_waiting"])]


def require_adapter(registry: Registry, adapter: str) -> None:
    """Check that the adapter has a version.

    Raises:
        NotFoundError: It has none.
    """
    if registry.head(adapter) is None:
        known = ", ".join(islice(registry.adapters(), _MAX_NAMED_ADAPTERS)) or "none yet"
        raise NotFoundError(
            "no such adapter", got=adapter, allowed=f"known adapters: {known}", remedy="see `perennial adapters ls`"
        )


def show_adapter(adapter: str, *, as_json: bool) -> int:
    """Print the live version of an adapter, or its newest where none is live, and return the exit code.

    Raises:
        NotFoundError: The adapter has no version.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    parked = load_parked(registry.store, adapter)
    waiting = len(list(list_jobs(registry.store, adapter)))
    parked_facts = _parked_facts(parked, waiting)
    try:
        if parked is None:
            require_adapter(registry, adapter)
        alias, head = registry.alias(adapter, settings.serving.alias), registry.head(adapter)
        manifest = registry.manifest(adapter, alias.version) if alias else (head.manifest if head else None)
    except IntegrityError as error:
        if parked is None:
            raise
        alias, manifest = None, None  # the parked record says what is damaged
        parked_facts["newest version"] = f"unreadable: {error}"
    counts = counted_examples(registry, adapter) if manifest is not None else None
    cut = read_next_cut(registry, settings, adapter)
    if as_json:
        shown = None if manifest is None else json.loads(manifest.to_bytes())
        record = None if parked is None else parked.model_dump(mode="json")
        print(json.dumps(
            {
                "alias": _alias_facts(alias), "manifest": shown, "parked": record, "jobs_waiting": waiting,
                "examples": None if counts is None else asdict(counts), "next_cut": asdict(cut),
            }, default=str,
        ))  # fmt: skip
        return 0
    version_facts = {}
    if manifest is not None:
        version_facts = {
            **_alias_facts(alias),
            **_extends_facts(registry, manifest, alias),
            **_dependency_facts(manifest),
            **_facts(manifest),
        }
    count_facts = {} if counts is None else {"examples": str(counts)}
    print_facts({"adapter": adapter, **parked_facts, **count_facts, **cut.facts(), **version_facts})
    return 0


def _parked_facts(parked: ParkedAdapter | None, waiting: int) -> dict[str, object]:
    facts: dict[str, object] = {}
    if parked is not None:
        facts = {
            "parked": f"{parked.reason}, since {parked.since.isoformat()}", "why": parked.detail or "no detail given",
            "parked by": parked.worker or "-",
        }  # fmt: skip
        if parked.job_id is not None:
            facts["failed job"] = parked.job_id if parked.cut is None else f"cut {parked.cut}, {parked.job_id}"
        facts["to go on"] = f"mend the cause, then `perennial adapters unpark {parked.adapter}`"
    if waiting or parked is not None:
        facts["updates waiting"] = waiting
    return facts


def _alias_facts(alias: AliasState | None) -> dict[str, object]:
    if alias is None:
        return {"alias": "none: no version passed the gate yet"}
    return {
        "alias": alias.alias, "generation": alias.generation, "version": alias.version,
        "previous": alias.previous_version, "kind": alias.kind, "live since": alias.published_at.isoformat(),
    }  # fmt: skip


def _extends_facts(registry: Registry, manifest: Manifest, alias: AliasState | None) -> dict[str, object]:
    """Return which shared adapter clients serve the adapter with, and that one's version under the same alias."""
    if manifest.extends is None:
        return {}
    beneath = registry.alias(manifest.extends, alias.alias if alias else LIVE)
    if beneath is None or beneath.kind == "retired":
        return {"extends": f"{manifest.extends}, which has no live version: served alone"}
    if registry.is_revoked(manifest.extends, beneath.seq):
        return {"extends": f"{manifest.extends}, whose live version {beneath.version} is revoked: served alone"}
    return {"extends": f"{manifest.extends}, served together with its version {beneath.version}"}


def _dependency_facts(manifest: Manifest) -> dict[str, object]:
    """Return which other adapters' versions this one depends on."""
    facts: dict[str, object] = {}
    if manifest.over is not None:
        facts["trained over"] = f"{manifest.over.adapter}@{manifest.over.version}"
    if manifest.start is not None:
        names = [founder.adapter.rpartition("/")[2] for founder in manifest.start.founders]
        mean = f"the mean of {len(names)} others below {manifest.start.shared}: {', '.join(names)}"
        facts["began with"] = mean if names else "nothing learned; others may begin with it"
    return facts


def _facts(manifest: Manifest) -> dict[str, object]:
    facts: dict[str, object] = {
        "outcome": f"{manifest.outcome} ({manifest.reason})", "seq": manifest.seq, "made by": manifest.kind,
        "parent": manifest.parent, "base": f"{manifest.base_model} {manifest.base_sha256}",
        "learned": f"{len(manifest.learned)} examples, {manifest.tokens} tokens",
        "skipped": len(manifest.skipped), "weights": f"{manifest.weights.digest}, {manifest.weights.size_bytes} bytes",
        "recipe": ", ".join(f"{k}={v}" for k, v in sorted(manifest.config.items())),
    }  # fmt: skip
    facts.update({f"gate {name}": value for name, value in manifest.gate.as_dict().items()})
    return facts


def roll_back(adapter: str, *, to: str | None, reason: str, wait_s: float, as_json: bool) -> int:
    """Make an earlier version live at once, whatever waits or trains.

    The alias is moved here, by the same steps as a learner's; the job that is published, too, is the record of it. Where
    this command may not write to the store, a learner carries the job out when its turn comes.

    Args:
        adapter: Name of the adapter.
        to: Version to make live, or its unique beginning; None for the one before the version that is live now.
        reason: Recorded in the version and in the job.
        wait_s: Seconds to wait for a learner, where one must do it; 0 returns at once.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where the alias did not change in time.

    Raises:
        NotFoundError: The adapter or the version does not exist, or several versions begin like `to`.
        RollbackError: The version may not be served.
    """
    settings = connected_settings()
    registry, alias = open_registry(settings, settings.signing.trust()), settings.serving.alias
    require_adapter(registry, adapter)
    before = registry.alias(adapter, alias)
    live = before.version if before else None
    # Named now: "the version before" would be another one once the updates that wait are learned.
    target = resolve_version(registry, adapter, to) if to else version_before(registry, adapter, live)
    job = RollbackRequested(
        job_id=f"rollback-{uuid.uuid4().hex}", adapter=adapter, alias=alias, version=target, live=live,
        requested_by="command line", reason=reason,
    )  # fmt: skip
    queued = ""
    try:
        state = roll_back_now(registry, adapter, alias, target, job.job_id, reason)
    except StoreError as error:
        if (
            type(error) is not StoreError
        ):  # a subclass says why it cannot be done; this one, that it is not allowed here
            raise
        state, queued = before, f"this command may not write to the store ({error.got}), so a learner does it"
    unannounced = _announce(settings, registry, job, state if not queued else None, required=bool(queued))
    deadline = time.monotonic() + wait_s
    while queued and time.monotonic() < deadline and not _moved(before, state):
        time.sleep(_POLL_S)
        state = registry.alias(adapter, alias)
    moved = _moved(before, state)
    if as_json:
        print(json.dumps({"job_id": job.job_id, "version": target, "moved": moved, "alias": _alias_facts(state)}))
    elif moved and state:
        console = Console(highlight=False)
        version = shown_version(target, console)
        console.print(f"{adapter} is at {version} again, generation {state.generation}", soft_wrap=True, markup=False)
    elif wait_s or not queued:
        Console(stderr=True, highlight=False).print(
            f"the rollback was requested ({job.job_id}) but is not live after {wait_s:.0f} s: is a learner running? "
            f"`perennial status` shows the waiting jobs. {queued}", soft_wrap=True, markup=False,
        )  # fmt: skip
    if unannounced:
        Console(stderr=True, highlight=False).print(
            f"the version is live, but Kafka did not take the event: {unannounced}. Subscribers find it when they look at "
            "the store next", soft_wrap=True, markup=False,
        )  # fmt: skip
    return 0 if moved or (queued and not wait_s) else 1


def _moved(before: AliasState | None, state: AliasState | None) -> bool:
    return state is not None and (before is None or state.generation > before.generation)


def _announce(
    settings: Settings, registry: Registry, job: RollbackRequested, state: AliasState | None, *, required: bool
) -> str:
    """Publish the alias's event, and the job as a record for people; return why Kafka did not take them, or "".

    Raises:
        PerennialError: The job is required, because a learner must do it, and Kafka did not take it.
    """
    from perennial.learner.versions.alias_events import alias_event, alias_event_id

    try:
        with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
            if state is not None:
                # Read again: to connect takes a while, and an event of an earlier generation must not follow a later one.
                event = alias_event(registry, registry.alias(job.adapter, job.alias) or state)
                # The id that a learner gives it: it sends the same event once more when it comes to the job.
                publisher.publish(event, event_id=alias_event_id(event)).result(_DELIVERY_TIMEOUT_S)
            publisher.publish(job).result(_DELIVERY_TIMEOUT_S)
    except PerennialError as error:
        if required:
            raise
        return str(error)
    return ""


def resolve_version(registry: Registry, adapter: str, prefix: str) -> str:
    """Return the one version of the adapter whose digest begins with the prefix.

    Raises:
        NotFoundError: There is none, or more than one.
    """
    wanted = prefix.removeprefix("sha256:")
    head = registry.head(adapter)
    published = history_index(registry, adapter).load(head).published if head is not None else []
    found = [version for version in published if version.removeprefix("sha256:").startswith(wanted)]
    if len(found) != 1:
        raise NotFoundError(
            "several versions begin like this" if found else "no such version", got=prefix,
            allowed="a version of this adapter, or its unique beginning", remedy="see `perennial adapters history`",
        )  # fmt: skip
    return found[0]


def park(adapter: str, *, reason: str, as_json: bool) -> int:
    """Park an adapter: its updates wait in the store until it is unparked; return the exit code.

    Args:
        adapter: Name of the adapter.
        reason: Recorded with it.
        as_json: Print JSON instead of text.
    """
    registry = open_registry(connected_settings())
    wanted = ParkedAdapter(
        adapter=adapter, reason=OPERATOR, detail=reason[:MAX_DETAIL_CHARS], since=datetime.now(UTC),
        worker=socket.gethostname(),
    )  # fmt: skip
    record = park_adapter(registry.store, wanted)
    if as_json:
        print(json.dumps({"parked": record.model_dump(mode="json"), "was_parked": record != wanted}))
    else:
        said = f"{adapter} is parked: its updates wait in the store until `perennial adapters unpark {adapter}`"
        if record != wanted:
            said = f"{adapter} was parked before, since {record.since.isoformat()}: {record.reason}"
        Console(highlight=False).print(printable_lines(said), soft_wrap=True, markup=False)
    return 0


def unpark(adapter: str, *, without_missing: bool, wait_s: float, as_json: bool) -> int:
    """Let an adapter go on: publish its waiting jobs again, in order, and wait until the first was tried.

    It also works for an adapter that is not parked, whose waiting jobs Kafka lost. A job that curate has not committed is
    left to curate: it is of a process that ended, or that is about to commit and publish it.

    Args:
        adapter: Name of the adapter.
        without_missing: Give up the cuts whose jobs are neither in the store nor settled.
        wait_s: Seconds to wait; 0 returns at once.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where the adapter is parked again, or nothing was tried in time.

    Raises:
        NotFoundError: The adapter has neither a version nor a waiting job, and is not parked.
        IntegrityError: A waiting job cannot be read.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    store = registry.store
    parked = load_parked(store, adapter)
    cuts, uncommitted = cuts_in_store(store, adapter)
    if parked is None and not (cuts or uncommitted):
        require_adapter(registry, adapter)
    jobs = waiting_updates(store, adapter, cuts)
    forgets = open_forget_jobs(store, adapter, "sent again when the adapter was unparked")
    given_up = _give_up_missing(registry, adapter, cuts) if without_missing else []
    # The record goes first: a job that a learner reads while it is there is committed without being run.
    unpark_adapter(store, adapter)
    # A learner may have committed such a job since they were listed. Its object was in the store before its record.
    known = set(cuts)
    cuts, uncommitted = cuts_in_store(store, adapter)
    jobs += waiting_updates(store, adapter, [cut for cut in cuts if cut not in known])
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        for job in (*forgets, *jobs):
            publisher.publish(job).result(_DELIVERY_TIMEOUT_S)
    again, tried = _wait_for_first(store, adapter, cuts, [job.request_id for job in forgets], wait_s)
    facts = {
        "adapter": adapter, "was_parked": parked is not None, "published": len(jobs),
        "forget_requests": len(forgets), "given_up": given_up, "uncommitted": uncommitted, "tried": tried,
        "parked": None if again is None else again.model_dump(mode="json"),
    }  # fmt: skip
    if as_json:
        print(json.dumps(facts))
    else:
        lost = f" without cuts {', '.join(map(str, given_up))}" if given_up else ""
        Console(highlight=False).print(
            f"{adapter} goes on{lost}: {len(jobs)} updates and {len(forgets)} requests to forget were published again",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        if uncommitted:
            Console(stderr=True, highlight=False).print(
                f"cut {', '.join(map(str, uncommitted))} is in the store, but curate has not committed it: it is left to "
                "curate, which commits and publishes it, or cuts its examples again", soft_wrap=True, markup=False,
            )  # fmt: skip
        if again is not None:
            Console(stderr=True, highlight=False).print(
                printable_lines(f"{adapter} is parked again ({again.reason}), the cause persists: {again.detail}"),
                soft_wrap=True, markup=False,
            )  # fmt: skip
        elif not tried and wait_s:
            Console(stderr=True, highlight=False).print(
                f"none of them was tried within {wait_s:.0f} s: is a learner running? `perennial status` shows the "
                "waiting jobs", soft_wrap=True, markup=False,
            )  # fmt: skip
    return 1 if again is not None or (wait_s and not tried) else 0


def _give_up_missing(registry: Registry, adapter: str, cuts: list[int]) -> list[int]:
    """Give up the cuts between the newest version's next one and the last waiting one that nothing holds."""
    head = registry.head(adapter)
    if head is None or head.manifest.next_cut is None or not cuts:
        return []
    settled = load_given_up(registry.store, adapter)
    missing = [cut for cut in range(head.manifest.next_cut, cuts[-1]) if cut not in cuts and cut not in settled]
    for cut in missing:
        give_up_cut(registry.store, adapter, cut, "given up by an operator")
    return missing


def _wait_for_first(
    store: ObjectStore, adapter: str, cuts: list[int], request_ids: list[str], wait_s: float
) -> tuple[ParkedAdapter | None, bool]:
    """Wait until a published job was settled, or the adapter is parked again; return its record, and whether one was."""
    if not cuts and not request_ids:
        return load_parked(store, adapter), True
    deadline = time.monotonic() + wait_s
    while True:
        again = load_parked(store, adapter)
        entries = (load_quarantine(store, adapter).entry(request_id) for request_id in request_ids)
        done = any(entry is None or entry.done is not None for entry in entries)
        done = done or (bool(cuts) and load_job(store, adapter, cuts[0]) is None)
        if again is not None or done:
            return again, True
        if time.monotonic() >= deadline:
            return None, False
        time.sleep(_POLL_S)
