"""The cache of collected texts saves the parsing, and never changes the texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perennial.learner.model.text_cache import cached_texts

TEXTS = (("a.f", "Return é."), ("a.g", "Two\nlines."))


class Source:
    """A folder with one file; counts how often its texts are collected."""

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.code = root, root / "a.py", root / "collect.py"
        self.file.write_text("x")
        self.code.write_text("1")
        self.collected = 0

    def texts(self):
        return cached_texts(self._collect, self.root, [self.file], self.code)

    def _collect(self):
        self.collected += 1
        return TEXTS


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    return Source(tmp_path / "source")


def test_texts_are_collected_once_and_read_back_equal(source: Source):
    assert source.texts() == source.texts() == TEXTS
    assert source.collected == 1


@pytest.mark.parametrize("change", ["content", "time", "code", "damage"])
def test_a_cache_of_something_else_or_a_damaged_one_is_not_used(source: Source, tmp_path: Path, change: str):
    source.texts()
    (cached,) = (tmp_path / "cache" / "perennial" / "general-texts").iterdir()
    match change:
        case "content":
            source.file.write_text("longer")
        case "time":
            os.utime(source.file, ns=(1, 1))
        case "code":
            source.code.write_text("2")
        case _:
            cached.write_bytes(cached.read_bytes().replace(b"Two", b"Six"))
    assert source.texts() == TEXTS
    assert source.collected == 2


def test_a_cache_folder_that_cannot_be_written_costs_only_time(source: Source, tmp_path: Path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert source.texts() == TEXTS
