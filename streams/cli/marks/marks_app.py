"""The commands `perennial marks show` and `perennial marks repair`."""

from __future__ import annotations

from typing import Annotated

import typer

marks_app = typer.Typer(
    help="Show the high-water marks of an adapter, or lower one beyond the end of its log.", no_args_is_help=True
)
_Adapter = Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@marks_app.command("show")
def show(adapter: _Adapter, json_: _Json = False) -> None:
    """Show how far each input partition is covered; exit code 1 if a mark is beyond the end of its log."""
    from perennial.streams.cli.marks.mark_repair import show_marks

    raise typer.Exit(show_marks(adapter, as_json=json_))


@marks_app.command("repair")
def repair(
    adapter: _Adapter,
    partition: Annotated[str, typer.Option(help="Origin partition, as `marks show` prints it.")],
    to: Annotated[
        int | None, typer.Option(min=-1, max=2**62, help="Last offset that counts as covered; -1 for none.")
    ] = None,
    to_log_end: Annotated[
        bool, typer.Option("--to-log-end", help="Count everything that the log holds as covered.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Text that is recorded with the repair.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_: _Json = False,
) -> None:
    """Lower a wrong high-water mark, for curate and the learner; safe while the roles run."""
    from perennial.streams.cli.marks.mark_repair import repair_marks

    raise typer.Exit(
        repair_marks(adapter, partition, to=to, to_log_end=to_log_end, reason=reason, yes=yes, as_json=json_)
    )
