"""The command `perennial economics`."""

from __future__ import annotations

from typing import Annotated

import typer

from perennial.streams.cli.terminal.ranges import MAX_ROWS, number


def _number(value: float | None) -> float | None:
    return None if value is None else number(value)


def _yardstick(value: str | None) -> str | None:
    from perennial.streams.cli.economics.cost_formulas import YARDSTICKS

    if value is not None and value not in YARDSTICKS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(YARDSTICKS)}")
    return value


def economics(
    adapter: Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")],
    usd_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_number,
            help="Rent of the device in US dollars; default: 0.10 for a CPU, 3.00 for a GPU.",
        ),
    ] = None,
    usd_per_kwh: Annotated[
        float, typer.Option(min=0, callback=number, help="Price of electricity in US dollars.")
    ] = 0.15,
    watts: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_number,
            help="Power of the device where its energy is not measured; default: 20 for a CPU, 700 for a GPU.",
        ),
    ] = None,
    request_tokens: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Tokens of a request and its answer.")] = 256,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_ROWS, help="Tokens of documents in a request, where retrieval chooses them; default: all."
        ),
    ] = None,
    retrain_passes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1000,
            callback=_number,
            help="Times that a retraining trains each token; default: by the recipe.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            callback=_yardstick,
            help="`8b`: compute the same for Llama 3.1 8B on an H100, by the formulas alone.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Load the base, if it is the adapter's, and time how long it reads the documents.")
    ] = True,
    limit: Annotated[int, typer.Option(min=0, max=MAX_ROWS, help="Most updates to show, the newest.")] = 12,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Show what each update cost, against carrying its documents in every request and against retraining."""
    from perennial.streams.cli.economics.cost_report import EconomicsOptions, show_economics

    options = EconomicsOptions(
        usd_per_hour,
        usd_per_kwh,
        watts,
        request_tokens,
        context_tokens,
        retrain_passes,
        on,
        measure=measure,
        limit=limit,
    )
    raise typer.Exit(show_economics(adapter, options, as_json=json_))
