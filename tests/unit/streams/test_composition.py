"""Composition of a personal and a shared adapter into one LoRA."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load, save

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.registry import Registry
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.directory_backend import adapter_config
from perennial.streams.client.personal.composition import Part, compose, composed_digest
from perennial.streams.client.testing import next_manifest

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
INPUTS, OUTPUTS = 5, 3


def part(folder, adapter, rank, alpha, seed, dtype=np.float32, inputs=INPUTS, stem=STEM, **manifest):
    rng = np.random.default_rng(seed)
    weights = save(
        {
            f"{stem}.lora_A.weight": rng.standard_normal((rank, inputs)).astype(dtype),
            f"{stem}.lora_B.weight": rng.standard_normal((OUTPUTS, rank)).astype(dtype),
        }
    )
    found = next_manifest(Registry(DirectoryStore(folder)), adapter, weights, rank=rank, alpha=alpha, **manifest)
    return Part(found.digest(), found, weights)


def product(found):
    """Return what a version adds to the layer's weights: alpha / rank · B A."""
    tensors = load(found.weights)
    scale = found.manifest.config["alpha"] / found.manifest.rank
    return scale * tensors[f"{STEM}.lora_B.weight"].astype(float) @ tensors[f"{STEM}.lora_A.weight"].astype(float)


@pytest.mark.parametrize(
    ("own", "shared", "rank", "alpha"),
    [((8, 16), (8, 16), 16, 32), ((8, 16), (4, 16), 12, 24), ((4, 2), (3, 5), 8, 4), ((8, 4), (8, 16), 16, 8)],
)
def test_one_lora_computes_the_sum_of_both(tmp_path, own, shared, rank, alpha):
    of_user = part(tmp_path, "acme/support/user", *own, seed=1, kind="update")
    of_tenant = part(tmp_path, "acme/support", *shared, seed=2)
    found = compose(of_user, of_tenant)
    np.testing.assert_allclose(product(found), product(of_user) + product(of_tenant), rtol=1e-6)
    assert (found.manifest.rank, found.manifest.config["alpha"]) == (rank, alpha)
    assert found.manifest.weights.digest == digest_of(found.weights)
    assert found.version == composed_digest(of_user.version, of_tenant.version) != of_user.version
    assert found.manifest.probes == {}
    assert b'"r": %d' % rank in adapter_config(found.weights, found.manifest)


def test_the_numbers_of_both_are_kept_bit_by_bit(tmp_path):
    own, shared = part(tmp_path, "acme/support/user", 4, 8, seed=1), part(tmp_path, "acme/support", 8, 16, seed=2)
    found, of_own, of_shared = load(compose(own, shared).weights), load(own.weights), load(shared.weights)
    assert np.array_equal(found[f"{STEM}.lora_A.weight"][:8], of_shared[f"{STEM}.lora_A.weight"])
    assert np.array_equal(found[f"{STEM}.lora_A.weight"][8:], of_own[f"{STEM}.lora_A.weight"])
    assert np.array_equal(found[f"{STEM}.lora_B.weight"][:, :8], of_shared[f"{STEM}.lora_B.weight"])
    assert np.array_equal(found[f"{STEM}.lora_B.weight"][:, 8:], of_own[f"{STEM}.lora_B.weight"])
    assert compose(own, shared).weights == compose(own, shared).weights


@pytest.mark.parametrize(
    "changed", [{"base_sha256": "sha256:" + "1" * 64}, {"inputs": 7}, {"stem": "other.q_proj"}, {"dtype": np.float16}]
)
def test_what_does_not_fit_together_is_refused(tmp_path, changed):
    own = part(tmp_path, "acme/support/user", 4, 8, seed=1)
    with pytest.raises(UnfitVersionError):
        compose(own, part(tmp_path, "acme/support", 4, 8, seed=2, **changed))


def test_weights_of_another_rank_than_their_manifest_are_refused(tmp_path):
    own, shared = part(tmp_path, "acme/support/user", 4, 8, seed=1), part(tmp_path, "acme/support", 8, 16, seed=2)
    with pytest.raises(UnfitVersionError):
        compose(own, Part(shared.version, shared.manifest.model_copy(update={"rank": 4}), shared.weights))
    with pytest.raises(IntegrityError):
        compose(own, Part(shared.version, shared.manifest, shared.weights[:-4]))


def test_an_alpha_that_no_rank_makes_whole_stays_as_it_is(tmp_path):
    own, shared = part(tmp_path, "acme/support/user", 4, 8, seed=1), part(tmp_path, "acme/support", 4, 8, seed=2)
    odd = own.manifest.model_copy(update={"config": {"alpha": 0.1, "rank": 4}})
    found = compose(Part(own.version, odd, own.weights), shared)
    assert (found.manifest.rank, found.manifest.config["alpha"]) == (8, 0.2)


@pytest.mark.parametrize("alpha", [0, -1, 1e308, 1e-300, float("inf"), float("nan"), 10**400, True, "16", None])
def test_an_alpha_that_no_server_can_use_is_refused(tmp_path, alpha):
    own, shared = part(tmp_path, "acme/support/user", 4, 8, seed=1), part(tmp_path, "acme/support", 4, 8, seed=2)
    odd = shared.manifest.model_copy(update={"config": {"alpha": alpha, "rank": 4}})
    with pytest.raises(UnfitVersionError):
        compose(own, Part(shared.version, odd, shared.weights))
    with pytest.raises(UnfitVersionError):
        compose(Part(own.version, odd, own.weights), shared)


def test_numbers_that_grow_beyond_float32_are_refused(tmp_path):
    own, shared = part(tmp_path, "acme/support/user", 4, 8, seed=1), part(tmp_path, "acme/support", 4, 80_000, seed=2)
    large = save({name: tensor * np.float32(1e36) for name, tensor in load(shared.weights).items()})
    with pytest.raises(UnfitVersionError):
        compose(own, Part(shared.version, shared.manifest, large))
