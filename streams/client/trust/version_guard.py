"""Refuse aliases and versions that no trusted key vouches for, before anything of them is fetched.

The alias is the thing that an attacker wants: a signed alias names one version by the digest of its manifest, and the
manifest names the weights by digest. The version's own signature protects names with a version in them, which no alias
names, and shows which key made it. The other checks hold even against a signed alias that was written by mistake.

A revocation is heeded without a signature. Forged, it takes a version out of service, which whoever can write to the store
can do anyway, for example by damaging the weights. Not heeded, it would leave in service what somebody had erased.
"""

from __future__ import annotations

from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.records import AliasState, version_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import VersionSignatures
from perennial.streams.client.trust.seen_generations import SeenGenerations
from perennial.streams.client.trust.untrusted import UntrustedVersionError
from perennial.streams.settings.signing_group import SigningSettings


class VersionGuard:
    """Checks aliases and versions for clients of one store. It does nothing where no key is trusted. Thread-safe.

    Args:
        registry: The registry, which itself asks for no signature.
        trust: The trusted keys.
        seen: Keeps the highest generation of each alias.
    """

    def __init__(self, registry: Registry, trust: Trust, seen: SeenGenerations) -> None:
        self._registry = registry
        self._trust = trust
        self._seen = seen
        self._signatures = VersionSignatures(registry.store, trust)

    @classmethod
    def of(cls, registry: Registry, settings: SigningSettings) -> VersionGuard:
        """Return the guard that the settings describe.

        Raises:
            KeyFileError: The trusted keys cannot be read.
        """
        return cls(registry, settings.readers_trust(), SeenGenerations(settings.seen_folder(), registry.store.uri))

    @property
    def trust(self) -> Trust:
        """The trusted keys."""
        return self._trust

    def alias(self, adapter: str, alias: str, at_least: int = 0) -> AliasState | None:
        """Return an alias, after checking who signed it and that no later one was seen before; None if there is none.

        Args:
            adapter: The adapter.
            alias: Name of the alias.
            at_least: The highest generation that the caller knows of, from a source that it trusts.

        Raises:
            UntrustedVersionError: It is not signed by a trusted key, another alias, or older than one that was seen.
            StoreError: The store does not answer, or holds no alias there.
            KeyFileError: The trusted keys cannot be read.
        """
        if not self._trust.verifies:
            return self._registry.alias(adapter, alias)
        state = self._registry.unverified_alias(adapter, alias)
        if state is None:
            return None
        try:
            state.check_signature(self._trust)
        except SignatureError as error:
            raise _untrusted(error, state) from error
        if (state.adapter, state.alias) != (adapter, alias):
            raise UntrustedVersionError(
                "replayed", f"what is stored as the alias {adapter}#{alias} is another alias",
                got=f"{state.adapter}#{state.alias}", allowed=f"{adapter}#{alias}", state=state,
                remedy="find out who copied it, and restore the alias from a copy of the store",
            )  # fmt: skip
        highest = max(at_least, self._seen.highest(adapter, alias))
        if state.generation < highest:
            raise UntrustedVersionError(
                "replayed", f"the alias {adapter}#{alias} is older than one that was live before",
                got=f"generation {state.generation}", allowed=f"generation {highest} or higher", state=state,
                remedy="find out who put it back, and restore the later one; where the store itself was restored from a "
                f"copy, delete {self._seen.path_of(adapter, alias)} and start the client again",
            )  # fmt: skip
        return state

    def note(self, state: AliasState) -> None:
        """Remember the generation of an alias that is served."""
        if self._trust.verifies:
            self._seen.note(state.adapter, state.alias, state.generation)

    def check_version(self, version: str, manifest: Manifest, alias: AliasState | None = None) -> None:
        """Check who signed a version, and that it is one that may be live.

        Args:
            version: Digest of the manifest.
            manifest: The manifest.
            alias: The alias that names the version. None: somebody asked for the version itself.

        Raises:
            UntrustedVersionError: It is not signed by a trusted key, the gate refused it, or no sequence number is its.
            StoreError: The store does not answer.
            KeyFileError: The trusted keys cannot be read.
        """
        if not self._trust.verifies:
            return
        try:
            self._signatures.check(manifest.adapter, version)
        except SignatureError as error:
            raise _untrusted(error) from error
        what = f"version {version} of {manifest.adapter}"
        if manifest.outcome != "promoted":
            raise UntrustedVersionError(
                "refused-by-gate", f"{what} was not promoted", got=manifest.outcome, allowed="promoted", remedy=_REMEDY
            )
        if alias is not None and alias.seq != manifest.seq:
            raise UntrustedVersionError(
                "off-the-line",
                f"the alias gives {what} another place",
                got=alias.seq,
                allowed=manifest.seq,
                remedy=_REMEDY,
            )
        key = version_key(manifest.adapter, manifest.seq)
        claim = self._registry.claim(key)
        if claim is None or claim.version != version:
            raise UntrustedVersionError(
                "off-the-line", f"{what} is not the one at its place in the line", got=f"{key}: {claim.version if claim else 'no version'}",
                allowed=version,
                remedy=_REMEDY,
            )  # fmt: skip


_REMEDY = "find out who moved the alias, and make another version live: `perennial adapters rollback ADAPTER`"


def _untrusted(error: SignatureError, state: AliasState | None = None) -> UntrustedVersionError:
    return UntrustedVersionError(
        error.reason, error.message, got=error.got, allowed=error.allowed, remedy=error.remedy, state=state
    )
