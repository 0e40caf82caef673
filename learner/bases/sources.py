"""The folder of a base by its name: shipped, carried by a package, a GGUF file, a folder, or an id on the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.gguf import Report, converted_folder
from perennial.learner.bases.packaged import PACKAGED
from perennial.learner.bases.quiet import quiet_transformers
from perennial.streams.paths import expand_path

SHIPPED_NAME: Final = "shipped"
SHIPPED_FOLDER: Final = Path(__file__).parents[1] / "model" / "shipped" / "base-v1"
WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
# What decides how a text becomes ids and ids become logits. generation_config.json is left out: it holds
# sampling defaults, which a user may change without making another base.
IDENTITY_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?")


def report_to_stderr(line: str) -> None:
    """Print a line for people where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


def folder_of(name: str, report: Report = report_to_stderr, *, again: bool = False) -> Path:
    """Return the local folder of a base.

    A GGUF file is converted and a hub id is downloaded, each once.

    Args:
        name: `shipped`, a name in `PACKAGED`, a `.gguf` file, a folder, or a hub id (`owner/model`,
            `owner/model@revision`).
        report: Called with a line for people before anything that takes long.
        again: Convert a GGUF file also where the cache has the result.

    Raises:
        BaseModelError: There is no such base, or it cannot be read.
    """
    if name == SHIPPED_NAME:
        return SHIPPED_FOLDER
    packaged = PACKAGED.get(name)
    if packaged is not None:
        return converted_folder(packaged.require_path(), report, sha256=packaged.sha256, again=again)
    path = expand_path(name)
    if name and path.is_dir():  # an empty name would be the current folder
        return path
    if name.lower().endswith(".gguf") and path.is_file():
        return converted_folder(path.resolve(), report, again=again)
    named = ", ".join(f"`{known}`" for known in (SHIPPED_NAME, *PACKAGED))
    choices = f"{named}, an existing folder or .gguf file, or a hub id such as owner/model"
    if not HUB_ID.fullmatch(name) or name.lower().endswith(".gguf"):
        raise BaseModelError(
            "No such model folder or file",
            got=name,
            allowed=choices,
            remedy=f"correct the path, or set `{SHIPPED_NAME}` for the model that is installed with this package",
        )
    return _downloaded(name, choices)


def _downloaded(name: str, choices: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    wanted = [WEIGHTS_FILE, WEIGHTS_INDEX_FILE, "model-*-of-*.safetensors", "generation_config.json", *IDENTITY_FILES]
    try:
        with quiet_transformers():
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BaseModelError(
            "Neither a folder nor a model that the hub provides",
            got=name,
            allowed=choices,
            remedy=f"correct the name, log in if it is gated, or set `{SHIPPED_NAME}` ({type(error).__name__})",
        ) from error
