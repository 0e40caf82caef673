"""Let an adapter learn real documents, then print what its updates cost beside other ways to know the same.

`python -m tests.benchmarks.bench_economics [--base shipped] [--updates 8] [--documents 8] [--context-tokens 256]`. The
updates run the learner's own code with the settings of the base, gate included, over a folder store without Kafka. Then
`perennial economics` prints: for the base as measured here, the same where retrieval puts so many tokens into a request,
and by formula for an 8B model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from perennial.learner.model.base import load_base
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli.demo.texts import package_docstrings
from perennial.streams.cli.economics.cost_report import EconomicsOptions, show_economics
from perennial.streams.settings import load_settings
from tests import jobs, tiny

ADAPTER = "bench/economics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="shipped")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--documents", type=int, default=8, help="documents per update")
    parser.add_argument("--context-tokens", type=int, default=256)
    given = parser.parse_args()
    texts = [text for _, text in package_docstrings("networkx", given.updates * given.documents)]
    with tempfile.TemporaryDirectory(prefix="perennial-economics-") as folder:
        general = Path(folder) / "general.jsonl"  # a sample of the base would take a minute, once per base
        held = [text for _, text in package_docstrings("sympy", 200)]
        general.write_text("".join(json.dumps({"text": text}) + "\n" for text in held), "utf-8")
        os.environ |= {
            "PERENNIAL_BASE": given.base, "PERENNIAL_STORE": f"{folder}/store", "PERENNIAL_KAFKA": "127.0.0.1:1",
            "PERENNIAL_GENERAL_TEXTS": str(general),
        }  # fmt: skip
        learn(Path(folder) / "store", texts, given.documents)
        for title, options in (
            ("measured here", EconomicsOptions()),
            ("measured here, with retrieval", EconomicsOptions(context_tokens=given.context_tokens)),
            ("by formula", EconomicsOptions(on="8b")),
        ):
            print(f"\n== {title}")
            show_economics(ADAPTER, options, as_json=False)
        show_economics(ADAPTER, EconomicsOptions(context_tokens=given.context_tokens), as_json=True)


def learn(folder: Path, texts: list[str], per_update: int) -> None:
    """Learn the texts, so many per update."""
    settings = load_settings()
    store = DirectoryStore(folder, fsync=False)
    model = settings.model
    base = load_base(model.base, model.device, model.threads, model.dtype)
    executor = UpdateExecutor(make_version_writer(settings, store, base))
    for cut, start in enumerate(range(0, len(texts), per_update), start=1):
        examples: list[Any] = [
            tiny.document(number, texts[number], adapter=ADAPTER) for number in range(start, start + per_update)
        ]
        result = executor.update(jobs.update(store, cut, examples, adapter=ADAPTER), settings.serving.alias)
        cost = result.cost
        print(f"update {cut}: {result.outcome}, {cost.seconds if cost else 0:.1f} s of the device", flush=True)


if __name__ == "__main__":
    main()
