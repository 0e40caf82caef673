"""Scoring: every example once, in order, under the base and the version that is live for its adapter."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
import torch

from perennial.learner.model.lora import Lora, LoraConfig, Tensors, to_safetensors
from perennial.learner.model.tokenization import ExampleTokenizer, example_rows
from perennial.learner.roles import scorer as scorer_module
from perennial.learner.roles.adapter_cache import NO_ADAPTER, AdapterCache, LiveAdapter
from perennial.learner.roles.scorer import Receiver, Scorer
from perennial.learner.together.measure_together import MeasuredRows, measure_together
from perennial.learner.training.personal.stacking import SharedPart, compose
from perennial.storage.errors import StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.registry import Registry
from perennial.streams.events.cloudevents import MAX_INSIDE_VALUE_BYTES, encode
from perennial.streams.events.models import ExampleAccepted, Origin
from perennial.streams.events.wire_error import WireError
from perennial.streams.kafka.group import ConsumedRecord
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.kafka.signing import RecordSigner
from perennial.streams.observe.metrics import Metrics
from perennial.streams.settings import Settings
from tests import tiny
from tests.versions import VersionPublisher

SETTINGS = Settings.of(rank=4, alpha=8, max_tokens=32, score_batch=2)
VERSION = "sha256:" + "a" * 64


def made(lock: object = None) -> Scorer:
    return Scorer(tiny.base(), SETTINGS, lock)  # type: ignore[arg-type]


def weights(scorer: Scorer, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in scorer.lora.shapes.items()}


def examples() -> list[ExampleAccepted]:
    texts = ("one short", "a text that is a good deal longer than one row of tokens can be", "x", "four of them")
    return [tiny.document(n, text, adapter=f"team/{n % 2}") for n, text in enumerate(texts)]


def test_each_adapters_examples_are_scored_under_its_own_live_version() -> None:
    scorer = made()
    live = {"team/0": LiveAdapter(VERSION, 3, weights(scorer, 1)), "team/1": NO_ADAPTER}
    scored = scorer.score(examples(), live)
    assert [event.example for event in scored] == examples()
    assert all(event.base_loss_nats for event in scored)
    assert [event.live_loss_nats is None for event in scored] == [False, True, False, True]
    assert [(event.live_version, event.live_generation) for event in scored] == [(VERSION, 3), (None, 0)] * 2
    assert all(event.live_loss_nats != event.base_loss_nats for event in scored)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch() -> None:
    scorer = made()
    live = {f"team/{n}": LiveAdapter(VERSION, 1, weights(scorer, n)) for n in range(2)}
    together = scorer.score(examples(), live)
    alone = [scorer.score([example], live)[0] for example in examples()]
    for one, other in zip(together, alone, strict=True):
        assert one.base_loss_nats == pytest.approx(other.base_loss_nats, rel=1e-5)
        assert one.live_loss_nats == pytest.approx(other.live_loss_nats, rel=1e-5)


def test_tokens_count_the_whole_example_though_its_head_alone_is_scored() -> None:
    long = tiny.document(1, "y" * 200)
    (event,) = made().score([long], {})
    assert event.tokens == 201
    (head,) = made().score([tiny.document(1, "y" * 31)], {})
    assert event.base_loss_nats == pytest.approx(head.base_loss_nats, rel=0.5)


def test_signals_pass_without_a_score() -> None:
    rating = tiny.document(1, "x").model_copy(update={"kind": "rating", "learn": False, "text": None, "rating": 1.0})
    empty = tiny.document(2, "x").model_copy(update={"text": None})
    for event in made().score([rating, empty], {}):
        assert (event.base_loss_nats, event.live_loss_nats, event.tokens) == (None, None, 0)
    assert made().score([], {}) == []


def test_a_version_whose_numbers_overflow_gives_no_loss() -> None:
    scorer = made()
    broken = {name: tensor * 1e30 for name, tensor in weights(scorer, 1).items()}
    (event,) = scorer.score(examples()[:1], {"team/0": LiveAdapter(VERSION, 1, broken)})
    assert event.live_loss_nats is None
    assert event.base_loss_nats is not None


def test_the_lock_is_given_back_between_forward_passes() -> None:
    held: list[int] = []

    class Lock:
        def __enter__(self) -> None:
            held.append(1)

        def __exit__(self, *_: object) -> None:
            held.append(-1)

    scorer = made(Lock())
    assert held == [1, -1], "a slot is put into a shared base under the lock"
    scorer.score(examples(), {})
    assert held == [1, -1] * 3


# ---- what is refused


class DeadLetters:
    """The producer's part that is used."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, str]] = []

    def send_dead_letter(self, record: ConsumedRecord, reason: str, _detail: str) -> None:
        self.sent.append((record.offset, reason))


