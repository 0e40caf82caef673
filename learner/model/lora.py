"""LoRA weights over the shared frozen base: initial values, loading in place, and the bytes that are stored.

The layers are PEFT's and are injected into the base once per process. A slot is one set of weights in these layers (in
PEFT's words, an adapter); each role has a slot of its own, and loads one adapter after another into it.

Tensors have the names that PEFT uses in adapter files, so that PEFT and vLLM load a stored version as it is.
"""

from __future__ import annotations

import copy
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
from perennial.storage.objects.safetensors_check import check_safetensors

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
    """The two numbers of a LoRA (arXiv 2106.09685): ΔW = alpha / rank · B A, on all linear layers.

    Attributes:
        rank: Inner dimension of A and B.
        alpha: Scale of the product, before the division by the rank.
    """

    rank: int
    alpha: int


class Lora:
    """One role's LoRA slot in the base.

    Not thread-safe: selecting a slot switches the whole model. Code that shares a base between threads holds one lock
    from selecting the slot to the end of the forward or backward pass.

    Args:
        base: Base to inject the layers into; its own parameters stay frozen.
        config: Rank and alpha of the slot.
        slot: Name of the slot. A second `Lora` of the same name on the same base shares its weights.

    Attributes:
        parameters: The slot's parameters by their name in PEFT's files, sorted by name; fp32 on the base's device,
            A (rank, inputs) and B (outputs, rank).
        shapes: Shape of each parameter.
        compute_dtype: Number format of training and measurements; see `Base.compute_dtype`.

    Raises:
        AdapterError: The base has no linear layers, or the slot exists with another rank.
    """

    def __init__(self, base: Base, config: LoraConfig, slot: str = "learner") -> None:
        self.base = base
        self.config = config
        self.slot = slot
        self.model = base.model
        self.compute_dtype = base.compute_dtype
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

    def computing_in(self, dtype: torch.dtype | None) -> Lora:
        """Return the same slot with another number format of training and measurements.

        Args:
            dtype: Number format; None: bf16 on a GPU, fp32 on a CPU.
        """
        same = copy.copy(self)
        same.compute_dtype = dtype
        return same

    def select(self) -> None:
        """Make the model compute with this slot's weights, and let only them take gradients.

        This holds until another slot is selected: there is nothing to restore, and switching all layers costs about a
        fifth of a small model's forward pass.
        """
        for layer in self._layers:
            layer.enable_adapters(True)
            layer.set_adapter(self.slot)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model compute as the frozen base alone inside the block; afterwards with the slot selected before.

        Blocks do not nest: the end of an inner one enables the slots for the rest of the outer one.
        """
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def initial_weights(self, adapter: str, seed: int) -> Tensors:
        """Return the weights that an adapter starts from: A uniform as in the paper's code (Kaiming, a = √5), B zero.

        They depend on the base's digest, the adapter's name and the seed alone.

        Args:
            adapter: Name of the adapter, for example `acme/support`.
            seed: Seed of the recipe.

        Returns:
            Tensors by name, shaped as `shapes`.
        """
        text = json.dumps([self.base.digest, adapter, seed])
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1)
        weights: Tensors = {}
        for name, shape in self.shapes.items():  # already sorted: the order of the draws is part of the recipe
            weight = torch.zeros(shape)
            if ".lora_A." in name:
                bound = 1 / math.sqrt(shape[1])
                weight.uniform_(-bound, bound, generator=generator)
            weights[name] = weight
        return weights

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights into the slot in place.

        Raises:
            AdapterError: Names or shapes differ from the slot's.
        """
        check_weights(weights, self.shapes)
        with torch.no_grad():  # in one call: on a GPU some hundred copies are a few kernels
            torch._foreach_copy_(list(self.parameters.values()), [weights[name] for name in self.parameters])

    def weights(self) -> Tensors:
        """Return a copy of the slot's weights, fp32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.parameters.items()}

    def layers(self) -> dict[str, Any]:
        """Return PEFT's layers by the name that their tensors have in PEFT's files, without `.lora_A.weight`."""
        return {f"{_FILE_PREFIX}{path}": layer for path, layer in sorted(_lora_layers(self.model).items())}

    def adapter_config(self) -> bytes:
        """Return the bytes of PEFT's `adapter_config.json` for this slot's weights."""
        return adapter_config(self.base.name, self.config, self.shapes)


def _lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def rank_axis(name: str) -> int:
    """Return the dimension of a LoRA tensor, or of its gradient, that has the rank: 0 of A, 1 of B."""
    return 0 if ".lora_A." in name else 1


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless the weights have exactly these names and shapes."""
    if weights.keys() != shapes.keys():
        differing = sorted(weights.keys() ^ shapes.keys())
        raise AdapterError(
            "an adapter has other tensors than the base's linear layers need",
            got=differing[:4],
            allowed=f"{len(shapes)} tensors named as in a PEFT adapter file",
            remedy="use the base that the adapter's manifest names",
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise AdapterError(
                f"tensor {name} has another shape",
                got=tuple(weights[name].shape),
                allowed=shape,
                remedy="use the base and the rank that the adapter's manifest names",
            )


def is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return True if no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def is_noop(weights: Mapping[str, torch.Tensor]) -> bool:
    """Return True if the adapter changes nothing, because every B is zero."""
    return not any(bool(tensor.any()) for name, tensor in weights.items() if ".lora_B." in name)


def to_safetensors(tensors: Mapping[str, torch.Tensor], adapter: str | None = None) -> bytes:
    """Serialise tensors to safetensors; equal tensors and names give equal bytes.

    Args:
        tensors: Tensors by name.
        adapter: Name to put into the metadata; None: the file holds none. More than one entry has no stable order.
    """
    metadata = None if adapter is None else {"adapter": adapter}
    return bytes(save_safetensors({name: tensors[name].contiguous() for name in sorted(tensors)}, metadata))


def from_safetensors(data: bytes, shapes: Mapping[str, tuple[int, ...]], max_bytes: int = MAX_ADAPTER_BYTES) -> Tensors:
    """Read adapter weights from stored bytes, which may be hostile.

    Args:
        data: Content of a safetensors file.
        shapes: Expected shape of each tensor by name, as in `Lora.shapes`.
        max_bytes: Largest size accepted.

    Raises:
        IntegrityError: The bytes do not parse, are too many, or hold values that are not finite fp32.
        AdapterError: The tensors belong to another base or rank.
    """
    weights = load_tensors(data, max_bytes)
    check_weights(weights, shapes)
    return weights


def load_tensors(data: bytes, max_bytes: int = MAX_ADAPTER_BYTES) -> Tensors:
    """Read finite fp32 tensors of any names and shapes from safetensors bytes, which may be hostile.

    Raises:
        IntegrityError: The bytes do not parse, are more than `max_bytes`, or hold values that are not finite fp32.
    """
    remedy = "restore the object from a backup: its writer stores finite fp32 tensors only"
    if len(data) > max_bytes:
        raise IntegrityError("stored tensors are too large", got=len(data), allowed=max_bytes, remedy=remedy)
    check_safetensors(data)  # before the library, whose header may have 100 MB
    try:
        tensors: Tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise IntegrityError(
            "stored tensors do not parse", got=str(error), allowed="safetensors", remedy=remedy
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(
                f"tensor {name} is not finite fp32", got=tensor.dtype, allowed="finite fp32", remedy=remedy
            )
    return tensors


def adapter_config(base_name: str, config: LoraConfig, names: Iterable[str]) -> bytes:
    """Return the bytes of PEFT's `adapter_config.json`, with the target modules listed by name, as vLLM needs them.

    Args:
        base_name: Name or folder of the base model, as PEFT should find it.
        config: Rank and alpha.
        names: Names of the adapter's tensors, from which the target modules are read.
    """
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
