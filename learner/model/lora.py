"""LoRA weights over the shared frozen base: their making, loading in place, and the bytes they are stored as.

Layers are PEFT's, injected into the base once per process; each role has a slot of its own in them. Tensor names
are those of PEFT's adapter files, so that a stored version loads in PEFT and vLLM as it is.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from perennial.storage.errors import IntegrityError, PerennialError

if TYPE_CHECKING:
    from perennial.learner.model.base import Base

Tensors = dict[str, torch.Tensor]
"""Adapter weights by their name in PEFT's files: fp32, on the CPU."""

_FILE_PREFIX = "base_model.model."
MAX_ADAPTER_BYTES = 2 * 1024**3


class AdapterError(PerennialError):
    """An adapter does not fit the base."""


@dataclass(frozen=True)
class LoraConfig:
    """The two numbers of a LoRA (arXiv 2106.09685): ΔW = alpha / rank · B A, on all linear layers."""

    rank: int
    alpha: int


class Lora:
    """One role's LoRA slot in the base. Not thread-safe: whoever shares the base holds the lock meanwhile."""

    def __init__(self, base: Base, config: LoraConfig, slot: str = "learner") -> None:
        self.base = base
        self.config = config
        self.slot = slot
        self.model = base.model
        layers = _lora_layers(self.model)
        if not any(slot in layer.lora_A for layer in layers.values()):
            wanted = peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=sorted(layers) if layers else "all-linear",
                task_type="CAUSAL_LM",
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several slots are the intent
                peft.inject_adapter_in_model(wanted, self.model, adapter_name=slot)
            layers = _lora_layers(self.model)
        self._layers = list(layers.values())
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for path, layer in sorted(layers.items()):
            for side, module in (("lora_A", layer.lora_A[slot]), ("lora_B", layer.lora_B[slot])):
                module.float()  # a bf16 base must not round what the optimizer adds
                self.parameters[f"{_FILE_PREFIX}{path}.{side}.weight"] = module.weight
        if not self.parameters or next(iter(layers.values())).r[slot] != config.rank:
            raise AdapterError(
                "the base has no room for this LoRA",
                got=f"rank {config.rank}, slot {slot}, {len(layers)} linear layers",
                allowed="linear layers, and one rank per slot and process",
                remedy="use a causal language model with linear layers, and one rank per process",
            )
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                parameter.requires_grad_(False)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in self.parameters.items()}

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """The model computes with this slot's weights, and only they take gradients."""
        for layer in self._layers:
            layer.enable_adapters(True)
            layer.set_adapter(self.slot)
        yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model computes as the frozen base alone."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def init_state(self, adapter: str, seed: int) -> Tensors:
        """The first weights of an adapter: A uniform as in the paper's code (Kaiming, a = √5), B zero.

        They follow from (base digest, adapter, seed) alone.
        """
        text = json.dumps([self.base.digest, adapter, seed])
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1)
        state: Tensors = {}
        for name, shape in self.shapes.items():  # already sorted: the order of the draws is part of the recipe
            weight = torch.zeros(shape)
            if ".lora_A." in name:
                bound = 1 / math.sqrt(shape[1])
                weight.uniform_(-bound, bound, generator=generator)
            state[name] = weight
        return state

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy weights into the slot in place. Raises AdapterError where names or shapes differ."""
        check_state(state, self.shapes)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def state(self) -> Tensors:
        """A copy of the slot's weights."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.parameters.items()}

    def adapter_config(self) -> bytes:
        """The `adapter_config.json` that belongs beside this slot's stored weights."""
        return adapter_config(self.base.name, self.config, self.shapes)


def _lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_state(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless the state has exactly these names and shapes."""
    if state.keys() != shapes.keys():
        odd = sorted(state.keys() ^ shapes.keys())
        raise AdapterError(
            "an adapter has other tensors than the base's linear layers need",
            got=odd[:4],
            allowed=f"{len(shapes)} tensors named as in a PEFT adapter file",
            remedy="use the base that the adapter's manifest names",
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise AdapterError(
                f"tensor {name} has another shape",
                got=tuple(state[name].shape),
                allowed=shape,
                remedy="use the base and the rank that the adapter's manifest names",
            )


def is_finite(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def is_noop(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the adapter changes nothing: every B is zero."""
    return not any(bool(tensor.any()) for name, tensor in state.items() if ".lora_B." in name)


def to_safetensors(state: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a state, the same for the same tensors (no metadata: its order would not be stable)."""
    return bytes(save_safetensors({name: state[name].contiguous() for name in sorted(state)}))


def from_safetensors(data: bytes, shapes: Mapping[str, tuple[int, ...]], max_bytes: int = MAX_ADAPTER_BYTES) -> Tensors:
    """A state from stored bytes, which may be hostile.

    Raises IntegrityError on junk, excess size, another dtype or a value that is not finite, and AdapterError where
    the tensors belong to another base or rank.
    """
    state = load_tensors(data, max_bytes)
    check_state(state, shapes)
    return state


def load_tensors(data: bytes, max_bytes: int = MAX_ADAPTER_BYTES) -> Tensors:
    """Finite fp32 tensors from safetensors bytes. Raises IntegrityError on anything else."""
    remedy = "restore the object from a backup: its writer stores finite fp32 tensors only"
    if len(data) > max_bytes:
        raise IntegrityError("stored tensors are too large", got=len(data), allowed=max_bytes, remedy=remedy)
    try:
        state: Tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise IntegrityError(
            "stored tensors do not parse", got=str(error), allowed="safetensors", remedy=remedy
        ) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(
                f"tensor {name} is not finite fp32", got=tensor.dtype, allowed="finite fp32", remedy=remedy
            )
    return state


def adapter_config(base_name: str, config: LoraConfig, names: Iterable[str]) -> bytes:
    """PEFT's `adapter_config.json` for tensors of these names, with the target modules spelt out for vLLM."""
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names})
    content = peft.LoraConfig(
        base_model_name_or_path=base_name,
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    content["target_modules"] = targets
    return json.dumps(content, sort_keys=True, default=str).encode()
