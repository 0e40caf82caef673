"""docs/privacy.md names every topic, and every prefix of keys that the code writes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from perennial.storage.recovery.backup_copy import EXCLUDED
from perennial.streams.kafka.topics import TOPICS, WEEK_MS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/privacy.md").read_text("utf-8")
NO_KEYS = {
    "application", "perennial", "json", "text", "http", "https", "docs", "deploy", "proc", "main", "tests", "streams",
    "learner", "storage", "s3", "file", "base-v1", "sys", "dev", "v1", "n", "general-texts", "acme", "brindlewick", "perennial-subscriber", "scored",
    "ended",
}  # fmt: skip
"""What strings with a slash begin with that are no keys: media types, sources of events, paths, addresses, examples."""
KEY_LIKE = re.compile(r"(?P<first>[a-z][a-z0-9-]*)/")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented(title: str) -> set[str]:
    """Return what the first cells of a section's table name, without what follows the first slash."""
    cells = [line.split("|")[1] for line in section(title).splitlines() if line.startswith("| `")]
    return {name.partition("/")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def literals(path: Path) -> Iterator[str]:
    """Yield every string of a module, docstrings left out, and the beginning of every formatted one."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node.value


def prefixes_in_code() -> dict[str, str]:
    """Return the first segments of all strings that may be keys, each with a module that has it."""
    found: dict[str, str] = {}
    for room in ("storage", "streams", "learner"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for text in literals(path):
                match = KEY_LIKE.match(text)
                if match and " " not in text:
                    found.setdefault(match["first"], str(path.relative_to(ROOT)))
    return found


def test_every_topic_is_in_the_map_with_its_time():
    assert documented("Kafka") == set(TOPICS)
    for line in section("Kafka").splitlines():
        if not line.startswith("| `"):
            continue
        name, kept = line.split("|")[1].strip(" `"), line.split("|")[3].strip()
        configs = TOPICS[name].configs
        days = int(configs.get("retention.ms", 0)) * 7 // WEEK_MS
        if TOPICS[name].cleanup == "compact":
            assert kept.startswith(("for ever", "a day after"))
        else:
            assert kept.startswith("10 years" if days == 3650 else f"{days} days")


def test_every_prefix_that_the_code_names_is_in_the_map():
    """A new place in the store begins with a string in the code: name it in docs/privacy.md, or here as no key."""
    known = documented("Object store") | documented("Backups") | NO_KEYS
    assert {first: path for first, path in prefixes_in_code().items() if first not in known} == {}


def test_every_prefix_of_the_map_is_in_the_code():
    code = {*prefixes_in_code(), *(name.rstrip("/") for name in EXCLUDED)}
    assert (documented("Object store") | documented("Backups")) - code == set()


def test_the_search_finds_keys():
    found = prefixes_in_code()
    assert {"blobs", "manifests", "retention", "keys", "generations", "restored", "backups"} <= found.keys()
    assert len(found) > 30
