"""The commands of `perennial`: each one declares its arguments here and calls a function in a module of its own.

Exit codes: 0 done; 1 something is wrong with what was inspected or sent, or nothing was; 2 the command, a setting or a
file is not usable; 3 a service (broker, store) cannot be reached; 4 the named object does not exist; 130 interrupted.
`perennial forget` also ends with 5 where nothing matched, and with 6 where a request was closed with exceptions.

Add a command: write `streams/cli/NAME.py` with a function that takes plain values, prints, and returns the exit code;
then add one section here.

    @app.command()
    def name(adapter: AdapterName, json_: Json = False) -> None:
        '''Say in one sentence what the command does; this is its help.'''
        from perennial.streams.cli.name import run_name

        raise typer.Exit(run_name(adapter, as_json=json_))

- Import inside the function: `perennial --help` must not load torch, Kafka clients or the store.
- Give every argument and option a help text; declare the common ones once, below.
- Raise a PerennialError for whatever a user can correct; `main` prints it without a traceback and sets the exit code.
- Print tables by `streams/cli/tables.py`, and print everything as one JSON value with `--json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from perennial.extras import MissingExtraError, extra_of, missing_extra
from perennial.storage.errors import PerennialError
from perennial.streams.cli.access.acls_command import acls
from perennial.streams.cli.access.store_app import store_app
from perennial.streams.cli.adapter_page.page_command import report
from perennial.streams.cli.backup.backup_app import backup_app
from perennial.streams.cli.base.base_app import base_app
from perennial.streams.cli.chat.chat_commands import ask, system_prompt
from perennial.streams.cli.economics.economics_command import economics
from perennial.streams.cli.forget.commands import forget_app
from perennial.streams.cli.keys.keys_app import keys_app
from perennial.streams.cli.marks.marks_app import marks_app
from perennial.streams.cli.rebase.rebase_command import rebase
from perennial.streams.cli.replicas.replicas_app import replicas_app
from perennial.streams.cli.subscribe.subscribe_command import subscribe
from perennial.streams.cli.terminal.printable import printable_lines
from perennial.streams.cli.terminal.ranges import MAX_ROWS, MAX_SECONDS, number, rate_of, seconds_option, tcp_port
from perennial.streams.cli.terminal.terminal_encoding import write_any_character
from perennial.streams.devstack.signals import exit_interrupted

app = typer.Typer(
    help="Keep language models learning from Kafka, and make them forget on request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
topics_app = typer.Typer(
    help="Create and check topics, add partitions, or adopt a topic that was created again.", no_args_is_help=True
)
publish_app = typer.Typer(help="Publish files of JSON lines; the broker confirms each line.", no_args_is_help=True)
adapters_app = typer.Typer(
    help="Show adapters and their versions, roll one back, learn one anew on another base, park or unpark one.",
    no_args_is_help=True,
)
dlq_app = typer.Typer(help="Show refused records (dead letters), or send them back.", no_args_is_help=True)
app.add_typer(topics_app, name="topics")
app.add_typer(publish_app, name="publish")
app.add_typer(adapters_app, name="adapters")
app.add_typer(dlq_app, name="dlq")
app.add_typer(backup_app, name="backup")
app.add_typer(base_app, name="base")
app.add_typer(forget_app, name="forget")
app.add_typer(keys_app, name="keys")
app.add_typer(marks_app, name="marks")
app.add_typer(replicas_app, name="replicas")
app.add_typer(store_app, name="store")
app.command()(acls)
app.command()(subscribe)
app.command()(ask)
app.command()(economics)
adapters_app.command("system-prompt")(system_prompt)
adapters_app.command()(report)
adapters_app.command()(rebase)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AdapterName = Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")]
JsonLines = Annotated[str, typer.Argument(help="File or pipe of JSON lines in UTF-8; - reads standard input.")]
DefaultAdapter = Annotated[str | None, typer.Option("--adapter", help="Adapter for lines that name none.")]
Reason = Annotated[str, typer.Option(help="Only dead letters with this reason.")]
Stage = Annotated[str, typer.Option(help="Only dead letters that this role refused.")]
Source = Annotated[str, typer.Option("--topic", help="Only dead letters from this topic.")]
AdapterPattern = Annotated[
    str, typer.Option("--adapter", help="Only dead letters of this adapter; * stands for any text.")
]
Since = Annotated[
    str, typer.Option(help="Only dead letters refused in the last 30m, 12h, 7d and so on, or since an ISO 8601 time.")
]
MaxReplays = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_ROWS, help="Number of replays after which a dead letter is not sent back (state quarantined)."
    ),
]
errors = Console(stderr=True)


def print_error(error: PerennialError) -> None:
    """Print an error for a person: what is wrong, what came in, what is allowed and what to do, one per line."""
    lines = [("error", "bold red", error.message), ("  got", "bold", error.got), ("  allowed", "bold", error.allowed),
             ("  remedy", "bold", error.remedy)]  # fmt: skip
    for label, style, value in lines:
        if value is not None and value != "":  # a value may be unhashable
            text = Text.assemble((f"{label}:", style), " ", printable_lines(str(value)))
            errors.print(text, soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line and exit with its exit code; this is the entry point of the installed `perennial`."""
    # Set before torch loads: OpenMP threads that spin while they wait triple the time of a training step where several
    # processes share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    write_any_character()
    try:
        app(prog_name="perennial")
    except PerennialError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        print_error(missing_extra(extra, "this command", [str(error.name)]))
        sys.exit(MissingExtraError.exit_code)
    except KeyboardInterrupt:
        exit_interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # of a path or an address that no command expected to fail
        print_error(
            PerennialError(
                "the operating system refused", got=": ".join(map(str, filter(None, (error.filename, error.strerror or error)))),
                remedy="correct the path, its permissions or the disk, then run the command again",
            )
        )  # fmt: skip
        sys.exit(3 if isinstance(error, ConnectionError | TimeoutError) else 2)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="Use fewer documents and do not judge the result.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the measured values.")] = Path("out"),
    keep: Annotated[bool, typer.Option(help="Keep the topics and objects, and print where they are.")] = False,
    base: Annotated[
        str,
        typer.Option(
            help="A chat model, such as `smollm2`, learns about a made-up company; `auto`: if this machine trains it in time, "
            "which is measured first."
        ),
    ] = "shipped",
    json_: Json = False,
) -> None:
    """Run the whole loop on real text, with a broker of its own: an adapter learns, drifts, forgets and is served."""
    from perennial.streams.cli.demo.run import run_demo

    raise typer.Exit(run_demo(base=base, quick=quick, out=out, keep=keep, as_json=json_))


