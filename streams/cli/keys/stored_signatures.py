"""Sign what is stored, and count what no trusted key signed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field

from rich.console import Console

from perennial.storage.errors import ConflictError, NotFoundError
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import AliasState, alias_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.key_files import KeyFileError
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import VersionSignatures
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.tables import Column, print_table
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.settings import Settings

_ATTEMPTS = 64
_COLUMNS = (
    Column("adapter"), Column("versions", right=True), Column("versions signed", 1, right=True),
    Column("versions refused", right=True), Column("aliases", right=True), Column("aliases signed", 1, right=True),
    Column("aliases refused", wraps=True),
)  # fmt: skip


@dataclass
class AdapterSignatures:
    """What was found of one adapter.

    Attributes:
        adapter: the adapter.
        versions: versions in the line, and the rebuilt updates that they rest on.
        versions_signed: how many of them got a signature now.
        versions_distrusted: why, by version, no trusted key vouches for it.
        aliases: its aliases.
        aliases_signed: how many of them got a signature now.
        aliases_distrusted: why, by alias, no trusted key vouches for it.
    """

    adapter: str
    versions: int = 0
    versions_signed: int = 0
    versions_distrusted: dict[str, str] = field(default_factory=dict)
    aliases: int = 0
    aliases_signed: int = 0
    aliases_distrusted: dict[str, str] = field(default_factory=dict)

    @property
    def trusted(self) -> bool:
        """Whether a trusted key vouches for everything."""
        return not self.versions_distrusted and not self.aliases_distrusted


class StoredSignatures:
    """Reads the versions and aliases of a store without asking for signatures, and checks or adds them.

    Args:
        registry: the registry, without trusted keys.
        trust: the key to sign with, and the trusted ones.
    """

    def __init__(self, registry: Registry, trust: Trust) -> None:
        self._registry = registry
        self._trust = trust
        self._signatures = VersionSignatures(registry.store, trust)

    @classmethod
    def of(cls, settings: Settings) -> StoredSignatures:
        """Return the signatures of the store and the keys that the settings name."""
        return cls(open_registry(settings), settings.signing.trust())

    def adapters(self, adapter: str | None) -> list[str]:
        """Return the adapter, or all."""
        return [adapter] if adapter is not None else list(self._registry.adapters())

    def live_faults(self, adapter: str) -> dict[str, str]:
        """Return why no trusted key vouches for an alias, or for the version that it names, by alias."""
        found: dict[str, str] = {}
        for state in self._registry.aliases(adapter):
            why = self._alias_fault(state) or self._version_fault(adapter, state.version)
            if why is not None:
                found[state.alias] = why
        return found

    def check(self, adapter: str) -> AdapterSignatures:
        """Return what no trusted key vouches for."""
        found = AdapterSignatures(adapter)
        for version, _ in self._versions(adapter):
            found.versions += 1
            if (why := self._version_fault(adapter, version)) is not None:
                found.versions_distrusted[version] = why
        for state in self._registry.aliases(adapter):
            found.aliases += 1
            if (why := self._alias_fault(state)) is not None:
                found.aliases_distrusted[state.alias] = why
        return found

    def sign(self, adapter: str, *, unsigned: bool) -> AdapterSignatures:
        """Sign what a trusted key signed, and on request what nobody did; return what was done.

        What another key signed, or what was changed after it was signed, is left as it is.

        Args:
            adapter: the adapter.
            unsigned: sign also what has no signature.
        """
        found, allowed = AdapterSignatures(adapter), {None, "unsigned"} if unsigned else {None}
        for version, manifest in self._versions(adapter):
            found.versions += 1
            why = self._version_fault(adapter, version)
            if why in allowed:
                found.versions_signed += self._signatures.sign(adapter, version, manifest.weights.digest)
            elif why is not None:
                found.versions_distrusted[version] = why
        for state in self._registry.aliases(adapter):
            found.aliases += 1
            why = self._alias_fault(state)
            if why in allowed:
                found.aliases_signed += self._sign_alias(state, allowed)
            elif why is not None:
                found.aliases_distrusted[state.alias] = why
        return found

    def _versions(self, adapter: str) -> Iterator[tuple[str, Manifest]]:
        """Yield the versions in the line and those that they rest on, each once."""
        waiting = [version for _, version in self._registry.versions(adapter)]
        seen: set[str] = set()
        while waiting:
            version = waiting.pop()
            if version in seen:
                continue
            seen.add(version)
            try:
                manifest = self._registry.manifest(adapter, version)
            except NotFoundError:  # a rebuilt update that was swept; nothing that may be served rests on it
                continue
            yield version, manifest
            waiting += [each for each in (manifest.parent, manifest.head) if each is not None]

    def _version_fault(self, adapter: str, version: str) -> str | None:
        if not self._trust.verifies:  # there is nothing to compare with: a signature by anybody counts as one
            envelope = self._signatures.envelope(adapter, version)
            return None if envelope is not None and envelope.signatures else "unsigned"
        try:
            self._signatures.check(adapter, version)
        except SignatureError as error:
            return error.reason
        return None

    def _alias_fault(self, state: AliasState) -> str | None:
        if not self._trust.verifies:
            return None if state.signature else "unsigned"
        try:
            state.check_signature(self._trust)
        except SignatureError as error:
            return error.reason
        return None

    def _sign_alias(self, state: AliasState, allowed: Collection[str | None]) -> bool:
        """Put this process's signature on an alias, whatever other writers do meanwhile; return whether it was missing."""
        for _ in range(_ATTEMPTS):
            wanted = state.signed(self._trust)
            if wanted.signature == state.signature:
                return False
            key = alias_key(state.adapter, state.alias)
            try:
                self._registry.store.compare_and_swap(key, wanted.to_bytes(), state.etag)
            except ConflictError:
                later = self._registry.alias(state.adapter, state.alias)
                if later is None or self._alias_fault(later) not in allowed:
                    return False
                state = later
                continue
            return True
        raise ConflictError(f"too many writers move {state.adapter}#{state.alias}", remedy="run the same command again")


