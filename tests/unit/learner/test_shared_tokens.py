"""Documents that share most of their text: which are merged, and which of their tokens are still trained."""

from __future__ import annotations

import random

import pytest
import torch

from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import row_token_losses, training_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.training.thinning.shared_tokens import SHINGLE_TOKENS, FullDocuments
from perennial.learner.training.update_rows import split_rows
from tests import tiny
from tests.unit.learner.test_update import RECIPE, make

CODEC = ExampleTokenizer(tiny.tokenizer())
TICKET = "Ticket {}. The {} was repaired and the ticket was closed after {} hours."


def rows_of(text: str, row_tokens: int = 128) -> list[TokenRow]:
    return text_rows(text, CODEC, row_tokens)


def trained_text(rows: list[TokenRow]) -> str:
    return CODEC.tokenizer.decode([row.ids[place] for row in rows for place in row.trained_places])


def test_of_a_copy_only_its_own_values_are_trained() -> None:
    full = FullDocuments(0.5)
    first = full.thin("a", rows_of(TICKET.format(481, "router", 17)))
    copy = full.thin("b", rows_of(TICKET.format(902, "boiler", 36)))
    assert (first.into, copy.into) == (None, "a")
    assert first.rows == rows_of(TICKET.format(481, "router", 17))
    assert trained_text(copy.rows) == "902boil36"  # "er " is in "router was", too
    assert [row.ids for row in copy.rows] == [row.ids for row in rows_of(TICKET.format(902, "boiler", 36))]


@pytest.mark.parametrize(
    ("text", "into"),
    [
        ("Nothing of this is like the other document at all", None),
        (TICKET.format(481, "router", 17), "a"),
        ("No", None),
    ],
)
def test_only_documents_that_share_enough_are_merged(text: str, into: str | None) -> None:
    full = FullDocuments(0.5)
    full.thin("a", rows_of(TICKET.format(481, "router", 17)))
    found = full.thin("b", rows_of(text))
    assert found.into == into
    assert (sum(row.tokens for row in found.rows) > 0) is (into is None)


def test_a_document_is_merged_into_the_one_that_is_most_like_it() -> None:
    full = FullDocuments(0.3)
    full.thin("far", rows_of(TICKET.format(481, "router", 17)))
    full.thin("near", rows_of("Nobody knows when the parrot on the roof began to sing at noon."))
    assert full.thin("c", rows_of("Nobody knows when the parrot on the roof began to talk at noon.")).into == "near"


def test_every_token_is_trained_once_or_is_in_a_shingle_of_the_full_document_in_rows_of_any_length() -> None:
    rng = random.Random(3)
    for row_tokens in (8, 13, 128):
        texts = [
            TICKET.format(rng.randint(0, 999), rng.choice(["router", "tap"]), rng.randint(0, 48)) for _ in range(8)
        ]
        full, whole = FullDocuments(0.5), {}
        for name, text in enumerate(texts):
            rows = rows_of(text, row_tokens)
            ids = [*rows[0].ids, *(token for row in rows[1:] for token in row.ids[1:])]
            whole[str(name)] = {tuple(ids[n : n + SHINGLE_TOKENS]) for n in range(len(ids) - SHINGLE_TOKENS + 1)}
            found = full.thin(str(name), rows)
            stride = row_tokens - 1
            starts = {row.ids: n * stride for n, row in enumerate(rows)}
            trained = sorted(starts[row.ids] + place for row in found.rows for place in row.trained_places)
            assert len(set(trained)) == len(trained)
            shared = set() if found.into is None else whole[found.into]
            expected = [
                place
                for place in range(1, len(ids))
                if not any(
                    tuple(ids[n : n + SHINGLE_TOKENS]) in shared for n in range(max(0, place - 2), place + 1)
                )
            ]  # fmt: skip
            assert trained == expected


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_are_not_trained_have_no_part_in_any_loss(packed: bool) -> None:
    make_deterministic(1)
    lora = Lora(tiny.base(), LoraConfig(4, 8))
    whole, other = rows_of(TICKET.format(481, "router", 17))[0], rows_of("a text beside it")[0]
    skipped = (2, 3, 7, len(whole.ids) - 1)
    masked = TokenRow(whole.ids, skipped=skipped)
    kept = [place - 1 for place in range(1, len(whole.ids)) if place not in skipped]
    lora.select()
    with torch.no_grad():
        of_whole, _ = training_losses(lora, [whole], torch.device("cpu"), 2, packed=packed)
        of_masked, _ = training_losses(lora, [masked, other], torch.device("cpu"), 2, packed=packed)
    torch.testing.assert_close(of_masked[: len(kept)], of_whole[kept], rtol=1e-5, atol=1e-5)
    assert masked.tokens == len(kept)
    measured = row_token_losses(lora, [masked], pad=2, adapted=True)[0]
    torch.testing.assert_close(measured.float(), of_whole[kept], rtol=1e-5, atol=1e-5)


def test_held_out_copies_are_measured_in_full_and_trained_on_what_is_their_own() -> None:
    updater = make()
    examples = [tiny.document(n, TICKET.format(n * 111, "router", n)) for n in range(1, 9)]
    rows = [updater.rows(example) for example in examples]
    rng = random.Random(1)
    found = split_rows(examples, rows, updater.general, RECIPE, rng)
    (full,) = set(found.merged.values())
    assert found.merged.keys() == {example.example_id for example in examples} - {full}
    assert full in found.new_ids
    assert sum(row.tokens for row in found.held_out) > 2 * sum(row.tokens for row in found.closing) > 0
    of_new = sum(row.tokens for example, group in zip(examples, rows, strict=True) for row in group
                 if example.example_id in found.new_ids)  # fmt: skip
    assert found.saved == pytest.approx(1 - sum(row.tokens for row in found.new) / of_new)


def test_corrections_and_recipes_without_merging_are_trained_in_full() -> None:
    updater, rng = make(), random.Random(1)
    said = [tiny.correction(n, f"Who is on call in week {n}?", "Ada Lovelace is on call.") for n in range(6)]
    found = split_rows(said, [updater.rows(each) for each in said], updater.general, RECIPE, rng)
    assert not found.merged
    assert not any(row.skipped for row in (*found.new, *found.closing))
    alike = [tiny.document(n, TICKET.format(n, "router", n)) for n in range(6)]
    old = RECIPE.recorded({name: value for name, value in RECIPE.config().items() if name != "merge_share"})
    found = split_rows(alike, [updater.rows(each) for each in alike], updater.general, old, rng)
    assert (found.merged, found.saved, found.closing) == ({}, 0.0, found.held_out)
