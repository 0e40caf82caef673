"""A backend that serves adapter versions in a model of this process, with PEFT.

It implements the protocol `perennial.streams.client.backend.Backend`. Importing this module loads no torch; making a
backend does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perennial.learner.serving.answer_streamer import AnswerStreamer
from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.personal.served_parts import parts_of

if TYPE_CHECKING:
    from perennial.learner.model.base import Base
    from perennial.learner.model.lora import Lora, LoraConfig


@dataclass(eq=False)
class _Slot:
    """One LoRA slot, the version that it holds, and the requests that use it."""

    lora: Lora
    name: str | None = None
    requests: int = 0
    loading: bool = False

    @property
    def taken(self) -> bool:
        return self.name is not None or self.requests > 0 or self.loading

    def wipe(self) -> None:
        import torch

        with torch.no_grad():
            for parameter in self.lora.parameters.values():
                parameter.zero_()


MOST_SHAPES = 4
"""Most kinds of slots, by rank and alpha, of one backend."""


class PeftBackend:
    """Swaps versions in and out of a running model without a pause and without mixing two versions in one request.

    Each version is held in its own LoRA slot. A request leases the slot that is active when it begins, and keeps it to
    its end. The slot is selected for every forward pass, under a lock, so that requests on the previous version and on
    the new one interleave. Activation therefore waits for no request. Thread-safe.

    A version that a personal and a shared adapter are composed to has the summed rank. Slots of that rank are made when the
    first such version is loaded, at most as many as there are slots of the rank of `config`, and at most MOST_SHAPES kinds.

    Args:
        base: Base to serve on. Hooks are registered on its model until `close` is called.
        config: Rank and alpha of every version that is served, but for those that are composed of two.
        slots: Most versions held at once, 2 or more: the live one, and those that are being loaded or drained.
        lock: Lock held for each forward pass. Pass the lock that other users of the same base hold; None makes one.

    Raises:
        BackendError: There are fewer than 2 slots.
        AdapterError: The base has no linear layers, or has slots of another rank.

    Example:
        Before a version is live, the frozen base answers:

        >>> from perennial import LoraConfig, PeftBackend, load_base
        >>> backend = PeftBackend(load_base("shipped", "cpu"), LoraConfig(rank=8, alpha=16))
        >>> with backend.lease() as version:
        ...     answer = backend.generate("How long does a refund take?", max_new_tokens=4)
        >>> version is None, bool(answer), backend.list()
        (True, True, [])

        `Subscriber("acme/support", backend, ...).run()` then keeps it at the live version.
    """

    def __init__(
        self,
        base: Base,
        config: LoraConfig,
        *,
        slots: int = 2,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        from peft.tuners.lora import LoraLayer

        from perennial.learner.model.lora import Lora
        from perennial.learner.model.tokenization import ExampleTokenizer

        if slots < 2:
            raise BackendError("too few slots to swap without a pause", got=slots, allowed="2 or more")
        self.base = base
        self.config = config
        self.base_sha256: str | None = base.digest
        self._codec = ExampleTokenizer(base.tokenizer)
        self._forward_lock = lock if lock is not None else threading.Lock()
        with self._forward_lock, warnings.catch_warnings():
            # Several slots in one model are intended here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self._slots = [_Slot(Lora(base, config, slot=f"serving-{i}")) for i in range(slots)]
        self._layer = next(module for module in base.model.modules() if isinstance(module, LoraLayer))
        for slot in self._slots:
            slot.wipe()
        self._most = slots
        self._making = threading.Lock()  # held while slots of another rank are made
        self._active: _Slot | None = None
        self._changed = threading.Condition()
        self._leased = threading.local()
        self._hooks = [
            base.model.register_forward_pre_hook(self._before_forward),
            base.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    # ---- requests

    @contextmanager
    def lease(self) -> Iterator[str | None]:
        """Run everything that this thread passes through `base.model` inside the block on one version.

        The version is the one that is active when the outermost block begins. Blocks may nest.

        Yields:
            Name of the version; None for the base alone.
        """
        if hasattr(self._leased, "slot"):
            yield self._leased.slot.name if self._leased.slot else None
            return
        with self._changed:
            slot = self._active
            if slot is not None:
                slot.requests += 1
        try:
            with self._on_slot(slot):
                yield slot.name if slot else None
        finally:
            if slot is not None:
                with self._changed:
                    slot.requests -= 1
                    self._changed.notify_all()

    @contextmanager
    def _on_slot(self, slot: _Slot | None) -> Iterator[None]:
        """Run this thread's forward passes on the slot inside the block, and afterwards on the one leased before."""
        before = dict(self._leased.__dict__)  # not getattr: a lease of None is the base alone
        self._leased.slot = slot
        try:
            yield
        finally:
            del self._leased.slot
            self._leased.__dict__.update(before)

    def _before_forward(self, *_: object) -> None:
        if not hasattr(self._leased, "slot"):
            return  # another user of the same base, which holds the lock itself and selects its own slot
        slot: _Slot | None = self._leased.slot
        with ExitStack() as selected:
            selected.enter_context(self._forward_lock)
            if not self._is_selected(slot):
                if slot:
                    slot.lora.select()
                else:
                    selected.enter_context(self._slots[0].lora.disabled())
            self._leased.selected = selected.pop_all()

    def _is_selected(self, slot: _Slot | None) -> bool:
        # All layers are switched together and under the lock, so one layer tells the state of all. Switching costs a
        # fifth of a small model's forward pass.
        layer = self._layer
        return slot is not None and not layer.disable_adapters and layer.active_adapters == [slot.lora.slot]

    def _after_forward(self, *_: object) -> None:
        selected: ExitStack | None = self._leased.__dict__.pop("selected", None)
        if selected is not None:
            selected.close()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 32,
        *,
        system: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer a prompt by greedy decoding, on the leased version, or else on the active one.

        Args:
            prompt: The question, put into the chat form that corrections are trained in. A prompt that is too long for
                the model loses its beginning.
            max_new_tokens: Most tokens to generate.
            system: Text of a system turn in front of the prompt; None: none but the one that the template puts there.
            on_text: Called with each further part of the answer as soon as it is generated; the parts together are the
                answer. What it raises ends the generation.
        """
        import torch

        room = max(1, self.base.max_positions - max_new_tokens)
        turns = [("user", prompt)] if system is None else [("system", system), ("user", prompt)]
        ids = torch.tensor([self._codec.chat_ids(turns, room)], device=self.base.device)  # (1, T)
        streamer = None if on_text is None else AnswerStreamer(self.base.tokenizer, on_text)
        with self.lease(), torch.no_grad():
            out = self.base.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self._codec.eos,
                streamer=streamer,
            )  # (1, T + new)
        return str(self.base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def loss(self, text: str) -> float:
        """Return the mean loss of a text in nats per token, on the leased version, or else on the active one.

        Args:
            text: Text to score, cut to the model's longest row.

        Raises:
            BackendError: The text has fewer than two tokens.
        """
        import torch

        ids = torch.tensor([self._codec.text_ids(text)[: self.base.max_positions]])  # (1, T)
        if ids.shape[1] < 2:
            raise BackendError("a text is too short to score", got=f"{ids.shape[1]} tokens", allowed="2 or more")
        ids = ids.to(self.base.device)
        with self.lease(), torch.no_grad():
            logits = self.base.model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    # ---- calls of a subscriber

    def load(self, name: str, weights: bytes, manifest: Manifest) -> None:
        """Copy a version's weights into a free slot; do nothing where the version is held already.

        Args:
            name: Name of the version.
            weights: Content of its safetensors file.
            manifest: Its manifest, for rank and alpha.

        Raises:
            BackendError: No slot is free.
            UnfitVersionError: The version has another rank or alpha than this backend, it belongs to another base, or there are
                too many kinds of slots.
            IntegrityError: The weights are damaged.
        """
        from perennial.learner.model.lora import AdapterError, from_safetensors

        config = self._config_of(name, manifest)
        with self._making:
            self._make_slots(config)
        with self._changed:
            if self._find(name) is not None:
                return
            held = sum(slot.taken for slot in self._slots)
            free = next((slot for slot in self._slots if slot.lora.config == config and not slot.taken), None)
            if free is None or held >= self._most:
                raise BackendError(
                    "no slot is free",
                    got=f"{held} versions held",
                    remedy="unload a version, or make the backend with more slots",
                )
            free.loading = True
        try:
            free.lora.load(from_safetensors(weights, free.lora.shapes))  # no request looks at this slot: no lock
            free.name = name
        except BaseException as error:
            free.wipe()
            if isinstance(error, AdapterError):
                raise UnfitVersionError(f"{name} does not fit the base of this backend", got=str(error)) from error
            raise
        finally:
            free.loading = False

    def _config_of(self, name: str, manifest: Manifest) -> LoraConfig:
        from perennial.learner.model.lora import LoraConfig

        alpha = manifest.config.get("alpha", self.config.alpha)
        if parts_of(manifest) is not None and isinstance(alpha, int):
            return LoraConfig(manifest.rank, alpha)
        if (manifest.rank, alpha) != (self.config.rank, self.config.alpha):
            raise UnfitVersionError(
                f"{name} has another rank or alpha than this backend was made for",
                got=f"rank {manifest.rank}, alpha {alpha}",
                allowed=f"rank {self.config.rank}, alpha {self.config.alpha}",
                remedy="make the backend with the LoraConfig of the versions that it is to serve",
            )
        return self.config

    def _make_slots(self, config: LoraConfig) -> None:
        """Make the slots of a rank and alpha, unless there are some; requests wait for that time.

        Raises:
            UnfitVersionError: There are slots of MOST_SHAPES kinds, which are kept while the backend lives.
        """
        from perennial.learner.model.lora import Lora

        shapes = {slot.lora.config for slot in self._slots}
        if config in shapes:
            return
        if len(shapes) >= MOST_SHAPES:
            raise UnfitVersionError(
                "no slots of another rank or alpha are made", got=f"rank {config.rank}, alpha {config.alpha}",
                allowed=f"{MOST_SHAPES} kinds in a process: {sorted((each.rank, each.alpha) for each in shapes)}",
                remedy="let all adapters learn with one rank and alpha, or start the program again",
            )  # fmt: skip
        kind = f"serving-{config.rank}-{config.alpha}"
        with self._forward_lock:
            made = [_Slot(Lora(self.base, config, slot=f"{kind}-{i}")) for i in range(self._most)]
        for slot in made:
            slot.wipe()
        with self._changed:
            self._slots = [*self._slots, *made]

    def warm(self, name: str) -> None:
        """Run one token through the version, so that its first request is as fast as the second.

        Raises:
            BackendError: The version is not held.
        """
        import torch

        slot = self._require(name)
        with self._on_slot(slot), torch.no_grad():
            self.base.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.base.device))

    def activate(self, name: str) -> None:
        """Serve the version to every request that begins from now on.

        Raises:
            BackendError: The version is not held.
        """
        slot = self._require(name)
        with self._changed:
            self._active = slot

    def deactivate(self, name: str) -> None:
        """Let requests that begin from now on use the base alone, if the version is the active one."""
        with self._changed:
            if self._active is not None and self._active.name == name:
                self._active = None

    def drain(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses the version.

        Args:
            name: Name of the version.
            timeout_s: Longest wait, in seconds.

        Returns:
            False if requests still use it after the wait.
        """
        slot = self._find(name)
        with self._changed:
            return slot is None or self._changed.wait_for(lambda: not slot.requests, timeout_s)

    def unload(self, name: str) -> None:
        """Overwrite the version's weights with zeros; do nothing where it is not held.

        Unloading the active version leaves the base alone in service.

        Raises:
            BackendError: Requests still use the version. Nothing has changed then: an active version stays active.
        """
        with self._changed:
            slot = self._find(name)
            if slot is None:
                return
            if slot.requests:
                raise BackendError(
                    f"requests still use {name}",
                    got=f"{slot.requests} requests",
                    remedy="deactivate it if it is active, and drain it",
                )
            if self._active is slot:
                self._active = None
            slot.loading, slot.name = True, None
        try:
            slot.wipe()  # a forgotten version must not stay in memory
        finally:
            slot.loading = False

    def list(self) -> list[str]:
        """Return the names of the versions held, sorted."""
        return sorted(slot.name for slot in self._slots if slot.name is not None)

    @property
    def current(self) -> str | None:
        """Name of the version that new requests use; None for the base alone."""
        with self._changed:
            return self._active.name if self._active else None

    def close(self) -> None:
        """Remove the hooks from the model and the versions from memory; the base can be used as before."""
        for hook in self._hooks:
            hook.remove()
        with self._changed:
            self._active = None
            for slot in self._slots:
                slot.name = None
                slot.wipe()

    def _find(self, name: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.name == name), None)

    def _require(self, name: str) -> _Slot:
        slot = self._find(name)
        if slot is None:
            raise BackendError(f"{name} is not held", remedy="load it first")
        return slot
