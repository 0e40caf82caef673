"""Send a retention request and follow it until it is carried out."""

from __future__ import annotations

import json
import time
import uuid
from typing import Final, Literal

from rich.console import Console
from rich.text import Text

from perennial.streams.cli.forget.outcome import print_outcome
from perennial.streams.cli.forget.request_status import StatusReader
from perennial.streams.cli.forget.selection import count_of
from perennial.streams.cli.tables import at_terminal
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.cli.terminal.user_name import user_name
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import RetentionProgressed, RetentionRequested, Selector
from perennial.streams.events.tenants import id_in_tenant
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import Settings

NOT_CARRIED_OUT: Final = 1
NOTHING_MATCHED: Final = 5
"""The request is closed and no example of its selection was in the store: perhaps an id is misspelt."""
WITH_EXCEPTIONS: Final = 6
"""The request is closed, but a replica had not confirmed it at its due time."""
UNAPPROVED: Final = 7
"""The request does nothing until a second person approves it."""
_CONFIRM_S: Final = 30
_REMIND_S: Final = 30.0
_ID_PREFIXES = {"erase": "forget"}
_STATE_TEXTS = {
    "executed": "the adapter is rebuilt without it; its texts, and weights trained on it, are deleted",
    "published": "the rebuilt version is announced to subscribers",
}


def send_request(
    kind: Literal["erase", "hold", "release"],
    pattern: str,
    selector: Selector | None,
    *,
    requested_by: str = "",
    reason: str,
    wait_s: float,
    as_json: bool,
    emergency: bool = False,
) -> int:
    """Send a request, print every change of its state, and wait until it is carried out.

    Args:
        kind: The kind of request.
        pattern: An adapter or a pattern.
        selector: Which examples; None: all.
        requested_by: Who asks; empty: the user of this process.
        reason: Recorded with the request.
        wait_s: How long to wait, in seconds; 0: do not wait.
        as_json: Print the id and the last state as JSON on standard output.
        emergency: Take affected versions out of service before the rebuilt one is ready.

    Returns:
        The exit code: 0; NOT_CARRIED_OUT where the request failed or is not carried out in time; of an erasure that is
        closed also NOTHING_MATCHED and WITH_EXCEPTIONS; UNAPPROVED where it waits for a second approver.
    """
    settings = connected_settings()
    request = RetentionRequested(
        request_id=f"{_ID_PREFIXES.get(kind, kind)}-{uuid.uuid4().hex[:16]}", kind=kind, adapter=pattern,
        selector=selector, requested_by=requested_by or user_name(), reason=reason, emergency=emergency,
    )  # fmt: skip
    return publish_and_follow(settings, request, wait_s=wait_s, as_json=as_json)


def publish_and_follow(settings: Settings, request: RetentionRequested, *, wait_s: float, as_json: bool) -> int:
    """Send a request, or the approval of one, and follow it.

    Args:
        settings: The broker and the store.
        request: The request, or the approval.
        wait_s: How long to wait, in seconds; 0: do not wait.
        as_json: Print the id and the last state as JSON on standard output.

    Returns:
        The exit code; see `send_request`.
    """
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        publisher.publish(request).result(_CONFIRM_S)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    approves = request.approved_by is not None
    # From here on by the id that retain publishes.
    shown_id = id_in_tenant(request.request_id, settings.tenants.tenant or None)
    request = request.model_copy(update={"request_id": shown_id})
    console.print(f"sent {'the approval of ' if approves else ''}request {request.request_id}")
    last: RetentionProgressed | None = None
    if wait_s > 0:
        with StatusReader(settings) as statuses:
            last = _follow(statuses, request, wait_s, console)
    if as_json:
        print(json.dumps({"request_id": request.request_id, "status": last and last.model_dump(mode="json")}))
    carried_out = last is not None and last.state == _wanted(request)
    if last is not None and carried_out and request.kind == "erase" and last.examples and not as_json:
        print_outcome(settings, last)
    console.print(_conclusion(request, last, wait_s, carried_out=carried_out), end="")
    return exit_code_of(request, last, wait_s)


