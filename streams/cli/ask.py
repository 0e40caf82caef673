"""The command `perennial ask`: answer a prompt with the frozen base and with the live adapter."""

from __future__ import annotations

import json

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from perennial.extras import require_extra
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import get_blob
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.tables import at_terminal, shown_version
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.devstack.discovery import connected_settings


def ask_both(adapter: str, prompt: str, *, max_new_tokens: int, as_json: bool) -> int:
    """Print both answers and return the exit code.

    Args:
        adapter: Name of the adapter.
        prompt: The text to answer.
        max_new_tokens: Most tokens to generate for each answer.
        as_json: Print JSON instead of text.

    Raises:
        NotFoundError: The adapter has no live version.
        MissingExtraError: The extra `worker` is not installed.
    """
    require_extra("worker", "`perennial ask`")
    settings = connected_settings()
    registry = open_registry(settings)
    alias = registry.alias(adapter, settings.serving.alias)
    if alias is None:
        raise NotFoundError(
            "this adapter has no live version",
            got=adapter,
            remedy="publish documents and wait until a version passes the gate; `perennial adapters ls` shows it",
        )
    with Console(stderr=True).status("loading the base and the adapter"):
        from perennial.learner.model.base import load_base
        from perennial.learner.model.lora import LoraConfig
        from perennial.learner.serving.peft_backend import PeftBackend

        manifest = registry.manifest(adapter, alias.version)
        weights = get_blob(open_store(settings.store.require_uri(), settings.s3), manifest.weights.digest)
        backend = PeftBackend(
            load_base(settings.model.base, settings.model.device, settings.model.threads),
            LoraConfig(manifest.rank, int(manifest.config["alpha"] or 0)),
        )
        plain = backend.generate(prompt, max_new_tokens=max_new_tokens)
        backend.load(alias.version, weights, manifest)
        backend.activate(alias.version)
        learned = backend.generate(prompt, max_new_tokens=max_new_tokens)
    if as_json:
        print(json.dumps({"prompt": prompt, "base": plain, "adapter": learned, "version": alias.version}))
        return 0
    plain, learned = printable_lines(plain), printable_lines(learned)
    console = Console(highlight=False)
    name = f"{adapter} @ {shown_version(alias.version, console)}"
    if at_terminal(console):
        console.print(Text(name), soft_wrap=True)
        panels = [
            Panel(escape(plain), title="frozen base", width=56),
            Panel(escape(learned), title="live adapter", width=56, border_style="green"),
        ]
        console.print(Columns(panels))
    else:
        print(f"frozen base:\n{plain}\n\n{name}:\n{learned}")
    return 0