class Origins:
    """Refuses offsets from 100 on; the broker does not answer the first question."""

    def __init__(self) -> None:
        self.asked = 0

    def errors(self, origins: list[Origin]) -> list[WireError | None]:
        self.asked += 1
        if self.asked == 1:
            raise KafkaUnavailableError
        return [WireError("implausible-origin", "beyond") if each.offset >= 100 else None for each in origins]


def record_of(offset: int, example: ExampleAccepted, signer: RecordSigner) -> ConsumedRecord:
    sent = encode(example, event_id="e", source="test", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    headers: list[tuple[str, bytes | None]] = [*signer.sign("examples", sent.key, sent.value, sent.headers)]
    return ConsumedRecord("examples", 0, offset, sent.key, sent.value, headers, 0)


def test_attack_b_no_record_ends_the_scorer_and_the_others_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "KAFKA_RETRY_S", 0.01)
    settings = SETTINGS.replace(internal_key="k" * 32)
    signer, dead = RecordSigner(settings), DeadLetters()

    def require(example: ExampleAccepted) -> None:
        if example.document_id == "doc-4":
            raise OverflowError("doc-4")

    receiver = Receiver(settings, dead, Origins(), require)  # type: ignore[arg-type]
    records = [record_of(n, tiny.document(n, "a text"), signer) for n in (0, 4, 5, 100)]
    records.append(replace(records[0], offset=6, headers=records[0].headers[:-1]))
    records.append(replace(records[0], offset=7, value=b"{"))
    large = tiny.document(8, "a text").model_copy(update={"subjects": ["s" * (MAX_INSIDE_VALUE_BYTES - 1000)]})
    records.append(record_of(8, large, signer))
    accepted = receiver.accept(records, threading.Event())
    assert accepted is not None
    assert [example.document_id for example, _ in accepted] == ["doc-0", "doc-5"]
    assert dead.sent == [
        (4, "internal-error"), (6, "bad-signature"), (7, "bad-signature"), (8, "bad-field"), (100, "implausible-origin")
    ]  # fmt: skip


