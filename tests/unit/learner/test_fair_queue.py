"""Who goes first: order per adapter, no starvation, floods, weights, budgets, and jobs that are no updates."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.learner.roles.fair_queue import MAX_HEAD_START_S, SWEEP_EVERY, FairQueue, QueueEntry
from perennial.learner.roles.job_figures import BYTES_PER_TOKEN, JobFigures, figures_of, tenant_of
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.events.models import BlobRef, DriftDetected, ForgetRequested, RollbackRequested
from tests import jobs, tiny

HOUR_S = 3600.0


def fill(queue: FairQueue[str], adapter: str, n: int, *, tokens: int = 100, oldest_s: float = 0.0) -> list[str]:
    """Add n updates of an adapter."""
    names = [f"{adapter}#{number}" for number in range(n)]
    for name in names:
        queue.add(name, JobFigures(adapter, tokens, oldest_s))
    return names


def flood(queue: FairQueue[str], tenant: str, n: int, *, tokens: int = 100, oldest_s: float = 0.0) -> None:
    """Add one update for each of n adapters of a tenant."""
    for number in range(n):
        fill(queue, f"{tenant}/{number}", 1, tokens=tokens, oldest_s=oldest_s)


def forget(queue: FairQueue[str], adapter: str) -> str:
    queue.add(f"forget {adapter}", JobFigures(adapter, is_update=False))
    return f"forget {adapter}"


def start(queue: FairQueue[str], now_s: float = 0.0, busy: tuple[str, ...] = ()) -> QueueEntry[str] | None:
    """Start the next job, if any may start."""
    entry = queue.next(busy, now_s)
    if entry is not None:
        queue.start(entry, now_s)
    return entry


def one_pass(queue: FairQueue[str], places: int, now_s: float = 0.0) -> list[str]:
    """Start the jobs of one pass: of different adapters, until it is full."""
    started: dict[str, str] = {}
    while len(started) < places:
        entry = queue.next(started.keys(), now_s, others=not started)
        if entry is None:
            break
        queue.start(entry, now_s)
        started[entry.adapter] = entry.job
        if not entry.figures.is_update:
            break
    return list(started.values())


def drain(queue: FairQueue[str], now_s: float = 0.0) -> list[str]:
    """Start jobs one after the other until none waits."""
    started = []
    while (entry := start(queue, now_s)) is not None:
        started.append(entry.job)
    return started


def steps_of(rng: random.Random) -> list[tuple[Any, ...]]:
    """Return what happens to a queue, more often full than not."""
    found: list[tuple[Any, ...]] = []
    for _ in range(200):
        kind = rng.choices(["add", "start", "finish", "forget", "wait", "lose"], [10, 8, 7, 1, 1, 0.3])[0]
        found.append({
            "add": (kind, rng.randrange(8), rng.randint(1, 900), rng.randrange(50)),
            "start": (kind, rng.random() < 0.9, rng.random() < 0.8, rng.random() < 0.5),
            "finish": (kind, rng.randrange(4)),
            "forget": (kind, rng.randrange(8)),
            "wait": (kind, rng.randint(1, 5_000)),
            "lose": (kind, rng.randrange(8)),
        }[kind])  # fmt: skip
    return found


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_job_starts_once_in_the_order_of_its_adapter_and_beside_none_of_it(seed, budgets):
    """Whatever is added, started, ended and taken away in between."""
    queue: FairQueue[tuple[str, int]] = FairQueue(
        lambda tenant: {"t0": 3.0, "t1": 0.5}.get(tenant, 1.0),
        lambda tenant: 500 if budgets and tenant != "t2" else None,
    )
    adapters = [f"t{number % 4}/a{number}" for number in range(8)]
    waiting: dict[str, list[int]] = defaultdict(list)
    busy: list[str] = []
    now_s, number = 0.0, 0
    for kind, *values in steps_of(random.Random(seed)):
        if kind in {"add", "forget"}:
            adapter = adapters[values[0]]
            figures = (
                JobFigures(adapter, values[1], values[2]) if kind == "add" else JobFigures(adapter, is_update=False)
            )
            queue.add((adapter, number), figures)
            waiting[adapter].append(number)
            number += 1
        elif kind == "start":
            updates, others, hold = values
            entry = queue.next(busy, now_s, updates=updates, others=others, hold=hold)
            startable = [adapter for adapter, numbers in waiting.items() if numbers and adapter not in busy]
            assert entry is not None or not startable or not (updates and others)
            if entry is not None:
                adapter, which = entry.job
                assert adapter in startable
                assert waiting[adapter].pop(0) == which
                assert updates if entry.figures.is_update else others
                queue.start(entry, now_s)
                busy.append(adapter)
        elif kind == "finish" and len(busy) > values[0]:
            busy.pop(values[0])
        elif kind == "wait":
            now_s += values[0]
        elif kind == "lose":
            lost = adapters[values[0]]
            queue.keep(lambda job, lost=lost: job[0] != lost)
            waiting.pop(lost, None)
        assert len(queue) == sum(map(len, waiting.values()))
        usage = queue.usage(now_s)
        assert sum(use.waiting for use in usage.values()) == sum(1 for entry in queue if entry.figures.is_update)
    while (entry := queue.next((), now_s)) is not None:
        adapter, which = entry.job
        assert waiting[adapter].pop(0) == which
        queue.start(entry, now_s)
    assert not any(waiting.values())
    assert len(queue) == 0


def test_one_tenant_is_served_by_the_age_of_the_oldest_example():
    queue: FairQueue[str] = FairQueue()
    ages = random.Random(0).sample(range(100), 40)
    for number, oldest_s in enumerate(ages):
        fill(queue, f"acme/{number}", 1, tokens=1 + number * 7, oldest_s=oldest_s)
    assert drain(queue) == [f"acme/{ages.index(oldest_s)}#0" for oldest_s in sorted(ages)]


def test_a_job_waits_for_the_running_job_of_its_adapter_and_others_go_on():
    queue: FairQueue[str] = FairQueue()
    fill(queue, "acme/a", 2, oldest_s=0)
    fill(queue, "acme/b", 1, oldest_s=5)
    first = start(queue)
    assert first is not None
    assert first.job == "acme/a#0"
    second = start(queue, busy=("acme/a",))
    assert second is not None
    assert second.job == "acme/b#0"
    assert queue.next(("acme/a", "acme/b"), 0) is None
    third = queue.next(("acme/b",), 0)
    assert third is not None
    assert third.job == "acme/a#1"


def test_only_the_first_job_of_an_adapter_can_start():
    queue: FairQueue[str] = FairQueue()
    queue.add("first", JobFigures("acme/a", 1))
    second = queue.add("second", JobFigures("acme/a", 1))
    with pytest.raises(ValueError, match="first waiting job of acme/a"):
        queue.start(second, 0)


@given(st.integers(1, 6), st.integers(20, 200), st.integers(1, 768), st.integers(1, 768), st.integers(1, 8), st.data())
def test_a_flood_delays_no_small_batch_of_another_tenant_by_more_than_one_pass(places, jobs_, big, small, others, data):
    """Other tenants publish now and then, at most as many at once as a pass has places: each is in the next pass."""
    queue: FairQueue[str] = FairQueue()
    flood(queue, "flood", jobs_, tokens=big)
    tenants = [f"tenant{number}" for number in range(min(others, places))]
    for round_number in range(12):
        one_pass(queue, places)  # this one runs while the small ones arrive
        fresh = data.draw(st.lists(st.sampled_from(tenants), unique=True))
        for tenant in fresh:  # the flood's examples are all older
            fill(queue, f"{tenant}/{round_number}", 1, tokens=min(small, big), oldest_s=1e6 + round_number)
        assert {f"{tenant}/{round_number}#0" for tenant in fresh} <= set(one_pass(queue, places))
        if len(queue) < jobs_ // 2:
            flood(queue, f"flood/{round_number}", jobs_, tokens=big)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_tenants_get_their_weights_in_the_long_run(weights, seed):
    """At any time two tenants that always wait differ by at most one job of each, in tokens per weight."""
    rng, largest = random.Random(seed), 768
    names = {f"t{number}": weight for number, weight in enumerate(weights)}
    queue: FairQueue[str] = FairQueue(names.__getitem__)
    served: Counter[str] = Counter()
    for name in names:
        for number in range(3):
            fill(queue, f"{name}/{number}", 1, tokens=rng.randint(1, largest))
    for number in range(400):
        entry = start(queue)
        assert entry is not None
        tenant = tenant_of(entry.adapter)
        served[tenant] += entry.figures.tokens
        fill(queue, f"{tenant}/{number}", 1, tokens=rng.randint(1, largest), oldest_s=number)
        for one, weight in names.items():
            for other, another in names.items():
                gap = abs(served[one] / weight - served[other] / another)
                assert gap <= largest / weight + largest / another + 1e-6


def test_a_tenant_gains_no_credit_for_the_time_in_which_it_was_idle():
    queue: FairQueue[str] = FairQueue()
    flood(queue, "late", 1)
    drain(queue)
    flood(queue, "steady", 200)
    for _ in range(100):
        start(queue)
    flood(queue, "late", 100)
    started = [entry.job.partition("/")[0] for _ in range(40) if (entry := start(queue)) is not None]
    assert Counter(started) == {"late": 20, "steady": 20}


def test_nothing_starves_behind_many_tenants_that_always_have_more():
    """A job waits for at most one turn of each other tenant, however old their examples are."""
    queue: FairQueue[str] = FairQueue()
    tenants = [f"t{number}" for number in range(30)]
    for tenant in tenants:
        flood(queue, tenant, 2, tokens=100)
    for _ in range(45):
        start(queue)
    fill(queue, "small/a", 1, tokens=100, oldest_s=1e9)
    for number in range(len(tenants) + 1):
        entry = start(queue)
        assert entry is not None
        if entry.job == "small/a#0":
            return
        fill(queue, f"{tenant_of(entry.adapter)}/{number}", 1)
    pytest.fail("one turn of each tenant is over")


def test_an_update_is_overtaken_by_examples_that_are_a_little_younger_only():
    """The head start of a large expected gain is bounded, so the oldest example of a tenant is learned at last."""
    queue: FairQueue[str] = FairQueue()
    queue.learned("acme/keen", 50.0)
    fill(queue, "acme/plain", 1, oldest_s=100)
    fill(queue, "acme/keen", 1, oldest_s=100 + MAX_HEAD_START_S - 1)
    assert drain(queue) == ["acme/keen#0", "acme/plain#0"]
    fill(queue, "acme/plain", 1, oldest_s=100)
    fill(queue, "acme/keen", 1, oldest_s=100 + MAX_HEAD_START_S + 1)
    assert drain(queue) == ["acme/plain#0", "acme/keen#0"]


def test_drift_goes_before_what_is_as_old_and_a_refusal_ends_the_head_start():
    queue: FairQueue[str] = FairQueue()
    queue.add("size", JobFigures("acme/size", 10, 50.0))
    queue.add("drift", JobFigures("acme/drift", 10, 55.0, drift_nats=0.5))
    assert drain(queue) == ["drift", "size"]
    queue.learned("acme/size", 0.4)
    for _ in range(6):
        queue.learned("acme/size", 0.0)
    queue.add("other", JobFigures("acme/other", 10, 50.0))
    queue.add("size", JobFigures("acme/size", 10, 51.0))
    assert drain(queue) == ["other", "size"]


def test_a_tenant_over_its_budget_waits_while_others_have_work_and_no_longer_than_an_hour():
    queue: FairQueue[str] = FairQueue(tokens_per_hour={"capped": 250, "free": None}.get)
    flood(queue, "capped", 10, oldest_s=0)
    flood(queue, "free", 3, oldest_s=1000)
    started = drain(queue, now_s=30.0)
    assert Counter(started[:6]) == {**{f"free/{n}#0": 1 for n in range(3)}, **{f"capped/{n}#0": 1 for n in range(3)}}
    assert all(job.startswith("capped") for job in started[6:]), "nobody else has work, so it goes on"
    assert queue.usage(40.0)["capped"] == (1000, 250, 0, True)
    flood(queue, "capped", 2, oldest_s=0)
    flood(queue, "free", 500, oldest_s=1000)
    for second in range(60, 3540, 60):
        entry = start(queue, second)
        assert entry is not None
        assert entry.job.startswith("free")
    assert queue.usage(3550.0)["capped"].over_budget
    entry = start(queue, HOUR_S + 60)
    assert entry is not None
    assert entry.job.startswith("capped"), "the hour is over, and its turn is long due"
    assert queue.usage(HOUR_S + 60)["capped"] == (100, 250, 1, False)


def test_a_job_larger_than_the_whole_budget_starts_when_the_hour_is_empty():
    queue: FairQueue[str] = FairQueue(tokens_per_hour=lambda tenant: 10 if tenant == "capped" else None)
    fill(queue, "capped/a", 2, tokens=5_000)
    flood(queue, "free", 100)
    assert "capped/a#0" in {entry.job for _ in range(2) if (entry := start(queue, 0.0)) is not None}
    assert all(entry.job.startswith("free") for _ in range(50) if (entry := start(queue, 600.0)) is not None)
    assert "capped/a#1" in {entry.job for _ in range(2) if (entry := start(queue, HOUR_S + 60)) is not None}


def test_tenants_over_their_budget_share_what_nobody_else_wants():
    queue: FairQueue[str] = FairQueue(tokens_per_hour=lambda _: 100)
    flood(queue, "a", 40)
    drain(queue, 0.0)
    flood(queue, "a", 40)
    for _ in range(20):
        start(queue, 1.0)
    flood(queue, "b", 20)
    started = [tenant_of(entry.adapter) for _ in range(20) if (entry := start(queue, 2.0)) is not None]
    assert started[0] == "b", "it is within its budget"
    assert Counter(started[1:]) == pytest.approx({"a": 10, "b": 10}, abs=1)


def test_a_job_that_forgets_is_held_back_neither_by_turns_nor_by_a_budget():
    queue: FairQueue[str] = FairQueue(tokens_per_hour=lambda tenant: 1 if tenant == "capped" else None)
    fill(queue, "capped/a", 1)
    drain(queue, 0.0)
    flood(queue, "free", 50)
    fill(queue, "capped/b", 2)
    wanted = forget(queue, "capped/b")
    started = [entry.job for _ in range(6) if (entry := start(queue, 1.0)) is not None]
    assert [job for job in started if job.startswith(("capped", "forget"))] == ["capped/b#0", "capped/b#1", wanted]
    assert started.index(wanted) <= 4, "every other start is its adapter's"


def test_a_flood_of_forgettings_leaves_every_other_start_to_updates():
    queue: FairQueue[str] = FairQueue()
    for number in range(20):
        forget(queue, f"acme/{number}")
    flood(queue, "globex", 10)
    started = [entry.job for _ in range(20) if (entry := start(queue)) is not None]
    assert sum(job.startswith("globex") for job in started) == 10
    assert len(drain(queue)) == 10


def test_a_flood_of_forgettings_leaves_a_whole_pass_to_updates_between_two_of_them():
    """With one update at a time, a thousand erasures of one tenant would end the passes of all others."""
    queue: FairQueue[str] = FairQueue(places=4)
    for number in range(3):
        forget(queue, f"acme/{number}")
    flood(queue, "globex", 6)
    kinds = ["forget" if job.startswith("forget") else "update" for job in drain(queue)]
    assert kinds == ["forget", *["update"] * 4, "forget", "update", "update", "forget"]


def test_an_update_before_a_forgetting_takes_no_turn_from_those_who_wait():
    """It starts early though its tenant has had much: tenants that come next are not sent behind what it had."""
    queue: FairQueue[str] = FairQueue()
    flood(queue, "steady", 6)
    fill(queue, "eager/a", 2, tokens=10_000)
    assert {tenant_of(entry.adapter) for _ in range(2) if (entry := start(queue)) is not None} == {"steady", "eager"}
    forget(queue, "eager/a")
    entry = start(queue)
    assert entry is not None
    assert entry.job == "eager/a#1"
    fill(queue, "new/a", 1)
    assert "new/a#0" in drain(queue)[:2], "the forgetting may come first, the flood may not"


def test_a_stream_of_short_updates_does_not_keep_a_forgetting_waiting():
    """It may start once what runs has ended; until then one update may start, as every other start is an update's."""
    queue: FairQueue[str] = FairQueue()
    flood(queue, "acme", 10)
    wanted = forget(queue, "globex/a")
    assert queue.next((), 0, others=False, hold=True) is None
    found = queue.next((), 0, others=False)
    assert found is not None
    assert found.job == "acme/0#0", "where all lanes are taken by long jobs, updates go on"
    first = start(queue)
    assert first is not None
    assert first.job == wanted
    forget(queue, "globex/b")
    second = queue.next((), 0, others=False, hold=True)
    assert second is not None
    queue.start(second, 0)
    assert queue.next((), 0, others=False, hold=True) is None
    third = queue.next((), 0, updates=False)
    assert third is not None
    assert third.job == "forget globex/b"


