"""The public names and their signatures: a change here is a change that users notice."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

import perennial
from perennial import testing
from perennial.extras import EXTRAS, MissingExtraError, extra_of, require_extra
from perennial.storage.errors import PerennialError

SIGNATURES = """
Backend.activate(self, name: str) -> None
Backend.drain(self, name: str, timeout_s: float) -> bool
Backend.list(self) -> list[str]
Backend.load(self, name: str, weights: bytes, manifest: Manifest) -> None
Backend.unload(self, name: str) -> None
Backend.warm(self, name: str) -> None
BackendError(PerennialError)
Delivery(topic: str, partition: int, offset: int) -> None
DirectoryBackend(path: Path | str, *, base_sha256: str | None = None, base_model_name: str | None = None, grace_s: float = 0.0, durable: bool = True, clock: Callable[[], float] = ...) -> None
DirectoryBackend.activate(self, name: str) -> None
DirectoryBackend.current(self, adapter: str, alias: str = live) -> str | None
DirectoryBackend.deactivate(self, name: str) -> None
DirectoryBackend.drain(self, name: str, timeout_s: float) -> bool
DirectoryBackend.folder_of(self, name: str) -> Path
DirectoryBackend.is_active(self, name: str) -> bool
DirectoryBackend.list(self) -> list[str]
DirectoryBackend.load(self, name: str, weights: bytes, manifest: Manifest) -> None
DirectoryBackend.manifest_of(self, name: str) -> Manifest | None
DirectoryBackend.unload(self, name: str) -> None
DirectoryBackend.warm(self, name: str) -> None
DirectoryBackend.write_folder(self, inside: Path, files: dict[str, bytes]) -> None
DocumentObserved(*, adapter, document_id, text, source=..., domain=..., subjects=..., retention_class=..., expires_at=..., supersedes=..., observed_at=...) -> None
DocumentObserved.key(self) -> str
InteractionObserved(*, adapter, interaction_id, prompt=..., response=..., messages=..., correction=..., rating=..., source=..., subjects=..., retention_class=..., expires_at=..., observed_at=...) -> None
InteractionObserved.key(self) -> str
LoraConfig(rank: int, alpha: int) -> None
MemoryBackend(base_sha256: str | None = None) -> None
MemoryBackend.activate(self, name: str) -> None
MemoryBackend.deactivate(self, name: str) -> None
MemoryBackend.drain(self, name: str, timeout_s: float) -> bool
MemoryBackend.list(self) -> list[str]
MemoryBackend.load(self, name: str, weights: bytes, manifest: Manifest | None) -> None
MemoryBackend.unload(self, name: str) -> None
MemoryBackend.warm(self, name: str) -> None
MemoryPublisher(*, topic_prefix: str = , source: str = perennial-sdk, now: Callable[[], datetime] = ...) -> None
MemoryPublisher.close(self) -> None
MemoryPublisher.document(self, *, adapter: str, document_id: str, text: str, **fields: Any) -> Receipt
MemoryPublisher.flush(self, timeout_s: float | None = None) -> None
MemoryPublisher.interaction(self, *, adapter: str, interaction_id: str, prompt: str | None = None, response: str | None = None, messages: Sequence[Mapping[str, str]] | None = None, **fields: Any) -> Receipt
MemoryPublisher.publish(self, event: Event, *, event_id: str | None = None) -> Receipt
MemoryPublisher.retention(self, *, request_id: str, kind: str, adapter: str, requested_by: str, **fields: Any) -> Receipt
MissingExtraError(PerennialError, ImportError)
PeftBackend(base: Base, config: LoraConfig, *, slots: int = 2, lock: AbstractContextManager[Any] | None = None) -> None
PeftBackend.activate(self, name: str) -> None
PeftBackend.close(self) -> None
PeftBackend.current -> str | None
PeftBackend.deactivate(self, name: str) -> None
PeftBackend.drain(self, name: str, timeout_s: float) -> bool
PeftBackend.generate(self, prompt: str, max_new_tokens: int = 32, *, system: str | None = None, on_text: Callable[[str], None] | None = None) -> str
PeftBackend.lease(self) -> Iterator[str | None]
PeftBackend.list(self) -> list[str]
PeftBackend.load(self, name: str, weights: bytes, manifest: Manifest) -> None
PeftBackend.loss(self, text: str) -> float
PeftBackend.unload(self, name: str) -> None
PeftBackend.warm(self, name: str) -> None
PerennialError()
PublishError(PerennialError)
Publisher(kafka: str | None = None, *, settings: Settings | None = None, source: str = perennial-sdk, timeout_s: float = 10.0, now: Callable[[], datetime] = ...) -> None
Publisher.close(self) -> None
Publisher.document(self, *, adapter: str, document_id: str, text: str, **fields: Any) -> Receipt
Publisher.flush(self, timeout_s: float | None = None) -> None
Publisher.interaction(self, *, adapter: str, interaction_id: str, prompt: str | None = None, response: str | None = None, messages: Sequence[Mapping[str, str]] | None = None, **fields: Any) -> Receipt
Publisher.publish(self, event: Event, *, event_id: str | None = None) -> Receipt
Publisher.retention(self, *, request_id: str, kind: str, adapter: str, requested_by: str, **fields: Any) -> Receipt
Receipt(event_id: str) -> None
Receipt.done -> bool
Receipt.result(self, timeout_s: float = 30.0) -> Delivery
RetentionRequested(*, request_id, kind, adapter, selector=..., superseded_by=..., half_life=..., time_to_live=..., assurance=..., requested_by, reason=..., due_at=..., emergency=..., approved_by=..., requested_at=..., signature=...) -> None
RetentionRequested.key(self) -> str
Settings(*, kafka=..., kafka_security=..., store=..., intake=..., curate=..., retain=..., model=..., training=..., gate=..., tenants=..., serving=..., resolver=..., observe=..., devstack=..., security=..., signing=..., s3=...) -> None
Settings.environment(self) -> dict[str, str]
Settings.replace(self, **values: Any) -> Self
SglangBackend(url: str, path: Path | str, *, server_path: str | None = None, base_sha256: str | None = None, base_model_name: str | None = None, max_rank: int | None = None, tolerance_nats: float = 0.15, grace_s: float = 2.0, api_key: str | None = None, timeout_s: float = 120.0, check_s: float | None = 2.0, clock: Callable[[], float] = ...) -> None
SglangBackend.activate(self, name: str) -> None
SglangBackend.active_name(self, adapter: str, alias: str = live) -> str | None
SglangBackend.base_name -> str
SglangBackend.close(self) -> None
SglangBackend.deactivate(self, name: str) -> None
SglangBackend.drain(self, name: str, timeout_s: float) -> bool
SglangBackend.heal(self) -> tuple[str, ...]
SglangBackend.list(self) -> list[str]
SglangBackend.load(self, name: str, weights: bytes, manifest: Manifest) -> None
SglangBackend.manifest_of(self, name: str) -> Manifest | None
SglangBackend.model_for(self, adapter: str, alias: str = live) -> str
SglangBackend.unload(self, name: str) -> None
SglangBackend.warm(self, name: str) -> None
Subscriber(adapter: str, backend: Backend, *, kafka: str | None = None, store: str | ObjectStore | None = None, settings: Settings | None = None, alias: str | None = None, replica: str | None = None, metrics: Metrics | None = None, on_activate: OnActivate | None = None, drain_s: float = 2.0, clock: Callable[[], float] = ..., now: Callable[[], datetime] = ...) -> None
Subscriber.alive -> bool
Subscriber.close(self, timeout_s: float = 60.0) -> None
Subscriber.current -> Current | None
Subscriber.generation -> int
Subscriber.has_looked(self, timeout_s: float) -> bool
Subscriber.name_of(self, version: str) -> str
Subscriber.run(self, stop: threading.Event | None = None) -> None
Subscriber.served_name -> str | None
Subscriber.served_with -> str | None
Subscriber.start(self) -> Self
Subscriber.wait_for(self, generation: int, timeout_s: float) -> bool
SubscriberError(PerennialError)
UnfitVersionError(BackendError, PerennialError)
VllmBackend(url: str, path: Path | str, *, server_path: str | None = None, base_sha256: str | None = None, base_model_name: str | None = None, max_cpu_loras: int = 8, max_rank: int | None = None, tolerance_nats: float = 0.15, grace_s: float = 2.0, api_key: str | None = None, timeout_s: float = 60.0, check_s: float | None = 2.0, clock: Callable[[], float] = ...) -> None
VllmBackend.activate(self, name: str) -> None
VllmBackend.active_name(self, adapter: str, alias: str = live) -> str | None
VllmBackend.base_name -> str
VllmBackend.close(self) -> None
VllmBackend.deactivate(self, name: str) -> None
VllmBackend.drain(self, name: str, timeout_s: float) -> bool
VllmBackend.heal(self) -> tuple[str, ...]
VllmBackend.list(self) -> list[str]
VllmBackend.load(self, name: str, weights: bytes, manifest: Manifest) -> None
VllmBackend.manifest_of(self, name: str) -> Manifest | None
VllmBackend.model_for(self, adapter: str, alias: str = live) -> str
VllmBackend.unload(self, name: str) -> None
VllmBackend.warm(self, name: str) -> None
__version__: str
load_base(name: str = shipped, device: str = auto, threads: int | None = None, dtype: str = auto) -> Base
load_settings(**values: Any) -> Settings
publish_version(store: str | ObjectStore, adapter: str, *, weights: bytes | None = None, alias: str = live, base_sha256: str = sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb) -> str
small_weights(seed: int = 0, rank: int = 2) -> bytes
"""


def public_lines() -> Iterator[str]:
    names = [(perennial, name) for name in (*perennial.__all__, *perennial._NEED_WORKER)]
    names += [(testing, name) for name in testing.__all__ if name not in perennial.__all__]
    for module, name in sorted(names, key=lambda pair: pair[1]):
        member = getattr(module, name)
        if not callable(member):
            yield f"{name}: {type(member).__name__}"
        elif inspect.isclass(member) and issubclass(member, Exception):
            bases = [base.__name__ for base in member.__mro__[1:] if base not in (object, BaseException, Exception)]
            yield f"{name}({', '.join(bases)})"
        else:
            yield from _lines_of(name, member)


def _lines_of(name: str, member: Any) -> Iterator[str]:
    if not getattr(member, "_is_protocol", False):
        yield f"{name}{_signature(member)}"
    if not inspect.isclass(member):
        return
    inherited = set(dir(BaseModel)) if issubclass(member, BaseModel) else set()
    for attribute, value in inspect.getmembers(member):
        if attribute.startswith("_") or attribute in inherited:
            continue
        if inspect.isfunction(value):
            yield f"{name}.{attribute}{_signature(value)}"
        elif isinstance(value, property):
            yield f"{name}.{attribute} -> {value.fget.__annotations__['return']}"


def _signature(member: Any) -> str:
    """As inspect.signature, but without what differs from run to run or from one pydantic to the next."""
    found = inspect.signature(member)
    is_model = inspect.isclass(member) and issubclass(member, BaseModel)
    parameters = [_shortened(parameter, is_model=is_model) for parameter in found.parameters.values()]
    return str(found.replace(parameters=parameters)).replace("'", "")


def _shortened(parameter: inspect.Parameter, *, is_model: bool) -> inspect.Parameter:
    has_default = parameter.default is not parameter.empty
    if has_default and (is_model or callable(parameter.default)):
        parameter = parameter.replace(default=Given())
    return parameter.replace(annotation=parameter.empty) if is_model else parameter


class Given:
    def __repr__(self) -> str:
        return "..."


def test_public_names_and_signatures_are_pinned():
    assert "\n".join(public_lines()) == textwrap.dedent(SIGNATURES).strip()


def test_every_public_name_is_listed_and_imported_only_when_used():
    assert set(perennial.__all__) <= set(dir(perennial))
    assert set(perennial._MODULE_OF) - perennial._NEED_WORKER == set(perennial.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Publsher'"):
        perennial.Publsher  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import perennial", {"kafka", "pydantic", "minio", "typer", "torch"}),
        ("import perennial.streams.events.models", {"kafka", "minio", "typer", "torch"}),
        ("import perennial.storage.registry.registry", {"kafka", "typer", "torch"}),
        ("from perennial import Backend, DirectoryBackend", {"kafka", "torch"}),
        ("from perennial import Publisher, Subscriber", {"faust", "torch", "confluent_kafka", "river", "numpy"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, unwanted: set[str]):
    code = f"import sys; {statement}; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EXTRAS, "worker", ("torch", "not_an_installed_module"))
    monkeypatch.delitem(vars(perennial), "PeftBackend", raising=False)
    with pytest.raises(MissingExtraError, match="PeftBackend") as caught:
        perennial.PeftBackend  # noqa: B018
    assert caught.value.remedy == "pip install 'perennial-lm[worker]'"
    assert "not_an_installed_module" in str(caught.value)
    assert isinstance(caught.value, PerennialError)
    with pytest.raises(MissingExtraError, match="perennial worker"):
        require_extra("worker", "`perennial worker`")
    exec("from perennial import *", {})  # an environment without the extra can still do this


def test_modules_are_looked_up_by_their_root():
    assert extra_of("torch.nn.functional") == "worker"
    assert extra_of("jgo.maven") == "devstack"
    assert extra_of("kafka.errors") is None
    assert extra_of(None) is None


def test_python_m_perennial_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "perennial", "--help"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "publish" in done.stdout
