"""Which general text an update gets: the user's file, the one that the adapter has recorded, or the default of the base.

The default of the shipped base are docstrings, which are in no blob. That of any other base is a sample of the base,
taken once, kept in the cache folder and, as a blob, in the store: another machine would sample other texts, so an
adapter keeps the blob that its newest version names. A rebuild takes the text that each recorded update names.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from perennial.learner.bases.sources import SHIPPED_NAME, report_to_stderr
from perennial.learner.model import base_sample, generation
from perennial.learner.model.base_sample import Report, sample_base
from perennial.learner.model.general_items import GeneralItems, items_of_file
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.text_cache import read_checked, write_checked
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.training.update import Updater
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.object_store import ObjectStore, get_blob, put_blob
from perennial.storage.registry.manifest import BlobRef
from perennial.streams.paths import cache_dir

_WAIT_S: Final = 1.0

_log = logging.getLogger("perennial.learner")


class DocstringText(Protocol):
    """Returns the general text of the shipped base; the first call takes seconds."""

    def __call__(self) -> GeneralText:
        """Return the text."""
        ...


class GeneralTextChoice:
    """Chooses the general text of updates and rebuilds. Thread-safe; the learner's lanes share one.

    Args:
        store: where the blobs are.
        codec: tokenizer of the base.
        row_tokens: longest row, in tokens.
        docstrings: returns the text of the shipped base.
        file: the user's own texts; empty for none.
        report: called with a line for people while the base is sampled.

    Raises:
        GeneralTextError: the user's file is not usable.
    """

    def __init__(
        self,
        store: ObjectStore,
        codec: ExampleTokenizer,
        row_tokens: int,
        docstrings: DocstringText,
        file: str = "",
        report: Report = report_to_stderr,
    ) -> None:
        self._store = store
        self._codec = codec
        self._row_tokens = row_tokens
        self._docstrings = docstrings
        self._report = report
        self._mutex = threading.Lock()
        self._texts: dict[str, GeneralText] = {}
        self._sample: bytes | None = None
        self._file = items_of_file(file).to_bytes() if file else None

    def for_update(self, updater: Updater, recorded: BlobRef | None, on_step: Callable[[], None]) -> GeneralText:
        """Return the general text for the next update of an adapter; its blob is in the store then.

        Args:
            updater: trains the update; its slot is used to sample the base.
            recorded: what the newest version of the adapter names.
            on_step: called now and then while the base is sampled or another thread samples it.

        Raises:
            StoreError: the store failed.
            IntegrityError: the recorded blob is not one of general texts.
        """
        with self._turn(on_step):
            if self._file is not None:
                return self._stored(self._file)
            is_shipped = updater.lora.base.name == SHIPPED_NAME
            kept = None if recorded is None or is_shipped else self._kept(recorded, updater.lora.base.digest)
            if kept is not None:
                return kept
            if is_shipped:
                return self._docstrings()
            if self._sample is None:
                self._sample = self._sampled(updater, on_step)
            return self._stored(self._sample)

    def for_rebuild(self, recorded: BlobRef | None, on_step: Callable[[], None]) -> GeneralText:
        """Return the general text that a recorded update was trained with: docstrings if it names none.

        Args:
            recorded: what its manifest names.
            on_step: called now and then while another thread samples the base.

        Raises:
            NotFoundError: the blob is not in the store.
            StoreError: the store failed.
            IntegrityError: the blob is not one of general texts.
        """
        with self._turn(on_step):
            return self._docstrings() if recorded is None else self._of(recorded)

    @contextmanager
    def _turn(self, on_step: Callable[[], None]) -> Iterator[None]:
        while not self._mutex.acquire(timeout=_WAIT_S):
            on_step()
        try:
            yield
        finally:
            self._mutex.release()

    def _kept(self, recorded: BlobRef, base: str) -> GeneralText | None:
        """Return the recorded sample of this base; None where it is another text, or no longer stored."""
        try:
            data = get_blob(self._store, recorded.digest)
        except NotFoundError:
            _log.warning("the general text %s is not stored; the base's own sample takes its place", recorded.digest)
            return None
        items = GeneralItems.from_bytes(data)
        return self._made(recorded, items) if items.source == "sample" and items.base == base else None

    def _stored(self, data: bytes) -> GeneralText:
        """Return the text of a blob that is put into the store, if it is not there yet."""
        ref = BlobRef(digest=digest_of(data), size_bytes=len(data))
        put_blob(self._store, data)
        return self._made(ref, GeneralItems.from_bytes(data))

    def _of(self, ref: BlobRef) -> GeneralText:
        known = self._texts.get(ref.digest)
        return known or self._made(ref, GeneralItems.from_bytes(get_blob(self._store, ref.digest)))

    def _made(self, ref: BlobRef, items: GeneralItems) -> GeneralText:
        known = self._texts.get(ref.digest)
        if known is None:
            train, anchors, _ = items.split()
            known = self._texts[ref.digest] = GeneralText(train, anchors, self._codec, self._row_tokens, ref)
        return known

    def _sampled(self, updater: Updater, on_step: Callable[[], None]) -> bytes:
        """Return the sample of the base from the cache folder; take it first where the cache does not have it."""
        path = sample_path(updater.lora.base.digest)

        def sample() -> bytes:
            items = sample_base(updater.lora, updater.codec, self._report, lock=updater.lock, on_step=on_step)
            return items.to_bytes()

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path, on_step):
                data = _read(path)
                if data is None:
                    data = sample()
                    write_checked(path, data)
                return data
        except OSError as error:  # the cache is not writable
            _log.warning("the sample of the base is not kept in %s: %s", path.parent, error)
            return sample()


def sample_path(base: str) -> Path:
    """Return the file of the cache that holds the sample of a base.

    Args:
        base: digest of the base.
    """
    sources = [Path(inspect.getfile(module)) for module in (base_sample, generation)]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    name = f"sample-{base.removeprefix('sha256:')[:16]}-{code.hexdigest()[:16]}.jsonl"
    return cache_dir() / "general-texts" / name


def _read(path: Path) -> bytes | None:
    data = read_checked(path)
    if data is None:
        return None
    try:
        GeneralItems.from_bytes(data)
    except IntegrityError:
        return None
    return data


@contextmanager
def _locked(path: Path, on_step: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time sample; the others wait for it."""
    with path.with_suffix(".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_step()
                time.sleep(_WAIT_S / 4)
        yield
