"""What signatures cost: one signature, one check, and a small version published and read with keys and without.

The last line is JSON. The store is a folder that is flushed to the disk, as in an installation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.trust import Trust
from perennial.testing import small_weights
from tests.keys import Keys
from tests.versions import VersionPublisher

ADAPTER = "acme/support"


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call in milliseconds."""
    times_s = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - begin_s)
    return round(1000 * statistics.median(times_s), 3)


def measure(folder: Path, versions: int) -> dict[str, float]:
    """Return the medians in milliseconds. With and without keys take turns, so that they meet the same load."""
    keys = Keys(folder / "keys")
    payload = b"x" * 600
    signature = keys.owner.sign("alias", payload)
    publishers = {
        name: VersionPublisher(DirectoryStore(folder / name), ADAPTER, trust=trust)
        for name, trust in (("plain", Trust()), ("signed", keys.owner))
    }
    publish_ms: dict[str, list[float]] = {name: [] for name in publishers}
    read_ms: dict[str, list[float]] = {name: [] for name in publishers}
    for number in range(versions):
        weights = small_weights(number)
        for name, publisher in publishers.items():
            publish_ms[name].append(median_ms(lambda p=publisher, w=weights: p.publish(w), 1))
            trust = keys.readers if name == "signed" else Trust()
            reader = Registry(publisher.store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC), trust=trust)
            read_ms[name].append(median_ms(lambda r=reader: (r.alias(ADAPTER), r.head(ADAPTER)), 1))
    return {
        "sign_ms": median_ms(lambda: keys.owner.sign("alias", payload), 2000),
        "check_ms": median_ms(lambda: keys.readers.check("alias", payload, signature, "it"), 2000),
        **{f"publish_{name}_ms": round(statistics.median(found), 2) for name, found in publish_ms.items()},
        **{f"read_{name}_ms": round(statistics.median(found), 2) for name, found in read_ms.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=200, help="versions to publish and to read of each kind")
    versions = parser.parse_args().versions
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), versions)))


if __name__ == "__main__":
    main()