@app.command()
def up(
    data_dir: Annotated[Path | None, typer.Option(help="Folder for topics, objects and logs.")] = None,
    port: Annotated[
        int | None,
        typer.Option(callback=tcp_port, help="Port of the embedded broker; default: the last one, or a free one."),
    ] = None,
    shared_model: Annotated[
        bool, typer.Option(help="Run scorer and learner in one process that loads the base model once.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(help="`minio` to start a MinIO server, or the address of a store, as in PERENNIAL_STORE."),
    ] = None,
) -> None:
    """Run an embedded broker and every role until Ctrl-C; the next start continues with the same data."""
    from perennial.streams.devstack.stack import run_up

    raise typer.Exit(run_up(data_dir=data_dir, port=port, shared_model=shared_model, store=store))


@app.command()
def worker(
    roles: Annotated[list[str], typer.Argument(help="One or several of intake, streams, scorer, learner.")],
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
    settings_from_stdin: Annotated[bool, typer.Option("--settings-from-stdin", hidden=True)] = False,
) -> None:
    """Run one role, or several in one process, until SIGTERM."""
    from perennial.streams.cli.worker import run_worker

    raise typer.Exit(run_worker(roles, parent_pid=parent, settings_from_stdin=settings_from_stdin))


@app.command("init")
def initialise(
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait for broker and store to answer."),
    ] = 0,
    json_: Json = False,
) -> None:
    """Create missing topics and the bucket, and test the store's conditional writes; safe to repeat."""
    from perennial.streams.cli.init import initialise

    raise typer.Exit(initialise(wait_s=wait_s, as_json=json_))


@topics_app.command("create")
def topics_create(
    dry_run: Annotated[
        bool, typer.Option(help="Change nothing; print what would be created and what differs.")
    ] = False,
    json_: Json = False,
) -> None:
    """Create the missing topics, and print which existing ones differ from what Perennial needs."""
    from perennial.streams.cli.topics import create_topics

    raise typer.Exit(create_topics(dry_run=dry_run, as_json=json_))


