"""Collect the events of a running demo and print one line for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.registry import AliasState
from perennial.streams.cli.demo.latency import stage_seconds
from perennial.streams.cli.tables import short_version
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterRevoked, AdapterUpdate
from perennial.streams.events.fields import Event
from perennial.streams.events.models import DriftDetected, RetentionProgressed

TOPICS = ("drift", "adapter-updates", "retention-status")
"""Topics whose events the watcher takes."""


@dataclass
class RequestStatuses:
    """States of retention requests from the topic retention-status, in order and without repetitions."""

    events: list[RetentionProgressed] = field(default_factory=list)

    def add(self, event: RetentionProgressed) -> bool:
        """Take one event. Return whether it is new compared with the last one of the same request."""
        for earlier in reversed(self.events):
            if earlier.request_id == event.request_id:
                if (earlier.state, earlier.detail) == (event.state, event.detail):
                    return False
                break
        self.events.append(event)
        return True

    def last(self, adapter: str, kind: str) -> RetentionProgressed | None:
        """Return the latest event of the adapter's request of that kind, None before there is one."""
        return next((e for e in reversed(self.events) if (e.adapter, e.kind) == (adapter, kind)), None)


@dataclass
class Watcher:
    """Collects what the roles publish while the demo runs.

    Attributes:
        print_line: Called with one line of text (rich markup) per event.
        drifts: Drift events.
        updates: Promoted versions.
        served: When the demo's subscribers began to serve a version, by adapter and generation.
        statuses: States of retention requests.
        first_promoted_s: Seconds from the start of the demo to the first promoted version.
        started: Start of the demo by the monotonic clock.
    """

    print_line: Callable[[str], None]
    drifts: list[DriftDetected] = field(default_factory=list)
    updates: list[AdapterUpdate] = field(default_factory=list)
    served: dict[tuple[str, int], datetime] = field(default_factory=dict)
    statuses: RequestStatuses = field(default_factory=RequestStatuses)
    first_promoted_s: float | None = None
    started: float = field(default_factory=time.monotonic)

    def on_event(self, event: Event) -> None:
        """Take an event of one of `TOPICS`."""
        if isinstance(event, DriftDetected):
            self.drifts.append(event)
            self.print_line(
                f"[magenta]drift[/]     {event.adapter}: the {event.signal.replace('_', ' ')} of new examples changed "
                f"({event.before:.3f} → {event.after:.3f}, detector {event.detector}, after {event.examples_seen} examples)"
            )
        elif isinstance(event, AdapterPromoted):
            if self.first_promoted_s is None:
                self.first_promoted_s = time.monotonic() - self.started
            self.updates.append(event)
            gate = GateFigures.model_validate(event.gate)
            before, after = gate.held_out_before, gate.held_out_after
            loss = f", held-out loss {before:.3f} → {after:.3f}" if before is not None and after is not None else ""
            self.print_line(
                f"[green]promoted[/]  {event.adapter} generation {event.generation} ({short_version(event.version)}): "
                f"learned {event.learned.examples} examples{loss}"
            )
        elif isinstance(event, AdapterRevoked):
            self.print_line(
                f"[red]revoked[/]   {event.adapter}: versions that contain a forgotten document; "
                f"generation {event.generation} ({short_version(event.version)}) replaces them"
            )
        elif isinstance(event, RetentionProgressed) and self.statuses.add(event):
            detail = f" ({event.detail})" if event.detail else ""
            self.print_line(
                f"[yellow]forget[/]    {event.adapter}: the request to {event.kind} is {event.state}{detail}"
            )

    def on_served(self, state: AliasState, stage_s: Mapping[str, float]) -> None:
        """Take the news that a subscriber of the demo serves a version.

        Args:
            state: The alias that the subscriber follows.
            stage_s: Seconds per step of the swap.
        """
        self.served[state.adapter, state.generation] = datetime.now(UTC)
        self.print_line(
            f"[cyan]served[/]    {state.adapter} generation {state.generation}, "
            f"{stage_s.get('publish_to_served', 0):.2f} s after it was published"
        )

    def latencies(self) -> list[dict[str, float]]:
        """Return the seconds per stage of each update that a subscriber served."""
        return [
            stage_seconds({**update.stage_at, "served": self.served[update.adapter, update.generation]})
            for update in self.updates
            if (update.adapter, update.generation) in self.served
        ]