def sign_stored(adapter: str | None, *, unsigned: bool, as_json: bool) -> int:
    """Sign the versions and aliases of the store and return the exit code: 1 where some are left out.

    Args:
        adapter: the adapter; None: all.
        unsigned: sign also what has no signature. Without trusted keys that is everything.
        as_json: print JSON.

    Raises:
        KeyFileError: no key to sign with is set, or no trusted keys are and `unsigned` is not given.
        StoreError: the store does not answer.
    """
    settings = connected_settings()
    if settings.signing.key_to_sign() is None:
        raise KeyFileError(
            "there is no key to sign with", got="PERENNIAL_SIGNING_KEY_FILE is not set", allowed="a file of a private key",
            remedy="make one with `perennial keys new`, and set PERENNIAL_SIGNING_KEY_FILE",
        )  # fmt: skip
    if not unsigned and not settings.signing.trusted_keys:  # any text would count as a signature, and be signed
        raise KeyFileError(
            "there are no trusted keys to check signatures with", got="PERENNIAL_TRUSTED_KEYS is not set",
            allowed="a file of public keys",
            remedy="set PERENNIAL_TRUSTED_KEYS; to sign everything that is stored, whoever wrote it: add --unsigned",
        )  # fmt: skip
    stored = StoredSignatures.of(settings)
    found = [stored.sign(each, unsigned=unsigned) for each in stored.adapters(adapter)]
    return _report(found, as_json=as_json, hint="" if unsigned else "; what is older than the keys: add --unsigned")


def check_stored(adapter: str | None, *, as_json: bool) -> int:
    """Count what no trusted key signed and return the exit code: 1 where there is any.

    Raises:
        StoreError: the store does not answer.
    """
    stored = StoredSignatures.of(connected_settings())
    return _report([stored.check(each) for each in stored.adapters(adapter)], as_json=as_json, hint="")


def _report(found: list[AdapterSignatures], *, as_json: bool, hint: str) -> int:
    if as_json:
        print(json.dumps([asdict(each) for each in found]))
    elif found:
        print_table(_COLUMNS, [_row(each) for each in found])
    distrusted = [each for each in found if not each.trusted]
    if distrusted and not as_json:
        Console(stderr=True).print(
            f"{len(distrusted)} adapters have versions or aliases that no trusted key signed{hint}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
    return 1 if distrusted else 0


def _row(each: AdapterSignatures) -> tuple[str, ...]:
    aliases = ", ".join(f"{alias}: {why}" for alias, why in each.aliases_distrusted.items())
    return (
        each.adapter, str(each.versions), str(each.versions_signed), str(len(each.versions_distrusted)),
        str(each.aliases), str(each.aliases_signed), aliases,
    )  # fmt: skip
