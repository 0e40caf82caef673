"""Gate figures: typed when read, and byte for byte the JSON that a manifest held before they had a type."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from perennial.storage.errors import IntegrityError
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import Manifest

# Manifests as a learner wrote them before the figures had a type. Their digests are the ids of the versions.
STORED = (
    b'{"adapter":"acme/support","anchors":null,"base_model":"tiny","base_sha256":"sha256:54c406bbaa811f90b902d7'
    b'72f3f8544ccc95a65c9605f6d482c8547351a3e8f3","batch":{"digest":"sha256:eaae172bb37e874c4eb96589bd7865d4e32'
    b'09fb15368875424107ee208663ed8","size_bytes":1972},"code":"perennial test","config":{"alpha":8,"anchor_row'
    b's":2,"clip_norm":1.0,"general_share":0.2,"held_out_share":0.2,"learning_rate":0.005,"max_general_rise_nat'
    b's":50.0,"min_gain_nats":-50.0,"rank":4,"replay_share":0.4,"replay_size":64,"row_tokens":32,"rows":4,"seed'
    b'":0,"steps":2,"warmup_steps":10},"cut":1,"dropped":0,"gate":{"anchor_after":5.629515,"anchor_base":5.6358'
    b'35,"anchor_before":5.635835,"basis":"held-out","held_out_after":5.537778,"held_out_before":5.54389,"held_'
    b'out_error":0.001273,"held_out_examples":1,"reason":"ok","replay_missing":0,"replayed_rows":0,"steps":3,"s'
    b'train":0.0},"head":null,"job_id":"acme/support-1","kind":"update","learned":[{"example_id":"0000000000000'
    b'0000000000000000000","offset":0,"partition":"cluster/topic/documents/0","tokens":32},{"example_id":"00000'
    b'000000000000000000000000001","offset":1,"partition":"cluster/topic/documents/0","tokens":32},{"example_id'
    b'":"00000000000000000000000000000002","offset":2,"partition":"cluster/topic/documents/0","tokens":32},{"ex'
    b'ample_id":"00000000000000000000000000000003","offset":3,"partition":"cluster/topic/documents/0","tokens":'
    b'32}],"marks":{"cluster/topic/documents/0":3},"optimizer":{"digest":"sha256:c90f238d427d2528f22ecf6d370d02'
    b'0529fdae0c64845b2e6090ef6c53dda678","size_bytes":40260},"outcome":"promoted","parent":null,"published_fro'
    b'm_ms":1700000000000,"published_to_ms":1700000000003,"rank":4,"reason":"size","replay":{"digest":"sha256:6'
    b'ee62352e4025525d84b26f848155bbc6a2942662831008c08b799980621213e","size_bytes":529},"schema_version":1,"se'
    b'ed":0,"seq":1,"skipped":[],"threads":1,"tokens":191,"update_id":"sha256:0c614ffff1ac8eb2643454ba33de53d71'
    b'2c89875ebd78742b200f7e808e9279c","weights":{"digest":"sha256:fac8604d03244b15371a42236400ac30ca48006a5c1a'
    b'd7c97eb0419a72fb8307","size_bytes":19816}}'
)
VERSION = "d38efcb10d2a3bdd8dc282b4557e041f00330fbdec43bf7a7a06562abdb6c48d"
STORED_SEEN = (
    b'{"adapter":"acme/support","anchors":null,"base_model":"tiny","base_sha256":"sha256:54c406bbaa811f90b902d7'
    b'72f3f8544ccc95a65c9605f6d482c8547351a3e8f3","batch":{"digest":"sha256:fd9e9ec1741516b965f39f813519d51ca4f'
    b'bc0b050608b1a92642b9306f48b24","size_bytes":1016},"code":"perennial test","config":{"alpha":8,"anchor_row'
    b's":2,"clip_norm":1.0,"general_share":0.2,"held_out_share":0.2,"learning_rate":0.005,"max_general_rise_nat'
    b's":50.0,"min_gain_nats":-50.0,"rank":4,"replay_share":0.4,"replay_size":64,"row_tokens":32,"rows":4,"seed'
    b'":0,"steps":2,"warmup_steps":10},"cut":2,"dropped":0,"gate":{"anchor_after":5.622903,"anchor_base":5.6385'
    b'53,"anchor_before":5.63232,"basis":"seen","held_out_examples":0,"new_after":5.517377,"new_before":5.53837'
    b'4,"new_error":0.002901,"reason":"ok","replay_missing":0,"replayed_rows":4,"steps":2,"strain":0.0},"head":'
    b'"sha256:d38efcb10d2a3bdd8dc282b4557e041f00330fbdec43bf7a7a06562abdb6c48d","job_id":"acme/support-2","kind'
    b'":"update","learned":[{"example_id":"00000000000000000000000000000004","offset":4,"partition":"cluster/to'
    b'pic/documents/0","tokens":32},{"example_id":"00000000000000000000000000000005","offset":5,"partition":"cl'
    b'uster/topic/documents/0","tokens":32}],"marks":{"cluster/topic/documents/0":5},"optimizer":{"digest":"sha'
    b'256:b439bec8b6e391c8b0d8cfefcab9a71ec8abf0bba46f302a34e70ba83b661d65","size_bytes":40260},"outcome":"prom'
    b'oted","parent":"sha256:d38efcb10d2a3bdd8dc282b4557e041f00330fbdec43bf7a7a06562abdb6c48d","published_from_'
    b'ms":1700000000004,"published_to_ms":1700000000005,"rank":4,"reason":"size","replay":{"digest":"sha256:e67'
    b'677ef9a755ddfe910a668dd26304409feb1a2efecdd866c1adf810e115fbc","size_bytes":793},"schema_version":1,"seed'
    b'":0,"seq":2,"skipped":[],"threads":1,"tokens":230,"update_id":"sha256:7b114a2f5bf3d1862768dd84431e6a4f2b9'
    b'dc9d5fd7c916b12b8fc354cde5f8a","weights":{"digest":"sha256:4bc0c8ec702ae20f9fc5c33f1c74c50db14adcf145d370'
    b'2ea13f494c531f0de4","size_bytes":19816}}'
)
VERSION_SEEN = "235ac6aa13e4179dc996add7ea8397b66ac61b80b82c0c8911171c6facd297f2"


def stored_with(gate: dict[str, object]) -> bytes:
    return orjson.dumps({**orjson.loads(STORED), "gate": gate}, option=orjson.OPT_SORT_KEYS)


@pytest.mark.parametrize(("stored", "version"), [(STORED, VERSION), (STORED_SEEN, VERSION_SEEN)])
def test_a_stored_manifest_keeps_its_bytes_and_its_digest(stored: bytes, version: str) -> None:
    manifest = Manifest.from_bytes(stored)
    assert manifest.to_bytes() == stored
    assert manifest.digest() == f"sha256:{version}"
    assert manifest.model_copy(update={"gate": manifest.gate.merged(GateFigures())}).to_bytes() == stored


def test_keys_of_another_release_are_kept() -> None:
    data = stored_with({"basis": "held-out", "of_a_later_release": 1.5})
    manifest = Manifest.from_bytes(data)
    assert manifest.to_bytes() == data
    assert manifest.gate.as_dict()["of_a_later_release"] == 1.5


def test_figures_are_read_as_typed_fields() -> None:
    figures = Manifest.from_bytes(STORED).gate
    assert (figures.basis, figures.held_out_examples, figures.steps) == ("held-out", 1, 3)
    assert (figures.loss_before, figures.loss_after) == (5.54389, 5.537778)
    assert figures.new_before is None
    assert GateFigures.model_fields.keys() >= figures.as_dict().keys()


def test_figures_of_a_batch_too_small_to_hold_anything_out_are_those_of_its_own_rows() -> None:
    figures = GateFigures(basis="seen", new_before=3.0, new_after=2.5)
    assert (figures.loss_before, figures.loss_after) == (3.0, 2.5)


numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.none())
names = st.sampled_from(["anchor_base", "held_out_after", "new_error", "strain", "of_a_later_release", "model_fields"])


@given(st.dictionaries(names, numbers))
def test_any_figures_read_back_to_the_byte_and_none_stays_apart_from_absent(gate: dict[str, object]) -> None:
    data = stored_with(gate)
    manifest = Manifest.from_bytes(data)
    assert manifest.to_bytes() == data
    assert manifest.gate.as_dict().keys() == gate.keys()
    assert Manifest.from_bytes(manifest.to_bytes()).gate == manifest.gate


def test_absent_and_not_finite_are_different_figures() -> None:
    assert GateFigures(anchor_base=None) != GateFigures()
    assert GateFigures(anchor_base=None).as_dict() == {"anchor_base": None}
    assert Manifest.from_bytes(stored_with({})).gate == GateFigures()


def test_merging_adds_and_replaces_and_changes_neither() -> None:
    first, more = GateFigures(steps=3, reason="ok"), GateFigures(forgotten_examples=2, reason="no-gain")
    assert first.merged(more).as_dict() == {"forgotten_examples": 2, "reason": "no-gain", "steps": 3}
    assert first.as_dict() == {"reason": "ok", "steps": 3}


@pytest.mark.parametrize(
    "gate",
    [{"steps": 1.5}, {"steps": True}, {"anchor_base": "low"}, {"strain": 2**63}, {"basis": 3}, {"else": [1]}],
)
def test_figures_of_another_type_are_refused(gate: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="gate"):
        Manifest.from_bytes(stored_with(gate))


def test_figures_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        GateFigures(steps=1).steps = 2  # type: ignore[misc]
