"""The command `perennial acls`: print, create or check the broker's ACLs, one principal for each role."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated

import typer


def acls(
    principal_prefix: Annotated[
        str, typer.Option(help="Precedes a role's name in the name of its principal, as in User:perennial-intake.")
    ] = "perennial-",
    principal: Annotated[
        list[str] | None,
        typer.Option(
            help="ROLE=NAME: the principal of a role, instead of its own, such as subscriber=User:CN=eu. Repeat it for "
            "a role with several."
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Create the ACLs that the broker lacks.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the broker; exit code 1 if something is missing or too much.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Print lines that remove the ACLs.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Print the ACLs of every role as lines for kafka-acls.sh, create them at the broker, or check them.

    With PERENNIAL_TENANTS each tenant has a publisher, a requester and a
    subscriber for itself: publisher.acme, requester.acme, subscriber.acme.
    """
    raise typer.Exit(
        run_acls(
            principal_prefix, principal or [], apply=apply, check=check, remove=remove, as_json=json_,
        )
    )  # fmt: skip


def run_acls(
    principal_prefix: str, named: list[str], *, apply: bool, check: bool, remove: bool, as_json: bool
) -> int:  # fmt: skip
    """Print the ACLs of every role, create the missing ones, or compare them with the broker's.

    Args:
        principal_prefix: Precedes a role's name in the name of its principal.
        named: `ROLE=NAME` for principals that take the place of a role's own.
        apply: Create the missing ACLs.
        check: Compare only.
        remove: Print lines that remove the ACLs.
        as_json: Print JSON instead of text.

    Returns:
        The exit code: 1 where `check` finds a difference.

    Raises:
        SettingsError: An option is not usable.
        AclError: The broker refuses to show or to create ACLs.
        KafkaUnavailableError: Kafka does not answer.
    """
    from perennial.streams.devstack.discovery import connected_settings
    from perennial.streams.kafka.access.acl_table import acls_of, command_lines, principals_of, roles_of
    from perennial.streams.settings import SettingsError, load_settings

    if apply + check + remove > 1:
        raise SettingsError(
            "options that exclude each other", got="two of --apply, --check and --remove", allowed="one of them",
            remedy="leave out the others",
        )  # fmt: skip
    settings = connected_settings() if apply or check else load_settings()
    roles = roles_of(settings.tenants.names)
    principals = principals_of(principal_prefix, [_pair(text, roles) for text in named], roles)
    if not (apply or check):
        wanted = acls_of(settings, principals)
        if as_json:
            print(json.dumps([acl._asdict() for acl in wanted]))
        else:
            print("\n".join(command_lines(wanted, settings.kafka.bootstrap or "localhost:9092", remove=remove)))
        return 0
    from perennial.streams.kafka.access.acl_admin import compare, create_missing

    wanted = acls_of(settings, principals)
    report = create_missing(settings, wanted) if apply else compare(settings, wanted)
    if as_json:
        print(json.dumps({
            "wanted": len(wanted), "present": report.present, "surplus": list(report.surplus),
            "created" if apply else "missing": [acl._asdict() for acl in report.missing],
        }))  # fmt: skip
    else:
        for acl in report.missing:
            print(f"{'created' if apply else 'missing'}: {acl.principal}: {acl.operation} on {acl.kind} {acl.name}")
        for line in report.surplus:
            print(f"too much: {line}")
        done = f", {len(report.missing)} {'created' if apply else 'missing'}, {len(report.surplus)} too much"
        print(f"{len(wanted)} ACLs for {sum(map(len, principals.values()))} principals: {report.present} present{done}")
    return 1 if check and not report.agrees else 0


def _pair(text: str, roles: Collection[str]) -> tuple[str, str]:
    """Return role and principal of `ROLE=NAME`.

    Raises:
        SettingsError: It is not of this form, or there is no such role.
    """
    from perennial.streams.settings import SettingsError

    role, _, name = text.partition("=")
    if role not in roles or not name:
        raise SettingsError(
            "--principal is not usable", got=text, allowed=f"ROLE=NAME with a role of {', '.join(roles)}",
            remedy="correct it",
        )  # fmt: skip
    return role, name
