"""Doubles of the HTTP interfaces of vLLM and SGLang on loopback, as far as their backends use them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Tokens = dict[int, float]
Reply = tuple[int, Any]


class EngineDouble:
    """What both engines have in common: adapters by name, each with the tokens that it predicts.

    Attributes:
        adapters: Path by name.
        resident: Names of adapters in memory, the least recently used first; forgotten names stay.
        predicts: Returns the next tokens by name of the adapter and text; a string stands for a failure with that text.
        refuses: Returns the refusal of an adapter by name, None to load it.
        busy: Names that requests use.
        key: The key that calls must carry.
        loads: Names in the order in which they were loaded.
    """

    def __init__(self, max_resident: int = 4) -> None:
        self.adapters: dict[str, str] = {}
        self.resident: list[str] = []
        self.max_resident = max_resident
        self.predicts: Callable[[str, str], Tokens | str] = lambda _name, _text: {1: -0.5, 2: -1.0}
        self.refuses: Callable[[str], Reply | None] = lambda _name: None
        self.busy: set[str] = set()
        self.key: str | None = None
        self.loads: list[str] = []
        self.url = ""

    def call(self, path: str, content: dict[str, Any] | None) -> Reply:
        raise NotImplementedError

    def models(self) -> Reply:
        cards: list[dict[str, Any]] = [{"id": "base", "root": "/models/base", "parent": None}]
        cards += [{"id": name, "root": path, "parent": "base"} for name, path in self.adapters.items()]
        return 200, {"object": "list", "data": cards}

    def remember(self, name: str, path: str) -> None:
        self.loads.append(name)
        self.adapters[name] = path
        self.use(name)

    def use(self, name: str) -> None:
        self.resident = [*(each for each in self.resident if each != name), name][-self.max_resident :]

    @contextmanager
    def serving(self) -> Iterator[EngineDouble]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                content = json.loads(self.rfile.read(size)) if size else None
                allowed = double.key is None or self.headers.get("Authorization") == f"Bearer {double.key}"
                status, found = double.call(self.path, content) if allowed else (401, {"error": "Unauthorized"})
                body = found.encode() if isinstance(found, str) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815 - the base class names them

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def error(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "code": status}}


class VllmDouble(EngineDouble):
    """vLLM 0.32: an unload forgets the name and keeps the weights until other adapters displace them."""

    def call(self, path: str, content: dict[str, Any] | None) -> Reply:
        if path == "/v1/models":
            return self.models()
        if path == "/metrics":
            busy = ",".join(sorted(self.busy))
            return 200, (
                'vllm:lora_requests_info{max_lora="3",running_lora_adapters="old",waiting_lora_adapters=""} 1.7e+09\n'
                f'vllm:lora_requests_info{{max_lora="3",running_lora_adapters="{busy}",waiting_lora_adapters=""}} '
                "1.8e+09\n"
            )
        assert content is not None
        if path == "/v1/completions":
            return self._complete(content)
        name = content["lora_name"]
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(name, None)
            return (200, "Success") if found else error(404, f"The lora adapter '{name}' cannot be found.")
        assert path == "/v1/load_lora_adapter"
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(content["lora_path"], "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {content['lora_path']}")
        refusal = self.refuses(name)
        if refusal is not None:
            return refusal
        self.remember(name, content["lora_path"])
        return 200, "Success"

    def _complete(self, content: dict[str, Any]) -> Reply:
        model = content["model"]
        if model != "base" and model not in self.adapters:
            return error(404, f"The model `{model}` does not exist.")
        if model in self.adapters:
            self.use(model)
        choices = []
        for index, text in enumerate(content["prompt"]):
            tokens = self.predicts(model, text)
            if isinstance(tokens, str):
                return error(500, tokens)
            top = {f"token_id:{token}": nats for token, nats in tokens.items()}
            choices.insert(0, {"index": index, "logprobs": {"top_logprobs": [top]}})  # in no order
        return 200, {"model": model, "choices": choices}


class SglangDouble(EngineDouble):
    """SGLang 0.5.23: an unload removes the weights; an unknown name is refused with HTTP 400."""

    def call(self, path: str, content: dict[str, Any] | None) -> Reply:
        if path == "/v1/models":
            return self.models()
        assert content is not None
        if path == "/generate":
            return self._generate(content)
        name = content["lora_name"]
        if path == "/unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                return 400, {"success": False, "error_message": f"LoRA with name {name} does not exist."}
            self.resident.remove(name)
            return 200, {"success": True, "error_message": ""}
        assert path == "/load_lora_adapter"
        if not Path(content["lora_path"], "adapter_config.json").is_file():
            return 400, {"success": False, "error_message": f"{content['lora_path']} is not a folder"}
        refusal = self.refuses(name)
        if refusal is not None:
            return refusal
        self.remember(name, content["lora_path"])
        return 200, {"success": True, "error_message": "", "loaded_adapters": dict(self.adapters)}

    def _generate(self, content: dict[str, Any]) -> Reply:
        answers = []
        for name, text in zip(content["lora_path"], content["text"], strict=True):
            if name not in self.adapters:
                return error(400, f"The following requested LoRA adapters are not loaded: {name}")
            tokens = self.predicts(name, text)
            top = [] if isinstance(tokens, str) else [[nats, token, None] for token, nats in tokens.items()]
            answers.append({"text": "", "meta_info": {"output_top_logprobs": [top]}})
        return 200, answers