def test_case_26_an_example_whose_scored_event_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record leaves fields to their defaults, which the scored event writes out: sending it ended the role."""
    sent = record_of(0, tiny.document(0, "a text"), RecordSigner(SETTINGS))
    lean = {name: value for name, value in orjson.loads(sent.value or b"").items() if value not in (None, [], False)}
    record = replace(sent, value=orjson.dumps(lean | {"learn": True}))
    limit = len(sent.value or b"") - 10
    assert len(record.value or b"") < limit
    monkeypatch.setattr(scorer_module, "MAX_INSIDE_VALUE_BYTES", limit + scorer_module.MAX_SCORE_BYTES)
    dead, origins = DeadLetters(), Origins()
    accepted = Receiver(SETTINGS, dead, origins, lambda _: None).accept([record], threading.Event())  # type: ignore[arg-type]
    assert (accepted, dead.sent) == ([], [(0, "oversize")])


def test_a_scorer_that_is_to_stop_does_not_wait_for_kafka() -> None:
    stop = threading.Event()
    stop.set()
    receiver = Receiver(SETTINGS, DeadLetters(), Origins(), lambda _: None)  # type: ignore[arg-type]
    assert receiver.accept([record_of(0, tiny.document(0, "x"), RecordSigner(SETTINGS))], stop) is None


# ---- live versions


class Store:
    """A directory store that can be told to be away."""

    def __init__(self, root: Path) -> None:
        self._inner = DirectoryStore(root, fsync=False)
        self.away = threading.Event()

    def __getattr__(self, name: str) -> object:
        if self.away.is_set() and name in {"get", "exists"}:
            raise StoreUnavailableError("away")
        return getattr(self._inner, name)


def live_weights(store: ObjectStore, scorer: Scorer, clock: list[float]) -> AdapterCache:
    from datetime import UTC, datetime

    registry = Registry(store, nonce=lambda: "n", now=lambda: datetime.now(UTC))
    return AdapterCache(
        registry, "live", scorer.lora.base.digest, scorer.lora.config, scorer.lora.shapes,
        poll_s=5.0, clock=lambda: clock[0], metrics=Metrics("scorer"),
    )  # fmt: skip


def test_live_versions_are_followed_and_a_store_that_is_away_gives_none(tmp_path: Path) -> None:
    scorer = made()
    store, clock = Store(tmp_path), [0.0]
    line = VersionPublisher(store, base_sha256=scorer.lora.base.digest)  # type: ignore[arg-type]
    with live_weights(store, scorer, clock) as live:  # type: ignore[arg-type]
        assert live.get(["acme/support"], 5)["acme/support"] == NO_ADAPTER
        state = line.publish(to_safetensors(weights(scorer, 1)), rank=4, alpha=8)
        assert live.get(["acme/support"], 5)["acme/support"] == NO_ADAPTER, "read again before poll_s"
        clock[0] += 6
        assert eventually(live, state.version).generation == 1
        second = line.publish(to_safetensors(weights(scorer, 2)), rank=4, alpha=8)
        clock[0] += 6
        assert eventually(live, second.version).generation == 2
        store.away.set()
        clock[0] += 6
        assert eventually(live, None) == NO_ADAPTER
        store.away.clear()
        clock[0] += 6
        assert eventually(live, second.version).state is not None


def test_a_version_for_another_base_is_not_loaded(tmp_path: Path) -> None:
    scorer = made()
    store = DirectoryStore(tmp_path, fsync=False)
    VersionPublisher(store, base_sha256="sha256:" + "b" * 64).publish(
        to_safetensors(weights(scorer, 1)), rank=4, alpha=8
    )
    with live_weights(store, scorer, [0.0]) as live:
        assert live.get(["acme/support"], 5)["acme/support"] == NO_ADAPTER


def eventually(live: AdapterCache, version: str | None) -> LiveAdapter:
    import time

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = live.get(["acme/support"], 1)["acme/support"]
        if found.version == version:
            return found
        time.sleep(0.02)
    raise TimeoutError(f"never saw {version}")


def test_an_adapter_that_extends_another_is_scored_as_it_is_served(tmp_path: Path) -> None:
    scorer, store, clock = made(), DirectoryStore(tmp_path, fsync=False), [0.0]
    digest, own = scorer.lora.base.digest, LoraConfig(4, 8)
    tenant = VersionPublisher(store, base_sha256=digest)
    user = VersionPublisher(store, "acme/support/zoe", base_sha256=digest, extends="acme/support")
    parts = [weights(scorer, seed) for seed in range(3)]
    of_user = user.publish(to_safetensors(parts[0]), rank=4, alpha=8)
    example = tiny.document(1, "what is asked", adapter="acme/support/zoe")
    losses = []
    with live_weights(store, scorer, clock) as live:
        for shared in (None, *parts[1:]):
            if shared is not None:
                tenant.publish(to_safetensors(shared), rank=4, alpha=8)
            clock[0] += 6

            want = parts[0] if shared is None else compose(SharedPart(own, shared), parts[0], own)
            found = eventually_with(live, user.adapter, want)
            (event,) = scorer.score([example], {user.adapter: found})
            assert (event.live_version, event.live_generation) == (of_user.version, 1)
            losses.append(event.live_loss_nats)
            slot = Lora(scorer.lora.base, found.config or own, f"other-{len(losses)}")
            rows = example_rows(example, ExampleTokenizer(scorer.lora.base.tokenizer), 32, None)[:1]
            (nats,) = measure_together(slot, [MeasuredRows(found.state, rows)], 2)
            assert event.live_loss_nats == pytest.approx(float(nats[0].mean()), rel=1e-5)
    assert len(set(losses)) == 3


def eventually_with(live: AdapterCache, adapter: str, want: Tensors) -> LiveAdapter:
    """Wait until the adapter's live weights are exactly these."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = live.get([adapter], 1)[adapter]
        if found.state is not None and all(torch.equal(found.state[name], tensor) for name, tensor in want.items()):
            return found
        time.sleep(0.02)
    raise TimeoutError(f"never saw these weights of {adapter}")


def test_a_damaged_shared_version_leaves_its_users_measured_alone(tmp_path: Path) -> None:
    scorer, store = made(), DirectoryStore(tmp_path, fsync=False)
    digest = scorer.lora.base.digest
    shared = VersionPublisher(store, base_sha256=digest).publish(to_safetensors(weights(scorer, 1)), rank=4, alpha=8)
    user = VersionPublisher(store, "acme/support/zoe", base_sha256=digest, extends="acme/support")
    user.publish(to_safetensors(weights(scorer, 2)), rank=4, alpha=8)
    blob = blob_key(user.registry.manifest("acme/support", shared.version).weights.digest)
    store.delete(blob)
    store.put_if_absent(blob, b"no tensors")
    with live_weights(store, scorer, [0.0]) as live:
        assert eventually_with(live, user.adapter, weights(scorer, 2)).config is None


def test_an_unchanged_adapter_reads_no_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, store = made(), DirectoryStore(tmp_path, fsync=False)
    digest = scorer.lora.base.digest
    VersionPublisher(store, base_sha256=digest).publish(to_safetensors(weights(scorer, 1)), rank=4, alpha=8)
    user = VersionPublisher(store, "acme/support/zoe", base_sha256=digest, extends="acme/support")
    user.publish(to_safetensors(weights(scorer, 2)), rank=4, alpha=8)
    cache = live_weights(store, scorer, [0.0])
    read: list[str] = []
    get = store.get
    monkeypatch.setattr(store, "get", lambda key, *more: read.append(key) or get(key, *more))
    first = cache._read(user.adapter, NO_ADAPTER)
    assert len([key for key in read if key.startswith("blobs/")]) == 2
    read.clear()
    assert cache._read(user.adapter, first) == first
    assert {key.partition("/")[0] for key in read} == {"aliases"}
