"""The streams that every arm learns: blocks of examples in a given order, and documents that are never learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import orjson

from perennial.learner.training.replay_buffer import seeded_random
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import ExampleAccepted, ExampleScored, Origin
from tests.benchmarks.learning.texts import package_texts

ADAPTER = "bench/learning"
START_MS = 1_700_000_000_000
DOMAINS = ("networkx", "scipy", "sympy", "torch")
TUNING_DOMAINS = ("numpy", "matplotlib", "transformers")
"""Packages of the stream on which learning rates are chosen: none of them is in the stream that is reported."""

TokensOf = Callable[[ExampleAccepted], int]
"""Returns the number of tokens of an example, as the scorer counts them."""


@dataclass(frozen=True)
class Block:
    """Examples of one domain that arrive one after another.

    Attributes:
        domain: What the block is about.
        examples: In order of arrival.
    """

    domain: str
    examples: tuple[ExampleAccepted, ...]


@dataclass(frozen=True)
class Question:
    """A forced choice about a fact that a document states.

    Attributes:
        prompt: A question that is never taught.
        answers: The sentence that answers it with each value: the current one, the earlier ones, those of other facts.
        documents: The document with each value, in the same order.
        earlier: Number of earlier values.
        per_token: Compare losses per token, for choices of different lengths; False: of whole choices.
    """

    prompt: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    earlier: int
    per_token: bool = False


@dataclass(frozen=True)
class Stream:
    """What one run learns, and what it is measured on.

    Attributes:
        name: Name of the stream.
        seed: Decides which documents are learned and which are measured.
        order: Decides the order of the blocks.
        blocks: The blocks in order.
        held_out: Texts by domain that are measured and never learned.
        questions: What is asked once an example was learned, by its id.
        replaces: Id of the example that an example supersedes, by its id.
    """

    name: str
    seed: int
    order: int
    blocks: tuple[Block, ...]
    held_out: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, Question] = field(default_factory=dict)
    replaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in the order of their blocks."""
        return tuple(dict.fromkeys(block.domain for block in self.blocks))

    @property
    def digest(self) -> str:
        """Digest of all texts and of their order."""
        content = [
            [[block.domain, [[e.text, e.prompt, e.answer] for e in block.examples]] for block in self.blocks],
            sorted((domain, list(texts)) for domain, texts in self.held_out.items()),
            sorted((name, asdict(question)) for name, question in self.questions.items()),
            sorted(self.replaces.items()),
        ]
        return hashlib.sha256(orjson.dumps(content)).hexdigest()


def document(number: int, text: str, document_id: str, supersedes: Sequence[str] = ()) -> ExampleAccepted:
    """Return a document as intake accepts it; its number is its offset."""
    return ExampleAccepted(
        adapter=ADAPTER, example_id=_id(f"{document_id}\n{text}"), kind="document", document_id=document_id, learn=True,
        text=text, origin=_origin(number), supersedes=list(supersedes),
    )  # fmt: skip


def _id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _origin(offset: int) -> Origin:
    return Origin(
        cluster_id="bench", topic="documents", topic_id="bench", partition=0, offset=offset,
        timestamp_ms=START_MS + 1000 * offset,
    )  # fmt: skip


def domain_stream(
    name: str, packages: Sequence[str], seed: int, order: int, tokens_of: TokensOf, policy: CutPolicy, batches: int,
    held_out: int,
) -> Stream:  # fmt: skip
    """Return a stream of docstrings, one block per package.

    Args:
        name: Name of the stream.
        packages: Packages whose docstrings are the domains.
        seed: Draws the documents.
        order: 1 for the order given, 2 or more for a permutation that the seed draws.
        tokens_of: Counts the tokens of an example.
        policy: How the service cuts micro-batches.
        batches: Micro-batches per block.
        held_out: Documents per domain that are measured.
    """
    blocks = []
    measured = {}
    for package in packages:
        rng = seeded_random("documents", package, seed)
        texts = list(package_texts(package, held_out=False))
        rng.shuffle(texts)
        pool = package_texts(package, held_out=True)
        measured[package] = tuple(rng.sample(pool, min(held_out, len(pool))))
        examples = [document(n, text, f"{package}-{_id(text)}") for n, text in enumerate(texts)]
        blocks.append(Block(package, tuple(first_batches(examples, tokens_of, policy, batches))))
    ordered = _in_order(blocks, seed, order)
    return Stream(name, seed, order, numbered(ordered), measured)


def first_batches(
    examples: Sequence[ExampleAccepted], tokens_of: TokensOf, policy: CutPolicy, batches: int
) -> list[ExampleAccepted]:
    """Return the examples of the first micro-batches that the service would cut."""
    taken: list[ExampleAccepted] = []
    cuts = micro_batches(MicroBatcher(ADAPTER, policy), examples, tokens_of)
    for _, batch in zip(range(batches), cuts, strict=False):
        taken += batch
    return taken


def _in_order(blocks: Sequence[Block], seed: int, order: int) -> list[Block]:
    """Return the blocks as they are for order 1, and else in another order that is drawn."""
    found = list(blocks)
    rng = seeded_random("order", seed, order)
    while order > 1 and len(blocks) > 1 and found == list(blocks):
        rng.shuffle(found)
    return found


def numbered(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return the blocks with offsets that rise from example to example."""
    numbers = iter(range(10**9))
    return tuple(
        Block(
            block.domain,
            tuple(
                example.model_copy(update={"origin": _origin(next(numbers))})
                for example in block.examples
            ),
        )
        for block in blocks
    )  # fmt: skip


def micro_batches(
    batcher: MicroBatcher[None], examples: Iterable[ExampleAccepted], tokens_of: TokensOf
) -> Iterator[list[ExampleAccepted]]:
    """Yield the micro-batches that curate cuts; what is left at the end is cut by its age.

    Args:
        batcher: Curate's batcher; it keeps its history from call to call.
        examples: In order of arrival.
        tokens_of: Counts the tokens of an example.
    """
    for example in examples:
        scored = ExampleScored(example=example, tokens=tokens_of(example), base_loss_nats=None, live_loss_nats=None)
        reason = batcher.offer(scored, None, 0).reason
        if reason:
            pending = batcher.pending_examples
            batcher.apply(batcher.cut(datetime.fromtimestamp(START_MS / 1000, UTC), reason))
            yield pending
    if batcher.pending_examples:
        pending = batcher.pending_examples
        batcher.apply(batcher.cut(datetime.fromtimestamp(START_MS / 1000, UTC), "age"))
        yield pending
