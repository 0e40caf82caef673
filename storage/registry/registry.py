"""The registry: versions of adapters, aliases, revocations, and the steps of publishing.

A version exists from the moment its sequence number is claimed. The alias is moved after that, by compare-and-swap. A
publish may be interrupted after any step; calling it again completes it. Sequence numbers have no gaps, so the newest
version is found by probing keys, never by listing them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from uuid import uuid4

from cachetools import LRUCache

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.failpoints import failpoint as default_failpoint
from perennial.storage.objects.keys import hex_of
from perennial.storage.objects.object_store import ObjectStore, get_blob, get_verified, put_blob
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.compare_and_swap import AliasWriter
from perennial.storage.registry.manifest import MAX_MANIFEST_BYTES, Manifest, update_id
from perennial.storage.registry.records import (
    MAX_RECORD_BYTES,
    SEQ_DIGITS,
    AliasKind,
    AliasState,
    Claim,
    Head,
    Publication,
    Revocation,
    alias_key,
    check_adapter,
    manifest_key,
    parse_record,
    revocation_key,
    version_key,
)
from perennial.storage.registry.waiting_jobs import load_job_versions, record_job_version
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import VersionSignatures

__all__ = ["AliasState", "Head", "Publication", "Registry", "Revocation", "manifest_key", "update_id"]

LIVE = "live"
_ALIAS_KINDS: dict[str, AliasKind] = {
    "rollback": "rolled_back", "revoke": "revoked", "quarantine": "revoked", "forget": "revoked", "rebase": "promoted",
}  # fmt: skip
_SWAP_ATTEMPTS = 64


class Registry:
    """Versions and aliases of adapters in one object store; safe to share among threads.

    Args:
        store: where everything is stored.
        nonce: returns a string that was never returned before, so that no two states of an alias have equal bytes.
        now: wall clock, for aliases and revocations.
        failpoint: called with a name after each step of a publish, where fault tests may stop the process.
        cached: how many manifests are kept in memory.
        trust: signs manifests and aliases, and asks for the signatures of those that are read. None: neither.
    """

    def __init__(
        self,
        store: ObjectStore,
        nonce: Callable[[], str] = lambda: uuid4().hex,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        failpoint: Callable[[str], None] = default_failpoint,
        cached: int = 256,
        trust: Trust | None = None,
    ) -> None:
        self.store = store
        self.trust = trust = trust or Trust()
        self._signatures = VersionSignatures(store, trust)
        self._aliases = AliasWriter(store, nonce, now, trust)
        self._now = now
        self._failpoint = failpoint
        # Bounded, so that memory stays bounded with any number of adapters. The lock: cachetools is not thread-safe.
        self._manifests: LRUCache[tuple[str, str], Manifest] = LRUCache(cached)
        self._known_seqs: LRUCache[str, int] = LRUCache(cached * 64)
        self._cache_lock = threading.Lock()

    # ---- reading

    def head(self, adapter: str) -> Head | None:
        """Return the newest version; None if there is none. Takes two requests if nothing is new since the last call.

        Raises:
            NotFoundError: the version was deleted while it was read.
            IntegrityError: a stored object is damaged.
        """
        check_adapter(adapter)
        claim = None
        with self._cache_lock:
            known = self._known_seqs.get(adapter)
        if known:
            claim = self.claim(version_key(adapter, known))
        if claim is None:
            alias = self.alias(adapter)
            known = alias.seq if alias and self._exists(adapter, alias.seq) else 0
        newest = self._newest_seq(adapter, known or 0)
        if newest == 0:
            return None
        if claim is None or newest != known:
            claim = self.claim(version_key(adapter, newest))
        if claim is None:
            raise NotFoundError(f"version {newest} of {adapter} was deleted while it was read", remedy="do it again")
        with self._cache_lock:
            self._known_seqs[adapter] = newest
        manifest = self.manifest(adapter, claim.version)
        if self.trust.verifies and manifest.seq != newest:
            key = version_key(adapter, newest)
            raise IntegrityError(f"{key} names a version of another place", got=manifest.seq, allowed=newest)
        return Head(newest, claim.version, manifest)

    def manifest(self, adapter: str, version: str) -> Manifest:
        """Return a version's manifest; its digest is checked, and its signature where one is asked for.

        Raises:
            NotFoundError: there is no such manifest.
            IntegrityError: the stored bytes are not that manifest, it is another adapter's, or no trusted key signed it.
        """
        with self._cache_lock:
            cached = self._manifests.get((adapter, version))
        if cached is not None:
            return cached
        manifest = self.unverified_manifest(adapter, version)
        self._signatures.check(adapter, version)
        with self._cache_lock:
            self._manifests[adapter, version] = manifest
        return manifest

    def unverified_manifest(self, adapter: str, version: str) -> Manifest:
        """Return a version's manifest, whoever signed it; for a revocation, and for whoever checks the signature itself.

        Raises:
            NotFoundError: there is no such manifest.
            IntegrityError: the stored bytes are not that manifest, or it is another adapter's.
        """
        key = manifest_key(adapter, version)
        manifest = Manifest.from_bytes(get_verified(self.store, key, version, MAX_MANIFEST_BYTES))
        if manifest.adapter != adapter:
            raise IntegrityError(f"{key} is another adapter's manifest", got=manifest.adapter, allowed=adapter)
        return manifest

    def versions(self, adapter: str, newest_first: bool = True, limit: int | None = None) -> Iterator[tuple[int, str]]:
        """Yield (sequence number, version id) of the adapter's versions.

        Args:
            adapter: the adapter.
            newest_first: False for the oldest first.
            limit: yield at most so many.
        """
        head = self.head(adapter)
        last = head.seq if head else 0
        wanted = last if limit is None else min(limit, last)
        seqs = range(last, last - wanted, -1) if newest_first else range(1, wanted + 1)
        for seq in seqs:
            claim = self.claim(version_key(adapter, seq))
            if claim is not None:
                yield seq, claim.version

    def version_of_job(self, adapter: str, job_id: str, kind: str | None = None) -> tuple[str, Manifest] | None:
        """Return the version, of the given kind or any, that a rollback or a forgetting published; None if none."""
        for version in reversed(load_job_versions(self.store, adapter, job_id)):
            manifest = self.manifest(adapter, version)
            if kind in {None, manifest.kind} and self._is_version(manifest, version):
                return version, manifest
        return None

    def adapters(self) -> Iterator[str]:
        """Yield every adapter that has a version, or whose first publish was interrupted; sorted."""
        for key in self.store.list("adapters/"):
            yield key.removeprefix("adapters/")

    def alias(self, adapter: str, alias: str = LIVE) -> AliasState | None:
        """Return where the alias points; None if it was never set.

        Raises:
            IntegrityError: the stored object is not this alias, or no trusted key signed it.
        """
        state = self.unverified_alias(adapter, alias)
        if state is None:
            return None
        if (state.adapter, state.alias) != (adapter, alias):
            key = alias_key(adapter, alias)
            raise IntegrityError(f"{key} is another alias", got=f"{state.adapter}#{state.alias}", allowed=key)
        state.check_signature(self.trust)
        return state

    def unverified_alias(self, adapter: str, alias: str) -> AliasState | None:
        """Return what is stored as the alias, whoever signed it and whichever alias it is; None if there is nothing.

        Raises:
            IntegrityError: the stored object is no alias.
        """
        key = alias_key(adapter, alias)
        try:
            stored = self.store.get(key, MAX_RECORD_BYTES)
        except NotFoundError:
            return None
        return parse_record(AliasState, key, stored.data).model_copy(update={"etag": stored.etag})

    def revocations(self, adapter: str) -> Iterator[Revocation]:
        """Yield the adapter's revoked versions by sequence number."""
        prefix = f"revocations/{check_adapter(adapter)}/"
        for key in self.store.list(prefix):
            if len(key) == len(prefix) + SEQ_DIGITS and key[len(prefix) :].isdigit():
                yield parse_record(Revocation, key, self.store.get(key, MAX_RECORD_BYTES).data)

    # ---- writing

    def publish(
        self,
        manifest: Manifest,
        blobs: Iterable[bytes],
        verify: Callable[[Manifest], None],
        alias: str = LIVE,
    ) -> Publication:
        """Make the manifest a version and, if its outcome is `promoted`, point the alias at it.

        May be interrupted after any step and called again. If another publisher claimed the same update first, that
        publisher's version is completed and returned.

        Args:
            manifest: the version to publish.
            blobs: the bytes of its blobs that may not be stored yet, written in this order.
            verify: the trial load; called once all blobs were read back. What it raises stops the publish before
                anything names the version.
            alias: the alias to move.

        Raises:
            ConflictError: the adapter has another version after the manifest's `head`: load the head again and train
                from there.
            IntegrityError: a stored blob is not what the manifest says.
        """
        alias_key(manifest.adapter, alias)
        for blob in blobs:
            put_blob(self.store, blob)
        self._failpoint("publish.blobs")

        self._verify(manifest, verify)
        self._failpoint("publish.verify")

        version = self.record(manifest)
        if manifest.kind in _ALIAS_KINDS:  # an update needs no such record: its cut number says whether it was done
            record_job_version(self.store, manifest.adapter, manifest.job_id, version)
        self._failpoint("publish.manifest")

        winner = self._claim_update(manifest, version)
        if winner != version:
            version, manifest = winner, self.manifest(manifest.adapter, winner)
            if not self._is_version(manifest, version):
                self._verify(manifest, verify)
        self._failpoint("publish.claim_update")

        was_new = self._claim_seq(manifest, version)
        self._failpoint("publish.claim_seq")

        promoted = manifest.outcome == "promoted"
        self._failpoint("publish.gate")

        state = self.swap_alias(manifest, version, alias) if promoted else None
        if promoted:
            self._failpoint("publish.alias")
        return Publication(version, manifest, state, was_new)

    def record(self, manifest: Manifest) -> str:
        """Store a manifest and its signature, without a sequence number; return its version id.

        The signature is stored before anything names the version, so that no reader finds a version without one.
        """
        version = manifest.digest()
        self._signatures.sign(manifest.adapter, version, manifest.weights.digest)
        self.store.put_if_absent(manifest_key(manifest.adapter, version), manifest.to_bytes())
        return version

    def aliases(self, adapter: str) -> Iterator[AliasState]:
        """Yield every alias of the adapter."""
        prefix = f"aliases/{check_adapter(adapter)}/"
        for key in self.store.list(prefix):
            name = key[len(prefix) :]
            state = None if "/" in name else self.alias(adapter, name)
            if state is not None:
                yield state

    def swap_alias(self, manifest: Manifest, version: str, alias: str = LIVE) -> AliasState | None:
        """Point the alias at a promoted version, unless it points at that sequence number or a later one already.

        Args:
            manifest: the version's manifest.
            version: the version's id.
            alias: the alias to move.

        Returns:
            The alias afterwards; None only if it is not set and the version, or one whose state it took over, was revoked
            in the meantime.

        Raises:
            ConflictError: the version's sequence number belongs to another version, or other writers move the alias
                without end.
        """
        if not self._is_version(manifest, version):
            raise ConflictError(
                f"{version} is not version {manifest.seq} of {manifest.adapter}", remedy="publish it first"
            )
        for _ in range(_SWAP_ATTEMPTS):
            state = self.alias(manifest.adapter, alias)
            # A late writer must never move the alias back, and a version that was revoked in between must not go live.
            # Revoke first, then move: whoever revokes looks afterwards for versions that took the state over, and moves
            # the alias past them. So a revocation after this look makes the compare-and-swap fail, or is followed by one.
            if (state and state.seq >= manifest.seq) or self.is_contaminated(manifest):
                return state
            written = self._aliases.replace(
                manifest.adapter, alias, state, version, manifest.seq,
                _ALIAS_KINDS.get(manifest.kind, "promoted"), manifest.reason,
            )  # fmt: skip
            if written:
                return written
        raise _contended(manifest.adapter, alias)

    def retire(self, adapter: str, alias: str, reason: str, version: str) -> AliasState | None:
        """Retire the alias: nothing is served until a later version is published.

        Args:
            adapter: the adapter.
            alias: the alias.
            reason: shown to people.
            version: retire only while the alias points at this version; a late writer must not take a newer one out of
                service.

        Returns:
            The alias afterwards; None if it is not set.
        """
        for _ in range(_SWAP_ATTEMPTS):
            state = self.alias(adapter, alias)
            if state is None or state.kind == "retired" or state.version != version:
                return state
            written = self._aliases.replace(adapter, alias, state, state.version, state.seq, "retired", reason)
            if written:
                return written
        raise _contended(adapter, alias)

    def converge(self, adapter: str, alias: str = LIVE) -> AliasState | None:
        """Complete a publish that was interrupted before it moved the alias; return the alias afterwards."""
        head = self.head(adapter)
        state = self.alias(adapter, alias)
        seq, version = (head.seq, head.version) if head else (0, "")
        while seq > (state.seq if state else 0):
            manifest = self.manifest(adapter, version)
            if manifest.outcome == "promoted" and not self.is_contaminated(manifest):
                return self.swap_alias(manifest, version, alias)
            seq, version = seq - 1, manifest.head or ""
        return state

    def revoke(self, adapter: str, version: str, reason: str) -> Revocation:
        """Record that a version must not be served; the first reason is kept.

        Returns:
            The revocation, perhaps an earlier one.

        Raises:
            NotFoundError: there is no such version.
        """
        manifest = self.unverified_manifest(adapter, version)
        if not self._is_version(manifest, version):
            raise NotFoundError(f"{version} is not a version of {adapter}", remedy="see `perennial adapters history`")
        key = revocation_key(adapter, manifest.seq)
        revocation = Revocation(
            adapter=adapter, version=version, seq=manifest.seq, reason=reason, revoked_at=self._now()
        )
        if not self.store.put_if_absent(key, revocation.to_bytes()):
            return parse_record(Revocation, key, self.store.get(key, MAX_RECORD_BYTES).data)
        return revocation

    def is_revoked(self, adapter: str, seq: int) -> bool:
        """Return whether the version with that sequence number was revoked."""
        return self.store.exists(revocation_key(adapter, seq))

    def is_contaminated(self, manifest: Manifest) -> bool:
        """Return whether a version must not be served: it was revoked, or took over the state of one that was.

        A process may take over a state while that is forgotten, and end before it can see the revocation. Nobody then
        revokes its version, so the versions whose state was taken over are looked at.

        Args:
            manifest: the version's manifest.
        """
        if self.is_revoked(manifest.adapter, manifest.seq):
            return True
        while manifest.kind in _ALIAS_KINDS and manifest.parent is not None:
            version, manifest = manifest.parent, self.manifest(manifest.adapter, manifest.parent)
            if manifest.kind == "replayed":  # has no sequence number, and so no revocation
                return False
            if self.is_revoked(manifest.adapter, manifest.seq) and self._is_version(manifest, version):
                return True
        return False

    # ---- steps of a publish

    def _verify(self, manifest: Manifest, verify: Callable[[Manifest], None]) -> None:
        """Read every blob back, check its size and digest, then call the trial load."""
        start = manifest.start.weights if manifest.start else None
        tensors = {ref.digest for ref in (manifest.weights, manifest.optimizer, start) if ref}
        for ref in manifest.blobs():
            if ref == start and manifest.seq > 1:  # verified with the first version
                continue
            data = get_blob(self.store, ref.digest)
            if len(data) != ref.size_bytes:
                raise IntegrityError(
                    f"blob {ref.digest} has another size than its manifest says",
                    got=f"{len(data)} bytes",
                    allowed=f"{ref.size_bytes} bytes",
                )
            if ref.digest in tensors:
                check_safetensors(data)
        verify(manifest)

    def _claim_update(self, manifest: Manifest, version: str) -> str:
        """Return the version that is published for the update: this one, or the one that claimed it first."""
        key = f"updates/{manifest.adapter}/{hex_of(manifest.update_id)}"
        ours = Claim(version=version).to_bytes()
        for _ in range(_SWAP_ATTEMPTS):
            if self.store.put_if_absent(key, ours):
                return version
            stored = self.store.get(key, MAX_RECORD_BYTES)
            winner = parse_record(Claim, key, stored.data).version
            if winner == version or not self._lost_its_seq(self.manifest(manifest.adapter, winner), winner):
                return winner
            # Its sequence number went to another version, so it can never be published: the update is free again.
            try:
                self.store.compare_and_swap(key, ours, stored.etag)
            except ConflictError:
                continue
            return version
        raise ConflictError(f"too many writers claim {key}", remedy="publish again")

    def _claim_seq(self, manifest: Manifest, version: str) -> bool:
        """Claim the sequence number; return False if an earlier call of this publish had claimed it."""
        adapter, seq = manifest.adapter, manifest.seq
        before = self.claim(version_key(adapter, seq - 1)) if seq > 1 else None
        if (before.version if before else None) != manifest.head:
            raise _stale(manifest, before.version if before else "no version")
        if seq == 1:
            self.store.put_if_absent(f"adapters/{adapter}", b"{}")
        if self.store.put_if_absent(version_key(adapter, seq), Claim(version=version).to_bytes()):
            return True
        claimed = self.claim(version_key(adapter, seq))
        if claimed is None or claimed.version != version:
            raise _stale(manifest, claimed.version if claimed else "a version that was deleted")
        return False

    def _is_version(self, manifest: Manifest, version: str) -> bool:
        claim = self.claim(version_key(manifest.adapter, manifest.seq))
        return claim is not None and claim.version == version

    def _lost_its_seq(self, manifest: Manifest, version: str) -> bool:
        claim = self.claim(version_key(manifest.adapter, manifest.seq))
        return claim is not None and claim.version != version

    def claim(self, key: str) -> Claim | None:
        """Return which version claimed a sequence number, by its key; None if none did."""
        try:
            return parse_record(Claim, key, self.store.get(key, MAX_RECORD_BYTES).data)
        except NotFoundError:
            return None

    def _exists(self, adapter: str, seq: int) -> bool:
        return self.store.exists(version_key(adapter, seq))

    def _newest_seq(self, adapter: str, known: int) -> int:
        """Return the last sequence number at or after `known`, which exists or is 0.

        Exponential search (Bentley and Yao 1976): steps double until a number is free, then halve.
        """
        step = 1
        while self._exists(adapter, known + step):
            known += step
            step *= 2
        while step > 1:
            step //= 2
            if self._exists(adapter, known + step):
                known += step
        return known


def _stale(manifest: Manifest, found: str) -> ConflictError:
    return ConflictError(
        f"version {manifest.seq} of {manifest.adapter} cannot follow {manifest.head or 'nothing'}",
        got=found,
        allowed=manifest.head or "no version before it",
        remedy="load the head again and train from there",
    )


def _contended(adapter: str, alias: str) -> ConflictError:
    return ConflictError(f"too many writers move {adapter}#{alias}", remedy="do it again")
