"""The token ids that a real vLLM server makes of messages are those that corrections are trained with."""

from __future__ import annotations

from typing import Any

import pytest

from perennial.learner.model.tokenization import ExampleTokenizer
from tests.vllm.lora_versions import VersionMaker
from tests.vllm.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(600)
TEXTS = ["How long?", "\n\nTwo\nweeks ", "  Be brief.", "é 日本 🙂", "\tand now?\n"]
SYSTEM, FIRST, ANSWER, *_ = TEXTS
CONVERSATIONS = [
    [("user", text)] for text in TEXTS
] + [
    [("system", SYSTEM), ("user", text)] for text in TEXTS
] + [
    [("user", FIRST), ("assistant", ANSWER), ("user", text)] for text in TEXTS
] + [
    [("system", SYSTEM), ("user", FIRST), ("assistant", ANSWER), ("user", text)] for text in TEXTS
]  # fmt: skip


def differing(server: VllmServer, tokenizer: Any) -> list[list[tuple[str, str]]]:
    """Return the conversations that the server encodes in another way than the learner."""
    codec, found = ExampleTokenizer(tokenizer), []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns]
        status, reply = server.call("/tokenize", {"model": "base", "messages": messages})
        assert status == 200, reply
        if tuple(reply["tokens"]) != codec.chat_ids(turns, 10_000):
            found.append(turns)
    return found


def test_vllm_asks_the_shipped_base_in_the_form_that_is_trained(server: VllmServer, maker: VersionMaker):
    assert differing(server, maker.base.tokenizer) == []
