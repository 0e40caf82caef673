"""`perennial publish`: any input is read once, in one encoding, and what cannot be read is no traceback. No broker."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from typing import Any, ClassVar, Self

import pytest

from perennial.storage.errors import NotFoundError
from perennial.streams.cli import publish
from perennial.streams.cli.publish import NoInputError, publish_file
from perennial.streams.settings import SettingsError


class Publisher:
    """Confirms everything at once."""

    published: ClassVar[list[Any]] = []

    def __init__(self, *_: object, **__: object) -> None:
        Publisher.published = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def publish(self, event):
        self.published.append(event)
        return self

    def result(self, _timeout_s: float) -> None: ...

    def flush(self, _timeout_s: float) -> None: ...


@pytest.fixture(autouse=True)
def broker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    monkeypatch.setattr(publish, "Publisher", Publisher)


def lines(count: int, adapter: str | None = "acme/support") -> bytes:
    records = [{"adapter": adapter, "document_id": str(number), "text": "héllo"} for number in range(count)]
    return b"".join(
        json.dumps({name: value for name, value in record.items() if value}).encode() + b"\n" for record in records
    )


def publish_documents(file: object, adapter: str | None = None) -> int:
    return publish_file("documents", str(file), adapter=adapter, as_json=False)


def test_case_05_a_named_pipe_is_read_once(tmp_path):
    """A pipe was opened twice: the first reader ate it, nothing was published, and the command said success."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(lines(3),))
    writer.start()
    assert publish_documents(fifo) == 0
    writer.join(60)
    assert len(Publisher.published) == 3


def test_case_05_a_file_descriptor_is_read_once(tmp_path):
    """`perennial publish documents <(cat file)`."""
    read_end, write_end = os.pipe()
    os.write(write_end, lines(3))
    os.close(write_end)
    assert publish_documents(f"/dev/fd/{read_end}") == 0
    os.close(read_end)
    assert len(Publisher.published) == 3


@pytest.mark.parametrize("file", ["-", "empty"])
@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_case_05_an_input_without_a_line_is_no_success(monkeypatch, tmp_path, capsys, file, content):
    (tmp_path / "empty").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(NoInputError, match="no line, so nothing was published") as caught:
        publish_documents(file)
    assert caught.value.exit_code == 1
    with pytest.raises(NoInputError):
        publish_file("documents", file, adapter=None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"delivered": 0, "refused": []}


def test_case_05_a_closed_standard_input_is_an_empty_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(NoInputError):
        publish_documents("-")


def test_case_06_a_folder_is_no_traceback(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        publish_documents(tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(NotFoundError):
        publish_documents(tmp_path / "none")
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(SettingsError, match="cannot be read"):
        publish_documents(f"/dev/fd/{folder}")
    os.close(folder)


def test_case_06_an_input_that_fails_while_it_is_read_is_no_traceback(monkeypatch):
    class Broken(io.BytesIO):
        def readline(self, *_):
            raise OSError(5, "Input/output error")

    class Stdin:
        buffer = Broken()

    monkeypatch.setattr(sys, "stdin", Stdin)
    with pytest.raises(SettingsError, match="Input/output error"):
        publish_documents("-")


@pytest.mark.parametrize("adapter", [None, "acme/support"])
def test_case_07_a_byte_order_mark_of_utf8_is_dropped(tmp_path, adapter):
    """Notepad, PowerShell and Excel write one; it was refused without --adapter and accepted with it."""
    bom = b"\xef\xbb\xbf"
    (tmp_path / "f").write_bytes(bom + lines(2) + bom + lines(1))  # files joined by cat
    assert publish_documents("f", adapter) == 0
    assert [event.text for event in Publisher.published] == ["héllo"] * 3


@pytest.mark.parametrize("adapter", [None, "acme/support"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_case_07_another_encoding_is_refused_by_name(tmp_path, adapter, encoding):
    (tmp_path / "f").write_bytes(lines(2).decode().encode(encoding))
    with pytest.raises(SettingsError, match=f"not UTF-8; got: f: {encoding.upper()}.*iconv -f UTF-"):
        publish_documents("f", adapter)
    assert Publisher.published == []


@pytest.mark.parametrize(
    "line", [b'{"document_id":"1","text":"a","text":"b"}', b'{"document_id":"1","text":"\\ud800"}', b"\xff", b"[1]"]
)
def test_case_07_a_line_is_the_same_with_and_without_an_adapter_option(tmp_path, capsys, line):
    with_adapter = line.replace(b"{", b'{"adapter":"acme/support",')
    outcomes = []
    for content, adapter in ((with_adapter, None), (line, "acme/support")):
        (tmp_path / "f").write_bytes(content)
        code = publish_documents("f", adapter)
        refused = [text.split(";")[0] for text in capsys.readouterr().err.splitlines()[1:]]
        outcomes.append((code, [event.text for event in Publisher.published], refused))
    assert outcomes[0] == outcomes[1]


def test_case_18_a_tilde_in_the_name_of_the_file_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "f.jsonl").write_bytes(lines(1))
    assert publish_documents("~/f.jsonl") == 0


def test_a_line_without_an_end_takes_bounded_memory(tmp_path, capsys):
    (tmp_path / "f").write_bytes(b"x" * 5_000_000 + b"\n" + lines(1))
    assert publish_documents("f") == 1
    assert "line 1: size of the value in bytes" in capsys.readouterr().err
    assert len(Publisher.published) == 1
