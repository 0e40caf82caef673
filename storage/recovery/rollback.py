"""Go back to an earlier version, or revoke one, at once: nothing here trains, so it needs neither Kafka nor the model.

An emergency brake must not wait behind updates that train for minutes. So the command line and retain change the alias
themselves, by the same steps as a learner: they publish a version that takes over the earlier state. The learner that
trains meanwhile meets a conflict and starts again from that version. The job that they send to adapter-jobs as well is
the record for people; the learner finds that it is done and publishes the event.

Which version "the one before" is, is decided from the version that was live at the time of the request. Decided later it
would be relative to whatever updates were learned in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from perennial.storage.errors import ConflictError, NotFoundError, StoreError
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.collected import load_collected, pinned
from perennial.storage.registry.manifest import Kind, Manifest, update_id
from perennial.storage.registry.registry import AliasState, Head, Publication, Registry

ATTEMPTS = 64

RollbackReason = Literal[
    "unknown-version",
    "not-promoted",
    "revoked-version",
    "nothing-to-roll-back-to",
    "base-mismatch",
    "collected-version",
]


class RollbackError(StoreError):
    """The adapter cannot go back as requested.

    Args:
        reason: a short identifier.
        message: one sentence for people.
        got: the value that was found.
        allowed: the values that would have been accepted.
    """

    def __init__(self, reason: RollbackReason, message: str, *, got: object = None, allowed: object = None) -> None:
        self.reason: RollbackReason = reason
        super().__init__(
            message, got=got, allowed=allowed, remedy="choose another version: see `perennial adapters history`"
        )


def version_before(registry: Registry, adapter: str, version: str | None) -> str:
    """Return the newest promoted version before this one that may be served; after a rollback, before its target.

    Versions of another base, rank or alpha are passed over: neither replicas nor learners of this one can use their state.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        version: a version that is or was live; None if none ever was.

    Raises:
        RollbackError: there is none.
        StoreError: a manifest cannot be read.
    """
    live = registry.manifest(adapter, version) if version is not None else None
    while live is not None and live.kind == "rollback" and live.parent:
        live = registry.manifest(adapter, live.parent)
    before = live.head if live else None
    collected = load_collected(registry.store, adapter).all
    while before is not None:
        manifest = registry.manifest(adapter, before)
        promoted = manifest.outcome == "promoted" and manifest.kind != "quarantine" and before not in collected
        fits = live is not None and _same_shape(manifest, live)
        if promoted and fits and not registry.is_contaminated(manifest):
            return before
        before = manifest.head
    raise RollbackError(
        "nothing-to-roll-back-to", "no version was live before", got=version, allowed="an earlier version"
    )


def servable(registry: Registry, adapter: str, version: str) -> tuple[str, Manifest]:
    """Return a version that may be made live again, and its manifest; for a quarantine version, its parent.

    Raises:
        RollbackError: it may not be served.
        StoreError: a manifest cannot be read.
    """
    try:
        manifest = registry.manifest(adapter, version)
    except NotFoundError as error:
        raise RollbackError("unknown-version", "the version does not exist", got=version) from error
    if manifest.kind == "quarantine" and manifest.parent:
        version, manifest = manifest.parent, registry.manifest(adapter, manifest.parent)
    if manifest.outcome != "promoted" or manifest.kind == "replayed":
        raise RollbackError("not-promoted", "the version was never live", got=f"{version} {manifest.outcome}")
    if registry.is_contaminated(manifest):
        raise RollbackError("revoked-version", "the version, or the one that it took over, was revoked", got=version)
    if version in load_collected(registry.store, adapter).all:
        raise collected_error(version)
    return version, manifest


def collected_error(version: str) -> RollbackError:
    """Return the error of a rollback to a version whose weights were deleted to save space."""
    return RollbackError(
        "collected-version", "the weights of this version were deleted by `perennial gc`", got=version,
        allowed="a version that is not marked as collected",
    )  # fmt: skip


def carried_manifest(
    head: Head,
    source: Manifest,
    state: Mapping[str, object],
    *,
    kind: Kind,
    parent: str | None,
    served: bool,
    job_id: str,
    reason: str,
    code: str,
    threads: int,
) -> Manifest:
    """Return the manifest of a version that follows the head, trains nothing, and takes over a state.

    Args:
        head: the version that it follows; its high-water marks stay, so nothing is learned again.
        source: the version whose recipe, base and rank it takes over.
        state: the fields of the manifest that name the state's blobs.
        kind: what makes the version.
        parent: the version that the manifest names as its parent.
        served: whether the state was trained and may be served.
        job_id: the job that makes it.
        reason: shown to people.
        code: the engine that computed it.
        threads: CPU threads of torch.
    """
    # The head is part of the update's id: a job that is run again after further versions makes another version, it does
    # not claim its first one again. A rollback is recognised by its job instead, whoever carries it out.
    config = {**source.config, "job_id": job_id}
    if kind != "rollback":
        config |= {"kind": kind, "head": head.version}
    marks, epochs = head.manifest.marks, head.manifest.epochs
    return source.model_copy(
        update={
            "seq": head.seq + 1, "kind": kind, "outcome": "promoted" if served else "unchanged", "reason": reason,
            "parent": parent, "head": head.version, "job_id": job_id, "code": code, "threads": threads,
            "update_id": update_id(source.adapter, parent, marks, config, epochs), "batch": None, "cut": None,
            "next_cut": head.manifest.next_cut, "learned": [], "skipped": [], "dropped": 0, "tokens": 0,
            "gate": source.gate if served else GateFigures(),
            "probes": source.probes if served else {}, "marks": marks, "epochs": epochs, **state,
            "general": head.manifest.general or source.general, "extends": head.manifest.extends, "published_from_ms": None, "published_to_ms": None,
        }
    )  # fmt: skip


def roll_back(
    registry: Registry, adapter: str, alias: str, version: str, job_id: str, reason: str
) -> AliasState | None:
    """Make an earlier version's state live now, whatever waits or trains; return the alias afterwards.

    Doing it again with the same job id changes nothing. High-water marks stay, so what was learned since is not learned
    again; updates that wait are learned on top of the version.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        alias: the alias to move.
        version: the version to make live.
        job_id: names the request.
        reason: shown to people.

    Raises:
        RollbackError: the version may not be served.
        StoreError: the store failed.
        ConflictError: other writers were first at every attempt.
    """
    version, target = servable(registry, adapter, version)
    with pinned(registry.store, adapter, version, job_id) as has_blobs:
        if not has_blobs:
            raise collected_error(version)
        return _carry_out(registry, adapter, alias, version, target, "rollback", job_id, reason or "rollback")


def revoke(registry: Registry, adapter: str, alias: str, version: str, job_id: str, reason: str) -> AliasState | None:
    """Take a version out of service now, and every version that is live because it was trained from that one.

    The newest earlier promoted version that is not revoked becomes live, or the alias is retired: a learner then adds
    the state from before anything was learned. Doing it again with the same job id changes nothing.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        alias: the alias that may point at the version.
        version: the version to revoke.
        job_id: names the request.
        reason: shown to people.

    Returns:
        The alias afterwards.

    Raises:
        NotFoundError: the version does not exist.
        StoreError: the store failed.
        ConflictError: other writers were first at every attempt.
    """
    if registry.version_of_job(adapter, job_id) is not None:
        return registry.converge(adapter, alias)
    registry.revoke(adapter, version, reason or "revoked")
    state = registry.alias(adapter, alias)
    live = descendants_to_revoke(registry, adapter, state.version if state else None, version)
    if state is None or not live:
        return state
    for descendant in live:
        registry.revoke(adapter, descendant, reason or "revoked")
    try:
        before = version_before(registry, adapter, version)
    except RollbackError:
        return registry.retire(adapter, alias, reason or "revoked", state.version)
    target = registry.manifest(adapter, before)
    with pinned(registry.store, adapter, before, job_id) as has_blobs:
        if not has_blobs:  # a collection was faster: take the next one
            raise ConflictError(f"{before} was collected meanwhile", remedy="run the same command again")
        return _carry_out(registry, adapter, alias, before, target, "revoke", job_id, reason or "revoked")


def descendants_to_revoke(registry: Registry, adapter: str, live: str | None, version: str) -> list[str]:
    """Return the promoted versions from the live one back to `version`; empty if the live one was not trained from it."""
    first_seq = registry.manifest(adapter, version).seq
    found: list[str] = []
    step = live
    while step is not None:
        manifest = registry.manifest(adapter, step)
        if manifest.outcome == "promoted" and manifest.kind != "replayed":
            found.append(step)
        if step == version:
            return found
        if manifest.kind != "replayed" and manifest.seq <= first_seq:
            return []
        step = manifest.state_parent
    return []


def _carry_out(
    registry: Registry, adapter: str, alias: str, version: str, target: Manifest, kind: Kind, job_id: str, reason: str
) -> AliasState | None:
    state = {"weights": target.weights, "optimizer": target.optimizer, "replay": target.replay}
    for _ in range(ATTEMPTS):
        if registry.version_of_job(adapter, job_id) is not None:
            return registry.converge(adapter, alias)
        head = registry.head(adapter)
        if head is None:
            raise RollbackError("nothing-to-roll-back-to", "the adapter has no version", got=adapter)
        if not _same_shape(head.manifest, target):
            raise RollbackError(
                "base-mismatch", "the version has another base, rank or alpha than the newest one",
                got=_shape(target), allowed=_shape(head.manifest),
            )  # fmt: skip
        if registry.is_revoked(adapter, target.seq):
            raise _revoked_meanwhile(version)
        manifest = carried_manifest(
            head, target, state, kind=kind, parent=version, served=True, job_id=job_id,
            reason=reason, code=target.code, threads=target.threads,
        )  # fmt: skip
        try:
            publication: Publication = registry.publish(manifest, (), lambda _: None, alias)
        except ConflictError:  # a learner published first; the target stays the one that was requested
            continue
        # A forgetting revokes its versions, then looks for versions that took over their state, then deletes their blobs.
        # This one publishes, then looks for the revocation. Whichever is second sees the other.
        if registry.is_revoked(adapter, target.seq):
            _take_back(registry, adapter, alias, publication, job_id)
            raise _revoked_meanwhile(version)
        return publication.alias_state
    raise ConflictError(
        f"other writers were first {ATTEMPTS} times in a row on {adapter}", remedy="run the same command again"
    )


def _take_back(registry: Registry, adapter: str, alias: str, publication: Publication, job_id: str) -> None:
    """Publish the state before a rollback again, because what the rollback took over was revoked meanwhile."""
    registry.revoke(adapter, publication.version, "the version that it took over is revoked")
    head, state, before = registry.head(adapter), registry.alias(adapter, alias), publication.manifest.head
    if publication.version not in {head.version if head else None, state.version if state else None}:
        return  # the forgetting saw it, too, and replaced it
    while before is not None:
        try:
            version, target = servable(registry, adapter, before)
        except RollbackError:
            before = registry.manifest(adapter, before).head
            continue
        if not _same_shape(target, publication.manifest):
            before = target.head
            continue
        reason = f"{job_id} took over a version that is revoked"
        _carry_out(registry, adapter, alias, version, target, "revoke", f"{job_id} taken back", reason)
        return
    registry.retire(adapter, alias, "the version is revoked", publication.version)


def finish_interrupted(registry: Registry, adapter: str, alias: str) -> None:
    """Take back the newest version where a process took over a state that was revoked meanwhile, and ended before it saw.

    Call it before anything starts from the newest version.

    Args:
        registry: the adapter's versions.
        adapter: the adapter.
        alias: the alias to move.

    Raises:
        StoreError: the store failed.
        ConflictError: other writers were first at every attempt.
    """
    head = registry.head(adapter)
    if head is None or head.manifest.kind not in {"rollback", "revoke"} or not registry.is_contaminated(head.manifest):
        return
    _take_back(registry, adapter, alias, Publication(head.version, head.manifest, None, False), head.manifest.job_id)


def _same_shape(one: Manifest, other: Manifest) -> bool:
    """Return whether two versions have one base, rank and alpha, so that a learner of one can go on from the other."""
    shapes = [(each.base_sha256, each.rank, each.config.get("alpha")) for each in (one, other)]
    return shapes[0] == shapes[1]


def _shape(manifest: Manifest) -> str:
    return f"{manifest.base_model} rank {manifest.rank} alpha {manifest.config.get('alpha')}"


def _revoked_meanwhile(version: str) -> RollbackError:
    return RollbackError("revoked-version", "the version was revoked meanwhile", got=version)
