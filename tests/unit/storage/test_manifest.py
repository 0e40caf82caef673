"""Manifests read back as they were written, to the byte, and nothing else is taken for one."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import (
    MAX_MANIFEST_BYTES,
    BlobRef,
    LearnedExample,
    Manifest,
    SkippedExample,
    update_id,
)

DIGEST = "sha256:" + "a" * 64
BLOB = BlobRef(digest=DIGEST, size_bytes=10)


def make(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "adapter": "acme/support", "seq": 2, "kind": "update", "outcome": "promoted", "reason": "gain",
        "parent": DIGEST, "head": DIGEST, "update_id": DIGEST, "job_id": "job-1", "base_model": "shipped",
        "base_sha256": "b" * 64, "code": "0.1.0", "config": {"rank": 8, "rate": 1e-3, "all": True, "x": None},
        "seed": 3, "threads": 2, "batch": BLOB, "cut": 7,
        "learned": [LearnedExample(example_id="e1", partition="c/t/documents/0", offset=4, tokens=9)],
        "skipped": [SkippedExample(example_id="e2", partition="c/t/documents/0", offset=5, reason="empty")],
        "dropped": 1, "marks": {"c/t/documents/0": 5}, "weights": BLOB, "gate": {"held_out_loss_nats": 2.5},
        "tokens": 9, "rank": 8, "published_from_ms": 1, "published_to_ms": 2,
    }  # fmt: skip
    return Manifest.model_validate({**values, **changes})


def test_a_manifest_reads_back_to_the_byte():
    manifest = make()
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert again.digest() == manifest.digest()
    assert type(again.config["all"]) is bool
    assert type(again.config["rank"]) is int


def test_the_order_of_entries_does_not_change_the_digest():
    one = make(config={"a": 1, "b": 2}, marks={"p": 1, "q": 2})
    two = make(config={"b": 2, "a": 1}, marks={"q": 2, "p": 1})
    assert one.digest() == two.digest()
    assert one.digest() != make(config={"a": 1, "b": 2.0}, marks={"p": 1, "q": 2}).digest()


def test_the_digest_is_the_same_in_another_process():
    code = "from tests.unit.storage.test_manifest import make; print(make().digest())"
    root = Path(__file__).parents[3]
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert output.stdout.strip() == make().digest()


scalars = st.one_of(
    st.booleans(), st.none(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=20),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=10), scalars, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_scalars_read_back_to_the_byte(config):
    unknown_figures = {name: value for name, value in config.items() if name not in GateFigures.model_fields}
    manifest = make(config=config, gate=unknown_figures)
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again.to_bytes() == manifest.to_bytes()
    assert {name: type(value) for name, value in again.config.items()} == {k: type(v) for k, v in config.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "../etc"}, {"adapter": "A"}, {"adapter": "a\n"}, {"seq": 0}, {"seq": 10**12}, {"seq": 1},
        {"head": None}, {"kind": "other"}, {"outcome": "maybe"}, {"weights": None}, {"update_id": "sha256:x"},
        {"parent": "x"}, {"config": {"a": float("nan")}}, {"config": {"a": float("inf")}},
        {"config": {"a": 2**63}}, {"config": {"a": [1]}}, {"marks": {"p": -1}}, {"rank": 0}, {"threads": 0},
        {"dropped": -1}, {"extends": "acme/other"}, {"extends": "acme/support"}, {"extends": ""},
        {"later": {"a": [1]}}, {"later": [[1]]}, {"later": float("nan")}, {"schema_version": 3}, {"schema_version": 0},
    ],
)  # fmt: skip
def test_what_no_manifest_may_say_is_refused(changes):
    with pytest.raises(ValidationError):
        make(**changes)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"1", b"{}", b"\xff", b"[" * 100_000, b"NaN", b'{"a":1}', b"\x80\x04."],
)
def test_junk_is_refused(data):
    with pytest.raises(IntegrityError):
        Manifest.from_bytes(data)


def test_a_schema_after_the_next_is_refused_with_a_remedy():
    with pytest.raises(IntegrityError) as refused:
        Manifest.from_bytes(orjson.dumps({**orjson.loads(make().to_bytes()), "schema_version": 3}))
    assert refused.value.remedy


def test_a_manifest_of_the_next_schema_is_read_and_keeps_its_id():
    fields = orjson.loads(make().to_bytes())
    fields |= {"schema_version": 2, "a_later_field": {"digest": "x", "n": 1}, "z": [1, None, "a"]}
    fields["learned"] = [{**item, "later": True} for item in fields["learned"]]
    data = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    assert b"later" in data
    manifest = Manifest.from_bytes(data)
    assert manifest.to_bytes() == data
    assert manifest.digest() == digest_of(data)


def test_a_personal_adapter_names_its_parent_and_other_manifests_keep_their_bytes():
    personal = make(adapter="acme/support/user-42", extends="acme/support")
    assert Manifest.from_bytes(personal.to_bytes()).extends == "acme/support"
    assert b"extends" not in make().to_bytes()


def test_size_is_bounded():
    with pytest.raises(IntegrityError):
        Manifest.from_bytes(b" " * (MAX_MANIFEST_BYTES + 1))


def test_blobs_are_named_once_each():
    other = BlobRef(digest="sha256:" + "c" * 64, size_bytes=1)
    assert make(optimizer=other, replay=BLOB).blobs() == (BLOB, other)


def test_an_update_is_named_by_what_it_learns_from_what():
    same = update_id("a", DIGEST, {"p": 1, "q": 2}, {"x": 1, "y": 2})
    assert same == update_id("a", DIGEST, {"q": 2, "p": 1}, {"y": 2, "x": 1})
    others = {
        update_id("b", DIGEST, {"p": 1, "q": 2}, {"x": 1, "y": 2}),
        update_id("a", None, {"p": 1, "q": 2}, {"x": 1, "y": 2}),
        update_id("a", DIGEST, {"p": 1, "q": 3}, {"x": 1, "y": 2}),
        update_id("a", DIGEST, {"p": 1, "q": 2}, {"x": 1, "y": 2.0}),
    }
    assert len(others | {same}) == 5


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, *shape: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_safetensors_are_accepted():
    arrays = {
        "a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.int64), "c": np.zeros((0, 4), np.float16),
        "d": np.zeros(5, np.bool_),
    }  # fmt: skip
    check_safetensors(save(arrays))
    check_safetensors(save(arrays, metadata={"format": "pt"}))
    check_safetensors(save({}))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 7, b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00", b"PK\x03\x04" + b"\x00" * 60,
        struct.pack("<Q", 2**63) + b"{}", framed(b"[]"), framed(b"{"), framed({}, b"x"),
        framed({"a": entry(0, 4, 2)}, b"1234"), framed({"a": entry(0, 4, 1), "b": entry(2, 6, 1)}, b"123456"),
        framed({"a": entry(4, 8, 1)}, b"12345678"), framed({"a": entry(0, 4, 1)}, b"12345"),
        framed({"a": entry(0, 4, 1, dtype="F31")}, b"1234"), framed({"a": entry(0, 4, -1)}, b"1234"),
        framed({"a": entry(0, 4, True)}, b"1234"), framed({"a": 1}), framed({"a": entry(-4, 0, 1)}),
        framed({"a": {"dtype": "F32"}}),
    ],
)  # fmt: skip
def test_what_is_no_safetensors_is_refused(data):
    with pytest.raises(IntegrityError):
        check_safetensors(data)


def test_cut_off_safetensors_are_refused():
    whole = save({"a": np.arange(6, dtype=np.float32), "b": np.arange(3, dtype=np.int64)})
    for length in range(len(whole)):
        with pytest.raises(IntegrityError):
            check_safetensors(whole[:length])


@pytest.mark.parametrize(
    ("kind", "state", "schedule"),
    [
        ("update", "head", "head"), ("replayed", "head", "head"), ("rollback", "parent", "parent"),
        ("revoke", "parent", "parent"), ("forget", "parent", "parent"), ("quarantine", "parent", "head"),
    ],
)  # fmt: skip
def test_each_kind_says_what_it_goes_back_to(kind, state, schedule):
    names = {"parent": DIGEST, "head": "sha256:" + "c" * 64}
    manifest = make(kind=kind, **names)
    assert (manifest.state_parent, manifest.schedule_parent) == (names[state], names[schedule])
