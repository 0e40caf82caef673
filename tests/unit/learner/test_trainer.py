"""Training: repeatable to the byte, moments carried on, loss over tokens, and memory that runs out."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.learner.model.loss import OutOfMemoryError, token_losses, training_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.training import trainer as training
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
    result = train(lora, lora.initial_weights("a", 0), None, [rows[:3], rows[3:], rows], PLAN)
    return digest_of(to_safetensors(result.weights)), digest_of(to_safetensors(result.optimizer))


def test_training_lowers_the_loss_on_what_it_is_trained_on() -> None:
    lora, rows = fresh()
    result = train(lora, lora.initial_weights("a", 0), None, [rows] * 20, PLAN)
    assert result.losses[-1] < result.losses[0] - 0.2
    assert result.tokens == 20 * sum(row.tokens for row in rows)
    assert steps_taken(result.optimizer) == 20


@pytest.mark.slow(15)
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
    train(lora, lora.initial_weights("b", 9), None, [rows] * 3, PLAN)
    assert digests(lora, rows) == first


def test_case_12_each_optimizer_step_is_reported_and_changes_no_bit() -> None:
    """One large document trains for minutes: the caller hears of every step, outside the lock on the base."""
    lora, rows = fresh()
    schedule, lock, free = [rows[:3], rows[3:], rows], threading.Lock(), []
    state = lora.initial_weights("a", 0)
    result = train(lora, state, None, schedule, PLAN, lock, on_step=lambda: free.append(not lock.locked()))
    assert free == [True] * 3
    assert (digest_of(to_safetensors(result.weights)), digest_of(to_safetensors(result.optimizer))) == digests(
        lora, rows
    )


def test_moments_are_carried_on() -> None:
    lora, rows = fresh()
    whole = train(lora, lora.initial_weights("a", 0), None, [rows[:4], rows[4:], rows], PLAN)
    half = train(lora, lora.initial_weights("a", 0), None, [rows[:4]], PLAN)
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
    state = lora.initial_weights("a", 0)
    lora.load(state)
    lora.select()
    with torch.no_grad():
        nats = [token_losses(lora.model, [row], torch.device("cpu"), 2) for row in (long, short)]
    expected = float(torch.cat(nats).mean())
    result = train(lora, state, None, [[long, short]], PLAN)
    assert result.losses[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(torch.stack([n.mean() for n in nats]).mean())) > 1e-4


@pytest.mark.parametrize("like_base", [False, True])
def test_packed_rows_train_as_padded_ones(monkeypatch: pytest.MonkeyPatch, like_base: bool) -> None:
    """Rows one behind the other see nothing of each other: the step is the same but for the last bits."""
    lora, _ = fresh()
    rows = [TokenRow(tuple(range(3, 3 + length)), train_from=2) for length in (16, 5, 6, 15, 5)]
    rows[-1] = replace(rows[-1], like_base=like_base)
    start = train(lora, lora.initial_weights("a", 0), None, [rows] * 4, PLAN).weights
    padded = train(lora, start, None, [rows], PLAN)
    passes: list[list[int]] = []

    def watched(slot: Lora, together: list[TokenRow], *rest: object, packed: bool) -> object:
        assert packed
        passes.append([len(row.ids) for row in together])
        return training_losses(slot, together, *rest, packed=packed)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "training_losses", watched)
    packed = train(lora, start, None, [rows], replace(PLAN, packed_tokens=20))
    assert passes == ([[5, 6], [15], [16], [5]] if like_base else [[5, 5, 6], [15], [16]])
    assert packed.losses == pytest.approx(padded.losses, rel=1e-5)
    assert packed.norms == pytest.approx(padded.norms, rel=1e-4)
    assert packed.norms[0] > 1e-3, "nothing was trained, so nothing was compared"


def test_a_model_that_mixes_packed_rows_gets_padded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent model, or an attention that ignores the mask, would carry one row into the next."""
    lora, rows = fresh()
    forward = type(lora.model.base_model).forward

    def ignores_the_mask(self: object, *args: object, **options: object) -> object:
        options.pop("attention_mask", None)
        options.pop("position_ids", None)
        return forward(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lora.model.base_model), "forward", ignores_the_mask)
    start = lora.initial_weights("a", 0)
    padded = train(lora, start, None, [rows], PLAN)
    asked_to_pack = train(lora, start, None, [rows], replace(PLAN, packed_tokens=1_000))
    assert lora.model._packs_rows is False
    assert to_safetensors(asked_to_pack.weights) == to_safetensors(padded.weights)


