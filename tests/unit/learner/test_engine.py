"""The engine's name changes with everything that decides a version's bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perennial.learner import versions
from perennial.learner.versions.engine import ON_GPU, code_digest

ROOM = Path(versions.__file__).parents[1]
FOLDERS = ("bases", "model", "together", "training")
SOURCES = sorted(path.relative_to(ROOM) for folder in FOLDERS for path in (ROOM / folder).rglob("*.py"))


def test_every_source_file_that_computes_is_in_the_name(tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOM / folder, tmp_path / folder, ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    unchanged = code_digest(room=tmp_path)
    assert unchanged == code_digest()
    assert Path("training/averaging/slow_average.py") in SOURCES
    for source in SOURCES:
        before = (tmp_path / source).read_bytes()
        (tmp_path / source).write_bytes(before + b"\n")
        assert code_digest(room=tmp_path) != unchanged, source
        (tmp_path / source).write_bytes(before)


@pytest.mark.parametrize("name", ON_GPU)
def test_what_computes_on_a_gpu_is_in_the_name_there_alone(name: str) -> None:
    assert f" {name} " in code_digest(on_gpu=True)
    assert name not in code_digest()