@topics_app.command("repartition")
def topics_repartition(
    topic: Annotated[str, typer.Argument(help="examples, scored-examples, drift or adapter-jobs.")],
    partitions: Annotated[
        int, typer.Option(min=1, max=MAX_ROWS, help="Number of partitions that the topic is to have.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the roles pause.")] = False,
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until the writers paused and the topic is read to its end."),
    ] = 600,
    json_: Json = False,
) -> None:
    """Add partitions to an internal topic; the roles that write it pause until it has been read to its end."""
    from perennial.streams.cli.topics import repartition_topic

    raise typer.Exit(repartition_topic(topic, partitions, yes=yes, wait_s=wait_s, as_json=json_))


@topics_app.command("adopt")
def topics_adopt(
    topics: Annotated[list[str] | None, typer.Argument(help="Topics that were created again.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All topics, and the cluster they are in.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_: Json = False,
) -> None:
    """Record the present ids of topics that were deleted and created again; first print what was lost with them."""
    from perennial.streams.cli.topics import adopt_topics

    raise typer.Exit(adopt_topics(topics or [], all_topics=all_, yes=yes, as_json=json_))


@publish_app.command("documents")
def publish_documents(
    file: JsonLines,
    adapter: DefaultAdapter = None,
    json_: Json = False,
) -> None:
    """Publish documents: one JSON object per line with adapter, document_id and text."""
    from perennial.streams.cli.publish import publish_file

    raise typer.Exit(publish_file("documents", file, adapter=adapter, as_json=json_))


@publish_app.command("interactions")
def publish_interactions(
    file: JsonLines,
    adapter: DefaultAdapter = None,
    json_: Json = False,
) -> None:
    """Publish interactions: one JSON object per line with adapter, interaction_id, prompt and response or messages."""
    from perennial.streams.cli.publish import publish_file

    raise typer.Exit(publish_file("interactions", file, adapter=adapter, as_json=json_))


@adapters_app.command("ls")
def adapters_ls(json_: Json = False) -> None:
    """List all adapters with their live version, why they are parked, and how many updates wait."""
    from perennial.streams.cli.adapters import list_adapters

    raise typer.Exit(list_adapters(as_json=json_))


@adapters_app.command("show")
def adapters_show(adapter: AdapterName, json_: Json = False) -> None:
    """Show one adapter: its live version, what its gate measured, why it is parked, and what cuts its next update."""
    from perennial.streams.cli.adapters import show_adapter

    raise typer.Exit(show_adapter(adapter, as_json=json_))


@adapters_app.command("history")
def adapters_history(
    adapter: AdapterName,
    limit: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Most versions to show, newest first.")] = 20,
    json_: Json = False,
) -> None:
    """List the versions of an adapter, refused ones and their reasons included."""
    from perennial.streams.cli.versions.version_list import show_history

    raise typer.Exit(show_history(adapter, limit=limit, as_json=json_))


@adapters_app.command("rollback")
def adapters_rollback(
    adapter: AdapterName,
    to: Annotated[
        str | None,
        typer.Option(
            help="Id of the version to make live, or the beginning of its id; default: the one that was live before."
        ),
    ] = None,
    reason: Annotated[
        str, typer.Option(help="Text that is recorded with the rollback.")
    ] = "requested on the command line",
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until the version is live; 0 does not wait."),
    ] = 60,
    json_: Json = False,
) -> None:
    """Make an earlier version live again, at once."""
    from perennial.streams.cli.adapters import roll_back

    raise typer.Exit(roll_back(adapter, to=to, reason=reason, wait_s=wait_s, as_json=json_))


@adapters_app.command("park")
def adapters_park(
    adapter: AdapterName,
    reason: Annotated[
        str, typer.Option(help="Text that is recorded with the adapter.")
    ] = "requested on the command line",
    json_: Json = False,
) -> None:
    """Park an adapter: its updates wait in the store, and other adapters go on."""
    from perennial.streams.cli.adapters import park

    raise typer.Exit(park(adapter, reason=reason, as_json=json_))


@adapters_app.command("unpark")
def adapters_unpark(
    adapter: AdapterName,
    without_missing: Annotated[
        bool,
        typer.Option("--without-missing", help="Give up the cuts whose jobs are neither in the store nor settled."),
    ] = False,
    wait_s: Annotated[
        float,
        seconds_option("Seconds to wait until the first waiting job was tried; 0 does not wait."),
    ] = 60,
    json_: Json = False,
) -> None:
    """Let a parked adapter go on, and publish the jobs again that wait for it."""
    from perennial.streams.cli.adapters import unpark

    raise typer.Exit(unpark(adapter, without_missing=without_missing, wait_s=wait_s, as_json=json_))


@dlq_app.command("ls")
def dlq_ls(
    reason: Reason = "", stage: Stage = "", topic: Source = "", adapter: AdapterPattern = "", since: Since = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most dead letters to show: the newest ones.")] = 50,
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """List dead letters: why and by which role they were refused, and whether a replay would send them."""
    from perennial.streams.cli.dlq import list_dead_letters, selection

    chosen = selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=since)
    raise typer.Exit(list_dead_letters(chosen, limit=limit, max_replays=max_replays, as_json=json_))


@dlq_app.command("show")
def dlq_show(
    position: Annotated[
        str, typer.Argument(metavar="PARTITION:OFFSET", help="Position of the dead letter, as `dlq ls` prints it.")
    ],
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """Show one dead letter with its headers and value."""
    from perennial.streams.cli.dlq import show_dead_letter

    raise typer.Exit(show_dead_letter(position, max_replays=max_replays, as_json=json_))


@dlq_app.command("replay")
def dlq_replay(
    reason: Reason = "", stage: Stage = "", topic: Source = "", adapter: AdapterPattern = "", since: Since = "",
    dry_run: Annotated[bool, typer.Option(help="Send nothing; count by reason what would be sent.")] = False,
    rate: Annotated[float, typer.Option(min=0, callback=rate_of, help="Records per second, at least 0.001; 0 for no limit.")] = 50,
    limit: Annotated[int, typer.Option(min=0, max=MAX_ROWS, help="Most records to send; 0 for all.")] = 0,
    max_replays: MaxReplays = 3, json_: Json = False,
) -> None:  # fmt: skip
    """Send dead letters back to their topics at a steady rate; continues where an earlier replay ended."""
    from perennial.streams.cli.dlq import replay_dead_letters, selection

    chosen = selection(reason=reason, stage=stage, topic=topic, adapter=adapter, since=since)
    raise typer.Exit(
        replay_dead_letters(chosen, dry_run=dry_run, rate=rate, max_replays=max_replays, limit=limit, as_json=json_)
    )


@app.command()
def gc(
    adapters: Annotated[list[str] | None, typer.Argument(help="Adapters; default: all.")] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**9, help="Newest versions that keep their weights; default: PERENNIAL_KEEP_VERSIONS."
        ),
    ] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Instead delete orphans: blobs that crashed processes left behind.")
    ] = False,
    min_age_h: Annotated[
        float,
        typer.Option(
            min=1, max=MAX_SECONDS, callback=number, help="Hours since the first run that saw a blob as an orphan."
        ),
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    json_: Json = False,
) -> None:
    """Delete the weights of old versions that nothing can need; manifests and micro-batches stay."""
    from perennial.streams.cli.versions.gc import collect, collect_orphaned

    if orphans:
        raise typer.Exit(collect_orphaned(min_age_h=min_age_h, dry_run=dry_run, as_json=json_))
    raise typer.Exit(collect(adapters or [], keep=keep, dry_run=dry_run, as_json=json_))


