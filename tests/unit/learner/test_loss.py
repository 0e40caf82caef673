"""Losses: independent of padding and batching, over trained tokens only, and with less memory than hoped for."""

from __future__ import annotations

import pytest
import torch

from perennial.learner.model import loss as loss_module
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import mean_nats, row_losses, token_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from tests import tiny


def fresh() -> tuple[Lora, list[TokenRow]]:
    make_deterministic(1)
    lora = Lora(tiny.base(), LoraConfig(4, 8))
    codec = ExampleTokenizer(lora.base.tokenizer)
    texts = ("the cat sat on the mat", "a dog ran after the cat and sat", "mats are for cats")
    return lora, [row for text in texts for row in text_rows(text, codec, 16)]


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
        loss_module.within_memory(broken, [TokenRow((0, 1, 1))] * 4, 4)
    assert tries == [4]
