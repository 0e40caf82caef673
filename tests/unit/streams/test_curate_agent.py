"""The curate agent without a broker: conflicts with another process, quarantine, and how long an example waits."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from kafka import TopicPartition

from perennial.storage.errors import ConflictError, IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob, put_blob
from perennial.storage.registry.pending_deletes import list_pending_deletes
from perennial.storage.registry.quarantine import (
    QuarantineEntry,
    ensure_text_key,
    load_quarantine,
    quarantine_key,
    update_quarantine,
)
from perennial.storage.registry.refused_examples import add_refused_examples, load_refused_examples, refused_key
from perennial.storage.registry.waiting_jobs import list_jobs, load_job
from perennial.streams.curate import agent as curate
from perennial.streams.curate import cut_store
from perennial.streams.curate.agent import CurateAgent
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cut_store import Cutting, cutting_key
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.cloudevents import encode
from perennial.streams.events.models import Batch, BlobRef, ExampleAccepted, ExampleScored, Origin, UpdateRequested
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.observe.metrics import Metrics
from perennial.streams.retention.quarantine_filter import QuarantineFilter, text_hash
from perennial.streams.settings import Settings

ADAPTER = "acme/a"
DAY_S = 86_400


class App:
    """The parts of a Faust application that curate uses; it records what is sent."""

    consumer_generation_id = 1

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.records: list[tuple[bytes | None, bytes | None]] = []
        self.headers: list[list[tuple[str, bytes]]] = []
        self.producer = self

    async def send_and_wait(self, topic: str, key, value, _partition, _timestamp, headers) -> None:
        self.sent.append(topic)
        self.records.append((key, value))
        self.headers.append(headers)


def example(number: int, adapter: str = ADAPTER) -> ExampleAccepted:
    return ExampleAccepted(
        adapter=adapter, example_id=f"{number:032x}"[::-1], kind="document", document_id=f"d{number}", learn=True,
        text=f"text {number}",
        origin=Origin(cluster_id="c", topic="documents", topic_id="t", partition=0, offset=number, timestamp_ms=number),
    )  # fmt: skip


def delivery(
    number: int, acknowledged: list[int] | None = None, offset: int | None = None, adapter: str = ADAPTER
) -> SimpleNamespace:
    return delivery_of(example(number, adapter), acknowledged, number if offset is None else offset)


def delivery_of(given: ExampleAccepted, acknowledged: list[int] | None, offset: int) -> SimpleNamespace:
    event = ExampleScored(example=given, tokens=1, base_loss_nats=3.0, live_loss_nats=3.0)
    return delivery_of_scored(event, acknowledged, offset)


def delivery_of_scored(event: ExampleScored, acknowledged: list[int] | None, offset: int) -> SimpleNamespace:
    record = encode(event, event_id=event.example.example_id, source="test", occurred_at=curate._now())
    message = SimpleNamespace(
        generation_id=1, tp=TopicPartition("scored-examples", 0), offset=offset,
        partition=0, key=record.key, value=record.value, headers=record.headers,
    )  # fmt: skip
    return SimpleNamespace(message=message, ack=lambda: acknowledged is None or acknowledged.append(message.offset))


@pytest.fixture
def given(tmp_path):
    settings = Settings.of(max_age_s=0.05, env_file=None)
    store, app = DirectoryStore(tmp_path, fsync=False), App()
    return CurateAgent(app, settings, Metrics("curate"), store), app, store


def test_a_clock_that_is_set_back_keeps_no_example_waiting(given, monkeypatch):
    agent, app, _ = given
    real_ns = curate.time.time_ns

    async def scenario() -> None:
        await agent.receive(delivery(1))
        monkeypatch.setattr(curate.time, "time_ns", lambda: real_ns() - DAY_S * 1_000_000_000)
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["adapter-jobs"]


def test_an_adapter_whose_few_tokens_wait_longer_holds_no_other_up(given, monkeypatch):
    _, app, store = given
    clock = [1_000]
    monkeypatch.setattr(curate, "_monotonic_ms", lambda: clock[0])
    agent = CurateAgent(app, Settings.of(max_age_s=30, min_batch_tokens=2, env_file=None), Metrics("curate"), store)
    cut: list[list[str]] = []

    async def scenario() -> None:
        await agent.receive(delivery(1, adapter="acme/few"))
        for number in (2, 3):
            await agent.receive(delivery(number, adapter="acme/more"))
        for waited_ms in (29_999, 30_000, 119_999, 120_000):
            clock[0] = 1_000 + waited_ms
            await agent.tick()
            cut.append(learned(store))

    asyncio.run(scenario())
    assert cut == [[], ["d2", "d3"], ["d2", "d3"], ["d1", "d2", "d3"]]


def test_a_text_is_kept_out_for_good_by_an_erasure_behind_an_expiry(given):
    agent, _, store = given
    entries = [
        QuarantineEntry(
            request_id=kind, job_id=kind, kind=kind, selector={"document_ids": ["d1"]}, until_ms=1000,
            suppress=kind == "erase",
        )
        for kind in ("expire", "erase")
    ]  # fmt: skip
    for entry in entries:
        update_quarantine(store, ADAPTER, lambda quarantine, entry=entry: quarantine.with_entry(entry))

    async def scenario() -> None:
        await agent.receive(delivery(1))
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert load_quarantine(store, ADAPTER).keyed == [text_hash(example(1), ensure_text_key(store, ADAPTER))]


def another_process(store: DirectoryStore, max_age_s: float = 0.05) -> tuple[CurateAgent, App]:
    app = App()
    return CurateAgent(app, Settings.of(max_age_s=max_age_s, env_file=None), Metrics("curate"), store), app


def learned(store: DirectoryStore) -> list[str]:
    """Ids of the documents in all micro-batches that are stored, sorted."""
    bodies = [path.read_bytes() for path in (store.root / "blobs").rglob("*") if path.is_file()]
    return sorted(e.document_id for body in bodies for e in Batch.model_validate_json(body).examples)


def test_after_a_write_conflict_only_what_the_other_process_left_is_cut(given):
    """Two processes hold the partition; the slower one also got a redelivery of an example that the other has cut."""
    agent, app, store = given
    acknowledged: list[int] = []

    async def scenario() -> None:
        await agent.receive(delivery(1, acknowledged))
        other, other_app = another_process(store)
        for number in (1, 2):
            await other.receive(delivery(number))
        for number, offset in ((2, 2), (3, 3), (1, 4)):
            await agent.receive(delivery(number, acknowledged, offset))
        await asyncio.sleep(0.1)
        await other.tick()
        assert other_app.sent == ["adapter-jobs"]
        await agent.tick()
        assert acknowledged == [1, 2]
        assert app.sent == ["adapter-jobs"]  # the other process's job, once more: it may not have been published
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["adapter-jobs"] * 2
    assert acknowledged == [1, 2, 3, 4]
    assert learned(store) == ["d1", "d2", "d3"]


def test_conflicts_while_pending_examples_are_offered_again_end(given, monkeypatch):
    """Each cut of the reloaded adapter meets one more conflict; every example is still cut once, in order."""
    _, app, store = given
    settings = Settings.of(max_age_s=0.05, max_batch_examples=2, env_file=None)
    agent = CurateAgent(app, settings, Metrics("curate"), store)
    acknowledged: list[int] = []
    swap, conflicts = store.compare_and_swap, []

    def contested(key: str, data: bytes, etag: str | None) -> str:
        if key.startswith("state/curate/") and len(conflicts) < 5:
            conflicts.append(key)
            raise ConflictError
        return swap(key, data, etag)

    monkeypatch.setattr(store, "compare_and_swap", contested)

    async def scenario() -> None:
        for number in range(6):
            await agent.receive(delivery(number, acknowledged))

    asyncio.run(scenario())
    assert len(conflicts) == 5
    assert app.sent == ["adapter-jobs"] * 3
    assert acknowledged == [0, 1, 2, 3, 4, 5]
    assert learned(store) == [f"d{number}" for number in range(6)]


def test_an_evicted_adapter_leaves_no_example_behind(given):
    _, app, store = given
    agent = CurateAgent(app, Settings.of(max_adapters=1, max_age_s=60, env_file=None), Metrics("curate"), store)
    acknowledged: list[int] = []

    async def scenario() -> None:
        for number, adapter in enumerate(("acme/a", "acme/b", "acme/a")):
            await agent.receive(delivery(number, acknowledged, adapter=adapter))

    asyncio.run(scenario())
    assert app.sent == ["adapter-jobs"] * 2
    assert acknowledged == [0, 1]
    assert learned(store) == ["d0", "d1"]


def test_case_14_a_cut_stores_its_job_before_its_body(given):
    """Case 14: a job whose record Kafka loses or reorders is still found, so every cut leaves its job in the store."""
    agent, _, store = given

    async def scenario() -> None:
        for number in (1, 2):
            await agent.receive(delivery(number))
            await asyncio.sleep(0.1)
            await agent.tick()

    asyncio.run(scenario())
    assert list(list_jobs(store, ADAPTER)) == [0, 1]
    jobs = [UpdateRequested.model_validate_json(load_job(store, ADAPTER, cut).data) for cut in (0, 1)]
    bodies = [Batch.model_validate_json(get_blob(store, job.batch.digest)) for job in jobs]
    assert [[e.document_id for e in body.examples] for body in bodies] == [["d1"], ["d2"]]


@pytest.mark.parametrize("step", ["curate.job", "curate.blob"])
def test_a_job_that_was_not_committed_is_deleted_with_its_body(given, monkeypatch, step):
    agent, app, store = given

    class _KilledError(Exception):
        """Stands for the end of the process."""

    def dies(name: str) -> None:
        if name == step:
            raise _KilledError

    async def interrupted() -> None:
        await agent.receive(delivery(1))
        await asyncio.sleep(0.1)
        await agent.tick()

    with monkeypatch.context() as patched:
        patched.setattr(curate, "failpoint", dies)
        patched.setattr(cut_store, "failpoint", dies)
        with pytest.raises(_KilledError):
            asyncio.run(interrupted())
    left = UpdateRequested.model_validate_json(load_job(store, ADAPTER, 0).data)
    other, other_app = another_process(store)

    async def again() -> None:
        await other.receive(delivery(2))
        assert list(list_jobs(store, ADAPTER)) == []
        assert not store.exists(blob_key(left.batch.digest))
        await asyncio.sleep(0.1)
        await other.tick()

    asyncio.run(again())
    assert (app.sent, other_app.sent) == ([], ["adapter-jobs"])
    assert list(list_jobs(store, ADAPTER)) == [0]
    assert learned(store) == ["d2"]
    (record,) = list_pending_deletes(store, ADAPTER)  # the first process may still write its body: it must be findable
    assert (record.digests, record.refused) == ([left.batch.digest], True)


def test_a_body_that_an_earlier_release_left_behind_is_deleted(given):
    agent, _, store = given
    digest = put_blob(store, b"left behind")
    record = Cutting(cut=0, batch=BlobRef(digest=digest, size_bytes=11)).model_dump_json().encode()
    store.put_if_absent(cutting_key(ADAPTER), record)
    asyncio.run(agent.receive(delivery(1)))
    assert not store.exists(blob_key(digest))
    assert not store.exists(cutting_key(ADAPTER))


class Broken(MicroBatcher):
    """Fails for single examples: `offer` for d1, and every cut that holds d2."""

    def offer(self, scored, token, now_ms):
        offer = super().offer(scored, token, now_ms)
        if scored.example.document_id == "d1":
            raise OverflowError("d1")
        return offer

    def cut(self, now, reason, blocked=(), system_prompt=None):
        if any(example.document_id == "d2" for example in self.pending_examples):
            raise ValueError("d2")
        return super().cut(now, reason, blocked, system_prompt)


def test_attack_b_an_example_that_breaks_a_pure_function_goes_to_the_dead_letters_and_the_others_are_cut(
    given, monkeypatch
):
    agent, app, store = given
    monkeypatch.setattr("perennial.streams.curate.agent.MicroBatcher", Broken)
    monkeypatch.setattr("perennial.streams.curate.refusals.MicroBatcher", Broken)
    acknowledged: list[int] = []

    async def scenario() -> None:
        for number in range(5):
            await agent.receive(delivery(number, acknowledged))
        await asyncio.sleep(0.1)
        await agent.tick()
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["dead-letters"] * 2 + ["adapter-jobs"]
    assert [dict(headers)["perennial-reason"] for headers in app.headers[:2]] == [b"internal-error"] * 2
    assert [dict(headers)["perennial-detail"].split(b";")[0] for headers in app.headers[:2]] == [
        b"OverflowError", b"ValueError",
    ]  # fmt: skip
    assert acknowledged == [0, 1, 2, 3, 4]
    assert learned(store) == ["d0", "d3", "d4"]
    assert set(load_refused_examples(store, ADAPTER)) == {example(1).example_id, example(2).example_id}


def test_case_26_an_example_that_breaks_the_quarantines_filter_goes_to_the_dead_letters(given, monkeypatch):
    """The filter is asked before a cut, outside of what guarded the cut: one record ended the role at every restart."""
    agent, app, store = given
    entry = QuarantineEntry(request_id="r", job_id="r", kind="erase", selector={"document_ids": ["d2"]}, until_ms=1000)
    update_quarantine(store, ADAPTER, lambda quarantine: quarantine.with_entry(entry))
    blocks = QuarantineFilter.blocks

    def breaks(self: QuarantineFilter, each: ExampleAccepted) -> bool:
        if each.document_id == "d1":
            raise OverflowError("d1")
        return blocks(self, each)

    monkeypatch.setattr(QuarantineFilter, "blocks", breaks)
    acknowledged: list[int] = []

    async def scenario() -> None:
        for number in range(4):
            await agent.receive(delivery(number, acknowledged))
        await asyncio.sleep(0.1)
        await agent.tick()
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["dead-letters", "adapter-jobs"]
    assert dict(app.headers[0])["perennial-reason"] == b"internal-error"
    assert acknowledged == [0, 1, 2, 3]
    assert learned(store) == ["d0", "d3"]
    assert set(load_refused_examples(store, ADAPTER)) == {example(1).example_id}
    assert load_quarantine(store, ADAPTER).keyed == [text_hash(example(2), ensure_text_key(store, ADAPTER))]


def test_case_26_a_quarantine_that_cannot_be_read_is_no_examples_fault(given):
    agent, app, store = given
    store.put_if_absent(quarantine_key(ADAPTER), b"{")

    async def scenario() -> None:
        await agent.receive(delivery(1))
        await asyncio.sleep(0.1)
        await agent.tick()

    with pytest.raises(IntegrityError, match="quarantine"):
        asyncio.run(scenario())
    assert app.sent == []


@pytest.mark.parametrize("where", ["decode", "is_repeat"])
def test_case_26_an_example_that_breaks_curate_before_it_is_offered_goes_to_the_dead_letters(given, monkeypatch, where):
    agent, app, store = given
    acknowledged: list[int] = []
    decode, is_repeat = curate.decode, MicroBatcher.is_repeat

    def breaks_decode(value: bytes, headers: object, topic: str) -> object:
        if b"text 1" in value:
            raise RecursionError
        return decode(value, headers, topic)

    def breaks_is_repeat(self: MicroBatcher, each: ExampleAccepted) -> bool:
        if each.document_id == "d1":
            raise ValueError("d1")
        return is_repeat(self, each)

    if where == "decode":
        monkeypatch.setattr(curate, "decode", breaks_decode)
    else:
        monkeypatch.setattr(MicroBatcher, "is_repeat", breaks_is_repeat)

    async def scenario() -> None:
        for number in range(3):
            await agent.receive(delivery(number, acknowledged))
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["dead-letters", "adapter-jobs"]
    assert dict(app.headers[0])["perennial-reason"] == b"internal-error"
    assert acknowledged == [0, 1, 2]
    assert learned(store) == ["d0", "d2"]


def test_case_26_an_example_that_is_too_large_once_its_defaults_are_written_out_can_be_refused(given, monkeypatch):
    """Refusing it failed, so the role ended at every restart."""
    agent, app, _ = given
    deliveries = [delivery(number, None, offset) for offset, number in enumerate((5, 3))]  # the second is out of order
    limit = len(deliveries[1].message.value) - 20
    for each in deliveries:
        fields = json.loads(each.message.value)
        fields["example"] = {name: value for name, value in fields["example"].items() if value not in (None, [], False)}
        each.message.value = json.dumps(fields, separators=(",", ":")).encode()
        assert len(each.message.value) < limit
    monkeypatch.setattr("perennial.streams.events.cloudevents.MAX_INSIDE_VALUE_BYTES", limit)

    async def scenario() -> None:
        for each in deliveries:
            await agent.receive(each)

    asyncio.run(scenario())
    assert app.sent == ["dead-letters"]
    assert dict(app.headers[0])["perennial-reason"] == b"out-of-order"
    assert b'"text 3"' in app.records[0][1]


class Plausible:
    """Refuses offsets from 100 on; the broker does not answer the first question."""

    def __init__(self) -> None:
        self.asked = 0

    def is_known(self, origin: Origin) -> bool:
        return False

    def mark_problem(self, partition: str, position: tuple[int, int]) -> str | None:
        return "beyond" if position[1] >= 100 else None

    def error(self, origin: Origin) -> WireError | None:
        self.asked += 1
        if self.asked == 1:
            raise KafkaUnavailableError
        return WireError("implausible-origin", "beyond") if origin.offset >= 100 else None


def test_attack_a_a_forged_offset_moves_no_mark_and_what_follows_is_learned(given, monkeypatch):
    _, app, store = given
    monkeypatch.setattr("perennial.streams.curate.origin_guard.KAFKA_RETRY_S", 0.01)
    settings = Settings.of(max_age_s=0.05, env_file=None)
    agent = CurateAgent(app, settings, Metrics("curate"), store, origins=Plausible())
    acknowledged: list[int] = []

    async def scenario() -> None:
        await agent.receive(delivery(1, acknowledged))
        await agent.receive(delivery(10**12, acknowledged, offset=2))
        await agent.receive(delivery(2, acknowledged, offset=3))
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["dead-letters", "adapter-jobs"]
    assert dict(app.headers[0])["perennial-reason"] == b"implausible-origin"
    assert acknowledged == [1, 2, 3]
    assert learned(store) == ["d1", "d2"]


def test_attack_c_what_is_delivered_out_of_order_is_refused_and_may_be_published_again(given):
    agent, app, store = given
    acknowledged: list[int] = []

    async def scenario() -> None:
        for offset, number in enumerate((5, 3, 6, 5)):
            await agent.receive(delivery(number, acknowledged, offset=offset))
        await asyncio.sleep(0.1)
        await agent.tick()
        await agent.receive(delivery(4, acknowledged, offset=4))

    asyncio.run(scenario())
    assert app.sent == ["dead-letters", "adapter-jobs", "dead-letters"]
    assert [dict(app.headers[n])["perennial-reason"] for n in (0, 2)] == [b"out-of-order"] * 2
    assert acknowledged == [0, 1, 2, 3, 4]
    assert learned(store) == ["d5", "d6"]
    assert set(load_refused_examples(store, ADAPTER)) == {example(3).example_id, example(4).example_id}


@pytest.mark.parametrize(("refused_ms", "wanted"), [(2, ["d1", "d1"]), (4, ["d1"]), (None, ["d1"])])
def test_case_20_what_was_refused_is_learned_when_it_is_published_again_beyond_intakes_window(
    given, refused_ms, wanted
):
    """The repeat at time 3 is a duplicate, unless the first was refused before."""
    agent, _, store = given
    again = example(1).model_copy(update={"origin": example(3).origin})

    async def scenario() -> None:
        await agent.receive(delivery(1))
        await asyncio.sleep(0.1)
        await agent.tick()
        if refused_ms is not None:
            add_refused_examples(store, ADAPTER, [example(1).example_id], refused_ms)
        await agent.receive(delivery_of(again, None, 2))
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert learned(store) == wanted


def test_case_20_an_unreadable_list_of_refused_examples_does_not_end_curate(given):
    """A repeat then counts as a duplicate, as it does at intake."""
    agent, _, store = given
    acknowledged: list[int] = []
    again = example(1).model_copy(update={"origin": example(3).origin})

    async def scenario() -> None:
        await agent.receive(delivery(1, acknowledged))
        await asyncio.sleep(0.1)
        await agent.tick()
        store.put_if_absent(refused_key(ADAPTER), b"{not json")
        await agent.receive(delivery_of(again, acknowledged, 2))
        await agent.receive(delivery(4, acknowledged, offset=3))
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert acknowledged == [1, 2, 3]
    assert learned(store) == ["d1", "d4"]


def test_only_examples_that_the_scorer_signed_are_cut_and_jobs_are_signed(given):
    _, app, store = given
    settings = Settings.of(max_age_s=0.05, internal_key="k" * 32, env_file=None)
    agent, signer = CurateAgent(app, settings, Metrics("curate"), store), RecordSigner(settings)

    async def scenario() -> None:
        unsigned, signed = delivery(1), delivery(2)
        message = signed.message
        message.headers = signer.sign("scored-examples", message.key, message.value, message.headers)
        await agent.receive(unsigned)
        await agent.receive(signed)
        await asyncio.sleep(0.1)
        await agent.tick()

    asyncio.run(scenario())
    assert app.sent == ["dead-letters", "adapter-jobs"]
    assert dict(app.headers[0])["perennial-reason"] == b"bad-signature"
    signer.verify("adapter-jobs", *app.records[1], app.headers[1])
    assert learned(store) == ["d2"]


@pytest.mark.parametrize("version", [1, 2])
def test_attack_k_a_mark_beyond_the_log_is_told_and_hides_nothing(given, caplog, version):
    """State of a release that took forged offsets: what its mark covers is refused, not acknowledged without a word."""
    _, app, store = given
    settings, metrics = Settings.of(max_age_s=0.05, env_file=None), Metrics("curate")
    batcher = MicroBatcher(ADAPTER, CutPolicy.of(settings))
    for number in (1, 10**12):
        event = ExampleScored(example=example(number), tokens=1, base_loss_nats=3.0, live_loss_nats=3.0)
        batcher.offer(event, number, 0)
    state = json.loads(batcher.cut(curate._now(), "age").state)
    if version == 1:
        state = {key: value for key, value in state.items() if key not in {"reach", "epochs"}} | {"version": 1}
    store.compare_and_swap(f"state/curate/{ADAPTER}", json.dumps(state).encode(), None)
    agent = CurateAgent(app, settings, metrics, store, origins=Plausible())
    acknowledged: list[int] = []

    async def scenario() -> None:
        for number in (1, 2):
            await agent.receive(delivery(number, acknowledged))

    asyncio.run(scenario())
    assert f"perennial marks repair {ADAPTER} --partition c/t/documents/0 --to-log-end" in caplog.text
    labels = {"role": "curate", "adapter": ADAPTER}
    assert metrics.registry.get_sample_value("perennial_wrong_high_water_marks", labels) == 1
    assert acknowledged == [1, 2]
    assert app.sent == ["adapter-jobs", "dead-letters"]  # d1 was cut before: its job is sent again; d2 never was
    assert dict(app.headers[1])["perennial-reason"] == b"out-of-order"
    assert set(load_refused_examples(store, ADAPTER)) == {example(2).example_id}
