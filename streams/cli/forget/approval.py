"""`perennial forget approve`: approve a request of another person, which waits for it."""

from __future__ import annotations

from rich.console import Console

from perennial.storage.errors import NotFoundError, PerennialError
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.forget.requests import publish_and_follow
from perennial.streams.cli.forget.selection import describe_selection
from perennial.streams.cli.tables import print_facts
from perennial.streams.cli.terminal.times import spoken_time
from perennial.streams.cli.terminal.user_name import user_name
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.tenants import id_in_tenant, tenant_of_id
from perennial.streams.retain.ledger import RequestRecord
from perennial.streams.retain.request_store import load_request
from perennial.streams.retain.rules.approvals import same_person


class ApprovalError(PerennialError):
    """A request cannot be approved, or not by this person."""


def approve_request(request_id: str, *, approved_by: str, wait_s: float, as_json: bool) -> int:
    """Show a request that waits for a second approver, approve it, and follow it.

    Args:
        request_id: The request, by the id that `perennial forget status` shows.
        approved_by: Who approves it; empty: the user of this process.
        wait_s: How long to wait until it is carried out, in seconds; 0: do not wait.
        as_json: Print the id and the last state as JSON on standard output.

    Returns:
        The exit code; see `send_request`.

    Raises:
        NotFoundError: retain has no such request.
        ApprovalError: The request does not wait for an approver, or the same person asked for it.
    """
    settings = connected_settings()
    record = load_request(open_registry(settings).store, request_id)
    if record is None:
        raise NotFoundError(
            "no such request", got=request_id, allowed="the id of a request that retain has read",
            remedy="`perennial forget status` lists them",
        )  # fmt: skip
    name = approved_by or user_name()
    _require_approvable(record, name)
    _show(record)
    tenant = tenant_of_id(request_id, settings.tenants.names)
    sent_id = request_id if tenant is None else request_id.removeprefix(id_in_tenant("", tenant))
    approval = record.request.model_copy(update={"request_id": sent_id, "approved_by": name, "signature": None})
    settings = settings.replace(tenant=tenant or "")
    return publish_and_follow(settings, approval, wait_s=wait_s, as_json=as_json)


def _require_approvable(record: RequestRecord, name: str) -> None:
    if not (record.open and record.unapproved):
        raise ApprovalError(
            "the request does not wait for a second approver", got=f"state {record.state}", allowed="state unapproved",
            remedy="`perennial forget status` says what became of it; where it failed, send it again under another id",
        )  # fmt: skip
    if same_person(name, record.request.requested_by):
        raise ApprovalError(
            "who asked for a request cannot approve it", got=name, allowed="another person",
            remedy="let a second person approve it, with --as and their name",
        )  # fmt: skip


def _show(record: RequestRecord) -> None:
    request = record.request
    facts: dict[str, object] = {
        "request": request.request_id, "kind": request.kind, "adapter": request.adapter,
        "selects": describe_selection(record), "requested by": request.requested_by, "reason": request.reason or "-",
        "since": spoken_time(record.received_ms),
    }  # fmt: skip
    print_facts(facts, console=Console(stderr=True))
