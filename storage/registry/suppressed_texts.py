"""Suppressed texts: the hash that a text is suppressed by, the key of that hash, and the pages of a long list.

A text is suppressed by HMAC-SHA256 under a random key of its adapter. Without the key nobody can find out whether a
guessed text is on the list; whoever deletes the key makes the list unreadable for good. Before it is hashed, the text
is normalised, because a text that is exported again often comes back in another form of the same characters or with
other line ends: Unicode NFC, every line end as a line feed, white space around the text removed. Anything else (another
case, a doubled blank) makes another text.

The list of an adapter begins in its quarantine object. Once that part is full it moves to pages (see `hash_pages`), one
for each prefix of the hashes; a page that grows too large is replaced by sixteen with one more digit in their prefix.
The quarantine holds the directory of the pages. So a change of the list is a change of that one object, and a reader
loads only the pages that the hashes of its texts fall into.
"""

from __future__ import annotations

import hmac
import re
import secrets
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from typing import Annotated

from pydantic import Field

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.hash_pages import MAX_PAGE_HASHES, load_page, write_page
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.registry.manifest import AdapterName
from perennial.storage.registry.records import MAX_RECORD_BYTES, RegistryRecord, check_adapter, parse_record

TEXT_HASH_CHARS = 32
TextHash = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{TEXT_HASH_CHARS}}}$")]
PageDirectory = Mapping[str, str]
"""Pages of a list by the prefix of their hashes; each value is what the page's key has after the adapter's folder."""

_HEX = "0123456789abcdef"
_KEY_BYTES = 32
_REVISION_DIGITS = 12
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_BYTE_ORDER_MARK = "\ufeff"


class TextKey(RegistryRecord):
    """The key that an adapter's texts are hashed under.

    Attributes:
        adapter: The adapter.
        key: The key, 64 hex digits.
    """

    adapter: AdapterName
    key: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * _KEY_BYTES}}}$")]


def text_key_key(adapter: str) -> str:
    """Return the key of the object that holds an adapter's text key."""
    return f"keys/{check_adapter(adapter)}"


def load_text_key(store: ObjectStore, adapter: str) -> bytes | None:
    """Return the adapter's text key; None where none was created.

    Raises:
        IntegrityError: The object is not the adapter's text key.
    """
    name = text_key_key(adapter)
    try:
        stored = store.get(name, MAX_RECORD_BYTES)
    except NotFoundError:
        return None
    found = parse_record(TextKey, name, stored.data)
    if found.adapter != adapter:
        raise IntegrityError(f"{name} is another adapter's text key", got=found.adapter, allowed=adapter)
    return bytes.fromhex(found.key)


def create_text_key(store: ObjectStore, adapter: str) -> bytes:
    """Create the adapter's text key and return it; whoever creates it first decides it. Call `ensure_text_key` instead."""
    created = TextKey(adapter=adapter, key=secrets.token_hex(_KEY_BYTES))
    store.put_if_absent(text_key_key(adapter), created.to_bytes())
    found = load_text_key(store, adapter)
    if found is None:
        raise NotFoundError(f"the text key of {adapter} was deleted while it was created", remedy="do it again")
    return found


def missing_key_error(adapter: str) -> IntegrityError:
    """Return the error of a list of suppressed texts whose key is not stored."""
    return IntegrityError(
        f"the text key of {adapter} is missing, so erased texts cannot be recognised",
        remedy=f"restore the object keys/{adapter} from a copy: without it, erased texts could be learned again",
    )


def normalised_text(text: str) -> str:
    r"""Return the form of a text in which equal texts are equal.

    >>> normalised_text("\ufeffRene\u0301\r\n")
    'René'
    """
    composed = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text))
    before = None
    while before != composed:  # white space may stand on either side of a byte order mark
        before = composed
        composed = composed.strip().strip(_BYTE_ORDER_MARK)
    return composed


def conversation_text(history: Iterable[tuple[str, str]], prompt: str) -> str:
    """Return the text of an interaction without its answer, for `keyed_text_hash`.

    Args:
        history: Role and text of each turn before the prompt, oldest first.
        prompt: The last turn of the user.

    Returns:
        The prompt itself where nothing precedes it; else every turn in its normalised form, with its role.
    """
    turns = [f"{role}\0{normalised_text(text)}\0" for role, text in history]
    return "".join((*turns, normalised_text(prompt))) if turns else prompt


