"""The commands of `perennial`, each a thin reader of arguments over a module of its own.

Exit codes: 0 done; 1 something is wrong with what was looked at or sent; 2 the command or a setting is not usable;
3 a service (broker, store) cannot be reached; 4 what was asked for does not exist; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from perennial.storage.errors import NotFoundError, PerennialError, StoreUnavailableError
from perennial.streams.cli.forget_app import forget_app

app = typer.Typer(
    help="Keeps language models learning from Kafka, and makes them forget on purpose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
topics_app = typer.Typer(help="The topics on the broker.", no_args_is_help=True)
publish_app = typer.Typer(help="Publish JSON lines, each confirmed by the broker.", no_args_is_help=True)
adapters_app = typer.Typer(help="Adapters and their versions.", no_args_is_help=True)
dlq_app = typer.Typer(help="Dead letters: what was refused, and its way back.", no_args_is_help=True)
app.add_typer(topics_app, name="topics")
app.add_typer(publish_app, name="publish")
app.add_typer(adapters_app, name="adapters")
app.add_typer(dlq_app, name="dlq")
app.add_typer(forget_app, name="forget")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AdapterName = Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")]
Reason = Annotated[str, typer.Option(help="Only letters refused for this reason.")]
Stage = Annotated[str, typer.Option(help="Only letters refused by this role.")]
Source = Annotated[str, typer.Option("--topic", help="Only letters from this topic.")]
AdapterPattern = Annotated[str, typer.Option("--adapter", help="Only letters of this adapter; * stands for anything.")]
Since = Annotated[str, typer.Option(help="Only letters refused since: 30m, 12h, 7d, or an ISO 8601 time.")]
MaxReplays = Annotated[int, typer.Option(min=1, help="Replays after which a letter stays, in quarantine.")]
errors = Console(stderr=True)


def print_error(error: PerennialError) -> None:
    """What went wrong, what came in, what is allowed and what to do, a line each."""
    errors.print(f"[bold red]error:[/] {_escape(error.message)}", soft_wrap=True)
    for label, value in (("got", error.got), ("allowed", error.allowed), ("remedy", error.remedy)):
        if value is not None and value != "":  # a value may be unhashable
            errors.print(f"  [bold]{label}:[/] {_escape(str(value))}", soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Entry point of the installed command."""
    # Before torch loads: OpenMP threads that spin while they wait triple a step's time where processes share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except PerennialError as error:
        print_error(error)
        if isinstance(error, StoreUnavailableError):
            sys.exit(3)
        sys.exit(4 if isinstance(error, NotFoundError) else error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="Fewer documents, for a first look; the bounds are not judged.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path("out"),
    keep: Annotated[bool, typer.Option(help="Keep the topics and objects afterwards, and say where.")] = False,
    json_: Json = False,
) -> None:
    """Show the whole loop on real text: a broker, every role, an adapter that lives through a change of domain."""
    from perennial.streams.cli.demo.run import run_demo

    raise typer.Exit(run_demo(quick=quick, out=out, keep=keep, as_json=json_))


@app.command()
def up(
    data_dir: Annotated[Path | None, typer.Option(help="Folder for topics, objects and logs.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the embedded broker.")] = None,
    shared_model: Annotated[bool, typer.Option(help="Scorer and learner in one process, sharing the base.")] = False,
    store: Annotated[
        str | None, typer.Option(help="`minio`: a MinIO server of its own; or as PERENNIAL_STORE.")
    ] = None,
) -> None:
    """Run an embedded broker and all roles until Ctrl-C; what was learned is kept."""
    from perennial.streams.devstack.stack import run_up

    raise typer.Exit(run_up(data_dir=data_dir, port=port, shared_model=shared_model, store=store))


