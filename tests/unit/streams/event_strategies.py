"""Hypothesis strategies for every event, derived from the annotations of the models, so that no field is missing."""

from __future__ import annotations

import types
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel
from pydantic.fields import FieldInfo

from perennial.streams.events import fields
from perennial.streams.events.fields import ADAPTER_PATTERN, ADAPTERS_PATTERN, ALIAS_PATTERN, VISIBLE_PATTERN, Event
from perennial.streams.events.input_events import InteractionObserved, check_history
from perennial.streams.events.models import EVENTS, Selector

# Seeded, and without time limits: a busy machine must not fail a property.
settings.register_profile(
    "perennial", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("perennial")

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VISIBLE_CHARACTERS = st.characters(
    exclude_categories=["Cs", "Cc", "Zl", "Zp"],
    exclude_characters="\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
)
_VISIBLE = st.text(VISIBLE_CHARACTERS, min_size=1, max_size=40)
_ADAPTER = st.from_regex(ADAPTER_PATTERN, fullmatch=True).filter(lambda name: len(name) <= 200 and name.isascii())
_TIME = st.integers(0, 250_000_000_000_000_000).map(
    lambda n: datetime(1971, 1, 1, tzinfo=UTC) + timedelta(microseconds=n)
)
_PATTERNS: dict[str, st.SearchStrategy[str]] = {
    ADAPTER_PATTERN: _ADAPTER,
    ADAPTERS_PATTERN: _ADAPTER | st.just("*") | _ADAPTER.map("{}/*".format),
    ALIAS_PATTERN: st.from_regex(ALIAS_PATTERN, fullmatch=True).filter(lambda name: len(name) <= 64 and name.isascii()),
    VISIBLE_PATTERN: _VISIBLE,
    r"^sha256:[0-9a-f]{64}$": st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}"),
    fields.CLUSTER_ID_PATTERN: st.from_regex(r"[!-~]{1,128}", fullmatch=True),
    fields.SIGNATURE_PATTERN: st.from_regex(r"sha256:[0-9a-f]{64}:[A-Za-z0-9+/]{86}==", fullmatch=True),
    fields.TOPIC_NAME_PATTERN: st.from_regex(r"[A-Za-z0-9._-]{1,249}", fullmatch=True),
    fields.TOPIC_ID_PATTERN: st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    r"^[0-9a-f]{32}$": st.binary(min_size=16, max_size=16).map(bytes.hex),
}
_RETENTION = st.sampled_from([fields.PERMANENT, "P30D", "PT12H", "P1Y2M"])


def event_of(model: type[Event]) -> st.SearchStrategy[Event]:
    """Return a strategy for valid events of a type."""
    return _model(model)


def _model(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    if model is Selector:
        return st.builds(
            Selector, subjects=st.lists(_TEXT.filter(bool), min_size=1, max_size=3), before=st.none() | _TIME
        )
    if model is InteractionObserved:
        return _interaction()
    required, optional = {}, {}
    for name, field in model.model_fields.items():
        kind = required if field.is_required() else optional
        visible = name in getattr(model, "visible", ())
        strategy = _VISIBLE if visible and field.is_required() else st.none() | _VISIBLE if visible else _field(field)
        kind[field.alias or name] = strategy
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: model(**values))


def _interaction() -> st.SearchStrategy[Any]:
    """Either prompt and response, or a conversation whose roles are in order."""
    fields = InteractionObserved.model_fields
    text = _TEXT.filter(bool)
    pair = st.fixed_dictionaries({"prompt": text, "response": text})
    conversation = st.fixed_dictionaries({"messages": _turns(1)})
    rest = [name for name in fields if name not in {"prompt", "response", "messages"}]
    required = {name: _field(fields[name]) for name in rest if fields[name].is_required()}
    optional = {name: _field(fields[name]) for name in rest if not fields[name].is_required()}
    return st.builds(
        lambda given, form: InteractionObserved(**given, **form),
        st.fixed_dictionaries(required, optional=optional), pair | conversation,
    )  # fmt: skip


def _turns(least_pairs: int) -> st.SearchStrategy[list[dict[str, str]]]:
    text = _TEXT.filter(bool)
    pair = st.tuples(text, text).map(lambda t: [turn("user", t[0]), turn("assistant", t[1])])
    pairs = st.lists(pair, min_size=least_pairs, max_size=3).map(
        lambda groups: [one for group in groups for one in group]
    )
    return st.builds(
        lambda system, turns: [*system, *turns], st.lists(text.map(partial(turn, "system")), max_size=1), pairs
    )


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _field(field: FieldInfo) -> st.SearchStrategy[Any]:
    return _of(field.annotation, list(field.metadata))


def _of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if any(getattr(item, "func", None) is check_history for item in metadata):
        return _turns(0).filter(bool)
    if any(getattr(item, "func", None) is fields._check_retention for item in metadata):
        return _RETENTION
    if annotation is AwareDatetime:
        return _TIME
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _of(arguments[0], inner)
    if origin in {Union, types.UnionType}:
        return st.one_of(*(_of(each, []) for each in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(_of(arguments[0], []), max_size=3)
    if origin is dict:
        return st.dictionaries(_of(arguments[0], []), _of(arguments[1], []), max_size=3)
    return _scalar(annotation, metadata)


def _scalar(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    limits = {name: getattr(item, name) for item in metadata for name in ("ge", "le", "min_length", "max_length", "pattern")
              if getattr(item, name, None) is not None}  # fmt: skip
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(limits.get("ge", -(2**62)), min(limits.get("le", 2**62), 2**62))
    if annotation is float:
        return st.floats(limits.get("ge"), limits.get("le"), allow_nan=False, allow_infinity=False)
    if annotation is str:
        if "pattern" in limits:
            return _PATTERNS[limits["pattern"]]
        return _TEXT.filter(lambda text: len(text) >= limits.get("min_length", 0))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _model(annotation)
    raise TypeError(f"no strategy for {annotation!r} {metadata!r}")


any_event: st.SearchStrategy[Event] = st.one_of(*(event_of(model) for model in EVENTS.values()))
