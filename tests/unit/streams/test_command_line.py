"""The command line: help for everything, exit codes as the README says, and no traceback for what a user can correct."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from perennial.storage.errors import IntegrityError, NotFoundError, PerennialError, StoreUnavailableError
from perennial.streams.cli.flow import BrokerUnreachableError
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.settings import SettingsError

command_line = importlib.import_module("perennial.streams.cli.app")  # the package has an attribute of the same name


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    command = command or get_command(command_line.app)
    yield path, command
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from commands(each, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(*each, id=" ".join(("perennial", *each[0]))) for each in commands()]
)
def test_every_command_and_option_has_a_help_text(path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", "") or getattr(parameter, "hidden", False), (path, parameter.name)
    shown = CliRunner().invoke(command_line.app, [*path, "--help"])
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert "…" not in shown.stdout.replace("`perennial …", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PerennialError("x"), 1), (IntegrityError("x"), 1), (SettingsError("x"), 2), (StoreUnavailableError("x"), 3),
        (KafkaUnavailableError("x"), 3), (BrokerUnreachableError(got="x"), 3), (NotFoundError("x"), 4),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_readme(error, code, monkeypatch, capsys):
    def failing(**_: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", failing)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupted_command_ends_with_130():
    # A process of its own: what ends a command beside a thread that waits would end the tests, too.
    code = (
        "import importlib; app = importlib.import_module('perennial.streams.cli.app')\n"
        "def interrupted(**_): raise KeyboardInterrupt\n"
        "app.app = interrupted\n"
        "app.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_an_error_says_what_came_what_is_allowed_and_what_to_do(capsys):
    command_line.print_error(PerennialError("no [bold] way", got=0, allowed=["a"], remedy="see `perennial doctor`"))
    assert (
        capsys.readouterr().err
        == "error: no [bold] way\n  got: 0\n  allowed: ['a']\n  remedy: see `perennial doctor`\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["publish", "documents", "/"], 2),
        (["publish", "documents", "/no/such/file"], 4),
        (["adapters", "show", "acme/support"], 4),
        (["adapters", "history", "acme/support", "--limit", "0"], 2),
        (["dlq", "show", "x"], 2),
        (["dlq", "ls", "--since", "yesterday"], 2),
        (["worker", "cook"], 2),
        (["watch", "--every-s", "-1"], 2),
        (["cook"], 2),
    ],
)
def test_user_errors_have_an_exit_code_and_no_traceback(arguments, code, tmp_path, monkeypatch):
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["perennial", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == code


def test_a_broker_address_without_a_port_is_no_traceback(tmp_path):
    # In a process of its own: kafka-python leaves sockets open where its constructor raises.
    environment = {**os.environ, "PERENNIAL_KAFKA": "host:port", "PERENNIAL_STORE": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-m", "perennial.streams.cli", "status"], capture_output=True, text=True, env=environment,
        check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert shown.returncode in {2, 3}
    assert "error: " in shown.stderr
    assert "Traceback" not in shown.stderr


def test_help_loads_neither_torch_nor_a_kafka_client():
    script = (
        "import sys; from perennial.streams.cli.app import app; "
        "print(sorted({'torch', 'kafka', 'confluent_kafka', 'faust', 'boto3', 'botocore'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["up", "--port", "99999"], ["up", "--port", "0"], ["up", "--port", "-1"], ["init", "--wait-s", "-1"],
        ["init", "--wait-s", "nan"], ["init", "--wait-s", "inf"], ["adapters", "history", "a/b", "--limit", "0"],
        ["adapters", "history", "a/b", "--limit", "99999999999999999999"],
        ["adapters", "rollback", "a/b", "--wait-s", "nan"], ["dlq", "ls", "--limit", "0"],
        ["dlq", "ls", "--max-replays", "0"], ["dlq", "replay", "--rate", "-1"], ["dlq", "replay", "--rate", "1e-300"],
        ["dlq", "replay", "--rate", "nan"], ["dlq", "replay", "--limit", "-1"], ["explain", "a/b", "--limit", "0"],
        ["explain", "a/b", "--limit", "99999999999999999999"], ["ask", "a/b", "x", "--max-new-tokens", "0"],
        ["watch", "--every-s", "1e300"], ["watch", "--every-s", "nan"], ["watch", "--times", "-1"],
        ["forget", "--adapter", "a/b", "--document", "d", "--wait-s", "-1"],
        ["forget", "--adapter", "a/b", "--document", "d", "--wait-s", "nan"], ["forget", "hold", "--wait-s", "-1"],
        ["forget", "release", "--wait-s", "inf"], ["forget", "status", "--limit", "0"],
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_a_usage_error(words):
    """`perennial up --port 99999` ended with exit code 1 after it had started the roles, and NaN passes any limit."""
    result = CliRunner().invoke(command_line.app, words)
    assert result.exit_code == 2, result.output
    assert words[-2] in result.output


def test_every_number_of_an_option_has_limits():
    def options(command: Any):
        yield from command.params
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    numbers = [
        option for option in options(get_command(command_line.app))
        if option.name != "parent" and re.search(r"\b(int|float)\b", str(option.type_descriptor.annotation))
    ]  # fmt: skip
    assert len(numbers) > 10
    for option in numbers:
        assert option.callback is not None or (option.min is not None and option.max is not None), option.name
