"""Every `perennial …` that sources and documents name is a command that the real command line can parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from perennial.streams.cli.app import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("streams", "learner", "storage", "tools", "deploy", "docs", "examples")
FILES = ("README.md", "docker-compose.yml", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "Makefile")
SUFFIXES = {".py", ".md", ".yml", ".yaml", ".json", ".sh", ".toml"}

_QUOTED = re.compile(r"`(?:[A-Z][A-Z0-9_]*=\S+ +)*perennial(?: ([^`]*))?`")
_IN_BLOCK = re.compile(r"^(?:\$ )?(?:[A-Z][A-Z0-9_]*=\S+ +)*perennial ([^`|&#>\n]+)", re.MULTILINE)
_IN_REMEDY = re.compile(r"(?:for example: |\brun )perennial ([a-z][^`\"'()\n]*)")
_SUBCOMMAND = re.compile(r"(?:perennial |`)((?:adapters|dlq|topics|publish) [a-z][a-z-]*)")
_PLACEHOLDER = re.compile(r"\{+[^{}]*\}+|<[^<>]*>|\[[^\[\]]*\]")


def named_in(text: str, *, markdown: bool) -> Iterator[str]:
    """Yield the arguments of every command that a text names: in backticks, in a code block, in a remedy, or by its group."""
    # A string that goes over two source lines is one text.
    joined = re.sub(r"\"\s*\n\s*f?\"", "", text)
    yield from (found or "" for found in _QUOTED.findall(joined))
    yield from _IN_REMEDY.findall(joined)
    yield from _SUBCOMMAND.findall(joined)
    if markdown:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield from _IN_BLOCK.findall(block.replace("\\\n", " "))


def check(arguments: str) -> None:
    """Raise where the command line does not know the command, or cannot parse its options and arguments."""
    words = ["X" if word in {"…", "..."} else word for word in shlex.split(_PLACEHOLDER.sub("X", arguments))]
    command: Any = get_command(app)
    context = command.context_class(command, info_name="perennial")
    while words and getattr(command, "commands", None) and words[0] in command.commands:
        command = command.commands[words.pop(0)]
        context = command.context_class(command, info_name="perennial", parent=context)
    if getattr(command, "commands", None) and words and not words[0].startswith("-"):
        word = words.pop(0)
        if not word.isupper():  # COMMAND is a placeholder
            raise ValueError(f"no such command: {word}")
    _, left, _ = command.make_parser(context).parse_args(words)
    if left:
        raise ValueError(f"more arguments than the command takes: {left}")


def commands_named() -> list[tuple[str, str]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    paths += [ROOT / name for name in FILES if (ROOT / name).is_file()]
    found = set()
    for path in paths:
        text = path.read_text("utf-8")
        if "perennial" in text:
            found |= {(str(path.relative_to(ROOT)), each) for each in named_in(text, markdown=path.suffix == ".md")}
    return sorted(found)


@pytest.mark.parametrize(("path", "arguments"), commands_named())
def test_a_named_command_exists(path: str, arguments: str) -> None:
    check(arguments)


def test_enough_commands_are_found() -> None:
    named = commands_named()
    assert len(named) > 40
    assert {"README.md", "docs/operations.md", "streams/cli/flow.py"} <= {path for path, _ in named}


@pytest.mark.parametrize(
    "arguments",
    ["", "--help", "adapters history ADAPTER", "worker scorer learner", "forget status {request.request_id}",
     "forget --adapter acme/support --document ID", "dlq replay --dry-run", "COMMAND --help", "up --store minio"],
)  # fmt: skip
def test_real_commands_pass(arguments: str) -> None:
    check(arguments)


@pytest.mark.parametrize(
    "arguments",
    ["rollback", "adapters resume", "forget suppress", "status --verbose", "adapters ls acme/support", "dlq lsx",
     "forget --adapters acme/support"],
)  # fmt: skip
def test_commands_that_do_not_exist_fail(arguments: str) -> None:
    with pytest.raises(Exception, match=r"no such command|No such option|more arguments"):
        check(arguments)


def test_commands_are_found_in_backticks_code_blocks_and_remedies() -> None:
    text = 'remedy="see `perennial adapters "\n    f"ls`"\n```sh\n$ A=1 perennial up --store minio\n```\nrun perennial doctor'
    assert set(named_in(text, markdown=True)) == {"adapters ls", "up --store minio", "doctor"}
    assert set(named_in("look  perennial adapters show  and `dlq nothing`", markdown=False)) == {
        "adapters show",
        "dlq nothing",
    }
