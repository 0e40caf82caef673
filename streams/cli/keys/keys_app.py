"""The commands `perennial keys new`, `rotate`, `ls`, `remove`, `sign`, `check` and `repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(
    help="Make, replace and list the keys that sign versions, aliases and events; sign and check what is stored.",
    no_args_is_help=True,
)
_Private = Annotated[
    Path | None, typer.Option("--private", help="File of the private key; by default PERENNIAL_SIGNING_KEY_FILE.")
]
_Public = Annotated[
    Path | None, typer.Option("--public", help="File of the trusted public keys; by default PERENNIAL_TRUSTED_KEYS.")
]
_Label = Annotated[str, typer.Option(help="Text that `keys ls` shows beside the key.")]
_Adapter = Annotated[str | None, typer.Argument(help="Name of the adapter; all if it is left out.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@keys_app.command("new")
def new(private: _Private = None, public: _Public = None, label: _Label = "") -> None:
    """Make a private key, and add its public key to the trusted ones."""
    from perennial.streams.cli.keys.key_commands import new_key

    raise typer.Exit(new_key(private, public, label))


@keys_app.command("rotate")
def rotate(private: _Private = None, public: _Public = None, label: _Label = "") -> None:
    """Replace the private key; what the key before it signed is trusted until `keys remove`."""
    from perennial.streams.cli.keys.key_commands import rotate_key

    raise typer.Exit(rotate_key(private, public, label))


@keys_app.command("ls")
def ls(public: _Public = None, json_: _Json = False) -> None:
    """List the trusted keys, and say which one signs here."""
    from perennial.streams.cli.keys.key_commands import list_keys

    raise typer.Exit(list_keys(public, as_json=json_))


@keys_app.command("remove")
def remove(
    key_id: Annotated[str, typer.Argument(help="Id of the key, or the beginning of it, as `keys ls` prints it.")],
    public: _Public = None,
) -> None:
    """Take a key out of the trusted ones: nothing that only this key signed is served any more."""
    from perennial.streams.cli.keys.key_commands import remove_key

    raise typer.Exit(remove_key(key_id, public))


@keys_app.command("sign")
def sign(
    adapter: _Adapter = None,
    unsigned: Annotated[
        bool,
        typer.Option("--unsigned", help="Also what nobody signed: once, for what was stored before there were keys."),
    ] = False,
    json_: _Json = False,
) -> None:
    """Sign the versions and aliases of the store with this key, beside the trusted keys that signed them."""
    from perennial.streams.cli.keys.stored_signatures import sign_stored

    raise typer.Exit(sign_stored(adapter, unsigned=unsigned, as_json=json_))


@keys_app.command("check")
def check(adapter: _Adapter = None, json_: _Json = False) -> None:
    """Count the versions and aliases that no trusted key signed; exit code 1 if there are any."""
    from perennial.streams.cli.keys.stored_signatures import check_stored

    raise typer.Exit(check_stored(adapter, as_json=json_))


@keys_app.command("repair")
def repair(
    adapter: Annotated[str, typer.Argument(help="Name of the adapter, for example acme/support.")],
    alias: Annotated[str, typer.Option(help="The alias to write.")] = "live",
    generation: Annotated[
        int, typer.Option(min=0, max=10**12, help="Lowest generation to give it, where clients refuse it as replayed.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_: _Json = False,
) -> None:
    """Take what no trusted key signed off the end of an adapter's history, and write its alias anew; stop learners first."""
    from perennial.streams.cli.keys.alias_repair import repair_alias

    raise typer.Exit(repair_alias(adapter, alias, generation, yes=yes, as_json=json_))
