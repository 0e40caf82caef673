"""The text that the shipped base is trained on, all of it from the installation of Python that runs.

The text is read from source files, which are parsed and never run. Modules written in C are the one exception: they are
imported, because their docstrings exist only on the imported objects.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perennial.learner.model.general_text import (
    MIN_TEXT_CHARS,
    docstrings_of,
    general_texts,
    split_of,
    stdlib_docstrings,
)

BOS, EOS, PAD, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
)
LEAK_LINE_CHARS = 60
C_MODULES = (
    "array", "audioop", "binascii", "bz2", "cmath", "decimal", "fcntl", "grp", "lzma", "math", "mmap",
    "pyexpat", "resource", "select", "termios", "unicodedata", "zlib", "_asyncio", "_bisect", "_csv",
    "_ctypes", "_datetime", "_decimal", "_elementtree", "_hashlib", "_heapq", "_json", "_lsprof", "_pickle",
    "_posixsubprocess", "_queue", "_random", "_socket", "_sqlite3", "_ssl", "_struct", "_zoneinfo",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Texts of a pretraining run.

    Attributes:
        docstrings: (dotted name, text) of the docstrings to train on.
        extras: Other texts of the library to train on.
        heldout: Docstrings to measure on, none of which is trained on.
    """

    docstrings: tuple[tuple[str, str], ...]
    extras: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """All texts to train on, docstrings first."""
        return [text for _, text in self.docstrings] + list(self.extras)


def _source_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"}.intersection(path.parts):
            yield path


def _comment_blocks(source: str) -> Iterator[str]:
    for match in re.finditer(r"(?:^[ \t]*#.*\n){2,}", source, re.MULTILINE):
        yield "\n".join(re.sub(r"^[ \t]*#+ ?", "", line) for line in match.group().splitlines()).strip()


def _language_reference() -> Iterator[str]:
    """Yield the topics of `help()`, read from source as literals."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (str(text) for text in ast.literal_eval(node.value).values())


def _compiled_docstrings() -> Iterator[str]:
    """Yield docstrings of modules written in C; they exist only on the imported objects."""
    for module_name in sorted({*sys.builtin_module_names, *C_MODULES}):
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # which C modules a Python has depends on how it was built
            continue
        for owner in (module, *(m for _, m in sorted(vars(module).items()) if inspect.isclass(m))):
            for _, member in sorted(vars(owner).items()):
                text = getattr(member, "__doc__", None)
                if isinstance(text, str):
                    yield inspect.cleandoc(text)


def long_lines(texts: Iterable[str]) -> set[str]:
    """Return the stripped lines that are long enough to show that one text was copied from another."""
    lines = (line.strip() for text in texts for line in text.splitlines())
    return {line for line in lines if len(line) >= LEAK_LINE_CHARS}


def collect_corpus() -> Corpus:
    """Collect the texts to train on and to measure on.

    A text other than a train docstring is left out if it would fall into another split, or shares a long line with a
    heldout or anchor docstring, so that the held-out loss is not lowered by copies.
    """
    docstrings = tuple((name, text) for name, text in stdlib_docstrings() if split_of(text) == "train")
    guarded = long_lines((*general_texts("heldout"), *general_texts("anchor")))
    seen = {text for _, text in docstrings}
    extras: list[str] = []

    def add(text: str) -> None:
        if len(text) < MIN_TEXT_CHARS or text in seen or split_of(text) != "train":
            return
        if guarded.isdisjoint(long_lines([text])):
            seen.add(text)
            extras.append(text)

    for path in _source_files():
        try:
            source = path.read_text("utf-8")
            for _, text in docstrings_of(source.encode(), path.stem):
                add(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the library's own tests contain broken sources on purpose
        for text in _comment_blocks(source):
            add(text)
    for text in (*_language_reference(), *_compiled_docstrings()):
        add(text)
    return Corpus(docstrings, tuple(extras), tuple(general_texts("heldout")))


def answer_row(name: str, text: str, rng: np.random.Generator) -> str | None:
    """Return a prompt and answer row made of a docstring's name and first sentence.

    Args:
        name: Dotted name of the documented object.
        text: Its docstring.
        rng: Chooses the form of the question.

    Returns:
        The row as text with special tokens; None if the docstring does not begin with a usable sentence.
    """
    first = " ".join(text.split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s", first, maxsplit=1)[0]
    if not 15 <= len(sentence) <= 300 or not sentence[0].isalpha() or "(" in sentence[:30]:
        return None
    short = ".".join(name.split(".")[-2:])
    question = ("What does {} do?", "What is {}?", "Explain {}.", "Describe {} in one sentence.")
    prompt = question[int(rng.integers(len(question)))].format(short)
    return f"{BOS}{USER}{prompt}{ASSISTANT}{sentence}{EOS}"