def test_an_update_that_may_not_start_does_not_hide_a_forgetting_that_may():
    queue: FairQueue[str] = FairQueue()
    fill(queue, "acme/a", 1)
    forget(queue, "acme/a")
    wanted = forget(queue, "globex/a")
    found = queue.next((), 0, updates=False)
    assert found is not None
    assert found.job == wanted


def test_a_pass_is_filled_with_updates_only():
    queue: FairQueue[str] = FairQueue()
    flood(queue, "acme", 5)
    forget(queue, "globex/a")
    assert one_pass(queue, 4) == ["forget globex/a"]
    forget(queue, "globex/b")
    assert len(one_pass(queue, 8)) == 5
    assert one_pass(queue, 8) == ["forget globex/b"]


def test_tenants_are_not_remembered_for_ever():
    queue: FairQueue[str] = FairQueue(tokens_per_hour=lambda _: 50)
    for number in range(4 * SWEEP_EVERY):
        fill(queue, f"tenant-{number}/a", 1)
        start(queue, number * 10.0)
    assert len(queue._tenants) <= SWEEP_EVERY + 2 * HOUR_S / 10
    assert len(queue.usage(1e9)) == 0


def test_the_figures_of_a_job_are_those_that_curate_wrote(tmp_path):
    job = jobs.update(DirectoryStore(tmp_path, fsync=False), 0, [tiny.document(0, "some text")], adapter="acme/a")
    found = figures_of(job)
    assert found == JobFigures("acme/a", 1, job.oldest_ms / 1000, 0.0)
    unknown = job.model_copy(update={"tokens": 0, "batch": BlobRef(digest="sha256:" + "0" * 64, size_bytes=800)})
    assert figures_of(unknown).tokens == 800 // BYTES_PER_TOKEN
    drift = DriftDetected(
        adapter="acme/a", signal="live_loss", detector="adwin", before=2.0, after=2.75, examples_seen=9,
        origin=tiny.origin(0),
    )  # fmt: skip
    assert figures_of(job.model_copy(update={"drift": drift})).drift_nats == 0.75
    other = drift.model_copy(update={"signal": "rating", "after": 9.0})
    assert figures_of(job.model_copy(update={"drift": other})).drift_nats == 0.0
    back = RollbackRequested(job_id="r", adapter="acme/a", requested_by="ann")
    erase = ForgetRequested(job_id="f", request_id="r", kind="erase", adapter="acme/a", until_ms=1, example_ids=["x"])
    assert figures_of(back) == figures_of(erase) == JobFigures("acme/a", is_update=False)
    assert datetime.fromtimestamp(found.oldest_s, UTC).year >= 2001
