"""Give an adapter whose history or alias a stranger wrote back to its owner.

A learner with trusted keys neither trains on nor moves what no trusted key signed, so it parks such an adapter. This command
deletes the claims of sequence numbers at the end of the history that are no trusted version's, and points the alias at the
newest promoted version that is, with a signature and a higher generation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from uuid import uuid4

import typer
from rich.console import Console

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, PerennialError
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import (
    MAX_GENERATION,
    MAX_RECORD_BYTES,
    SEQ_DIGITS,
    AliasState,
    Claim,
    alias_key,
    parse_record,
    version_key,
)
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.key_files import KeyFileError
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import VersionSignatures
from perennial.streams.cli.adapters import open_registry
from perennial.streams.devstack.discovery import connected_settings


class RepairError(PerennialError):
    """An adapter cannot be repaired by itself."""


@dataclass(frozen=True)
class Repair:
    """What is to be done.

    Attributes:
        adapter: the adapter.
        removed: sequence numbers whose claims are deleted.
        alias: the alias as it is written; None: it stays as it is.
    """

    adapter: str
    removed: tuple[int, ...]
    alias: AliasState | None


def repair_alias(adapter: str, alias: str, generation: int, *, yes: bool, as_json: bool) -> int:
    """Repair an adapter and return the exit code: 1 where nothing was to be done or the user declined.

    Args:
        adapter: the adapter.
        alias: the alias to write.
        generation: the lowest generation to give it.
        yes: do not ask.
        as_json: print JSON instead of text.

    Raises:
        KeyFileError: no key to sign with or no trusted keys are set.
        NotFoundError: the adapter has no trusted version.
        RepairError: the history has an untrusted version before trusted ones.
        ConflictError: somebody else writes the alias at the same time.
    """
    settings = connected_settings()
    trust = settings.signing.trust()
    if trust.signing_key is None or not trust.verifies:
        raise KeyFileError(
            "a repair needs the key and the trusted keys", got="PERENNIAL_SIGNING_KEY_FILE or PERENNIAL_TRUSTED_KEYS is not set",
            allowed="both", remedy="set both; see docs/signatures.md",
        )  # fmt: skip
    registry = open_registry(settings)
    repair = plan_repair(registry, trust, adapter, alias, generation)
    if as_json:
        shown = asdict(repair) | {"alias": repair.alias.model_dump(mode="json") if repair.alias else None}
        print(json.dumps(shown))
    else:
        _show(repair)
    if repair.alias is None and not repair.removed:
        return 1
    if not yes and not typer.confirm("Do it? No learner may run meanwhile.", err=True):
        return 1
    carry_out(registry, repair)
    Console(stderr=True).print(f"done; then `perennial adapters unpark {adapter}`", markup=False, soft_wrap=True)
    return 0


def plan_repair(registry: Registry, trust: Trust, adapter: str, alias: str, generation: int) -> Repair:
    """Return what is to be done; it changes nothing.

    Args:
        registry: reads what is there, whoever signed it.
        trust: the key to sign with, and the trusted keys.
        adapter: the adapter.
        alias: the alias.
        generation: the lowest generation to give it.

    Raises:
        NotFoundError: the adapter has no trusted version.
        RepairError: the history has an untrusted version before trusted ones.
    """
    signatures = VersionSignatures(registry.store, trust)
    line = _line(registry, adapter)
    trusted = {
        seq: found for seq, version in line.items() if (found := _trusted(registry, signatures, adapter, seq, version))
    }
    last = max(trusted, default=0)
    removed = tuple(seq for seq in sorted(line) if seq > last)
    if missing := [seq for seq in range(1, last) if seq not in trusted]:
        raise RepairError(
            f"versions of {adapter} before trusted ones are not trusted", got=", ".join(map(str, missing[:20])),
            allowed="untrusted versions at the end alone",
            remedy="restore the objects under versions/, manifests/ and signatures/ from a copy of the store",
        )  # fmt: skip
    servable = [
        seq
        for seq in sorted(trusted)
        if trusted[seq].outcome == "promoted" and not registry.is_contaminated(trusted[seq])
    ]
    if not servable:
        raise NotFoundError(
            f"{adapter} has no version that a trusted key signed and that may be live", got="none",
            allowed="a signed, promoted version", remedy="see `perennial keys check`",
        )  # fmt: skip
    seq = servable[-1]
    now = _alias(registry, adapter, alias)
    known = now.generation if now is not None and now.generation <= MAX_GENERATION else 0
    if now is not None and _is_good(now, trust, adapter, alias, line, trusted) and now.generation >= generation:
        return Repair(adapter, removed, None)
    written = AliasState(
        adapter=adapter, alias=alias, generation=max(known + 1, generation), version=line[seq], seq=seq,
        kind="rolled_back", previous_version=now.version if now else None, reason="repaired: see `perennial keys repair`",
        published_at=datetime.now(UTC), nonce=uuid4().hex, etag=now.etag if now else "",
    ).signed(trust)  # fmt: skip
    return Repair(adapter, removed, written)


def carry_out(registry: Registry, repair: Repair) -> None:
    """Write the alias, then delete the claims, newest first: a crash in between leaves less to repair.

    Raises:
        ConflictError: somebody else wrote the alias meanwhile.
    """
    if repair.alias is not None:
        key = alias_key(repair.adapter, repair.alias.alias)
        try:
            registry.store.compare_and_swap(key, repair.alias.to_bytes(), repair.alias.etag or None)
        except ConflictError as error:
            raise ConflictError(
                f"somebody else wrote {key} meanwhile", remedy="stop the learners, and run the same command again"
            ) from error
    for seq in reversed(repair.removed):
        registry.store.delete(version_key(repair.adapter, seq))


def _line(registry: Registry, adapter: str) -> dict[int, str]:
    """Return the version that claims each sequence number; empty text where the claim is not readable."""
    prefix = version_key(adapter, 1)[:-SEQ_DIGITS]
    found: dict[int, str] = {}
    for key in registry.store.list(prefix):
        number = key[len(prefix) :]
        if not (len(number) == SEQ_DIGITS and number.isdigit()):
            continue
        try:
            found[int(number)] = parse_record(Claim, key, registry.store.get(key, MAX_RECORD_BYTES).data).version
        except IntegrityError:
            found[int(number)] = ""
    return found


def _trusted(
    registry: Registry, signatures: VersionSignatures, adapter: str, seq: int, version: str
) -> Manifest | None:
    """Return the manifest of a version that a trusted key signed for that sequence number; None for any other."""
    if not version:
        return None
    try:
        manifest = registry.manifest(adapter, version)
        signatures.check(adapter, version)
    except (NotFoundError, IntegrityError):
        return None
    return manifest if manifest.seq == seq else None


def _alias(registry: Registry, adapter: str, alias: str) -> AliasState | None:
    """Return what is stored as the alias.

    Raises:
        RepairError: it is no alias at all, so that nothing can be swapped for it.
    """
    try:
        return registry.unverified_alias(adapter, alias)
    except IntegrityError as error:
        key = alias_key(adapter, alias)
        raise RepairError(f"{key} is no alias", got=error.got, allowed="an alias, or no object",
                          remedy=f"delete the object {key}, and give a --generation") from error  # fmt: skip


def _is_good(
    state: AliasState, trust: Trust, adapter: str, alias: str, line: dict[int, str], trusted: dict[int, Manifest]
) -> bool:
    try:
        state.check_signature(trust)
    except SignatureError:
        return False
    on_line = state.seq in trusted and line[state.seq] == state.version
    return (state.adapter, state.alias) == (adapter, alias) and on_line


def _show(repair: Repair) -> None:
    for seq in repair.removed:
        print(f"number {seq} of {repair.adapter} is taken from a version that no trusted key signed")
    if repair.alias is not None:
        state = repair.alias
        print(
            f"{repair.adapter}#{state.alias} names {state.version}, number {state.seq}, at generation {state.generation}"
        )
    elif not repair.removed:
        print(f"{repair.adapter} needs no repair: its alias and history are those of trusted keys")
