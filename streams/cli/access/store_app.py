"""The command `perennial store policies`: print or apply the store's policies, one account for each role."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

store_app = typer.Typer(help="Say who may do what with the objects of the store.", no_args_is_help=True)


@store_app.command("policies")
def policies(
    folder: Annotated[
        Path | None, typer.Option(help="Write one JSON file for each role into this folder instead of printing.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Create policies and accounts on the MinIO server of PERENNIAL_S3_ENDPOINT.")
    ] = False,
    account_prefix: Annotated[
        str, typer.Option(help="Precedes a role's name in the names of its account and its policy.")
    ] = "perennial-",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Print each role's policy as lines for mc, or create policies and accounts on a MinIO server.

    With --apply an account gets the secret of the variable PERENNIAL_S3_SECRET_KEY_ROLE, such as
    PERENNIAL_S3_SECRET_KEY_INTAKE; an account without such a variable must exist.
    Each tenant of PERENNIAL_TENANTS has a subscriber, whose variable ends in
    SUBSCRIBER_ACME for a tenant acme; without it the account is left out.
    """
    raise typer.Exit(run_policies(folder, account_prefix, apply=apply, as_json=json_))


def run_policies(folder: Path | None, account_prefix: str, *, apply: bool, as_json: bool) -> int:
    """Print the policies of all roles, write them into files, or apply them.

    Args:
        folder: Where to write a file for each role; None: nowhere.
        account_prefix: Precedes a role's name in the names of its account and its policy.
        apply: Create policies and accounts on the server.
        as_json: Print JSON instead of text.

    Returns:
        The exit code, 0.

    Raises:
        SettingsError: The store is no bucket.
        StoreError: The server refuses.
    """
    from perennial.storage.access.store_table import ROLES, policy_of, policy_text, role_names
    from perennial.streams.devstack.discovery import connected_settings

    settings = connected_settings()
    bucket, prefix = _bucket(settings.store.uri or "s3://perennial")
    roles = role_names(settings.tenants.names)
    if apply:
        from perennial.storage.access.minio_accounts import Account, apply_policies

        accounts = {
            role: Account(f"{account_prefix}{role}", os.environ.get(secret_variable(role)) or None) for role in roles
        }
        without = [role for role in roles if role not in ROLES and accounts[role].secret is None]
        given = {role: account for role, account in accounts.items() if role not in without}
        done = apply_policies(settings.s3, given, bucket, prefix, account_prefix)
        done += [f"{accounts[role].name}: left out, {secret_variable(role)} is not set" for role in without]
        print(json.dumps(done) if as_json else "\n".join(done))
        return 0
    if as_json:
        print(json.dumps({role: policy_of(role, bucket, prefix) for role in roles}))
        return 0
    for role in roles:
        name = shlex.quote(f"{account_prefix}{role}")
        path = Path(f"{role}.json") if folder is None else folder / f"{role}.json"
        if folder is None:
            print(f"cat > {path} <<'END'\n{policy_text(role, bucket, prefix)}END")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(policy_text(role, bucket, prefix), "utf-8")
        file = shlex.quote(str(path))
        print(f"mc admin policy create ALIAS {name} {file}")
        print(f'mc admin user add ALIAS {name} "${secret_variable(role)}"')
        print(f"mc admin policy attach ALIAS {name} --user {name}")
    return 0


def secret_variable(role: str) -> str:
    """Return the name of the variable with the secret key of a role's account.

    >>> secret_variable("subscriber.acme-eu")
    'PERENNIAL_S3_SECRET_KEY_SUBSCRIBER_ACME_EU'
    """
    return f"PERENNIAL_S3_SECRET_KEY_{re.sub('[^A-Z0-9]', '_', role.upper())}"


def _bucket(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of a store's address.

    Raises:
        SettingsError: It is no bucket.
    """
    from perennial.streams.settings import SettingsError

    if not uri.startswith("s3://"):
        raise SettingsError(
            "policies are for a bucket, and the store is a folder", got=uri, allowed="s3://bucket or s3://bucket/prefix",
            remedy="set PERENNIAL_STORE; in a folder, the operating system's permissions say who may do what",
        )  # fmt: skip
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix.strip("/")