@app.command()
def explain(
    adapter: AdapterName,
    document: Annotated[str | None, typer.Option(help="Only the document or interaction with this id.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_ROWS, help="Most examples to show, those of the newest versions first.")
    ] = 50,
    json_: Json = False,
) -> None:
    """List what an adapter learned: from which event, in which version, and when it expires."""
    from perennial.streams.cli.explain import explain as explain_adapter

    raise typer.Exit(explain_adapter(adapter, document=document, limit=limit, as_json=json_))


@app.command()
def status(json_: Json = False) -> None:
    """Show topics, waiting records, adapters, and how many subscribers serve each adapter."""
    from perennial.streams.cli.status import show_status

    raise typer.Exit(show_status(as_json=json_))


@app.command()
def watch(
    every_s: Annotated[float, seconds_option("Seconds between two readings.")] = 1.0,
    times: Annotated[int, typer.Option(min=0, max=MAX_ROWS, help="Number of readings; 0 until Ctrl-C.")] = 0,
) -> None:
    """Show what `status` shows, and refresh it until Ctrl-C."""
    from perennial.streams.cli.status import watch_status

    raise typer.Exit(watch_status(every_s=every_s, times=times))


@app.command()
def doctor(json_: Json = False) -> None:
    """Check broker, topics, offsets, store, parked adapters, device and base model; print a remedy for each finding."""
    from perennial.streams.cli.doctor import examine

    raise typer.Exit(examine(as_json=json_))
