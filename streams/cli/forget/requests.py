"""Send a retention request and follow it until it is carried out."""

from __future__ import annotations

import json
import uuid
from typing import Literal

from rich.console import Console
from rich.text import Text

from perennial.streams.cli.forget.request_status import StatusReader
from perennial.streams.cli.forget.selection import count_of
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.client.publisher import Publisher
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import RetentionProgressed, RetentionRequested, Selector
from perennial.streams.retention.kinds import KINDS

_CONFIRM_S = 30
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
    reason: str,
    wait_s: float,
    as_json: bool,
) -> int:
    """Send a request, print every change of its state, and wait until it is carried out.

    Args:
        kind: The kind of request.
        pattern: An adapter or a pattern.
        selector: Which examples; None: all.
        reason: Recorded with the request.
        wait_s: How long to wait, in seconds; 0: do not wait.
        as_json: Print the id and the last state as JSON on standard output.

    Returns:
        The exit code: 0, or 1 where the request failed or is not carried out in time.
    """
    settings = connected_settings()
    request = RetentionRequested(
        request_id=f"{_ID_PREFIXES.get(kind, kind)}-{uuid.uuid4().hex[:16]}", kind=kind, adapter=pattern,
        selector=selector, requested_by="command line", reason=reason,
    )  # fmt: skip
    with Publisher(settings.kafka.require_bootstrap(), settings=settings) as publisher:
        publisher.publish(request).result(_CONFIRM_S)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"sent request {request.request_id}")
    last: RetentionProgressed | None = None
    wanted = "executed" if KINDS[kind].stays_in_force else "closed"
    if wait_s > 0:
        with StatusReader(settings) as statuses:
            for event in statuses.follow(request.request_id, wait_s):
                if last is None or (event.state, event.detail) != (last.state, last.detail):
                    _print_state(event, console)
                last = event
                if event.state == wanted:
                    break
    if as_json:
        print(json.dumps({"request_id": request.request_id, "status": last and last.model_dump(mode="json")}))
    carried_out = last is not None and last.state == wanted
    console.print(_conclusion(request, last, wait_s, carried_out=carried_out), end="")
    return 0 if wait_s <= 0 or carried_out else 1


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
        if last.examples:
            return f"{count_of(last.examples, 'example')} forgotten\n"
        return "the store had no such example; those on their way through the topics are kept out\n"
    if wait_s <= 0:
        return f"not waiting for the request; {where}\n"
    if last is not None and last.state == "failed":
        return ""
    return f"not {KINDS[request.kind].done} after {wait_s:.0f} s: {_why_open(last)}; {where}\n"


def _why_open(last: RetentionProgressed | None) -> str:
    if last is not None and last.state == "held":
        return "a legal hold is on it, `perennial forget release` ends the hold"
    if last is not None and last.state == "published":
        return "it is forgotten, but a replica that is named above has not confirmed the new version"
    return "`perennial doctor` says whether the roles streams and learner run"
