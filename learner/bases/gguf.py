"""Conversion of GGUF files to model folders in the cache, once per file.

GGUF is the file format of llama.cpp; most of its weights are quantised. transformers reads many families of it and
turns the weights into fp32. That takes a minute for a small model, so the result is kept as a folder with safetensors
weights, named by the digest of the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, Final

from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.quiet import quiet_transformers
from perennial.streams.paths import cache_dir

MAX_FILE_BYTES: Final = 64 << 30
_MAX_ENTRIES: Final = 1 << 20
_HEADER: Final = struct.Struct("<4sIQQ")
_VERSIONS: Final = (2, 3)
_CONVERTER: Final = "1"
"""Part of the folder's name: raise it where the conversion gives other files."""
IMPORT_FILE: Final = "perennial-import.json"

Report = Callable[[str], None]


def converted_folder(path: Path, report: Report, *, sha256: str | None = None, again: bool = False) -> Path:
    """Return the folder of a converted GGUF file; convert the file first where the cache does not have it.

    Processes that want the same file wait for the first one. A conversion that was interrupted leaves nothing.

    Args:
        path: The GGUF file.
        report: Called with a line for people before anything that takes long.
        sha256: Digest in hexadecimal that the file must have; None: any.
        again: Convert also where the cache has the folder.

    Raises:
        BaseModelError: The file is not a GGUF file that transformers reads, or has another digest.
    """
    check_header(path)
    digest = _sha256(path)
    if sha256 is not None and digest != sha256:
        raise BaseModelError(
            "The file is not the one that is pinned",
            got=f"{path}: sha256 {digest}",
            allowed=f"sha256 {sha256}",
            remedy="install the package again, or give the path of the file to use it as it is",
        )
    folder = cache_dir() / "bases" / f"{path.stem[:64]}-{digest[:16]}-{_CONVERTER}"
    if again or not is_whole(folder):
        with _locked(folder):
            if again or not is_whole(folder):
                report(f"converting {path.name} ({path.stat().st_size >> 20} MiB) to {folder}; this is done once")
                _convert(path, folder, digest)
    return folder


def check_header(path: Path) -> None:
    """Check that a file begins as a GGUF file of a known version, with plausible counts, before a library reads it.

    Raises:
        BaseModelError: It does not.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    size = path.stat().st_size
    magic, version, tensors, keys = _HEADER.unpack(head) if len(head) == _HEADER.size else (head[:4], 0, 0, 0)
    plausible = 0 < tensors <= _MAX_ENTRIES and keys <= _MAX_ENTRIES and size <= MAX_FILE_BYTES
    if magic != b"GGUF" or version not in _VERSIONS or not plausible:
        raise BaseModelError(
            "Not a GGUF file",
            got=f"{path}: {size} bytes, begins with {magic!r}, version {version}, {tensors} tensors, {keys} keys",
            allowed=f"GGUF version {' or '.join(map(str, _VERSIONS))}, up to {MAX_FILE_BYTES >> 30} GiB",
            remedy="give the file that llama.cpp or a model's publisher wrote, or a folder with safetensors weights",
        )


def is_whole(folder: Path) -> bool:
    """Return whether the cache has the folder, with every file in the size that the conversion wrote."""
    try:
        files: dict[str, int] = json.loads((folder / IMPORT_FILE).read_bytes())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def imported() -> list[tuple[Path, dict[str, Any]]]:
    """Return the converted folders of the cache with what is recorded of each: source, sha256 and files."""
    folders = sorted((cache_dir() / "bases").glob("*/"))
    return [(folder, json.loads((folder / IMPORT_FILE).read_bytes())) for folder in folders if is_whole(folder)]


def _convert(path: Path, folder: Path, digest: str) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".importing-", dir=folder.parent))
    try:
        try:
            _write_model(path, staging)
        # Hazard: a damaged file makes the reader raise nearly anything.
        except Exception as error:
            raise BaseModelError(
                "The GGUF file cannot be read",
                got=f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400],
                allowed="a whole file of a family that transformers reads: Llama, Mistral, Qwen, Gemma, Phi and others",
                remedy="take another file, or the model's safetensors weights as a folder or hub id",
            ) from error
        files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        record = {"source": path.name, "sha256": digest, "converter": _CONVERTER, "files": files}
        (staging / IMPORT_FILE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_model(file: Path, folder: Path) -> None:
    """Write the model and its tokenizer as save_pretrained writes them, with the tokens that end and pad a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers(), redirect_stderr(io.StringIO()):  # the reader of GGUF draws a bar of its own
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # The tokenizer of a GGUF file may come with the default end token of its class; the config has the file's own.
        end = model.config.eos_token_id
        if isinstance(end, int) and tokenizer.eos_token_id != end:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Some files ask for a clean-up of decoded text that transformers does not do for these tokenizers, and warns of.
        tokenizer.clean_up_tokenization_spaces = False
        # save_pretrained would ask the quantizer, which cannot write what was made fp32.
        for name in ("hf_quantizer", "quantization_method"):
            with suppress(AttributeError):
                delattr(model, name)
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The config is part of the base's digest, which must be the same under every release of transformers.
    for path in (folder / "config.json", folder / "generation_config.json"):
        config = json.loads(path.read_bytes())
        config.pop("transformers_version", None)
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time convert into a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
