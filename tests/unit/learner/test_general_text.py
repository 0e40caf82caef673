"""General texts: found without running any source, each in one split for good."""

from contextlib import nullcontext
from random import Random
from types import SimpleNamespace

import pytest
import torch

from perennial.learner.model import general_text
from perennial.learner.model.general_text import MIN_TEXT_CHARS, GeneralText, docstrings_of, general_texts, split_of
from perennial.learner.model.loss import RowLoss
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.model.turns import ComputeTurns, FairLock
from tests import tiny


def test_general_texts_are_split_once_and_for_all():
    splits = {name: general_texts(name) for name in ("train", "heldout", "anchor")}
    sizes = {name: len(texts) for name, texts in splits.items()}
    total = sum(sizes.values())
    assert sizes["train"] > 0.85 * total
    assert min(sizes["heldout"], sizes["anchor"]) > 0.03 * total
    every = [text for texts in splits.values() for text in texts]
    assert len(set(every)) == len(every)
    assert min(map(len, every)) >= MIN_TEXT_CHARS
    assert all(split_of(text) == name for name, texts in splits.items() for text in texts)
    splits["train"].clear()
    assert len(general_texts("train")) == sizes["train"]


def test_docstrings_are_found_by_name_without_running_the_source():
    source = b'''"""Module text."""
raise SystemExit
class A:
    """Class text.

        Indented.
    Not indented.
    """
    def f(self):
        """Method text."""
try:
    def g():
        """Guarded text."""
except ImportError:
    def g():
        """Fallback text."""
'''
    assert list(docstrings_of(source, "m")) == [
        ("m", "Module text."),
        ("m.A", "Class text.\n\n    Indented.\nNot indented."),
        ("m.A.f", "Method text."),
        ("m.g", "Guarded text."),
        ("m.g", "Fallback text."),
    ]


@pytest.mark.parametrize("turns", [False, True])
def test_losses_of_the_base_are_measured_anew_for_another_thread_count(monkeypatch, turns):
    """A rebuild with the recorded threads got the losses of the worker's own threads, which differ in the last bits."""

    def measured(_, rows, *, lock, **__):
        with lock or nullcontext():
            return [RowLoss(float(torch.get_num_threads()), 1) for _ in rows]

    monkeypatch.setattr(general_text, "row_losses", measured)
    general = GeneralText([], ["a text of some length"], ExampleTokenizer(tiny.base().tokenizer), 64)
    rows = general.anchors(Random(0), 1)
    try:
        for threads in (1, 2, 1):
            # With turns, torch's count is that of another thread's turn until the lock is taken.
            torch.set_num_threads(3 - threads if turns else threads)
            lock = ComputeTurns(FairLock(), threads) if turns else None
            assert general.base_losses(SimpleNamespace(compute_dtype=None), rows, lock) == [RowLoss(float(threads), 1)]
    finally:
        torch.set_num_threads(1)


def test_losses_of_the_base_are_measured_anew_in_another_number_format(monkeypatch):
    def measured(lora, rows, **_):
        return [RowLoss(1.0 if lora.compute_dtype == torch.float32 else 2.0, 1) for _ in rows]

    monkeypatch.setattr(general_text, "row_losses", measured)
    general = GeneralText([], ["a text of some length"], ExampleTokenizer(tiny.base().tokenizer), 64)
    rows = general.anchors(Random(0), 1)
    for _ in range(2):
        for dtype, nats in ((torch.float32, 1.0), (torch.bfloat16, 2.0)):
            assert general.base_losses(SimpleNamespace(compute_dtype=dtype), rows, None) == [RowLoss(nats, 1)]
