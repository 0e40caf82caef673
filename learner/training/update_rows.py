"""Split the rows of an update by what they are used for."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training import gate
from perennial.learner.training.measuring import MEASURED_ROWS, UpdateRows
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.thinning.shared_tokens import FullDocuments, ThinnedRows
from perennial.streams.events.models import ExampleAccepted


def split_rows(
    examples: Sequence[ExampleAccepted],
    rows: Sequence[Sequence[TokenRow]],
    general: GeneralText,
    recipe: Recipe,
    rng: Random,
) -> UpdateRows:
    """Hold examples out, draw what is measured, and merge documents that are alike.

    Args:
        examples: Examples of the micro-batch, at least one.
        rows: Rows of each example.
        general: General text, of which the anchors are drawn.
        recipe: What share is held out, how many anchors there are, and what is merged.
        rng: Random generator. The order of the draws (probe, anchors) is part of the recipe.
    """
    held_out = gate.hold_out([example.document_id for example in examples], recipe.held_out_share)
    first = [index for index in range(len(examples)) if index not in held_out]
    last = sorted(held_out)
    trained = _thinned(examples, rows, (*first, *last), recipe.merge_share)
    new, held_out_rows = ([row for index in of for row in rows[index]] for of in (first, last))
    thinned, closing = ([row for index in of for row in trained[index].rows] for of in (first, last))
    return UpdateRows(
        new=thinned,
        held_out=held_out_rows,
        # A batch too small to hold anything out is judged on rows that it trains.
        probe=[] if held_out else rng.sample(new, min(MEASURED_ROWS, len(new))),
        anchors=general.anchors(rng, recipe.anchor_rows),
        held_out_examples=len(held_out),
        corrected=frozenset(
            row
            for example, group in zip(examples, rows, strict=True)
            if example.kind == "correction"
            for row in group
        ),
        new_ids=[examples[index].example_id for index in first],
        closing=closing,
        saved=_saved(new, thinned),
        closing_saved=_saved(held_out_rows, closing),
        merged={
            examples[index].example_id: found.into for index, found in trained.items() if found.into is not None
        },
    )  # fmt: skip


def _thinned(
    examples: Sequence[ExampleAccepted], rows: Sequence[Sequence[TokenRow]], order: Sequence[int], merge_share: float
) -> dict[int, ThinnedRows]:
    """Return the rows to train of each example, by position: of a document that is merged, only what is its own.

    Corrections and turns are trained in full: what a person says twice is meant.

    Args:
        examples: The examples.
        rows: Their rows.
        order: Positions, in the order in which documents are compared: a held-out one is merged into one that is
            trained before it.
        merge_share: See `Recipe`.
    """
    full = FullDocuments(merge_share)
    return {
        index: full.thin(examples[index].example_id, rows[index])
        if merge_share > 0 and examples[index].kind == "document"
        else ThinnedRows(list(rows[index]))
        for index in order
    }


def _saved(rows: Sequence[TokenRow], thinned: Sequence[TokenRow]) -> float:
    """Return the share of the tokens of rows that are not trained; 0 where none are, for nothing makes up for that."""
    left = sum(row.tokens for row in thinned)
    return 1 - left / sum(row.tokens for row in rows) if left else 0.0