def exit_code_of(request: RetentionRequested, last: RetentionProgressed | None, wait_s: float) -> int:
    """Return the exit code for the last state of a request.

    Args:
        request: The request.
        last: Its last state; None where none came.
        wait_s: How long the command waited, in seconds; 0: it did not.
    """
    if wait_s <= 0:
        return 0
    if last is not None and last.state == "unapproved" and request.approved_by is None:
        return UNAPPROVED
    if last is None or last.state != _wanted(request):
        return NOT_CARRIED_OUT
    if request.kind != "erase":
        return 0
    if not last.examples:
        return NOTHING_MATCHED
    return WITH_EXCEPTIONS if last.exceptions else 0


def _wanted(request: RetentionRequested) -> str:
    return "executed" if KINDS[request.kind].stays_in_force else "closed"


def _follow(
    statuses: StatusReader, request: RetentionRequested, wait_s: float, console: Console
) -> RetentionProgressed | None:
    """Print the changes of a request's state, and in between that it still waits; return the last state."""
    last: RetentionProgressed | None = None
    began = printed = time.monotonic()
    with console.status("waits for retain to accept it") as spinner:  # shown at a terminal only
        for event in statuses.follow(request.request_id, wait_s):
            now = time.monotonic()
            if event is None:
                waits = f"{now - began:.0f} s: {_why_open(last)}"
                spinner.update(waits)
                if not at_terminal(console) and now - printed >= _REMIND_S:
                    console.print(f"  still waiting after {waits}")
                    printed = now
                continue
            if event.state == "unapproved" and request.approved_by is not None:
                continue  # from before the approval
            if last is None or (event.state, event.detail) != (last.state, last.detail):
                _print_state(event, console)
                printed = now
            last = event
            if event.state in {_wanted(request), "unapproved"}:
                break
    return last


def _print_state(event: RetentionProgressed, console: Console) -> None:
    text = event.detail or (_STATE_TEXTS.get(event.state, "") if event.examples else "")
    console.print(Text.assemble(f"  {event.at:%H:%M:%S}Z ", (event.state, "bold"), f"  {printable(text)}".rstrip()))


def _conclusion(
    request: RetentionRequested, last: RetentionProgressed | None, wait_s: float, *, carried_out: bool
) -> str:
    """Return the last line to print, with its line end; empty where the states say it all."""
    where = f"`perennial forget status {request.request_id}` shows its state"
    if last is not None and carried_out:
        if request.kind != "erase":
            return ""
        if not last.examples:
            return (
                "nothing matched: the store has no such example; check the adapter and the ids for spelling. Examples on "
                "their way through the topics are kept out\n"
            )
        return _forgotten(last)
    if wait_s <= 0:
        return f"not waiting for the request; {where}\n"
    if last is not None and last.state == "unapproved":
        return f"nothing is done until another person runs `perennial forget approve {request.request_id} --as NAME`\n"
    if last is not None and last.state == "failed":
        return ""
    return f"not {KINDS[request.kind].done} after {wait_s:.0f} s: {_why_open(last)}; {where}\n"


def _forgotten(last: RetentionProgressed) -> str:
    text = f"{count_of(last.examples, 'example')} forgotten"
    if last.exceptions:
        return (
            f"{text}, with exceptions: stop or repair {printable(', '.join(last.missing))}, which may still serve it\n"
        )
    return f"{text}\n"


def _why_open(last: RetentionProgressed | None) -> str:
    if last is not None and last.state == "held":
        return "a legal hold is on it, `perennial forget release` ends the hold"
    if last is not None and last.state == "published":
        return "it is forgotten, but a replica that is named above has not confirmed the new version"
    return "`perennial doctor` says whether the roles streams and learner run"
