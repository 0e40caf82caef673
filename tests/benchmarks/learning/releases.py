"""Dated documentation of web services, as botocore ships it: real text whose facts were revised over the years.

botocore keeps several dated versions of the interfaces of some services. It is read where it is installed and never
imported; none of its text is stored here. The latest version of a service is kept up to date, so its text is as old as
the installed botocore, whatever its date says; earlier versions stayed as they were.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson

from perennial.learner.training.replay_buffer import seeded_random
from perennial.storage.errors import NotFoundError
from perennial.streams.curate.cutting.policy import CutPolicy
from tests.benchmarks.learning.streams import Block, Question, Stream, TokensOf, document, first_batches, numbered

LATEST: Final = "latest"
PERIODS: Final[Mapping[str, str]] = {"2014-09": "2014-09-30", "2015-06": "2015-06-30", "2019-12": "2019-12-31"}
"""Last day of each period but the last, which has the latest version of every service."""
MIN_CHARS: Final = 200
MAX_CHARS: Final = 800
HELD_OUT_PERCENT: Final = 20
ALIKE: Final = 0.6
"""Least similarity (difflib's ratio over characters) of two sentences of which one counts as the revision of the other."""
REVISED_PER_FRESH: Final = 2
"""Documents that supersede another for each one that does not, as long as there are any."""

_FILE: Final = "service-2.json.gz"
_BLOCK_TAGS: Final = frozenset({"p", "li", "ul", "ol", "div", "br", "dl", "dt", "dd", "note", "important", "table", "tr", "td", "th"})  # fmt: skip
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'])")
_DATE: Final = re.compile(r"\d{4}_\d\d_\d\d$")
_SHAPE_END: Final = re.compile(r"(Request|Result|Output|Response|Message|Input|Type|Config|List)+$")


@dataclass(frozen=True)
class Entry:
    """The documentation of a service under one name, over time.

    Attributes:
        service: Folder of the service.
        title: Name of the service, and of the operation, the structure or its member.
        group: Operation or structure that it belongs to, without endings such as Request: entries of a group share words.
        texts: Text by period, of those periods in which it is new or was changed, in order.
    """

    service: str
    title: str
    group: str
    texts: Mapping[str, str]

    @property
    def is_held_out(self) -> bool:
        """Return True if no entry of the group is ever trained."""
        digest = hashlib.sha256(f"held out: {self.service} {self.group}".encode()).digest()
        return int.from_bytes(digest[:8]) % 100 < HELD_OUT_PERCENT

    def revisions_in(self, period: str) -> list[tuple[str, str]]:
        """Return (earlier, current) texts of a period that changed a text; an empty list where it has none or a first one."""
        return [
            pair
            for name, pair in zip(list(self.texts)[1:], itertools.pairwise(self.texts.values()), strict=True)
            if name == period
        ]

    def revisions_after(self, period: str) -> list[tuple[str, str]]:
        """Return (earlier, later) texts of all revisions after a period."""
        names = list(self.texts)
        return [pair for name in names[names.index(period) + 1 :] for pair in self.revisions_in(name)]


class _Text(HTMLParser):
    """Collects the text of HTML; what stands in different paragraphs or items is kept apart."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Put a space where a block begins."""
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Put a space where a block ends."""
        if tag in _BLOCK_TAGS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.parts.append(data)


def plain_text(html: str) -> str:
    """Return the text of HTML with single spaces."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    return " ".join("".join(parser.parts).split())


def botocore_data() -> Path:
    """Return the folder with the services of the installed botocore.

    Raises:
        NotFoundError: botocore is not installed.
    """
    spec = find_spec("botocore")
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError(
            "the stream `releases` needs botocore", got="none installed", remedy="run `make bench-learning`, or install "
            "requirements-bench.lock with `pip install --no-deps`",
        )  # fmt: skip
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def versions(root: Path) -> dict[str, list[Path]]:
    """Return the dated versions of each service that has at least two, the oldest first."""
    found = {
        folder.name: sorted(path.parent for path in folder.glob(f"*/{_FILE}"))
        for folder in sorted(root.iterdir()) if folder.is_dir()
    }  # fmt: skip
    return {service: dated for service, dated in found.items() if len(dated) > 1}


def period_of(dated: Sequence[str]) -> dict[str, str]:
    """Return by period the version of a service that is current at its end, if it is another one than before.

    Args:
        dated: Dates of the versions, the oldest first; the last one belongs to the last period, because it is still edited.
    """
    found: dict[str, str] = {}
    for period, last_day in PERIODS.items():
        known = [date for date in dated[:-1] if date <= last_day]
        if known and known[-1] not in found.values():
            found[period] = known[-1]
    return {**found, LATEST: dated[-1]}


def documented(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, group, text) of everything that a version of an interface documents.

    Args:
        model: Content of a `service-2.json`.
    """
    for name, operation in model["operations"].items():
        plain = _DATE.sub("", name)
        yield plain, plain, plain_text(operation.get("documentation", ""))
    for name, shape in model["shapes"].items():
        group = _SHAPE_END.sub("", name) or name
        yield f"structure {name}", group, plain_text(shape.get("documentation") or "")
        for member, of in shape.get("members", {}).items():
            yield f"{name}.{member}", group, plain_text(of.get("documentation") or "")


@cache
def entries(root: Path) -> tuple[Entry, ...]:
    """Return what all services with several versions document, each text under one name only."""
    found: list[Entry] = []
    seen: set[str] = set()
    for service, folders in versions(root).items():
        by_date = {folder.name: folder for folder in folders}
        texts: dict[str, dict[str, str]] = {}
        groups: dict[str, str] = {}
        for period, date in period_of(list(by_date)).items():
            model = orjson.loads(gzip.decompress((by_date[date] / _FILE).read_bytes()))
            title = model["metadata"].get("serviceFullName", service)
            for name, group, text in documented(model):
                known = texts.setdefault(name, {})
                if MIN_CHARS <= len(text) <= MAX_CHARS and text not in known.values():
                    known[period] = text
                    groups[name] = group
        for name, known in texts.items():
            if known and seen.isdisjoint(known.values()):
                seen.update(known.values())
                found.append(Entry(service, f"{title}, {name}", groups[name], known))
    return tuple(found)


def revised_sentences(before: str, after: str) -> list[tuple[str, str]]:
    """Return (earlier, current) pairs of reworded sentences, which are much alike and differ in a word.

    Args:
        before: Earlier text.
        after: Current text.
    """
    old, new = _SENTENCE_END.split(before), _SENTENCE_END.split(after)
    found = []
    for kind, i, i_end, j, j_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "replace":
            continue
        left = old[i:i_end]
        for sentence in new[j:j_end]:
            ratio, best = max(
                ((SequenceMatcher(None, other, sentence, autojunk=False).ratio(), other) for other in left),
                default=(0.0, ""),
            )
            if ratio >= ALIKE and _words(best) != _words(sentence):
                found.append((best, sentence))
                left.remove(best)
    return found


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def release_stream(
    seed: int, order: int, tokens_of: TokensOf, policy: CutPolicy, batches: int, held_out: int, root: Path | None = None
) -> Stream:
    """Return documents of several services in the order of their periods, one block per period.

    A document whose name was learned before with another text supersedes the earlier one. It is asked for by the
    sentences that were reworded, with the earlier wording as the other choice.

    Args:
        seed: Draws the documents.
        order: 2 or more for another order of the documents within each block; the periods keep theirs.
        tokens_of: Counts the tokens of an example.
        policy: How the service cuts micro-batches.
        batches: Micro-batches per block.
        held_out: Documents per period that are measured: new or changed ones of names that are never learned.
        root: Folder of the services; None: that of the installed botocore.

    Raises:
        NotFoundError: botocore is not installed.
    """
    found = entries(root or botocore_data())
    rng = seeded_random("releases", seed)
    trained = [entry for entry in found if not entry.is_held_out]
    rng.shuffle(trained)
    names = [*PERIODS, LATEST]
    measured: dict[str, tuple[str, ...]] = {}
    questions: dict[str, Question] = {}
    replaces: dict[str, str] = {}
    last: dict[str, tuple[str, str, str]] = {}  # document id, example id and text by title
    blocks = []
    for period in names:
        texts = [_whole(entry, entry.texts[period]) for entry in found if entry.is_held_out and period in entry.texts]
        measured[period] = tuple(rng.sample(texts, min(held_out, len(texts))))
        drawn = []
        of_title: dict[str, Entry] = {}
        for number, entry in enumerate(_due(trained, period, last)):
            older = [last[entry.title][0]] if entry.title in last else []
            name = f"{entry.service} {entry.title} {period}"
            example = document(number, _whole(entry, entry.texts[period]), name, older)
            of_title[example.example_id] = entry
            drawn.append(example)
        taken = first_batches(drawn, tokens_of, policy, batches)
        for example in taken:
            entry = of_title[example.example_id]
            text = entry.texts[period]
            if entry.title in last:
                _, replaces[example.example_id], before = last[entry.title]
                question = _question(entry, before, text)
                if question:
                    questions[example.example_id] = question
            last[entry.title] = (example.document_id or "", example.example_id, text)
        if order > 1:
            seeded_random("release order", seed, order, period).shuffle(taken)
        blocks.append(Block(period, tuple(taken)))
    return Stream("releases", seed, order, numbered(blocks), measured, questions, replaces)


def _question(entry: Entry, before: str, after: str) -> Question | None:
    """Return the choice between the reworded sentences and their earlier wording; None where there are none."""
    pairs = revised_sentences(before, after)
    choices = (" ".join(new for _, new in pairs), " ".join(old for old, _ in pairs))
    prompt = f"What does the documentation of {entry.title} say?"
    return Question(prompt, choices, choices, earlier=1, per_token=True) if pairs else None


def _whole(entry: Entry, text: str) -> str:
    return f"{entry.title}\n{text}"


def _due(trained: Sequence[Entry], period: str, last: Mapping[str, object]) -> Iterator[Entry]:
    """Yield the entries that a period teaches: revised ones, and fresh ones, those first that will be revised."""
    here = [entry for entry in trained if period in entry.texts]
    revised = [entry for entry in here if entry.title in last]
    fresh = sorted((entry for entry in here if entry.title not in last), key=lambda entry: -_revisions(entry, period))
    while revised or fresh:
        yield from revised[:REVISED_PER_FRESH]
        yield from fresh[: 1 if revised else None]
        revised, fresh = revised[REVISED_PER_FRESH:], fresh[1:] if revised else []


def _revisions(entry: Entry, period: str) -> int:
    """Return 1 for an entry with reworded sentences in a later period, else 0."""
    return int(any(revised_sentences(*pair) for pair in entry.revisions_after(period)))


def main() -> None:
    """Print how much each period documents and revises, and how much of it is held out."""
    found = entries(botocore_data())
    print("| period | documents | revised | with a reworded sentence | with another number in it | held out |")
    print("|---" * 6 + "|")
    for period in (*PERIODS, LATEST):
        here = [entry for entry in found if period in entry.texts]
        pairs = [pair for entry in here for pair in entry.revisions_in(period)]
        reworded = [sentences for pair in pairs if (sentences := revised_sentences(*pair))]
        numbers = sum(any(_numbers(old) != _numbers(new) for old, new in sentences) for sentences in reworded)
        held_out = sum(entry.is_held_out for entry in here)
        print(f"| {period} | {len(here)} | {len(pairs)} | {len(reworded)} | {numbers} | {held_out} |")


if __name__ == "__main__":
    main()
