"""Run `perennial up`: an embedded broker, a store and all roles until Ctrl-C, with data kept over restarts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from perennial.extras import require_extra
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.addresses import http_url
from perennial.streams.devstack.discovery import ANNOUNCEMENT_FILES, announce, claim, withdraw
from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker
from perennial.streams.devstack.minio_server import STORE_URI, MinioServer
from perennial.streams.devstack.private_files import PRIVATE_UMASK, private_folder
from perennial.streams.devstack.signals import (
    check_stop_signals,
    event_on_stop_signals,
    interrupt_on_stop_signals,
    stop_signals_at_checks,
)
from perennial.streams.devstack.supervisor import ROLES, Supervisor
from perennial.streams.kafka.installation import InstallationError, provision_recorded
from perennial.streams.settings import Settings, SettingsError, load_settings

_PARTS = ("kafka", "store", "minio", "logs")
_BROKER_START_S = 120.0
"""The broker shares the processors with the roles that load at the same time."""


@dataclass
class Stack:
    """A whole installation on this machine: broker, store, topics, and all roles as processes.

    Attributes:
        settings: settings of everything. A broker or a store that they name is used; otherwise the stack starts its own.
            After `start` they hold the addresses.
        data_dir: folder for topics, objects and logs.
        port: port of the embedded broker; None: a free one.
        roles: names of the roles; names joined by `+` share one process.
        environment: variables for the roles in addition to this process's own.
        on_progress: called with one line of text per step.
        broker: the embedded broker, where one was started.
        supervisor: the roles' supervisor; None before `start`.
        minio: where the settings name no store: True starts a MinIO server, False keeps the objects in a folder.
        server: the MinIO server, where one was started.
    """

    settings: Settings
    data_dir: Path
    port: int | None = None
    roles: tuple[str, ...] = ROLES
    environment: dict[str, str] | None = None
    on_progress: Callable[[str], None] = lambda _line: None
    broker: EmbeddedBroker | None = None
    supervisor: Supervisor | None = None
    minio: bool = False
    server: MinioServer | None = None

    @property
    def s3_environment(self) -> dict[str, str]:
        """Variables that lead a client to the MinIO server; empty where there is none."""
        return self.server.environment() if self.server else {}

    def start(self) -> None:
        """Start everything and wait until every role is healthy.

        The roles' processes start first. They load their modules and the base while the broker and the store start,
        because the loading takes longer. Only when the topics exist and the store has shown that it obeys
        conditional writes do the roles get their addresses and begin to work.

        Raises:
            PerennialError: something did not start. Call `stop` then.
            KeyboardInterrupt: SIGINT or SIGTERM arrived. Call `stop` then.
        """
        with stop_signals_at_checks():
            self._start()

    def _start(self) -> None:
        _require_plaintext(self.settings)
        self.supervisor = Supervisor(
            self.settings, self.data_dir / "logs", self.roles, self.environment or {}, on_event=self.on_progress
        )
        self.supervisor.start_early()
        check_stop_signals()
        found: dict[str, Any] = {}
        if not self.settings.kafka.bootstrap:
            self.broker = EmbeddedBroker(self.data_dir / "kafka", self.port, on_progress=self.on_progress)
            self.broker.start(_BROKER_START_S)
            found["kafka"] = self.broker.bootstrap
        if not self.settings.store.uri and self.minio:
            self.server = MinioServer(self.data_dir / "minio", self.on_progress)
            self.server.start()
            found["store"] = STORE_URI
        elif not self.settings.store.uri:
            found["store"] = str(self.data_dir / "store")
        check_stop_signals()
        environment = {**(self.environment or {}), **self.s3_environment}
        s3 = S3Settings.from_env({**os.environ, **environment})
        self.settings = self.settings.replace(s3=s3, **found)
        store = open_store(self.settings.store.require_uri(), s3)
        store.probe()
        agrees = self._provision(store)
        self.supervisor.settings, self.supervisor.environment = self.settings, environment
        self.supervisor.start()
        self.on_progress("the roles load their code and the base model")
        if agrees:
            self.supervisor.wait_healthy(on_ready=lambda name: self.on_progress(f"{name} is ready"))

    def _provision(self, store: ObjectStore) -> bool:
        """Create the missing topics. Return False where a topic is not the one that the installation recorded.

        The broker must run for `perennial topics repartition` and `adopt`, so the stack starts nevertheless, and the
        roles that refuse to read are started again until the command has been run.
        """
        try:
            made = [report.name for report in provision_recorded(self.settings, store) if report.created]
        except InstallationError as error:
            self.on_progress(f"roles will not start until this is corrected: {error}")
            return False
        self.on_progress(f"{len(made)} topics made" if made else "all topics exist")
        return True

    def tend(self) -> None:
        """Restart what ended by itself."""
        if self.server:
            self.server.tend()
        if self.supervisor:
            self.supervisor.tend()

    def stop(self) -> None:
        """Stop the roles in the order of the flow, then store and broker. It may be called at any point."""
        if self.supervisor:
            self.supervisor.stop()
        if self.server:
            self.server.stop()
        if self.broker:
            self.broker.stop()


def run_up(*, data_dir: Path | None, port: int | None, shared_model: bool, store: str | None = None) -> int:
    """Run a whole installation until SIGINT or SIGTERM. Run it in the main thread.

    Args:
        data_dir: folder for topics, objects and logs; None: the one of the settings.
        port: port of the embedded broker; None: a free one.
        shared_model: scorer and learner share one process and one base model.
        store: `minio` for a MinIO server, or a store's address; None: the store of the settings, else a folder.

    Returns:
        The exit code, 0.

    Raises:
        SettingsError: `perennial up` already runs in this data folder, the folder is not usable, or the store does not
            fit it.
        PerennialError: something did not start; nothing is left running then.
    """
    interrupt_on_stop_signals()
    os.umask(PRIVATE_UMASK)
    settings = load_settings(**({"data_dir": data_dir} if data_dir else {}))
    # Absolute: other commands read the announced addresses in other working directories.
    settings = settings.replace(data_dir=settings.store.data_dir.absolute())
    require_extra("worker" if settings.kafka.bootstrap else "all", "`perennial up`")
    settings, minio = _choose_store(settings, store)
    if settings.store.uri and "://" not in settings.store.uri:
        settings = settings.replace(store=str(Path(settings.store.uri).absolute()))
    console = Console(stderr=True)
    lock = _claim_folder(settings.store.data_dir, lambda line: console.print(Text(line), soft_wrap=True))
    try:
        return _run(settings, port, console, shared_model=shared_model, minio=minio)
    finally:
        os.close(lock)


def _claim_folder(data_dir: Path, on_progress: Callable[[str], None]) -> int:
    """Make the data folder one that only this user may enter, and return its lock."""
    try:
        private_folder(data_dir, on_progress, ours=(*_PARTS, *ANNOUNCEMENT_FILES))
        for name in _PARTS:
            if (data_dir / name).exists():
                private_folder(data_dir / name, on_progress)
        return claim(data_dir)
    except OSError as error:
        raise SettingsError(
            "the data folder is not usable", got=f"{data_dir}: {error.strerror or error}",
            allowed="a folder that this user owns and may write to",
            remedy="name another one by --data-dir or PERENNIAL_DATA_DIR",
        ) from error  # fmt: skip


def _run(settings: Settings, port: int | None, console: Console, *, shared_model: bool, minio: bool) -> int:
    roles = ("intake", "streams", "scorer+learner") if shared_model else ROLES
    stack = Stack(settings, settings.store.data_dir, port, roles, minio=minio)
    with event_on_stop_signals(interrupt_again=True) as stop:
        _start_and_show(stack, console)
        try:
            _announce(stack, console)
            while not stop.wait(0.5):
                stack.tend()
        finally:
            console.print("stopping: intake, streams, scorer, learner, broker")
            withdraw(settings.store.data_dir)
            stack.stop()
            console.print(Text(f"stopped; everything learned is kept in {settings.store.data_dir}"), soft_wrap=True)
    return 0


def _start_and_show(stack: Stack, console: Console) -> None:
    """Start everything and print each step; stop everything again where a step fails or a signal arrives."""
    with console.status("starting") as spinner:

        def print_step(line: str) -> None:
            console.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), f" {line}"), highlight=False)
            spinner.update(Text(line))

        stack.on_progress = print_step
        try:
            stack.start()
        except BaseException:
            stack.stop()
            raise


def _require_plaintext(settings: Settings) -> None:
    """Raise SettingsError where clients would speak TLS or SASL to the embedded broker, which has neither."""
    if not settings.kafka.bootstrap and settings.kafka_security.protocol != "plaintext":
        raise SettingsError(
            "the embedded broker has neither TLS nor SASL",
            got=f"PERENNIAL_KAFKA_SECURITY={settings.kafka_security.protocol}, and PERENNIAL_KAFKA is not set",
            allowed="PERENNIAL_KAFKA_SECURITY=plaintext, or a broker of your own",
            remedy="set PERENNIAL_KAFKA to that broker, or unset PERENNIAL_KAFKA_SECURITY",
        )


def _choose_store(settings: Settings, store: str | None) -> tuple[Settings, bool]:
    """Return the settings with the store that was asked for, and whether to start a MinIO server.

    A data folder keeps the kind of store that it began with: offsets and objects belong together. Raise SettingsError
    where another kind is asked for.
    """
    in_folder, in_minio = settings.store.data_dir / "store", settings.store.data_dir / "minio"
    if store == "minio":
        if in_folder.exists():
            raise SettingsError(
                "this data folder keeps its objects in a folder", got="--store minio", allowed=str(in_folder),
                remedy="leave out --store, or name another --data-dir",
            )  # fmt: skip
        return settings.replace(store=""), True
    if store:
        return settings.replace(store=store), False
    return settings, not settings.store.uri and in_minio.exists() and not in_folder.exists()


def _announce(stack: Stack, console: Console) -> None:
    settings, supervisor = stack.settings, stack.supervisor
    if supervisor is None:
        return
    ports = {name: role.port for name, role in supervisor.children.items()}
    announce(
        settings.store.data_dir, kafka=settings.kafka.bootstrap, store=settings.store.uri, topic_prefix=settings.kafka.topic_prefix, metrics=ports,
        s3=stack.s3_environment,
    )  # fmt: skip
    lines = [
        f"Kafka     {settings.kafka.bootstrap}",
        f"store     {settings.store.uri}",
        *(f"          {name}={value}" for name, value in stack.s3_environment.items() if value),
        f"logs      {settings.store.data_dir / 'logs'}",
        *(
            f"metrics   {http_url(settings.observe.metrics_host, port, '/metrics')}  ({name})"
            for name, port in ports.items()
        ),
        "",
        "publish   perennial publish documents FILE.jsonl",
        """          echo '{"adapter":"acme/support","document_id":"1","text":"…"}' \\""",
        f"            | kcat -b {settings.kafka.bootstrap} -t {settings.kafka.topic('documents')} -P",
        "look      perennial watch     perennial status     perennial adapters ls",
        "stop      Ctrl-C",
    ]
    console.print(Panel(Text("\n".join(lines)), title="perennial is up", expand=False), highlight=False, soft_wrap=True)
