"""General texts: mixed into training, and measured by the gate as anchors.

For the shipped base they are docstrings of the standard library, the kind of text that it was pretrained on; see
`general_items` for those of other bases. Each text belongs to one split for good: `train` is mixed into training,
`anchor` guards against a rise of the general loss, `heldout` is used only for measurements.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import inspect
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Literal

import torch

from perennial.learner.model.general_items import GeneralItem, item_rows
from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import RowLoss, ignore_step, row_losses
from perennial.learner.model.text_cache import cached_texts
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow
from perennial.learner.model.turns import ComputeTurns
from perennial.storage.registry.manifest import BlobRef

Split = Literal["train", "heldout", "anchor"]

MIN_TEXT_CHARS = 40
ANCHOR_POOL = 256
"""Number of anchor texts from which the anchors of every update are drawn."""
# Tests hold fixtures rather than prose; the other trees are tables, vendored grammars or an application,
# and parsing them doubles the time.
SKIPPED_TREES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
)


def split_of(text: str) -> Split:
    """Return the split of a text: 90 % train, 5 % heldout, 5 % anchor, by its SHA-256, so that every run agrees."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    if bucket < 90:
        return "train"
    return "heldout" if bucket < 95 else "anchor"


def docstrings_of(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, cleaned docstring) of a module, its classes, methods and functions.

    The source is parsed and never run.

    Args:
        source: Python source of one module.
        module: Dotted name of the module, the first part of every name yielded.

    Raises:
        SyntaxError: The source does not parse.
        ValueError: The source holds a null byte.
    """
    tree = ast.parse(source)
    for name, node in ((module, tree), *_walk_definitions(tree.body, module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            raw = ast.get_docstring(node, clean=False)
            if raw is not None:
                yield name, inspect.cleandoc(raw)


def _walk_definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield (dotted name, node) of classes and functions, also inside `if` and `try`, not inside function bodies."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _walk_definitions(node.body, name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _walk_definitions(node.body, prefix)
            yield from _walk_definitions(node.orelse, prefix)
            for handler in getattr(node, "handlers", ()):
                yield from _walk_definitions(handler.body, prefix)


@functools.cache
def stdlib_docstrings() -> tuple[tuple[str, str], ...]:
    """Return (dotted name, text) of the standard library's docstrings, each text once, ordered by path.

    The library is parsed from source and nothing is imported; the texts are kept in the cache folder. Every text has
    at least `MIN_TEXT_CHARS` characters. The texts come from the Python that runs, so another Python release gives
    slightly different ones.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in sorted(root.rglob("*.py")) if not SKIPPED_TREES.intersection(path.relative_to(root).parts)
    ]
    return cached_texts(lambda: _collect(root, files), root, files, Path(__file__))


def _collect(root: Path, files: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    """Parse the files and return (dotted name, docstring) pairs, each docstring once."""
    names: dict[str, str] = {}
    # Parsing makes millions of acyclic nodes: the cyclic collector would take half of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in files:
            module = ".".join((*path.relative_to(root).parts[:-1], path.stem)).removesuffix(".__init__")
            for name, text in docstrings_of(path.read_bytes(), module):
                if len(text) >= MIN_TEXT_CHARS:
                    names.setdefault(text, name)
    finally:
        if collecting:
            gc.enable()
    return tuple((name, text) for text, name in names.items())


@functools.cache
def _texts_by_split() -> dict[Split, tuple[str, ...]]:
    by_split: dict[Split, list[str]] = {"train": [], "heldout": [], "anchor": []}
    for _, text in stdlib_docstrings():
        by_split[split_of(text)].append(text)
    return {split: tuple(texts) for split, texts in by_split.items()}


def general_texts(split: Split) -> list[str]:
    """Return a new list of the general texts of one split, in a fixed order.

    The first call parses the standard library, which takes seconds where the cache folder does not have its texts.
    """
    return list(_texts_by_split()[split])


class GeneralText:
    """General texts cut into rows: rows to mix into training, and anchor rows with the base's loss on them.

    Args:
        train: Texts to mix into training; may be empty.
        anchor: Texts to measure; the `ANCHOR_POOL` of them with the smallest SHA-256 are used. May be empty.
        codec: Tokenizer of the base.
        row_tokens: Longest row, in tokens.
        ref: Blob that holds the texts; None for the docstrings.
    """

    def __init__(
        self,
        train: Sequence[str | GeneralItem],
        anchor: Sequence[str | GeneralItem],
        codec: ExampleTokenizer,
        row_tokens: int,
        ref: BlobRef | None = None,
    ) -> None:
        self.ref = ref
        self._codec = codec
        self._row_tokens = row_tokens
        self._train = train
        self._anchor = sorted(anchor, key=_digest)[:ANCHOR_POOL]
        self._rows: dict[str | GeneralItem, list[TokenRow]] = {}
        self._base_losses: dict[tuple[int, torch.dtype | None, TokenRow], RowLoss] = {}  # by what decides the bits

    def _rows_of(self, text: str | GeneralItem) -> list[TokenRow]:
        rows = self._rows.get(text)
        if rows is None:
            item = GeneralItem(text) if isinstance(text, str) else text
            rows = self._rows[text] = item_rows(item, self._codec, self._row_tokens)
        return rows

    def cut_to(self, row_tokens: int) -> GeneralText:
        """Return the same texts in rows of at most `row_tokens` tokens."""
        if row_tokens == self._row_tokens:
            return self
        return GeneralText(self._train, self._anchor, self._codec, row_tokens, self.ref)

    def draw(self, rng: Random) -> TokenRow | None:
        """Draw one row to train on. Return None where there are no texts, without drawing a number."""
        return rng.choice(self._rows_of(rng.choice(self._train))) if self._train else None

    def anchors(self, rng: Random, count: int) -> list[TokenRow]:
        """Draw the anchor rows of one update: one row each of `count` texts, fewer where there are fewer texts."""
        texts = rng.sample(self._anchor, min(count, len(self._anchor)))
        return [rng.choice(self._rows_of(text)) for text in texts]

    def base_losses(
        self,
        lora: Lora,
        rows: Sequence[TokenRow],
        lock: AbstractContextManager[object] | None,
        on_step: Callable[[], None] = ignore_step,
    ) -> list[RowLoss]:
        """Return the frozen base's loss on each row, computed once per row, thread count, number format and process.

        Both decide the bits, so a rebuild with the recorded ones must not get the losses of others.

        Args:
            lora: Slot over the base to measure; its own weights are not used.
            rows: Anchor rows.
            lock: Lock on the base, held for each forward pass; None where nobody shares the base.
            on_step: Called after each forward pass, without the lock.
        """
        # Another thread may have set torch's count; the lock sets its own one for each forward pass.
        threads = lock.threads if isinstance(lock, ComputeTurns) else torch.get_num_threads()
        by = (threads, lora.compute_dtype)
        new = [row for row in dict.fromkeys(rows) if (*by, row) not in self._base_losses]
        # One row per forward pass: in a batch the last bits would depend on which rows were measured before.
        losses = row_losses(lora, new, pad=self._codec.pad, adapted=False, max_rows=1, lock=lock, on_step=on_step)
        self._base_losses.update(((*by, row), loss) for row, loss in zip(new, losses, strict=True))
        return [self._base_losses[*by, row] for row in rows]


def _digest(text: str | GeneralItem) -> bytes:
    return hashlib.sha256(text.encode()).digest() if isinstance(text, str) else text.digest()
