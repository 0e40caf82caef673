"""A plain install publishes and subscribes; what needs an extra says which one. Modules of extras are hidden here."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

import perennial
from perennial.extras import EXTRAS, MissingExtraError, require_extra

ROOT = Path(perennial.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TRANSITIVE = {
    "aiokafka": "faust-streaming", "mode": "faust-streaming", "pydantic_core": "pydantic", "triton": "torch",
    "urllib3": "minio",
}  # fmt: skip
"""Modules that a dependency's own interface makes us import."""
ON_SOME_PLATFORMS = {"liger_kernel": "worker", "triton": "worker"}
"""Modules of an extra that it works without, and that not every platform has."""
HOSTS = {"vllm"}
"""Programs that load a plugin of ours. They are there before it, and no extra may choose their build."""

HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in {hidden} else PathFinder.find_spec(fullname, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no module of any extra."""
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace("{hidden}", repr(set(EXTRAS["all"]))))
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    return {**settings, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "XDG_DATA_HOME": str(tmp_path)}


def run(plain: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=plain, cwd=plain["XDG_DATA_HOME"], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_every_command_module_can_be_imported_without_extras(plain: dict[str, str]):
    code = (
        "import importlib, pkgutil, perennial.streams.cli as cli\n"
        "for module in pkgutil.walk_packages(cli.__path__, cli.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "from perennial import *\n"
        "from perennial.testing import *\n"
        "Publisher, Subscriber, DirectoryBackend"
    )
    done = run(plain, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["publish", "--help"], ["publish", "documents", "--help"], ["status", "--help"]]
)
def test_help_needs_no_extra(plain: dict[str, str], words: list[str]):
    done = run(plain, "-m", "perennial", *words)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["worker", "learner"], "worker"),
        (["worker", "intake"], "worker"),
        (["ask", "acme/support", "When?"], "worker"),
        (["up"], "all"),
        (["demo"], "all"),
    ],
)
def test_a_command_that_needs_an_extra_says_which(plain: dict[str, str], words: list[str], extra: str):
    done = run(plain, "-m", "perennial", *words)
    assert done.returncode == MissingExtraError.exit_code
    assert f"pip install 'perennial-lm[{extra}]'" in done.stderr
    assert f"`perennial {words[0]}`" in done.stderr
    assert "Traceback" not in done.stderr


def test_adapters_ls_works_without_extras(plain: dict[str, str], tmp_path: Path):
    done = run({**plain, "PERENNIAL_STORE": str(tmp_path / "store")}, "-m", "perennial", "adapters", "ls", "--json")
    assert done.returncode == 0, done.stderr


def test_an_import_that_no_command_announced_names_its_extra_too(plain: dict[str, str]):
    code = (
        "import importlib\n"
        "app = importlib.import_module('perennial.streams.cli.app')\n"
        "def broken(**_): import river\n"
        "app.app = broken\n"
        "app.main()"
    )  # fmt: skip
    done = run(plain, "-c", code)
    assert done.returncode == MissingExtraError.exit_code, done.stderr
    assert "pip install 'perennial-lm[worker]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_backend_of_a_model_names_its_extra(plain: dict[str, str]):
    done = run(plain, "-c", "from perennial import PeftBackend")
    assert "MissingExtraError" in done.stderr
    assert "pip install 'perennial-lm[worker]'" in done.stderr


# ---- the declared dependencies


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}


def imported() -> Iterator[tuple[str, str]]:
    """The root of each module that the package imports, and the file."""
    for room in ("storage", "streams", "learner"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in names:
                    yield name.partition(".")[0], str(path.relative_to(ROOT))


def test_what_the_package_imports_is_declared_where_it_is_needed():
    plain_names = distributions(PROJECT["dependencies"])
    extra_names = {extra: distributions(PROJECT["optional-dependencies"][extra]) for extra in ("worker", "devstack")}
    of_module = packages_distributions()
    for module, path in imported():
        if module == "perennial" or module in HOSTS or module in sys.stdlib_module_names:
            continue
        if module in ON_SOME_PLATFORMS and module not in of_module:
            continue
        names = {TRANSITIVE.get(module, name).lower().replace("_", "-") for name in of_module[module]}
        extra = next((extra for extra in extra_names if module in EXTRAS[extra]), ON_SOME_PLATFORMS.get(module))
        if extra is None:
            assert names & plain_names, f"{path} imports {module}, which a plain install has not"
        else:
            assert names & extra_names[extra], f"{path} imports {module}, which the extra {extra} does not install"


def test_a_plain_install_is_small_and_all_is_both_extras():
    heavy = {"torch", "faust-streaming", "river", "confluent-kafka", "transformers", "peft", "numpy", "matplotlib"}
    assert not distributions(PROJECT["dependencies"]) & heavy
    assert PROJECT["optional-dependencies"]["all"] == ["perennial-lm[devstack,worker]"]
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"])


def test_the_extra_of_the_plugin_installs_nothing_into_a_server_that_is_set_up():
    assert PROJECT["optional-dependencies"]["vllm"] == []
    assert EXTRAS["vllm"] == ()


def test_all_extras_are_installed_where_the_tests_run():
    require_extra("all", "the tests")


def test_a_loaded_module_without_a_spec_is_installed(monkeypatch: pytest.MonkeyPatch):
    """Faust replaces its own module by one without a spec, which find_spec refuses with a ValueError."""
    monkeypatch.setitem(sys.modules, "faust", ModuleType("faust"))
    require_extra("worker", "this test")
