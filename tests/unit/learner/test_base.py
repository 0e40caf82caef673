"""The frozen base: what the shipped one is, how bytes become a digest, and what is refused with a remedy."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config

from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.sources import SHIPPED_FOLDER
from perennial.learner.model.base import Base, digest_of_folder, load_base
from perennial.learner.model.general_text import general_texts
from tools.pretrain_base import heldout_loss, lr_factor
from tools.pretrain_corpus import SPECIAL_TOKENS, answer_row


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(device="cpu")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SHIPPED_FOLDER, tmp_path / "model"))


def test_shipped_base_is_small_frozen_and_fp32_on_the_cpu(base):
    parameters = list(base.model.parameters())
    assert 2_000_000 <= sum(p.numel() for p in parameters) <= 4_000_000
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float32} == {base.dtype}
    assert not base.model.training
    assert base.device.type == "cpu"
    assert base.max_positions == 512
    assert torch.are_deterministic_algorithms_enabled()


def test_shipped_folder_stays_within_ten_megabytes_and_holds_no_pickle():
    files = [path for path in SHIPPED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_special_tokens_are_single_ids_and_nothing_is_added_to_a_text(base):
    assert base.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert base.tokenizer.bos_token_id == 0
    assert base.tokenizer.eos_token_id == 1
    text = "  def naïve(x):\n\treturn 42  # 中文 🦉"
    ids = base.tokenizer(text)["input_ids"]
    assert not set(ids) & {0, 1, 2, 3, 4}
    assert base.tokenizer.decode(ids) == text


def test_chat_template_gives_the_form_that_the_base_was_trained_on(base):
    turns = [{"role": "user", "content": "What is re?"}]
    asked = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == "<|bos|><|user|>What is re?<|assistant|>"
    turns.append({"role": "assistant", "content": "A module."})
    answered = base.tokenizer.apply_chat_template(turns, tokenize=False)
    assert answered == "<|bos|><|user|>What is re?<|assistant|>A module.<|eos|>"


def test_heldout_loss_is_what_the_card_says(base):
    card = (SHIPPED_FOLDER / "MODEL_CARD.md").read_text("utf-8")
    stated = re.search(r"Held-out loss: ([\d.]+) nats/token", card)
    assert stated is not None
    measured, tokens = heldout_loss(base.model, base.tokenizer, general_texts("heldout")[:120])
    assert tokens > 3000
    assert measured < float(stated.group(1)) + 0.3


def test_generate_answers_in_the_prompt_form(base):
    ids = base.tokenizer("<|bos|><|user|>What does json.dumps do?<|assistant|>", return_tensors="pt")
    out = base.model.generate(**ids, max_new_tokens=24, do_sample=False)
    answer = base.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.search(r"[A-Za-z]{3}", answer)
    again = base.model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(out, again)


def test_digest_follows_the_bytes_and_nothing_else(base, folder):
    assert base.digest == digest_of_folder(folder)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", base.digest)
    (folder / "MODEL_CARD.md").write_text("other words")
    (folder / "generation_config.json").unlink()
    assert digest_of_folder(folder) == base.digest
    assert load_base(str(folder), device="cpu").digest == base.digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_changed_byte_makes_another_base(base, folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert digest_of_folder(folder) != base.digest


def test_sharded_weights_are_digested_and_a_missing_shard_is_named(base, folder):
    base.model.save_pretrained(folder / "parts", max_shard_size="5MB")
    parts = folder / "parts"
    shards = sorted(parts.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    whole = digest_of_folder(parts)
    data = bytearray(shards[-1].read_bytes())
    data[-1] ^= 1
    shards[-1].write_bytes(data)
    assert digest_of_folder(parts) != whole
    shards[-1].unlink()
    with pytest.raises(BaseModelError, match=shards[-1].name):
        digest_of_folder(parts)


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/none", "~/none/at/all", ""])
def test_missing_folder_names_a_remedy(name):
    with pytest.raises(BaseModelError, match=r"No such model folder.*remedy: .*`shipped`"):
        load_base(name, device="cpu")


def test_hub_id_without_a_hub_names_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"hub.*remedy"):
        load_base("nobody/nothing", device="cpu")


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"No weights.*save_pretrained"):
        load_base(str(folder), device="cpu")


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match=r"cannot be loaded.*remedy"):
        load_base(str(folder), device="cpu")


def test_weights_that_lack_a_parameter_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"lack parameters.*layers\.3"):
        load_base(str(folder), device="cpu")


def test_adapter_folder_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="adapter, not a base"):
        load_base(str(folder), device="cpu")


def test_sequence_to_sequence_model_is_refused(folder):
    T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32).save_pretrained(folder)
    with pytest.raises(BaseModelError, match=r"Not a causal language model.*t5"):
        load_base(str(folder), device="cpu")


def test_encoder_is_refused_though_it_loads_as_a_causal_model(folder):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.5,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(BaseModelError, match=r"later token|lack parameters"):
        load_base(str(folder), device="cpu")


def test_tokenizer_without_an_end_is_refused(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(BaseModelError, match=r"no end-of-sequence.*eos_token"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize(("device", "threads"), [("tpu", None), ("cuda:99", None), ("cpu", 0)])
def test_bad_device_or_thread_count_is_refused(device, threads):
    with pytest.raises(BaseModelError, match="remedy"):
        load_base(device=device, threads=threads)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        load_base(device="cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [lr_factor(step / 1000) for step in range(1001)]
    assert rates[0] > 0
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


class _FirstQuestion:
    def integers(self, high) -> int:
        return 0


def test_answer_row_asks_for_the_last_two_names_and_answers_with_one_sentence():
    row = answer_row("json.encoder.JSONEncoder", "Extensible JSON encoder for Python. More.\n\nRest.", _FirstQuestion())
    assert row == (
        "<|bos|><|user|>What does encoder.JSONEncoder do?<|assistant|>Extensible JSON encoder for Python.<|eos|>"
    )
    assert answer_row("m.f", "f(x) -> y\n\nText.", _FirstQuestion()) is None
