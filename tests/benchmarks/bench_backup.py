"""Time a backup, the next one, its check and its restore, between folders: `python -m tests.benchmarks.bench_backup`."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.recovery.backup_copy import create_backup
from perennial.storage.recovery.backup_upkeep import problems_of
from perennial.storage.recovery.restored_store import restore_backup
from perennial.streams.client.testing import small_weights
from tests.versions import VersionPublisher

_T = TypeVar("_T")


def timed(name: str, work: Callable[[], _T], figures: dict[str, float]) -> _T:
    began = time.perf_counter()
    result = work()
    figures[f"{name}_s"] = round(time.perf_counter() - began, 2)
    print(f"{name:<12}{figures[f'{name}_s']:>8.2f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--weights-kb", type=int, default=600, help="bytes of one version's weights, in thousands")
    arguments = parser.parse_args()
    seeds, figures = itertools.count(), dict[str, float]()
    with tempfile.TemporaryDirectory() as root:
        store, place = DirectoryStore(Path(root) / "store", fsync=False), DirectoryStore(Path(root) / "place")
        publishers = [VersionPublisher(store, f"tenant/{n}") for n in range(arguments.adapters)]

        def publish(count: int) -> None:
            for publisher in publishers:
                for _ in range(count):
                    publisher.publish(small_weights(next(seeds), arguments.weights_kb * 1000 // 16))

        publish(arguments.versions)
        now = lambda: datetime.now(UTC)  # noqa: E731 - a clock
        first = timed("first", lambda: create_backup(store, place, now), figures)
        publish(1)
        second = timed("next", lambda: create_backup(store, place, now), figures)
        assert not timed("verify", lambda: list(problems_of(place, second)), figures)
        restored = DirectoryStore(Path(root) / "restored")
        timed("restore", lambda: restore_backup(place, second, restored), figures)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({
        "objects": second.objects, "mb": round(second.size_bytes / 1e6), "first_copied_mb": round(first.copied_bytes / 1e6),
        "next_copied_mb": round(second.copied_bytes / 1e6), **figures, "peak_mb": round(peak_mb),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
