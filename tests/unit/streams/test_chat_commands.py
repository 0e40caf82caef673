"""`perennial ask` and `perennial adapters system-prompt`, with a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from perennial.learner.model import base as base_module
from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.serving.answer_streamer import AnswerStreamer
from perennial.learner.serving.peft_backend import PeftBackend
from perennial.storage.errors import NotFoundError, StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.prompts.system_prompts import load_system_prompt
from perennial.streams.cli.app import app
from perennial.streams.cli.chat.ask import Question, ask_models
from perennial.streams.cli.chat.system_prompt import change_system_prompt, show_system_prompt
from tests import tiny
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
QUESTION = Question("How long does a refund take?", max_new_tokens=12)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    monkeypatch.setattr(base_module, "load_base", lambda *_: tiny.base())
    return DirectoryStore(tmp_path / "store", fsync=False)


def weights(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    lora = Lora(tiny.base(), LoraConfig(2, 4))
    return to_safetensors({name: torch.randn(shape, generator=generator) for name, shape in lora.shapes.items()})


@pytest.fixture
def versions(store: DirectoryStore) -> list[str]:
    publisher = VersionPublisher(store, base_sha256=tiny.base().digest)
    return [publisher.publish(weights(seed)).version for seed in (1, 2, 3)]


def asked(capsys, question: Question = QUESTION, **more: object) -> dict[str, str]:
    options: dict[str, object] = {"version": None, "base": None, "as_json": True, **more}
    assert ask_models(ADAPTER, question, **options) == 0  # type: ignore[arg-type]
    return json.loads(capsys.readouterr().out)


def test_any_version_answers_by_its_number_or_the_beginning_of_its_id(versions, capsys):
    live = asked(capsys)
    assert live["version"] == versions[2]
    by_number = asked(capsys, version="2")
    by_id = asked(capsys, version=versions[1].removeprefix("sha256:")[:12])
    assert by_number == by_id
    assert by_number["version"] == versions[1]
    assert by_number["adapter"] != live["adapter"]
    assert by_number["base"] == live["base"]


def test_base_and_adapter_answer_alone(versions, capsys):
    both = asked(capsys)
    assert asked(capsys, base=True) == {
        "prompt": QUESTION.prompt,
        "system": None,
        "version": None,
        "base": both["base"],
    }
    assert "base" not in asked(capsys, base=False)


def test_the_base_answers_without_any_version(store, capsys):
    assert "base" in asked(capsys, base=True)
    with pytest.raises(NotFoundError, match="no live version"):
        ask_models(ADAPTER, QUESTION, version=None, base=None, as_json=True)


def test_a_revoked_version_does_not_answer(store, versions, capsys):
    registry = VersionPublisher(store).registry
    registry.revoke(ADAPTER, versions[0], "wrong")
    with pytest.raises(NotFoundError, match="revoked"):
        ask_models(ADAPTER, QUESTION, version="1", base=None, as_json=True)
    for unknown in ("777777777777", "feedfeedfeed"):  # digests vary from run to run
        with pytest.raises(NotFoundError, match="no such version"):
            ask_models(ADAPTER, QUESTION, version=unknown, base=None, as_json=True)


def test_the_adapter_s_system_prompt_is_asked_with_unless_another_is_given(store, versions, capsys, tmp_path):
    plain = asked(capsys)
    (tmp_path / "prompt.txt").write_text("\ufeffBe brief.\n")
    assert change_system_prompt(ADAPTER, str(tmp_path / "prompt.txt"), as_json=False) == 0
    assert load_system_prompt(store, ADAPTER).text == "Be brief."
    capsys.readouterr()
    own = asked(capsys)
    assert (own["system"], own["adapter"] != plain["adapter"]) == ("Be brief.", True)
    assert asked(capsys, Question(QUESTION.prompt, "Be brief.", 12)) == own
    assert asked(capsys, Question(QUESTION.prompt, "", 12)) == plain


def test_piped_answers_are_plain_text_under_their_names(versions, capsys):
    found = asked(capsys)
    ask_models(ADAPTER, QUESTION, version=None, base=None, as_json=False)
    printed = capsys.readouterr().out
    assert printed.startswith("frozen base:\n")
    assert f"\n\n{ADAPTER} @ {versions[2]}:\n" in printed
    assert "\x1b" not in printed
    assert "\x1b" not in found["adapter"] or "\\x1b" in printed


def test_an_answer_is_passed_on_token_by_token_and_can_be_interrupted(store, versions):
    backend, registry = PeftBackend(tiny.base(), LoraConfig(2, 4)), VersionPublisher(store).registry
    backend.load("v", weights(1), registry.manifest(ADAPTER, versions[0]))
    backend.activate("v")
    parts: list[str] = []
    answer = backend.generate("hello", 20, on_text=parts.append)
    assert "".join(parts) == answer
    assert len(parts) > 1

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.generate("hello", 20, on_text=stop)
    assert backend.generate("hello", 20) == answer
    backend.close()


def test_a_character_of_several_tokens_is_passed_on_whole():
    tokenizer, parts = tiny.tokenizer(), []
    streamer = AnswerStreamer(tokenizer, parts.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in ExampleTokenizer(tokenizer).encode("aé日b"):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert parts == ["a", "é", "日", "b"]


def test_the_system_prompt_is_shown_changed_and_cleared(store, tmp_path, capsys):
    with pytest.raises(NotFoundError, match="no system prompt"):
        show_system_prompt(ADAPTER, as_json=False)
    (tmp_path / "p.txt").write_bytes("Sei freundlich. \x1b[31m é\n".encode())
    assert (
        CliRunner().invoke(app, ["adapters", "system-prompt", ADAPTER, "--set", str(tmp_path / "p.txt")]).exit_code == 0
    )
    shown = CliRunner().invoke(app, ["adapters", "system-prompt", ADAPTER])
    assert shown.stdout == "Sei freundlich. \\x1b[31m é\n"
    capsys.readouterr()
    show_system_prompt(ADAPTER, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["revision"], facts["digest"][:7]) == (1, "sha256:")
    both = CliRunner().invoke(app, ["adapters", "system-prompt", ADAPTER, "--clear", "--set", "x"])
    assert both.exit_code == 2
    change_system_prompt(ADAPTER, None, as_json=True)
    assert json.loads(capsys.readouterr().out)["changed"] is True
    assert load_system_prompt(store, ADAPTER).text is None
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(StoreError, match="white space"):
        change_system_prompt(ADAPTER, str(tmp_path / "blank.txt"), as_json=True)
    with pytest.raises(NotFoundError, match="no such file"):
        change_system_prompt(ADAPTER, str(tmp_path / "none.txt"), as_json=True)


def test_a_personal_adapter_is_asked_together_with_the_live_version_of_the_shared_one(store, versions, capsys):
    personal = f"{ADAPTER}/user-42"
    user = VersionPublisher(store, personal, tiny.base().digest, extends=ADAPTER)
    own = user.publish(weights(4)).version

    def answers(as_json: bool = True) -> str:
        assert ask_models(personal, QUESTION, version=None, base=False, as_json=as_json) == 0
        return capsys.readouterr().out

    both = json.loads(answers())
    assert (both["version"], both["extends"], both["shared_version"]) == (own, ADAPTER, versions[2])
    assert f"{personal} @ {own} together with {ADAPTER} @ {versions[2]}:\n" in answers(as_json=False)
    VersionPublisher(store, ADAPTER, "sha256:" + "1" * 64).publish(weights(5))
    assert ask_models(personal, QUESTION, version=None, base=False, as_json=True) == 0
    said = capsys.readouterr()
    assert "shared_version" not in json.loads(said.out)
    assert f"{personal} is asked without {ADAPTER}" in said.err
    user.registry.retire(ADAPTER, "live", "gone", user.registry.alias(ADAPTER, "live").version)
    alone = json.loads(answers())
    assert "shared_version" not in alone
    assert alone["adapter"] != both["adapter"]
    assert f"{personal} @ {own}:\n" in answers(as_json=False)
