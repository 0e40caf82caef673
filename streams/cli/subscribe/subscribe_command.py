"""The arguments of `perennial subscribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perennial.streams.cli.subscribe.served_backends import BackendChoice, BackendKind
from perennial.streams.cli.terminal.ranges import MAX_ROWS, seconds_option


def subscribe(
    adapters: Annotated[list[str], typer.Argument(help="Names of adapters, for example acme/support.")],
    backend: Annotated[BackendKind, typer.Option(help="What serves the versions.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the versions; vllm and sglang read it. Not for peft.")
    ] = None,
    url: Annotated[str, typer.Option(help="Address of vLLM (default: port 8000 here) or SGLang (30000).")] = "",
    server_folder: Annotated[str, typer.Option(help="The folder as the engine sees it; default: the same.")] = "",
    base_model: Annotated[str, typer.Option(help="The base's name in adapter_config.json; default: its own.")] = "",
    base_sha256: Annotated[
        str, typer.Option(help="Take only versions of the base with this digest, sha256:<64 hex>.")
    ] = "",
    max_cpu_loras: Annotated[
        int, typer.Option(min=1, max=MAX_ROWS, help="vLLM's --max-cpu-loras, or more, so that unloaded ones leave it.")
    ] = 8,
    grace_s: Annotated[
        float,
        seconds_option("Seconds to keep a version after the next is active."),
    ] = 2.0,
    prompt: Annotated[str, typer.Option(help="With peft: answer this with each version that comes into service.")] = "",
) -> None:
    """Keep a serving engine, a folder or a model here at the live versions of adapters, until SIGTERM or Ctrl-C.

    The keys of the engines are read from VLLM_API_KEY and SGLANG_API_KEY.
    """
    from perennial.streams.cli.subscribe.follow_adapters import run_subscribe

    choice = BackendChoice(
        kind=backend, folder=folder, url=url, server_folder=server_folder, base_model=base_model,
        base_sha256=base_sha256, max_cpu_loras=max_cpu_loras, grace_s=grace_s,
    )  # fmt: skip
    raise typer.Exit(run_subscribe(adapters, choice, prompt=prompt))
