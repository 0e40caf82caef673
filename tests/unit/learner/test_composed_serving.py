"""A personal and a shared adapter served by a model of this process: the losses are those of the sum of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from perennial.learner.model.base import load_base
from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.learner.serving.peft_backend import MOST_SHAPES, PeftBackend
from perennial.learner.training.personal import stacking
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.client.backend import BackendError, UnfitVersionError
from perennial.streams.client.personal.composing_backend import ComposingBackend
from perennial.streams.client.personal.composition import Part, compose
from tests.versions import VersionPublisher

USER, TENANT = "acme/support/user-42", "acme/support"
TEXTS = ("The refund policy changed in March.", "def close(self): return None", "Invoices are sent on Mondays.")
OWN, SHARED = LoraConfig(4, 8), LoraConfig(3, 12)  # other ranks and other scales


def weights_of(base: Any, config: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    lora = Lora(base, config, slot=f"made-{config.rank}")
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in lora.shapes.items()}


class Made:
    """Versions of both adapters, published to a store."""

    def __init__(self, base: Any, folder: Path) -> None:
        self.base = base
        store = DirectoryStore(folder / "store", fsync=False)
        self.user = VersionPublisher(store, USER, base.digest, extends=TENANT)
        self.tenant = VersionPublisher(store, TENANT, base.digest)

    def publish(self, publisher: VersionPublisher, config: LoraConfig, seed: int) -> tuple[str, bytes, Any]:
        weights = to_safetensors(weights_of(self.base, config, seed))
        state = publisher.publish(weights, rank=config.rank, alpha=config.alpha)
        manifest = publisher.registry.manifest(publisher.adapter, state.version)
        return f"{publisher.adapter}@{state.version[7:]}", weights, manifest


def losses_of_merged(*adapters: tuple[LoraConfig, dict[str, torch.Tensor]]) -> list[float]:
    """Losses of another copy of the base, to whose weights the adapters' products are added."""
    base = load_base("shipped", "cpu", 1)
    backend = PeftBackend(base, OWN)
    try:
        linear = {name: module for name, module in base.model.named_modules() if hasattr(module, "base_layer")}
        with torch.no_grad():
            for config, weights in adapters:
                for name, module in linear.items():
                    path = f"base_model.model.{name}"
                    product = weights[f"{path}.lora_B.weight"] @ weights[f"{path}.lora_A.weight"]
                    module.base_layer.weight += config.alpha / config.rank * product
        return [backend.loss(text) for text in TEXTS]
    finally:
        backend.close()


def serve(side: Any, version: tuple[str, bytes, Any]) -> None:
    side.load(*version)
    side.warm(version[0])
    side.activate(version[0])


def test_served_losses_are_those_of_the_sum_of_both(tmp_path):
    base = load_base("shipped", "cpu", 1)
    made = Made(base, tmp_path)
    own, shared = made.publish(made.user, OWN, 1), made.publish(made.tenant, SHARED, 2)
    newer = made.publish(made.tenant, SHARED, 3)
    backend = PeftBackend(base, OWN)
    try:
        both = ComposingBackend(backend, f"{USER}@", f"{TENANT}@")
        serve(both.own, own)
        user = (OWN, weights_of(base, OWN, 1))
        alone = losses_of_merged(user)
        assert [backend.loss(text) for text in TEXTS] == pytest.approx(alone, abs=1e-5)
        with backend.lease() as leased:
            serve(both.shared, shared)
            assert leased == own[0]
            assert [backend.loss(text) for text in TEXTS] == pytest.approx(alone, abs=1e-5), (
                "a request keeps its version"
            )
        expected = losses_of_merged(user, (SHARED, weights_of(base, SHARED, 2)))
        assert [backend.loss(text) for text in TEXTS] == pytest.approx(expected, abs=1e-5)
        assert max(abs(a - b) for a, b in zip(alone, expected, strict=True)) > 1e-2, "the shared adapter does something"
        with pytest.raises(BackendError, match="no slot"):
            serve(both.shared, newer)
        both.shared.unload(newer[0])
        both.shared.unload(f"{TENANT}@{own[0][-64:]}")
        serve(both.shared, newer)
        both.shared.unload(shared[0])
        expected = losses_of_merged(user, (SHARED, weights_of(base, SHARED, 3)))
        assert [backend.loss(text) for text in TEXTS] == pytest.approx(expected, abs=1e-5)
        both.shared.unload(newer[0])
        assert backend.list() == [own[0]]
        assert [backend.loss(text) for text in TEXTS] == pytest.approx(alone, abs=1e-5)
    finally:
        backend.close()


def test_clients_compose_the_very_numbers_that_the_benchmark_of_personal_adapters_measures(tmp_path):
    base = load_base("shipped", "cpu", 1)
    made = Made(base, tmp_path)
    own, shared = made.publish(made.user, OWN, 1), made.publish(made.tenant, SHARED, 2)
    composed = compose(
        Part(f"sha256:{own[0][-64:]}", own[2], own[1]), Part(f"sha256:{shared[0][-64:]}", shared[2], shared[1])
    )
    stacked = stacking.compose(stacking.SharedPart(SHARED, weights_of(base, SHARED, 2)), weights_of(base, OWN, 1), OWN)
    found = load(composed.weights)
    assert found.keys() == stacked.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stacked.items())


def test_only_composed_versions_may_have_another_rank(tmp_path):
    base = load_base("shipped", "cpu", 1)
    made = Made(base, tmp_path)
    own, shared = made.publish(made.user, OWN, 1), made.publish(made.tenant, SHARED, 2)
    composed = compose(
        Part(f"sha256:{own[0][-64:]}", own[2], own[1]), Part(f"sha256:{shared[0][-64:]}", shared[2], shared[1])
    )
    backend = PeftBackend(base, OWN)
    try:
        for name, weights, manifest in (shared, (f"{USER}@{'1' * 64}", composed.weights, composed.manifest)):
            with pytest.raises(UnfitVersionError, match="another rank"):
                backend.load(name, weights, manifest)
        assert backend.list() == []
    finally:
        backend.close()


def test_a_backend_makes_slots_of_few_kinds(tmp_path):
    base = load_base("shipped", "cpu", 1)
    made = Made(base, tmp_path)
    own = made.publish(made.user, OWN, 1)
    backend = PeftBackend(base, OWN)
    try:
        both = ComposingBackend(backend, f"{USER}@", f"{TENANT}@")
        serve(both.own, own)
        held = own[0]
        for rank in range(2, 1 + MOST_SHAPES):
            shared = made.publish(made.tenant, LoraConfig(rank, 2 * rank), rank)
            serve(both.shared, shared)
            both.shared.unload(f"{TENANT}@{held[-64:]}" if held == own[0] else held)
            held = shared[0]
        served = both.served
        with pytest.raises(UnfitVersionError, match="no slots of another rank"):
            serve(both.shared, made.publish(made.tenant, LoraConfig(7, 14), 7))
        assert backend.current == both.served == served
    finally:
        backend.close()
