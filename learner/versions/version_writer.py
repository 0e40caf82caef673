"""The parts that all three kinds of jobs share: the head, states, manifests without training, trial load."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

from perennial.learner.bases.sources import SHIPPED_NAME
from perennial.learner.model.base import Base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import GeneralText, general_texts
from perennial.learner.model.lora import Lora, LoraConfig, from_safetensors
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.model.turns import ComputeTurns, FairLock
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.answers import AnswerCheck
from perennial.learner.training.general_choice import GeneralTextChoice
from perennial.learner.training.personal.layered_lora import LayeredLora
from perennial.learner.training.personal.learned_starts import LearnedStarts
from perennial.learner.training.personal.shared_versions import VersionBeneath, VersionsBeneath
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.state import StateRefs, TrainingState, load_state, to_blobs
from perennial.learner.training.update import Updater
from perennial.learner.versions.alias_events import alias_event
from perennial.learner.versions.engine import code_digest
from perennial.learner.versions.job_result import JobError
from perennial.learner.versions.micro_batches import BatchRows, origin_offset
from perennial.learner.versions.state_cache import StateCache
from perennial.storage.failpoints import failpoint as default_failpoint
from perennial.storage.objects.object_store import ObjectStore, get_blob
from perennial.storage.recovery.rollback import carried_manifest
from perennial.storage.registry.history.example_ids import TextKeys
from perennial.storage.registry.manifest import BlobRef, Kind, LearnedExample, Manifest, Start
from perennial.storage.registry.mark_repairs import load_mark_repairs, repaired_marks
from perennial.storage.registry.registry import Head, Registry
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings


class VersionWriter:
    """Reads an adapter's newest state from the store and prepares manifests; does one job at a time.

    Args:
        registry: versions and aliases.
        updater: trains one update.
        base: the frozen model that the updater trains on.
        threads: CPU threads that torch uses, recorded in every manifest.
        now: wall clock, for events only; manifests hold no wall-clock time.
        failpoint: called with a name at each step where fault tests may stop the process.
        rows: rows of earlier micro-batches, where other writers of the process share them.
        states: states in memory, where other writers of the process share them.
        general_choice: chooses the general text of each update; None: always the updater's own.
        text_keys: the adapters' text keys, where other writers of the process share them.
        extended_by: returns the shared adapter that an adapter extends; None where it extends none.
        learned_from: returns the shared adapter whose users' adapters may be learned from, for one of these; else None.
        trained_over: returns the shared adapter over which an adapter is trained; None: over the base alone.

    Attributes:
        on_step: called after each optimizer step and each forward pass of a measurement.
        text_keys: the adapters' text keys, under which manifests record the ids of examples.
        extended_by: returns the shared adapter that an adapter extends; None where it extends none.
        learned_from: returns the shared adapter whose users' adapters may be learned from, for one of these; else None.
        trained_over: returns the shared adapter over which an adapter is trained; None: over the base alone.
        shared: the versions of shared adapters that may lie beneath others.
    """

    def __init__(
        self,
        registry: Registry,
        updater: Updater,
        base: Base,
        *,
        threads: int,
        now: Callable[[], datetime],
        failpoint: Callable[[str], None],
        rows: BatchRows | None = None,
        states: StateCache | None = None,
        general_choice: GeneralTextChoice | None = None,
        text_keys: TextKeys | None = None,
        extended_by: Callable[[str], str | None] = lambda _: None,
        learned_from: Callable[[str], str | None] = lambda _: None,
        trained_over: Callable[[str], str | None] = lambda _: None,
        shared: VersionsBeneath | None = None,
    ) -> None:
        self.registry = registry
        self.updater = updater
        self.base = base
        self.threads = threads
        self.now = now
        self.failpoint = failpoint
        self.code = code_digest(on_gpu=base.device.type == "cuda")
        self.rows = rows or BatchRows(registry.store, updater.rows)
        self.text_keys = text_keys or TextKeys(registry.store)
        self._states = states or StateCache()
        self._general_choice = general_choice
        self.extended_by = extended_by
        self.learned_from = learned_from
        self.trained_over = trained_over
        lora = updater.lora
        self.shared = shared or VersionsBeneath(registry, base.digest, lora.config, lora.shapes)
        self.on_step: Callable[[], None] = ignore_step

    def sibling(self, slot: str) -> VersionWriter:
        """Return a writer for another thread: the same base, versions and memory, and a LoRA slot of its own.

        Args:
            slot: name of the slot, which no other writer of the process uses.
        """
        lock = self.updater.lock
        with lock or nullcontext():
            lora = Lora(self.base, self.updater.lora.config, slot)
        if isinstance(lock, ComputeTurns):
            lock = ComputeTurns(lock.lock, self.threads)
        return VersionWriter(
            self.registry, replace(self.updater, lora=lora, lock=lock), self.base, threads=self.threads, now=self.now,
            failpoint=self.failpoint, rows=self.rows, states=self._states,
            general_choice=self._general_choice, text_keys=self.text_keys, extended_by=self.extended_by,
            learned_from=self.learned_from, trained_over=self.trained_over, shared=self.shared,
        )  # fmt: skip

    def use_threads(self, threads: int) -> None:
        """Compute with so many CPU threads from now on: with those that a recorded update names, or the worker's own."""
        lock = self.updater.lock
        if isinstance(lock, ComputeTurns):
            lock.threads = threads
        else:
            make_deterministic(threads)

    # ---- reading

    def head(self, adapter: str, *, any_base: bool = False) -> Head | None:
        """Return the newest version, with its high-water marks as repaired by an operator; None where there is none.

        Args:
            adapter: the adapter.
            any_base: also a version of another base, rank or alpha, whose state cannot be loaded here.

        Raises:
            JobError: the adapter was trained on another base, or with another rank or alpha.
        """
        head = self.registry.head(adapter)
        if head is None:
            return None
        if not any_base:
            self.check_base(head.manifest)
        repairs = load_mark_repairs(self.registry.store, adapter)
        if not repairs:
            return head
        marks, epochs = repaired_marks(head.manifest.marks, head.manifest.epochs, repairs)
        return replace(head, manifest=head.manifest.model_copy(update={"marks": marks, "epochs": epochs}))

    def check_base(self, manifest: Manifest) -> None:
        """Raise JobError unless the version has this worker's base, rank and alpha; on another base its weights are noise.

        Alpha scales the weights: under another one they are another adapter, and a later forgetting could not rebuild updates
        of both.
        """
        if manifest.base_sha256 != self.base.digest:
            raise JobError(
                "base-mismatch",
                f"adapter {manifest.adapter} was trained on another base than this worker runs",
                got=f"{self.base.name} {self.base.digest}",
                allowed=f"{manifest.base_model} {manifest.base_sha256}",
            )
        if manifest.rank != self.updater.recipe.rank:
            raise JobError(
                "rank-mismatch",
                f"adapter {manifest.adapter} has another rank than this worker's setting",
                got=self.updater.recipe.rank,
                allowed=manifest.rank,
            )
        alpha = self.updater.recipe.alpha
        if manifest.config.get("alpha", alpha) != alpha:
            raise JobError(
                "alpha-mismatch",
                f"adapter {manifest.adapter} has another alpha than this worker's setting",
                got=alpha,
                allowed=manifest.config["alpha"],
            )

    def initial_state(self, adapter: str, seed: int, start: Start | None = None) -> TrainingState:
        """Return the state of an adapter that has learned nothing.

        Args:
            adapter: the adapter.
            seed: the seed of its recipe.
            start: what it begins with, where users' adapters may be learned from.

        Raises:
            StoreError: the weights of the start cannot be read.
        """
        if start is None:
            return TrainingState(self.updater.lora.initial_weights(adapter, seed))
        if start.weights is None:  # not the A of the shared adapter itself, which is served beside this one
            weights = self.updater.lora.initial_weights(f"{start.shared}/*", seed)
        else:
            weights = from_safetensors(get_blob(self.registry.store, start.weights.digest), self.updater.lora.shapes)
        return TrainingState(weights, adapter=adapter)

    def begin(self, adapter: str, alias: str) -> tuple[Start | None, TrainingState, dict[str, bytes]]:
        """Return what an adapter without a version begins with: its start, the state, and blobs to store with the version.

        Args:
            adapter: the adapter.
            alias: the alias whose versions of other adapters count, where it may learn from them.

        Raises:
            StoreError: the store failed.
        """
        seed, shared = self.updater.recipe.seed, self.learned_from(adapter)
        if shared is None:
            return None, self.initial_state(adapter, seed), {}
        shapes = self.updater.lora.shapes
        start, body = LearnedStarts(self.registry, shapes, self._may_found).start_of(adapter, shared, alias)
        if start.weights is None or body is None:
            return start, self.initial_state(adapter, seed, start), {}
        return start, TrainingState(from_safetensors(body, shapes), adapter=adapter), {start.weights.digest: body}

    def _may_found(self, manifest: Manifest) -> bool:
        """Return whether a version has the base, the rank, the alpha and the seed of an adapter that begins now.

        A mean of what was trained over a shared adapter serves those that are trained over it, and no others.
        """
        recipe = self.updater.recipe
        wanted = (
            self.base.digest,
            recipe.rank,
            recipe.alpha,
            recipe.seed,
            self.trained_over(manifest.adapter) is not None,
        )
        alpha, layered = manifest.config.get("alpha"), manifest.over is not None
        return (manifest.base_sha256, manifest.rank, alpha, manifest.seed, layered) == wanted

    def state_at(self, head: Head | None, adapter: str) -> tuple[TrainingState, str | None]:
        """Return the state to train from and the version that produced it; a refused head has its parent's state."""
        if head is None:
            return self.initial_state(adapter, self.updater.recipe.seed), None
        manifest = head.manifest
        version = head.version if manifest.outcome == "promoted" else manifest.parent
        refs = StateRefs.of_manifest(manifest)
        state = self._states.get(refs)
        if state is None:
            state = load_state(refs, lambda ref: get_blob(self.registry.store, ref.digest), self.updater.lora.shapes)
            if manifest.start is not None:
                state = replace(state, adapter=adapter)
            self.cache_state(refs, state)
        return state, version

    def version_of_job(self, adapter: str, job_id: str, kind: Kind | None = None) -> tuple[str, Manifest] | None:
        """Return the version that a rollback or a forgetting made; None if it made none.

        Args:
            adapter: the job's adapter.
            job_id: the job.
            kind: accept only a version of this kind.
        """
        found = self.registry.version_of_job(adapter, job_id, kind)
        if found is None:  # a release that kept no record per job may have made the newest version
            head = self.registry.head(adapter)
            if head is not None and head.manifest.job_id == job_id and kind in {None, head.manifest.kind}:
                return head.version, head.manifest
        return found

    def current_alias_event(self, adapter: str, alias: str) -> AdapterUpdate | None:
        """Finish a publish that was interrupted and return the event of the alias; None if the alias is not set."""
        state = self.registry.converge(adapter, alias)
        return alias_event(self.registry, state) if state else None

    # ---- updaters

    def updater_of(self, head: Head | None) -> Updater:
        """Return the updater for the adapter's next update, with the general text that it is to have.

        The first update of an adapter may sample the base, which takes a minute.

        Args:
            head: the adapter's newest version; None where there is none.
        """
        if self._general_choice is None:
            return self.updater
        recorded = head.manifest.general if head else None
        return replace(self.updater, general=self._general_choice.for_update(self.updater, recorded, self.on_step))

    def beneath(self, adapter: str, alias: str) -> VersionBeneath | None:
        """Return the shared version that the adapter's next update is trained over; None: the base alone.

        Args:
            adapter: the adapter.
            alias: the alias that says which version of the shared adapter is live.

        Raises:
            StoreError: the store failed.
        """
        shared = self.trained_over(adapter)
        return None if shared is None else self.shared.live(adapter, shared, alias)

    def over(self, updater: Updater, version: VersionBeneath | None) -> Updater:
        """Return the updater with a shared version beneath, in a slot for both.

        Args:
            updater: trains one update.
            version: the shared version; None: the base alone.
        """
        if version is None:
            return updater
        slot = f"{updater.lora.slot}-over-{version.part.config.rank}"
        with updater.lock or nullcontext():
            lora = LayeredLora(self.base, updater.lora.config, version.part, slot)
        return replace(updater, lora=lora)

    def general_text_of(self, manifest: Manifest) -> GeneralText:
        """Return the general text that a recorded update was trained with.

        Raises:
            NotFoundError: it is not stored.
        """
        if self._general_choice is None:
            return self.updater.general
        return self._general_choice.for_rebuild(manifest.general, self.on_step)

    # ---- writing

    def carry_forward_manifest(
        self, head: Head, target: Manifest | None, parent: str | None, kind: Kind, job_id: str, reason: str
    ) -> Manifest:
        """Return the manifest of a version that follows the head, trains nothing, and takes over an earlier state.

        Args:
            head: the version that it follows; its high-water marks stay, so nothing is learned again.
            target: the version whose state it takes over; None for the state of an adapter that has learned nothing,
                which is never served.
            parent: the version that the manifest names as its parent.
            kind: what made the version.
            job_id: the job that makes it.
            reason: shown to people.
        """
        source = target or head.manifest
        start = source.start
        if target:
            refs = StateRefs.of_manifest(target)
        else:
            source = source.model_copy(update={"over": None})
            start = start and start.bare
            refs = to_blobs(self.initial_state(source.adapter, source.seed, start))[0]
        return carried_manifest(
            head, source, {**refs.manifest_fields(), "start": start}, kind=kind, parent=parent,
            served=target is not None and target.optimizer is not None, job_id=job_id, reason=reason, code=self.code,
            threads=self.threads,
        )  # fmt: skip

    def blobs_of_nothing(self, manifest: Manifest) -> dict[str, bytes]:
        """Return the blobs of a version that `carry_forward_manifest` made without a target, by digest."""
        return to_blobs(self.initial_state(manifest.adapter, manifest.seed, manifest.start))[1]

    def learned_examples(
        self, examples: Iterable[ExampleAccepted], merged: Mapping[str, str], updater: Updater | None = None
    ) -> list[LearnedExample]:
        """Return the manifest's records of learned examples, with ids that are not keyed yet.

        Args:
            examples: The examples.
            merged: Ids of those that were merged into another, and that other one's.
            updater: What trained them; None: the worker's own.
        """
        rows_of = (updater or self.updater).rows
        return [
            LearnedExample(
                example_id=example.example_id, partition=partition, offset=offset, epoch=epoch,
                tokens=sum(row.tokens for row in rows_of(example)), merged_into=merged.get(example.example_id),
            )
            for example in examples
            for partition, epoch, offset in [origin_offset(example)]
        ]  # fmt: skip

    def verifier(self, blobs: Mapping[str, bytes]) -> Callable[[Manifest], None]:
        """Return the trial load of a version that is about to be published.

        Args:
            blobs: bytes by digest. They are not read from the store again: the registry has read the stored ones and
                checked their digests.
        """

        def verify(manifest: Manifest) -> None:
            def read(ref: BlobRef) -> bytes:
                return blobs.get(ref.digest) or get_blob(self.registry.store, ref.digest)

            load_state(StateRefs.of_manifest(manifest), read, self.updater.lora.shapes)

        return verify

    # ---- memory

    def cache_state(self, refs: StateRefs, state: TrainingState) -> None:
        """Keep a state in memory; the least recently used one makes room."""
        self._states.put(refs, state)

    def drop_cached(self, digests: Collection[str]) -> None:
        """Remove everything from memory that was read from blobs which are now deleted."""
        self.rows.drop(digests)
        self._states.drop(digests)