def test_rows_like_the_base_are_trained_towards_its_predictions() -> None:
    """Where the slot predicts as the base does there is nothing to train; after that the rows pull it back."""
    lora, rows = fresh()
    like_base = [replace(row, like_base=True) for row in rows]
    start = lora.initial_weights("a", 0)
    still = train(lora, start, None, [like_base], PLAN)
    assert still.losses == pytest.approx([0.0], abs=1e-6)
    assert still.norms == pytest.approx([0.0], abs=1e-6)
    moved = train(lora, start, None, [rows] * 6, PLAN)
    back = train(lora, moved.weights, None, [like_base] * 6, PLAN)
    assert back.losses[-1] < back.losses[0] / 2, "the slot did not come back to the base"
    heavier = train(lora, moved.weights, None, [like_base], replace(PLAN, like_base_weight=3.0))
    assert heavier.losses[0] == pytest.approx(3 * back.losses[0], rel=1e-5)


def test_both_kinds_of_rows_count_by_their_own_tokens() -> None:
    lora, rows = fresh()
    moved = train(lora, lora.initial_weights("a", 0), None, [rows] * 4, PLAN).weights
    long, short = rows[0], replace(rows[1], like_base=True)
    as_text, like_base, both = (
        train(lora, moved, None, [step], PLAN).losses[0] for step in ([long], [short], [long, short])
    )
    assert both == pytest.approx(as_text + like_base, rel=1e-5)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, rows = fresh()
    tight = TrainConfig(learning_rate=1e-3, clip_norm=1e-3, pad=2)
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        seen.append(float(torch.stack([p.grad.norm() for p in lora.parameters.values()]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    result = train(lora, lora.initial_weights("a", 0), None, [rows] * 2, tight)
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
    first = train(lora, lora.initial_weights("a", 0), None, [rows] * 3, plan)
    train(lora, first.weights, first.optimizer, [rows] * 3, plan)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_where_memory_runs_out_fewer_rows_go_at_once_and_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora, rows = fresh()
    want = train(lora, lora.initial_weights("a", 0), None, [rows], PLAN)
    widths: list[int] = []

    def small(slot: Lora, batch: list[TokenRow], *args: object, packed: bool) -> object:
        widths.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return training_losses(slot, batch, *args, packed=packed)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "training_losses", small)
    got = train(lora, lora.initial_weights("a", 0), None, [rows], PLAN)
    assert max(widths) == min(len(rows), PLAN.micro_rows)
    for name, tensor in want.weights.items():
        torch.testing.assert_close(got.weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_row_that_never_fits_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, rows = fresh()

    def full(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "training_losses", full)
    with pytest.raises(OutOfMemoryError, match="PERENNIAL_ROW_TOKENS"):
        train(lora, lora.initial_weights("a", 0), None, [rows], PLAN)


def test_a_foreign_optimizer_state_is_refused() -> None:
    lora, rows = fresh()
    result = train(lora, lora.initial_weights("a", 0), None, [rows], PLAN)
    other = Lora(tiny.base(), LoraConfig(2, 8))
    with pytest.raises(IntegrityError, match="another adapter"):
        optimizer_from_bytes(to_safetensors(result.optimizer), other.shapes)
