"""Options and help texts of `perennial forget`, its `status`, `approve`, `hold`, `release` and `unsuppress`.

Imports the rest of the folder only when a command runs, so that `perennial --help` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from perennial.streams.cli.terminal.ranges import MAX_ROWS, seconds_option

forget_app = typer.Typer(invoke_without_command=True)

_Adapter = Annotated[
    str,
    typer.Option(help="The adapter, for example acme/support; or a pattern: acme/* for all below acme, * for all."),
]
_Document = Annotated[list[str] | None, typer.Option(help="Id of a document or an interaction. May be repeated.")]
_Subject = Annotated[list[str] | None, typer.Option(help="Id of a person that texts are about. May be repeated.")]
_Source = Annotated[list[str] | None, typer.Option(help="Source that texts came from. May be repeated.")]
_Reason = Annotated[str, typer.Option(help="Why; recorded with the request.")]
_HoldWait = Annotated[
    float,
    seconds_option("Seconds to wait until the request takes effect, else exit code 1; 0: do not wait."),
]  # fmt: skip
_As = Annotated[str, typer.Option("--as", help="Who asks for it; recorded. Default: your user name.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@forget_app.callback()
def forget(
    context: typer.Context,
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until all is forgotten, else exit code 1; 0: do not wait."),
    ] = 300,
    emergency: Annotated[
        bool,
        typer.Option(help="Take affected versions out of service at once; nothing may be served meanwhile."),
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show what would be forgotten; send no request.")] = False,
    as_: _As = "",
    json_: _Json = False,
) -> None:
    """Make adapters forget documents, persons or sources exactly, as if they had never seen them.

    An example is forgotten if it fits every option that you give.
    `--document A --document B --source crm` means: A or B, if it came from crm.

    As soon as the request is accepted, no update learns the examples any more.
    Then the learner rebuilds the adapter as if it had never seen them,
    deletes their texts, and never learns equal texts again.
    The served version stays live until the rebuilt one takes its place.

    A request over a pattern waits for a second person: `perennial forget approve`.

    Exit code 5: nothing matched. 6: closed with exceptions, a replica that
    did not confirm it in time may still serve what was forgotten. 7: it waits
    for a second approver.
    """
    if context.invoked_subcommand is not None:
        return
    from perennial.streams.cli.forget.selection import selector_of

    selector = selector_of(adapter, document or [], subject or [], source or [])
    if dry_run:
        from perennial.streams.cli.forget.preview import show_plan

        raise typer.Exit(show_plan(adapter, selector, as_json=json_))
    from perennial.streams.cli.forget.requests import send_request

    raise typer.Exit(
        send_request(
            "erase", adapter, selector, requested_by=as_, reason=reason, wait_s=wait_s, as_json=json_, emergency=emergency
        )
    )  # fmt: skip


@forget_app.command()
def status(
    request: Annotated[str, typer.Argument(help="Id of a request; without it, all requests.")] = "",
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_ROWS, help="Show this many requests, those that changed last.")
    ] = 50,
    json_: _Json = False,
) -> None:
    """Show how far requests to forget, hold, release or expire have come."""
    from perennial.streams.cli.forget.request_status import show_requests

    raise typer.Exit(show_requests(request, limit=limit, as_json=json_))


@forget_app.command()
def approve(
    request: Annotated[str, typer.Argument(help="Id of a request that waits for a second approver.")],
    as_: Annotated[
        str,
        typer.Option("--as", help="Who approves it, another person than who asked; recorded. Default: your user name."),
    ] = "",
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until the request is carried out, else exit code 1; 0: do not wait."),
    ] = 300,
    json_: _Json = False,
) -> None:
    """Approve a request of another person over many adapters, which waits for it.

    `perennial forget status` lists such requests as `unapproved`. The exit
    codes are those of `perennial forget`.
    """
    from perennial.streams.cli.forget.approval import approve_request

    raise typer.Exit(approve_request(request, approved_by=as_, wait_s=wait_s, as_json=json_))


@forget_app.command()
def hold(
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: _HoldWait = 30,
    as_: _As = "",
    json_: _Json = False,
) -> None:
    """Put a legal hold on documents, persons or sources, or on all that an adapter learned.

    Nothing on hold is forgotten. A request to forget it waits until you run
    `perennial forget release` with the same options.
    """
    _send("hold", adapter, (document, subject, source), as_, reason, wait_s, as_json=json_)


@forget_app.command()
def release(
    adapter: _Adapter = "",
    document: _Document = None,
    subject: _Subject = None,
    source: _Source = None,
    reason: _Reason = "",
    wait_s: _HoldWait = 30,
    as_: _As = "",
    json_: _Json = False,
) -> None:
    """End the holds that were made with the same --adapter, --document, --subject and --source.

    Requests to forget that waited for these holds are then carried out.
    `perennial forget status` lists the holds.
    """
    _send("release", adapter, (document, subject, source), as_, reason, wait_s, as_json=json_)


@forget_app.command()
def unsuppress(
    adapter: Annotated[str, typer.Argument(help="The adapter, for example acme/support.")],
    text_file: Annotated[
        list[Path] | None, typer.Option(help="File with one erased text, in UTF-8. May be repeated.")
    ] = None,
    hash_: Annotated[list[str] | None, typer.Option("--hash", help="Hash of an erased text. May be repeated.")] = None,
    reason: _Reason = "",
    requested_by: Annotated[str, typer.Option(help="Who asks for it; recorded. Default: your user name.")] = "",
    json_: _Json = False,
) -> None:
    """Let an adapter learn texts again that were erased.

    An erasure puts the hashes of its texts on a list, and equal texts are never
    learned again. This command takes texts off the list and writes an audit
    record first: who, when, why and which hashes. Publish the text afterwards.
    """
    from perennial.streams.cli.forget.unsuppression import unsuppress_texts

    raise typer.Exit(
        unsuppress_texts(
            adapter, text_file or [], hash_ or [], requested_by=requested_by, reason=reason, as_json=json_
        )
    )  # fmt: skip


def _send(
    kind: Literal["hold", "release"],
    adapter: str,
    named: tuple[list[str] | None, list[str] | None, list[str] | None],
    requested_by: str,
    reason: str,
    wait_s: float,
    *,
    as_json: bool,
) -> None:
    from perennial.streams.cli.forget.requests import send_request
    from perennial.streams.cli.forget.selection import check_pattern, selector_of

    check_pattern(adapter)
    documents, subjects, sources = (values or [] for values in named)
    selector = selector_of(adapter, documents, subjects, sources) if documents or subjects or sources else None
    raise typer.Exit(
        send_request(
            kind, adapter, selector, requested_by=requested_by, reason=reason, wait_s=wait_s, as_json=as_json
        )
    )  # fmt: skip
