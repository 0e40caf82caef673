"""The registry: lines of versions, aliases, revocations, and the publish steps that may be cut off anywhere.

A version exists from the moment its seq is claimed; the alias is moved after that, by compare-and-swap.
Sequence numbers have no gaps, so the head is found by probing, never by listing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError
from perennial.storage.failpoints import failpoint as default_failpoint
from perennial.storage.objects.keys import hex_of
from perennial.storage.objects.object_store import ObjectStore, get_blob, get_verified, put_blob
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import MAX_MANIFEST_BYTES, Manifest, update_id
from perennial.storage.registry.records import (
    MAX_RECORD_BYTES,
    SEQ_DIGITS,
    AliasKind,
    AliasState,
    Claim,
    Revocation,
    alias_key,
    check_adapter,
    manifest_key,
    parse_record,
    revocation_key,
    version_key,
)

__all__ = ["AliasState", "Head", "Publication", "Registry", "Revocation", "manifest_key", "update_id"]

LIVE = "live"
_KINDS: dict[str, AliasKind] = {
    "rollback": "rolled_back", "revoke": "revoked", "quarantine": "revoked", "forget": "revoked",
}  # fmt: skip
_SWAP_ATTEMPTS = 64
K = TypeVar("K")
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """The last used entries, so that memory stays bounded with any number of adapters."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)


@dataclass(frozen=True)
class Head:
    """The newest version of an adapter."""

    seq: int
    version: str
    manifest: Manifest


@dataclass(frozen=True)
class Publication:
    """What became of a publish: the version that stands for the update, maybe another publisher's.

    alias_state: the alias as it now is, None where the gate stopped this version. was_new: this call claimed
    the seq.
    """

    version: str
    manifest: Manifest
    alias_state: AliasState | None
    was_new: bool


