"""Holds and policies in force, by the adapters that they cover. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from perennial.storage.registry.quarantine import LegalHold
from perennial.streams.events.fields import duration_s
from perennial.streams.events.models import ExampleAccepted, RetentionRequested, Selector
from perennial.streams.retain.ledger import LifetimeLimit, RequestRecord, epoch_ms, patterns_over, selector_json

Matcher = Callable[[ExampleAccepted], bool]


class InForce:
    """The holds and policies in force; looking up those of one adapter costs only as much as there are of them.

    Args:
        records: Requests; those that are not in force are left out.
    """

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        self._by_pattern: dict[tuple[str, str], list[RequestRecord]] = {}
        for record in records:
            if record.in_force:
                self._by_pattern.setdefault((record.request.kind, record.request.adapter), []).append(record)

    def all(self, kind: Literal["hold", "policy"]) -> list[RequestRecord]:
        """Return the holds, or the policies, in force."""
        return [record for (name, _), found in self._by_pattern.items() if name == kind for record in found]

    def everything(self) -> list[RequestRecord]:
        """Return all holds and policies in force."""
        return [*self.all("hold"), *self.all("policy")]

    def like(self, kind: Literal["hold", "policy"], request: RetentionRequested) -> list[str]:
        """Return the ids of the holds or policies with the request's adapter and selector, in whatever order the selector lists."""
        found = self._by_pattern.get((kind, request.adapter), ())
        wanted = _unordered(request.selector)
        return [each.request.request_id for each in found if _unordered(each.request.selector) == wanted]

    def holds_on(self, adapter: str) -> list[LegalHold]:
        """Return the holds on an adapter, in the form and order in which its quarantine lists them."""
        holds = [
            LegalHold(
                request_id=record.request.request_id,
                selector=selector_json(record.request.selector),
                until_ms=epoch_ms(record.request.due_at),
            )
            for record in self._covering("hold", adapter)
        ]
        return sorted(holds, key=lambda hold: hold.request_id)

    def hold_matchers(self, adapter: str) -> list[Matcher]:
        """Return one function for each hold on the adapter; it says whether the hold is on an example."""
        return [_matcher(record.request.selector) for record in self._covering("hold", adapter)]

    def policies_on(self, adapter: str) -> list[LifetimeLimit]:
        """Return the policies in force for an adapter."""
        return [
            LifetimeLimit(record.request.selector, duration_s(record.request.time_to_live))
            for record in self._covering("policy", adapter)
            if record.request.selector and record.request.time_to_live
        ]

    def ids_on(self, adapter: str) -> tuple[str, ...]:
        """Return the request ids of the holds and policies in force for an adapter, sorted."""
        found = (*self._covering("hold", adapter), *self._covering("policy", adapter))
        return tuple(sorted(record.request.request_id for record in found))

    def _covering(self, kind: Literal["hold", "policy"], adapter: str) -> Iterator[RequestRecord]:
        for pattern in patterns_over(adapter):
            yield from self._by_pattern.get((kind, pattern), ())


def _matcher(selector: Selector | None) -> Matcher:
    return (lambda _: True) if selector is None else selector.matches


def _unordered(selector: Selector | None) -> dict[str, object] | None:
    if selector is None:
        return None
    fields = selector.model_dump(exclude_none=True)
    return {name: frozenset(value) if isinstance(value, list) else value for name, value in fields.items()}
