"""The commands `perennial ask` and `perennial adapters system-prompt`."""

from __future__ import annotations

from typing import Annotated

import typer

_Adapter = Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def ask(
    adapter: _Adapter,
    prompt: Annotated[str, typer.Argument(help="Text to answer.")],
    version: Annotated[
        str | None, typer.Option(help="Version to ask: its sequence number or the beginning of its id; default: live.")
    ] = None,
    base: Annotated[
        bool | None,
        typer.Option("--base/--no-base", help="Ask only the frozen base, or not at all; default: base and adapter."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt instead of the adapter's own; an empty one for none.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens to generate.")] = 48,
    json_: _Json = False,
) -> None:
    """Answer a prompt with the frozen base model and with an adapter, word by word as they are generated."""
    from perennial.streams.cli.chat.ask import Question, ask_models

    question = Question(prompt, system, max_new_tokens)
    raise typer.Exit(ask_models(adapter, question, version=version, base=base, as_json=json_))


def system_prompt(
    adapter: _Adapter,
    file: Annotated[
        str | None, typer.Option("--set", help="File with the new prompt in UTF-8; - reads standard input.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Train and ask without a system prompt from now on.")] = False,
    json_: _Json = False,
) -> None:
    """Show, set or clear the text that stands in front of the adapter's conversations; clients must send the same."""
    from perennial.streams.cli.chat.system_prompt import change_system_prompt, show_system_prompt

    if file is None and not clear:
        raise typer.Exit(show_system_prompt(adapter, as_json=json_))
    if file is not None and clear:
        raise typer.BadParameter("--set and --clear exclude each other")
    raise typer.Exit(change_system_prompt(adapter, file, as_json=json_))