def make_version_writer(
    settings: Settings,
    store: ObjectStore,
    base: Base,
    lock: FairLock | None = None,
    report_pass: Callable[[int, float], None] = lambda *_: None,
) -> VersionWriter:
    """Build the learner's parts over a store and a base.

    Args:
        settings: recipe, gate and model.
        store: where versions are stored.
        base: the frozen model; a LoRA slot is put into it.
        lock: held while the base is changed, and for each training step, where other roles share the base.
        report_pass: called with the number of adapters of each round of training, and its seconds.
    """

    def now() -> datetime:
        return datetime.now(UTC)

    make_deterministic(settings.model.threads)
    registry = Registry(
        store, nonce=lambda: uuid4().hex, now=now, failpoint=default_failpoint, trust=settings.signing.trust()
    )
    codec = ExampleTokenizer(base.tokenizer)
    row_tokens = settings.training.row_tokens

    @functools.cache
    def docstrings() -> GeneralText:
        return GeneralText(general_texts("train"), general_texts("anchor"), codec, row_tokens)

    # Another base has its text when its first update needs it: the choice may have to sample it.
    general = docstrings() if base.name == SHIPPED_NAME else GeneralText((), (), codec, row_tokens)
    choice = GeneralTextChoice(store, codec, row_tokens, docstrings, settings.model.general_texts)
    with lock or nullcontext():  # another role may be putting its own slot into the shared base
        lora = Lora(base, LoraConfig(settings.training.rank, settings.training.alpha))
    turns = ComputeTurns(lock, settings.model.threads) if lock else None
    answers = AnswerCheck(codec) if codec.has_template else None
    passes = GatheredPasses(settings.model.pass_adapters, settings.model.pass_wait_ms / 1000, report=report_pass)
    updater = Updater(lora, codec, general, Recipe.of(settings, base.compute_dtype), turns, answers, passes)
    return VersionWriter(
        registry, updater, base, threads=settings.model.threads, now=now, failpoint=default_failpoint,
        general_choice=choice, extended_by=settings.tenants.extended_by, learned_from=settings.tenants.learned_from,
        trained_over=settings.tenants.trained_over,
    )  # fmt: skip
