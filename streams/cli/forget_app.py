"""The commands `perennial forget`, its `status`, `hold` and `release`: readers of arguments over streams/cli/forget.py."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

forget_app = typer.Typer(help="Make adapters forget, exactly.", invoke_without_command=True)

_Adapter = Annotated[str, typer.Option(help="Adapter, or a pattern: acme/*, or * for all.")]
_Document = Annotated[list[str] | None, typer.Option(help="Id of a document or interaction; may be repeated.")]
_Subject = Annotated[list[str] | None, typer.Option(help="Id of a person it is about; may be repeated.")]
_Source = Annotated[list[str] | None, typer.Option(help="Source that it came from; may be repeated.")]
_Reason = Annotated[str, typer.Option(help="Recorded with the request.")]
_HoldWait = Annotated[float, typer.Option(help="How long to wait until it is in force; 0: do not wait.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@forget_app.callback()
def forget(
    context: typer.Context,
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: Annotated[float, typer.Option(help="How long to wait until it is closed; 0: do not wait.")] = 300,
    dry_run: Annotated[bool, typer.Option(help="Only show what would be forgotten; sends nothing.")] = False,
    json_: _Json = False,
) -> None:
    """Erase what was learned from documents, persons or sources; kinds given together must all fit.

    From its acceptance on nothing of it is learned; then the adapter is rebuilt as if it had never seen it.
    """
    if context.invoked_subcommand is not None:
        return
    from perennial.streams.cli.forget import ask_to_forget, selector_of, show_plan

    selector = selector_of(adapter, document or [], subject or [], source or [])
    if dry_run:
        raise typer.Exit(show_plan(adapter, selector, as_json=json_))
    raise typer.Exit(ask_to_forget(adapter, selector, reason=reason, wait_s=wait_s, as_json=json_))


@forget_app.command()
def status(
    request: Annotated[str, typer.Argument(help="Request id; without it, all requests.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Requests to show, those that changed last.")] = 50,
    json_: _Json = False,
) -> None:
    """How far requests to forget, hold or expire have come."""
    from perennial.streams.cli.forget import show_requests

    raise typer.Exit(show_requests(request, limit=limit, as_json=json_))


@forget_app.command()
def hold(
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: _HoldWait = 30,
    json_: _Json = False,
) -> None:
    """Keep documents, persons or sources from being forgotten; without any, all that the adapter learned.

    What is asked to be forgotten meanwhile waits for the release.
    """
    _ask("hold", adapter, (document, subject, source), reason, wait_s, as_json=json_)


@forget_app.command()
def release(
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: _HoldWait = 30,
    json_: _Json = False,
) -> None:
    """End the holds with the same adapter and the same selection; what waited for that is then forgotten."""
    _ask("release", adapter, (document, subject, source), reason, wait_s, as_json=json_)


def _ask(
    kind: Literal["hold", "release"],
    adapter: str,
    named: tuple[list[str] | None, list[str] | None, list[str] | None],
    reason: str,
    wait_s: float,
    *,
    as_json: bool,
) -> None:
    from perennial.streams.cli.forget import ask_to_hold, check_pattern, selector_of

    check_pattern(adapter)
    documents, subjects, sources = (values or [] for values in named)
    selector = selector_of(adapter, documents, subjects, sources) if documents or subjects or sources else None
    raise typer.Exit(ask_to_hold(kind, adapter, selector, reason=reason, wait_s=wait_s, as_json=as_json))