@app.command()
def worker(
    roles: Annotated[list[str], typer.Argument(help="intake, streams, scorer, learner; several share one process.")],
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run one role (or several in one process) until SIGTERM."""
    from perennial.streams.cli.worker import run_worker

    raise typer.Exit(run_worker(roles, parent_pid=parent))


@app.command("init")
def initialise(
    wait_s: Annotated[float, typer.Option(help="How long to wait for broker and store to answer.")] = 0,
    json_: Json = False,
) -> None:
    """Make topics and bucket where they are missing, and prove the store's conditional writes; safe to repeat."""
    from perennial.streams.cli.init import initialise

    raise typer.Exit(initialise(wait_s=wait_s, as_json=json_))


@topics_app.command("create")
def topics_create(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be made and what differs.")] = False,
    json_: Json = False,
) -> None:
    """Make the topics that are missing, and say which existing ones differ from what the project needs."""
    from perennial.streams.cli.topics import create_topics

    raise typer.Exit(create_topics(dry_run=dry_run, as_json=json_))


@publish_app.command("documents")
def publish_documents(
    file: Annotated[str, typer.Argument(help="JSON lines, - for standard input.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter of lines that name none.")] = None,
    json_: Json = False,
) -> None:
    """Publish documents: a JSON object a line with adapter, document_id and text."""
    from perennial.streams.cli.publish import publish_file

    raise typer.Exit(publish_file("documents", file, adapter=adapter, as_json=json_))


@publish_app.command("interactions")
def publish_interactions(
    file: Annotated[str, typer.Argument(help="JSON lines, - for standard input.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter of lines that name none.")] = None,
    json_: Json = False,
) -> None:
    """Publish interactions: a JSON object a line with adapter, interaction_id, prompt, response and correction."""
    from perennial.streams.cli.publish import publish_file

    raise typer.Exit(publish_file("interactions", file, adapter=adapter, as_json=json_))


@adapters_app.command("ls")
def adapters_ls(json_: Json = False) -> None:
    """All adapters with their live version."""
    from perennial.streams.cli.adapters import list_adapters

    raise typer.Exit(list_adapters(as_json=json_))


@adapters_app.command("show")
def adapters_show(adapter: AdapterName, json_: Json = False) -> None:
    """One adapter: what is live, what it learned, through which gate."""
    from perennial.streams.cli.adapters import show_adapter

    raise typer.Exit(show_adapter(adapter, as_json=json_))


@adapters_app.command("history")
def adapters_history(
    adapter: AdapterName,
    limit: Annotated[int, typer.Option(help="Versions to show, newest first.")] = 20,
    json_: Json = False,
) -> None:
    """The line of versions, refused ones and their reasons included."""
    from perennial.streams.cli.adapters import show_history

    raise typer.Exit(show_history(adapter, limit=limit, as_json=json_))


@adapters_app.command("rollback")
def adapters_rollback(
    adapter: AdapterName,
    to: Annotated[str | None, typer.Option(help="Version to go back to; without it the one live before.")] = None,
    reason: Annotated[str, typer.Option(help="Recorded with the rollback.")] = "asked for on the command line",
    wait_s: Annotated[float, typer.Option(help="How long to wait until it is live; 0: do not wait.")] = 60,
    json_: Json = False,
) -> None:
    """Make an earlier version live again."""
    from perennial.streams.cli.adapters import roll_back

    raise typer.Exit(roll_back(adapter, to=to, reason=reason, wait_s=wait_s, as_json=json_))


@dlq_app.command("ls")
def dlq_ls(
    reason: Reason = "", stage: Stage = "", topic: Source = "", adapter: AdapterPattern = "", since: Since = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Letters to show, the newest.")] = 50,
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """What was refused: why, by whom, from where, and whether a replay would send it back."""
    from perennial.streams.cli.dlq import list_letters, selection

    chosen = selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=since)
    raise typer.Exit(list_letters(chosen, limit=limit, max_replays=max_replays, as_json=json_))


@dlq_app.command("show")
def dlq_show(
    place: Annotated[str, typer.Argument(metavar="PARTITION:OFFSET", help="Place of the letter, as `dlq ls` shows it.")],
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """One letter with its headers and value."""
    from perennial.streams.cli.dlq import show_letter

    raise typer.Exit(show_letter(place, max_replays=max_replays, as_json=json_))


@dlq_app.command("replay")
def dlq_replay(
    reason: Reason = "", stage: Stage = "", topic: Source = "", adapter: AdapterPattern = "", since: Since = "",
    dry_run: Annotated[bool, typer.Option(help="Only count what would be sent, by reason.")] = False,
    rate: Annotated[float, typer.Option(min=0, help="Letters per second; 0: as fast as it goes.")] = 50,
    limit: Annotated[int, typer.Option(min=0, help="Letters at most; 0: all.")] = 0,
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """Send letters back to their topics, counted and at a steady rate; goes on where an earlier replay ended."""
    from perennial.streams.cli.dlq import replay_letters, selection

    chosen = selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=since)
    raise typer.Exit(
        replay_letters(chosen, dry_run=dry_run, rate=rate, max_replays=max_replays, limit=limit, as_json=json_)
    )


@app.command()
def explain(
    adapter: AdapterName,
    document: Annotated[str | None, typer.Option(help="Only this document or interaction.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Examples to show, those of the newest versions.")] = 50,
    json_: Json = False,
) -> None:
    """What it learned: which events, from where, in which version, through which gate, and until when."""
    from perennial.streams.cli.explain import explain as explain_adapter

    raise typer.Exit(explain_adapter(adapter, document=document, limit=limit, as_json=json_))


@app.command()
def ask(
    adapter: AdapterName,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 48,
    json_: Json = False,
) -> None:
    """Ask the frozen base and the live adapter the same, side by side."""
    from perennial.streams.cli.ask import ask_both

    raise typer.Exit(ask_both(adapter, prompt, max_new_tokens=max_new_tokens, as_json=json_))


@app.command()
def status(json_: Json = False) -> None:
    """The flow at a glance: topics, lag, adapters, who serves them."""
    from perennial.streams.cli.status import show_status

    raise typer.Exit(show_status(as_json=json_))


@app.command()
def watch(
    every_s: Annotated[float, typer.Option(help="Seconds between looks.")] = 1.0,
    times: Annotated[int, typer.Option(help="Looks before it ends; 0: until Ctrl-C.")] = 0,
) -> None:
    """Live view of the flow."""
    from perennial.streams.cli.status import watch_status

    raise typer.Exit(watch_status(every_s=every_s, times=times))


@app.command()
def doctor(json_: Json = False) -> None:
    """Check broker, topics, store, conditional writes, base and device, and say the remedy."""
    from perennial.streams.cli.doctor import examine

    raise typer.Exit(examine(as_json=json_))
