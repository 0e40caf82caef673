"""Every script in examples/ does what it says, as a process, against a real broker and a folder as object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from perennial import DirectoryBackend, DocumentObserved, InteractionObserved, Settings
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.events.fields import Event
from perennial.streams.kafka.topics import provision
from perennial.testing import publish_version
from tests.faults.parts import envelopes
from tests.versions import VersionPublisher

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ADAPTER = "acme/support"


@dataclass(frozen=True)
class Stack:
    """A broker with topics, and a store."""

    settings: Settings
    environment: dict[str, str]
    folder: Path

    @property
    def store(self) -> str:
        return self.settings.store.uri

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        """Start an example."""
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *words], cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def published(self, topic: str) -> list[Event]:
        """All events of a topic."""
        return [envelope.event for envelope in envelopes(self.settings, topic)]


@pytest.fixture
def stack(broker, topic_prefix: str, tmp_path: Path) -> Stack:
    settings = Settings.of(
        kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=1, store=str(tmp_path / "store"), env_file=None
    )
    provision(settings)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    environment = {
        **kept, "PYTHONPATH": str(ROOT), "PERENNIAL_KAFKA": broker.bootstrap, "PERENNIAL_STORE": settings.store.uri,
        "PERENNIAL_TOPIC_PREFIX": topic_prefix, "PERENNIAL_POLL_S": "0.2", "PERENNIAL_DEVICE": "cpu",
    }  # fmt: skip
    folder = tmp_path / "user"
    folder.mkdir()
    return Stack(settings, environment, folder)


def until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 180.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "publisher.py", "subscriber_folder.py", "subscriber_peft.py", "compose.overlay.yml",
    }  # fmt: skip


def test_publisher(stack: Stack):
    out, errors = stack.start("publisher.py", ADAPTER).communicate(timeout=120)
    assert errors == ""
    topics = [stack.settings.kafka.topic(name) for name in ("documents", "interactions")]
    assert [line.split(": ")[1] for line in out.splitlines()] == [f"{t}, partition 0, offset 0" for t in topics]
    (document,), (corrected,) = stack.published("documents"), stack.published("interactions")
    assert isinstance(document, DocumentObserved)
    assert (document.adapter, document.retention_class) == (ADAPTER, "P90D")
    assert isinstance(corrected, InteractionObserved)
    assert corrected.correction == "Two days."


def test_publisher_says_what_is_wrong(stack: Stack):
    process = stack.start("publisher.py", "No Such Name")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "adapter is not valid" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_subscriber_folder(stack: Stack, number: signal.Signals):
    process = stack.start("subscriber_folder.py", ADAPTER, "served")
    try:
        served = DirectoryBackend(stack.folder / "served")
        for generation in (1, 2):
            version = publish_version(stack.store, ADAPTER)
            name = f"{ADAPTER}@{version.removeprefix('sha256:')}"
            until(lambda name=name: served.current(ADAPTER) == name, process)
            assert process.stdout is not None
            assert process.stdout.readline().startswith(f"generation {generation}: {version}, ")
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert served.current(ADAPTER) == name
    finally:
        process.kill()
        process.communicate()


def test_subscriber_peft(stack: Stack):
    import torch

    from perennial import LoraConfig, load_base
    from perennial.learner.model.lora import Lora, to_safetensors

    base = load_base("shipped", "cpu", 1)
    training = Settings.of(env_file=None).training
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        lora = Lora(base, LoraConfig(training.rank, training.alpha), slot="made-by-examples")
    generator = torch.Generator().manual_seed(1)
    weights = to_safetensors({n: 0.2 * torch.randn(shape, generator=generator) for n, shape in lora.shapes.items()})
    versions = VersionPublisher(DirectoryStore(Path(stack.store), fsync=False), ADAPTER, base.digest)
    version = versions.publish(weights, rank=training.rank, alpha=training.alpha).version
    process = stack.start("subscriber_peft.py", ADAPTER)
    out, errors = process.communicate("How long does a refund take?\nWhen?\n", timeout=120)
    assert process.returncode == 0, errors
    assert out.count(f"[{ADAPTER}@{version.removeprefix('sha256:')}] ") == 2, (out, errors)
