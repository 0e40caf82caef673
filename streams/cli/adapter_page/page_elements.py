"""Build HTML and SVG as trees, so that no text from outside can become markup.

`xml.etree` escapes every text and attribute when it writes. Control characters, which HTML does not allow, are shown by
`printable` instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

from perennial.streams.cli.terminal.printable import printable

Child: TypeAlias = "Element | str | None"


def element(tag: str, *children: Child | Iterable[Child], **attributes: object) -> Element:
    """Return an element.

    Args:
        tag: Its name.
        children: Elements and texts in order, or iterables of them; None is left out.
        attributes: By name; `class_` stands for `class`, and `_` within a name for `-`. None is left out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), printable(str(value)))
    for child in children:
        if child is None or isinstance(child, str | Element):
            _append(made, child)
        else:
            for one in child:
                _append(made, one)
    return made


def _append(parent: Element, child: Child) -> None:
    if isinstance(child, Element):
        parent.append(child)
    elif child:
        text = printable(child)
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + text
        else:
            parent.text = (parent.text or "") + text


def html_bytes(root: Element) -> bytes:
    """Return an HTML document in UTF-8."""
    text: str = tostring(root, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n".encode()
