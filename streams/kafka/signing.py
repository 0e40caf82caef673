"""Sign the records that the roles write for each other, and refuse those that somebody else wrote.

Whoever may write to `examples`, `scored-examples` or `adapter-jobs` can make an adapter learn anything. The broker's
ACLs keep others out; a signature also holds where an ACL is missing. It is off while PERENNIAL_INTERNAL_KEY is empty.

The signature is HMAC-SHA256 (RFC 2104) over the topic, the event's type, the record's key and its value, each with its
length before it, in the header `ce_perennialmac`. The other headers decide nothing. It does not tell a record from its
copy: a record that is written a second time is recognised by its origin or its cut number.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from perennial.streams.events.cloudevents import Headers
from perennial.streams.events.wire_error import WireError
from perennial.streams.settings import Settings

MAC_HEADER: Final = "ce_perennialmac"
SIGNED_TOPICS: Final = frozenset({"examples", "scored-examples", "adapter-jobs"})
"""Written by roles, and by the command line; read by roles."""
_TYPE_HEADER: Final = "ce_type"


class RecordSigner:
    """Signs and verifies records of SIGNED_TOPICS. Thread-safe.

    Args:
        settings: the keys, and the topic prefix.
    """

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.kafka.topic_prefix
        self._keys = settings.security.keys()

    @property
    def enabled(self) -> bool:
        """True where a key is set."""
        return bool(self._keys)

    def sign(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> list[tuple[str, bytes]]:
        """Return the headers of a record, with its signature where the topic has signatures and a key is set.

        Args:
            topic: the topic's name without the prefix.
            key: the record's key.
            value: the record's value.
            headers: the record's other headers.
        """
        if not self._keys or topic not in SIGNED_TOPICS:
            return list(headers)
        event_type = next((raw for name, raw in headers if name == _TYPE_HEADER), None)
        mac = self._mac(self._keys[0], topic, event_type, key, value)
        return [*headers, (MAC_HEADER, mac.encode())]

    def verify(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers | None) -> None:
        """Check a record's signature.

        Args:
            topic: the topic's name without the prefix.
            key: the record's key.
            value: the record's value.
            headers: the record's headers.

        Raises:
            WireError: a key is set, and the record has no valid signature; its reason is `bad-signature`.
        """
        if not self._keys or topic not in SIGNED_TOPICS:
            return
        found = [raw or b"" for name, raw in headers or () if name == MAC_HEADER]
        types = [raw for name, raw in headers or () if name == _TYPE_HEADER]
        if len(found) != 1:
            raise WireError(
                "bad-signature", "the record is not signed", got=f"{len(found)} headers {MAC_HEADER}", allowed="one"
            )
        event_type = types[0] if types else None
        # Every key is tried, so that the time says nothing of which one fits.
        valid = [hmac.compare_digest(self._mac(each, topic, event_type, key, value).encode(), found[0])
                 for each in self._keys]  # fmt: skip
        if len(types) > 1 or not any(valid):
            raise WireError(
                "bad-signature", "the record's signature does not fit it", got="another signature",
                allowed="one by the installation's PERENNIAL_INTERNAL_KEY",
            )  # fmt: skip

    def _mac(self, secret: bytes, topic: str, event_type: bytes | None, key: bytes | None, value: bytes | None) -> str:
        mac = hmac.new(secret, b"perennial record 1", "sha256")
        for part in (f"{self._prefix}{topic}".encode(), event_type, key, value):
            mac.update(b"-" if part is None else len(part).to_bytes(8, "big"))
            mac.update(part or b"")
        return mac.hexdigest()
