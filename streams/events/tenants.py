"""Topics of single tenants: their names, what a record on them may address, and the ids of requests from them. Pure.

A tenant `acme` has the topics `documents.acme`, `interactions.acme` and `retention.acme`. The broker's ACLs say who may write
to them, and a record on them may address adapters below `acme/` only. The topics without a tenant's name are for
installations with one tenant, and for operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from perennial.streams.events.fields import MAX_ID_CHARS
from perennial.streams.events.models import RetentionRequested
from perennial.streams.events.wire_error import WireError

TENANT_TOPICS: Final = ("documents", "interactions", "retention")
"""The topics that each tenant has for itself."""
_SEPARATOR: Final = ":"


def tenant_topic(topic: str, tenant: str) -> str:
    """Return the name of a tenant's topic.

    >>> tenant_topic("documents", "acme")
    'documents.acme'
    """
    return f"{topic}.{tenant}"


def split_topic(name: str) -> tuple[str, str | None]:
    """Return a topic's name without its tenant, and the tenant; None for a topic of no tenant.

    Args:
        name: The topic without the prefix.

    >>> split_topic("documents.acme.eu"), split_topic("documents"), split_topic("adapter-jobs")
    (('documents', 'acme.eu'), ('documents', None), ('adapter-jobs', None))
    """
    base, _, tenant = name.partition(".")
    return (base, tenant) if tenant and base in TENANT_TOPICS else (name, None)


def base_topic(name: str) -> str:
    """Return a topic's name without its tenant; see `split_topic`."""
    return split_topic(name)[0]


def with_tenants(names: Iterable[str], tenants: Iterable[str]) -> tuple[str, ...]:
    """Return the topics, and those of each tenant for the ones among them that tenants have for themselves.

    >>> with_tenants(["documents", "examples"], ["acme"])
    ('documents', 'documents.acme', 'examples')
    """
    each = tuple(tenants)
    return tuple(
        full
        for name in names
        for full in (name, *(tenant_topic(name, tenant) for tenant in each if name in TENANT_TOPICS))
    )


def require_own_adapter(adapter: str, tenant: str) -> None:
    """Check that a record on a tenant's topic addresses an adapter, or a pattern, of this tenant.

    Raises:
        WireError: It does not; the reason is `other-tenant`.
    """
    if not adapter.startswith(f"{tenant}/"):
        raise WireError("other-tenant", "adapter", got=adapter, allowed=f"adapters below {tenant}/")


def id_in_tenant(request_id: str, tenant: str | None) -> str:
    """Return the id by which retain knows a request: two tenants may use the same id.

    >>> id_in_tenant("r1", "acme"), id_in_tenant("r1", None)
    ('acme:r1', 'r1')
    """
    return request_id if tenant is None else f"{tenant}{_SEPARATOR}{request_id}"


def tenant_of_id(request_id: str, tenants: Iterable[str]) -> str | None:
    """Return the tenant on whose topic the request with this id came; None where it came on none."""
    tenant, found, _ = request_id.partition(_SEPARATOR)
    return tenant if found and tenant in tenants else None


def request_in_tenant(
    request: RetentionRequested, tenant: str | None, tenants: Iterable[str]
) -> RetentionRequested:  # fmt: skip
    """Return a request under the id by which retain knows it.

    Args:
        request: The request as it came from the topic.
        tenant: The tenant whose topic it came on; None: it came on `retention`.
        tenants: All tenants that have topics.

    Raises:
        WireError: It addresses an adapter of another tenant, or has an id that belongs to a tenant.
    """
    if tenant is None:
        owner = tenant_of_id(request.request_id, tenants)
        if owner is not None:
            raise WireError(
                "bad-field", "request_id", got=request.request_id,
                allowed=f"an id that does not begin with {owner}{_SEPARATOR}, as those of this tenant do",
            )  # fmt: skip
        return request
    require_own_adapter(request.adapter, tenant)
    request_id = id_in_tenant(request.request_id, tenant)
    if len(request_id) > MAX_ID_CHARS:
        raise WireError(
            "bad-field", "request_id", got=request.request_id,
            allowed=f"at most {MAX_ID_CHARS - len(tenant) - 1} characters",
        )  # fmt: skip
    return request.model_copy(update={"request_id": request_id})


def may_end(request_id: str, other_id: str, tenants: Iterable[str]) -> bool:
    """Return whether a release or a policy may end an earlier hold or policy over the same adapters and examples.

    A tenant's request ends its own ones only, and not an operator's.

    >>> may_end("acme:r2", "acme:r1", ["acme"]), may_end("acme:r2", "r1", ["acme"]), may_end("r2", "acme:r1", ["acme"])
    (True, False, True)
    """
    tenant = tenant_of_id(request_id, tenants)
    return tenant is None or tenant == tenant_of_id(other_id, tenants)