class Registry:
    """Versions and aliases of adapters in one object store; safe to share among threads."""

    def __init__(
        self,
        store: ObjectStore,
        nonce: Callable[[], str],
        now: Callable[[], datetime],
        failpoint: Callable[[str], None] = default_failpoint,
        cached: int = 256,
    ) -> None:
        self.store = store
        self._nonce = nonce
        self._now = now
        self._failpoint = failpoint
        self._manifests: _Recent[tuple[str, str], Manifest] = _Recent(cached)
        self._hints: _Recent[str, int] = _Recent(cached * 64)

    # ---- reading

    def head(self, adapter: str) -> Head | None:
        """The newest version, None where there is none. Two requests if nothing is new since the last."""
        check_adapter(adapter)
        claim = None
        known = self._hints.get(adapter)
        if known:
            claim = self._claim(version_key(adapter, known))
        if claim is None:
            alias = self.alias(adapter)
            known = alias.seq if alias and self._exists(adapter, alias.seq) else 0
        newest = self._gallop(adapter, known or 0)
        if newest == 0:
            return None
        if claim is None or newest != known:
            claim = self._claim(version_key(adapter, newest))
        if claim is None:
            raise NotFoundError(f"version {newest} of {adapter} went away while it was read", remedy="do it again")
        self._hints.put(adapter, newest)
        return Head(newest, claim.version, self.manifest(adapter, claim.version))

    def manifest(self, adapter: str, version: str) -> Manifest:
        """A version's manifest, digest verified. Raises NotFoundError, IntegrityError."""
        cached = self._manifests.get((adapter, version))
        if cached is not None:
            return cached
        key = manifest_key(adapter, version)
        manifest = Manifest.from_bytes(get_verified(self.store, key, version, MAX_MANIFEST_BYTES))
        if manifest.adapter != adapter:
            raise IntegrityError(f"{key} is another adapter's manifest", got=manifest.adapter, allowed=adapter)
        self._manifests.put((adapter, version), manifest)
        return manifest

    def versions(self, adapter: str, newest_first: bool = True, limit: int | None = None) -> Iterator[tuple[int, str]]:
        """(seq, version) along the adapter's line."""
        head = self.head(adapter)
        last = head.seq if head else 0
        wanted = last if limit is None else min(limit, last)
        line = range(last, last - wanted, -1) if newest_first else range(1, wanted + 1)
        for seq in line:
            claim = self._claim(version_key(adapter, seq))
            if claim is not None:
                yield seq, claim.version

    def adapters(self) -> Iterator[str]:
        """Every adapter that has, or was about to get, a version; sorted."""
        for key in self.store.list("adapters/"):
            yield key.removeprefix("adapters/")

    def alias(self, adapter: str, alias: str = LIVE) -> AliasState | None:
        """Where the alias points, None where it was never set."""
        key = alias_key(adapter, alias)
        try:
            stored = self.store.get(key, MAX_RECORD_BYTES)
        except NotFoundError:
            return None
        state = parse_record(AliasState, key, stored.data)
        if (state.adapter, state.alias) != (adapter, alias):
            raise IntegrityError(f"{key} is another alias", got=f"{state.adapter}#{state.alias}", allowed=key)
        return state.model_copy(update={"etag": stored.etag})

    def revocations(self, adapter: str) -> Iterator[Revocation]:
        """The adapter's revoked versions, by seq."""
        above = f"revocations/{check_adapter(adapter)}/"
        for key in self.store.list(above):
            if len(key) == len(above) + SEQ_DIGITS and key[len(above) :].isdigit():
                yield parse_record(Revocation, key, self.store.get(key, MAX_RECORD_BYTES).data)

    # ---- writing

    def publish(
        self,
        manifest: Manifest,
        blobs: Iterable[bytes],
        verify: Callable[[Manifest], None],
        alias: str = LIVE,
    ) -> Publication:
        """Make the manifest a version and, if its outcome is `promoted`, point the alias at it: steps 1 to 7.

        May be cut off anywhere and called again. `verify` (the trial load) sees the manifest once all its
        blobs were read back; what it raises stops the publish before anything names the version. Where
        another publisher claimed the same update first, its version is the one that is finished and returned.
        Raises ConflictError where the line went on elsewhere since the manifest's `head`: load the head again
        and decide anew.
        """
        alias_key(manifest.adapter, alias)
        for blob in blobs:
            put_blob(self.store, blob)
        self._failpoint("publish.blobs")

        self._verify(manifest, verify)
        self._failpoint("publish.verify")

        data = manifest.to_bytes()
        version = manifest.digest()
        self.store.put_if_absent(manifest_key(manifest.adapter, version), data)
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
        """Store a manifest that takes no place on the line and is never served; its version id."""
        version = manifest.digest()
        self.store.put_if_absent(manifest_key(manifest.adapter, version), manifest.to_bytes())
        return version

    def aliases(self, adapter: str) -> Iterator[AliasState]:
        """Every alias of the adapter."""
        above = f"aliases/{check_adapter(adapter)}/"
        for key in self.store.list(above):
            name = key[len(above) :]
            state = None if "/" in name else self.alias(adapter, name)
            if state is not None:
                yield state

    def swap_alias(self, manifest: Manifest, version: str, alias: str = LIVE) -> AliasState | None:
        """Point the alias at a promoted version of the line, unless it is at that seq or a later one already.

        The alias as it is afterwards; None only where it is not set and the version was revoked meanwhile.
        Raises ConflictError where the version is not on its line.
        """
        if not self._is_version(manifest, version):
            raise ConflictError(
                f"{version} is not version {manifest.seq} of {manifest.adapter}", remedy="publish it first"
            )
        for _ in range(_SWAP_ATTEMPTS):
            state = self.alias(manifest.adapter, alias)
            # A late writer must never move the alias back; and what was revoked in between must not go live.
            if (state and state.seq >= manifest.seq) or self.is_revoked(manifest.adapter, manifest.seq):
                return state
            following = self._following(
                manifest.adapter, alias, state, version, manifest.seq,
                _KINDS.get(manifest.kind, "promoted"), manifest.reason,
            )  # fmt: skip
            written = self._write_alias(following, state)
            if written:
                return written
        raise _contended(manifest.adapter, alias)

    def retire(self, adapter: str, alias: str, reason: str, version: str) -> AliasState | None:
        """Have the version served no more, and nothing until a later one. None where the alias is not set.

        Unchanged where the alias is at another version by then: a late writer must not take that out of service.
        """
        for _ in range(_SWAP_ATTEMPTS):
            state = self.alias(adapter, alias)
            if state is None or state.kind == "retired" or state.version != version:
                return state
            following = self._following(adapter, alias, state, state.version, state.seq, "retired", reason)
            written = self._write_alias(following, state)
            if written:
                return written
        raise _contended(adapter, alias)

    def converge(self, adapter: str, alias: str = LIVE) -> AliasState | None:
        """Finish a publish that was cut off before its alias swap: the alias as it is afterwards."""
        head = self.head(adapter)
        state = self.alias(adapter, alias)
        seq, version = (head.seq, head.version) if head else (0, "")
        while seq > (state.seq if state else 0):
            manifest = self.manifest(adapter, version)
            if manifest.outcome == "promoted" and not self.is_revoked(adapter, seq):
                return self.swap_alias(manifest, version, alias)
            seq, version = seq - 1, manifest.head or ""
        return state

    def revoke(self, adapter: str, version: str, reason: str) -> Revocation:
        """Record that a version must not be served; the first reason stands. Raises NotFoundError."""
        manifest = self.manifest(adapter, version)
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
        """Whether the version at that seq was revoked."""
        return self.store.exists(revocation_key(adapter, seq))

    # ---- the steps

    def _verify(self, manifest: Manifest, verify: Callable[[Manifest], None]) -> None:
        tensors = {manifest.weights.digest, manifest.optimizer.digest if manifest.optimizer else ""}
        for ref in manifest.blobs():
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
        """The version that stands for the update: ours, or the one of who was first."""
        key = f"updates/{manifest.adapter}/{hex_of(manifest.update_id)}"
        ours = Claim(version=version).to_bytes()
        for _ in range(_SWAP_ATTEMPTS):
            if self.store.put_if_absent(key, ours):
                return version
            stored = self.store.get(key, MAX_RECORD_BYTES)
            winner = parse_record(Claim, key, stored.data).version
            if winner == version or not self._is_dead(self.manifest(manifest.adapter, winner), winner):
                return winner
            # Its seq went to another version, so it never can be published: the update is free again.
            try:
                self.store.compare_and_swap(key, ours, stored.etag)
            except ConflictError:
                continue
            return version
        raise ConflictError(f"too many writers claim {key}", remedy="publish again")

    def _claim_seq(self, manifest: Manifest, version: str) -> bool:
        adapter, seq = manifest.adapter, manifest.seq
        before = self._claim(version_key(adapter, seq - 1)) if seq > 1 else None
        if (before.version if before else None) != manifest.head:
            raise _stale(manifest, before.version if before else "no version")
        if seq == 1:
            self.store.put_if_absent(f"adapters/{adapter}", b"{}")
        if self.store.put_if_absent(version_key(adapter, seq), Claim(version=version).to_bytes()):
            return True
        standing = self._claim(version_key(adapter, seq))
        if standing is None or standing.version != version:
            raise _stale(manifest, standing.version if standing else "a version that was deleted")
        return False

    def _is_version(self, manifest: Manifest, version: str) -> bool:
        claim = self._claim(version_key(manifest.adapter, manifest.seq))
        return claim is not None and claim.version == version

    def _is_dead(self, manifest: Manifest, version: str) -> bool:
        claim = self._claim(version_key(manifest.adapter, manifest.seq))
        return claim is not None and claim.version != version

    def _claim(self, key: str) -> Claim | None:
        try:
            return parse_record(Claim, key, self.store.get(key, MAX_RECORD_BYTES).data)
        except NotFoundError:
            return None

    def _exists(self, adapter: str, seq: int) -> bool:
        return self.store.exists(version_key(adapter, seq))

    def _gallop(self, adapter: str, known: int) -> int:
        """The last seq at or after `known`, which exists (or is 0): doubling steps, then halving ones."""
        step = 1
        while self._exists(adapter, known + step):
            known += step
            step *= 2
        while step > 1:
            step //= 2
            if self._exists(adapter, known + step):
                known += step
        return known

    def _following(
        self,
        adapter: str,
        alias: str,
        state: AliasState | None,
        version: str,
        seq: int,
        kind: AliasKind,
        reason: str,
    ) -> AliasState:
        return AliasState(
            adapter=adapter,
            alias=alias,
            generation=state.generation + 1 if state else 1,
            version=version,
            seq=seq,
            kind=kind,
            previous_version=state.version if state else None,
            reason=reason,
            published_at=self._now(),
            nonce=self._nonce(),
        )

    def _write_alias(self, following: AliasState, state: AliasState | None) -> AliasState | None:
        key = alias_key(following.adapter, following.alias)
        try:
            etag = self.store.compare_and_swap(key, following.to_bytes(), state.etag if state else None)
        except ConflictError:
            return None
        return following.model_copy(update={"etag": etag})


def _stale(manifest: Manifest, standing: str) -> ConflictError:
    return ConflictError(
        f"version {manifest.seq} of {manifest.adapter} cannot follow {manifest.head or 'nothing'}",
        got=standing,
        allowed=manifest.head or "no version before it",
        remedy="load the head again and train from there",
    )


def _contended(adapter: str, alias: str) -> ConflictError:
    return ConflictError(f"too many writers move {adapter}#{alias}", remedy="do it again")
