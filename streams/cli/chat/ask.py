"""The command `perennial ask`: answer a prompt with the frozen base and with a version of an adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from perennial.extras import require_extra
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.object_store import get_blob
from perennial.storage.prompts.system_prompts import load_system_prompt
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import MAX_RECORD_BYTES, SEQ_DIGITS, Claim, parse_record, version_key
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry, resolve_version
from perennial.streams.cli.tables import shown_version
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.devstack.discovery import connected_settings

if TYPE_CHECKING:
    from perennial.learner.serving.peft_backend import PeftBackend
    from perennial.streams.client.personal.composition import Part


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        prompt: The text to answer.
        system: System prompt instead of the adapter's own; an empty one for none; None: the adapter's own.
        max_new_tokens: Most tokens to generate for each answer.
    """

    prompt: str
    system: str | None = None
    max_new_tokens: int = 48


def ask_models(adapter: str, question: Question, *, version: str | None, base: bool | None, as_json: bool) -> int:
    """Print the answers of the frozen base and of the adapter as they are generated; return the exit code.

    Args:
        adapter: Name of the adapter.
        question: What is asked.
        version: Sequence number of the version to ask, or the beginning of its id; None: the live version.
        base: True: ask only the frozen base; False: only the adapter; None: both.
        as_json: Print JSON, once all answers are there.

    Raises:
        NotFoundError: The adapter has no such version that may be served, or no live one.
        MissingExtraError: The extra `worker` is not installed.
    """
    require_extra("worker", "`perennial ask`")
    settings = connected_settings()
    registry = open_registry(settings, settings.signing.readers_trust())
    asked = None if base else _version_of(registry, adapter, settings.serving.alias, version)
    system = load_system_prompt(registry.store, adapter).text if question.system is None else question.system or None
    console = Console(highlight=False)
    with Console(stderr=True).status("loading the base and the adapter"):
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import LoraConfig
        from perennial.learner.serving.peft_backend import PeftBackend

        served = None if asked is None else _served(registry, adapter, asked, settings.serving.alias)
        config = LoraConfig(settings.training.rank, settings.training.alpha)
        if served is not None:
            config = LoraConfig(served.part.manifest.rank, int(served.part.manifest.config["alpha"] or 0))
        loaded = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
        backend = PeftBackend(loaded, config)
        if served is not None:
            backend.load(served.part.version, served.part.weights, served.part.manifest)
    answers: dict[str, str] = {}
    facts: dict[str, object] = {"prompt": question.prompt, "system": system, "version": asked}
    if served is not None and served.shared is not None:
        facts |= {"extends": served.part.manifest.extends, "shared_version": served.shared}
    if base is not False:
        answers["base"] = _answer(backend, question, system, None if as_json else Text("frozen base:", "bold"))
    if served is not None:
        backend.activate(served.part.version)
        name = f"{adapter} @ {shown_version(asked, console)}"
        if served.shared is not None:
            name += f" together with {served.part.manifest.extends} @ {shown_version(served.shared, console)}"
        if answers and not as_json:
            print()
        answers["adapter"] = _answer(backend, question, system, None if as_json else Text(f"{name}:", "bold green"))
    if as_json:
        print(json.dumps({**facts, **answers}))
    return 0


@dataclass(frozen=True)
class _Served:
    """What is asked: a version, or a personal and a shared one composed.

    Attributes:
        part: The LoRA with its manifest.
        shared: Version of the shared adapter in it; None: none.
    """

    part: Part
    shared: str | None = None


def _served(registry: Registry, adapter: str, version: str, alias: str) -> _Served:
    """Return a version as clients serve it: together with the live version of the adapter that it extends."""
    from perennial.streams.client.personal.composition import Part, compose
    from perennial.streams.client.personal.served_parts import naming_parts

    manifest = registry.manifest(adapter, version)
    own = Part(version, manifest, get_blob(registry.store, manifest.weights.digest))
    state = None if manifest.extends is None else registry.alias(manifest.extends, alias)
    if state is None or state.kind == "retired":
        return _Served(own)
    beneath = registry.manifest(state.adapter, state.version)
    if registry.is_revoked(state.adapter, beneath.seq):
        return _Served(own)
    shared = Part(state.version, beneath, get_blob(registry.store, beneath.weights.digest))
    try:
        both = compose(own, shared)
    except UnfitVersionError as error:  # as a subscriber does
        said = f"{manifest.adapter} is asked without {manifest.extends}: {error}"
        Console(stderr=True, highlight=False).print(said, markup=False, soft_wrap=True)
        return _Served(own)
    return _Served(replace(both, manifest=naming_parts(both.manifest, own.version, shared.version)), shared.version)


def _version_of(registry: Registry, adapter: str, alias: str, wanted: str | None) -> str:
    if wanted is None:
        state = registry.alias(adapter, alias)
        if state is None:
            raise NotFoundError(
                "this adapter has no live version",
                got=adapter,
                remedy="publish documents and wait until a version passes the gate; `perennial adapters ls` shows it",
            )
        return state.version
    version = _by_seq(registry, adapter, wanted) or resolve_version(registry, adapter, wanted)
    manifest = registry.manifest(adapter, version)
    if (
        manifest.outcome != "promoted"
        or registry.is_revoked(adapter, manifest.seq)
        or registry.is_contaminated(manifest)
    ):
        raise NotFoundError(
            "this version may not be served", got=f"{wanted}: {_why_not(registry, manifest)}",
            allowed="a promoted version that is not revoked", remedy="see `perennial adapters history`",
        )  # fmt: skip
    return version


def _by_seq(registry: Registry, adapter: str, wanted: str) -> str | None:
    """Return the version with that sequence number; None where the text is none or nothing has it."""
    if not (wanted.isascii() and wanted.isdigit() and len(wanted) <= SEQ_DIGITS):
        return None
    key = version_key(adapter, int(wanted))
    try:
        return parse_record(Claim, key, registry.store.get(key, MAX_RECORD_BYTES).data).version
    except NotFoundError:
        return None


def _why_not(registry: Registry, manifest: Manifest) -> str:
    if manifest.outcome != "promoted":
        return manifest.outcome
    return "revoked" if registry.is_revoked(manifest.adapter, manifest.seq) else "made from a revoked version"


def _answer(backend: PeftBackend, question: Question, system: str | None, title: Text | None) -> str:
    """Return the answer; where there is a title, print it and below it each word as it is generated."""
    if title is None:
        return backend.generate(question.prompt, question.max_new_tokens, system=system)
    Console(highlight=False).print(title, soft_wrap=True)
    try:
        return backend.generate(
            question.prompt, question.max_new_tokens, system=system,
            on_text=lambda part: print(printable_lines(part), end="", flush=True),
        )  # fmt: skip
    finally:
        print(flush=True)  # an interrupted answer must not share its line with the shell's prompt