def keyed_text_hash(key: bytes, text: str, answer: str | None = None) -> str:
    """Return the hash that a text is suppressed by.

    Args:
        key: The adapter's text key.
        text: The text of a document, or of an interaction as `conversation_text` returns it.
        answer: The answer of an interaction; None for a document.
    """
    material = normalised_text(text) if answer is None else f"{normalised_text(text)}\0{normalised_text(answer)}"
    return hmac.new(key, material.encode("utf-8", "surrogatepass"), sha256).hexdigest()[:TEXT_HASH_CHARS]


def unkeyed_text_hash(text: str, answer: str | None = None) -> str:
    """Return the hash of older releases: SHA-256 of the text as it is, without a key."""
    material = text if answer is None else f"{text}\0{answer}"
    return sha256(material.encode("utf-8", "surrogatepass")).hexdigest()[:TEXT_HASH_CHARS]


# ---- pages


def page_of(pages: PageDirectory, text_hash: str) -> str | None:
    """Return the name of the page that holds the hash if any does; None where there is no such page."""
    for length in range(TEXT_HASH_CHARS + 1):
        name = pages.get(text_hash[:length])
        if name is not None:
            return name
    return None


def load_suppressed_page(store: ObjectStore, adapter: str, name: str) -> frozenset[str]:
    """Return the hashes of a page.

    Raises:
        NotFoundError: The page was replaced: load the quarantine again.
    """
    return load_page(store, _folder(adapter) + name)


def add_to_pages(
    store: ObjectStore, adapter: str, revision: int, pages: PageDirectory, hashes: Iterable[str]
) -> dict[str, str]:
    """Write the pages that hold these hashes too; return the directory that names them. Pages in use stay as they are.

    Args:
        store: The store.
        adapter: The adapter.
        revision: The revision of the quarantine that will name the pages.
        pages: The directory as it is.
        hashes: Hashes to add.
    """
    added: dict[str, set[str]] = defaultdict(set)
    for text_hash in hashes:
        added[_prefix_of(pages, text_hash)].add(text_hash)
    changed = dict(pages)
    for prefix, group in added.items():
        name = changed.pop(prefix, None)
        merged = group | (load_suppressed_page(store, adapter, name) if name else frozenset())
        changed |= _write(store, adapter, revision, prefix, merged)
    return changed


def remove_from_pages(
    store: ObjectStore, adapter: str, revision: int, pages: PageDirectory, hashes: Collection[str]
) -> dict[str, str]:
    """Write the pages that lack these hashes; return the directory that names them. See `add_to_pages`."""
    changed = dict(pages)
    for prefix, name in pages.items():
        if any(text_hash.startswith(prefix) for text_hash in hashes):
            found = load_suppressed_page(store, adapter, name)
            if not found.isdisjoint(hashes):
                del changed[prefix]
                changed |= _write(store, adapter, revision, prefix, found.difference(hashes))
    return changed


def delete_replaced_pages(store: ObjectStore, adapter: str, revision: int, pages: PageDirectory) -> None:
    """Delete the pages that the quarantine does not name, those of interrupted writers included.

    A page that is written for a later revision than the one given may be about to be named, so it stays. A writer of an
    earlier one cannot succeed any more: its compare-and-swap fails.

    Args:
        store: The store.
        adapter: The adapter.
        revision: The revision of the quarantine that the directory belongs to.
        pages: The directory.
    """
    folder, used = _folder(adapter), set(pages.values())
    for key in store.list(folder):
        name = key[len(folder) :]
        written_for, dash, _ = name.partition("-")
        if "/" in name or not dash or name in used:
            continue
        if written_for.isdigit() and int(written_for) <= revision:
            store.delete(key)


def _folder(adapter: str) -> str:
    return f"suppressed/{check_adapter(adapter)}/"


def _prefix_of(pages: PageDirectory, text_hash: str) -> str:
    """Return the prefix of the page that the hash belongs to: that of the page there, or the shortest one free."""
    for length in range(TEXT_HASH_CHARS + 1):
        prefix = text_hash[:length]
        if prefix in pages or not any(other.startswith(prefix) for other in pages):
            return prefix
    return text_hash


def _write(store: ObjectStore, adapter: str, revision: int, prefix: str, hashes: Collection[str]) -> dict[str, str]:
    if not hashes:
        return {}
    if len(hashes) <= MAX_PAGE_HASHES:
        folder = _folder(adapter)
        key = write_page(store, f"{folder}{revision:0{_REVISION_DIGITS}d}-", hashes)
        return {prefix: key[len(folder) :]}
    written: dict[str, str] = {}
    for digit in _HEX:
        group = [text_hash for text_hash in hashes if text_hash.startswith(prefix + digit)]
        written |= _write(store, adapter, revision, prefix + digit, group)
    return written
