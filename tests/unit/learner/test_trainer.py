"""Training: repeatable to the byte, moments carried on, loss over tokens, memory that runs out, replay and mixing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.learner.model import loss as loss_module
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.learner.model.loss import OutOfMemoryError, mean_nats, row_losses, token_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.training import trainer as training
from perennial.learner.training.replay_buffer import (
    BatchComposition,
    ReplayEntry,
    build_schedule,
    index_from_bytes,
    index_to_bytes,
    seeded_random,
    update_replay_index,
)
from perennial.learner.training.trainer import TrainConfig, optimizer_from_bytes, steps_taken, train
from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from tests import tiny

PLAN = TrainConfig(learning_rate=5e-3, clip_norm=1.0, pad=2, warmup_steps=2)
TEXTS = ("the cat sat on the mat", "a dog ran after the cat and sat", "mats are for cats")


def fresh() -> tuple[Lora, list[TokenRow]]:
    make_deterministic(1)
    lora = Lora(tiny.base(), LoraConfig(4, 8))
    codec = ExampleTokenizer(lora.base.tokenizer)
    return lora, [row for text in TEXTS for row in text_rows(text, codec, 16)]


def digests(lora: Lora, rows: list[TokenRow]) -> tuple[str, str]:
    result = train(lora, lora.init_state("a", 0), None, [rows[:3], rows[3:], rows], PLAN)
    return digest_of(to_safetensors(result.weights)), digest_of(to_safetensors(result.optimizer))


def test_training_lowers_the_loss_on_what_it_is_trained_on() -> None:
    lora, rows = fresh()
    result = train(lora, lora.init_state("a", 0), None, [rows] * 20, PLAN)
    assert result.losses[-1] < result.losses[0] - 0.2
    assert result.tokens == 20 * sum(row.tokens for row in rows)
    assert steps_taken(result.optimizer) == 20


def test_the_same_training_gives_the_same_bytes_in_two_processes() -> None:
    code = "from tests.unit.learner.test_trainer import digests, fresh; print(*digests(*fresh()))"
    root = Path(__file__).parents[3]
    out = {
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert out == {" ".join(digests(*fresh())) + "\n"}


def test_what_the_slot_held_before_leaves_no_trace() -> None:
    lora, rows = fresh()
    first = digests(lora, rows)
    train(lora, lora.init_state("b", 9), None, [rows] * 3, PLAN)
    assert digests(lora, rows) == first


def test_moments_are_carried_on() -> None:
    lora, rows = fresh()
    whole = train(lora, lora.init_state("a", 0), None, [rows[:4], rows[4:], rows], PLAN)
    half = train(lora, lora.init_state("a", 0), None, [rows[:4]], PLAN)
    stored = optimizer_from_bytes(to_safetensors(half.optimizer), lora.shapes)
    carried = train(lora, half.weights, stored, [rows[4:], rows], PLAN)
    dropped = train(lora, half.weights, None, [rows[4:], rows], PLAN)
    assert to_safetensors(carried.weights) == to_safetensors(whole.weights)
    assert to_safetensors(carried.optimizer) == to_safetensors(whole.optimizer)
    assert to_safetensors(dropped.weights) != to_safetensors(whole.weights)


def test_the_loss_is_divided_by_the_tokens_of_the_step_not_by_rows() -> None:
    lora, _ = fresh()
    codec = ExampleTokenizer(lora.base.tokenizer)
    long, short = text_rows("a long row of text", codec, 64)[0], text_rows("b", codec, 64)[0]
    state = lora.init_state("a", 0)
    lora.load(state)
    lora.select()
    with torch.no_grad():
        nats = [token_losses(lora.model, [row], torch.device("cpu"), 2) for row in (long, short)]
    expected = float(torch.cat(nats).mean())
    result = train(lora, state, None, [[long, short]], PLAN)
    assert result.losses[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(torch.stack([n.mean() for n in nats]).mean())) > 1e-4


def test_padding_and_batching_change_no_loss() -> None:
    lora, rows = fresh()
    together = row_losses(lora, rows, pad=2, adapted=False)
    alone = [row_losses(lora, [row], pad=2, adapted=False)[0] for row in rows]
    assert [loss.tokens for loss in together] == [row.tokens for row in rows]
    torch.testing.assert_close([loss.nats for loss in together], [loss.nats for loss in alone], rtol=1e-5, atol=1e-5)
    with torch.no_grad(), lora.disabled():
        logits = lora.model(input_ids=torch.tensor([rows[0].ids])).logits[0, :-1]
        whole = torch.nn.functional.cross_entropy(logits, torch.tensor(rows[0].ids[1:]), reduction="sum")
    assert together[0].nats == pytest.approx(float(whole), rel=1e-5)


def test_only_what_is_trainable_is_counted() -> None:
    lora, rows = fresh()
    row = rows[0]
    tail = TokenRow(row.ids, len(row.ids) - 3)
    assert row_losses(lora, [tail], pad=2, adapted=False)[0].tokens == 3
    assert mean_nats([]) == 0.0


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, rows = fresh()
    tight = TrainConfig(learning_rate=1e-3, clip_norm=1e-3, pad=2)
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        seen.append(float(torch.stack([p.grad.norm() for p in lora.parameters.values()]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    result = train(lora, lora.init_state("a", 0), None, [rows] * 2, tight)
    assert min(result.norms) > 1e-2
    assert max(seen) <= 1.01e-3


def test_the_rate_warms_up_once_in_an_adapters_life(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, rows = fresh()
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    plan = TrainConfig(learning_rate=1.0e-3, clip_norm=1.0, pad=2, warmup_steps=4)
    first = train(lora, lora.init_state("a", 0), None, [rows] * 3, plan)
    train(lora, first.weights, first.optimizer, [rows] * 3, plan)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_where_memory_runs_out_fewer_rows_go_at_once_and_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora, rows = fresh()
    want = train(lora, lora.init_state("a", 0), None, [rows], PLAN)
    widths: list[int] = []

    def small(model: object, batch: list[TokenRow], *args: object) -> torch.Tensor:
        widths.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return token_losses(model, batch, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "token_losses", small)
    got = train(lora, lora.init_state("a", 0), None, [rows], PLAN)
    assert max(widths) == min(len(rows), PLAN.micro_rows)
    for name, tensor in want.weights.items():
        torch.testing.assert_close(got.weights[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")]
)
def test_where_memory_runs_out_fewer_rows_are_measured_at_once_and_none_is_left_out(
    monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    lora, rows = fresh()
    want = row_losses(lora, rows, pad=2, adapted=False)
    widths: list[int] = []

    def small(model: object, batch: list[TokenRow], *args: object) -> torch.Tensor:
        widths.append(len(batch))
        if len(batch) > 2:
            raise full
        return token_losses(model, batch, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loss_module, "token_losses", small)
    got = row_losses(lora, rows, pad=2, adapted=False)
    assert widths[0] == len(rows) > 2
    assert max(widths[widths.index(2) :]) == 2, "what did not fit is not tried again"
    assert [loss.tokens for loss in got] == [loss.tokens for loss in want]
    torch.testing.assert_close([loss.nats for loss in got], [loss.nats for loss in want], rtol=1e-5, atol=1e-5)


def test_an_error_that_is_not_about_memory_is_not_tried_again() -> None:
    tries: list[int] = []

    def broken(count: int) -> None:
        tries.append(count)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        loss_module.within_memory(broken, [row(1)] * 4, 4)
    assert tries == [4]


def test_a_row_that_never_fits_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, rows = fresh()

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "token_losses", full)
    with pytest.raises(OutOfMemoryError, match="PERENNIAL_ROW_TOKENS"):
        train(lora, lora.init_state("a", 0), None, [rows], PLAN)


def test_a_foreign_optimizer_state_is_refused() -> None:
    lora, rows = fresh()
    result = train(lora, lora.init_state("a", 0), None, [rows], PLAN)
    other = Lora(tiny.base(), LoraConfig(2, 8))
    with pytest.raises(IntegrityError, match="another adapter"):
        optimizer_from_bytes(to_safetensors(result.optimizer), other.shapes)


kept_sets = st.sets(st.integers(min_value=0, max_value=10**6), max_size=40)


@settings(max_examples=80, deadline=None)
@given(kept_sets, kept_sets, st.integers(min_value=1, max_value=20), st.randoms())
def test_what_is_kept_depends_on_the_set_alone_and_deletion_is_exact(
    ids: set[int], gone: set[int], size: int, chance: object
) -> None:
    entries = [ReplayEntry(f"{number:032x}", f"batch-{number % 3}") for number in sorted(ids)]
    shuffled = list(entries)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    stepwise: tuple[ReplayEntry, ...] = ()
    for start in range(0, len(shuffled), 7):
        stepwise = update_replay_index(stepwise, shuffled[start : start + 7], size, seed=3)
    assert stepwise == update_replay_index((), entries, size, seed=3)
    assert index_from_bytes(index_to_bytes(stepwise)) == stepwise
    left = [kept for kept in entries if int(kept.example_id, 16) not in gone]
    # Whoever was kept and is not deleted stays: deleting moves nobody else out.
    survivors = {kept for kept in stepwise if kept in left}
    assert survivors <= set(update_replay_index((), left, size, seed=3))


def row(number: int) -> TokenRow:
    return TokenRow((0, number, 1))


def mixed(new: int, index: int, seed: int = 0, missing: frozenset[int] = frozenset()) -> list[tuple[TokenRow, ...]]:
    kept = [ReplayEntry(f"{number:032x}", "b") for number in range(index)]
    plan = build_schedule(
        [row(100 + number) for number in range(new)],
        kept,
        lambda entry: None if int(entry.example_id, 16) in missing else [row(10_000 + int(entry.example_id, 16))],
        lambda rng: row(90_000 + rng.randrange(9)),
        BatchComposition(steps=3, rows=10, replay_share=0.4, general_share=0.2),
        seeded_random("test", seed),
    )
    assert plan.replayed + plan.missing == 0 or index
    return list(plan.steps)


def shares(steps: list[tuple[TokenRow, ...]]) -> list[tuple[int, int, int]]:
    def count(step: tuple[TokenRow, ...], low: int, high: int) -> int:
        return sum(low <= r.ids[1] < high for r in step)

    return [(count(step, 100, 10_000), count(step, 10_000, 90_000), count(step, 90_000, 99_999)) for step in steps]


def test_a_step_is_mixed_as_the_shares_say() -> None:
    assert shares(mixed(new=12, index=50)) == [(4, 4, 2)] * 3


def test_every_new_row_is_trained_however_many_there_are() -> None:
    steps = mixed(new=45, index=50)
    assert {r.ids[1] for step in steps for r in step if r.ids[1] < 10_000} == set(range(100, 145))
    assert len(steps) == 12


def test_without_a_past_new_rows_take_the_place_of_replay() -> None:
    assert shares(mixed(new=30, index=0))[0] == (8, 0, 2)


def test_a_small_batch_is_not_drowned_by_replay() -> None:
    assert shares(mixed(new=1, index=50)) == [(1, 1, 1)] * 9


def test_the_schedule_follows_from_its_seed() -> None:
    assert mixed(new=12, index=50) == mixed(new=12, index=50)
    assert mixed(new=12, index=50) != mixed(new=12, index=50, seed=1)


def test_erased_rows_are_left_out_and_counted() -> None:
    kept = [ReplayEntry(f"{number:032x}", "b") for number in range(8)]
    plan = build_schedule(
        [row(100)], kept, lambda entry: None if entry.example_id.endswith("1") else [row(7)], lambda _: None,
        BatchComposition(steps=8, rows=2, replay_share=0.5, general_share=0.0), seeded_random(0),
    )  # fmt: skip
    assert plan.missing == 1
    assert plan.replayed == 7


@pytest.mark.parametrize("data", [b"", b"[1]", b'[{"batch": 1}]', b"{}", b"\xff"])
def test_a_damaged_replay_index_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        index_from_bytes(data)
