"""Read the model names of requests to vLLM: `acme/support`, `acme/support#canary`, `acme/support@<version>`.

`acme/support/user-42@<version>+<version>` also says with which version of the shared adapter a personal one is served.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SEGMENT = r"[a-z0-9][a-z0-9._-]*"
_NAME = re.compile(
    rf"(?P<adapter>{_SEGMENT}(?:/{_SEGMENT}){{0,3}})(?:#(?P<alias>{_SEGMENT}))?"
    r"(?:@(?:sha256:)?(?P<hex>[0-9a-f]{64})(?:\+(?P<shared>[0-9a-f]{64}))?)?"
)
_MAX_ADAPTER_CHARS, _MAX_ALIAS_CHARS = 200, 64
_MAX_NAME_CHARS = _MAX_ADAPTER_CHARS + _MAX_ALIAS_CHARS + 150


@dataclass(frozen=True)
class RequestedName:
    """The model name of a request, in its parts.

    Attributes:
        adapter: Name of the adapter.
        alias: The alias that the name follows, or None if the name has none.
        version: Digest of the manifest of the one version that the name stands for, or None if it follows an alias.
        shared_version: The same of the shared adapter that this version extends, or None if the name has none.
    """

    adapter: str
    alias: str | None
    version: str | None
    shared_version: str | None = None


def parse_requested_name(name: str) -> RequestedName | None:
    """Return the parts of a request's model name. None if it cannot name an adapter.

    The grammar is that of the registry, so no name that is accepted can leave a folder or a prefix of keys.
    """
    match = _NAME.fullmatch(name) if len(name) <= _MAX_NAME_CHARS else None
    if match is None:
        return None
    adapter, alias, version, shared = match["adapter"], match["alias"], match["hex"], match["shared"]
    if len(adapter) > _MAX_ADAPTER_CHARS or len(alias or "") > _MAX_ALIAS_CHARS:
        return None
    return RequestedName(
        adapter, alias, f"sha256:{version}" if version else None, f"sha256:{shared}" if shared else None
    )
