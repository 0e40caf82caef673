"""What the gate says of text that cannot be learned, and from which update on drift is distrusted for it.

`python -m tests.benchmarks.drift.unlearnable [--updates 16] [--base shipped]`. Each kind of text is learned by an adapter of its
own, 8 documents an update, with the service's settings and code; plain docstrings are the control.
"""

from __future__ import annotations

import argparse
import random
import shutil
import string
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.turns import FairLock
from perennial.learner.training.state import TrainingState
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.manifest import Manifest
from perennial.streams.curate.cutting.drift_trust import examples_for_drift, updates_without_gain
from perennial.streams.settings import load_settings
from tests import tiny
from tests.benchmarks.learning.texts import package_texts

DOCUMENTS = 8
WORDS = 40


def letters(rng: random.Random, _: str) -> str:
    """Return words of random letters."""
    return " ".join(
        "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(3, 9))) for _ in range(WORDS)
    )


def symbols(rng: random.Random, _: str) -> str:
    """Return random characters of all planes that people write in."""
    return "".join(chr(rng.randint(0x21, 0x2FFF)) for _ in range(WORDS * 2))


def mojibake(_: random.Random, text: str) -> str:
    """Return a text whose bytes were read in a wrong encoding, twice."""
    wide = text[:300].translate({ord(a): a.upper() + "\u0301" for a in "aeiou"})
    return wide.encode().decode("latin-1").encode().decode("latin-1")


def shuffled(rng: random.Random, text: str) -> str:
    """Return the characters of a text in another order."""
    return "".join(rng.sample(text[:300], len(text[:300])))


def plain(_: random.Random, text: str) -> str:
    """Return the text."""
    return text[:300]


KINDS: dict[str, Callable[[random.Random, str], str]] = {
    "docstrings": plain, "random letters": letters, "random symbols": symbols, "mojibake": mojibake,
    "shuffled characters": shuffled,
}  # fmt: skip


def main() -> None:
    """Print a row for each kind of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--base", default="shipped")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    given = parser.parse_args()
    settings = load_settings(base=given.base, env_file=None, device="cpu")
    folder = Path(tempfile.mkdtemp(prefix="perennial-drift-"))
    curate = settings.curate
    try:
        base = load_base(settings.model.base, "cpu", settings.model.threads, settings.model.dtype)
        writer = make_version_writer(settings, DirectoryStore(folder), base, FairLock())
        make_deterministic(writer.threads)
        updater = writer.updater_of(None)
        for kind in given.kinds.split(","):
            make = KINDS[kind]
            rng, texts = random.Random(kind), iter(package_texts("sympy", held_out=False))
            name = "bench/" + kind.replace(" ", "-")
            state = TrainingState(updater.lora.initial_weights(name, 0))
            newest: list[Manifest] = []
            gains: list[str] = []
            verdicts, needed, numbers = [], [], iter(range(10**6))
            for cut in range(given.updates):
                documents = [tiny.document(next(numbers), make(rng, text), name) for text in islice(texts, DOCUMENTS)]
                result = updater.update(
                    state, documents, adapter=name, cut=cut, batch="sha256:" + "0" * 64, replayed=lambda *_: None
                )
                state = result.state
                outcome = "promoted" if result.gate.reason == "ok" else "refused"
                newest.insert(0, Manifest.model_construct(kind="update", outcome=outcome, gate=result.gate))
                verdicts.append(str(result.gate.reason))
                figures = result.gate
                before, after, error = figures.loss_before, figures.loss_after, figures.loss_error
                gains.append("-" if None in {before, after, error} else f"{before - after:.3f}±{error:.3f}")
                needed.append(
                    examples_for_drift(
                        updates_without_gain(newest), curate.min_batch_examples, curate.max_batch_examples,
                        curate.drift_patience_updates,
                    )
                )  # fmt: skip
            print(f"{kind}: {' '.join(verdicts)}; gains {' '.join(gains)}; drift needs {needed}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
